"""`adaptkit export`: the backbone of a finished run for other tools, each reloaded and compared before it counts.

timm: the folder itself. onnx: one file for ONNX Runtime. torch: one file of torch.export, which needs no timm.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptkit.backbones import Backbone, load_backbone
from adaptkit.backbones.reading import line
from adaptkit.errors import BackboneError, DataError, UsageError
from adaptkit.run import Run, atomic, machine_errors
from adaptkit.sources import BadImage, FolderSource, evenly_spaced, open_images

SCHEMA = "adaptkit.export/1"
NUM_COMPARED = 64
TOLERANCE = 1e-3  # relative to the largest entry: other kernels in another order, still float32
INPUT, OUTPUT = "images", "embeddings"


@dataclass(frozen=True)
class ExportResult:
    """What `adaptkit export --json` prints: `adaptkit.export/1`."""

    document: dict[str, Any]


def export_run(run: str | Path, form: str, output: str | Path, *, overwrite: bool = False) -> ExportResult:
    """Write the backbone of the finished run `run` to `output` as `timm` (a folder), `onnx` or `torch` (a file each).

    The two files take normalised images, (N, 3, image_px, image_px) float32 with any N, and give (N, D) float32; the
    document says how to normalise. What was written is loaded again and compared on 64 images of the run, or on noise
    when they are gone. Raises `UsageError` when the run is not finished, the output is there, or the library for the
    format is missing; `BackboneError` when the network cannot be expressed in it; `MachineError`.
    """
    opened, output = Run.open(run), Path(output).absolute()
    if opened.read_json("report.json") is None:
        raise UsageError(f"{run}: has not finished; go on with `adaptkit resume {run}`")
    if form not in FORMATS:
        raise UsageError(f"unknown format {form!r}; the formats are {', '.join(FORMATS)}")
    if output.exists() and not overwrite:
        raise UsageError(f"{output}: is there already; add --overwrite to replace it")
    if output.is_dir() != (form == "timm") and output.exists():
        raise UsageError(f"{output}: {form} makes a {'folder' if form == 'timm' else 'file'}; choose another --output")
    backbone = load_backbone(str(opened.path / "backbone"))
    images, kind = _sample(opened, backbone)
    with machine_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        embed = FORMATS[form](opened.path / "backbone", backbone, output)
    difference = _difference(backbone, embed, images)
    if not difference <= TOLERANCE:
        raise BackboneError(f"{output}: differs from the run's backbone by {difference:.1e}; do not use it")
    return ExportResult(
        {
            "schema": SCHEMA,
            "run": str(opened.path),
            "format": form,
            "output": str(output),
            "max_difference": difference,
            "compared_on": f"{len(images)} {kind}",
            "input": {"name": INPUT, "shape": ["N", 3, backbone.image_px, backbone.image_px], "dtype": "float32"},
            "output_shape": ["N", backbone.embed_dim],
            "mean": list(backbone.mean),
            "std": list(backbone.std),
        }
    )


def _sample(run: Run, backbone: Backbone) -> tuple[Tensor, str]:
    """(64, 3, H, W) normalised images of the run, and what they are."""
    with suppress(DataError, UsageError):
        source = open_images(run.recipe.data.path, run.recipe.data.scale)
        pixels = _pixels(backbone, source.subset(evenly_spaced(len(source), NUM_COMPARED)))
        if pixels:
            mean, std = (torch.tensor(channels).view(3, 1, 1) for channels in (backbone.mean, backbone.std))
            return (torch.stack(pixels).float() / 255 - mean) / std, "images of the run"
    generator = torch.Generator().manual_seed(0)
    side = backbone.image_px
    return torch.randn(NUM_COMPARED, 3, side, side, generator=generator), "images of noise, as the run's are gone"


def _pixels(backbone: Backbone, source: FolderSource) -> list[Tensor]:
    """(3, H, W) uint8 of every image that can be read."""
    transform, pixels = backbone.eval_transform(), []
    for index in range(len(source)):
        with suppress(BadImage):
            pixels.append(transform(source.read(index)))
    return pixels


@torch.inference_mode()
def _difference(backbone: Backbone, embed: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """Largest difference relative to the largest entry; in batches of several sizes, as N is free."""
    ours = backbone.module(images)
    theirs = torch.cat([embed(images[:1]), embed(images[1:4]), embed(images[4:])])
    return float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))


def _timm(folder: Path, backbone: Backbone, output: Path) -> Callable[[Tensor], Tensor]:
    part = output.with_name(f"{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part)
    if output.exists():
        if {entry.name for entry in output.iterdir()} - {entry.name for entry in part.iterdir()}:
            raise UsageError(f"{output}: holds more than a backbone; choose another --output")
        shutil.rmtree(output)
    part.rename(output)
    module: Callable[[Tensor], Tensor] = load_backbone(str(output)).module
    return module


def _onnx(folder: Path, backbone: Backbone, output: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError:
        raise UsageError("format onnx needs onnxruntime and onnxscript; pip install 'adaptkit[onnx]'") from None
    with _explained(backbone, "onnx"), atomic(output) as part:
        program = torch.onnx.export(
            backbone.module,
            (_example(backbone),),
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=(_any_batch(),),
        )
        if program is None:
            raise RuntimeError("torch.onnx gave no program")
        for key, value in _facts(backbone).items():
            program.model.metadata_props[key] = value
        program.save(part, external_data=False)
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(np.asarray(session.run(None, {INPUT: images.numpy()})[0]))


def _torch(folder: Path, backbone: Backbone, output: Path) -> Callable[[Tensor], Tensor]:
    with _explained(backbone, "torch"), atomic(output) as part:
        program = torch.export.export(backbone.module, (_example(backbone),), dynamic_shapes=(_any_batch(),))
        with part.open("wb") as file:
            torch.export.save(program, file, extra_files=_facts(backbone))
    with output.open("rb") as file:
        module: Callable[[Tensor], Tensor] = torch.export.load(file).module()
    return module


FORMATS: dict[str, Callable[[Path, Backbone, Path], Callable[[Tensor], Tensor]]] = {
    "timm": _timm,
    "onnx": _onnx,
    "torch": _torch,
}


def _example(backbone: Backbone) -> Tensor:
    return torch.zeros(2, 3, backbone.image_px, backbone.image_px)  # 0 and 1 would be taken for constants


def _any_batch() -> dict[int, Any]:
    return {0: torch.export.Dim("batch", min=1)}


def _facts(backbone: Backbone) -> dict[str, str]:
    """What the file itself says about the images it takes."""
    facts = {"mean": backbone.mean, "std": backbone.std, "image_px": backbone.image_px, "readout": backbone.readout}
    return {f"adaptkit.{key}": str(value) for key, value in facts.items()}


@contextmanager
def _explained(backbone: Backbone, form: str) -> Iterator[None]:
    """Whatever torch's exporters raise is one line; what they warn of concerns their own future."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as error:  # of any kind, from anywhere in the compiler
        raise BackboneError(f"{backbone.name}: cannot be expressed as {form} ({line(error, 160)})") from error
