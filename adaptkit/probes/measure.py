"""Measuring a backbone: on labelled images, and on its target images without labels; comparing two measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from adaptkit.backbones import Backbone
from adaptkit.embedding import Embedder, Embeddings
from adaptkit.errors import DataError
from adaptkit.probes import PROBES, Interval, Score, neighbour_overlap, paired_bootstrap
from adaptkit.probes.fixed_views import retrieve_views
from adaptkit.probes.intervals import jackknife_interval, leave_out
from adaptkit.probes.rank import BLOCKS, probe_rank, rank_measures
from adaptkit.probes.score import percent_score
from adaptkit.sources import ImageSource

RANK_METRICS = ("rankme", "d_eff", "r_eff")
KEPT_WEIGHT = 0.01  # fitted leaving one target out (docs/quality.md); 0.1 chose the original in every run that gained
LABEL_PROBES = ("knn", "linear", "retrieval")


@dataclass(frozen=True, eq=False)
class Measurement:
    """Scores by metric name; the embeddings behind the rank measures, which a paired interval needs again."""

    scores: dict[str, Score]
    vectors: Tensor | None = None  # (N, D) of the target images
    failures: tuple[tuple[str, str], ...] = ()

    def __or__(self, other: Measurement) -> Measurement:
        vectors = self.vectors if other.vectors is None else other.vectors
        return Measurement(self.scores | other.scores, vectors, self.failures + other.failures)


def measure_labelled(gallery: Embeddings, queries: Embeddings, names: Sequence[str]) -> Measurement:
    """The named probes: `gallery` is searched and fitted on, `queries` are scored."""
    scores: dict[str, Score] = {}
    for name in names:
        scores |= PROBES[name](gallery, queries)
    vectors = gallery.vectors if "rank" in names else None
    return Measurement(scores, vectors, gallery.failures + queries.failures)


def measure_target(
    backbone: Backbone, source: ImageSource, original: Measurement | None, embedder: Embedder
) -> Measurement:
    """The label-free measures: rank, view retrieval, and with them what is kept of the `original`'s neighbours.

    `neighbour_overlap` and `selection_score` compare with the original; its own are 100 % kept. The score of an
    image weighs its view retrieval (0 or 100) against its overlap: telling images apart alone would reward harm.
    """
    plain = embedder(backbone, source)
    found = retrieve_views(backbone, source, embedder)
    before = plain.vectors if original is None or original.vectors is None else original.vectors
    kept = neighbour_overlap(before, plain.vectors)
    scores = probe_rank(plain, plain) | {
        "view_retrieval_top1": percent_score(found),
        "neighbour_overlap": percent_score(kept),
        "selection_score": percent_score(selection_score(found, kept)),
    }
    return Measurement(scores, plain.vectors, plain.failures)


def selection_score(found: Tensor, kept: Tensor) -> Tensor:
    """(N,) view retrieval and (N,) neighbour overlap, both in [0, 1] -> (N,) their weighted mean."""
    return (1 - KEPT_WEIGHT) * found + KEPT_WEIGHT * kept


def compare(before: Measurement, after: Measurement) -> dict[str, Interval | None]:
    """after - before for every metric both have, paired by image; None where no interval can be given."""
    deltas: dict[str, Interval | None] = {}
    for name, old in before.scores.items():
        new = after.scores.get(name)
        if new is None:
            continue
        if old.per_query is not None and new.per_query is not None:
            if old.per_query.shape != new.per_query.shape:
                raise DataError(f"{name}: some images could be read before but not after; keep the data unchanged")
            deltas[name] = paired_bootstrap(old.per_query, new.per_query) if len(old.per_query) > 1 else None
    if before.vectors is not None and after.vectors is not None:
        deltas |= _compare_ranks(before, after)
    return deltas


def _compare_ranks(before: Measurement, after: Measurement) -> Mapping[str, Interval | None]:
    old, new = before.vectors, after.vectors
    names = [name for name in RANK_METRICS if name in before.scores and name in after.scores]
    if old is None or new is None or len(old) != len(new) or len(old) < 4 or not names:
        return {}
    groups = leave_out(len(old), BLOCKS)
    parts = [(rank_measures(old[rows]), rank_measures(new[rows])) for rows in groups]
    sizes = [len(old) - len(rows) for rows in groups]
    return {
        name: jackknife_interval(
            after.scores[name].value - before.scores[name].value, [b[name] - a[name] for a, b in parts], sizes
        )
        for name in names
    }
