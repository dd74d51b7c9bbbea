"""Images per second as bars, one group per cell: SVG written by hand, readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, LABELS, VALUES = 720, 130, 90  # pixels: the whole, left of the bars, right of them
BAR, GAP, TITLE = 18, 6, 30
STYLE = """\
text { font: 13px sans-serif; fill: #1f2328 } .title { font-weight: bold }
.bar { fill: #8c959f } .ours { fill: #0969da } .whisker { stroke: #1f2328 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .bar { fill: #6e7681 } .ours { fill: #58a6ff } .whisker { stroke: #e6edf3 } }"""


def draw(cells: Sequence[Mapping[str, Any]]) -> str:
    """Bars are medians, lines the quartiles; every cell has a scale of its own."""
    parts: list[str] = []
    top = 0
    for cell in cells:
        parts.append(_text(0, top + 20, f"{cell['backbone']}, {cell['precision']}: images per second", "title"))
        top += TITLE
        rates = {name: each["images_per_second"] for name, each in cell["contestants"].items()}
        scale = (WIDTH - LABELS - VALUES) / max(rate["q3"] for rate in rates.values())
        for name, rate in rates.items():
            parts += _bar(name, rate, scale, top)
            top += BAR + GAP
        top += GAP
    size = f'width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}"'
    lines = "\n".join(parts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<style>\n{STYLE}\n</style>\n{lines}\n</svg>\n'


def _bar(name: str, rate: Mapping[str, float], scale: float, top: int) -> list[str]:
    kind = "bar ours" if name == "adaptkit" else "bar"
    low, high, middle = LABELS + rate["q1"] * scale, LABELS + rate["q3"] * scale, top + BAR / 2
    return [
        _text(0, top + 14, name),
        f'<rect class="{kind}" x="{LABELS}" y="{top}" width="{rate["median"] * scale:.1f}" height="{BAR}"/>',
        f'<line class="whisker" x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}"/>',
        _text(WIDTH - VALUES + 8, top + 14, f"{rate['median']:.2f}"),
    ]


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}"{name}>{escape(text)}</text>'
