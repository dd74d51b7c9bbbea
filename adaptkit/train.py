"""Start reading here. `run_adaptation` is the story of a run; `train_steps` is the loop.

probe the original -> warm up the head -> adapt -> select -> probe again -> export, reload, compare -> report
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adaptkit.backbones import Backbone
from adaptkit.collapse import LR_CUT, MAX_REDRAWS
from adaptkit.distill import balance_head_, ema_update_, redraw_head_, train_mode_
from adaptkit.embedding import Embedder
from adaptkit.errors import AdaptkitError, Collapsed, DeviceMemoryError, GainNotMet, Interrupted
from adaptkit.export import export_backbone, export_head
from adaptkit.inputs import open_inputs
from adaptkit.loading import Batch, StepSampler, Stuck, ViewDataset, view_loader
from adaptkit.optimizer import set_schedule_
from adaptkit.outcome import Outcome, compose_report, conclude
from adaptkit.prepare import load_twice, loader_workers, resolve, write_manifest
from adaptkit.recipe import load_recipe
from adaptkit.report.markdown import render_markdown
from adaptkit.run import Run
from adaptkit.schedules import Plan
from adaptkit.select import Judge, Requirement, metrics_of
from adaptkit.session import Reporter, Session, Silent, open_accelerator, open_session
from adaptkit.signals import StopRequest
from adaptkit.sources import BadImages
from adaptkit.supervise import INTERRUPTED, Supervisor
from adaptkit.views import photometric

MIN_REFIT_STEPS = 50


@dataclass(frozen=True)
class AdaptResult:
    """What a finished run gives back. `report` is the content of `report.json`."""

    run: Path
    backbone: Path
    verdict: str
    report: dict[str, Any]


def adapt(
    backbone: str | None = None,
    data: str | Path | None = None,
    *,
    output: str | Path | None = None,
    labels: str | Path | None = None,
    recipe: str | Path = "bits-reset",
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **settings: Any,
) -> AdaptResult:
    """Adapt a pretrained backbone to the images under `data`; the same as `adaptkit adapt`.

    `settings` are keys of the recipe, with two underscores for a dot: `epochs=5, optim__lr=1e-4`. Raises the errors
    of `adaptkit.errors`; `GainNotMet` and `Collapsed` come after the run's report is written.
    """
    given = {"backbone": backbone, "data": data, "labels": labels, **settings}
    overrides = {key.replace("__", "."): str(v) if isinstance(v, Path) else v for key, v in given.items()}
    resolved = load_recipe(recipe, overrides).with_absolute_paths()
    run = Run.create(resolved, Path(output) if output else None, overwrite)
    return run_adaptation(run, reporter or Silent())


def run_adaptation(run: Run, reporter: Reporter) -> AdaptResult:
    """Do the run, or what is left of it, and keep `status.json` true whatever happens."""
    try:
        with StopRequest() as stop:
            result = _adapt(run, reporter, stop)
            code = _exit_code(result.report)
            run.status("done", code, result.report["message"])
    except Interrupted as error:
        run.status("interrupted", error.exit_code, str(error))
        raise
    except torch.OutOfMemoryError as error:
        advice = f"out of GPU memory; lower --batch-size {run.recipe.batch_size}, views.num_local or image_px"
        run.status("failed", DeviceMemoryError.exit_code, advice)
        raise DeviceMemoryError(advice) from error
    except Exception as error:
        run.status("failed", error.exit_code if isinstance(error, AdaptkitError) else 1, str(error))
        raise
    if code == Collapsed.exit_code:
        raise Collapsed(result.report["message"])
    if code == GainNotMet.exit_code:
        raise GainNotMet(result.report["message"])
    return result


def _exit_code(report: dict[str, Any]) -> int:
    if report["verdict"] == "collapsed":
        return Collapsed.exit_code  # wins over a gain that was not met
    asked = report["require_gain"]
    return GainNotMet.exit_code if asked and not asked["met"] else 0


def _adapt(run: Run, reporter: Reporter, stop: StopRequest) -> AdaptResult:
    """The story of a run, from the resolved recipe to the report."""
    timings: dict[str, float] = {}
    phase = _phases(run.path, reporter, timings, stop)

    gain = run.recipe.require_gain
    requirement = Requirement.parse(gain, metrics_of(run.recipe)) if gain else None

    phase("load", "loading the backbone")
    accelerator = open_accelerator(run.recipe.precision)
    original, student = load_twice(run.recipe)
    if original.load_report is not None:
        reporter.load_report(original.load_report)

    phase("scan", "reading the images")
    inputs = open_inputs(run.recipe)
    run, plan = resolve(run, inputs, accelerator, reporter)
    bad = BadImages(run.path / "bad_images.jsonl", len(inputs.everything), run.recipe.sources.max_bad)
    write_manifest(run, original, inputs, accelerator)

    phase("probe_before", "probing the original backbone")
    workers = loader_workers(run.recipe.workers, accelerator.device)
    embedder = Embedder(run.recipe.probe.batch_size, workers, device=accelerator.device)
    original.module.to(accelerator.device)
    judge = Judge(inputs, run.recipe, embedder, bad.add_all)
    judge.measure_original(original)

    phase("train", f"adapting: {plan.total_steps} steps of {plan.batch_size} images")
    session = open_session(accelerator, plan, inputs.train, original, student, workers, bad.add_all)
    supervisor = Supervisor(session, run, judge, reporter, stop)
    if supervisor.last.is_file():
        session.restore(supervisor.last)
        run.rewind_log(session.state.step)
    collapse = train(session, supervisor, reporter)

    phase("select", "selecting, and probing the selected backbone")
    outcome = conclude(original, supervisor, judge, collapse)
    phase("export", "exporting, reloading, comparing")
    hand_over(run, session, outcome, embedder)
    phase("report", "writing the report")
    report = compose_report(run, session, inputs, judge, outcome, requirement, len(bad.paths), timings)
    if accelerator.is_main_process:
        run.write("report.md", render_markdown(report))
        run.write_json("report.json", report)  # last: its presence means finished
    return AdaptResult(run.path, run.path / "backbone", report["verdict"], report)


def _phases(path: Path, reporter: Reporter, timings: dict[str, float], stop: StopRequest) -> Callable[[str, str], None]:
    """A function that starts a phase: tells the reporter, times it, and leaves if a signal came in between."""
    started, current = time.perf_counter(), ""

    def phase(name: str, title: str) -> None:
        nonlocal started, current
        now = time.perf_counter()
        if current:
            timings[current] = round(now - started, 3)
        started, current = now, name
        if stop.received:
            raise Interrupted(f"stopped between two phases; go on with: adaptkit resume {path}")
        reporter.phase(title)

    return phase


def train_steps(s: Session, after_step: Callable[[int], str | None]) -> str | None:
    """The loop: from the state's step to the plan's last.

    `after_step(step)` does what is due between steps (log, probe, save) and may give a reason to leave the loop,
    which is returned; None means the run is complete.
    """
    plan, recipe = s.plan, s.recipe
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
            s.state.last_draw, s.state.redraw_now = step, False
        frozen = step < s.state.last_draw + plan.head_warmup
        train_mode_(s.student, frozen)
        set_schedule_(s.optimizer, plan, step, s.state.lr_factor)

        views, num_images = to_device(s, batch)  # [(G * n, 3, S, S), (L * n, 3, s, s)]
        with torch.no_grad(), s.accelerator.autocast():
            targets = s.teacher(views[:1], num_images)  # (G, n, B)
        if recipe.objective.balance == "always" or (fresh and recipe.objective.balance == "draw"):
            medians = s.accelerator.gather(targets.flatten(0, 1)).median(0).values  # (B,), of the global batch
            targets = balance_head_(s.student, s.teacher, targets, medians, fresh)
        with s.accelerator.autocast():
            logits = s.wrapped(views, num_images, frozen)  # (V, n, B)
        losses = s.objective(logits, targets, step)

        s.accelerator.backward(losses.loss)
        grad_norm = s.accelerator.clip_grad_norm_(s.student.parameters(), recipe.optim.clip_norm)
        s.optimizer.step()
        s.optimizer.zero_grad()
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
    )
    return dataset, sampler


def to_device(s: Session, batch: Batch) -> tuple[list[torch.Tensor], int]:
    """uint8 crops -> normalised views on the device, view-major: [(G * n, 3, S, S), (L * n, 3, s, s)], and n."""
    device, backbone = s.accelerator.device, s.backbone
    num_images, num_global = batch.global_crops.shape[:2]
    factors = batch.factors.to(device, non_blocking=True).transpose(0, 1)  # (V, n, 8)
    views = []
    for crops, part in ((batch.global_crops, factors[:num_global]), (batch.local_crops, factors[num_global:])):
        if crops.shape[1]:
            pixels = crops.to(device, non_blocking=True).transpose(0, 1).flatten(0, 1)
            parts = s.multicrop.parts
            views.append(photometric(pixels, part.flatten(0, 1), backbone.mean, backbone.std, parts))
    return views, num_images


def _mix(*numbers: int) -> int:
    """One seed from several, so that neighbouring steps and processes share nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def train(s: Session, supervisor: Supervisor, reporter: Reporter) -> str | None:
    """Run the loop to its end; after a collapse go back, redraw the head with a lower learning rate, try again.

    Returns the reason if it collapsed for good, else None. Raises `Interrupted` after a signal, state saved.
    """
    if s.state.step == 0:
        supervisor.save()
    while (reason := train_steps(s, supervisor)) is not None:
        if reason == INTERRUPTED:
            raise Interrupted(f"stopped at step {s.state.step}; go on with: adaptkit resume {supervisor.run.path}")
        redraws = s.state.channel.redraws + 1
        if redraws > MAX_REDRAWS:
            return f"{reason}, after {MAX_REDRAWS} new heads"
        lr_factor = s.state.lr_factor * LR_CUT
        reporter.note(f"step {s.state.step}: {reason}; going back, new head, learning rate x {lr_factor:g}")
        s.restore(supervisor.last)
        s.state.lr_factor, s.state.redraw_now = lr_factor, True
        s.state.channel.redraws, s.state.channel.bad_windows = redraws, 0
    return None


