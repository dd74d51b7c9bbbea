"""DINO, a continuous baseline: the student predicts its teacher's soft choice among prototypes for another view.

L = mean over pairs of -sum_k p_k log softmax_k(student / 0.1),  p = softmax((teacher - centre) / temperature)

arXiv 2104.14294; method and constants are Caron et al.'s. Two things scale with the run: the prototypes are frozen for
one epoch, but at most 10 % of it, and if the teacher's temperature is to rise, it does so over the first 30 % (their 30
of 100 epochs). It stays at 0.04 by default, as in their code: in short runs softer targets fade towards even ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from adaptkit.objectives.coding_rate import all_reduce_sum, num_processes
from adaptkit.objectives.head import PrototypeHead
from adaptkit.objectives.objective import Health, Losses
from adaptkit.objectives.pairs import sum_over_other_views
from adaptkit.schedules import Plan
from adaptkit.settings import ObjectiveSettings

STUDENT_TEMPERATURE = 0.1
TEACHER_TEMPERATURE = 0.04  # at the start
WARMUP_SHARE = 0.3  # of the run, until the teacher's final temperature
FROZEN_SHARE = 0.1  # of the run, at most
CENTRE_MOMENTUM = 0.9
MIN_ENTROPY = 0.1  # bits; one prototype takes 99 % of the choices
MIN_INFORMATION = 0.02  # bits per choice; a healthy short run has 0.2 and more, a collapsed one 0.01


class Dino:
    """See `Objective` for the shapes. Its state is the centre: the running mean of the teacher's outputs, (K,)."""

    balance = "never"

    def __init__(self, settings: ObjectiveSettings, plan: Plan) -> None:
        self.settings = settings
        self.warmup_steps = WARMUP_SHARE * plan.total_steps
        self.frozen_steps = min(plan.steps_per_epoch, round(FROZEN_SHARE * plan.total_steps))
        self.state = {"centre": torch.zeros(settings.num_prototypes)}

    def build_head(self, embed_dim: int) -> PrototypeHead:
        """(N, embed_dim) -> (N, num_prototypes)."""
        s = self.settings
        return PrototypeHead(embed_dim, s.output_dim, s.num_prototypes, s.hidden_dim)

    def frozen(self, head: nn.Module, age: int) -> list[nn.Parameter]:
        """The prototypes, at first."""
        return list(head.get_submodule("prototypes").parameters()) if age < self.frozen_steps else []

    def teacher_temperature(self, step: int) -> float:
        """Linear from 0.04 to the final one, then constant."""
        progress = min(1.0, step / self.warmup_steps)
        return TEACHER_TEMPERATURE + (self.settings.final_teacher_temperature - TEACHER_TEMPERATURE) * progress

    def __call__(self, student: Tensor, teacher: Tensor, step: int) -> Losses:
        """Student (V, N, K) and teacher outputs (G, N, K), float32 -> losses. The centre moves after its use."""
        teacher = teacher.detach()
        centre = self.state["centre"].to(teacher.device)
        targets = ((teacher - centre) / self.teacher_temperature(step)).softmax(-1)
        loss = cross_entropy(student / STUDENT_TEMPERATURE, targets)
        mean = all_reduce_sum(teacher.mean((0, 1))) / num_processes()
        self.state["centre"] = CENTRE_MOMENTUM * centre + (1 - CENTRE_MOMENTUM) * mean
        return Losses(loss, {"loss": loss.detach()} | choice_counts(student.detach(), targets))

    def summary(self, sums: dict[str, Tensor], num_steps: int) -> dict[str, float]:
        """loss, and what the choices say; see `choice_measures`."""
        return {"loss": float(sums["loss"]) / num_steps} | choice_measures(sums)

    def health(self, record: Mapping[str, float]) -> Health:
        """Dead when all images choose one prototype, or when all choose alike (in the end evenly among all)."""
        among, within = record["teacher_entropy"], record["choice_entropy"]
        if among >= MIN_ENTROPY and among - within >= MIN_INFORMATION:
            return Health(1.0, None)
        entropies = f"entropy {among:.3f} bits over all images, {within:.3f} of a single choice"
        return Health(0.0, f"the outputs collapsed: {entropies}, of {math.log2(self.settings.num_prototypes):.1f}")


def cross_entropy(student: Tensor, targets: Tensor) -> Tensor:
    """Mean over all pairs (teacher view i, student view j != i) and images, nats.

    (V, N, K) logits, (G, N, K) distributions -> scalar.
    """
    num_targets, others = sum_over_other_views(student, targets)
    return -(others * log_softmax(student, -1)).sum() / (num_targets.sum() * student.shape[1])


@torch.no_grad()
def choice_counts(student: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Sums over a step: the teacher's choices (K,), their entropies in bits, their number; pairs, and equal ones.

    A pair is equal when student and teacher give most to the same prototype.
    """
    favourites, choices = student.argmax(-1), targets.argmax(-1)  # (V, N), (G, N)
    equal = favourites.unsqueeze(0) == choices.unsqueeze(1)  # (G, V, N)
    return {
        "choices": targets.sum((0, 1), dtype=torch.float64),
        "entropies": torch.special.entr(targets).sum(dtype=torch.float64) / math.log(2),
        "num_choices": torch.full((), choices.numel(), device=targets.device, dtype=torch.float64),
        "pairs": torch.full((), equal.numel() - choices.numel(), device=targets.device, dtype=torch.float64),
        "equal_pairs": (equal.sum() - equal.diagonal().sum()).double(),
    }


def choice_measures(sums: dict[str, Tensor]) -> dict[str, float]:
    """agreement: pairs with the same favourite, percent; teacher_entropy and choice_entropy, bits.

    teacher_entropy is that of the teacher's mean choice, choice_entropy the mean of its single choices. The difference
    is what a choice says about its image: it is 0 whether all choose one prototype or all choose evenly.
    """
    shares = sums["choices"] / sums["num_choices"]
    return {
        "agreement": 100 * float(sums["equal_pairs"] / sums["pairs"]),
        "teacher_entropy": float(torch.special.entr(shares).sum()) / math.log(2),
        "choice_entropy": float(sums["entropies"] / sums["num_choices"]),
    }
