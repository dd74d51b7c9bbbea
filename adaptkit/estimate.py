"""How long a run will take and how much memory it needs, measured on this machine; and how much fits into a budget."""

from __future__ import annotations

import sys
import time
from bisect import bisect_right
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from adaptkit.backbones import Backbone
from adaptkit.embedding import Embedder
from adaptkit.errors import DeviceMemoryError, UsageError
from adaptkit.inputs import Inputs, open_inputs
from adaptkit.memory import train_in_memory
from adaptkit.microbatch import advice
from adaptkit.prepare import load_original, loader_workers, settle
from adaptkit.recipe import Recipe
from adaptkit.requirement import check_wishes
from adaptkit.schedules import Plan
from adaptkit.session import Reporter, TrainState, open_accelerator, open_session
from adaptkit.settings import budget_seconds
from adaptkit.tuning import plan_tuning, sentence

WARM_STEPS = 2  # the first steps allocate memory and start workers
TIMED_STEPS = 20
TRIED_STEPS = 3  # for a forecast, which may be rougher
MIN_STEPS = 20  # fewer teach nothing
VIEW_PASSES = 3  # an image of the label-free measures is seen plain and as two views


@dataclass(frozen=True)
class StepCost:
    """One training step with nothing frozen: its median time, and the process's peak memory so far."""

    seconds: float
    peak_bytes: int
    fed_seconds: float = 0.0  # of `seconds`, what is left when no step waits for its batch
    micro_batch: int | None = None  # the recipe's, or less, where the memory was too small for it


@dataclass(frozen=True)
class Passes:
    """How many images the frozen network embeds for one evaluation of each kind."""

    before: int
    candidate: int
    after: int

    @classmethod
    def count(cls, inputs: Inputs, recipe: Recipe) -> Passes:
        """As `select.Judge` measures them."""
        report = VIEW_PASSES * len(inputs.report)
        gallery = asked = 0
        if inputs.scored is not None:
            gallery = len(inputs.scored.gallery)
            asked, report = len(inputs.scored.selection), report + len(inputs.scored.report)
        before = gallery + report
        if inputs.scored is None or recipe.select.by == "label-free":
            asked = VIEW_PASSES * len(inputs.selection)
            gallery = 0
        return cls(before + asked, gallery + asked, before)


def time_steps(
    accelerator: Accelerator,
    recipe: Recipe,
    inputs: Inputs,
    original: Backbone,
    workers: int,
    timed: int = TIMED_STEPS,
) -> StepCost:
    """Train copies of the networks for a few steps that are thrown away. Random state is left as it was."""
    unfrozen = recipe.head.model_copy(update={"warmup": "never", "reset_every": "never"})
    shown = recipe.model_copy(update={"steps": WARM_STEPS + timed, "head": unfrozen})
    plan = Plan.make(shown, len(inputs.train))
    moments: list[float] = []
    waits: list[float] = []

    def note(step: int) -> None:
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        moments.append(time.perf_counter())
        waits.append(session.meter.wait)

    def start_again() -> None:
        moments.clear()
        waits.clear()
        session.state = TrainState()
        session.meter.restart()

    with torch.random.fork_rng():
        session = open_session(
            accelerator, plan, inputs.train, original, original.clone(), workers, lambda failures: None
        )
        train_in_memory(session, note, start_again)
    accelerator.free_memory()
    steps = np.diff(moments[WARM_STEPS - 1 :])
    fed = steps - np.diff(waits[WARM_STEPS - 1 :])
    peak = peak_memory(accelerator.device)
    return StepCost(float(np.median(steps)), peak, float(np.median(fed)), session.recipe.micro_batch)


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU as allocated by torch, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # not known there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Forecast:
    """What a run would be: its plan, what a step costs, and the seconds of the whole."""

    plan: Plan
    cost: StepCost
    seconds: float
    trained: str  # how much of the backbone `tune` trains, in words
    num_processes: int = 1

    def to_json(self, device: torch.device) -> dict[str, Any]:
        """For `adapt --dry-run` and `check`; how much memory the device has is null where torch cannot tell."""
        plan, share = self.plan, self.plan.batch_size // self.num_processes
        return {
            "steps": plan.total_steps,
            "epochs": plan.total_steps / plan.steps_per_epoch,
            "batch_size": plan.batch_size,
            "num_processes": self.num_processes,
            "images_at_once": min(self.cost.micro_batch or share, share),
            "head_draws": sum(plan.is_reset(step) for step in range(plan.total_steps)),
            "step_seconds": self.cost.seconds,
            "seconds": self.seconds,
            "peak_bytes": self.cost.peak_bytes,
            "device_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
            "device": str(device),
            "precision": plan.recipe.precision,
            "trained": self.trained,
        }


