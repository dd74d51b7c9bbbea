"""Training in as much memory as there is: where a step takes more, the same again with half as many images at once."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import torch

from adaptkit.errors import DeviceMemoryError
from adaptkit.loop import train_steps
from adaptkit.microbatch import advice, has_batchnorm
from adaptkit.schedules import Plan
from adaptkit.session import Session
from adaptkit.shortage import shortage


def train_in_memory(s: Session, after_step: Callable[[int], str | None], go_back: Callable[[], None]) -> str | None:
    """`train_steps`; where the device's memory runs out, `go_back()` and on with half as many images at once.

    The recipe in `s.plan` then has that `micro_batch`. Raises `DeviceMemoryError` where it cannot be halved: at 1, for
    a network with BatchNorm, and in one process of several, which cannot go back alone.
    """
    while True:
        try:
            return train_steps(s, after_step)
        except Exception as error:
            if not isinstance(shortage(error), DeviceMemoryError):
                raise
            plan, note = _with_fewer_images(s, error)
        # only here: the error held the frames of the step, and they what filled the memory
        s.plan, s.compile_tried = plan, False
        s.optimizer.zero_grad()
        gc.collect()
        if s.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        s.note(note)
        go_back()


def _with_fewer_images(s: Session, error: Exception) -> tuple[Plan, str]:
    """The plan with half as many images at once, and what the user is told."""
    share = s.recipe.batch_size // s.accelerator.num_processes
    images = min(s.recipe.micro_batch or share, share)
    what, network = f"out of memory with {images} image{'s' * (images > 1)} at once", s.student.backbone
    if images == 1 or s.accelerator.num_processes > 1 or has_batchnorm(network):
        raise DeviceMemoryError(f"{what}; use {advice(s.recipe, network, images)}") from error
    recipe = s.recipe.model_copy(update={"micro_batch": images // 2})
    return replace(s.plan, recipe=recipe), f"{what}; going on with {images // 2}"
