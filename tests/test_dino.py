"""DINO against loops over pairs of views in plain numpy, its measures, and its head against torch's weight norm."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from baselines import SHAPES, draw, objective, pairs, plan
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.parametrizations import weight_norm

from adaptkit.objectives.dino import Dino, choice_counts, choice_measures, cross_entropy
from adaptkit.objectives.head import INIT_STD, PrototypeHead, draw_
from adaptkit.settings import ObjectiveSettings


def dino(num_prototypes: int, total_steps: int = 100, steps_per_epoch: int = 20, final: float = 0.04) -> Dino:
    settings = ObjectiveSettings(name="dino", num_prototypes=num_prototypes, final_teacher_temperature=final)
    return Dino(settings, plan(total_steps, steps_per_epoch))


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def slow_loss(student: Tensor, teacher: Tensor, centre: NDArray[np.float64], temperature: float) -> float:
    """Pair by pair, image by image, prototype by prototype."""
    losses = []
    for i, j in pairs(student.shape[0], teacher.shape[0]):
        for image in range(student.shape[1]):
            p = softmax((teacher[i, image].double().numpy() - centre) / temperature)
            q = softmax(student[j, image].double().numpy() / 0.1)
            losses.append(-sum(p[k] * math.log(q[k]) for k in range(len(p))))
    return float(np.mean(losses))


# --- the loss and the centre


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_centre_over_three_steps(shape: tuple[int, int, int, int]) -> None:
    """The centre of a step is that of the steps before it; it starts at 0."""
    ours, centre = dino(shape[3]), np.zeros(shape[3])
    for step in range(3):
        student, teacher = (outputs * (0.5 + 0.2 * step) for outputs in draw(*shape))
        losses = ours(student, teacher, step)
        assert float(losses.loss) == pytest.approx(slow_loss(student, teacher, centre, 0.04), rel=1e-4, abs=1e-6)
        rows = teacher.double().numpy().reshape(-1, shape[3])
        centre = np.array([0.9 * centre[k] + 0.1 * sum(row[k] for row in rows) / len(rows) for k in range(shape[3])])
        np.testing.assert_allclose(ours.state["centre"].numpy(), centre, rtol=1e-5, atol=1e-6)


def test_temperature_enters_the_loss() -> None:
    student, teacher = draw(4, 2, 3, 5)
    losses = dino(5, total_steps=100, final=0.07)(student, teacher, step=15)  # half of the warm-up
    assert float(losses.loss) == pytest.approx(slow_loss(student, teacher, np.zeros(5), 0.055), rel=1e-4)


@pytest.mark.parametrize("shape", [(2, 2, 3, 4), (4, 2, 3, 3), (4, 3, 2, 5)])
def test_gradient_is_that_of_finite_differences(shape: tuple[int, int, int, int]) -> None:
    student, teacher = (outputs.double() for outputs in draw(*shape))
    targets = (teacher / 0.2).softmax(-1)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), student.requires_grad_(), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_is_softmax_minus_targets(shape: tuple[int, int, int, int]) -> None:
    num_views, num_global, num_images, _ = shape
    student, teacher = draw(*shape)
    student.requires_grad_()
    dino(shape[3])(student, teacher, step=0).loss.backward()
    expected = torch.zeros_like(student)
    for i, j in pairs(num_views, num_global):
        expected[j] += (student[j].detach() / 0.1).softmax(-1) - (teacher[i] / 0.04).softmax(-1)
    expected /= 0.1 * num_images * len(pairs(num_views, num_global))
    torch.testing.assert_close(student.grad, expected, rtol=1e-4, atol=1e-5)


def test_no_gradient_reaches_the_teacher_the_centre_or_the_report() -> None:
    student, teacher = (outputs.requires_grad_() for outputs in draw(4, 2, 3, 5))
    ours = dino(5)
    losses = ours(student, teacher, step=0)
    losses.loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert not ours.state["centre"].requires_grad
    assert not any(value.requires_grad for value in losses.report.values())


# --- what changes over a run


def test_teacher_temperature_is_constant_unless_asked_to_rise() -> None:
    assert {dino(4).teacher_temperature(step) for step in range(100)} == {0.04}
    rising = [dino(4, total_steps=200, final=0.07).teacher_temperature(step) for step in range(200)]
    np.testing.assert_allclose(rising[:61], np.linspace(0.04, 0.07, 61))
    assert set(rising[60:]) == {0.07}


@pytest.mark.parametrize(
    ("total_steps", "steps_per_epoch", "frozen_steps"), [(1000, 20, 20), (100, 20, 10), (60, 60, 6), (1, 1, 0)]
)
def test_prototypes_are_frozen_for_an_epoch_but_at_most_a_tenth_of_the_run(
    total_steps: int, steps_per_epoch: int, frozen_steps: int
) -> None:
    ours = dino(6, total_steps, steps_per_epoch)
    head = ours.build_head(3)
    frozen = [age for age in range(total_steps) if ours.frozen(head, age)]
    assert frozen == list(range(frozen_steps))
    if frozen:
        assert [id(parameter) for parameter in ours.frozen(head, 0)] == [id(head.prototypes.weight)]


# --- what is logged, and when it is dead


def entropy_bits(probabilities: NDArray[np.float64]) -> float:
    return -sum(p * math.log2(p) for p in probabilities if p > 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_measures_are_those_of_a_loop(shape: tuple[int, int, int, int]) -> None:
    student, teacher = draw(*shape)
    targets = (teacher / 0.3).softmax(-1)
    choices = [row.double().numpy() for row in targets.flatten(0, 1)]
    equal = [
        int(student[j, image].argmax()) == int(targets[i, image].argmax())
        for i, j in pairs(shape[0], shape[1])
        for image in range(shape[2])
    ]
    measures = choice_measures(choice_counts(student, targets))
    assert measures["agreement"] == pytest.approx(100 * np.mean(equal))
    assert measures["teacher_entropy"] == pytest.approx(entropy_bits(np.mean(choices, axis=0)), rel=1e-5)
    assert measures["choice_entropy"] == pytest.approx(np.mean([entropy_bits(p) for p in choices]), rel=1e-5)


def test_measures_of_a_window_are_those_of_all_its_images() -> None:
    """Means over steps would be wrong for the entropy of the mean choice."""
    (student, teacher), (student_2, teacher_2) = draw(3, 2, 4, 7), draw(3, 2, 6, 7)
    both = choice_counts(torch.cat([student, student_2], 1), torch.cat([teacher, teacher_2], 1).softmax(-1))
    parts = [choice_counts(s, t.softmax(-1)) for s, t in ((student, teacher), (student_2, teacher_2))]
    sums = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert choice_measures(sums) == pytest.approx(choice_measures(both))


@pytest.mark.parametrize(
    ("kind", "dead", "entropies"),
    [
        ("one prototype", True, (0, 0)),
        ("evenly", True, (4, 4)),
        ("the same uneven choice", True, None),
        ("one image in a hundred differs", True, None),
        ("one each", False, (4, 0)),
        ("a few", False, None),
    ],
)
def test_choices_that_say_nothing_about_the_image_are_dead(
    kind: str, dead: bool, entropies: tuple[float, float] | None
) -> None:
    num_images, k = 200, 16
    image = torch.arange(num_images)
    logits = {
        "one prototype": 100 * torch.eye(k)[torch.zeros(num_images, dtype=torch.int64)],
        "evenly": torch.zeros(num_images, k),
        "the same uneven choice": torch.linspace(0, 3, k).expand(num_images, k),
        "one image in a hundred differs": 100 * torch.eye(k)[(image % 100 == 0).long()],
        "one each": 100 * torch.eye(k)[image % k],
        "a few": 2 * torch.eye(k)[image % 3],
    }[kind]
    ours = dino(k)
    targets = logits.softmax(-1).expand(2, num_images, k)
    sums = choice_counts(logits.expand(4, num_images, k), targets) | {"loss": torch.tensor(3.0)}
    record = ours.summary(sums, num_steps=1)
    assert set(record) == {"loss", "agreement", "teacher_entropy", "choice_entropy"}
    assert record["agreement"] == 100
    if entropies:
        assert (record["teacher_entropy"], record["choice_entropy"]) == pytest.approx(entropies, abs=0.01)
    health = ours.health(record)
    assert (health.collapse is not None) == dead
    assert health.information == (0 if dead else 1)


# --- the head


def twin_head(head: PrototypeHead) -> tuple[nn.Module, nn.Linear]:
    """The same MLP, and torch's weight-normalised layer with its norms fixed to 1."""
    k, width = head.prototypes.weight.shape
    layer = weight_norm(nn.Linear(width, k, bias=False))
    layer.parametrizations.weight.original0.data.fill_(1)  # type: ignore[union-attr, operator]
    layer.parametrizations.weight.original0.requires_grad_(False)  # type: ignore[union-attr, operator]
    layer.parametrizations.weight.original1.data.copy_(head.prototypes.weight)  # type: ignore[union-attr, operator]
    return head.mlp, layer


