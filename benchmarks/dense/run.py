"""mIoU and J&F of backbones on drawn scenes whose every pixel is known.

    PYTHONPATH=.:tests python benchmarks/dense/run.py nano other/backbone untrained

The second and later backbones are compared with the first, paired: mIoU by image, J&F by object. `untrained` is
nano with random weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from drawn_scenes import moving_things, textured_scene, write_pairs, write_video

from adaptkit.backbones import load_backbone
from adaptkit.dense import segmentation, video
from adaptkit.probes.measure import Measurement, compare

NUM_TRAIN, NUM_TEST, PX = 60, 40, 96
NUM_VIDEOS, NUM_FRAMES = 8, 8


def draw(root: Path) -> None:
    write_pairs(root / "pairs/train", [textured_scene(seed, PX) for seed in range(NUM_TRAIN)])
    write_pairs(root / "pairs/test", [textured_scene(1000 + seed, PX) for seed in range(NUM_TEST)])
    for seed in range(NUM_VIDEOS):
        things: dict[str, Any] = {"starts": ((10, 12), (70, 120)), "steps": ((3, 8), (-2, -9)), "side": 28}
        write_video(root / "videos", f"{seed:02d}", moving_things(seed, NUM_FRAMES, 112, 176, **things))


def measure(name: str, root: Path) -> Measurement:
    backbone = load_backbone("nano", pretrained=False) if name == "untrained" else load_backbone(name)
    options: dict[str, Any] = {"precision": "fp32", "batch_size": 16, "workers": 0, "device": torch.device("cpu")}
    pairs = segmentation.measure(backbone, root / "pairs", None, seed=0, **options)
    return pairs | video.measure(backbone, root / "videos", None, seed=0, **options)


def main() -> None:
    with TemporaryDirectory() as folder:
        draw(Path(folder))
        measured = {name: measure(name, Path(folder)) for name in sys.argv[1:]}
    first = next(iter(measured.values()))
    for name, each in measured.items():
        deltas = compare(first, each)
        for metric, score in each.scores.items():
            lo, hi = score.ci95 or (float("nan"), float("nan"))
            delta = deltas[metric]
            change = "" if each is first or delta is None else f"{delta.value:+.1f} [{delta.lo:+.1f}, {delta.hi:+.1f}]"
            print(f"{Path(name).name} {metric} {score.value:.1f} [{lo:.1f}, {hi:.1f}] {change}", flush=True)


if __name__ == "__main__":
    main()
