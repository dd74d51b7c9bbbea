"""How a metric's numbers are written, the same on the console and in the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PERCENT = frozenset(
    {
        "knn_top1",
        "linear_top1",
        "retrieval_map",
        "view_retrieval_top1",
        "bit_agreement",
        "selection_score",
        "neighbour_overlap",
        "cluster_accuracy",
        *("miou", "pixel_accuracy", "corloc", "ap50", "video_j", "video_f", "video_jf"),
        *(f"few_shot_{size}" for size in (1, 2, 5, 10, 20)),
    }
)
DIGITS = {"nmi": 2, "ari": 2, "alpha_req": 2, "cka": 3}  # small numbers; 2 where the columns A and B need the room
DELTA_DIGITS = dict.fromkeys(DIGITS, 3)
REFERENCE = "reference_"  # before the names of metrics on a reference data set
MISSING = "n/a"
LARGE = 100  # from here on digits after the point say nothing


def value_text(metric: str, value: float | None, digits: int = 1) -> str:
    """61.2% for metrics in percent, 61.2 for the others."""
    return score_text(metric, {"value": value}, digits)


def score_text(metric: str, score: Mapping[str, Any] | None, digits: int = 1) -> str:
    """{"value", "ci95"} -> `61.2% [58.1, 64.3]`."""
    name = metric.removeprefix(REFERENCE)
    return _text(score, DIGITS.get(name, digits), "", "%" if name in PERCENT else "")


def change_text(delta: Mapping[str, Any] | None, digits: int = 1, metric: str = "") -> str:
    """{"value", "ci95"} of a difference -> `+3.2 [+1.1, +5.3]`; in percentage points where the metric is in percent."""
    return _text(delta, DELTA_DIGITS.get(metric.removeprefix(REFERENCE), digits), "+", "")


def _text(score: Mapping[str, Any] | None, digits: int, sign: str, unit: str) -> str:
    if score is None or score.get("value") is None:
        return MISSING
    if unit != "%" and abs(score["value"]) >= LARGE:
        digits = 0  # for the ends of the interval too
    lower, upper = score.get("ci95") or (None, None)
    interval = (
        "" if lower is None or upper is None else f" [{_number(lower, digits, sign)}, {_number(upper, digits, sign)}]"
    )
    return _number(score["value"], digits, sign) + unit + interval


def _number(value: float, digits: int, sign: str) -> str:
    """With that many digits after the point; 0 has no sign."""
    digits = 0 if abs(value) >= LARGE else digits
    rounded = round(value, digits)
    return f"{rounded:{sign}.{digits}f}" if rounded else f"{0.0:.{digits}f}"
