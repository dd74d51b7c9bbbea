"""Is adaptation worth it? Facts about backbone and images; only a run can tell."""

from __future__ import annotations

import json
import math
import shlex
from typing import Any

import numpy as np

from adaptkit.backbones import MODULE, Backbone
from adaptkit.embedding import Embedder
from adaptkit.estimate import Forecast
from adaptkit.inputs import Inputs
from adaptkit.probes.measure import measure_target
from adaptkit.recipe import Recipe, load_recipe
from adaptkit.report.document import scores_to_json
from adaptkit.requirement import LABEL_METRIC
from adaptkit.sources import evenly_spaced

MAX_MEASURED = 500  # held-out images
CHANGED_SHARE = 0.1  # of the answers, taken to differ between the original and an adapted backbone
MEASURES = ("view_retrieval_top1", "rankme")
SHORTEST_BUDGET = 30  # minutes
SENTENCE = "Only a run can tell whether adaptation helps; none of these numbers predicts it."


def weigh(original: Backbone, inputs: Inputs, recipe: Recipe, embedder: Embedder, forecast: Forecast) -> dict[str, Any]:
    """The section `worth` of `adaptkit.check/1`: what the frozen backbone can do, and what could be shown."""
    held_out = np.concatenate([inputs.selection.rows, inputs.report.rows])
    positions = np.flatnonzero(np.isin(inputs.everything.rows, held_out))
    measured = inputs.everything.subset(positions[evenly_spaced(len(positions), MAX_MEASURED)])
    scores = measure_target(original, measured, None, embedder).scores
    queries = len(inputs.scored.report) if inputs.scored else len(inputs.report)
    return {
        "train_images": len(inputs.train),
        "measured_images": len(measured),
        **scores_to_json({name: scores[name] for name in MEASURES}),
        "metric": LABEL_METRIC if inputs.scored else "view_retrieval_top1",
        "queries": queries,
        "score_half_width": half_width(0.5 * 0.5, queries),
        "changed_share": CHANGED_SHARE,
        "gain_half_width": half_width(CHANGED_SHARE, queries),
        "sentence": SENTENCE,
        "command": try_command(recipe, forecast),
    }


def half_width(variance: float, count: int) -> float:
    """Points on either side of a mean of `count` answers: 1.96 standard errors.

    A share p of right answers has the binomial variance p (1 - p), at most 1/4. Of a paired difference, in which a
    share d of the answers changes, each by one, it is at most d.
    """
    return 196 * math.sqrt(variance / count)


def try_command(recipe: Recipe, forecast: Forecast) -> str | None:
    """The command line for a run in limited time; None for a module, which has none.

    The budget is half an hour, or twice what the evaluations alone take.
    """
    if (recipe.backbone or MODULE).startswith(MODULE):
        return None
    plan = forecast.plan
    evaluating = forecast.seconds - (plan.total_steps + plan.refit_steps) * forecast.cost.seconds
    words = ["adaptkit", "adapt", "--backbone", str(recipe.backbone)]
    for path in recipe.data.path:
        words += ["--data", path]
    words += ["--labels", recipe.labels] if recipe.labels else []
    for key, value in changed_settings(recipe).items():
        words += ["--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}"]
    return shlex.join([*words, "--budget", f"{max(SHORTEST_BUDGET, math.ceil(evaluating / 30))}m"])


def changed_settings(recipe: Recipe) -> dict[str, Any]:
    """Dotted keys that differ from the default recipe, beside those with a place of their own on the command line."""
    given, usual = _flat(recipe.model_dump(mode="json")), _flat(load_recipe().model_dump(mode="json"))
    own = ("backbone", "data.path", "labels", "budget")
    return {key: value for key, value in given.items() if key not in own and value != usual[key]}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
