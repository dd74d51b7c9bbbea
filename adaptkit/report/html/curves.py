"""The log of a run as charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from adaptkit.report.html.charts import MAX_POINTS, Chart, Series, line_chart
from adaptkit.report.numbers import PERCENT

# title, unit, ends of the y axis, {key of the log: name in the chart}; a chart without any of its keys is left out
CHARTS: tuple[tuple[str, str, tuple[float, float] | None, dict[str, str]], ...] = (
    ("Loss", "", None, {"loss": "total", "bce": "cross-entropy"}),
    ("Coding rate, nats", "", None, {"coding_rate": "coding rate"}),
    ("Agreement of student and teacher, %", "%", None, {"bit_agreement": "bits", "agreement": "outputs"}),
    ("Bit information and entropy, bits", "", (0, 1), {"bit_information": "information", "bit_entropy": "entropy"}),
    ("Live bits", "", (0, 0), {"live_bits": "live bits"}),
    ("Entropy, bits", "", (0, 0), {"teacher_entropy": "over all images", "choice_entropy": "of a single choice"}),
    ("Rank: effective directions of the teacher", "", (0, 0), {"teacher_d_eff": "directions"}),
    ("Learning rate", "", (0, 0), {"lr": "learning rate"}),
)
NAMES = {
    "grad_norm": "Gradient norm",
    "images_per_second": "Images a second",
    "data_wait_percent": "Waiting for images, %",
    "momentum": "EMA momentum",
}
MAX_RESETS = 40  # drawn: more would be a hatching
NO_CURVE = {"step", "kind"}


def draw_curves(log: Sequence[Mapping[str, Any]], resets: Sequence[int], report: Mapping[str, Any]) -> dict[str, Any]:
    """{charts, more: [{title, names, svg}], num_resets, resets_drawn, collapses: [(step, reason)], mean_of}.

    `charts` are what tells how training went, `more` all else that the log holds.
    """
    lines, collapses = undisturbed(log)
    last = max((line["step"] for line in log if isinstance(line.get("step"), int)), default=0)
    drawn = resets if len(resets) <= MAX_RESETS else []
    marks = [("reset", step, f"step {step:,}: the head is drawn anew") for step in drawn]
    marks += [("collapse", step, f"step {step:,}: {reason}; gone back") for step, reason in collapses]
    known = {key for *_, keys in CHARTS for key in keys}
    others = [key for key in dict.fromkeys(key for line in lines for key in line) if key not in known | NO_CURVE]
    probes = [_probe_chart(log, report)]
    charts = [*(_chart(lines, *each) for each in CHARTS[:-1]), *probes, _chart(lines, *CHARTS[-1])]
    more = [_chart(lines, NAMES.get(key, key), "", None, {key: key}) for key in others]
    return {
        "charts": [_drawn(chart, last, marks) for chart in charts if chart],
        "more": [_drawn(chart, last, marks) for chart in more if chart],
        "num_resets": len(resets),
        "resets_drawn": len(drawn) == len(resets),
        "collapses": collapses,
        "mean_of": -(-len(lines) // MAX_POINTS),
    }


def undisturbed(log: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[tuple[int, str]]]:
    """The training lines that count, and the collapses: after one, the run goes back and its steps come again."""
    lines: list[Mapping[str, Any]] = []
    collapses = []
    for line in log:
        step = line.get("step")
        if not isinstance(step, int):
            continue
        if line.get("kind") == "collapse":
            collapses.append((step, str(line.get("reason", ""))))
        elif line.get("kind") == "train":
            while lines and lines[-1]["step"] >= step:
                lines.pop()
            lines.append(line)
    return lines, collapses


def _chart(
    lines: Sequence[Mapping[str, Any]], title: str, unit: str, span: tuple[float, float] | None, keys: Mapping[str, str]
) -> Chart | None:
    series = []
    for key, name in keys.items():
        points = [(line["step"], float(line[key])) for line in lines if isinstance(line.get(key), int | float)]
        series += [Series(name, points)] if points else []
    return Chart(title, series, unit, span) if series else None


def _probe_chart(log: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> Chart | None:
    """The teacher against the original, on the images that select."""
    metric = str(report.get("selection_metric", report["primary_metric"]))
    found = {line["step"]: line["delta"] for line in log if line.get("kind") == "evaluation" and line.get("delta")}
    if not found:
        return None
    points = [(step, delta["value"]) for step, delta in sorted(found.items())]
    bounds = [delta["ci95"] or (delta["value"],) * 2 for _, delta in sorted(found.items())]
    unit = "points" if metric in PERCENT else "units"
    return Chart(f"Probes: change of {metric}, {unit}", [Series("change", points, bounds)], zero=True)


def _drawn(chart: Chart, last_step: int, marks: Sequence[tuple[str, int, str]]) -> dict[str, Any]:
    names = [each.name for each in chart.series] if len(chart.series) > 1 else []
    drawn: Markup = line_chart(chart, last_step, marks)
    return {"title": chart.title, "names": names, "svg": drawn}
