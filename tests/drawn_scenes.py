"""Drawn pictures whose every pixel is known: textured things on textured ground, and things that move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NUM_TEXTURES = 5
PALETTE = [0, 0, 0, 200, 30, 30, 30, 200, 30, 30, 30, 200, 200, 200, 30, 200, 30, 200]


@dataclass(frozen=True)
class Scene:
    """A picture and what each of its pixels is."""

    image: Image.Image  # RGB
    mask: NDArray[np.uint8]  # (H, W) numbers of textures, or of objects


def texture(kind: int, height: int, width: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(height, width, 3) in 0..1, one of `NUM_TEXTURES`: speckles, stripes, checks, soft waves, grain.

    Direction, phase, scale and brightness vary, so that a kind is no single colour; each leans to a hue of its own.
    """
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    scale, phase, turn = rng.uniform(0.8, 1.2), rng.uniform(0, 6.3), rng.normal(0, 0.2)
    across = np.cos(turn) * x + np.sin(turn) * y
    along = -np.sin(turn) * x + np.cos(turn) * y
    grain = rng.normal(0, 1, (height, width))
    level = (
        lambda: 0.5 + 0.5 * (grain > 1.2),
        lambda: 0.5 + 0.5 * np.sin(across * 1.6 * scale + phase),
        lambda: 0.5 + 0.5 * np.sign(np.sin(across * scale + phase) * np.sin(along * scale + phase)),
        lambda: 0.5 + 0.25 * np.sin(across * 0.2 * scale + phase) + 0.25 * np.sin(along * 0.15 * scale),
        lambda: 0.5 + 0.12 * grain,
    )[kind]()
    hues = np.array([[0.7, 0.6, 0.4], [0.4, 0.7, 0.5], [0.6, 0.5, 0.8], [0.4, 0.6, 0.9], [0.8, 0.5, 0.4]])
    colour = hues[kind] + rng.normal(0, 0.05, 3)
    light = 1 + 0.15 * np.sin(x / width * 3 + phase)[..., None]
    noisy = level[..., None] * colour * light + rng.normal(0, 0.02, (height, width, 3))
    clipped: NDArray[np.float64] = noisy.clip(0, 1)
    return clipped


def textured_scene(seed: int, px: int = 64, num_classes: int = NUM_TEXTURES, num_things: int = 2) -> Scene:
    """A ground with discs and boxes on it, each of one texture; the mask says which."""
    rng = np.random.default_rng([seed, px])
    kinds = rng.integers(0, num_classes, 1 + num_things)
    pixels, mask = texture(int(kinds[0]), px, px, rng), np.full((px, px), kinds[0], dtype=np.uint8)
    y, x = np.mgrid[0:px, 0:px]
    for kind in kinds[1:]:
        row, column, size = (*rng.uniform(0.2 * px, 0.8 * px, 2), rng.uniform(0.2, 0.35) * px)
        is_box = rng.random() < 0.5
        inside = np.maximum(abs(y - row), abs(x - column)) < size if is_box else np.hypot(y - row, x - column) < size
        pixels[inside], mask[inside] = texture(int(kind), px, px, rng)[inside], kind
    return Scene(to_image(pixels), mask)


def quartered_scene(seed: int, px: int = 64, num_classes: int = NUM_TEXTURES, is_true: bool = True) -> Scene:
    """Four textures that meet where patches of 8, 16 or 32 px do; the mask says which, or is drawn apart from them."""
    rng = np.random.default_rng([seed, px, 4])
    kinds, half = rng.integers(0, num_classes, 4), px // 2
    told = kinds if is_true else rng.integers(0, num_classes, 4)
    parts = [texture(int(kind), half, half, rng) for kind in kinds]
    pixels = np.block([[[parts[0]], [parts[1]]], [[parts[2]], [parts[3]]]])
    mask = np.kron(told.reshape(2, 2), np.ones((half, half))).astype(np.uint8)
    return Scene(to_image(pixels), mask)


def to_image(pixels: NDArray[np.float64]) -> Image.Image:
    """(H, W, 3) in 0..1 -> RGB."""
    return Image.fromarray(np.rint(255 * pixels).astype(np.uint8))


def save_mask(mask: NDArray[np.uint8], file: Path, palette: bool = False) -> None:
    image = Image.fromarray(mask)
    if palette:
        image.putpalette(PALETTE)
    image.save(file)


def write_pairs(root: Path, scenes: Sequence[Scene]) -> Path:
    """`root`/images/NNN.png and `root`/masks/NNN.png."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number, scene in enumerate(scenes):
        scene.image.save(root / "images" / f"{number:03d}.png")
        save_mask(scene.mask, root / "masks" / f"{number:03d}.png")
    return root


def moving_things(
    seed: int,
    num_frames: int,
    height: int = 64,
    width: int = 96,
    *,
    starts: Sequence[tuple[int, int]] = ((16, 16),),
    steps: Sequence[tuple[int, int]] = ((0, 8),),
    side: int = 24,
) -> list[Scene]:
    """Boxes of `side` pixels with textures of their own, each moving by its step (rows, columns) on a still ground."""
    rng = np.random.default_rng(seed)
    ground = texture(4, height, width, rng)
    things = [texture(kind % 4, side, side, rng) for kind in range(1, 1 + len(starts))]
    scenes = []
    for time in range(num_frames):
        pixels, mask = ground.copy(), np.zeros((height, width), dtype=np.uint8)
        for number, (thing, start, step) in enumerate(zip(things, starts, steps, strict=True), start=1):
            top, left = start[0] + time * step[0], start[1] + time * step[1]
            pixels[top : top + side, left : left + side] = thing
            mask[top : top + side, left : left + side] = number
        scenes.append(Scene(to_image(pixels), mask))
    return scenes


def write_video(root: Path, name: str, scenes: Sequence[Scene]) -> Path:
    """As DAVIS lays it out, with palette masks."""
    frames, masks = root / "JPEGImages/480p" / name, root / "Annotations/480p" / name
    for folder in (frames, masks):
        folder.mkdir(parents=True)
    for number, scene in enumerate(scenes):
        scene.image.save(frames / f"{number:05d}.jpg", quality=95)
        save_mask(scene.mask, masks / f"{number:05d}.png", palette=True)
    return root
