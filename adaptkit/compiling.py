"""torch.compile of the backbone's blocks, one by one and in place: names and state dicts stay, equal blocks share.

Networks with BatchNorm stay eager: trying them out would change their statistics. So do copies of a compiled network,
and every embedding (`embedding.embed`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from adaptkit.backbones.reading import line
from adaptkit.distill import train_mode_
from adaptkit.errors import MachineError
from adaptkit.microbatch import has_batchnorm
from adaptkit.session import Session
from adaptkit.views import photometric
from adaptkit.views.photometric import NUM_FACTORS

MIN_STEPS = 500  # compiling takes about a minute (estimated, not measured on a GPU); fewer steps do not win it back
# All modules count against one limit of torch's (8 by default). A kind of block needs five graphs: student and frozen
# student on global and local crops, teacher. There are several kinds in a ConvNet, and in a process several runs.
MAX_GRAPHS = 1024


def compile_backbones(s: Session, setting: str) -> float | None:
    """Compile the blocks of student and teacher, on a GPU also the photometrics, once per session -> seconds, or None.

    `on` compiles everywhere, `auto` on a GPU if many steps are left; neither if the backbone is frozen throughout.
    What torch cannot compile stays eager, and the session's `note` is told; under `on` it is a `MachineError`.
    """
    if s.compile_tried or not _is_worth_it(s, setting):
        return s.compile_seconds
    s.compile_tried = True
    started = time.perf_counter()
    blocks = [*_blocks(s.student.backbone), *_blocks(s.teacher.backbone)]
    if setting == "auto" and s.recipe.drop_path:
        blocks = []  # each has its own rate, so each would be compiled by itself: minutes
    on_gpu = s.accelerator.device.type == "cuda"
    if not blocks and setting == "on":
        s.note(f"{s.backbone.name}: not compiled; that takes a network of blocks without BatchNorm")
    if not blocks and not on_gpu:
        return None
    try:
        for block in blocks:
            block.compile(dynamic=False)
        if on_gpu:
            s.photometric = torch.compile(photometric, dynamic=False)
        _try_out(s)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers and their drivers raise what they like
        _revert(s, blocks, setting, error)
        return None
    finally:
        s.meter.exclude(time.perf_counter() - started)
    s.compile_seconds = round(time.perf_counter() - started, 3)
    s.note(f"compiled in {s.compile_seconds:.0f} s")
    return s.compile_seconds


def _is_worth_it(s: Session, setting: str) -> bool:
    if setting == "off" or s.plan.head_warmup >= s.plan.total_steps:
        return False
    return setting == "on" or (s.accelerator.device.type == "cuda" and s.plan.total_steps - s.state.step >= MIN_STEPS)


def _blocks(backbone: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a ViT, or of the stages of a hierarchical network; none if it has BatchNorm."""
    if has_batchnorm(backbone):
        return
    for name, module in backbone.named_modules():
        if name.rpartition(".")[2] == "blocks":
            yield from module.children()


def _try_out(s: Session) -> None:
    """Run on black images everything that a step runs, so that all is compiled before the first one.

    No parameter, gradient or random state changes; DDP takes no part.
    """
    device = s.accelerator.device
    parameters = [parameter for parameter in s.student.parameters() if parameter.requires_grad]
    num_images = s.recipe.batch_size // s.accelerator.num_processes
    limit = torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS, accumulated_recompile_limit=MAX_GRAPHS)
    with limit, torch.random.fork_rng([device] if device.type == "cuda" else []):
        views = _black_views(s, num_images)
        with torch.no_grad(), s.accelerator.autocast():
            s.teacher(views[:1], num_images, micro_batch=s.recipe.micro_batch)
        for frozen in (True, False) if s.plan.head_warmup else (False,):
            train_mode_(s.student, frozen)
            with s.accelerator.autocast():
                logits = s.student(views, num_images, frozen, s.recipe.micro_batch)
            torch.autograd.grad(logits.sum(), parameters, allow_unused=True)


def _black_views(s: Session, num_images: int) -> list[Tensor]:
    """[(G * n, 3, S, S), (L * n, 3, s, s)], as `loop.to_device` makes them."""
    views, crops = s.recipe.views, s.multicrop
    sizes = ((views.num_global, crops.global_px), (views.num_local, crops.local_px))
    shapes = [(num * num_images, 3, side, side) for num, side in sizes if num]
    device = s.accelerator.device
    return [
        s.normalised(
            torch.zeros(shape, dtype=torch.uint8, device=device), torch.zeros(shape[0], NUM_FACTORS, device=device)
        )
        for shape in shapes
    ]


def _revert(s: Session, blocks: list[nn.Module], setting: str, error: Exception) -> None:
    """Back to eager; raises `MachineError` if compiling was asked for."""
    for block in blocks:
        block._compiled_call_impl = None
    s.photometric = photometric
    reason = line(error, 160)
    if setting == "on":
        raise MachineError(f"torch.compile failed here ({reason}); use --compile off") from error
    s.note(f"torch.compile failed here ({reason}); training goes on without it")
