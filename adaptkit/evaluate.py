"""`adaptkit probe`: any backbone on any labelled images, alone or against another, with intervals."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adaptkit.backbones import Backbone, load_backbone
from adaptkit.embedding import Embedder, Embeddings
from adaptkit.errors import DataError, DeviceMemoryError, UsageError, did_you_mean
from adaptkit.places import FILES, kind_of
from adaptkit.probes import DEFAULT_PROBES, LABEL_FREE, PROBES, SOURCE_PROBES, Interval, Score
from adaptkit.probes.drift import drift_scores
from adaptkit.probes.fixed_views import embed_views
from adaptkit.probes.lidar import lidar_score
from adaptkit.probes.measure import Measurement, Unpaired, compare, measure_labelled
from adaptkit.report.comparison import compare_backbones
from adaptkit.report.document import deltas_to_json, scores_to_json
from adaptkit.report.numbers import REFERENCE
from adaptkit.sources import FolderSource, Scale, has_class_folders, open_images, open_labelled, same_content
from adaptkit.vector_cache import VectorCache

PROBE_SCHEMA = "adaptkit.probe/1"
SEARCHING = ("knn", "linear", "retrieval", "few-shot")  # what a query finds, or what was fitted, decides
REPEATED = "are also gallery images, byte for byte, and find themselves; leave them out of one of the two"
UNCORRECTED = "intervals are per metric, not corrected for how many metrics are compared"

OwnProbe = Callable[..., Measurement]
"""(backbone, data, queries or None, *, seed, precision, batch_size, workers, device) -> scores that `compare` pairs."""


def _of_module(name: str) -> OwnProbe:
    """`adaptkit.dense.NAME.measure`, imported when it is called: no other probe needs it."""

    def measure(*args: Any, **options: Any) -> Measurement:
        module = f"adaptkit.dense.{name}"
        try:
            found: OwnProbe = importlib.import_module(module).measure
        except ModuleNotFoundError as error:
            if error.name not in ("adaptkit.dense", module):
                raise
            raise UsageError(
                f"probe {name!r}: this installation has no {module}; install a version that does"
            ) from None
        return found(*args, **options)

    return measure


OWN_DATA: dict[str, OwnProbe] = {name: _of_module(name) for name in ("segmentation", "objects", "video")}
"""Probes that open their data themselves, because it is more than images and classes."""


@dataclass(frozen=True)
class ProbeResult:
    """What `adaptkit probe --json` prints: `adaptkit.probe/1`."""

    document: dict[str, Any]


@dataclass(frozen=True, eq=False)
class ProbeData:
    """Gallery and queries; of images without labels both are all of them."""

    gallery: FolderSource
    queries: FolderSource
    num_without_gallery: int = 0

    @property
    def facts(self) -> dict[str, Any]:
        """Their numbers, as the document gives them."""
        names = self.queries.class_names
        return {
            "num_gallery": len(self.gallery),
            "num_queries": len(self.queries),
            "num_without_gallery": self.num_without_gallery,
            "num_classes": len(names) if names else None,
        }


@dataclass(frozen=True, eq=False)
class Measured:
    """Each backbone's scores on one data set, what differs between the two, and facts of the data."""

    of_each: list[Measurement]
    drift: dict[str, Score]
    facts: dict[str, Any]


