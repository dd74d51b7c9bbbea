"""Student and teacher: EMA, head draws, balance, the frozen backbone, interpolation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from adaptkit.distill import (
    Branch,
    balance_head_,
    build_pair,
    ema_update_,
    interpolate,
    redraw_head_,
    train_mode_,
)
from adaptkit.objectives.bits import Bits
from adaptkit.objectives.head import INIT_STD, ProjectionHead, draw_, last_bias
from adaptkit.settings import ObjectiveSettings

EMBED_DIM, NUM_BITS, NUM_IMAGES = 6, 10, 8


def tiny_backbone(seed: int = 0) -> nn.Module:
    """(N, 3, H, W) -> (N, EMBED_DIM), with BatchNorm: buffers that are floats and one that counts."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, EMBED_DIM, 3), nn.BatchNorm2d(EMBED_DIM), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def pair(seed: int = 1) -> tuple[Branch, Branch]:
    backbone = tiny_backbone()
    objective = Bits(ObjectiveSettings(num_bits=NUM_BITS, hidden_dim=12))
    return build_pair(backbone, copy.deepcopy(backbone), EMBED_DIM, objective, seed)


def views(seed: int = 2) -> list[Tensor]:
    """Two global and three local views, view-major."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2 * NUM_IMAGES, 3, 8, 8, generator=generator), torch.randn(3 * NUM_IMAGES, 3, 5, 5)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def trained_step(student: Branch, optimizer: torch.optim.Optimizer, frozen: bool = False) -> None:
    train_mode_(student, frozen)
    student(views(), NUM_IMAGES, frozen).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_pair_starts_with_equal_heads_and_a_teacher_that_only_follows() -> None:
    student, teacher = pair()
    assert equal(state(student), state(teacher))
    assert not any(a is b for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not teacher(views(), NUM_IMAGES).requires_grad
    assert equal(state(pair(1)[0].head), state(student.head))
    assert not torch.equal(pair(7)[0].head[0].weight, student.head[0].weight)  # type: ignore[arg-type]


def test_logits_are_view_major_and_local_views_come_last() -> None:
    student, _ = pair()
    student.eval()
    large, small = views()
    logits = student([large, small], NUM_IMAGES)
    assert logits.shape == (5, NUM_IMAGES, NUM_BITS)
    for view, image in ((0, 0), (1, 0), (1, 5), (2, 1), (4, 7)):
        source, position = (large, view) if view < 2 else (small, view - 2)
        pixels = source[position * NUM_IMAGES + image].unsqueeze(0)
        torch.testing.assert_close(logits[view, image], student.head(student.backbone(pixels))[0])


@pytest.mark.parametrize("frozen", [False, True])
def test_logits_are_float32_under_autocast(frozen: bool) -> None:
    student, teacher = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert student.head(torch.zeros(1, EMBED_DIM)).dtype == torch.bfloat16
        assert student(views(), NUM_IMAGES, frozen).dtype == torch.float32
        assert teacher(views(), NUM_IMAGES).dtype == torch.float32


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_ema_is_the_written_formula_and_buffers_are_copied(momentum: float) -> None:
    student, teacher = pair()
    student.load_state_dict({k: torch.randn(v.shape).to(v.dtype) for k, v in state(student).items()})
    student.backbone[1].num_batches_tracked.fill_(17)  # type: ignore[index, union-attr]
    before, source = state(teacher), state(student)
    ema_update_(teacher, student, momentum)
    parameters = {name for name, _ in teacher.named_parameters()}
    assert parameters < set(before)
    for name, tensor in teacher.state_dict().items():
        mean = momentum * before[name].double() + (1 - momentum) * source[name].double()
        expected = mean.float() if name in parameters else source[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)
    assert equal(state(student), source)


def test_draw_is_the_stated_distribution_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    head = ProjectionHead(300, 64, hidden_dim=200)
    torch.manual_seed(5)
    draw_(head, 3)
    assert torch.equal(torch.rand(1), expected)
    weights = [layer.weight.detach() for layer in head if isinstance(layer, nn.Linear)]
    biases = [layer.bias.detach() for layer in head if isinstance(layer, nn.Linear)]
    for weight in weights:
        assert float(weight.std()) == pytest.approx(INIT_STD, rel=0.03)
        assert float(weight.mean()) == pytest.approx(0, abs=1e-3)
    assert not any(bias.any() for bias in biases)
    assert last_bias(head) is head[4].bias


def test_redraw_gives_both_heads_the_draw_of_the_seed() -> None:
    student, teacher = pair()
    optimizer = torch.optim.AdamW(student.parameters())
    trained_step(student, optimizer)
    backbones = state(student.backbone), state(teacher.backbone)

    def redrawn(seed: int) -> dict[str, Tensor]:
        redraw_head_(student, teacher, optimizer, seed)
        assert equal(state(student.head), state(teacher.head))
        return state(student.head)

    first, other, again = redrawn(8), redrawn(9), redrawn(8)
    assert equal(first, again)
    assert not any(torch.equal(first[name], other[name]) for name in first if "weight" in name)
    assert equal(state(student.backbone), backbones[0])
    assert equal(state(teacher.backbone), backbones[1])
    assert not any(a is b for a, b in zip(student.head.parameters(), teacher.head.parameters(), strict=True))


def test_redraw_drops_the_optimizer_state_of_the_head_only() -> None:
    student, teacher = pair()
    optimizer = torch.optim.AdamW(student.parameters())
    trained_step(student, optimizer)
    assert set(optimizer.state) == set(student.parameters())
    kept = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in student.backbone.parameters()}
    redraw_head_(student, teacher, optimizer, seed=4)
    assert set(optimizer.state) == set(student.backbone.parameters())
    for parameter, values in kept.items():
        assert equal(optimizer.state[parameter], values)
    trained_step(student, optimizer)
    steps = {float(optimizer.state[p]["step"]) for p in student.head.parameters()}
    assert steps == {1.0}


def test_balance_makes_every_bit_of_a_fresh_head_half_and_half() -> None:
    student, teacher = pair()
    batch = views()[:1]
    with torch.no_grad():
        logits = teacher(batch, NUM_IMAGES)
    ones = (logits > 0).float().mean((0, 1))
    assert ((ones < 0.3) | (ones > 0.7)).any()  # a fresh head needs it
    balanced = balance_head_(student, teacher, logits, logits.flatten(0, 1).median(0).values, fresh=True)
    assert torch.equal((balanced > 0).float().mean((0, 1)), torch.full((NUM_BITS,), 0.5))
    with torch.no_grad():
        torch.testing.assert_close(teacher(batch, NUM_IMAGES), balanced, rtol=1e-4, atol=1e-6)
    assert equal(state(student.head), state(teacher.head))


def test_balance_of_a_trained_head_moves_the_teachers_last_bias_only() -> None:
    student, teacher = pair()
    batch = views()[:1]
    before, student_before = state(teacher), state(student)
    with torch.no_grad():
        logits = teacher(batch, NUM_IMAGES)
        balanced = balance_head_(student, teacher, logits, logits.flatten(0, 1).median(0).values, fresh=False)
        torch.testing.assert_close(teacher(batch, NUM_IMAGES), balanced, rtol=1e-4, atol=1e-6)
    assert equal(state(student), student_before)
    changed = {name for name, tensor in teacher.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"head.4.bias"}
    assert (balanced.flatten(0, 1).median(0).values.abs() <= logits.flatten(0, 1).median(0).values.abs()).all()


def test_frozen_backbone_keeps_its_statistics_and_gets_no_gradient() -> None:
    student, _ = pair()
    before = state(student.backbone)
    train_mode_(student, frozen=True)
    assert not any(module.training for module in student.backbone.modules())
    assert student.head.training
    student(views(), NUM_IMAGES, frozen=True).sum().backward()
    assert equal(state(student.backbone), before)
    assert all(parameter.grad is None for parameter in student.backbone.parameters())
    assert all(parameter.grad is not None for parameter in student.head.parameters())
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_a_backbone_thawed_again_learns() -> None:
    student, _ = pair()
    train_mode_(student, frozen=True)
    train_mode_(student, frozen=False)
    before = state(student.backbone)
    assert all(module.training for module in student.modules())
    student(views(), NUM_IMAGES, frozen=False).square().sum().backward()
    assert not torch.equal(student.backbone[1].running_mean, before["1.running_mean"])  # type: ignore[index, union-attr]
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_not_frozen_does_not_switch_gradients_on() -> None:
    student, _ = pair()
    embeddings: list[Tensor] = []
    student.backbone.register_forward_hook(lambda module, inputs, output: embeddings.append(output))
    with torch.no_grad():
        assert not student(views(), NUM_IMAGES, frozen=False).requires_grad
    assert [embedding.requires_grad for embedding in embeddings] == [False, False]  # no graph is built and kept
    assert student(views(), NUM_IMAGES, frozen=False).requires_grad
    assert [embedding.requires_grad for embedding in embeddings[2:]] == [True, True]


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_interpolation_is_the_straight_line(alpha: float) -> None:
    original, adapted = state(tiny_backbone(0)), state(tiny_backbone(1))
    adapted["1.num_batches_tracked"] = torch.tensor(9)
    adapted["1.running_var"] = adapted["1.running_var"] * 3
    copies = {k: v.clone() for k, v in original.items()}, {k: v.clone() for k, v in adapted.items()}
    between = interpolate(original, adapted, alpha)
    assert between.keys() == adapted.keys()
    for name, tensor in between.items():
        if name.endswith("num_batches_tracked"):
            assert int(tensor) == 9
        else:
            expected = (1 - alpha) * original[name].double() + alpha * adapted[name].double()
            torch.testing.assert_close(tensor, expected.float())
        tensor.zero_()  # the result is a copy
    assert equal(original, copies[0])
    assert equal(adapted, copies[1])
