"""`report.json`: the versioned result of a run. Written last, so that its presence means finished."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from adaptkit.report.numbers import PERCENT

SCHEMA = "adaptkit.report/1"


class _Score(Protocol):
    @property
    def value(self) -> float: ...

    @property
    def ci95(self) -> tuple[float, float] | None: ...


class _Interval(Protocol):
    @property
    def value(self) -> float: ...

    @property
    def lo(self) -> float: ...

    @property
    def hi(self) -> float: ...


def scores_to_json(scores: Mapping[str, _Score]) -> dict[str, Any]:
    """{metric: {value, ci95: [lo, hi] or null}}; the value is null where it is infinite."""
    return {
        name: {
            "value": score.value if math.isfinite(score.value) else None,  # no law fits: alpha_req of a narrow cloud
            "ci95": list(score.ci95) if score.ci95 else None,
        }
        for name, score in scores.items()
    }


def interval_to_json(interval: _Interval | None) -> dict[str, Any] | None:
    """{value, ci95: [lo, hi]}, or null."""
    return {"value": interval.value, "ci95": [interval.lo, interval.hi]} if interval else None


def deltas_to_json(deltas: Mapping[str, _Interval | None]) -> dict[str, Any]:
    """{metric: {value, ci95}}; metrics without an interval are left out."""
    return {name: interval_to_json(interval) for name, interval in deltas.items() if interval is not None}


def sentence(
    verdict: str, metric: str, delta: _Interval | None, guard_fired: bool, collapse: str | None, labels: bool
) -> str:
    """The verdict in one sentence. Without labels it never speaks of accuracy."""
    unit = " points" if metric in PERCENT else ""
    change = f"{metric} {delta.value:+.2f}{unit} (95 % {delta.lo:+.2f} to {delta.hi:+.2f})" if delta else metric
    fits = "fits your images better" if labels else "scores better on measures that need no labels"
    if verdict == "collapsed":
        return f"Training collapsed ({collapse}); the best backbone so far is exported."
    if verdict == "improved":
        return f"Improved: the adapted backbone {fits}: {change}."
    if verdict == "unchanged":
        return f"Unchanged: held-out images cannot tell the selected adapted backbone from the original: {change}."
    if guard_fired:
        return f"Keep the one you have: the selected candidate was worse on the held-out images: {change}."
    return "Keep the one you have: no adapted candidate was better beyond doubt; the original is exported."