def probe(
    backbones: str | Sequence[str],
    data: str | Path,
    *,
    queries: str | Path | None = None,
    metrics: Sequence[str] | None = None,
    reference: str | Path | None = None,
    cache: str | Path | None = None,
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
    without class folders have no labels and get the rank measures only. `metrics` names probes: those of `PROBES`,
    lidar, drift, or one of `OWN_DATA`, whose `data` has a layout of its own. The same probes on `reference` show what
    the second backbone has forgotten. `cache` is a folder that keeps embeddings for other commands. Raises
    `UsageError`, `BackboneError`, `DataError`, `DeviceMemoryError`.
    """
    names = [backbones] if isinstance(backbones, str) else list(backbones)
    chosen = _probe_names(metrics)
    _check(chosen, len(names), seed, reference, cache, scale)
    kept = None if cache is None else VectorCache.make(cache)
    options: dict[str, Any] = {"weights": weights, "pretrained": pretrained, "allow_missing": allow_missing}
    loaded = [load_backbone(name, readout=readout, seed=seed, **options) for name in names]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embedder = Embedder(batch_size, workers or 0, precision, device)

    def measure(place: str | Path, asked: str | Path | None) -> Measured:
        if chosen[0] in OWN_DATA:
            return _measure_own_data(chosen[0], loaded, Path(place), Path(asked) if asked else None, seed, embedder)
        opened = _open_probe_data(place, asked, seed, scale, chosen if metrics else None)
        return _measure(loaded, opened, chosen if opened.queries.class_names or metrics else ["rank"], embedder, kept)

    try:
        here, there = measure(data, queries), None if reference is None else measure(reference, None)
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(f"{device}: out of memory while probing; use a smaller batch size") from error
    result = {"schema": PROBE_SCHEMA, "backbone": names[0], "data": str(data), "seed": seed}
    return ProbeResult(result | _document(names, here, there) | _reference_facts(reference, there))


def _probe_names(metrics: Sequence[str] | None) -> list[str]:
    known = [*PROBES, *SOURCE_PROBES, *OWN_DATA]
    for name in metrics or ():
        if name not in known:
            hint = did_you_mean(name, known)
            raise UsageError(f"unknown probe {name!r}; the probes are {', '.join(known)}{hint}")
    chosen = list(dict.fromkeys(metrics or DEFAULT_PROBES))
    own = [name for name in chosen if name in OWN_DATA]
    if own and len(chosen) > 1:
        others = ", ".join(name for name in chosen if name != own[0])
        raise UsageError(f"probe {own[0]!r} reads --data in a layout of its own; give {others} a command of their own")
    return chosen


def _check(
    chosen: Sequence[str], count: int, seed: int, reference: str | Path | None, cache: str | Path | None, scale: Scale
) -> None:
    """Raises `UsageError` for what cannot be asked of these probes."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed} must lie between 0 and 2**63 - 1")
    if "drift" in chosen and count < 2:
        raise UsageError(
            "probe 'drift' says how far one backbone is from another; give two, as in --backbone A --backbone B"
        )
    if reference is not None and count < 2:
        raise UsageError("--reference shows what the second of two backbones has forgotten; give --backbone twice")
    if chosen[0] in OWN_DATA and (cache is not None or scale != "range"):
        option = "--scale" if cache is None else "--cache"
        raise UsageError(f"probe {chosen[0]!r} reads its images itself and takes no {option}; leave it out")


def _open_probe_data(
    data: str | Path, queries: str | Path | None, seed: int, scale: Scale, asked_for: Sequence[str] | None
) -> ProbeData:
    """A folder without labels is gallery and queries, if no probe that needs labels was asked for."""
    needing = [name for name in asked_for or DEFAULT_PROBES if name not in LABEL_FREE]
    has_no_labels = kind_of([str(data)]) != ("", FILES) or (Path(data).is_dir() and not has_class_folders(data))
    if queries is None and has_no_labels:
        if asked_for is not None and needing:
            raise DataError(
                f"{data}: no class folders, so there are no labels for {', '.join(needing)}; try --metric rank"
            )
        images = open_images([data], scale)
        return ProbeData(images, images)
    labelled = open_labelled(data, queries, seed, scale)
    return ProbeData(labelled.gallery, labelled.queries, len(labelled.left_out) if labelled.left_out else 0)


