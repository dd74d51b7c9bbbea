"""SimDINO against loops over pairs of views and numpy's slogdet, its measures, and its head."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from baselines import SHAPES, objective, pairs, unit
from torch import Tensor
from torch.nn.functional import normalize

from adaptkit.objectives.head import ProjectionHead, UnitHead, draw_
from adaptkit.objectives.simdino import SimDino
from adaptkit.settings import ObjectiveSettings


def simdino(output_dim: int, eps: float = 0.5) -> SimDino:
    return SimDino(ObjectiveSettings(name="simdino", output_dim=output_dim, eps=eps))


# --- the loss


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [0.5, 0.05])
def test_loss_is_cosine_distance_minus_the_rate_of_the_mean_outputs(
    shape: tuple[int, int, int, int], eps: float
) -> None:
    num_views, num_global, num_images, output_dim = shape
    student, teacher = (outputs.double().numpy() for outputs in unit(shape))
    cosines = [
        sum(student[j, image, d] * teacher[i, image, d] for d in range(output_dim))
        for i, j in pairs(num_views, num_global)
        for image in range(num_images)
    ]
    rates = []
    for view in range(num_global):
        means = np.stack([(student[view, image] + teacher[view, image]) / 2 for image in range(num_images)])
        gram = sum(np.outer(row, row) for row in means)  # neither of length 1 nor centred
        sign, logdet = np.linalg.slogdet(np.eye(output_dim) + output_dim / (num_images * eps) * gram)
        assert sign == 1
        rates.append(logdet / 2)
    gamma = (output_dim + num_images) / (output_dim * num_images)
    losses = simdino(output_dim, eps)(*unit(shape), step=0)
    assert float(losses.report["cosine"]) == pytest.approx(np.mean(cosines), rel=1e-5)
    assert float(losses.report["coding_rate"]) == pytest.approx(np.mean(rates), rel=1e-5)
    assert float(losses.loss) == pytest.approx(1 - np.mean(cosines) - gamma * np.mean(rates), rel=1e-4, abs=1e-6)


def test_distance_is_half_the_squared_distance_of_the_paper() -> None:
    student, teacher = unit((4, 2, 5, 6))
    squares = [(student[j] - teacher[i]).square().sum(-1) / 2 for i, j in pairs(4, 2)]
    report = simdino(6)(student, teacher, step=0).report
    assert 1 - float(report["cosine"]) == pytest.approx(float(torch.stack(squares).mean()), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (4, 2, 5, 3), (4, 3, 2, 5)])
def test_gradient_is_that_of_finite_differences(shape: tuple[int, int, int, int]) -> None:
    student, teacher = (outputs.double() for outputs in unit(shape))
    ours = simdino(shape[3])

    def loss(logits: Tensor) -> Tensor:
        return ours(normalize(logits, dim=-1), teacher, step=0).loss

    # the head's scaling to length 1 is part of the path
    assert torch.autograd.gradcheck(loss, (3 * student).requires_grad_(), eps=1e-5, atol=1e-6)


def test_no_gradient_reaches_the_teacher_or_the_report() -> None:
    student, teacher = (outputs.requires_grad_() for outputs in unit((4, 2, 3, 5)))
    losses = simdino(5)(student, teacher, step=0)
    losses.loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert not any(value.requires_grad for value in losses.report.values())


# --- what is logged, and when it is dead


def test_summary_averages_over_steps() -> None:
    ours = simdino(6)
    reports = [ours(*unit((4, 2, images, 6)), step=0).report for images in (3, 5)]
    summary = ours.summary({name: reports[0][name] + reports[1][name] for name in reports[0]}, num_steps=2)
    assert set(summary) == {"loss", "agreement", "coding_rate"}
    mean = {name: float(reports[0][name] + reports[1][name]) / 2 for name in reports[0]}
    assert summary["agreement"] == pytest.approx(100 * mean["cosine"])
    assert (summary["loss"], summary["coding_rate"]) == pytest.approx((mean["loss"], mean["coding_rate"]))


def outputs_of(kind: str) -> Tensor:
    """(1, 32, 8) outputs of length 1."""
    direction, other = torch.eye(8)[0], torch.eye(8)[1]
    signs = torch.tensor([1.0, -1.0]).repeat(16).unsqueeze(1)
    rows = {
        "one point": direction.expand(32, 8),
        "two opposite points": signs * direction,
        "one point, nearly": direction + 1e-3 * torch.randn(32, 8, generator=torch.Generator().manual_seed(0)),
        "two directions": torch.cat([direction.expand(16, 8), other.expand(16, 8)]),
        "one point, less nearly": direction + 0.1 * torch.randn(32, 8, generator=torch.Generator().manual_seed(0)),
        "everywhere": torch.randn(32, 8, generator=torch.Generator().manual_seed(0)),
    }
    return normalize(rows[kind], dim=1).unsqueeze(0)


@pytest.mark.parametrize(
    ("kind", "dead"),
    [
        ("one point", True),
        ("two opposite points", True),
        ("one point, nearly", True),
        ("two directions", False),
        ("one point, less nearly", False),
        ("everywhere", False),
    ],
)
def test_outputs_in_a_single_direction_are_dead(kind: str, dead: bool) -> None:
    ours, outputs = simdino(8), outputs_of(kind)
    report = ours(outputs.repeat(3, 1, 1), outputs.repeat(2, 1, 1), step=0).report
    health = ours.health(ours.summary(report, num_steps=1))
    assert (health.collapse is not None) == dead
    assert health.information == (0 if dead else 1)
    if dead:
        assert health.collapse is not None
        assert "a single direction has 1.417, agreement 100.0 %" in health.collapse  # ln(1 + 8 / 0.5) / 2


# --- the head


def test_head_is_the_mlp_with_outputs_of_length_1() -> None:
    head = objective("simdino", output_dim=6, hidden_dim=10).build_head(4)
    assert isinstance(head, UnitHead)
    draw_(head, 1)
    plain = ProjectionHead(4, 6, 10)
    plain.load_state_dict(head.state_dict())  # the same plain tensors under the same names
    x = torch.randn(5, 4)
    torch.testing.assert_close(head(x), plain(x) / plain(x).norm(dim=1, keepdim=True))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(x)
    assert outputs.dtype == torch.float32
    torch.testing.assert_close(outputs.norm(dim=1), torch.ones(5), rtol=1e-6, atol=1e-6)
