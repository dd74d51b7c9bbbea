"""BITS: the student predicts, bit by bit, the hard binary code its teacher gives another view of the same image.

L = L_bce - beta * gamma * R        (arXiv 2602.09764; method and constants are Zaher et al.'s)

A constant beta fits one batch size, one number of bits and one kind of image: elsewhere the channel closes (the rate
falls, the code follows a few directions) or opens so far that nothing is transmitted. So beta is multiplied by
exp((rate_target - R / R_max) / RATE_SLACK), which is 1 where the rate is the wished share of the largest possible one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from adaptkit.objectives.coding_rate import coding_rate, max_coding_rate, num_processes, rate_weight
from adaptkit.objectives.head import ProjectionHead
from adaptkit.objectives.objective import Health, Losses
from adaptkit.objectives.pairs import sum_over_other_views
from adaptkit.schedules import Plan
from adaptkit.settings import ObjectiveSettings

RATE_SLACK = 0.2  # change of the rate's share of its maximum that changes its weight e-fold
LIVE_MINORITY = 0.01  # a bit is live when its rarer value has at least this share
MIN_BIT_ENTROPY = 0.05  # bits per bit; a healthy channel has 0.6 to 1
MIN_LIVE_SHARE = 0.05  # of the bits
MIN_INFORMATION = 0.005  # bits per bit between student and teacher; at 0 the code is noise


class Bits:
    """The discrete objective; see `Objective` for the shapes. Nothing of it changes over a run."""

    def __init__(self, settings: ObjectiveSettings, plan: Plan | None = None) -> None:
        self.settings = settings
        self.balance: str = settings.balance
        self.state: dict[str, Tensor] = {}

    def build_head(self, embed_dim: int) -> ProjectionHead:
        """(N, embed_dim) -> (N, num_bits)."""
        return ProjectionHead(embed_dim, self.settings.num_bits, self.settings.hidden_dim)

    def frozen(self, head: nn.Module, age: int) -> tuple[nn.Parameter, ...]:
        """Nothing."""
        return ()

    def __call__(self, student: Tensor, teacher: Tensor, step: int) -> Losses:
        """Student logits (V, N, B) and teacher logits (G, N, B), float32 -> losses and bit counts."""
        codes = (teacher > 0).float()  # (G, N, B), no gradient
        num_global, num_images, num_bits = teacher.shape
        bce = bit_cross_entropy(student, codes)
        views = student[:num_global]
        rate = torch.stack([coding_rate(view, self.settings.eps, self.settings.centre) for view in views]).mean()
        gamma = rate_weight(num_bits, num_images * num_processes())
        loss = bce - self._beta(rate.detach(), num_bits, num_images * num_processes()) * gamma * rate
        report = {"loss": loss.detach(), "bce": bce.detach(), "coding_rate": rate.detach()}
        return Losses(loss, report | bit_counts(student.detach(), codes))

    def _beta(self, rate: Tensor, num_bits: int, num_images: int) -> Tensor | float:
        """The weight of the coding rate while it has this value; see the module's head."""
        target = self.settings.rate_target
        if target is None:
            return self.settings.beta
        share = rate / max_coding_rate(num_bits, num_images, self.settings.eps)
        return self.settings.beta * torch.exp((target - share) / RATE_SLACK)

    def summary(self, sums: dict[str, Tensor], num_steps: int) -> dict[str, float]:
        """loss, bce, coding_rate, and what the bits say; see `bit_measures`."""
        scalars = {name: float(sums[name]) / num_steps for name in ("loss", "bce", "coding_rate")}
        return scalars | bit_measures(sums)

    def health(self, record: Mapping[str, float]) -> Health:
        """Dead when bits are constant, or when the student's say nothing about the teacher's."""
        information, bit_entropy, live = record["bit_information"], record["bit_entropy"], record["live_bits"]
        dead = (
            bit_entropy < MIN_BIT_ENTROPY
            or live < MIN_LIVE_SHARE * self.settings.num_bits
            or information < MIN_INFORMATION
        )
        measures = f"information {information:.3f}, entropy {bit_entropy:.3f}, {live:.0f} live bits"
        return Health(information, f"the code collapsed: {measures}" if dead else None)


def bit_cross_entropy(student: Tensor, codes: Tensor) -> Tensor:
    """Mean BCE over all pairs (teacher view i, student view j != i), images and bits.

    (V, N, B) logits, (G, N, B) codes -> scalar. BCE(a, z) = softplus(a) - a z is linear in the code.
    """
    num_targets, others = sum_over_other_views(student, codes)
    total = (num_targets * softplus(student)).sum() - (student * others).sum()
    return total / (num_targets.sum() * student.shape[1] * student.shape[2])


@torch.no_grad()
def bit_counts(student: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """Per-bit counts over the pairs of `bit_cross_entropy`: both 1, student 1, teacher 1 (B,), and pairs ()."""
    bits = (student > 0).float()
    num_targets, others = sum_over_other_views(student, codes)
    num_partners = student.shape[0] - 1  # student views that each code is compared with
    return {
        "both_ones": (bits * others).sum((0, 1), dtype=torch.float64),
        "student_ones": (num_targets * bits).sum((0, 1), dtype=torch.float64),
        "teacher_ones": num_partners * codes.sum((0, 1), dtype=torch.float64),
        "pairs": num_targets.sum(dtype=torch.float64) * student.shape[1],
    }


def bit_measures(sums: dict[str, Tensor]) -> dict[str, float]:
    """bit_agreement (percent), bit_information and bit_entropy (bits per bit, in [0, 1]), live_bits (a number).

    bit_information is the mean over bits of the mutual information between student and teacher bit: agreement
    alone is high by chance when bits are nearly constant. bit_entropy is the teacher's marginal entropy.
    """
    pairs = sums["pairs"]
    both, student, teacher = sums["both_ones"] / pairs, sums["student_ones"] / pairs, sums["teacher_ones"] / pairs
    joint = torch.stack([1 - student - teacher + both, teacher - both, student - both, both]).clamp_min(0)  # (4, B)
    teacher_entropy = entropy(torch.stack([1 - teacher, teacher]))
    information = entropy(torch.stack([1 - student, student])) + teacher_entropy - entropy(joint)
    minority = torch.minimum(teacher, 1 - teacher)
    return {
        "bit_agreement": 100 * float((joint[0] + joint[3]).mean()),
        "bit_information": float(information.clamp_min(0).mean()),
        "bit_entropy": float(teacher_entropy.mean()),
        "live_bits": float((minority >= LIVE_MINORITY).sum()),
    }


def entropy(probabilities: Tensor) -> Tensor:
    """(K, B) distributions in columns -> (B,) entropies, bits."""
    nats: Tensor = torch.special.entr(probabilities).sum(0)
    return nats / math.log(2)