def test_head_is_the_mlp_of_length_1_and_a_weight_normalised_layer() -> None:
    head = objective("dino", output_dim=6, hidden_dim=10, num_prototypes=9).build_head(4)
    assert isinstance(head, PrototypeHead)
    draw_(head, 3)
    assert {name: tuple(t.shape) for name, t in head.state_dict().items() if "weight" in name} == {
        "mlp.0.weight": (10, 4), "mlp.2.weight": (10, 10), "mlp.4.weight": (6, 10), "prototypes.weight": (9, 6),
    }  # fmt: skip
    mlp, layer = twin_head(head)
    x, weights = 9 * torch.randn(5, 4), torch.randn(5, 9)
    outputs, expected = head(x), layer(mlp(x))
    torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
    assert outputs.abs().max() <= 1 + 1e-6
    (gradient,) = torch.autograd.grad((outputs * weights).sum(), head.prototypes.weight)
    (twin,) = torch.autograd.grad((expected * weights).sum(), layer.parametrizations.weight.original1)  # type: ignore[union-attr, arg-type]
    torch.testing.assert_close(gradient, twin, rtol=1e-4, atol=1e-5)


def test_prototypes_are_float32_under_autocast() -> None:
    head = PrototypeHead(4, 6, 9, 10)
    with torch.autocast("cpu", torch.bfloat16):
        rows = head.mlp(torch.randn(5, 4))
        outputs = head.prototypes(rows)
    assert outputs.dtype == torch.float32
    exact = rows.double() @ normalize(head.prototypes.weight.double(), dim=1).T
    torch.testing.assert_close(outputs.double(), exact, rtol=0, atol=1e-6)


def test_draw_of_the_prototypes_is_uniform_and_that_of_the_seed() -> None:
    head, again = PrototypeHead(4, 64, 400, 50), PrototypeHead(4, 64, 400, 50)
    draw_(head, 5)
    draw_(again, 5)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))
    weight = head.prototypes.weight.detach()
    assert 0.124 < float(weight.abs().max()) <= 1 / 8
    assert float(weight.std()) == pytest.approx(1 / 8 / math.sqrt(3), rel=0.02)
    assert float(head.mlp[2].weight.detach().std()) == pytest.approx(INIT_STD, rel=0.05)  # type: ignore[operator]