def _measure(
    backbones: Sequence[Backbone], data: ProbeData, chosen: Sequence[str], embedder: Embedder, cache: VectorCache | None
) -> Measured:
    """Every image is embedded once for all probes, which compute on the embedder's device."""
    of_sets = [name for name in chosen if name in PROBES]
    of_each: list[Measurement] = []
    vectors: list[Embeddings] = []
    read: set[tuple[str, ...]] = set()
    for backbone in backbones:
        backbone.module.to(embedder.device)
        measured, queries, paths = Measurement({}), None, tuple[str, ...]()
        if of_sets or "drift" in chosen:
            queries = _embed(backbone, data.queries, embedder, cache)
            vectors.append(queries)
            paths = queries.paths
        if of_sets and queries is not None:
            gallery = queries if data.gallery is data.queries else _embed(backbone, data.gallery, embedder, cache)
            measured = measure_labelled(gallery, queries, of_sets)
            paths += gallery.paths
        if "lidar" in chosen:
            of_views = (cache.views if cache else embed_views)(backbone, data.gallery, embedder)
            measured |= Measurement(lidar_score(of_views.to(embedder.device)))
        of_each.append(measured)
        read.add(paths)
    if len(read) > 1:
        raise Unpaired("some images could be read for one backbone but not for the other; keep the data unchanged")
    drift = drift_scores(*(each.vectors for each in vectors)) if "drift" in chosen else {}
    failures = [] if of_sets or not vectors else vectors[0].failures
    notes = _repeated(data) if any(name in SEARCHING for name in chosen) else ()
    of_each[0] |= Measurement({}, failures=tuple(failures), notes=notes)
    return Measured(of_each, drift, data.facts)


def _embed(backbone: Backbone, source: FolderSource, embedder: Embedder, cache: VectorCache | None) -> Embeddings:
    made = cache.embeddings(backbone, source, embedder) if cache else embedder(backbone, source)
    labels = None if made.labels is None else made.labels.to(embedder.device)
    return replace(made, vectors=made.vectors.to(embedder.device), labels=labels)


def _repeated(data: ProbeData) -> tuple[str, ...]:
    """A note when queries would find themselves."""
    count = len(same_content(data.queries, [data.gallery]))
    return (f"{count:,} of {len(data.queries):,} queries {REPEATED}",) if count else ()


def _measure_own_data(
    name: str, backbones: Sequence[Backbone], data: Path, queries: Path | None, seed: int, embedder: Embedder
) -> Measured:
    measure = OWN_DATA[name]
    options = {"batch_size": embedder.batch_size, "workers": embedder.workers, "device": embedder.device}
    of_each = [measure(b, data, queries, seed=seed, precision=embedder.precision, **options) for b in backbones]
    counts = [_num_images(score) for score in of_each[0].scores.values()]
    facts = {"num_gallery": None, "num_queries": max(counts, default=0), "num_without_gallery": 0, "num_classes": None}
    return Measured(of_each, {}, facts)


def _num_images(score: Score) -> int:
    return score.num_images if score.per_query is None else len(score.per_query)


def _document(names: Sequence[str], here: Measured, there: Measured | None) -> dict[str, Any]:
    of_each, drift = here.of_each, here.drift
    if there is not None:
        of_each = [own | _of_reference(other) for own, other in zip(of_each, there.of_each, strict=True)]
        drift = drift | _renamed(there.drift)
    first = of_each[0]
    document = here.facts | {
        "metrics": scores_to_json(first.scores),
        "num_bad": len({path for path, _ in first.failures}),
        "notes": list(first.notes),
    }
    if drift:
        document["drift"] = scores_to_json(drift)
    if len(names) > 1:
        deltas = compare(*of_each)
        document["notes"] += [UNCORRECTED] * (len(deltas) > 1)
        document |= _compared(names[1], of_each, deltas)
    return document


def _of_reference(measured: Measurement) -> Measurement:
    notes = tuple(f"{REFERENCE.rstrip('_')}: {note}" for note in measured.notes)
    return Measurement(_renamed(measured.scores), failures=measured.failures, notes=notes)


def _renamed(scores: Mapping[str, Score]) -> dict[str, Score]:
    return {REFERENCE + name: score for name, score in scores.items()}


def _reference_facts(reference: str | Path | None, there: Measured | None) -> dict[str, Any]:
    return {} if there is None else {"reference": {"data": str(reference)} | there.facts}


def _compared(name: str, of_each: Sequence[Measurement], deltas: Mapping[str, Interval | None]) -> dict[str, Any]:
    """The second backbone's scores, the differences, and a verdict."""
    first, second = of_each
    primary, verdict = compare_backbones(name, first.scores, deltas)
    return {
        "compared_with": {"backbone": name, "metrics": scores_to_json(second.scores)},
        "delta": deltas_to_json(deltas),
        "primary_metric": primary,
        "verdict": verdict,
    }
