"""Small drawings as inline SVG: curves, intervals, scatter plots. Colours and type are the style sheet's.

Own code instead of a plotting library: text stays text in the page's own type, a chart is readable in light and dark,
and the same numbers give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from adaptkit.report.markdown import visible

WIDTH, HEIGHT = 340, 172
LEFT, RIGHT, TOP, BOTTOM = 46, 330, 10, 148  # of the plot inside
MAX_POINTS = 200  # of a series; a longer one is averaged
MAX_DOTS = 40  # up to here every point has a dot that can be pointed at
WHISKER = 60  # half the width of an interval's drawing
MAP_SIDE, MAP_REACH = 320, 148
SHAPES = (
    '<circle class="{0}" cx="{1}" cy="{2}" r="4.2">{3}</circle>',
    '<rect class="{0}" x="{1}" y="{2}" width="7.4" height="7.4" transform="translate(-3.7 -3.7)">{3}</rect>',
    '<path class="{0}" d="M{1} {2}m0-4.9l4.9 8.6h-9.8z">{3}</path>',
    '<path class="{0}" d="M{1} {2}m0-5.2l5.2 5.2l-5.2 5.2l-5.2-5.2z">{3}</path>',
)


@dataclass(frozen=True)
class Series:
    """Points (step, value), or where `bounds` are given also (lower, upper) of each."""

    name: str
    points: Sequence[tuple[float, float]]
    bounds: Sequence[tuple[float, float]] = ()


@dataclass(frozen=True)
class Chart:
    """What one drawing of curves shows. `span`: ends of the y axis, where the data are not to decide."""

    title: str
    series: Sequence[Series]
    unit: str = ""
    span: tuple[float, float] | None = None
    zero: bool = False  # a line at 0, which is on the axis then


def line_chart(chart: Chart, last_step: int, marks: Sequence[tuple[str, int, str]] = ()) -> Markup:
    """Curves over steps 0 to `last_step`; `marks` are (style class, step, what happened there)."""
    series = [_thinned(each) for each in chart.series]
    ticks = _ticks(*_range(chart, series))
    low, high = ticks[0], ticks[-1]

    def x(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * step / max(1, last_step), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    parts = [_title(_told(chart))]
    for tick in ticks:
        style = "zero" if chart.zero and tick == 0 else "grid"
        parts.append(_line(style, LEFT, y(tick), RIGHT, y(tick)))
        parts.append(_text("end", LEFT - 6, y(tick) + 4, number(tick, high - low)))
    for anchor, step in (("start", 0), ("end", last_step)):
        parts.append(_text(anchor, x(step), BOTTOM + 17, f"step {step:,}" if step else "0"))
    parts += [_line(f"mark {kind}", x(step), TOP, x(step), BOTTOM, what) for kind, step, what in marks]
    for index, each in enumerate(series, start=1):
        parts += _curve(each, f"s{index}", x, y, high - low, chart.unit)
    return _svg(WIDTH, HEIGHT, parts, "chart")


def whisker(delta: Mapping[str, Any] | None, reach: float | None = None) -> Markup:
    """{value, ci95} of a difference: the interval, its middle, and the line of no change.

    `reach` is half the width of the scale; without one the drawing has its own.
    """
    ends = (delta or {}).get("ci95")
    if not delta or not ends:
        return Markup("")
    reach = reach or whisker_reach([delta])
    low, middle, high = (
        round(WHISKER + 4 + WHISKER * value / reach, 1) for value in (ends[0], delta["value"], ends[1])
    )
    sure = "sure" if ends[0] > 0 or ends[1] < 0 else "unsure"
    dot = Markup('<circle class="{}" cx="{}" cy="9" r="4"/>').format(sure, middle)
    parts = [_line("zero", WHISKER + 4, 1, WHISKER + 4, 17), _line("bar", low, 9, high, 9), dot]
    return _svg(2 * WHISKER + 8, 18, parts, "whisker", hidden=True)  # the table says the same in figures


def whisker_reach(deltas: Sequence[Mapping[str, Any] | None]) -> float:
    """A scale on which all of the intervals fit."""
    ends = [abs(end) for delta in deltas if delta for end in (delta["value"], *(delta.get("ci95") or ()))]
    return max(ends, default=0.0) or 1.0


def scatter(points: Sequence[tuple[float, float]], looks: Sequence[tuple[str, int, str]], told: str) -> Markup:
    """Points in [-1, 1] x [-1, 1]; `looks` are (style class, number of the shape, what it is) of each."""
    parts = [_title(told)]
    middle = MAP_SIDE / 2
    for (x, y), (style, shape, what) in zip(points, looks, strict=True):
        at = round(middle + MAP_REACH * x, 1), round(middle - MAP_REACH * y, 1)
        parts.append(Markup(SHAPES[shape % len(SHAPES)]).format(style, *at, _title(what)))
    return _svg(MAP_SIDE, MAP_SIDE, parts, "map")


def key(style: str, shape: int) -> Markup:
    """One mark of a scatter plot, for its legend."""
    return _svg(14, 14, [Markup(SHAPES[shape % len(SHAPES)]).format(style, 7, 7, "")], "key", hidden=True)


def number(value: float, spread: float | None = None) -> str:
    """Short, with as many digits as differences of `spread` need: 0.185, 256, 3e-4."""
    if value and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    digits = max(0, 2 - math.floor(math.log10(abs(spread or value) or 1.0)))
    text = f"{value:,.{min(digits, 6)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _curve(each: Series, style: str, x: Any, y: Any, spread: float, unit: str) -> list[Markup]:
    """The line, its intervals, and where points are few a dot with its figure on each."""
    parts = [
        _line(f"bound {style}", x(step), y(low), x(step), y(high))
        for (step, _), (low, high) in zip(each.points, each.bounds, strict=False)
    ]
    path = " ".join(f"{'L' if i else 'M'}{x(step)} {y(value)}" for i, (step, value) in enumerate(each.points))
    parts.append(Markup('<path class="line {}" d="{}"/>').format(style, path))
    if len(each.points) <= MAX_DOTS:
        for step, value in each.points:
            figure = _title(f"{each.name}, step {step:,g}: {number(value, spread)}{unit}")
            parts.append(
                Markup('<circle class="dot {}" cx="{}" cy="{}" r="2.6">{}</circle>').format(
                    style, x(step), y(value), figure
                )
            )
    return parts


def _thinned(each: Series) -> Series:
    """At most 200 points: means of as many neighbours as that takes, at the last one's step."""
    size = math.ceil(len(each.points) / MAX_POINTS)
    if size <= 1:
        return each
    groups = [each.points[i : i + size] for i in range(0, len(each.points), size)]
    return Series(each.name, [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups])


