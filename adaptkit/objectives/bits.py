"""BITS: the student predicts, bit by bit, the hard binary code its teacher gives another view of the same image.

L = L_bce - beta * gamma * R        (arXiv 2602.09764; method and constants are Zaher et al.'s)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from adaptkit.objectives.coding_rate import coding_rate, num_processes, rate_weight
from adaptkit.objectives.head import ProjectionHead
from adaptkit.objectives.objective import Losses
from adaptkit.recipe import ObjectiveSettings

LIVE_MINORITY = 0.01  # a bit is live when its rarer value has at least this share


class Bits:
    """The discrete objective; see `Objective` for the shapes."""

    def __init__(self, settings: ObjectiveSettings) -> None:
        self.settings = settings

    def build_head(self, embed_dim: int) -> ProjectionHead:
        """(N, embed_dim) -> (N, num_bits)."""
        return ProjectionHead(embed_dim, self.settings.num_bits, self.settings.hidden_dim)

    def __call__(self, student: Tensor, teacher: Tensor, step: int) -> Losses:
        """Student logits (V, N, B) and teacher logits (G, N, B), float32 -> losses and bit counts."""
        codes = (teacher > 0).float()  # (G, N, B), no gradient
        num_global, num_images, num_bits = teacher.shape
        bce = bit_cross_entropy(student, codes)
        views = student[:num_global]
        rate = torch.stack([coding_rate(view, self.settings.eps, self.settings.centre) for view in views]).mean()
        gamma = rate_weight(num_bits, num_images * num_processes())
        loss = bce - self.settings.beta * gamma * rate
        report = {"loss": loss.detach(), "bce": bce.detach(), "coding_rate": rate.detach()}
        return Losses(loss, report | bit_counts(student.detach(), codes))

    def summary(self, sums: dict[str, Tensor], num_steps: int) -> dict[str, float]:
        """loss, bce, coding_rate, and what the bits say; see `bit_measures`."""
        scalars = {name: float(sums[name]) / num_steps for name in ("loss", "bce", "coding_rate")}
        return scalars | bit_measures(sums)


def bit_cross_entropy(student: Tensor, codes: Tensor) -> Tensor:
    """Mean BCE over all pairs (teacher view i, student view j != i), images and bits.

    (V, N, B) logits, (G, N, B) codes -> scalar. BCE(a, z) = softplus(a) - a z, so the sum over i needs only the
    sum of the codes, and no (G, V, N, B) tensor is built.
    """
    num_targets, others = _sum_over_other_views(student, codes)
    total = (num_targets * softplus(student)).sum() - (student * others).sum()
    return total / (num_targets.sum() * student.shape[1] * student.shape[2])


def _sum_over_other_views(student: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """How many codes each student view is compared with, (V, 1, 1), and their sum, (V, N, B)."""
    num_views, num_global = student.shape[0], codes.shape[0]
    others = codes.sum(0).expand_as(student).clone()
    others[:num_global] -= codes
    num_targets = torch.full((num_views, 1, 1), float(num_global), device=student.device)
    num_targets[:num_global] -= 1
    return num_targets, others


@torch.no_grad()
def bit_counts(student: Tensor, codes: Tensor) -> dict[str, Tensor]:
    """Per-bit counts over the pairs of `bit_cross_entropy`: both 1, student 1, teacher 1 (B,), and pairs ()."""
    bits = (student > 0).float()
    num_targets, others = _sum_over_other_views(student, codes)
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
