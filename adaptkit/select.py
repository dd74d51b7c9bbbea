"""Which backbone to hand over: the original, unless a candidate is better beyond doubt on the selection split.

Candidates are the teacher's checkpoints and points on the straight line between original and adapted weights. The
choice is made on `selection`; the verdict on `report`, which chose nothing, and whose interval can veto it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import broadcast_object_list

from adaptkit.backbones import Backbone
from adaptkit.embedding import Embedder, Embeddings
from adaptkit.inputs import Inputs
from adaptkit.probes import Interval
from adaptkit.probes.measure import (
    LABEL_PROBES,
    Measurement,
    Unpaired,
    compare,
    measure_labelled,
    measure_target,
)
from adaptkit.recipe import Recipe
from adaptkit.requirement import LABEL_METRIC

LABEL_FREE_METRIC = "selection_score"
NO_INTERVAL = (-math.inf, math.inf)
Paired = TypeVar("Paired")
FROM_SCRATCH_METRIC = "view_retrieval_top1"  # nothing of a random backbone is worth keeping


@dataclass(frozen=True)
class Candidate:
    """A point of the run (step, and alpha between original and adapted weights) with its score on `selection`."""

    step: int
    alpha: float
    value: float
    delta: Interval  # paired with the original

    def to_json(self) -> dict[str, Any]:
        """For checkpoints and the report; `ci95` is null when there is no interval, as JSON knows no infinity."""
        bounds = [self.delta.lo, self.delta.hi]
        delta = {"value": self.delta.value, "ci95": bounds if all(map(math.isfinite, bounds)) else None}
        return {"step": self.step, "alpha": self.alpha, "value": self.value, "delta": delta}

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> Candidate:
        """What `to_json` wrote."""
        delta = state["delta"]
        bounds = delta["ci95"] or NO_INTERVAL
        return cls(state["step"], state["alpha"], state["value"], Interval(delta["value"], *bounds))


class Judge:
    """Measures backbones on the held-out images, always paired with the original, which is measured once."""

    def __init__(self, inputs: Inputs, recipe: Recipe, embedder: Embedder, on_failures: Callable[[Any], None]) -> None:
        self.inputs, self.embedder, self.on_failures = inputs, embedder, on_failures
        self.alphas = recipe.select.alphas
        label_free = LABEL_FREE_METRIC if recipe.pretrained else FROM_SCRATCH_METRIC
        self.primary = LABEL_METRIC if inputs.scored else label_free
        by_labels = inputs.scored is not None and recipe.select.by != "label-free"
        self.metric = LABEL_METRIC if by_labels else label_free
        # weights, score and gallery of what `choose` would take so far: if it stays, the report needs the gallery again
        self._kept: tuple[str, float, Embeddings] | None = None

    def measure_original(self, original: Backbone) -> Measurement:
        """Measure the original on both splits; returns what the report calls "before"."""
        self._original = original
        gallery = self._gallery(original)
        self.original_selection = self._on_selection(original, None, gallery)
        self.original_report = self._on_report(original, None, gallery)
        return self.original_report

    def consider(self, backbone: Backbone, step: int, alpha: float) -> Candidate:
        """A candidate's score on the selection split."""
        gallery = self._gallery(backbone) if self.metric == LABEL_METRIC else None

        def measure() -> tuple[Measurement, Interval | None]:
            measured = self._on_selection(backbone, self.original_selection, gallery)
            return measured, compare(self.original_selection, measured)[self.metric]

        measured, delta = self._paired(measure)
        value = measured.scores[self.metric].value
        if delta is None:  # a single query: no interval, so no doubt can be excluded
            gain = value - self.original_selection.scores[self.metric].value
            delta = Interval(gain, *NO_INTERVAL)
        # every process has measured; what the first one found decides for all, lest rounding part them
        (candidate,) = broadcast_object_list([Candidate(step, alpha, value, delta)])
        if gallery is not None and candidate.delta.lo > 0 and (self._kept is None or candidate.value > self._kept[1]):
            self._kept = weights_digest(backbone), candidate.value, gallery
        return cast(Candidate, candidate)

    def measure_selected(self, backbone: Backbone) -> Measurement:
        """The report's "after", on images that chose nothing."""
        is_kept = self._kept is not None and self._kept[0] == weights_digest(backbone)
        (is_kept,) = broadcast_object_list([is_kept])  # a gallery is embedded by all processes or by none
        if is_kept and self._kept is not None:
            gallery: Embeddings | None = self._kept[2]  # as it was when this backbone was considered
        else:
            gallery = self._gallery(backbone)

        def measure() -> Measurement:
            measured = self._on_report(backbone, self.original_report, gallery)
            compare(self.original_report, measured)
            return measured

        return self._paired(measure)

    def _paired(self, measure: Callable[[], Paired]) -> Paired:
        """What `measure` says; if images have come or gone since the original was measured, it is measured again."""
        try:
            return measure()
        except Unpaired:  # hours of training are not lost for an image that somebody has moved
            self.measure_original(self._original)
            return measure()

    def _gallery(self, backbone: Backbone) -> Embeddings | None:
        return self.embedder(backbone, self.inputs.scored.gallery) if self.inputs.scored else None

    def _on_selection(
        self, backbone: Backbone, original: Measurement | None, gallery: Embeddings | None
    ) -> Measurement:
        if self.metric == LABEL_METRIC and gallery is not None and self.inputs.scored is not None:
            measured = measure_labelled(gallery, self.embedder(backbone, self.inputs.scored.selection), ["knn"])
        else:
            measured = measure_target(backbone, self.inputs.selection, original, self.embedder)
        self.on_failures(measured.failures)
        return measured

    def _on_report(self, backbone: Backbone, original: Measurement | None, gallery: Embeddings | None) -> Measurement:
        measured = measure_target(backbone, self.inputs.report, original, self.embedder)
        if gallery is not None and self.inputs.scored is not None:
            queries = self.embedder(backbone, self.inputs.scored.report)
            measured = measure_labelled(gallery, queries, LABEL_PROBES) | measured
        self.on_failures(measured.failures)
        return measured


def weights_digest(backbone: Backbone) -> str:
    """Equal for equal weights and buffers: far cheaper than to embed a gallery again."""
    digest = blake2b(digest_size=16)
    for name, tensor in backbone.module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def best(candidates: Sequence[Candidate]) -> Candidate | None:
    """The candidate with the highest score, whatever its interval; None when there is none."""
    return max(candidates, key=lambda c: c.value, default=None)


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """The best of those whose paired lower bound is above 0; None: the original wins."""
    return best([candidate for candidate in candidates if candidate.delta.lo > 0])


def verdict(selected: Candidate | None, delta: Interval | None, collapsed: bool) -> tuple[str, bool]:
    """The verdict and whether the guard fired, from the selected candidate's interval on the report split."""
    if collapsed:
        return "collapsed", selected is not None and delta is not None and delta.hi < 0
    if selected is None:
        return "kept_original", False
    if delta is not None and delta.hi < 0:
        return "kept_original", True
    return ("improved" if delta is not None and delta.lo > 0 else "unchanged"), False
