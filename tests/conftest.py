"""Shared fixtures: tiny real files, one torch thread."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # with more, every `adapt` would start processes
torch.set_num_threads(1)  # default threads made the same small steps 10-40 times slower


def draw_image(label: int, index: int, px: int = 48) -> Image.Image:
    """A procedurally drawn image: the class decides hue and stripe direction, the index everything else."""
    rng = np.random.default_rng([label, index])
    y, x = np.mgrid[0:px, 0:px] / px
    angle = label * np.pi / 4 + rng.normal(0, 0.1)
    stripes = 0.5 + 0.5 * np.sin((np.cos(angle) * x + np.sin(angle) * y) * rng.uniform(15, 30) + rng.uniform(0, 6))
    colour = np.eye(3)[label % 3] * 0.5 + rng.uniform(0, 0.4, 3)
    noise = rng.normal(0, 0.05, (px, px, 3))
    return Image.fromarray((np.clip(stripes[..., None] * colour + noise, 0, 1) * 255).astype(np.uint8))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours, fine texture, and some saturated and some grey pixels."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / rng.uniform(2, 9) + y / rng.uniform(2, 9) + rng.uniform(0, 6)) for _ in range(3)]
    pixels = 128 + 110 * np.stack(waves, -1) + rng.normal(0, 15, (height, width, 3))
    pixels[:4, :4] = 77
    pixels[:4, -4:] = (255, 0, 255)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_folder(root: Path, classes: int, per_class: int, px: int = 48, start: int = 0) -> Path:
    """`root/class_k/i.jpg`, `per_class` images for each of `classes` classes."""
    for label in range(classes):
        folder = root / f"class_{label}"
        folder.mkdir(parents=True)
        for index in range(start, start + per_class):
            draw_image(label, index, px).save(folder / f"{index:04d}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 unlabelled images (to be treated so) of 4 kinds, 48 px."""
    return write_folder(tmp_path_factory.mktemp("target") / "images", classes=4, per_class=30)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """{train,test}/class_k: 4 x 15 gallery and 4 x 15 query images, none of them in `images`."""
    root = tmp_path_factory.mktemp("labelled")
    write_folder(root / "train", classes=4, per_class=15, start=1000)
    write_folder(root / "test", classes=4, per_class=15, start=2000)
    return root


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved `test_vit` for 32 px images, randomly initialised."""
    return _save("test_vit", tmp_path_factory.mktemp("backbones") / "vit")


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved `test_resnet` (BatchNorm) for 32 px images, randomly initialised."""
    return _save("test_resnet", tmp_path_factory.mktemp("backbones") / "resnet")


def _save(name: str, folder: Path) -> Path:
    from adaptkit.backbones import load_backbone, save_backbone

    save_backbone(load_backbone(name, pretrained=False, image_px=32), folder)
    return folder
