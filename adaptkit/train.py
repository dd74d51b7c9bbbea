"""Start reading here: `_adapt` is the story of a run; the loop is in `loop.py`.

probe the original -> warm up the head -> adapt -> select -> probe again -> export, reload, compare -> report
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptkit.backbones import Backbone, module_name
from adaptkit.caching import drop_cache, open_cached, settle_cache
from adaptkit.collapse import LR_CUT, MAX_REDRAWS
from adaptkit.embedding import Embedder
from adaptkit.errors import AdaptkitError, Collapsed, DeviceMemoryError, GainNotMet, Interrupted, MachineError
from adaptkit.estimate import TIMED_STEPS, TRIED_STEPS, Passes, StepCost, fit_budget, time_steps
from adaptkit.export import export_backbone, export_head
from adaptkit.inputs import open_inputs
from adaptkit.loop import train_steps
from adaptkit.manifest import write_manifest
from adaptkit.outcome import Outcome, compose_report, conclude
from adaptkit.prepare import load_original, loader_workers, resolve
from adaptkit.recipe import load_recipe, overrides_of
from adaptkit.report.markdown import render_markdown
from adaptkit.requirement import check_wishes
from adaptkit.run import INDEX, Run
from adaptkit.schedules import Plan
from adaptkit.select import Judge
from adaptkit.session import Reporter, Session, Silent, open_accelerator, open_session
from adaptkit.signals import StopRequest
from adaptkit.sources import BadImages, save_index
from adaptkit.supervise import INTERRUPTED, Supervisor


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
    try:
        with StopRequest(partial(_record_leaving, run)) as stop:
            result = _adapt(run, reporter, stop, given)
            code = _exit_code(result.report)
            run.status("done", code, result.report["message"])
    except Interrupted as error:
        _record(run, "interrupted", error)
        raise
    except torch.OutOfMemoryError as error:
        advice = f"out of GPU memory; lower --batch-size {run.recipe.batch_size}, views.num_local or image_px"
        _record(run, "failed", DeviceMemoryError(advice))
        raise DeviceMemoryError(advice) from error
    except Exception as error:
        error = _short_of_memory(error) or error
        _record(run, "failed", error)
        raise error
    if code == Collapsed.exit_code:
        raise Collapsed(result.report["message"])
    if code == GainNotMet.exit_code:
        raise GainNotMet(result.report["message"])
    return result


def _short_of_memory(error: Exception) -> MachineError | None:
    """Of the main process, or of a loader process, which the system may have killed for it."""
    if isinstance(error, MemoryError):
        return MachineError("the machine ran out of memory; lower --workers or --batch-size")
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return MachineError("a loader process was killed, perhaps for want of memory; lower --workers or --batch-size")
    return None


def _record(run: Run, state: str, error: Exception) -> None:
    """A disk too full for the record must not hide what it is about."""
    with suppress(MachineError):
        run.status(state, error.exit_code if isinstance(error, AdaptkitError) else 1, str(error))


def _record_leaving(run: Run) -> None:
    """A second signal ends the process at once; what another process or the end of the run wrote stays."""
    if (run.read_json("status.json") or {}).get("state") == "running":
        message = f"left at once at a second signal; go on with: adaptkit resume {run.path}"
        run.status("interrupted", Interrupted.exit_code, message)


def _exit_code(report: dict[str, Any]) -> int:
    if report["verdict"] == "collapsed":
        return Collapsed.exit_code  # wins over a gain that was not met
    asked = report["require_gain"]
    return GainNotMet.exit_code if asked and not asked["met"] else 0


def _adapt(run: Run, reporter: Reporter, stop: StopRequest, given: nn.Module | Backbone | None) -> AdaptResult:
    """The story of a run, from the resolved recipe to the report."""
    timings: dict[str, float] = {}
    started = time.perf_counter()
    phase = _phases(run.path, reporter, timings, stop)

    requirement = check_wishes(run.recipe)

    phase("load", "loading the backbone")
    accelerator = open_accelerator(run.recipe.precision)
    original = load_original(run.recipe, given)
    student = load_original(run.recipe, given, run.recipe.drop_path)
    if original.load_report is not None:
        reporter.load_report(original.load_report)

    phase("scan", "reading the images")
    inputs = open_inputs(run.recipe, run.path / INDEX)
    run, plan = resolve(run, original, inputs, accelerator, reporter)
    bad = BadImages(run.path / "bad_images.jsonl", len(inputs.everything), run.recipe.data.max_bad)
    write_manifest(run, original, inputs, accelerator, reporter)
    if accelerator.is_main_process:
        save_index(run.path / INDEX, inputs.everything)

    phase("probe_before", "probing the original backbone")
    workers = loader_workers(run.recipe.workers, accelerator.device)
    embedder = Embedder(run.recipe.probe.batch_size, workers, device=accelerator.device)
    original.module.to(accelerator.device)
    judge = Judge(inputs, run.recipe, embedder, bad.add_all)
    judge.measure_original(original)
    cost: StepCost | None = None
    if run.recipe.budget is not None:
        phase("budget", f"timing {TIMED_STEPS} steps, to fit into {run.recipe.budget}")
        cost = time_steps(accelerator, run.recipe, inputs, original, workers)
        per_image = timings["probe_before"] / (passes := Passes.count(inputs, run.recipe)).before
        plan = fit_budget(plan, len(inputs.train), passes, cost, per_image, time.perf_counter() - started)
        run = _keep_steps(run, plan, cost, accelerator.is_main_process)

    def step_cost() -> StepCost:
        phase("cache", "timing decoding and training, to see whether keeping images decoded small pays")
        return cost or time_steps(accelerator, run.recipe, inputs, original, workers, TRIED_STEPS)

    run, plan = settle_cache(run, plan, inputs.train, accelerator, workers, step_cost, reporter)
    images = open_cached(run, inputs.train, accelerator, reporter)

    phase("train", f"adapting: {plan.total_steps} steps of {plan.batch_size} images")
    session = open_session(accelerator, plan, images, original, student, workers, bad.add_all, reporter.note)
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
        drop_cache(run)  # can be made again
        supervisor.previous.unlink(missing_ok=True)
    return AdaptResult(run.path, run.path / "backbone", report["verdict"], report)


def _keep_steps(run: Run, plan: Plan, cost: StepCost, is_main_process: bool) -> Run:
    """The number of steps a budget came to is kept in the recipe before the first one: a resumed run does the same."""
    if is_main_process:
        asked = {"budget": run.recipe.budget, "steps": plan.total_steps, "step_seconds": cost.seconds}
        run.log({"step": 0, "kind": "budget"} | asked)
        run.replace_recipe(plan.recipe)
    return Run(run.path, plan.recipe)


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
    frozen_for = {"head": s.recipe.head.model_copy(update={"warmup": "100%", "reset_every": "never"})}
    plan = Plan.make(s.recipe.model_copy(update={"steps": s.plan.refit_steps, **frozen_for}), len(s.source))
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
        export_head(head, run.path / "head.safetensors", s.backbone.embed_dim, s.recipe.objective.name)
    s.accelerator.wait_for_everyone()
