"""AdamW with a learning rate that decays from the last layer towards the input."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import param_groups_layer_decay

from adaptkit.distill import Branch
from adaptkit.schedules import Plan
from adaptkit.tuning import lora_matrices

BETAS = (0.9, 0.999)
FUSED_DEVICES = ("cpu", "cuda")  # one kernel for all parameters of a group, and no host synchronisation under fp16


def build_optimizer(student: Branch, plan: Plan) -> torch.optim.AdamW:
    """One group per layer and kind of parameter; biases, norms and tokens have no weight decay.

    Every group carries `lr_scale` (layer-wise decay), `decays` (whether it has weight decay) and `is_head`.
    LoRA's matrices have the last layer's rate in all layers: layer-wise decay protects pretrained weights, and these
    start from nothing. Their weight decay draws towards the original weights, not towards 0.
    """
    decay = plan.recipe.optim.layer_decay
    tokens: set[str] = getattr(student.backbone, "no_weight_decay", set)()  # timm does not ask for these by itself
    matrices = lora_matrices(student.backbone)
    new = {id(matrix) for matrix in matrices}
    groups = [_group(matrices, 1.0, decays=True, is_head=False)] if matrices else []
    for group in param_groups_layer_decay(student.backbone, 1.0, no_weight_decay_list=tokens, layer_decay=decay):
        pretrained = [parameter for parameter in group["params"] if id(parameter) not in new]
        if pretrained:
            groups.append(_group(pretrained, group["lr_scale"], group["weight_decay"] > 0, is_head=False))
    for decays in (True, False):
        parameters = [p for p in student.head.parameters() if (p.ndim > 1) == decays]
        groups.append(_group(parameters, 1.0, decays, is_head=True))
    fused = next(student.parameters()).device.type in FUSED_DEVICES
    return torch.optim.AdamW(groups, lr=plan.recipe.optim.lr, betas=BETAS, fused=fused)


@torch.no_grad()
def place_state_(optimizer: torch.optim.Optimizer) -> None:
    """Lay restored state out as a fresh optimizer would: beside its parameter, in the same order in memory.

    Fused AdamW reads parameter, moments and step count in one kernel: another order would pair the wrong numbers.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if name != "step":
                    state[name] = torch.empty_like(parameter).copy_(value)
                elif group["fused"]:
                    state[name] = value.to(parameter.device)


def _group(parameters: list[torch.nn.Parameter], lr_scale: float, decays: bool, is_head: bool) -> dict[str, Any]:
    return {"params": parameters, "lr_scale": lr_scale, "decays": decays, "is_head": is_head}


def set_schedule_(optimizer: torch.optim.Optimizer, plan: Plan, step: int, lr_factor: float) -> None:
    """Write this step's learning rates and weight decays into the groups. `lr_factor`: lowered after a collapse."""
    lr, head_lr, weight_decay = plan.lr(step), plan.head_lr(step), plan.weight_decay(step)
    for group in optimizer.param_groups:
        group["lr"] = lr_factor * (head_lr if group["is_head"] else lr * group["lr_scale"])
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
