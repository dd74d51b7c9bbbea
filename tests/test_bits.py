"""The objective against loops over pairs of views, in float64 numpy and by autograd of the naive formula."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from adaptkit.objectives import OBJECTIVES
from adaptkit.objectives.bits import Bits, bit_counts, bit_cross_entropy, bit_measures
from adaptkit.objectives.coding_rate import coding_rate, rate_weight
from adaptkit.settings import ObjectiveSettings

SHAPES = [(2, 2, 1, 2), (2, 2, 5, 3), (3, 2, 4, 7), (8, 2, 3, 16), (5, 3, 6, 4), (3, 3, 2, 8)]  # V, G, N, B


def draw(num_views: int, num_global: int, num_images: int, num_bits: int) -> tuple[Tensor, Tensor]:
    """Student and teacher logits that agree more often than not, and bits that are not half/half."""
    generator = torch.Generator().manual_seed(num_views * 1000 + num_bits)
    common = torch.randn(1, num_images, num_bits, generator=generator) + 0.3
    student = common + torch.randn(num_views, num_images, num_bits, generator=generator)
    teacher = common + torch.randn(num_global, num_images, num_bits, generator=generator)
    return student, teacher


def pairs(num_views: int, num_global: int) -> list[tuple[int, int]]:
    """(teacher view i, student view j), j != i."""
    return [(i, j) for i, j in product(range(num_global), range(num_views)) if i != j]


def naive_cross_entropy(student: Tensor, codes: Tensor) -> Tensor:
    losses = [
        binary_cross_entropy_with_logits(student[j], codes[i]) for i, j in pairs(student.shape[0], codes.shape[0])
    ]
    return torch.stack(losses).mean()


def entropy_bits(probabilities: NDArray[np.float64]) -> float:
    return -sum(p * math.log2(p) for p in probabilities.flatten() if p > 0)


def tables(student: Tensor, codes: Tensor) -> NDArray[np.float64]:
    """(B, 2, 2) joint distribution of teacher and student bit, counted pair by pair and image by image."""
    counts = np.zeros((student.shape[2], 2, 2))
    for i, j in pairs(student.shape[0], codes.shape[0]):
        for image, bit in product(range(student.shape[1]), range(student.shape[2])):
            counts[bit, int(codes[i, image, bit]), int(student[j, image, bit] > 0)] += 1
    return counts


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_is_the_mean_over_pairs_of_different_views(shape: tuple[int, int, int, int]) -> None:
    student, teacher = draw(*shape)
    codes = (teacher > 0).float()
    total = count = 0.0
    for i, j in pairs(shape[0], shape[1]):
        for a, z in zip(student[j].double().flatten(), codes[i].flatten(), strict=True):
            p = 1 / (1 + math.exp(-a))
            total -= math.log(p if z else 1 - p)
            count += 1
    assert float(bit_cross_entropy(student, codes)) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_cross_entropy_has_the_gradient_of_the_naive_formula(shape: tuple[int, int, int, int]) -> None:
    student, teacher = draw(*shape)
    codes = (teacher > 0).float()
    ours, naive = student.clone().requires_grad_(), student.clone().requires_grad_()
    bit_cross_entropy(ours, codes).backward()
    naive_cross_entropy(naive, codes).backward()
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-5, atol=1e-8)


def test_cross_entropy_stays_finite_for_large_logits() -> None:
    student = torch.tensor([[[300.0, -300.0]], [[300.0, -300.0]]])
    right, wrong = torch.tensor([[[1.0, 0.0]]] * 2), torch.tensor([[[0.0, 1.0]]] * 2)
    assert float(bit_cross_entropy(student, right)) == pytest.approx(0, abs=1e-6)
    assert float(bit_cross_entropy(student, wrong)) == pytest.approx(300)


@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_those_of_a_loop(shape: tuple[int, int, int, int]) -> None:
    student, teacher = draw(*shape)
    codes = (teacher > 0).float()
    joint, counts = tables(student, codes), bit_counts(student, codes)
    assert float(counts["pairs"]) == joint[0].sum()
    np.testing.assert_array_equal(counts["both_ones"].numpy(), joint[:, 1, 1])
    np.testing.assert_array_equal(counts["teacher_ones"].numpy(), joint[:, 1, :].sum(1))
    np.testing.assert_array_equal(counts["student_ones"].numpy(), joint[:, :, 1].sum(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_measures_are_those_of_the_joint_distribution(shape: tuple[int, int, int, int]) -> None:
    student, teacher = draw(*shape)
    codes = (teacher > 0).float()
    joint = tables(student, codes)
    joint /= joint.sum((1, 2), keepdims=True)
    information = [
        sum(p * math.log2(p / (table[z].sum() * table[:, s].sum())) for (z, s), p in np.ndenumerate(table) if p > 0)
        for table in joint
    ]
    ones = joint[:, 1, :].sum(1)
    measures = bit_measures(bit_counts(student, codes))
    assert measures["bit_agreement"] == pytest.approx(100 * (joint[:, 0, 0] + joint[:, 1, 1]).mean())
    assert measures["bit_information"] == pytest.approx(np.mean(information), abs=1e-9)
    assert measures["bit_entropy"] == pytest.approx(np.mean([entropy_bits(table.sum(1)) for table in joint]))
    assert measures["live_bits"] == sum(min(p, 1 - p) >= 0.01 for p in ones)


def test_measures_of_counts_summed_over_steps_are_those_of_all_pairs() -> None:
    (student, teacher), (student_2, teacher_2) = draw(3, 2, 4, 7), draw(4, 2, 4, 7)
    both = torch.cat([student, student_2[:3]], 1), torch.cat([teacher, teacher_2], 1)
    parts = [bit_counts(student, (teacher > 0).float()), bit_counts(student_2[:3], (teacher_2 > 0).float())]
    sums = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert bit_measures(sums) == pytest.approx(bit_measures(bit_counts(both[0], (both[1] > 0).float())))


def test_measures_at_their_ends() -> None:
    """A perfect channel, a constant bit that always agrees, an independent bit, an inverted bit."""
    teacher = torch.tensor([[1.0, 1, 1, 1], [1, 1, -1, 1], [-1, 1, 1, -1], [-1, 1, -1, -1]]).expand(2, 4, 4)
    student = torch.tensor([[1.0, 1, 1, -1], [1, 1, 1, -1], [-1, 1, -1, 1], [-1, 1, -1, 1]]).expand(3, 4, 4)
    each = [bit_measures(bit_counts(student[..., b : b + 1], (teacher[..., b : b + 1] > 0).float())) for b in range(4)]
    assert [m["bit_agreement"] for m in each] == pytest.approx([100, 100, 50, 0])
    assert [m["bit_information"] for m in each] == pytest.approx([1, 0, 0, 1], abs=1e-12)
    assert [m["bit_entropy"] for m in each] == pytest.approx([1, 0, 1, 1], abs=1e-12)
    assert [m["live_bits"] for m in each] == [1, 0, 1, 1]


@pytest.mark.parametrize(("ones", "live"), [(0, 0), (1, 0), (2, 1), (100, 1), (198, 1), (199, 0), (200, 0)])
def test_a_bit_is_live_when_one_in_a_hundred_differs(ones: int, live: int) -> None:
    counts = {"both_ones": ones, "student_ones": ones, "teacher_ones": ones, "pairs": 200}
    sums = {name: torch.tensor([float(n)]).double() for name, n in counts.items()}
    assert bit_measures(sums)["live_bits"] == live


@pytest.mark.parametrize("shape", [(2, 2, 5, 3), (6, 2, 4, 8), (5, 3, 6, 4)])
@pytest.mark.parametrize(
    ("beta", "target", "eps", "centre"),
    [(0.0, None, 0.5, True), (0.1, None, 0.5, True), (0.3, None, 0.2, False), (0.1, 0.4, 0.5, True), (2, 0.9, 1, True)],
)
def test_loss_and_gradient_of_the_whole(
    shape: tuple[int, int, int, int], beta: float, target: float | None, eps: float, centre: bool
) -> None:
    num_views, num_global, num_images, num_bits = shape
    student, teacher = draw(num_views, num_global, num_images, num_bits)
    objective = Bits(ObjectiveSettings(num_bits=num_bits, beta=beta, rate_target=target, eps=eps, centre=centre))
    ours, naive = student.clone().requires_grad_(), student.clone().requires_grad_()
    losses = objective(ours, teacher, step=0)
    losses.loss.backward()
    bce = naive_cross_entropy(naive, (teacher > 0).float())
    rates = []
    for view in range(num_global):
        rows = naive[view] / naive[view].norm(dim=1, keepdim=True)
        rows = rows - rows.mean(0) if centre else rows
        rates.append(0.5 * torch.logdet(torch.eye(num_bits) + num_bits / (num_images * eps) * rows.T @ rows))
    rate = torch.stack(rates).mean()
    if target is not None:
        r = min(num_bits, num_images)
        share = float(rate.detach()) / (r * math.log(1 + num_bits / (r * eps)) / 2)
        beta *= math.exp((target - share) / 0.2)
    expected = bce - beta * (num_bits + num_images) / (num_bits * num_images) * rate
    expected.backward()
    assert float(losses.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(losses.report["bce"]) == pytest.approx(float(bce.detach()), rel=1e-5)
    assert float(losses.report["coding_rate"]) == pytest.approx(float(rate.detach()), rel=1e-5)
    torch.testing.assert_close(ours.grad, naive.grad, rtol=1e-4, atol=1e-6)


def test_no_gradient_reaches_the_teacher_or_the_report() -> None:
    student, teacher = draw(4, 2, 3, 5)
    student.requires_grad_()
    teacher.requires_grad_()
    losses = Bits(ObjectiveSettings(num_bits=5))(student, teacher, step=0)
    losses.loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert not any(value.requires_grad for value in losses.report.values())


def test_local_views_are_left_out_of_the_coding_rate() -> None:
    student, teacher = draw(5, 2, 6, 4)
    report = Bits(ObjectiveSettings(num_bits=4))(student, teacher, step=0).report
    expected = (coding_rate(student[0]) + coding_rate(student[1])) / 2
    assert float(report["coding_rate"]) == pytest.approx(float(expected))


def test_summary_averages_the_scalars_over_steps() -> None:
    objective = Bits(ObjectiveSettings(num_bits=4))
    student, teacher = draw(4, 2, 3, 4)
    reports = [objective(scale * student, teacher, step=0).report for scale in (1, 2)]
    sums = {name: reports[0][name] + reports[1][name] for name in reports[0]}
    summary = objective.summary(sums, num_steps=2)
    for name in ("loss", "bce", "coding_rate"):
        assert summary[name] == pytest.approx(float((reports[0][name] + reports[1][name]) / 2))
    names = {"loss", "bce", "coding_rate", "bit_agreement", "bit_information", "bit_entropy", "live_bits"}
    assert set(summary) == names


def test_weight_of_the_rate() -> None:
    assert rate_weight(256, 128) == pytest.approx(1 / 256 + 1 / 128)


def test_registry_builds_the_head_of_the_settings() -> None:
    settings = ObjectiveSettings(num_bits=6, hidden_dim=10)
    head = OBJECTIVES[settings.name](settings).build_head(4)
    assert head(torch.zeros(3, 4)).shape == (3, 6)
    assert [p.shape[0] for p in head.parameters() if p.ndim == 2] == [10, 10, 6]
