"""What a run needs before its first step: networks, a resolved recipe, room on the disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from adaptkit.backbones import MODULE, Backbone, load_backbone
from adaptkit.errors import BackboneError, UsageError
from adaptkit.inputs import Inputs, fit_batch_size
from adaptkit.manifest import refuse_other_images, refuse_other_weights
from adaptkit.recipe import Recipe
from adaptkit.run import Run
from adaptkit.schedules import Plan
from adaptkit.session import Reporter
from adaptkit.settings import CACHE_WORDS
from adaptkit.sources import DecodeCache
from adaptkit.space import require_space_for_run


def load_original(recipe: Recipe, given: nn.Module | Backbone | None = None, drop_path: float = 0.0) -> Backbone:
    """The backbone a run begins with; with stochastic depth it can become the student.

    `given` is what Python code began the run with, if it did not begin with a name.
    """
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


def resolve(
    run: Run, original: Backbone, inputs: Inputs, accelerator: Accelerator, reporter: Reporter
) -> tuple[Run, Plan]:
    """`settle`, and write down the recipe that comes of it.

    Raises `BackboneError` or `DataError` when a run is resumed with other weights or on other images than it began
    with, `MachineError` when its disk has no room for what it will write or its cache cannot be made.
    """
    refuse_other_weights(run, original)
    refuse_other_images(run, inputs)
    recipe = settle(run.recipe, inputs, accelerator, reporter)
    plan = Plan.make(recipe, len(inputs.train))
    if recipe.data.cache not in CACHE_WORDS:
        DecodeCache.make(Path(recipe.data.cache))  # here, not after the probes
    if accelerator.is_main_process:
        require_space_for_run(run.path, original, plan)
        run.replace_recipe(recipe)
    return Run(run.path, recipe), plan


def settle(recipe: Recipe, inputs: Inputs, accelerator: Accelerator, reporter: Reporter) -> Recipe:
    """The recipe with what depends on machine and images: precision, batch size, and with it the number of steps."""
    batch_size = fit_batch_size(recipe, len(inputs.train), accelerator.num_processes)
    if batch_size != recipe.batch_size:
        reporter.note(f"batch size {batch_size} instead of {recipe.batch_size}: {len(inputs.train)} training images")
    if inputs.scored is not None and (unknown := inputs.scored.facts["without_gallery"]):
        reporter.note(f"{recipe.labels}: {unknown} queries left out, no image of their class is in the gallery")
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
    """Loader processes: as asked; else one beside a CPU that trains, up to 16 beside a GPU."""
    if asked is not None:
        return asked
    return 1 if device.type == "cpu" else min(16, os.cpu_count() or 1)
