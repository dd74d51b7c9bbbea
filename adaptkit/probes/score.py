"""What a probe returns, and what every probe checks first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptkit.embedding import Embeddings
from adaptkit.errors import DataError, NotFinite
from adaptkit.probes.intervals import bootstrap, jackknife_interval, leave_out, resampled_interval

BLOCKS = 20  # of images, left out in turn


@dataclass(frozen=True, eq=False)
class Score:
    """One metric. Where it is a mean over queries, `per_query` holds the values, in the same unit.

    Where it is a measure of all images together (an IoU over pixels, a mutual information), `of_images` gives its value
    for (n,) image numbers drawn with repetition out of `num_images`, for intervals and paired comparisons. Where
    drawing an image twice would change what it measures (a rank, pairs of images), `parts` holds its value without each
    block of images, `sizes` their sizes.
    """

    value: float
    per_query: Tensor | None = None  # (Q,) float32
    ci95: tuple[float, float] | None = None  # None: too few queries or images for an interval
    of_images: Callable[[np.ndarray], float] | None = None
    num_images: int = 0
    parts: tuple[float, ...] = ()  # `leave_out` decides the blocks, by the number of images alone
    sizes: tuple[int, ...] = ()


def percent_score(shares: Tensor) -> Score:
    """(Q,) values in [0, 1] -> their mean in percent, with a bootstrap interval."""
    per_query = 100 * shares.float().cpu()
    interval = bootstrap(per_query) if len(per_query) > 1 else None
    return Score(float(per_query.double().mean()), per_query, interval)


def whole_score(of_images: Callable[[np.ndarray], float], num_images: int) -> Score:
    """A measure of all images together, with its bootstrap interval over images."""
    interval = resampled_interval(of_images, num_images) if num_images > 1 else None
    return Score(of_images(np.arange(num_images)), None, interval, of_images, num_images)


def jackknifed_score(value: float, parts: Sequence[float], sizes: Sequence[int]) -> Score:
    """A measure of all images together and of all but each block, with its jackknife interval (none without blocks)."""
    if not sizes or not np.isfinite([value, *parts]).all():
        return Score(value)
    interval = jackknife_interval(value, parts, sizes)
    return Score(value, None, (interval.lo, interval.hi), parts=tuple(parts), sizes=tuple(sizes))


def jackknifed_scores(measures: Callable[[Tensor], Mapping[str, float]], vectors: Tensor) -> dict[str, Score]:
    """Measures of (N, ...) embeddings, each with its interval; `measures` is called 21 times."""
    groups = leave_out(len(vectors), BLOCKS) if len(vectors) >= 4 else []
    whole, parts = measures(vectors), [measures(vectors[kept]) for kept in groups]
    sizes = [len(vectors) - len(kept) for kept in groups]
    return {name: jackknifed_score(value, [part[name] for part in parts], sizes) for name, value in whole.items()}


def check_finite(embeddings: Embeddings) -> None:
    """Raises DataError when there is nothing to score, NotFinite when a vector is not finite."""
    if len(embeddings.vectors) == 0:
        raise DataError("no image to score; give the probe at least one")
    check_all_finite(embeddings.vectors)


def check_all_finite(vectors: Tensor) -> None:
    """Raises NotFinite when a vector is not finite."""
    if not bool(torch.isfinite(vectors).all()):
        raise NotFinite("the embeddings contain NaN or infinity; the weights are damaged or training diverged")


def labels_of(gallery: Embeddings, queries: Embeddings) -> tuple[Tensor, Tensor, int]:
    """Labels (N,) and (Q,) and the number of classes. Raises DataError when they are missing or do not match."""
    check_finite(gallery)
    check_finite(queries)
    if gallery.labels is None or queries.labels is None:
        raise DataError("this probe needs labels; give class folders or a CSV with `path,label`")
    if gallery.class_names != queries.class_names:
        raise DataError("gallery and queries list different classes; give both the same class folders")
    num_classes = 1 + int(max(gallery.labels.max(), queries.labels.max()))
    return gallery.labels, queries.labels, num_classes
