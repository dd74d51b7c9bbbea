"""Parameter groups of a small timm ViT, and the schedules written into them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adaptkit.backbones import load_backbone
from adaptkit.distill import Branch
from adaptkit.objectives.head import ProjectionHead
from adaptkit.optimizer import build_optimizer, set_schedule_
from adaptkit.recipe import Recipe
from adaptkit.schedules import Plan

DECAY, LR, HEAD_LR, WEIGHT_DECAY = 0.5, 0.2, 0.03, 0.4


@pytest.fixture(scope="module")
def student() -> Branch:
    """timm's test_vit (6 blocks) as the package loads it, and a head."""
    backbone = load_backbone("test_vit", pretrained=False)
    return Branch(backbone.module, ProjectionHead(backbone.embed_dim, 4, 8))


def plan(**optim: Any) -> Plan:
    settings = {"lr": LR, "layer_decay": DECAY, "warmup": "never", "final_lr": 0.1, "weight_decay": WEIGHT_DECAY}
    values = {"optim": settings | {"final_weight_decay": 0.6} | optim, "head": {"lr": HEAD_LR}}
    return Plan.make(Recipe.model_validate({"batch_size": 10, "steps": 11} | values), num_images=50)


def by_name(student: Branch, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The group of every parameter; each is in exactly one."""
    groups: dict[int, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in groups
            groups[id(parameter)] = group
    named = {name: groups[id(parameter)] for name, parameter in student.named_parameters()}
    assert len(named) == len(groups)
    return named


def test_learning_rate_falls_layer_by_layer_towards_the_input(student: Branch) -> None:
    groups = by_name(student, build_optimizer(student, plan()))
    scales = {name: group["lr_scale"] for name, group in groups.items()}
    depth = 6
    for name, scale in scales.items():
        if name.startswith("backbone.blocks."):
            expected = DECAY ** (depth - 1 - int(name.split(".")[2]))  # timm groups the final norm with the last block
            assert scale == pytest.approx(expected), name
        elif name.startswith(("backbone.patch_embed", "backbone.cls_token", "backbone.pos_embed")):
            assert scale == pytest.approx(DECAY**depth), name
        else:
            assert name.startswith(("backbone.norm", "backbone.fc_norm", "head."))
            assert scale == 1, name
    assert max(scales.values()) == 1


def test_no_layer_decay_means_one_learning_rate(student: Branch) -> None:
    optimizer = build_optimizer(student, plan(layer_decay=1.0))
    assert {group["lr_scale"] for group in optimizer.param_groups} == {1.0}


def test_biases_norms_and_tokens_have_no_weight_decay(student: Branch) -> None:
    groups = by_name(student, build_optimizer(student, plan()))
    decays = {name: group["decays"] for name, group in groups.items()}
    tokens = {"backbone.cls_token", "backbone.pos_embed", "backbone.reg_token"}
    for name, parameter in student.named_parameters():
        assert decays[name] == (parameter.ndim > 1 and name not in tokens), name
    assert {"backbone.blocks.0.norm1.weight", "backbone.cls_token", "head.0.bias"} <= set(decays)


def test_the_head_has_its_own_groups(student: Branch) -> None:
    groups = by_name(student, build_optimizer(student, plan()))
    for name, group in groups.items():
        assert group["is_head"] == name.startswith("head."), name
    assert groups["head.0.weight"]["decays"]
    assert not groups["head.4.bias"]["decays"]


def test_adamw_has_the_usual_betas(student: Branch) -> None:
    optimizer = build_optimizer(student, plan())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.999)}


@pytest.mark.parametrize(("step", "share", "weight_decay"), [(0, 1.0, 0.4), (5, 0.55, 0.5), (10, 0.1, 0.6)])
@pytest.mark.parametrize("lr_factor", [1.0, 0.25])
def test_schedule_is_written_into_every_group(
    student: Branch, step: int, share: float, weight_decay: float, lr_factor: float
) -> None:
    optimizer = build_optimizer(student, plan())
    set_schedule_(optimizer, plan(), step, lr_factor)
    for name, group in by_name(student, optimizer).items():
        peak = HEAD_LR if name.startswith("head.") else LR * group["lr_scale"]
        assert group["lr"] == pytest.approx(lr_factor * share * peak), name
        assert group["weight_decay"] == pytest.approx(weight_decay if group["decays"] else 0), name


def test_a_step_moves_the_last_layer_more_than_the_first() -> None:
    """AdamW's first step is lr times the sign of the gradient: the layer-wise decay can be read off."""
    backbone = load_backbone("test_vit", pretrained=False)
    student = Branch(backbone.module, ProjectionHead(backbone.embed_dim, 4, 8))
    optimizer = build_optimizer(student, plan())
    set_schedule_(optimizer, plan(), 0, 1.0)
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {name: float((before[name] - p.detach()).mean()) for name, p in student.named_parameters()}
    assert moved["backbone.blocks.5.norm1.bias"] == pytest.approx(LR, rel=1e-4)
    assert moved["backbone.blocks.0.norm1.bias"] == pytest.approx(LR * DECAY**5, rel=1e-4)
    assert moved["head.0.bias"] == pytest.approx(HEAD_LR, rel=1e-4)
