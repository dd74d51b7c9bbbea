"""The loop: views -> teacher's targets, student's logits -> loss -> step -> EMA, and what it takes to feed it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch

from adaptkit.compiling import compile_backbones
from adaptkit.distill import balance_head_, ema_update_, redraw_head_, train_mode_
from adaptkit.loading import Batch, StepSampler, Stuck, ViewDataset, view_loader
from adaptkit.microbatch import fixed_statistics
from adaptkit.optimizer import set_schedule_
from adaptkit.processes import average_statistics_
from adaptkit.session import Session


def train_steps(s: Session, after_step: Callable[[int], str | None]) -> str | None:
    """The loop: from the state's step to the plan's last.

    `after_step(step)` does what is due between steps (log, probe, save) and may give a reason to leave the loop,
    which is returned; None means the run is complete.
    """
    plan, recipe = s.plan, s.recipe
    compile_backbones(s, recipe.compile)
    loader = view_loader(*_batches(s), s.workers, pin_memory=s.accelerator.device.type == "cuda")
    ready = time.perf_counter()
    for step, batch in zip(range(s.state.step, plan.total_steps), loader, strict=False):
        s.meter.waited(time.perf_counter() - ready)
        s.on_failures(batch.failures)
        if isinstance(batch, Stuck):
            raise batch.error()
        torch.manual_seed(_mix(recipe.seed, step, s.accelerator.process_index))  # drop path; no state to save

        fresh = plan.is_reset(step) or s.state.redraw_now
        if fresh:
            redraw_head_(s.student, s.teacher, s.optimizer, seed=_mix(recipe.seed, step, s.state.channel.redraws))
            for tensor in s.objective.state.values():
                tensor.zero_()
            s.state.last_draw, s.state.redraw_now = step, False
        frozen = step < s.state.last_draw + plan.head_warmup
        train_mode_(s.student, frozen)
        set_schedule_(s.optimizer, plan, step, s.state.lr_factor)

        views, num_images = to_device(s, batch)  # [(G * n, 3, S, S), (L * n, 3, s, s)]
        with torch.no_grad(), s.accelerator.autocast():
            targets = s.teacher(views[:1], num_images, micro_batch=recipe.micro_batch)  # (G, n, B)
        if s.objective.balance == "always" or (fresh and s.objective.balance == "draw"):
            medians = s.accelerator.gather(targets.flatten(0, 1)).median(0).values  # (B,), of the global batch
            targets = balance_head_(s.student, s.teacher, targets, medians, fresh)
        with s.accelerator.autocast():
            logits = s.wrapped(views, num_images, frozen, recipe.micro_batch)  # (V, n, B)
        losses = s.objective(logits, targets, step)

        with fixed_statistics(s.student.backbone) if recipe.grad_checkpointing else nullcontext():
            s.accelerator.backward(losses.loss)
        for parameter in s.objective.frozen(s.student.head, step - s.state.last_draw):
            parameter.grad = None
        grad_norm = s.accelerator.clip_grad_norm_(s.student.parameters(), recipe.optim.clip_norm)
        s.optimizer.step()
        s.optimizer.zero_grad()
        if not frozen:
            average_statistics_(s.student)
        ema_update_(s.teacher, s.student, plan.momentum(step))

        s.state.step = step + 1
        s.meter.add(losses.report | {"grad_norm": grad_norm.detach()}, recipe.batch_size)
        reason = after_step(step + 1)
        if reason is not None:
            return reason
        ready = time.perf_counter()
    return None


def _batches(s: Session) -> tuple[ViewDataset, StepSampler]:
    """The views of this process for the steps that are left."""
    dataset = ViewDataset(s.source, s.multicrop, s.recipe.seed)
    sampler = StepSampler(
        len(s.source),
        s.recipe.batch_size,
        s.recipe.seed,
        s.state.step,
        s.plan.total_steps,
        s.accelerator.process_index,
        s.accelerator.num_processes,
        s.source.blocks,
    )
    return dataset, sampler


def to_device(s: Session, batch: Batch) -> tuple[list[torch.Tensor], int]:
    """uint8 crops -> normalised views on the device, view-major: [(G * n, 3, S, S), (L * n, 3, s, s)], and n."""
    device = s.accelerator.device
    num_images, num_global = batch.global_crops.shape[:2]
    factors = batch.factors.to(device, non_blocking=True).transpose(0, 1)  # (V, n, 8)
    views = []
    for crops, part in ((batch.global_crops, factors[:num_global]), (batch.local_crops, factors[num_global:])):
        if crops.shape[1]:
            pixels = crops.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
            views.append(s.normalised(pixels, part.flatten(0, 1)))
    return views, num_images


def _mix(*numbers: int) -> int:
    """One seed from several, so that neighbouring steps and processes share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
