"""`adaptkit codes`: embed, make codes, measure them, choose pictures; two documents in the run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaptkit.backbones import Backbone, load_backbone
from adaptkit.embedding import Embedder
from adaptkit.errors import DataError, UsageError
from adaptkit.export import load_head
from adaptkit.language.attributes import attribute_names, class_properties, read_attributes
from adaptkit.language.images import Coded, Sets, known_again, logits_of, open_sets
from adaptkit.language.measure import describe_bits, measure_code, measure_neighbours, measure_retrieval
from adaptkit.language.pictures import take_pictures
from adaptkit.page import CODES, CODES_PICTURES
from adaptkit.prepare import loader_workers
from adaptkit.probes.score import check_finite
from adaptkit.run import Run
from adaptkit.session import Reporter, Silent
from adaptkit.sources import FolderSource

SCHEMA = "adaptkit.codes/1"
MIN_IMAGES = 2


@dataclass(frozen=True)
class Language:
    """`codes.json`, which is what `adaptkit codes --json` prints, and `codes_pictures.json`."""

    document: dict[str, Any]
    pictures: dict[str, Any]

    def write(self, run: Run) -> None:
        """Both files, the document last. Raises `MachineError`."""
        run.write(CODES_PICTURES, json.dumps(self.pictures, separators=(",", ":"), allow_nan=False) + "\n")
        run.write_json(CODES, self.document)


@dataclass
class Coder:
    """Embeds images and makes their codes, each image once."""

    backbone: Backbone
    head: nn.Module
    embedder: Embedder
    reporter: Reporter
    known: list[Coded] = field(default_factory=list)

    def __call__(self, source: FolderSource) -> Coded:
        """Raises `DataError`, `NotFinite`."""
        if again := next(filter(None, (known_again(each, source) for each in self.known)), None):
            return again
        self.reporter.phase(f"embedding {len(source):,} images below {source.root}")
        embeddings = self.embedder(self.backbone, source)
        check_finite(embeddings)
        self.known.append(Coded(source, embeddings, logits_of(self.head, embeddings.vectors)))
        return self.known[-1]


def describe(
    run: Run,
    *,
    data: Sequence[str] = (),
    labels: str | None = None,
    attributes: str | None = None,
    seed: int = 0,
    precision: str = "fp32",
    batch_size: int = 128,
    workers: int | None = None,
    reporter: Reporter | None = None,
) -> Language:
    """What the binary language of a finished run says about `data`, by default the run's own images.

    At most 5,000 images of `data`, 5,000 of the labelled gallery and 2,000 queries are embedded, drawn by the seed.
    `labels` (class folders or a CSV) and `attributes` (a CSV with `path` and columns of them) only measure. Writes
    nothing. Raises `UsageError` (the objective has no codes), `BackboneError`, `DataError`.
    """
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed} must lie between 0 and 2**63 - 1")
    reporter, folder = reporter or Silent(), run.path / "backbone"
    if attributes:
        attribute_names(Path(attributes))  # a wrong table is refused before anything slow
    backbone = load_backbone(str(folder))
    head = load_head(run.path / "head.safetensors", backbone.embed_dim)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embedder = Embedder(batch_size, loader_workers(workers, device), precision, device)
    code = Coder(backbone, head, embedder, reporter)
    sets = open_sets(run.recipe, data, labels, seed, code)
    if len(sets.target) < MIN_IMAGES:
        raise DataError(f"{sets.target.source.root}: {len(sets.target)} image; codes are compared, so give at least 2")
    reporter.phase("measuring the codes")
    document = _measure(run, sets, attributes, seed) | _facts_of(sets, data or run.recipe.data.path, attributes)
    reporter.phase("choosing pictures")
    shown = sets.everything
    pictures = take_pictures(shown.labelled if sets.labels else shown, seed)
    document["map"] = {"method": pictures["map"]["method"], "reason": pictures["map"]["reason"]}
    return Language(document, pictures)


def _facts_of(sets: Sets, data: Sequence[str], attributes: str | None) -> dict[str, Any]:
    """Which images were measured."""
    return {
        "data": {
            "path": [str(place) for place in data],
            "num_images": len(sets.target),
            "num_found": sets.num_target,
            "num_bad": sum(len(each.embeddings.failures) for each in (sets.target, sets.gallery, sets.queries) if each),
            "labels": sets.labels,
            "attributes": attributes,
        }
    }


def _measure(run: Run, sets: Sets, attributes: str | None, seed: int) -> dict[str, Any]:
    codes, everything = sets.target.bits.numpy(), sets.everything
    families = [("class", class_properties(everything.labelled))] if sets.labels else []
    if attributes:
        families.append(("attribute", read_attributes(Path(attributes), everything)))
    gallery, queries = sets.gallery, sets.queries
    return {
        "schema": SCHEMA,
        "run": run.path.name,
        "seed": seed,
        "num_bits": codes.shape[1],
        **measure_code(codes),
        "neighbours": measure_neighbours(sets.target, seed),
        "retrieval": measure_retrieval(gallery, queries, seed) if gallery and queries else None,
        **describe_bits(codes, families, seed),
    }
