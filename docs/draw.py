"""Draw the figures of docs/assets: a training step (step.json), the curve (RESULTS.md).

    python docs/draw.py
"""
import json
import math
import re
from pathlib import Path

HERE = Path(__file__).parent
STYLE = (HERE / "figure.css").read_text("utf-8")


def svg(height, *body):
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {height}" '
                      f'class="ink"><style>{STYLE}</style>',
                      f'<path class="paper" d="M0 0H800V{height}H0Z"/>', *body, "</svg>\n"])


def words(x, y, text, anchor="middle"):
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{text}</text>'


def label(x, y, text):
    """words(), bold with a * before them, and in x_0 with the 0 below the line."""
    lowered = r'<tspan dy="4" font-size="10">\1</tspan><tspan dy="-4">\2</tspan>'
    line = words(x, y, re.sub("_(.)(.*)", lowered, text.removeprefix("*")))
    return f'<g font-weight="bold">{line}</g>' if text[0] == "*" else line


def step():
    """One training step. In step.json * makes a line bold, x_0 lowers a letter."""
    plan = json.loads((HERE / "step.json").read_text("utf-8"))
    body = [f'<marker id="{look}head" class="{look} head" viewBox="-9 -5 9 10" markerWidth="9" '
            'markerHeight="10" markerUnits="userSpaceOnUse" orient="auto">'
            '<path class="head" d="M0 0L-9 4.5V-4.5Z"/></marker>' for look in ("", "c0", "c1")]
    for x, y, w, h, look, text in plan["boxes"]:
        lines = text.split("|")
        body.append(f'<rect class="{look}" x="{x}" y="{y}" width="{w}" height="{h}" rx="5"/>')
        body += [label(x + w / 2, y + h / 2 + 18 * i - 9 * len(lines) + 14, line)
                 for i, line in enumerate(lines) if line]
    body += [f'<g class="{look}"><path d="{d}" marker-end="url(#{look[:2]}head)"/></g>'
             for look, d in plan["arrows"]]
    body += [f'<g class="{look}">{label(x, y, text)}</g>' for x, y, look, text in plan["words"]]
    return svg(400, *body)


def table(text, title):
    """Read the table under a heading: [(row's name, {column: number})]."""
    section = text.split(f"\n## {title}\n")[1].split("\n## ")[0].replace("**", "")
    (_, *columns), *lines = ([cell.strip() for cell in line.split("|")[1:-1]]
                             for line in section.splitlines() if line.startswith("| "))
    return [(name, {column: float(cell) for column, cell in zip(columns, cells) if cell})
            for name, *cells in lines]


def above_floor(rows, column):
    """[(row's name, FD minus that of real audio)]; for FD to teacher minus the teacher's."""
    floor = dict(rows)["teacher, 25 steps" if "to teacher" in column else
                       "real audio, rendered again"][column]
    return [(name, row[column] - floor) for name, row in rows if column in row]


def lines(curves, y_ticks=(5, 10, 20, 40)):
    """Curves {name: [(step, y)]}, on logarithmic scales."""
    xs, body, end, place = sorted({x for c in curves.values() for x, _ in c}), [], 1e9, {}
    X = lambda x: 80 + 520 * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
    Y = lambda y: 320 - 296 * math.log(y / y_ticks[0]) / math.log(y_ticks[-1] / y_ticks[0])
    for x in reversed(xs):
        body.append(f'<path class="grid" d="M{X(x):.1f} 24V320"/>')
        if end - X(x) > 42:                             # there is room for the number
            body.append(words(X(x), 342, f"{x:,.0f}"))
            end = X(x)
    for y in y_ticks:
        body += [f'<path class="grid" d="M70 {Y(y):.1f}H600"/>', words(62, Y(y) + 4, y, "end")]
    for i, (name, points) in sorted(enumerate(curves.items()), key=lambda c: c[1][1][-1][1]):
        d = "L".join(f"{X(x):.1f} {Y(y):.1f}" for x, y in points)
        body.append(f'<g class="c{i}"><path stroke-width="2" d="M{d}"/>')
        body += [f'<circle cx="{X(x):.1f}" cy="{Y(y):.1f}" r="3.5"/>' for x, y in points]
        x, y = points[-1]
        place[x] = min(place.get(x, 340) - 16, Y(y) + 4)            # names do not cover each other
        body += [words(X(x) + 10, place[x], name, "start"), "</g>"]
    return svg(380, *body, words(335, 366, "training steps"),
               f'<g transform="translate(20 172) rotate(-90)">{words(0, 0, "above its floor")}</g>')


def figures(text):
    """{file: picture} from the text of RESULTS.md; each run in the curve's columns is drawn."""
    rows = table(text, "The learning curve")
    curve = {column: [(int(name.replace(",", "")), y) for name, y in above_floor(rows, column)
                      if name[0].isdigit()] for column in rows[-1][1] if "FD" in column}
    teacher = dict(above_floor(rows, "FD"))["teacher, 25 steps"]
    curve["teacher, 25 steps: FD"] = [(x, teacher) for x, _ in curve["FD"]]
    return {"step.svg": step(), "curve.svg": lines(curve)}


if __name__ == "__main__":
    for name, picture in figures((HERE / "RESULTS.md").read_text("utf-8")).items():
        (HERE / "assets" / name).write_text(picture, "utf-8")
