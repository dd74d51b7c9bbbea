"""`manifest.json`: what a run began with, what it must find again when resumed, and what has changed since."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.numpy import load_file

from adaptkit.backbones import Backbone
from adaptkit.checkpoints import LAST, load_state
from adaptkit.errors import BackboneError, DataError
from adaptkit.inputs import Inputs
from adaptkit.run import INDEX, Run, damaged
from adaptkit.session import Reporter
from adaptkit.sources import FolderSource
from adaptkit.sources.source import shown
from adaptkit.tuning import plan_tuning

NAME = "manifest.json"
DISTRIBUTIONS = ("adaptkit", "torch", "torchvision", "timm", "accelerate", "numpy", "safetensors", "pillow")
MAX_COMPARED = 1_000_000  # images, to be named when they changed; beyond that counting has to do
SAID_AS = {"device": "device", "precision": "precision", "num_processes": "processes"}


def refuse_other_weights(run: Run, original: Backbone) -> None:
    """The report compares with the original, and candidates lie on the line to it: other weights make it nonsense.

    Raises `BackboneError` when something was learnt from other weights than these.
    """
    known = (_learnt_with(run) or {}).get("weights_sha256")
    found = weights_sha256(original)
    if known is not None and known != found:
        source = original.load_report.source if original.load_report else original.name
        hashes = f"sha256 {known[:12]}, now {found[:12] if found else 'none'}"
        raise BackboneError(
            f"{source}: not the weights that {run.path} began with ({hashes}); "
            "restore them to resume, or start again with --overwrite"
        )


def refuse_other_images(run: Run, inputs: Inputs) -> None:
    """Other images mean other splits: some that were trained on would then choose and report. Raises `DataError`."""
    known = _learnt_with(run)
    if known is None:
        return
    for key, path, found in (
        ("data_fingerprint", run.recipe.data.shown, inputs.facts["fingerprint"]),
        ("labels_fingerprint", run.recipe.labels, labels_fingerprint(inputs)),
    ):
        if known.get(key) != found:
            detail = image_changes(run.path / INDEX, inputs.everything) if key == "data_fingerprint" else ""
            raise DataError(
                f"{path}: files were added, removed or changed since {run.path} began{detail}; "
                "restore them to resume, or start again with --overwrite"
            )


def image_changes(index: Path, images: FolderSource) -> str:
    """` (1 removed: a.jpg; 2 changed: b.jpg, ...)`: `images` against the run's index; empty if that is no help."""
    try:
        kept = load_file(index)
        ends, sizes = kept["offsets"][1:].tolist(), kept["sizes"].tolist()
        content = kept["names"].tobytes()
    except (OSError, SafetensorError, KeyError):
        return ""
    if max(len(sizes), len(images)) > MAX_COMPARED:
        return f" ({len(sizes)} images then, {len(images)} now)"
    before = {content[start:end]: size for start, end, size in zip([0, *ends], ends, sizes, strict=False)}
    now = {os.fsencode(images.path(row)): size for row, size in enumerate(images.sizes.tolist())}
    kinds = {
        "added": now.keys() - before.keys(),
        "removed": before.keys() - now.keys(),
        "changed": {name for name in now.keys() & before.keys() if now[name] != before[name]},
    }
    parts = [f"{len(names)} {kind}: {_first(names)}" for kind, names in kinds.items() if names]
    return f" ({'; '.join(parts)})" if parts else ""


def _first(names: set[bytes]) -> str:
    return shown(os.fsdecode(min(names))) + (", ..." if len(names) > 1 else "")


def labels_fingerprint(inputs: Inputs) -> str | None:
    """Hash of the labelled images' paths and sizes; None without labels."""
    fingerprint: str | None = inputs.facts["labels"]["fingerprint"] if inputs.scored else None
    return fingerprint


def weights_sha256(original: Backbone) -> str | None:
    """Of the weights' file; of the tensors themselves where a module was given; None from scratch."""
    load = original.load_report
    if load is None or load.sha256 is not None:
        return load.sha256 if load else None
    digest = hashlib.sha256()
    for name, tensor in original.module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def write_manifest(run: Run, original: Backbone, inputs: Inputs, accelerator: Accelerator, reporter: Reporter) -> None:
    """What the run began with: versions, command, device, preprocessing, fingerprints.

    Once something was learnt that stays as it is. A resumed part that runs in other surroundings than the part before
    is added to the list `resumed`, and the user is told what differs from the beginning.
    """
    if not accelerator.is_main_process:
        return
    now, known = _surroundings(run, accelerator), _learnt_with(run)
    if known is None:
        if (run.path / LAST).is_file():
            reporter.note(f"{run.path / NAME}: missing; images and weights are taken for those the run began with")
        run.write_json(NAME, now | _began_with(run, original, inputs))
        return
    if changed := changes(known, now):
        reporter.note(f"{', '.join(changed)} since this run began; figures may differ from an undisturbed run")
    resumed = known.get("resumed", [])
    if changes([known, *resumed][-1], now):
        step = load_state(run.path / LAST)["train"]["step"]
        run.write_json(NAME, known | {"resumed": [*resumed, {"from_step": step} | now]})


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`torch 2.14 -> 2.15`, for everything that may move a figure and that both sides know."""
    old, new = (
        {**side.get("versions", {}), **{said: side[key] for key, said in SAID_AS.items() if key in side}}
        for side in (before, now)
    )
    return [f"{name} {old[name]} -> {value}" for name, value in new.items() if name in old and old[name] != value]


def _learnt_with(run: Run) -> dict[str, Any] | None:
    """The manifest, if there is a checkpoint: before it nothing was learnt, and everything may still change."""
    known = run.read_json(NAME) if (run.path / LAST).is_file() else None
    if known is not None and not _is_manifest(known):
        raise damaged(run.path / NAME)
    return known


def _is_manifest(known: Mapping[str, Any]) -> bool:
    """Whether what `changes` and the refusals look at has its kind."""
    resumed = known.get("resumed", [])
    parts = [known, *resumed] if isinstance(resumed, list) else [None]
    return isinstance(known.get("weights_sha256"), str | None) and all(
        isinstance(part, Mapping) and isinstance(part.get("versions", {}), Mapping) for part in parts
    )


def _surroundings(run: Run, accelerator: Accelerator) -> dict[str, Any]:
    return environment() | {
        "device": str(accelerator.device),
        "precision": run.recipe.precision,
        "num_processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
    }


def _began_with(run: Run, original: Backbone, inputs: Inputs) -> dict[str, Any]:
    return {
        "seed": run.recipe.seed,
        "trained_parameters": plan_tuning(original, run.recipe).num_trained(original.module),
        "preprocessing": {
            "image_px": original.image_px,
            "mean": list(original.mean),
            "std": list(original.std),
            "interpolation": original.pretrained_cfg.get("interpolation"),
            "crop_pct": original.pretrained_cfg.get("crop_pct"),
        },
        "data_fingerprint": inputs.facts["fingerprint"],
        "labels_fingerprint": labels_fingerprint(inputs),
        "weights_sha256": weights_sha256(original),
    }


def environment() -> dict[str, Any]:
    """What `manifest.json` says about the software and the command."""
    versions = {}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": versions,
        "python": platform.python_version(),
        "system": platform.platform(),
        "command": sys.argv,
    }
