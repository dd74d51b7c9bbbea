"""What adaptation kept of the original backbone. Spread alone rewards harm; this is its counterweight."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptkit.errors import DataError
from adaptkit.probes.knn import nearest


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
