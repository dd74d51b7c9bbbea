"""What the training loop asks of an objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Losses:
    """`loss` is differentiated; `report` holds detached tensors that are summed over steps and only logged."""

    loss: Tensor
    report: dict[str, Tensor]


@dataclass(frozen=True)
class Health:
    """What a window of the log says about the outputs.

    `information` is what they carry, 0 if nothing: after a new draw no candidate is taken before half of its best is
    back. `collapse` says in words why the outputs look dead, or is None.
    """

    information: float
    collapse: str | None


class Objective(Protocol):
    """A training objective: builds its projection head and compares student with teacher."""

    state: dict[str, Tensor]
    """What it remembers from step to step and a checkpoint must hold; set to zero with every draw of the head."""

    balance: str
    """Whether the loop keeps the teacher's outputs half above 0: `never`, at every `draw` of the head, or `always`."""

    def build_head(self, embed_dim: int) -> nn.Module:
        """(N, embed_dim) -> (N, outputs), freshly initialised."""
        ...

    def frozen(self, head: nn.Module, age: int) -> Sequence[nn.Parameter]:
        """Parameters of the student's head that do not learn in the step that comes `age` steps after its draw."""
        ...

    def __call__(self, student: Tensor, teacher: Tensor, step: int) -> Losses:
        """(V, N, outputs) and (G, N, outputs), both float32, the G global views first in both."""
        ...

    def summary(self, sums: dict[str, Tensor], num_steps: int) -> dict[str, float]:
        """Named numbers for the log, from the reports summed over `num_steps` steps and all processes."""
        ...

    def health(self, record: Mapping[str, float]) -> Health:
        """Whether the outputs are alive, from what `summary` gave."""
        ...
