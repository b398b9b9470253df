"""The pictures of the concepts, drawn with the report's own pieces; each file has its style and stands by itself."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from minitron_cli.drawing.svg import el, join, line, polyline, text
from minitron_cli.report.network import network

STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: #59636e; }
.ground { fill: #ffffff; } .name { fill: #1b1f24; font-weight: 600; } .value { fill: #1b1f24; }
.box { fill: #f4f6f8; stroke: #aab2ba; } .strong { fill: #eaf3fa; stroke: #0072b2; } .axis { stroke: #59636e; }
.grid { stroke: #d9dee3; } .arrow { fill: none; stroke: #59636e; stroke-width: 1.6; } .tip { fill: #59636e; }
.attention { fill: #9a4f86; } .mlp, .a { fill: #0072b2; } .embedding { fill: #59636e; } .b { fill: #c85200; }
.outline { fill: #f4f6f8; stroke: #8a939c; stroke-dasharray: 3 3; } .between { stroke: #ffffff; stroke-width: 1.6; }
.between.thin { stroke-width: .6; } .gone { text-decoration: line-through; } .dot { fill: #8a939c; }
.front { fill: none; stroke: #c85200; stroke-width: 2; stroke-dasharray: 5 4; }
@media (prefers-color-scheme: dark) {
  .ground { fill: #14171b; } text { fill: #9aa4af; } .name, .value { fill: #e6e9ec; } .grid { stroke: #313840; }
  .box { fill: #1c2127; stroke: #59636e; } .strong { fill: #16293a; stroke: #56b4e9; } .axis { stroke: #9aa4af; }
  .arrow { stroke: #9aa4af; } .tip, .embedding { fill: #9aa4af; } .attention { fill: #d98fc4; }
  .mlp, .a { fill: #56b4e9; } .b { fill: #ff9145; } .outline { fill: #1c2127; stroke: #6b7580; }
  .between { stroke: #14171b; } .front { stroke: #ff9145; }
}
"""

BEFORE = {"layers": 8, "hidden": 128, "ffn": 448, "heads": 8, "kv_heads": 4, "head_dim": 16, "vocab": 1500}
AFTER = {**BEFORE, "layers": 6, "hidden": 96, "ffn": 288, "heads": 4, "kv_heads": 2}


def pictures() -> dict[str, str]:
    """Name and SVG text of every picture."""
    return {"chain": _chain(), "cut": _cut(), "axes": _axes(), "distilling": _distilling(), "search": _search()}


def _file(width: int, height: int, label: str, parts: Sequence[Markup]) -> str:
    ground = el("rect", width=width, height=height, rx=8, class_="ground")
    body = el("style", Markup(STYLE)) + ground + join(parts)
    return str(
        el("svg", body, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {width} {height}", width=width,
           height=height, role="img", aria_label=label)
    ) + "\n"  # fmt: skip


def _box(x: float, y: float, width: float, name: str, below: str, class_: str = "box") -> Markup:
    middle = x + width / 2
    return join([
        el("rect", x=x, y=y, width=width, height=54.0, rx=6, class_=class_),
        text(middle, y + 23, name, anchor="middle", class_="name"),
        text(middle, y + 42, below, anchor="middle"),
    ])  # fmt: skip


def _arrow(x: float, y: float, x_end: float, y_end: float) -> Markup:
    """A straight arrow, to the right or down."""
    down = y_end > y
    tip = ((x_end, y_end), (x_end - 5, y_end - 8), (x_end + 5, y_end - 8)) if down else (
        (x_end, y_end), (x_end - 8, y_end - 5), (x_end - 8, y_end + 5))  # fmt: skip
    points = " ".join(f"{a:g},{b:g}" for a, b in tip)
    end = (x_end, y_end - 6) if down else (x_end - 6, y_end)
    return line(x, y, *end, "arrow") + el("polygon", points=points, class_="tip")


def _chain() -> str:
    """The stages and the directories between them."""
    parts = [
        _box(16, 20, 150, "your text", "files, Hub data sets"),
        _box(16, 110, 150, "teacher", "a checkpoint", "strong"),
    ]
    parts += [_arrow(166, 47, 206, 47), _box(206, 20, 130, "data prepare", "tokens")]
    parts += [_arrow(166, 137, 206, 137), _box(206, 110, 130, "importance", "scores"), _arrow(271, 74, 271, 110)]
    x = 376.0
    for name, below in (("search", "a shape"), ("prune", "cut weights"), ("distill", "student")):
        parts += [_arrow(x - 40, 137, x, 137), _box(x, 110, 116, name, below, "strong" if name == "distill" else "box")]
        x += 156
    parts += [
        polyline([(336, 47), (746, 47), (746, 104)], "arrow"),
        el("polygon", points="746,110 741,102 751,102", class_="tip"),
    ]
    parts += [polyline([(91, 164), (91, 200), (746, 200), (746, 170)], "arrow")]
    parts += [el("polygon", points="746,164 741,172 751,172", class_="tip")]
    parts += [text(420, 218, "the teacher teaches its student", anchor="middle")]
    parts += [text(560, 38, "the same tokens", anchor="middle")]
    return _file(830, 234, "Text becomes tokens; the teacher is scored on them, a shape is searched, the weights are "
                 "cut, and the student is distilled from the teacher on the same tokens.", parts)  # fmt: skip


