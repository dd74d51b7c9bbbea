"""The pairs that every objective compares: teacher view i with student view j, j != i."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_over_other_views(student: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """How many targets each student view is compared with, (V, 1, 1), and their sum, (V, N, B).

    Student (V, N, B), targets (G, N, B). A loss that is linear in the targets needs only their sum over the other
    views, so no (G, V, N, B) tensor is built.
    """
    num_views, num_global = student.shape[0], targets.shape[0]
    others = targets.sum(0).expand_as(student).clone()
    others[:num_global] -= targets
    num_targets = torch.full((num_views, 1, 1), float(num_global), device=student.device)
    num_targets[:num_global] -= 1
    return num_targets, others
