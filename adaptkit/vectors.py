"""`adaptkit embed`: the embeddings and binary codes of any number of images, in one file.

Images are embedded in parts of 10,000, each kept beside the output until all are there: a command that was stopped goes
on where it was when it is given again, several processes take turns, and memory does not grow with the images.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adaptkit.backbones import Backbone, load_backbone
from adaptkit.checkpoints import load_state, load_tensors, save_tensors
from adaptkit.embedding import embed
from adaptkit.errors import BackboneError, DataError, UsageError
from adaptkit.export import load_head
from adaptkit.manifest import weights_sha256
from adaptkit.prepare import loader_workers
from adaptkit.processes import everywhere, on_main
from adaptkit.run import machine_errors, write_text
from adaptkit.session import Reporter, Silent, open_accelerator
from adaptkit.sources import SPLIT_FOLDERS, FolderSource, Scale, fingerprint, open_images
from adaptkit.vector_files import writer_for

PART_IMAGES = 10_000
SCHEMA = "adaptkit.embed/1"
KEY = "key.json"


@dataclass(frozen=True)
class EmbedResult:
    """What `adaptkit embed --json` prints: `adaptkit.embed/1`."""

    document: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """What one file of embeddings is made of."""

    backbone: Backbone
    head: nn.Module | None  # gives the codes
    source: FolderSource
    classes: tuple[str, ...] | None  # of every image, when they lie in class folders
    parts: Path
    precision: str
    batch_size: int
    workers: int

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Where each part begins and ends in the source."""
        count = len(self.source)
        return [(start, min(start + PART_IMAGES, count)) for start in range(0, count, PART_IMAGES)]


def embed_files(
    backbone: str,
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    codes: bool = False,
    overwrite: bool = False,
    weights: str | None = None,
    pretrained: bool = True,
    allow_missing: tuple[str, ...] = (),
    readout: str = "auto",
    seed: int = 0,
    precision: str = "fp32",
    batch_size: int = 128,
    workers: int | None = None,
    scale: Scale = "range",
    reporter: Reporter | None = None,
) -> EmbedResult:
    """Embed every readable image below `data` into `output` (.parquet, .npy or .safetensors; see `vector_files`).

    `backbone` is a name, a folder, or the directory of a finished run; `codes` adds the bits that the run's head makes
    of each embedding, and needs the latter. Images that cannot be read are left out and counted. Raises `UsageError`
    when the output is there or of another kind, `BackboneError`, `DataError`, `MachineError`.
    """
    reporter, output = reporter or Silent(), Path(os.path.abspath(output))
    writer = writer_for(output)
    if not overwrite and (there := [file for file in writer.files(output, codes) if file.exists()]):
        raise UsageError(f"{there[0]}: is there already; add --overwrite to replace it")
    folder, head_file = _locate(backbone, codes)
    reporter.phase(f"embedding the images of {backbone}")
    options: dict[str, Any] = {"weights": weights, "pretrained": pretrained, "allow_missing": allow_missing}
    loaded = load_backbone(folder, readout=readout, seed=seed, **options)
    if loaded.load_report is not None:
        reporter.load_report(loaded.load_report)
    accelerator = open_accelerator("fp32")
    loaded.module.to(accelerator.device)
    places = [data] if isinstance(data, str | Path) else list(data)
    source = open_images(places, scale)
    job = Job(
        backbone=loaded,
        head=load_head(head_file, loaded.embed_dim) if head_file else None,
        source=source,
        classes=_classes(places, source),
        parts=output.with_name(output.name + ".parts"),
        precision=precision,
        batch_size=batch_size,
        workers=loader_workers(workers, accelerator.device),
    )
    started = time.perf_counter()
    on_main(lambda: _open_parts(job, _key(job, head_file, scale)))
    everywhere(lambda: _make_parts(job, accelerator.process_index, accelerator.num_processes, reporter))
    joined = on_main(lambda: _join(job, output, time.perf_counter() - started))
    document = {"schema": SCHEMA, "backbone": backbone, "data": [str(place) for place in places]}
    return EmbedResult(document | (joined or {}))


def _locate(backbone: str, codes: bool) -> tuple[str, Path | None]:
    """(what to load, the head's file): of a run directory its export and its head."""
    run = Path(backbone)
    if os.path.isfile(run / "recipe.yaml"):
        if not os.path.isfile(run / "report.json"):
            raise BackboneError(f"{backbone}: this run is not finished; go on with `adaptkit resume {backbone}`")
        backbone = str(run / "backbone")
    elif codes:
        raise UsageError(f"{backbone}: is no run directory, so it has no head for --codes; give the folder of a run")
    return backbone, run / "head.safetensors" if codes else None


def _classes(places: Sequence[str | Path], source: FolderSource) -> tuple[str, ...] | None:
    """The first part of each path, if the images of the only folder lie in class folders."""
    if len(places) != 1 or source.store is not None or not os.path.isdir(places[0]):
        return None
    parts = [source.path(index).partition("/") for index in range(len(source))]
    names = {name for name, _, _ in parts}
    if not all(slash for _, slash, _ in parts) or len(names) < 2 or names <= SPLIT_FOLDERS:
        return None
    return tuple(name for name, _, _ in parts)


