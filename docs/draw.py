"""Draw the figures of docs/assets that show tables of RESULTS.md (step.svg is drawn by hand).

    python docs/draw.py
"""
import math
import re
from pathlib import Path

HERE = Path(__file__).parent
STYLE = """<style> svg { font: 13px sans-serif }
text, circle { fill: currentColor } path { fill: none; stroke: currentColor }
.ink { color: #24292f } .grid { color: #d0d7de } .paper { fill: #fff; stroke: none }
.c0 { color: #c0392b } .c1 { color: #1f6fb2 } .c2 { color: #9a6200 } .c3 { color: #1a7f37 }
.c4 { color: #8250df } @media (prefers-color-scheme: dark) {
.ink { color: #e6edf3 } .grid { color: #3d444d } .paper { fill: #0d1117 }
.c0 { color: #ff7b6b } .c1 { color: #6cb6ff } .c2 { color: #e3a84f } .c3 { color: #57c274 }
.c4 { color: #c297ff } }
</style>"""


def svg(height, *body):
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" '
                      f'class="ink">{STYLE}<path class="paper" d="M0 0H800V{height}H0Z"/>',
                      *body, "</svg>\n"])


def words(x, y, text, anchor="middle"):
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{text}</text>'


def table(text, title):
    """Read the table under a heading: [(row's name, {column: (number, deviation)})].

    "second list: FD | KL" are the columns "second list: FD" and "second list: KL".
    """
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0].replace("**", "")
    (_, *columns), *lines = ([cell.strip() for cell in line.split("|")[1:-1]]
                             for line in section.splitlines() if line.startswith("| "))
    group, rows = "", []
    for i, name in enumerate(columns):
        group = name.partition(":")[0] + ": " if ":" in name else group
        columns[i] = group + name.removeprefix(group)
    for name, *cells in lines:
        numbers = [re.findall(r"\d[\d.]*", cell.replace(",", "")) for cell in cells]
        rows.append((name, {column: (float(n[0]), float([*n, 0][1]))
                            for column, n in zip(columns, numbers) if n}))
    return rows


def above_floor(rows, column):
    """[(row's name, (FD minus that of real audio, deviation))]; FD to teacher: the teacher's."""
    floor = dict(rows)["teacher, 25 steps" if column.endswith("to teacher") else
                       "real audio, rendered again"][column][0]
    return [(name, (row[column][0] - floor, row[column][1])) for name, row in rows if column in row]


def over_steps(rows, column):
    return [(int(name.replace(",", "")), y) for name, y in above_floor(rows, column)
            if name[0].isdigit()]


def scale(low, high, start, end, f=float):
    """The function that puts [low, high] on [start, end]; f: float, or math.log."""
    return lambda v: start + (end - start) * (f(v) - f(low)) / (f(high) - f(low))


def lines(x_name, y_name, y_ticks, f, curves):
    """Curves {name: [(x, (y, deviation))]}, x on a logarithmic scale, y on that of f."""
    xs, body, end, place = sorted({x for c in curves.values() for x, _ in c}), [], 1e9, 340
    X, Y = scale(xs[0], xs[-1], 80, 600, math.log), scale(y_ticks[0], y_ticks[-1], 320, 24, f)
    for x in reversed(xs):
        body.append(f'<path class="grid" d="M{X(x):.1f} 24V320"/>')
        if end - X(x) > 42:                             # there is room for the number
            body.append(words(X(x), 342, f"{x:,.0f}"))
            end = X(x)
    for y in y_ticks:
        body += [f'<path class="grid" d="M70 {Y(y):.1f}H600"/>', words(62, Y(y) + 4, y, "end")]
    for i, (name, points) in sorted(enumerate(curves.items()), key=lambda c: c[1][1][-1][1]):
        d = "L".join(f"{X(x):.1f} {Y(y):.1f}" for x, (y, _) in points)
        body.append(f'<g class="c{i}"><path stroke-width="2" d="M{d}"/>')
        for x, (y, deviation) in points:
            body += [f'<path d="M{X(x):.1f} {Y(y - deviation):.1f}V{Y(y + deviation):.1f}"/>',
                     f'<circle cx="{X(x):.1f}" cy="{Y(y):.1f}" r="3.5"/>']
        place = min(place - 16, Y(y) + 4)               # names do not cover each other
        body += [words(X(x) + 10, place, name, "start"), "</g>"]
    return svg(380, *body, words(335, 366, x_name),
               f'<g transform="translate(20 172) rotate(-90)">{words(0, 0, y_name)}</g>')


def dots(rows, column):
    """FD above its floor, a line for each row but the two floors."""
    body, kinds, y, X = [], {}, 28, scale(0, 90, 280, 770)
    for (name, row), (_, (mean, std)) in zip(rows, above_floor(rows, column), strict=True):
        if "steps x captions" in row:
            i = kinds.setdefault(name.split()[0], len(kinds))
            steps, captions = row["steps x captions"]
            name = name.partition(" (")[0] + f", {steps:,.0f} x {captions:.0f}" * (steps > 0)
            body += [words(268, y + 4, name, "end"), f'<g class="c{i}">',
                     f'<path d="M{X(mean - std):.1f} {y}H{X(mean + std):.1f}"/>',
                     f'<circle cx="{X(mean):.1f}" cy="{y}" r="5"/></g>']
            y += 30
    for v in range(0, 91, 10):
        body[:0] = [f'<path class="grid" d="M{X(v):.1f} 16V{y - 12}"/>', words(X(v), y + 6, v)]
    return svg(y + 42, *body, words(525, y + 30, "FD to teacher, above its floor"))


def figures(text):
    """{file: picture} from the text of RESULTS.md; each run in the curve's columns is drawn."""
    rows, pairs = table(text, "The learning curve"), table(text, "What the captions cover")
    curve = {column: over_steps(rows, column) for column in rows[-1][1] if "FD" in column}
    first, *_ = curve
    lowest = min(y for points in curve.values() for _, (y, _) in points)
    ticks = [y for y in (1.25, 2.5, 5, 10, 20, 40) if y > lowest / 2]
    teacher = dict(above_floor(rows, first))["teacher, 25 steps"]
    curve["teacher, 25 steps: FD"] = [(x, teacher) for x, _ in curve[first]]
    cover = {kind: over_steps(pairs, f"{kind}: FD to teacher")
             for kind in ("seen pairs", "unseen pairs")}
    passes, steps, above = {}, "training steps", "above its floor"
    for name, row in table(text, "Passes against quality"):
        passes.setdefault(re.split(r", | \(", name)[0], []).append((row["passes"][0], row["FD"]))
    return {
        "curve.svg": lines(steps, above, ticks, math.log, curve),
        "coverage.svg": lines(steps, f"FD to teacher, {above}", range(0, 61, 10), float, cover),
        "queries.svg": lines("UNet passes", "FD", (20, 50, 100, 200, 500), math.log, passes),
        "families.svg": dots(table(text, "One teacher, every family"), "third list: FD to teacher")}


if __name__ == "__main__":
    for name, picture in figures((HERE / "RESULTS.md").read_text("utf-8")).items():
        (HERE / "assets" / name).write_text(picture, "utf-8")
