"""Object discovery on drawn scenes: a backbone, the same one with random weights, patch colours, and fixed boxes.

python benchmarks/objects/measure.py --images 200 --seed 0
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from scenes import SIDE_PX, write_scenes  # beside this file

from adaptkit.backbones import load_backbone
from adaptkit.dense.annotations import Boxed, open_boxed
from adaptkit.dense.boxes import Found
from adaptkit.dense.cut import find_one, find_several
from adaptkit.dense.objects import found_in, measure, object_scores
from adaptkit.probes.measure import Measurement, compare

PATCH_PX = 8


@click.command()
@click.option("--backbone", default="nano", show_default=True)
@click.option("--images", default=200, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the scenes and of the random weights.")
def main(backbone: str, images: int, seed: int) -> None:
    """Print a table of CorLoc and AP50, each with its paired difference to the backbone."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = write_scenes(Path(folder) / "scenes", images, seed)
        entries, _ = open_boxed(data)
        rows = {
            backbone: of_backbone(backbone, data, seed, pretrained=True),
            "random weights": of_backbone(backbone, data, seed, pretrained=False),
            "patch colours": of_colours(entries),
            "the whole image": of_box(entries, (0, 0, SIDE_PX, SIDE_PX)),
            "the centre": of_box(entries, (SIDE_PX / 4, SIDE_PX / 4, 3 * SIDE_PX / 4, 3 * SIDE_PX / 4)),
        }
    click.echo("| tokens or box | CorLoc | AP50 | CorLoc less the first's | AP50 less the first's |")
    click.echo("| --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        click.echo(f"| {name} | {' | '.join(cells(row, rows[backbone]))} |")


def of_backbone(name: str, data: Path, seed: int, pretrained: bool) -> Measurement:
    backbone = load_backbone(name, pretrained=pretrained, seed=seed)
    return measure(
        backbone, data, None, seed=seed, precision="fp32", batch_size=1, workers=0, device=torch.device("cpu")
    )


def of_colours(entries: Sequence[Boxed]) -> Measurement:
    """The mean colour of each patch, less that of the image."""
    one, several = [], []
    for entry in entries:
        side = SIDE_PX // PATCH_PX
        pixels = torch.from_numpy(np.array(Image.open(entry.file))).double() / 255
        tokens = pixels.view(side, PATCH_PX, side, PATCH_PX, 3).mean(dim=(1, 3))
        tokens -= tokens.mean(dim=(0, 1))
        one.append(found_in(entry, [find_one(tokens)]))
        several.append(found_in(entry, find_several(tokens)))
    return Measurement(object_scores(one, several))


def of_box(entries: Sequence[Boxed], box: tuple[float, ...]) -> Measurement:
    found = [Found(np.array([box]), np.ones(1), entry.boxes) for entry in entries]
    return Measurement(object_scores(found, found))


def cells(row: Measurement, first: Measurement) -> list[str]:
    values = [f"{s.value:.1f} [{s.ci95[0]:.1f}, {s.ci95[1]:.1f}]" for s in row.scores.values() if s.ci95]
    if row is first:
        return [*values, "", ""]
    deltas = [d for d in compare(first, row).values() if d]
    return [*values, *(f"{d.value:+.1f} [{d.lo:.1f}, {d.hi:.1f}]" for d in deltas)]


if __name__ == "__main__":
    main()
