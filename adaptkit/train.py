"""Start reading here: `_adapt` is the story of a run; the loop is in `loop.py`.

probe the original -> warm up the head -> adapt -> select -> probe again -> export, reload, compare -> report
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from adaptkit.backbones import Backbone, module_name
from adaptkit.caching import drop_cache, open_cached, settle_cache
from adaptkit.collapse import LR_CUT, MAX_REDRAWS
from adaptkit.embedding import Embedder
from adaptkit.endings import exit_code, record_leaving, recorded_ending
from adaptkit.errors import Collapsed, GainNotMet, Interrupted
from adaptkit.estimate import TIMED_STEPS, TRIED_STEPS, Passes, StepCost, fit_budget, time_steps
from adaptkit.export import export_backbone, export_head
from adaptkit.loop import train_steps
from adaptkit.manifest import write_manifest
from adaptkit.memory import train_in_memory
from adaptkit.outcome import Outcome, compose_report, conclude
from adaptkit.page import write_reports
from adaptkit.pictures import save_pictures
from adaptkit.prepare import load_original, loader_workers, open_bad_images, open_run_inputs, resolve
from adaptkit.processes import Noticed, everywhere, in_any, main_first, on_main
from adaptkit.recipe import load_recipe, overrides_of
from adaptkit.recovery import recover
from adaptkit.requirement import check_wishes
from adaptkit.run import Run
from adaptkit.schedules import Plan
from adaptkit.select import Judge
from adaptkit.session import Reporter, Session, Silent, open_accelerator, open_session
from adaptkit.signals import StopRequest
from adaptkit.supervise import INTERRUPTED, Supervisor
from adaptkit.tracking import Tracked


@dataclass(frozen=True)
class AdaptResult:
    """What a finished run gives back. `report` is the content of `report.json`."""

    run: Path
    backbone: Path
    verdict: str
    report: dict[str, Any]


def adapt(
    backbone: str | nn.Module | Backbone | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    output: str | Path | None = None,
    labels: str | Path | None = None,
    recipe: str | Path = "bits-reset",
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **settings: Any,
) -> AdaptResult:
    """Adapt a pretrained backbone to the images under `data`; the same as `adaptkit adapt`.

    `backbone` is a name or folder as on the command line, or a module of your own, (N, 3, H, W) -> (N, D), which is
    copied and never changed, or what `load_backbone(module, image_px=..., mean=..., std=...)` made of it. `settings`
    are keys of the recipe, with two underscores for a dot: `epochs=5, optim__lr=1e-4`. Raises the errors of
    `adaptkit.errors`; `GainNotMet` and `Collapsed` come after the run's report is written.
    """
    own = None if isinstance(backbone, str) else backbone
    name = backbone if own is None else module_name(own.module if isinstance(own, Backbone) else own)
    given = {"backbone": name, "data": data, "labels": labels, **settings}
    resolved = load_recipe(recipe, overrides_of(given)).with_absolute_paths()
    run = Run.create(resolved, Path(output) if output else None, overwrite)
    return run_adaptation(run, reporter or Silent(), own)


def resume(
    run: str | Path, *, backbone: nn.Module | Backbone | None = None, reporter: Reporter | None = None
) -> AdaptResult:
    """Go on where a run stopped; the same as `adaptkit resume`. A run that began with a module needs it again."""
    opened = Run.open(run)
    opened.claim()
    return run_adaptation(opened, reporter or Silent(), backbone)


def run_adaptation(run: Run, reporter: Reporter, given: nn.Module | Backbone | None = None) -> AdaptResult:
    """Do the run, or what is left of it, and keep `status.json` true whatever happens."""
    leaving = partial(record_leaving, run)
    with Tracked(run, reporter) as tracked, recorded_ending(run), StopRequest(leaving) as stop:
        result = _adapt(run, tracked, stop, given)
        code = exit_code(result.report)
        run.status("done", code, result.report["message"])
    if code == Collapsed.exit_code:
        raise Collapsed(result.report["message"])
    if code == GainNotMet.exit_code:
        raise GainNotMet(result.report["message"])
    return result


def _adapt(run: Run, reporter: Tracked, stop: StopRequest, given: nn.Module | Backbone | None) -> AdaptResult:
    """The story of a run, from the resolved recipe to the report."""
    timings: dict[str, float] = {}
    started = time.perf_counter()
    phase = _phases(run.path, reporter, timings, stop)

    requirement = check_wishes(run.recipe)

    phase("load", "loading the backbone")
    accelerator = open_accelerator(run.recipe.precision)
    on_main(reporter.begin)
    original = everywhere(lambda: load_original(run.recipe, given))
    student = load_original(run.recipe, given, run.recipe.drop_path)
    if original.load_report is not None:
        reporter.load_report(original.load_report)

    phase("scan", "reading the images")
    on_main(lambda: recover(run, reporter))
    inputs = open_run_inputs(run, original)
    run, plan = resolve(run, original, inputs, accelerator, reporter)
    bad = open_bad_images(run, len(inputs.everything))
    noticed = Noticed(bad)
    on_main(lambda: write_manifest(run, original, inputs, accelerator, reporter))

    phase("probe_before", "probing the original backbone")
    workers = loader_workers(run.recipe.workers, accelerator.device)
    embedder = Embedder(run.recipe.probe.batch_size, workers, device=accelerator.device, shared=True)
    original.module.to(accelerator.device)
    judge = Judge(inputs, run.recipe, embedder, noticed.count)
    judge.measure_original(original)
    cost: StepCost | None = None
    if run.recipe.budget is not None:
        phase("budget", f"timing {TIMED_STEPS} steps, to fit into {run.recipe.budget}")
        cost = time_steps(accelerator, run.recipe, inputs, original, workers)
        per_image = timings["probe_before"] / (passes := Passes.count(inputs, run.recipe)).before
        plan = fit_budget(plan, len(inputs.train), passes, cost, per_image, time.perf_counter() - started)
        run = _keep_steps(run, plan, cost)

    def step_cost() -> StepCost:
        phase("cache", "timing decoding and training, to see whether keeping images decoded small pays")
        return cost or time_steps(accelerator, run.recipe, inputs, original, workers, TRIED_STEPS)

    run, plan = settle_cache(run, plan, inputs.train, accelerator, workers, step_cost, reporter)
    images = main_first(lambda: open_cached(run, inputs.train, accelerator, reporter))

    phase("train", f"adapting: {plan.total_steps} steps of {plan.batch_size} images")
    session = open_session(accelerator, plan, images, original, student, workers, noticed, reporter.note)
    supervisor = Supervisor(session, run, judge, reporter, stop, noticed.share)
    if supervisor.last.is_file():
        everywhere(lambda: session.restore(supervisor.last))
        on_main(lambda: run.rewind_log(session.state.step))
    collapse = train(session, supervisor, reporter)
    run = supervisor.run  # its recipe says how many images at once fitted into the memory

    phase("select", "selecting, and probing the selected backbone")
    outcome = conclude(original, supervisor, judge, collapse)
    phase("export", "exporting, reloading, comparing")
    head = hand_over(run, session, outcome, embedder, stop)
    phase("pictures", "taking pictures for the report")
    if accelerator.is_main_process:
        save_pictures(run, session, judge, outcome, head, reporter.note)
    phase("report", "writing the report")
    noticed.share()  # what the refitted head met
    report = compose_report(run, session, inputs, judge, outcome, requirement, len(bad.paths), timings)
    on_main(lambda: write_reports(run, report, reporter.note))
    if accelerator.is_main_process:
        drop_cache(run)  # can be made again
        supervisor.tidy()
    return AdaptResult(run.path, run.path / "backbone", report["verdict"], report)


def _keep_steps(run: Run, plan: Plan, cost: StepCost) -> Run:
    """The number of steps a budget came to is kept in the recipe before the first one: a resumed run does the same."""
    asked = {"budget": run.recipe.budget, "steps": plan.total_steps, "step_seconds": cost.seconds}

    def write() -> None:
        run.log({"step": 0, "kind": "budget"} | asked)
        run.replace_recipe(plan.recipe)

    on_main(write)
    return Run(run.path, plan.recipe)


def _phases(path: Path, reporter: Reporter, timings: dict[str, float], stop: StopRequest) -> Callable[[str, str], None]:
    """A function that starts a phase: tells the reporter, times it, and leaves if a signal came in between."""
    started, current = time.perf_counter(), ""

    def phase(name: str, title: str) -> None:
        nonlocal started, current
        now, is_later = time.perf_counter(), bool(current)
        if is_later:
            timings[current] = round(now - started, 3)
        started, current = now, name
        # a signal to any process stops all; in the first phase they do not know each other yet
        if in_any(stop.received) if is_later else stop.received:
            raise Interrupted(f"stopped between two phases; go on with: adaptkit resume {path}")
        reporter.phase(title)

    return phase


def train(s: Session, supervisor: Supervisor, reporter: Reporter) -> str | None:
    """Run the loop to its end; after a collapse go back, redraw the head with a lower learning rate, try again.

    Returns the reason if it collapsed for good, else None. Raises `Interrupted` after a signal, state saved.
    """

    def go_back() -> None:
        """The memory was too small for the recipe; what fits is kept, also for a run that is resumed."""
        s.restore(supervisor.last)
        supervisor.run = supervisor.run.replace_recipe(s.recipe)
        supervisor.run.rewind_log(s.state.step)

    if s.state.step == 0:
        supervisor.save()
    while (reason := train_in_memory(s, supervisor, go_back)) is not None:
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


def refit_head(s: Session, backbone: Backbone, run: Run, stop: StopRequest) -> nn.Module:
    """A head for the codes of a backbone that is not the last teacher: drawn anew and trained on it, frozen.

    Raises `Interrupted` after a signal; a resumed run fits it from the start.
    """

    def after_step(step: int) -> str | None:
        return INTERRUPTED if step % s.recipe.log_every == 0 and in_any(stop.received) else None

    frozen_for = {"head": s.recipe.head.model_copy(update={"warmup": "100%", "reset_every": "never"}), "tune": "full"}
    plan = Plan.make(s.recipe.model_copy(update={"steps": s.plan.refit_steps, **frozen_for}), len(s.source))
    refit = open_session(s.accelerator, plan, s.source, backbone, backbone.clone(), s.workers, s.on_failures)
    if train_steps(refit, after_step) == INTERRUPTED:
        raise Interrupted(f"stopped while the head was fitted; go on with: adaptkit resume {run.path}")
    return refit.teacher.head


def hand_over(run: Run, s: Session, outcome: Outcome, embedder: Embedder, stop: StopRequest) -> nn.Module:
    """Write `backbone/` and `head.safetensors`; the export is reloaded and compared before anything is said.

    Returns the head.
    """
    chosen = outcome.selected
    is_last_teacher = chosen is not None and (chosen.step, chosen.alpha) == (s.state.step, 1.0)
    head = s.teacher.head if is_last_teacher else refit_head(s, outcome.backbone, run, stop)

    def export() -> None:
        export_backbone(outcome.backbone, run.path / "backbone", s.source, replace(embedder, shared=False))
        export_head(head, run.path / "head.safetensors", s.backbone.embed_dim, s.recipe.objective.name)

    on_main(export)
    return head
