"""Room on the disk: what a run will write, and whether there is room for it before it is written."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import torch
from torch import nn

from adaptkit.backbones import Backbone
from adaptkit.errors import MachineError
from adaptkit.objectives import OBJECTIVES
from adaptkit.schedules import Plan
from adaptkit.tuning import plan_tuning

MIB = 2**20


def require_space(folder: Path, num_bytes: int, what: Path) -> None:
    """Raise `MachineError` about `what` if the disk of `folder` has fewer bytes free than it will take."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return  # not every file system tells; a write that fails is reported then
    if usage.total and usage.free < num_bytes:
        sizes = f"{-(-num_bytes // MIB)} MiB needed, {usage.free // MIB} MiB free"
        raise MachineError(f"{what}: {os.strerror(errno.ENOSPC)}; free some space ({sizes})")


def require_space_for_run(path: Path, original: Backbone, plan: Plan) -> None:
    """The same for what a run in `path` has still to write; what it wrote before it was stopped is there already."""
    written = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    require_space(path, run_bytes(original, plan) - written, path)


def run_bytes(original: Backbone, plan: Plan) -> int:
    """Bytes of a run's files when they are most: a checkpoint beside the two before, candidates, the export."""
    with torch.device("meta"):  # only its size is wanted
        head = OBJECTIVES[plan.recipe.objective.name](plan.recipe.objective, plan).build_head(original.embed_dim)
    parts = (original.module, head)
    teacher = sum(_state_bytes(part) for part in parts)
    trained = plan_tuning(original, plan.recipe).num_trained(original.module) + sum(
        p.numel() for p in head.parameters()
    )
    moments = 2 * 4 * trained  # AdamW's, float32
    checkpoint = 2 * teacher + moments
    return 3 * checkpoint + (num_candidates(plan) + 1) * teacher  # the export is backbone and head once more


def num_candidates(plan: Plan) -> int:
    """Files of candidates when they are most: the best, the chosen one, and those taken since the last checkpoint."""
    num_probes = -(-plan.total_steps // plan.probe_every) if plan.probe_every else 1
    if not (plan.checkpoint_every and plan.probe_every):
        return num_probes
    return min(num_probes, plan.recipe.select.keep + 1 + -(-plan.checkpoint_every // plan.probe_every))


def _state_bytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())
