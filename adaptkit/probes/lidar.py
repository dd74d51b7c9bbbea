"""LiDAR: in how many directions images differ from each other by more than their own views differ."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptkit.errors import DataError
from adaptkit.probes.score import Score, check_all_finite, jackknifed_scores

DELTA = 1e-4  # added to the within-image covariance, so that it can be inverted


def lidar_score(views: Tensor) -> dict[str, Score]:
    """(N, Q, D) -> `lidar` with a block jackknife interval. Raises DataError when N < 2, NotFinite."""
    check_all_finite(views)
    return jackknifed_scores(lambda some: {"lidar": lidar(some)}, views)


def lidar(views: Tensor) -> float:
    """(N, Q, D): Q views of N images -> effective rank of linear discriminant analysis, every image a class.

    exp of the entropy of l / sum l, l = eigenvalues of W^-1/2 B W^-1/2, with B the covariance of the images' means and
    W that of views around their image's mean, plus 1e-4 I (Thilak et al., arXiv 2312.04000). At most N - 1. Embeddings
    of images that do not differ have the minimum, 1. Raises DataError when N < 2.
    """
    if views.ndim != 3 or views.shape[1] < 2:
        raise ValueError(f"LiDAR needs (N, Q, D) with two or more views of an image, got {tuple(views.shape)}")
    if len(views) < 2:
        raise DataError(f"{len(views)} images: LiDAR needs at least 2; add images")
    samples = views.double()
    means = samples.mean(dim=1)  # (N, D)
    within = (samples - means[:, None]).flatten(0, 1)  # (N * Q, D)
    between = means - means.mean(dim=0)
    if bool(between.square().sum() <= 1e-12 * means.square().sum()):  # only float32 rounding differs between the images
        return 1.0
    values, vectors = torch.linalg.eigh(within.T @ within / len(within))
    whitened = between @ vectors * (values.clamp(min=0) + DELTA).rsqrt()  # its squared singular values are N times l
    gram = whitened.T @ whitened if len(whitened) >= whitened.shape[1] else whitened @ whitened.T
    eigenvalues = torch.linalg.eigvalsh(gram).clamp(min=0)
    share = eigenvalues / eigenvalues.sum()
    return float(torch.exp(-torch.xlogy(share, share).sum()))
