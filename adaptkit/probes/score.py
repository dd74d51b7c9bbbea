"""What a probe returns, and what every probe checks first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adaptkit.embedding import Embeddings
from adaptkit.errors import DataError, NotFinite
from adaptkit.probes.intervals import bootstrap, resampled_interval


@dataclass(frozen=True, eq=False)
class Score:
    """One metric. Where it is a mean over queries, `per_query` holds the values, in the same unit.

    Where it is a measure of all images together (an IoU over pixels, a mutual information), `of_images` gives its value
    for (n,) image numbers drawn with repetition out of `num_images`, for intervals and paired comparisons.
    """

    value: float
    per_query: Tensor | None = None  # (Q,) float32
    ci95: tuple[float, float] | None = None  # None: too few queries or images for an interval
    of_images: Callable[[np.ndarray], float] | None = None
    num_images: int = 0


def percent_score(shares: Tensor) -> Score:
    """(Q,) values in [0, 1] -> their mean in percent, with a bootstrap interval."""
    per_query = 100 * shares.float()
    interval = bootstrap(per_query) if len(per_query) > 1 else None
    return Score(float(per_query.double().mean()), per_query, interval)


def whole_score(of_images: Callable[[np.ndarray], float], num_images: int) -> Score:
    """A measure of all images together, with its bootstrap interval over images."""
    interval = resampled_interval(of_images, num_images) if num_images > 1 else None
    return Score(of_images(np.arange(num_images)), None, interval, of_images, num_images)


def check_finite(embeddings: Embeddings) -> None:
    """Raises DataError when there is nothing to score, NotFinite when a vector is not finite."""
    if len(embeddings.vectors) == 0:
        raise DataError("no image to score; give the probe at least one")
    if not bool(torch.isfinite(embeddings.vectors).all()):
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