def forecast(
    accelerator: Accelerator,
    recipe: Recipe,
    inputs: Inputs,
    original: Backbone,
    workers: int,
    num_processes: int | None = None,
) -> Forecast:
    """Time a few steps and a few embeddings, nothing of which is kept. `recipe` is settled (`prepare.settle`).

    `num_processes`: of the run, where this is one process that stands for all: it times its share of a batch, without
    the messages between them. Raises `DeviceMemoryError` where one of several would: alone it cannot
    take fewer images at once.
    """
    num_processes = num_processes or accelerator.num_processes
    share = recipe.batch_size * accelerator.num_processes // num_processes
    tried_recipe = recipe.model_copy(update={"batch_size": share})
    cost = time_steps(accelerator, tried_recipe, inputs, original, workers, TRIED_STEPS)
    if num_processes > 1 and cost.micro_batch != recipe.micro_batch:
        images = min(recipe.micro_batch or share, share)
        raise DeviceMemoryError(
            f"out of memory with {images} images at once in each of {num_processes} processes; use "
            + advice(recipe, original.module, images)
        )
    recipe = recipe.model_copy(update={"micro_batch": cost.micro_batch})
    tried = inputs.train.subset(np.arange(min(len(inputs.train), recipe.probe.batch_size)))
    embedder = Embedder(recipe.probe.batch_size, workers, device=accelerator.device)
    started = time.perf_counter()
    embedder(original, tried)
    per_image = (time.perf_counter() - started) / len(tried) / num_processes  # a run shares the batches
    plan, passes = Plan.make(recipe, len(inputs.train)), Passes.count(inputs, recipe)
    before = passes.before * per_image
    if recipe.budget is not None:
        plan = fit_budget(plan, len(inputs.train), passes, cost, per_image, before + TIMED_STEPS * cost.seconds)
    trained = sentence(plan_tuning(original, recipe), original.module, recipe)
    return Forecast(plan, cost, before + run_seconds(plan, passes, cost, per_image), trained, num_processes)


def dry_run(recipe: Recipe, reporter: Reporter, num_processes: int | None = None) -> dict[str, Any]:
    """What `adapt --dry-run` says (`adaptkit.dry_run/1`): all that a run checks before its first step, and a forecast.

    Nothing is written. `num_processes`: of the run; None for as many as there are now. Raises what the run would
    raise: `UsageError`, `BackboneError`, `DataError`.
    """
    check_wishes(recipe)
    accelerator = open_accelerator(recipe.precision)
    reporter.phase("loading the backbone")
    original = load_original(recipe)
    if original.load_report is not None:
        reporter.load_report(original.load_report)
    reporter.phase("reading the images")
    inputs = open_inputs(recipe)
    recipe = settle(recipe, inputs, accelerator, reporter, num_processes)
    reporter.phase(f"timing {TRIED_STEPS} steps")
    original.module.to(accelerator.device)
    workers = loader_workers(recipe.workers, accelerator.device)
    expected = forecast(accelerator, recipe, inputs, original, workers, num_processes)
    return {
        "schema": "adaptkit.dry_run/1",
        "recipe": expected.plan.recipe.model_dump(mode="json"),
        "data": inputs.facts,
        "plan": expected.to_json(accelerator.device),
    }


def run_seconds(plan: Plan, passes: Passes, cost: StepCost, per_image: float) -> float:
    """From the first step to the report: all steps as if none was frozen, the refitted head, the evaluations."""
    candidates = len(plan.recipe.select.alphas) + sum(plan.is_probe(step) for step in range(1, plan.total_steps + 1))
    evaluated = candidates * passes.candidate + passes.after
    return (plan.total_steps + plan.refit_steps) * cost.seconds + evaluated * per_image


def fit_budget(plan: Plan, num_images: int, passes: Passes, cost: StepCost, per_image: float, spent: float) -> Plan:
    """The plan with as many of its steps as fit into `recipe.budget`, of which `spent` seconds are gone.

    The resulting recipe has `steps` and no budget any more, so that it means the same on any machine, and the
    `micro_batch` that was timed. Every process follows the main one's clock. Raises `UsageError` when fewer than 20
    steps would fit.
    """
    plan = replace(plan, recipe=plan.recipe.model_copy(update={"micro_batch": cost.micro_batch}))
    budget, least = plan.recipe.budget or "", min(MIN_STEPS, plan.total_steps)

    def seconds(steps: int) -> float:
        return spent + run_seconds(_with_steps(plan, steps, num_images), passes, cost, per_image)

    counts = range(least, plan.total_steps + 1)
    fitting = bisect_right(counts, budget_seconds(budget), key=seconds)
    (agreed,) = broadcast_object_list([fitting])
    if not agreed:
        raise UsageError(
            f"budget {budget} is too short: {least} steps and their evaluations take {seconds(least) / 60:.1f} minutes "
            "here; give more, or probe fewer images (--set probe.max_gallery=...)"
        )
    return _with_steps(plan, counts[agreed - 1], num_images)


def _with_steps(plan: Plan, steps: int, num_images: int) -> Plan:
    return Plan.make(plan.recipe.model_copy(update={"steps": steps, "budget": None}), num_images)
