"""SimDINO, a continuous baseline: the cosine between student and teacher, and the coding rate against collapse.

L = (1 - cosine) - gamma * R        (arXiv 2502.10385; method and constants are Wu et al.'s)

As in their code: R is of the mean of student and teacher outputs (`expa_type = 1`), not scaled to length 1 again and
not centred, and gamma is the same as in BITS; the 1 only moves the value. R is of the global batch (`reduce_cov = 1`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from adaptkit.objectives.coding_rate import num_processes, rate_of_rows, rate_weight
from adaptkit.objectives.head import UnitHead
from adaptkit.objectives.objective import Health, Losses
from adaptkit.objectives.pairs import sum_over_other_views
from adaptkit.schedules import Plan
from adaptkit.settings import ObjectiveSettings

COLLAPSED = 1.01  # a rate below this many times that of a single direction


class SimDino:
    """See `Objective` for the shapes. Nothing of it changes over a run."""

    balance = "never"

    def __init__(self, settings: ObjectiveSettings, plan: Plan | None = None) -> None:
        self.settings = settings
        self.state: dict[str, Tensor] = {}

    def build_head(self, embed_dim: int) -> UnitHead:
        """(N, embed_dim) -> (N, output_dim) of length 1."""
        return UnitHead(embed_dim, self.settings.output_dim, self.settings.hidden_dim)

    def frozen(self, head: nn.Module, age: int) -> tuple[nn.Parameter, ...]:
        """Nothing."""
        return ()

    def __call__(self, student: Tensor, teacher: Tensor, step: int) -> Losses:
        """Student (V, N, D) and teacher outputs (G, N, D), float32 of length 1 -> losses."""
        teacher = teacher.detach()
        num_global, num_images, output_dim = teacher.shape
        cosine = mean_cosine(student, teacher)
        means = (student[:num_global] + teacher) / 2
        rate = torch.stack([rate_of_rows(mean, self.settings.eps, centre=False) for mean in means]).mean()
        loss = (1 - cosine) - rate_weight(output_dim, num_images * num_processes()) * rate
        return Losses(loss, {"loss": loss.detach(), "cosine": cosine.detach(), "coding_rate": rate.detach()})

    def summary(self, sums: dict[str, Tensor], num_steps: int) -> dict[str, float]:
        """loss; agreement: the mean cosine of student and teacher, percent; coding_rate, nats."""
        means = {name: float(sums[name]) / num_steps for name in ("loss", "cosine", "coding_rate")}
        return {"loss": means["loss"], "agreement": 100 * means["cosine"], "coding_rate": means["coding_rate"]}

    def health(self, record: Mapping[str, float]) -> Health:
        """Dead when all images have one output, or two opposite ones: then only one direction has volume."""
        single = 0.5 * math.log1p(self.settings.output_dim / self.settings.eps)
        if record["coding_rate"] >= COLLAPSED * single:
            return Health(1.0, None)
        rates = f"coding rate {record['coding_rate']:.3f} nats, a single direction has {single:.3f}"
        return Health(0.0, f"the outputs collapsed: {rates}, agreement {record['agreement']:.1f} %")


def mean_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all pairs (teacher view i, student view j != i) and images; (V, N, D), (G, N, D) of length 1."""
    num_targets, others = sum_over_other_views(student, teacher)
    return (student * others).sum() / (num_targets.sum() * student.shape[1])
