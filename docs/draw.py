"""Draw the figures of docs/assets: a training step, and tables of RESULTS.md.

    python docs/draw.py
"""
import math
import re
from pathlib import Path

HERE = Path(__file__).parent
STYLE = """<style> svg { font: 13px sans-serif }
path, rect { fill: none; stroke: currentColor } text, circle, .head { fill: currentColor }
.wide { stroke-width: 2.5 } .head, .paper { stroke: none }
.ink { color: #24292f } .grid { color: #d0d7de } .in, .paper { fill: #fff }
.c0 { color: #c0392b } .c1 { color: #1f6fb2 } .c2 { color: #9a6200 } .c3 { color: #1a7f37 }
.c4 { color: #8250df } .fill { fill: #e9edf1 }
@media (prefers-color-scheme: dark) {
.ink { color: #e6edf3 } .grid { color: #3d444d } .in, .paper { fill: #0d1117 }
.c0 { color: #ff7b6b } .c1 { color: #6cb6ff } .c2 { color: #e3a84f } .c3 { color: #57c274 }
.c4 { color: #c297ff } .fill { fill: #262d35 } }
</style>"""
# A training step. Boxes: x, y, width, height, class, lines; * makes one bold, x_0 lowers a letter.
BOXES = (
    (520, 66, 150, 270, "fill", ""), (10, 112, 92, 36, "", "noise z_T"),
    (10, 164, 92, 36, "", "caption y"),
    (136, 105, 116, 102, "c0 wide", "*student|a UNet, one pass|(eq. 1)"),
    (286, 134, 64, 44, "", "x_0|a clip"),
    (379, 122, 114, 68, "", "add noise,|random t (eq. 2)|x_t"),
    (532, 102, 126, 46, "in", "adapters off:|*teacher"),
    (532, 162, 126, 46, "in c1 wide", "adapters on:|*LoRA teacher"),
    (700, 122, 96, 68, "c0", "difference|of the two|(VSD, eq. 3)"),
    (266, 60, 104, 44, "in c0", "total variation|(eq. 6), optional"),
    (379, 260, 114, 68, "", "add fresh noise,|another t|(eq. 2)"),
    (532, 271, 126, 46, "in c1 wide", "adapters on:|*LoRA teacher"),
    (700, 260, 96, 68, "c1", "error of its|noise estimate|(eq. 8)"))
ARROWS = (          # class, path
    ("", "M102 130H134"), ("", "M102 182H134"), ("", "M252 156H284"), ("", "M350 156H377"),
    ("", "M493 156C508 156 504 126 530 126"), ("", "M493 156C508 156 504 184 530 184"),
    ("", "M658 126C680 126 682 156 698 156"), ("", "M658 184C680 184 682 156 698 156"),
    ("", "M318 178V294H377"), ("", "M493 294H530"), ("", "M658 294H698"),
    ("c0 wide", "M748 122V36H194V103"), ("c0", "M318 134V106"), ("c0", "M318 60V38"),
    ("c1 wide", "M748 328V366H595V319"))
SAYS = (            # x, y, class, text
    (471, 25, "c0", "*student's loss: the difference is its gradient at x_0"),
    (595, 88, "", "*one frozen UNet"), (595, 233, "", "both read x_t, t and y"),
    (671, 388, "c1", "*LoRA teacher's loss: denoise x_0"),
    (150, 330, "c0", "red: trains the student"),
    (150, 352, "c1", "blue: trains the LoRA teacher's adapters"),
    (150, 374, "", "plain: forward; the filled UNet never changes"))


def svg(height, *body):
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" '
                      f'class="ink">{STYLE}<path class="paper" d="M0 0H800V{height}H0Z"/>',
                      *body, "</svg>\n"])


def words(x, y, text, anchor="middle"):
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{text}</text>'


def label(x, y, text):
    """words(), bold with a * before them, and in x_0 with the 0 below the line."""
    lowered = r'<tspan dy="4" font-size="10">\1</tspan><tspan dy="-4">\2</tspan>'
    line = words(x, y, re.sub("_(.)(.*)", lowered, text.removeprefix("*")))
    return f'<g font-weight="bold">{line}</g>' if text[0] == "*" else line


