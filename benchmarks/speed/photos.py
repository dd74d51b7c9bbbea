"""Files like photographs, made from the sample images: what is decoded decides what a pipeline is worth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from adaptkit.cli.command_demo import SAMPLES

WIDTH, HEIGHT = 500, 375  # ImageNet's usual size
COLUMNS, ROWS = 4, 3  # tiles of 64 px, enlarged to 125
QUALITY = 90
GRAIN = 8.0  # grey levels; with it a file has some 70 kB, as a photograph of this size and quality


def write_photos(folder: Path, count: int) -> Path:
    """`folder/0000.jpg` and on: mosaics of enlarged sample tiles with the grain of a sensor."""
    folder.mkdir(parents=True)
    tiles = sorted(Path(SAMPLES["data"][0]).glob("*.jpg"))
    for index in range(count):
        rng = np.random.default_rng(index)
        chosen = rng.choice(len(tiles), COLUMNS * ROWS, replace=False)
        _mosaic([tiles[k] for k in chosen], rng).save(folder / f"{index:04d}.jpg", quality=QUALITY)
    return folder


def _mosaic(tiles: list[Path], rng: np.random.Generator) -> Image.Image:
    side = (WIDTH // COLUMNS, HEIGHT // ROWS)
    mosaic = Image.new("RGB", (WIDTH, HEIGHT))
    for place, tile in enumerate(tiles):
        row, column = divmod(place, COLUMNS)
        with Image.open(tile) as image:
            mosaic.paste(image.resize(side, Image.Resampling.BICUBIC), (column * side[0], row * side[1]))
    grain = rng.normal(0, GRAIN, (HEIGHT, WIDTH, 1))
    return Image.fromarray((np.asarray(mosaic) + grain).clip(0, 255).astype(np.uint8))


def repeat_by_links(source: Path, folder: Path, times: int) -> Path:
    """Every file of `source` under `times` names: an epoch longer than the race, for trainers that stop at its end."""
    folder.mkdir(parents=True)
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for turn in range(times):
        for index, file in enumerate(files):
            (folder / f"{turn:03d}_{index:05d}{file.suffix}").symlink_to(file.absolute())
    return folder
