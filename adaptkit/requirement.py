"""What can be asked of a run's result before it begins: `--require-gain`, and labels to select by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

from adaptkit.errors import UsageError, did_you_mean
from adaptkit.recipe import Recipe

LABEL_METRICS = ("knn_top1", "linear_top1", "retrieval_map")
TARGET_METRICS = ("rankme", "d_eff", "r_eff", "view_retrieval_top1", "neighbour_overlap", "selection_score")
LABEL_METRIC = "knn_top1"


def metrics_of(recipe: Recipe) -> list[str]:
    """The metrics that the report of a run will have."""
    return ([] if recipe.labels is None else [*LABEL_METRICS]) + [*TARGET_METRICS]


def check_wishes(recipe: Recipe) -> Requirement | None:
    """The required gain, if any. Raises `UsageError` for what this recipe can never fulfil, or not on this machine."""
    check_trackers(recipe)
    if recipe.select.by == "labels" and recipe.labels is None:
        raise UsageError("--select labels needs --labels FOLDER")
    return Requirement.parse(recipe.require_gain, metrics_of(recipe)) if recipe.require_gain else None


def check_trackers(recipe: Recipe) -> None:
    """Raises `UsageError` for a tracker whose package is missing; a folder of its name, as W&B makes, is none."""
    for name in recipe.track:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise UsageError(f"--track {name}: the package {name} is not installed; {how_to_install(name)}")


def how_to_install(extra: str) -> str:
    """What to do about a package that an extra brings."""
    return f"pip install 'adaptkit[{extra}]'"


@dataclass(frozen=True)
class Requirement:
    """`--require-gain METRIC>=POINTS`: the lower end of the metric's interval must reach the points."""

    metric: str
    points: float

    @classmethod
    def parse(cls, text: str, known: Sequence[str]) -> Requirement:
        """Raises `UsageError` when the text has another form or names a metric this run does not measure."""
        metric, sign, points = (part.strip() for part in text.partition(">="))
        try:
            requirement = cls(metric, float(points))
        except ValueError:
            sign = ""
        if not sign or not math.isfinite(requirement.points):
            raise UsageError(f"--require-gain {text}: write METRIC>=POINTS, as in 'knn_top1>=0.5'")
        if metric not in known:
            labels = "" if LABEL_METRIC in known else "; metrics of labels need --labels"
            hint = did_you_mean(metric, list(known))
            raise UsageError(f"--require-gain {metric}: this run measures {', '.join(known)}{labels}{hint}")
        return requirement

    def judge(self, lower: float | None) -> dict[str, Any]:
        """What the report says of it."""
        return asdict(self) | {"lower": lower, "met": lower is not None and lower >= self.points}