def step():
    """One training step, from BOXES, ARROWS and SAYS."""
    body = [f'<marker id="{look}head" class="{look} head" viewBox="-9 -5 9 10" markerWidth="9" '
            'markerHeight="10" markerUnits="userSpaceOnUse" orient="auto">'
            '<path class="head" d="M0 0L-9 4.5V-4.5Z"/></marker>' for look in ("", "c0", "c1")]
    for x, y, w, h, look, text in BOXES:
        lines = text.split("|")
        body.append(f'<rect class="{look}" x="{x}" y="{y}" width="{w}" height="{h}" rx="5"/>')
        body += [label(x + w / 2, y + h / 2 + 18 * i - 9 * len(lines) + 14, line)
                 for i, line in enumerate(lines) if line]
    body += [f'<g class="{look}"><path d="{d}" marker-end="url(#{look[:2]}head)"/></g>'
             for look, d in ARROWS]
    body += [f'<g class="{look}">{label(x, y, text)}</g>' for x, y, look, text in SAYS]
    return svg(400, *body)


def table(text, title):
    """Read the table under a heading: [(row's name, {column: (number, deviation)})]."""
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0].replace("**", "")
    (_, *columns), *lines = ([cell.strip() for cell in line.split("|")[1:-1]]
                             for line in section.splitlines() if line.startswith("| "))
    rows = []
    for name, *cells in lines:
        numbers = [re.findall(r"\d[\d.]*", cell.replace(",", "")) for cell in cells]
        rows.append((name, {column: (float(n[0]), float([*n, 0][1]))
                            for column, n in zip(columns, numbers) if n}))
    return rows


def above_floor(rows, column):
    """[(row's name, (FD minus that of real audio, deviation))]; FD to teacher: the teacher's."""
    floor = dict(rows)["teacher, 25 steps" if "to teacher" in column else
                       "real audio, rendered again"][column][0]
    return [(name, (row[column][0] - floor, row[column][1])) for name, row in rows if column in row]


def scale(low, high, start, end):
    """The function that puts [low, high] on [start, end], by logarithms."""
    return lambda v: start + (end - start) * math.log(v / low) / math.log(high / low)


def lines(x_name, y_name, y_ticks, curves):
    """Curves {name: [(x, (y, deviation))]}, on logarithmic scales."""
    xs, body, end, place = sorted({x for c in curves.values() for x, _ in c}), [], 1e9, 340
    X, Y = scale(xs[0], xs[-1], 80, 600), scale(y_ticks[0], y_ticks[-1], 320, 24)
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


def figures(text):
    """{file: picture} from the text of RESULTS.md; each run in the curve's columns is drawn."""
    rows, passes = table(text, "The learning curve"), {}
    curve = {column: [(int(name.replace(",", "")), y) for name, y in above_floor(rows, column)
                      if name[0].isdigit()] for column in rows[-1][1] if "FD" in column}
    first, *_ = curve
    lowest = min(y for points in curve.values() for _, (y, _) in points)
    ticks = [y for y in (1.25, 2.5, 5, 10, 20, 40) if y > lowest / 2]
    teacher = dict(above_floor(rows, first))["teacher, 25 steps"]
    curve["teacher, 25 steps: FD"] = [(x, teacher) for x, _ in curve[first]]
    for name, row in table(text, "Passes against quality"):
        passes.setdefault(re.split(r", | \(", name)[0], []).append((row["passes"][0], row["FD"]))
    return {
        "step.svg": step(),
        "curve.svg": lines("training steps", "above its floor", ticks, curve),
        "queries.svg": lines("UNet passes", "FD", (20, 50, 100, 200, 500), passes)}


if __name__ == "__main__":
    for name, picture in figures((HERE / "RESULTS.md").read_text("utf-8")).items():
        (HERE / "assets" / name).write_text(picture, "utf-8")