def refit_head(s: Session, backbone: Backbone) -> nn.Module:
    """A head for the codes of a backbone that is not the last teacher: drawn anew and trained on it, frozen."""
    steps = max(MIN_REFIT_STEPS, s.plan.head_warmup)
    frozen_for = {"head": s.recipe.head.model_copy(update={"warmup": "100%", "reset_every": "never"})}
    plan = Plan.make(s.recipe.model_copy(update={"steps": steps, **frozen_for}), len(s.source))
    refit = open_session(s.accelerator, plan, s.source, backbone, backbone.clone(), s.workers, s.on_failures)
    train_steps(refit, lambda step: None)
    return refit.teacher.head


def hand_over(run: Run, s: Session, outcome: Outcome, embedder: Embedder) -> None:
    """Write `backbone/` and `head.safetensors`; the export is reloaded and compared before anything is said."""
    chosen = outcome.selected
    is_last_teacher = chosen is not None and (chosen.step, chosen.alpha) == (s.state.step, 1.0)
    head = s.teacher.head if is_last_teacher else refit_head(s, outcome.backbone)
    if s.accelerator.is_main_process:
        export_backbone(outcome.backbone, run.path / "backbone", s.source, embedder)
        export_head(head, run.path / "head.safetensors", s.backbone.embed_dim)
    s.accelerator.wait_for_everyone()