def _range(chart: Chart, series: Sequence[Series]) -> tuple[float, float]:
    values = [value for each in series for _, value in each.points]
    values += [end for each in series for bound in each.bounds for end in bound]
    values += [*(chart.span or ()), *([0.0] if chart.zero else [])]
    low, high = min(values), max(values)
    pad = 0.5 * (abs(low) or 1.0) if low == high else 0.0
    return low - pad, high + pad


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers that enclose both."""
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _told(chart: Chart) -> str:
    """The chart in words, for those who cannot see it."""
    told = []
    for each in chart.series:
        (first, start), (last, end) = each.points[0], each.points[-1]
        told.append(
            f"{each.name} {number(start)}{chart.unit} at step {first:,g}, {number(end)}{chart.unit} at {last:,g}"
        )
    return f"{chart.title}: {'; '.join(told)}."


def _line(style: str, x1: float, y1: float, x2: float, y2: float, what: str = "") -> Markup:
    inner = _title(what) if what else Markup("")
    return Markup('<line class="{}" x1="{}" y1="{}" x2="{}" y2="{}">{}</line>').format(style, x1, y1, x2, y2, inner)


def _text(anchor: str, x: float, y: float, text: str) -> Markup:
    return Markup('<text text-anchor="{}" x="{}" y="{}">{}</text>').format(anchor, x, y, text)


def _title(text: str) -> Markup:
    return Markup("<title>{}</title>").format(visible(text))


def _svg(width: float, height: float, parts: Sequence[Markup], style: str, hidden: bool = False) -> Markup:
    role = Markup('aria-hidden="true"') if hidden else Markup('role="img"')
    head = Markup('<svg class="{}" viewBox="0 0 {} {}" {}>').format(style, width, height, role)
    return head + Markup("").join(parts) + Markup("</svg>")
