"""Measuring a backbone: on labelled images, and on its target images without labels; comparing two measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from adaptkit.backbones import Backbone
from adaptkit.embedding import Embedder, Embeddings
from adaptkit.errors import DataError
from adaptkit.probes import PROBES, Interval, Score, neighbour_overlap, paired_bootstrap
from adaptkit.probes.few_shot import size_note
from adaptkit.probes.fixed_views import retrieve_views
from adaptkit.probes.intervals import jackknife_interval, resampled_interval
from adaptkit.probes.rank import rank_scores
from adaptkit.probes.score import percent_score
from adaptkit.sources import ImageSource

KEPT_WEIGHT = 0.005  # from 19 runs (docs/quality.md): below 0.0075 the choice is one; 0.1 always chose the original
LABEL_PROBES = ("knn", "linear", "retrieval")


class Unpaired(DataError):
    """Before and after are not of the same images: some have become unreadable in between, or readable."""


@dataclass(frozen=True, eq=False)
class Measurement:
    """Scores by metric name; the embeddings that a comparison needs again; what a reader should know of them."""

    scores: dict[str, Score]
    vectors: Tensor | None = None  # (N, D) of the target images
    failures: tuple[tuple[str, str], ...] = ()
    queries: Embeddings | None = None  # what was scored: labelled queries, without labels the target images
    notes: tuple[str, ...] = ()

    def __or__(self, other: Measurement) -> Measurement:
        vectors = self.vectors if other.vectors is None else other.vectors
        scores, failures = self.scores | other.scores, self.failures + other.failures
        return Measurement(scores, vectors, failures, self.queries or other.queries, self.notes + other.notes)


def measure_labelled(gallery: Embeddings, queries: Embeddings, names: Sequence[str]) -> Measurement:
    """The named probes: `gallery` is searched and fitted on, `queries` are scored."""
    scores: dict[str, Score] = {}
    for name in names:
        scores |= PROBES[name](gallery, queries)
    note = size_note(gallery) if "few-shot" in names else None
    return Measurement(scores, None, gallery.failures + queries.failures, queries, (note,) if note else ())


def measure_target(
    backbone: Backbone, source: ImageSource, original: Measurement | None, embedder: Embedder
) -> Measurement:
    """The label-free measures: rank, view retrieval, and with them what is kept of the `original`'s neighbours.

    `neighbour_overlap` and `selection_score` compare with the original; its own are 100 % kept. The score of an
    image weighs its view retrieval (0 or 100) against its overlap: telling images apart alone would reward harm.
    Raises `Unpaired`.
    """
    plain = embedder(backbone, source)
    found = retrieve_views(backbone, source, embedder)
    before = plain.vectors if original is None or original.vectors is None else original.vectors
    if len(before) != len(plain.vectors):
        raise Unpaired(
            f"{len(before)} images could be read before but {len(plain.vectors)} now; keep the data unchanged"
        )
    kept = neighbour_overlap(before, plain.vectors)
    scores = rank_scores(plain) | {
        "view_retrieval_top1": percent_score(found),
        "neighbour_overlap": percent_score(kept),
        "selection_score": percent_score(selection_score(found, kept)),
    }
    return Measurement(scores, plain.vectors, plain.failures, plain)


def selection_score(found: Tensor, kept: Tensor) -> Tensor:
    """(N,) view retrieval and (N,) neighbour overlap, both in [0, 1] -> (N,) their weighted mean."""
    return (1 - KEPT_WEIGHT) * found + KEPT_WEIGHT * kept


def compare(before: Measurement, after: Measurement) -> dict[str, Interval | None]:
    """after - before for every metric both have, paired by image; None where none can be given. Raises `Unpaired`."""
    if before.queries is not None and after.queries is not None and before.queries.paths != after.queries.paths:
        raise Unpaired("not the same images could be read before and after; keep the data unchanged")
    deltas: dict[str, Interval | None] = {}
    for name, old in before.scores.items():
        new = after.scores.get(name)
        if new is None:
            continue
        if old.per_query is not None and new.per_query is not None:
            if old.per_query.shape != new.per_query.shape:
                raise Unpaired(f"{name}: some images could be read before but not after; keep the data unchanged")
            deltas[name] = paired_bootstrap(old.per_query, new.per_query) if len(old.per_query) > 1 else None
        elif old.of_images is not None:
            deltas[name] = _compare_whole(name, old, new)
        elif old.sizes and old.sizes == new.sizes:  # both left out the same images, which their number alone decides
            parts = [b - a for a, b in zip(old.parts, new.parts, strict=True)]
            deltas[name] = jackknife_interval(new.value - old.value, parts, old.sizes)
    return deltas


def _compare_whole(name: str, old: Score, new: Score) -> Interval | None:
    """Both are measured on the same drawn images."""
    if old.num_images != new.num_images:
        raise Unpaired(f"{name}: some images could be read before but not after; keep the data unchanged")
    before, after = old.of_images, new.of_images
    if before is None or after is None or old.num_images < 2:
        return None
    lo, hi = resampled_interval(lambda drawn: after(drawn) - before(drawn), old.num_images)
    return Interval(new.value - old.value, lo, hi)
