"""What adaptation kept of the original backbone. Spread alone rewards harm; this is its counterweight."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptkit.errors import DataError
from adaptkit.probes.intervals import leave_out
from adaptkit.probes.knn import nearest
from adaptkit.probes.score import BLOCKS, Score, check_all_finite, jackknifed_score, percent_score

LEAST_IMAGES = 4  # of the unbiased estimate


def drift_scores(original: Tensor, adapted: Tensor) -> dict[str, Score]:
    """(N, D), (N, D') of the same images -> `cka` (1: equal up to rotation and scale), `neighbour_overlap` (percent).

    Raises DataError when N < 4, NotFinite.
    """
    for vectors in (original, adapted):
        check_all_finite(vectors)
    return {
        "cka": cka_score(original, adapted),
        "neighbour_overlap": percent_score(neighbour_overlap(original, adapted)),
    }


def cka_score(original: Tensor, adapted: Tensor) -> Score:
    """Debiased linear CKA with a block jackknife interval."""
    groups = leave_out(len(original), BLOCKS) if len(original) > LEAST_IMAGES else []
    parts = [linear_cka(original[kept], adapted[kept]) for kept in groups]
    return jackknifed_score(linear_cka(original, adapted), parts, [len(original) - len(kept) for kept in groups])


def linear_cka(original: Tensor, adapted: Tensor) -> float:
    """(N, D), (N, D') of the same images -> similarity of the two clouds, debiased; 0 when one of them is a point.

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)), K and L the inner products (Kornblith et al. 2019, eq. 1), with the
    unbiased HSIC (Song et al. 2012, eq. 5): plain CKA rises to 1 as D / N grows, whatever the embeddings. Raises
    DataError when N < 4.
    """
    if len(original) != len(adapted):
        raise ValueError(f"CKA compares the same images, got {len(original)} and {len(adapted)}")
    if len(original) < LEAST_IMAGES:
        raise DataError(f"{len(original)} images: CKA needs at least {LEAST_IMAGES}; add images")
    x, y = (_centred(vectors) for vectors in (original, adapted))
    own = unbiased_hsic(x, x) * unbiased_hsic(y, y)
    return unbiased_hsic(x, y) / own**0.5 if own > 0 else 0.0


def _centred(vectors: Tensor) -> Tensor:
    """Changes no unbiased HSIC, but spares digits; of a cloud that only float32 rounding spreads, all zeros."""
    exact = vectors.double()
    centred = exact - exact.mean(dim=0)
    is_point = bool(centred.square().sum() <= 1e-12 * exact.square().sum())
    return torch.zeros_like(centred) if is_point else centred


def unbiased_hsic(x: Tensor, y: Tensor) -> float:
    """(N, D), (N, D') -> HSIC of their inner products K and L, neither of which is made; diagonals do not count.

    The sum over i != j of K_ij L_ij is |x'y|^2 less its diagonal; row i of K sums to x_i . sum x - K_ii.
    """
    n, own_x, own_y = len(x), x.square().sum(dim=1), y.square().sum(dim=1)
    rows_x, rows_y = x @ x.sum(dim=0) - own_x, y @ y.sum(dim=0) - own_y
    trace = (x.T @ y).square().sum() - own_x @ own_y
    product = rows_x.sum() * rows_y.sum() / ((n - 1) * (n - 2))
    return float((trace + product - 2 / (n - 2) * (rows_x @ rows_y)) / (n * (n - 3)))


def neighbour_overlap(original: Tensor, adapted: Tensor, k: int = 10) -> Tensor:
    """(N, D), (N, D') of the same images -> (N,) float32 in [0, 1]: share of the k nearest images that stayed so.

    Cosine; an image is not its own neighbour. Raises DataError when N < 2.
    """
    if len(original) != len(adapted):
        raise ValueError(f"overlap compares the same images, got {len(original)} and {len(adapted)}")
    if len(original) < 2:
        raise DataError(f"{len(original)} images: neighbours need at least 2; add images")
    before = nearest(original, original, k, exclude_self=True)
    after = nearest(adapted, adapted, k, exclude_self=True)
    kept = [old[:, :, None] == new[:, None, :] for (_, _, old), (_, _, new) in zip(before, after, strict=True)]
    return torch.cat([same.any(dim=2).float().mean(dim=1) for same in kept])