def _cut() -> str:
    drawn = network(BEFORE, AFTER, [4, 5], 760)
    assert drawn is not None
    height = int(str(drawn).split('viewBox="0 0 760 ', 1)[1].split('"', 1)[0])
    inner = Markup(str(drawn).split(">", 1)[1].rsplit("</svg>", 1)[0])
    placed = el("g", inner, transform="translate(0 10)")
    return _file(760, height + 18, "A network of 8 layers before the cut, and after it with 6 narrower ones; outlines "
                 "show what left.", [placed])  # fmt: skip


def _axes() -> str:
    """One layer's matrices and which of their sides an axis is."""
    parts = []
    columns = (("q, k, v", "heads x head dim", 150.0, 70.0, "attention"), ("o", "hidden", 70.0, 150.0, "attention"),
               ("gate, up", "ffn", 190.0, 70.0, "mlp"), ("down", "hidden", 70.0, 190.0, "mlp"))  # fmt: skip
    x = 70.0
    for name, wide, width, height, kind in columns:
        y = 60.0
        parts.append(el("rect", x=x, y=y, width=width, height=height, rx=3, class_=kind))
        parts.append(text(x + width / 2, 30, name, anchor="middle", class_="name"))
        parts.append(text(x + width / 2, 50, wide, anchor="middle"))
        side = "hidden" if height == 70.0 else "ffn" if kind == "mlp" else "heads"
        parts.append(text(x - 8, y + height / 2 + 4, side, anchor="end"))
        x += width + 80
    parts.append(
        text(70, 232, "Cutting the axis hidden shortens every matrix of every layer; cutting ffn shortens three.")
    )
    parts.append(text(70, 252, "An axis is one choice of channels, applied wherever the family's file says it occurs."))
    return _file(800, 272, "The matrices of one layer with the axes of their sides: hidden and heads times head dim in "
                 "attention, hidden and ffn in the MLP.", parts)  # fmt: skip


def _distilling() -> str:
    """Teacher's and student's distributions over the next token."""
    words = ("park", "garden", "house", "sea", "moon", "others")
    teacher, student, label = (
        (0.46, 0.27, 0.12, 0.06, 0.02, 0.07),
        (0.30, 0.22, 0.16, 0.13, 0.09, 0.10),
        (1, 0, 0, 0, 0, 0),
    )
    parts = [text(20, 28, "“Lily went to play in the …”", class_="name")]
    groups = (
        ("cross-entropy: the one word of the text", label, "b"),
        ("teacher: how likely every word is", teacher, "a"),
        ("student, drawn towards the teacher", student, "dot"),
    )
    for column, (title, shares, kind) in enumerate(groups):
        left = 20.0 + 296 * column
        parts.append(text(left, 58, title))
        for row, (word, share) in enumerate(zip(words, shares, strict=True)):
            y = 72.0 + 24 * row
            parts.append(text(left + 56, y + 12, word, anchor="end", class_="value"))
            parts.append(el("rect", x=left + 64, y=y, width=max(1.0, 150.0 * share), height=16.0, class_=kind))
    parts.append(
        text(
            20,
            240,
            "KL(teacher || student) is zero when the two agree on every word, so each token of text teaches more.",
        )
    )
    return _file(860, 258, "Cross-entropy teaches one word per position; distillation the teacher's probabilities of "
                 "all words.", parts)  # fmt: skip


def _search() -> str:
    """Candidates by parameters and loss, before and after a short distillation, and the front of the latter."""
    # parameters, height of the loss after the cut, and after a short distillation (lower on the page is a lower loss)
    dots = (
        (80, 70, 150),
        (150, 96, 168),
        (210, 58, 140),
        (270, 80, 190),
        (330, 110, 176),
        (400, 64, 206),
        (450, 90, 196),
    )
    left, bottom = 60.0, 230.0
    parts = [line(left, bottom, 580, bottom, "axis"), line(left, 30, left, bottom, "axis")]
    parts += [text(320, 254, "parameters", anchor="middle"), text(left, 20, "loss", anchor="middle")]
    front: list[tuple[float, float]] = []
    for x, _, after in dots:
        if not front or after > front[-1][1]:
            front += [(left + x, front[-1][1])] if front else []
            front.append((left + x, float(after)))
    parts.append(polyline(front, "front"))
    for x, before, after in dots:
        parts.append(line(left + x, before, left + x, after, "grid"))
        parts.append(el("circle", cx=left + x, cy=float(before), r=5, class_="box"))
        parts.append(el("circle", cx=left + x, cy=float(after), r=5, class_="dot"))
    parts.append(text(590, 68, "right after the cut", class_="value"))
    parts.append(text(590, 190, "after a short distillation", class_="value"))
    parts.append(text(590, 212, "dashed: the Pareto front"))
    return _file(780, 270, "Candidates by parameters and loss: the order right after the cut is not the order after a "
                 "short distillation; those nobody beats in both form the front.", parts)  # fmt: skip
