"""Whether two views of an image are recognised as the same image among all others."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptkit.errors import DataError
from adaptkit.probes.knn import nearest


def view_retrieval(view_a: Tensor, view_b: Tensor) -> Tensor:
    """(N, D), (N, D) -> (N,) float32: 1 where the cosine nearest of view_b[i] among view_a is view_a[i], else 0.

    Raises DataError when N < 2.
    """
    if view_a.shape != view_b.shape:
        raise ValueError(f"views must come from the same images, got {tuple(view_a.shape)} and {tuple(view_b.shape)}")
    if len(view_a) < 2:
        raise DataError(f"{len(view_a)} images: recognising a view needs at least 2; add images")
    own = torch.arange(len(view_a), device=view_a.device)
    return torch.cat([(index[:, 0] == own[rows]).float() for rows, _, index in nearest(view_b, view_a, 1)])
