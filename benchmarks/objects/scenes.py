"""Drawn scenes whose boxes are known: one to three objects before a textured background."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE_PX = 160
TRIES = 100  # places for an object until it lies clear of the others

Box = tuple[int, int, int, int]


def draw_scene(seed: int, index: int) -> tuple[Image.Image, list[Box]]:
    """A scene of 160 x 160 px and the boxes of its objects, which do not touch."""
    rng = np.random.default_rng([seed, index])
    pixels = texture(rng, rng.uniform(0.2, 0.8, 3), grain=rng.uniform(3, 8))
    boxes: list[Box] = []
    for _ in range(int(rng.integers(1, 4))):
        surface = texture(rng, rng.uniform(0.2, 0.8, 3), grain=rng.uniform(12, 30))
        if (mask := place(rng, boxes)) is not None:
            pixels = np.where(mask[..., None], surface, pixels)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            boxes.append((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))
    noise = rng.normal(0, 0.03, pixels.shape)
    return Image.fromarray((np.clip(pixels + noise, 0, 1) * 255).astype(np.uint8)), boxes


def texture(rng: np.random.Generator, colour: NDArray[np.float64], grain: float) -> NDArray[np.float64]:
    """(side, side, 3): three waves of about `grain` px around a colour."""
    y, x = np.mgrid[0:SIDE_PX, 0:SIDE_PX]
    waves = np.zeros((SIDE_PX, SIDE_PX))
    for _ in range(3):
        angle, length, phase = rng.uniform(0, 6.3), rng.uniform(0.7, 1.4) * grain, rng.uniform(0, 6.3)
        waves += np.sin((np.cos(angle) * x + np.sin(angle) * y) * 6.3 / length + phase)
    return colour + 0.08 * waves[..., None]


def place(rng: np.random.Generator, boxes: list[Box]) -> NDArray[np.bool_] | None:
    """An ellipse or a rectangle of 32 to 72 px that lies 8 px clear of the boxes; None where there is no room."""
    y, x = np.mgrid[0:SIDE_PX, 0:SIDE_PX]
    for _ in range(TRIES):
        width, height = rng.uniform(32, 72, 2)
        left, top = rng.uniform(4, SIDE_PX - 4 - width), rng.uniform(4, SIDE_PX - 4 - height)
        if any(
            left < b[2] + 8 and b[0] < left + width + 8 and top < b[3] + 8 and b[1] < top + height + 8 for b in boxes
        ):
            continue
        across, down = (x + 0.5 - left) / width, (y + 0.5 - top) / height
        if rng.uniform() < 0.5:
            return (across >= 0) & (across <= 1) & (down >= 0) & (down <= 1)
        return (across - 0.5) ** 2 + (down - 0.5) ** 2 <= 0.25
    return None


def write_scenes(folder: Path, count: int, seed: int) -> Path:
    """`folder/images/*.png` and `folder/boxes.csv`."""
    (folder / "images").mkdir(parents=True)
    with (folder / "boxes.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["path", "x0", "y0", "x1", "y1"])
        for index in range(count):
            image, boxes = draw_scene(seed, index)
            image.save(folder / "images" / f"{index:04d}.png")
            table.writerows([f"images/{index:04d}.png", *box] for box in boxes)
    return folder
