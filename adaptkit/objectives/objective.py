"""What the training loop asks of an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Losses:
    """`loss` is differentiated; `report` holds detached tensors that are summed over steps and only logged."""

    loss: Tensor
    report: dict[str, Tensor]


class Objective(Protocol):
    """A training objective: builds its projection head and compares student with teacher."""

    def build_head(self, embed_dim: int) -> nn.Module:
        """(N, embed_dim) -> (N, outputs), freshly initialised."""
        ...

    def __call__(self, student: Tensor, teacher: Tensor, step: int) -> Losses:
        """(V, N, outputs) and (G, N, outputs), both float32, the G global views first in both."""
        ...

    def summary(self, sums: dict[str, Tensor], num_steps: int) -> dict[str, float]:
        """Named numbers for the log, from the reports summed over `num_steps` steps and all processes."""
        ...