def _key(job: Job, head_file: Path | None, scale: Scale) -> str:
    """Everything that decides the vectors: parts of another key are not used."""
    backbone = job.backbone
    facts = [
        weights_sha256(backbone),
        backbone.architecture,
        backbone.readout,
        backbone.image_px,
        blake2b(head_file.read_bytes()).hexdigest() if head_file else None,
        fingerprint(job.source),
        job.precision,
        job.batch_size,
        scale,
    ]
    return json.dumps(facts)


def _open_parts(job: Job, key: str) -> None:
    """The folder for parts; what an earlier command left in it stays if it is of the same key."""
    with machine_errors(job.parts):
        known = job.parts / KEY
        if job.parts.exists() and not known.is_file() and any(job.parts.iterdir()):
            raise UsageError(f"{job.parts}: is in the way and not ours; move it, or choose another --output")
        if known.is_file() and known.read_text(encoding="utf-8") != key:
            shutil.rmtree(job.parts)
        job.parts.mkdir(parents=True, exist_ok=True)
        write_text(known, key)


def _part_file(job: Job, number: int) -> Path:
    return job.parts / f"{number:06d}.safetensors"


def _make_parts(job: Job, process: int, num_processes: int, reporter: Reporter) -> None:
    for number in range(process, len(job.bounds), num_processes):
        file = _part_file(job, number)
        if file.exists() and _is_whole(file):
            continue
        start, stop = job.bounds[number]
        reporter.phase(f"images {start + 1:,} to {stop:,} of {len(job.source):,}")
        _make_part(job, start, stop, file)


def _is_whole(file: Path) -> bool:
    try:
        load_state(file)
    except DataError:
        return False
    return True


def _make_part(job: Job, start: int, stop: int, file: Path) -> None:
    images = job.source.subset(np.arange(start, stop))
    row_of = {images.path(index): start + index for index in range(len(images))}
    try:
        made = embed(job.backbone, images, batch_size=job.batch_size, workers=job.workers, precision=job.precision)
        rows, vectors, failures = [row_of[path] for path in made.paths], made.vectors, made.failures
    except DataError:  # not one of these can be read; there may be others
        rows, vectors = [], torch.empty(0, job.backbone.embed_dim)
        failures = tuple((images.path(index), "") for index in range(len(images)))
    tensors = {"rows": torch.tensor(rows, dtype=torch.int64), "vectors": vectors}
    if job.head is not None:
        tensors["codes"] = pack_codes(job.head, vectors)
    save_tensors(file, tensors, {"num_bad": len(failures), "first_bad": list(failures[:3])})


@torch.inference_mode()
def pack_codes(head: nn.Module, vectors: torch.Tensor) -> torch.Tensor:
    """(N, D) embeddings -> (N, B / 8) uint8: bit b of a code is bit 7 - b % 8 of byte b // 8 (numpy.packbits).

    A bit is 1 where the head's output is positive; the last byte is filled up with zeros.
    """
    bits = head.to("cpu")(vectors.float()) > 0
    return torch.from_numpy(np.packbits(bits.numpy(), axis=1))


def _join(job: Job, output: Path, seconds: float) -> dict[str, Any]:
    """Write the output from the parts, part by part, and remove them."""
    states = [load_state(_part_file(job, number)) for number in range(len(job.bounds))]
    num_bad = sum(state["num_bad"] for state in states)
    num_images = len(job.source) - num_bad
    if not num_images:
        path, reason = next(iter(states[0]["first_bad"]))
        raise DataError(f"none of the {len(job.source)} images could be read; the first: {path}: {reason}; check them")
    num_bits = head_bits(job.head) if job.head is not None else None
    writer = writer_for(output)
    files = writer.files(output, job.head is not None)
    with machine_errors(output):
        writer.write(output, _rows(job), num_images, job.backbone.embed_dim, num_bits)
        shutil.rmtree(job.parts)
    return {
        "output": [str(file) for file in files],
        "num_images": num_images,
        "num_bad": num_bad,
        "embed_dim": job.backbone.embed_dim,
        "num_bits": num_bits,
        "labels": job.classes is not None,
        "seconds": round(seconds, 3),
    }


def head_bits(head: nn.Module) -> int:
    """How many bits the head's codes have."""
    return [layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear)][-1]


def _rows(job: Job) -> Iterable[Any]:
    """(paths, classes or None, vectors, codes or None) of each part, in the order of the source."""
    for number in range(len(job.bounds)):
        tensors, _ = load_tensors(_part_file(job, number))
        rows = tensors["rows"].tolist()
        paths = [job.source.path(row) for row in rows]
        classes = None if job.classes is None else [job.classes[row] for row in rows]
        codes = tensors["codes"].numpy() if "codes" in tensors else None
        yield paths, classes, tensors["vectors"].numpy(), codes
