"""What `adaptkit export` writes, loaded as its users load it: networks by formats, as one table.

    python tests/formats_matrix.py [NAME ...]

Small networks with random weights, and runs trained in bf16 and with LoRA. Each is exported in every format, loaded
again without adaptkit, and given 64 images in batches of several sizes. A figure is the largest difference from the
run's own backbone, relative to its largest entry. docs/formats.md holds the table.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from conftest import write_folder
from PIL import Image
from timm.models import get_pretrained_cfg
from tiny_runs import adapt
from torch import Tensor

from adaptkit.backbones import Backbone, load_backbone, save_backbone
from adaptkit.backbones.build import build, embed_dim
from adaptkit.backbones.names import Origin
from adaptkit.formats import export_run

NUM_IMAGES = 64
VARIED = 0.01  # how far, at least, two images' embeddings lie apart, relative to the largest entry


@dataclass(frozen=True)
class Network:
    """A network of timm's, made small by its arguments."""

    architecture: str
    readout: str
    image_px: int
    model_args: dict[str, Any] = field(default_factory=dict)


SMALL_VIT = {"depth": 2, "embed_dim": 64, "num_heads": 2}
SMALL_SWIN = {"depths": [2, 2], "embed_dim": 32, "num_heads": [2, 4], "window_size": 4}
NETWORKS = {
    "vit cls": Network("test_vit", "cls", 32),
    "vit mean": Network("test_vit", "mean", 32),
    "vit pool": Network("test_vit3", "auto", 32),
    "vit with registers cls": Network("vit_small_patch14_reg4_dinov2", "cls", 56, SMALL_VIT),
    "vit with registers mean": Network("vit_small_patch14_reg4_dinov2", "mean", 56, SMALL_VIT),
    "vit without class token mean": Network("vit_dwee_patch16_reg1_gap_256", "auto", 64, SMALL_VIT),
    "vit with rotary positions cls": Network("vit_small_patch16_dinov3", "cls", 64, SMALL_VIT),
    "vit with rotary positions mean": Network("vit_small_patch16_dinov3", "mean", 64, SMALL_VIT),
    "convnext pool": Network("test_convnext", "auto", 32),
    "resnet pool": Network("test_resnet", "auto", 32),
    "swin pool": Network("swin_tiny_patch4_window7_224", "auto", 64, SMALL_SWIN),
    "mobilenetv3 pool": Network("mobilenetv3_small_050", "auto", 32),
    "mobilenetv4 pool": Network("mobilenetv4_conv_small_035", "auto", 32),
    "efficientnet pool": Network("test_efficientnet", "auto", 32),
}
RUNS: dict[str, dict[str, Any]] = {
    "vit cls, trained in bf16": {"precision": "bf16"},
    "vit cls, trained with LoRA": {"tune": "lora", "lora_rank": 2},
}


