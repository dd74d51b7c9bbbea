"""The sections of `adaptkit.check/1` that say what is there: backbone, images, labels, plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptkit.backbones import Backbone
from adaptkit.inputs import Inputs, Scored
from adaptkit.preflight.findings import HELD_OUT, TRAIN
from adaptkit.preflight.scan import Scan
from adaptkit.sources import FolderSource


def backbone_facts(backbone: Backbone) -> dict[str, Any]:
    """What was loaded, and how the weights matched."""
    load = backbone.load_report
    return {
        "name": backbone.name,
        "architecture": backbone.architecture,
        "embed_dim": backbone.embed_dim,
        "image_px": backbone.image_px,
        "readout": backbone.readout,
        "parameters": sum(parameter.numel() for parameter in backbone.module.parameters()),
        "weights": {
            "source": load.source,
            "sha256": load.sha256,
            "matched": len(load.matched),
            "missing": list(load.missing),
            "unexpected": list(load.unexpected),
            "resampled": list(load.resampled),
        }
        if load
        else None,
    }


def data_facts(inputs: Inputs, scan: Scan) -> dict[str, Any]:
    """Counts and splits of the target images; formats, depths and sizes of those looked at."""
    headers = [look.facts for look in scan.usable if look.facts]
    sides = [look.short_side for look in scan.usable]
    known = {key: value for key, value in inputs.facts.items() if key != "labels"}
    return known | {
        "looked_at": len(scan.looks),
        "unusable": len(scan.unusable),
        "formats": dict(Counter(facts.format for facts in headers).most_common()),
        "bits": dict(Counter(str(facts.bits) for facts in headers).most_common()),
        "short_side": {"min": min(sides), "median": int(np.median(sides)), "max": max(sides)} if sides else None,
    }


def parts_of(inputs: Inputs) -> NDArray[np.int8]:
    """(N,) TRAIN, HELD_OUT, or 0 for images left out."""
    rows = inputs.everything.rows
    parts = np.zeros(len(rows), dtype=np.int8)
    parts[np.isin(rows, inputs.train.rows)] = TRAIN
    parts[np.isin(rows, np.concatenate([inputs.selection.rows, inputs.report.rows]))] = HELD_OUT
    return parts


def labelled_sides(scored: Scored) -> tuple[FolderSource, FolderSource]:
    """Gallery and queries, those of both halves."""
    rows = np.sort(np.concatenate([scored.selection.rows, scored.report.rows]))
    return scored.gallery, replace(scored.report, rows=rows)


def label_facts(inputs: Inputs, scans: Sequence[Scan]) -> dict[str, Any]:
    """How many labelled images every class has, and what looking at them gave."""
    if inputs.scored is None:
        return {}
    sides = labelled_sides(inputs.scored)
    names = sides[0].class_names or ()
    labels = Counter(label for side in sides if side.labels is not None for label in side.labels.tolist())
    return inputs.scored.facts | {
        "looked_at": sum(len(scan.looks) for scan in scans),
        "unusable": sum(len(scan.unusable) for scan in scans),
        "left_out_of_training": inputs.facts["left_out"],
        "classes": {name: labels[number] for number, name in enumerate(names)},
    }


def patch_px(backbone: Backbone) -> int:
    """A sensible step for the side of an image: the patch of a ViT, the stride of most ConvNets."""
    side = getattr(getattr(backbone.module, "patch_embed", None), "patch_size", 32)
    return int(max(side) if isinstance(side, list | tuple) else side)
