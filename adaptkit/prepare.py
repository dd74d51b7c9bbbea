"""What a run needs before its first step: networks, a resolved recipe, room on the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from torch import nn

from adaptkit.backbones import MODULE, Backbone, load_backbone
from adaptkit.errors import BackboneError, DataError, UsageError
from adaptkit.inputs import Inputs, fit_batch_size, open_inputs
from adaptkit.manifest import refuse_other_images, refuse_other_weights
from adaptkit.microbatch import check_memory_settings
from adaptkit.processes import main_first, on_main
from adaptkit.recipe import Recipe
from adaptkit.run import INDEX, Run
from adaptkit.schedules import Plan
from adaptkit.session import Reporter
from adaptkit.settings import CACHE_WORDS
from adaptkit.sources import BadImages, DecodeCache, save_index
from adaptkit.space import require_space_for_run
from adaptkit.tuning import plan_tuning

FEW_BLOCKS = 8  # fewer, and a batch shows what stands together in the table


def load_original(recipe: Recipe, given: nn.Module | Backbone | None = None, drop_path: float = 0.0) -> Backbone:
    """The backbone a run begins with; with stochastic depth it can become the student.

    `given` is what Python code began the run with, if it did not begin with a name. Raises `BackboneError`, and
    `UsageError` when the recipe's `tune` does not suit the backbone.
    """
    backbone = _load(recipe, given, drop_path)
    plan_tuning(backbone, recipe)
    check_memory_settings(recipe, backbone)
    return backbone


def _load(recipe: Recipe, given: nn.Module | Backbone | None, drop_path: float) -> Backbone:
    if recipe.backbone is None:
        raise UsageError("no backbone: give --backbone NAME")
    if isinstance(given, Backbone):
        return given.clone()
    options: dict[str, Any] = {"readout": recipe.readout, "image_px": recipe.image_px, "drop_path": drop_path}
    if given is not None:
        return load_backbone(given, **options)
    if recipe.backbone.startswith(MODULE):
        raise BackboneError(
            f"{recipe.backbone}: this run began with a torch module; resume it from Python: "
            "adaptkit.resume(run, backbone=module)"
        )
    options |= {"weights": recipe.weights, "pretrained": recipe.pretrained, "allow_missing": recipe.allow_missing}
    return load_backbone(recipe.backbone, **options, seed=recipe.seed)


def open_run_inputs(run: Run, original: Backbone) -> Inputs:
    """The images of a run. The main process looks for them; the others read the list that it saved.

    Raises as `open_inputs`, and `BackboneError` or `DataError` when a run is resumed with other weights or on other
    images than it began with.
    """
    index = run.path / INDEX

    def read() -> Inputs:
        inputs = open_inputs(run.recipe, index)
        refuse_other_weights(run, original)
        refuse_other_images(run, inputs)
        if PartialState().is_main_process:
            save_index(index, inputs.everything)
        return inputs

    inputs = main_first(read)
    if len({repr(facts) for facts in gather_object([inputs.facts])}) > 1:
        raise DataError(f"{run.recipe.data.shown}: not the same images for all processes; leave them alone, try again")
    return inputs


def open_bad_images(run: Run, num_images: int) -> BadImages:
    """The list of a run's bad images: all processes count, the main one writes."""
    file, max_bad = run.path / "bad_images.jsonl", run.recipe.data.max_bad
    return main_first(lambda: BadImages(file, num_images, max_bad, writes=PartialState().is_main_process))


def resolve(
    run: Run, original: Backbone, inputs: Inputs, accelerator: Accelerator, reporter: Reporter
) -> tuple[Run, Plan]:
    """`settle`, and write down the recipe that comes of it.

    Raises `MachineError` when its disk has no room for what the run will write or its cache cannot be made.
    """
    recipe = settle(run.recipe, inputs, accelerator, reporter)
    plan = Plan.make(recipe, len(inputs.train))

    def write() -> Run:
        if recipe.data.cache not in CACHE_WORDS:
            DecodeCache.make(Path(recipe.data.cache))  # here, not after the probes
        require_space_for_run(run.path, original, plan)
        return run.replace_recipe(recipe)

    on_main(write)
    return Run(run.path, recipe), plan


def settle(
    recipe: Recipe, inputs: Inputs, accelerator: Accelerator, reporter: Reporter, num_processes: int | None = None
) -> Recipe:
    """The recipe with what depends on machine and images: precision, batch size, and with it the number of steps.

    `num_processes`: of the run, where it is not this one that trains.
    """
    batch_size = fit_batch_size(recipe, len(inputs.train), num_processes or accelerator.num_processes)
    if batch_size != recipe.batch_size:
        reporter.note(f"batch size {batch_size} instead of {recipe.batch_size}: {len(inputs.train)} training images")
    if inputs.scored is not None and (unknown := inputs.scored.facts["without_gallery"]):
        reporter.note(f"{recipe.labels}: {unknown} queries left out, no image of their class is in the gallery")
    if (blocks := inputs.train.blocks) and blocks.per_window < FEW_BLOCKS:
        reporter.note(
            f"{recipe.data.shown}: images are shuffled within windows of about {blocks.per_window:.0f} row group(s); "
            "if neighbouring rows look alike, write the rows in random order or smaller row groups"
        )
    if not recipe.pretrained:
        recipe = without_protection(recipe)
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    return recipe.model_copy(update={"batch_size": batch_size, "precision": precision})


def without_protection(recipe: Recipe) -> Recipe:
    """From scratch there is nothing to protect: no head warm-up, layer-wise decay or interpolation."""
    return recipe.model_copy(
        update={
            "head": recipe.head.model_copy(update={"warmup": "never"}),
            "optim": recipe.optim.model_copy(update={"layer_decay": 1.0}),
            "select": recipe.select.model_copy(update={"alphas": ()}),
        }
    )


def loader_workers(asked: int | None, device: torch.device) -> int:
    """Loader processes: as asked; else one beside a CPU that trains, up to 16 beside each GPU of a machine."""
    if asked is not None:
        return asked
    cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 1 if device.type == "cpu" else max(1, min(16, cores))