def build_network(network: Network) -> Backbone:
    """The network with random weights that let every layer matter."""
    cfg = get_pretrained_cfg(network.architecture)
    origin = Origin("small", network.architecture, network.model_args, {} if cfg is None else cfg.to_dict())
    backbone = build(origin, network.readout, network.image_px, 0.0, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # timm begins with blocks that add almost nothing
        for parameter in backbone.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for module in backbone.module.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the statistics become those of the batch below
        side = network.image_px
        colours = torch.randn(16, 3, 1, 1, generator=generator)
        backbone.module.train()(2 * colours + torch.randn(16, 3, side, side, generator=generator))
        backbone.module.eval()
    backbone.embed_dim = embed_dim(backbone)
    return backbone


def run_of(backbone: Backbone, finished: Path, folder: Path) -> Path:
    """A finished run that exported `backbone`."""
    folder.mkdir()
    for part in ("recipe.yaml", "report.json"):
        (folder / part).write_bytes((finished / part).read_bytes())
    save_backbone(backbone, folder / "backbone")
    return folder


def by_timm(output: Path) -> Callable[[Tensor], Tensor]:
    module: Callable[[Tensor], Tensor] = timm.create_model(f"local-dir:{output}", pretrained=True, num_classes=0).eval()
    return module


def by_onnx(output: Path) -> Callable[[Tensor], Tensor]:
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(np.asarray(session.run(["embeddings"], {"images": images.numpy()})[0]))


def by_torch(output: Path) -> Callable[[Tensor], Tensor]:
    module: Callable[[Tensor], Tensor] = torch.export.load(str(output)).module()
    return module


def by_transformers(output: Path) -> Callable[[Tensor], Tensor]:
    from transformers import AutoModel  # a second or two, which other tests need not wait for

    module = AutoModel.from_pretrained(str(output)).eval()
    return lambda images: module(pixel_values=images).pooler_output


LOADERS = {"timm": by_timm, "onnx": by_onnx, "torch": by_torch}


def own(run: Path, files: list[Path]) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) images as adaptkit normalises them, and its (N, D) embeddings."""
    backbone = load_backbone(str(run / "backbone"))
    transform = backbone.eval_transform()
    mean, std = (torch.tensor(channels).view(3, 1, 1) for channels in (backbone.mean, backbone.std))
    images = torch.stack([(transform(Image.open(file)).float() / 255 - mean) / std for file in files])
    with torch.inference_mode():
        vectors: Tensor = backbone.module(images)
    return images, vectors


def differences(run: Path, files: list[Path], folder: Path) -> dict[str, float]:
    """By format: the largest difference on the images, relative to the largest entry."""
    images, expected = own(run, files)
    largest = float(expected.abs().max())
    if not float(expected.std(0).max()) > VARIED * largest:
        raise RuntimeError(f"{run}: all images have one embedding, so nothing can be compared")
    found: dict[str, float] = {}
    folder.mkdir()
    for form, load in LOADERS.items():
        export_run(run, form, folder / form)
        found[form] = _difference(load(folder / form), images, expected) / largest
    theirs = prepared_by_transformers(folder / "timm", files)
    found["transformers"] = _difference(by_transformers(folder / "timm"), theirs, expected) / largest
    return found


def prepared_by_transformers(output: Path, files: list[Path]) -> Tensor:
    """(N, 3, H, W) normalised images, as the folder's own configuration says."""
    from transformers import AutoImageProcessor

    images: Tensor = AutoImageProcessor.from_pretrained(str(output))([Image.open(file) for file in files])[
        "pixel_values"
    ]
    return images


@torch.inference_mode()
def _difference(embed: Callable[[Tensor], Tensor], images: Tensor, expected: Tensor) -> float:
    vectors = torch.cat([embed(images[:1]), embed(images[1:8]), embed(images[8:])])
    return float((vectors - expected).abs().max())


def finished_run(folder: Path, vit: Path, **changes: Any) -> Path:
    """A short real run; its images are `folder / "images"`."""
    images = folder / "images"
    if not images.exists():
        write_folder(images, 2, NUM_IMAGES // 2)
    settings: dict[str, Any] = {"steps": 2, "objective__hidden_dim": 8} | changes
    return adapt(vit, images, folder / f"run{len(list(folder.iterdir()))}", **settings).run


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_backbone(load_backbone("test_vit", pretrained=False, image_px=32), folder / "vit")
        finished = finished_run(folder, folder / "vit")
        files = sorted((folder / "images").rglob("*.jpg"))
        kinds = ("torch", "timm", "onnxruntime", "transformers")
        versions = ", ".join(f"{kind} {version(kind)}" for kind in kinds)
        print(f"{platform.machine()}, python {platform.python_version()}, {versions}; {len(files)} images\n")
        print("| network, readout | timm | onnx | torch | transformers | s |\n| --- | --- | --- | --- | --- | --- |")
        for number, key in enumerate(names or [*NETWORKS, *RUNS]):
            started = time.perf_counter()
            if key in RUNS:
                run = finished_run(folder, folder / "vit", **RUNS[key])
            else:
                run = run_of(build_network(NETWORKS[key]), finished, folder / f"network{number}")
            found = differences(run, files, folder / f"out{number}")
            cells = [f"{found[form]:.0e}" if found[form] else "0" for form in (*LOADERS, "transformers")]
            print(f"| {' | '.join([key, *cells])} | {time.perf_counter() - started:.0f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
