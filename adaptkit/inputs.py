"""The images of a run: the target's splits, and the labelled images that only score."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from adaptkit.errors import DataError, UsageError
from adaptkit.recipe import Recipe
from adaptkit.settings import CACHE_WORDS, DataSettings
from adaptkit.sources import (
    FolderSource,
    evenly_spaced,
    fingerprint,
    halve,
    load_index,
    open_images,
    open_labelled,
    refuse_foreign,
    same_content,
    split,
)


@dataclass(frozen=True)
class Scored:
    """Labelled images: the gallery, and the queries halved into those that choose and those that report."""

    gallery: FolderSource
    selection: FolderSource
    report: FolderSource
    facts: dict[str, Any]


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads. `train` is the only part a gradient ever sees."""

    everything: FolderSource
    train: FolderSource
    selection: FolderSource
    report: FolderSource
    scored: Scored | None
    facts: dict[str, Any]


def open_inputs(recipe: Recipe, index: Path | None = None) -> Inputs:
    """Scan, split, and take labelled images out of training. Raises `DataError`, `UsageError`.

    A `data.cache` folder that holds something else is refused too. `index` is where a run keeps the list of its
    images: read instead of scanning again, while it is true.
    """
    if not recipe.data.path:
        raise UsageError("no images: give --data FOLDER")
    if recipe.data.cache not in CACHE_WORDS:
        refuse_foreign(Path(recipe.data.cache))
    target = _open_target(recipe.data, index)
    try:
        parts = split(target, recipe.data.split_by)
    except DataError as error:
        raise DataError(f"{recipe.data.shown}: {error}") from None
    scored, held_out = _open_labels(recipe)
    left_out = same_content(target, held_out) if held_out else np.empty(0, dtype=np.int64)
    train = np.setdiff1d(parts.train, left_out)
    facts = {
        "path": recipe.data.shown,
        "num_images": len(target),
        "train": len(train),
        "selection": len(parts.selection),
        "report": len(parts.report),
        "left_out": len(parts.train) - len(train),
        "fingerprint": fingerprint(target),
        "labels": scored.facts if scored else None,
    }
    if len(train) < 2:
        raise DataError(
            f"{recipe.data.shown}: every image is also under --labels, so none is left to train on; "
            "give others in one of them"
        )
    return Inputs(
        everything=target,
        train=target.subset(train),
        selection=target.subset(parts.selection),
        report=target.subset(parts.report),
        scored=scored,
        facts=facts,
    )


def _open_target(settings: DataSettings, index: Path | None) -> FolderSource:
    known = load_index(index, settings.path, settings.scale) if index else None
    return open_images(settings.path, settings.scale) if known is None else known


def _open_labels(recipe: Recipe) -> tuple[Scored | None, list[FolderSource]]:
    """The labelled images, and those of them that must not be trained on.

    With `train/` and `test/` inside the labels, the user has said what may be trained on: the test part is left
    out of training, the train part (gallery, never scored) is not. Without, all labelled images are left out.
    """
    if recipe.labels is None:
        return None, []
    labelled = open_labelled(recipe.labels, scale=recipe.data.scale)
    gallery = labelled.gallery.subset(evenly_spaced(len(labelled.gallery), recipe.probe.max_gallery))
    queries = labelled.queries.subset(evenly_spaced(len(labelled.queries), recipe.probe.max_queries))
    selection, report = halve(queries, "queries")
    facts = {
        "path": recipe.labels,
        "num_classes": len(labelled.class_names),
        "gallery": len(gallery),
        "selection": len(selection),
        "report": len(report),
        "without_gallery": len(labelled.left_out) if labelled.left_out else 0,
        "fingerprint": f"{fingerprint(labelled.gallery)}-{fingerprint(labelled.queries)}",
    }
    scored = Scored(gallery, queries.subset(selection), queries.subset(report), facts)
    held_out = [labelled.queries] if labelled.explicit_split else [labelled.queries, labelled.gallery]
    return scored, held_out + ([labelled.left_out] if labelled.left_out else [])


def fit_batch_size(recipe: Recipe, num_images: int, num_processes: int) -> int:
    """The global batch size: an explicit one that does not fit is an error, the default shrinks."""
    explicit = "batch_size" in recipe.model_fields_set
    size = recipe.batch_size
    if explicit and size > num_images:
        raise DataError(
            f"{recipe.data.shown}: {num_images} training images, but batch_size is {size}; "
            f"try --batch-size {num_images}"
        )
    if explicit and size % num_processes:
        fitting = size // num_processes * num_processes
        raise UsageError(f"batch_size {size} does not divide by {num_processes} processes; try {fitting}")
    while not explicit and size > 8 and size * 4 > num_images:  # at least 4 steps an epoch
        size //= 2
    size = max(2, min(size, num_images)) // num_processes * num_processes
    if not size:
        raise DataError(f"{recipe.data.shown}: {num_images} training images are too few for {num_processes} processes")
    return size
