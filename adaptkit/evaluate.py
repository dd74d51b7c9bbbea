"""`adaptkit probe`: any backbone on any labelled images, alone or against another, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adaptkit.backbones import load_backbone
from adaptkit.embedding import Embedder
from adaptkit.errors import DataError, UsageError, did_you_mean
from adaptkit.places import FILES, kind_of
from adaptkit.probes import PROBES
from adaptkit.probes.measure import Measurement, compare, measure_labelled
from adaptkit.report.document import deltas_to_json, scores_to_json
from adaptkit.sources import ImageSource, Scale, has_class_folders, open_images, open_labelled


@dataclass(frozen=True)
class ProbeResult:
    """What `adaptkit probe --json` prints: `adaptkit.probe/1`."""

    document: dict[str, Any]


def probe(
    backbones: str | Sequence[str],
    data: str | Path,
    *,
    queries: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    weights: str | None = None,
    pretrained: bool = True,
    allow_missing: tuple[str, ...] = (),
    readout: str = "auto",
    seed: int = 0,
    precision: str = "fp32",
    batch_size: int = 128,
    workers: int | None = None,
    scale: Scale = "range",
) -> ProbeResult:
    """Evaluate a backbone on labelled images, with 95 % intervals; of two, the second is compared with the first.

    `data` is gallery and training set, `queries` what is scored; see `open_labelled` for what happens without. Images
    without class folders have no labels and get the rank measures only. `metrics` names probes: knn, linear,
    retrieval, rank. Raises `UsageError`, `BackboneError`, `DataError`.
    """
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed} must lie between 0 and 2**63 - 1")
    names = [backbones] if isinstance(backbones, str) else list(backbones)
    chosen = _probe_names(metrics)
    loaded = [
        load_backbone(
            n, weights=weights, pretrained=pretrained, allow_missing=allow_missing, readout=readout, seed=seed
        )
        for n in names
    ]
    gallery, asked, without_gallery = _open_probe_data(data, queries, seed, scale, chosen if metrics else None)
    labelled = asked.class_names is not None
    chosen = chosen if labelled else ["rank"]
    embedder = Embedder(
        batch_size, workers or 0, precision, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    measured = []
    for backbone in loaded:
        vectors = embedder(backbone, asked)
        measured.append(measure_labelled(embedder(backbone, gallery) if labelled else vectors, vectors, chosen))
    document = {
        "schema": PROBE_SCHEMA,
        "backbone": names[0],
        "data": str(data),
        "metrics": scores_to_json(measured[0].scores),
        "num_gallery": len(gallery),
        "num_queries": len(asked),
        "num_without_gallery": without_gallery,
        "num_classes": len(asked.class_names) if asked.class_names else None,
        "num_bad": len({path for path, _ in measured[0].failures}),
        "seed": seed,
    }
    if len(names) > 1:
        document |= _compare_two(names[1], *measured)
    return ProbeResult(document)


PROBE_SCHEMA = "adaptkit.probe/1"


def _probe_names(metrics: Sequence[str] | None) -> list[str]:
    for name in metrics or ():
        if name not in PROBES:
            hint = did_you_mean(name, list(PROBES))
            raise UsageError(f"unknown probe {name!r}; the probes are {', '.join(PROBES)}{hint}")
    return list(dict.fromkeys(metrics or PROBES))


def _open_probe_data(
    data: str | Path, queries: str | Path | None, seed: int, scale: Scale, asked_for: Sequence[str] | None
) -> tuple[ImageSource, ImageSource, int]:
    """Gallery, queries, and how many were left out because the gallery lacks their class.

    A folder without labels is both, if no probe that needs labels was asked for.
    """
    needs_labels = asked_for is None or any(name != "rank" for name in asked_for)
    has_no_labels = kind_of([str(data)]) != ("", FILES) or (Path(data).is_dir() and not has_class_folders(data))
    if queries is None and has_no_labels:
        if asked_for is not None and needs_labels:
            raise DataError(
                f"{data}: no class folders, so there are no labels for {', '.join(asked_for)}; try --metric rank"
            )
        images = open_images([data], scale)
        return images, images, 0
    labelled = open_labelled(data, queries, seed, scale)
    return labelled.gallery, labelled.queries, len(labelled.left_out) if labelled.left_out else 0


def _compare_two(name: str, first: Measurement, second: Measurement) -> dict[str, Any]:
    deltas = compare(first, second)
    primary = next(iter(first.scores))
    delta = deltas.get(primary)  # None: too few images for an interval
    if delta is None:
        word = "cannot tell"
    else:
        word = "better" if delta.lo > 0 else "worse" if delta.hi < 0 else "no difference beyond doubt"
    return {
        "compared_with": {"backbone": name, "metrics": scores_to_json(second.scores)},
        "delta": deltas_to_json(deltas),
        "verdict": f"{name}: {word} in {primary}",
    }
