"""What a run needs before its first step: networks, a resolved recipe, a manifest."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from accelerate import Accelerator

from adaptkit.backbones import Backbone, load_backbone
from adaptkit.errors import DataError, UsageError
from adaptkit.inputs import Inputs, fit_batch_size
from adaptkit.recipe import Recipe
from adaptkit.run import Run, environment
from adaptkit.schedules import Plan
from adaptkit.session import Reporter


def load_twice(recipe: Recipe) -> tuple[Backbone, Backbone]:
    """The original, and the copy that becomes the student (the same weights, with stochastic depth if asked)."""
    if recipe.backbone is None:
        raise UsageError("no backbone: give --backbone NAME")
    options: dict[str, Any] = {
        "weights": recipe.weights,
        "pretrained": recipe.pretrained,
        "readout": recipe.readout,
        "image_px": recipe.image_px,
        "allow_missing": recipe.allow_missing,
        "seed": recipe.seed,
    }
    original = load_backbone(recipe.backbone, **options)
    student = load_backbone(recipe.backbone, **options, drop_path=recipe.drop_path)
    return original, student


def resolve(run: Run, inputs: Inputs, accelerator: Accelerator, reporter: Reporter) -> tuple[Run, Plan]:
    """Settle what depends on machine and images: precision, batch size, and with it the number of steps.

    Raises `DataError` when a run is resumed on other images than it began with.
    """
    _refuse_other_images(run, inputs)
    recipe = run.recipe
    batch_size = fit_batch_size(recipe, len(inputs.train), accelerator.num_processes)
    if batch_size != recipe.batch_size:
        reporter.note(f"batch size {batch_size} instead of {recipe.batch_size}: {len(inputs.train)} training images")
    if not recipe.pretrained:
        recipe = without_protection(recipe)
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    recipe = recipe.model_copy(update={"batch_size": batch_size, "precision": precision})
    if accelerator.is_main_process:
        run.replace_recipe(recipe)
    return Run(run.path, recipe), Plan.make(recipe, len(inputs.train))


def without_protection(recipe: Recipe) -> Recipe:
    """From scratch there is nothing to protect: no head warm-up, layer-wise decay or interpolation."""
    return recipe.model_copy(
        update={
            "head": recipe.head.model_copy(update={"warmup": "never"}),
            "optim": recipe.optim.model_copy(update={"layer_decay": 1.0}),
            "select": recipe.select.model_copy(update={"alphas": ()}),
        }
    )


def _refuse_other_images(run: Run, inputs: Inputs) -> None:
    """Other images mean other splits: some that were trained on would then choose and report."""
    manifest, last = run.path / "manifest.json", run.path / "checkpoints" / "last.safetensors"
    if not manifest.is_file() or not last.is_file():
        return  # nothing was learnt yet
    known = json.loads(manifest.read_text(encoding="utf-8"))
    for key, path, found in (
        ("data_fingerprint", run.recipe.data, inputs.facts["fingerprint"]),
        ("labels_fingerprint", run.recipe.labels, labels_fingerprint(inputs)),
    ):
        if known.get(key) != found:
            raise DataError(
                f"{path}: files were added, removed or changed since {run.path} began; "
                "restore them to resume, or start again with --overwrite"
            )


def labels_fingerprint(inputs: Inputs) -> str | None:
    """Hash of the labelled images' paths and sizes; None without labels."""
    fingerprint: str | None = inputs.facts["labels"]["fingerprint"] if inputs.scored else None
    return fingerprint


def loader_workers(asked: int | None, device: torch.device) -> int:
    """Loader processes: as asked; else one beside a CPU that trains, up to 16 beside a GPU."""
    if asked is not None:
        return asked
    return 1 if device.type == "cpu" else min(16, os.cpu_count() or 1)


def write_manifest(run: Run, original: Backbone, inputs: Inputs, accelerator: Accelerator) -> None:
    """What the run was made with: versions, command, device, preprocessing, fingerprints."""
    if not accelerator.is_main_process:
        return
    load = original.load_report
    run.write_json(
        "manifest.json",
        environment()
        | {
            "seed": run.recipe.seed,
            "device": str(accelerator.device),
            "precision": run.recipe.precision,
            "num_processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "preprocessing": {
                "image_px": original.image_px,
                "mean": list(original.mean),
                "std": list(original.std),
                "interpolation": original.pretrained_cfg.get("interpolation"),
                "crop_pct": original.pretrained_cfg.get("crop_pct"),
            },
            "data_fingerprint": inputs.facts["fingerprint"],
            "labels_fingerprint": labels_fingerprint(inputs),
            "weights_sha256": load.sha256 if load else None,
        },
    )
