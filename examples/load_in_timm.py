"""Embed a folder of images with an exported backbone. Needs timm, not adaptkit.

python examples/load_in_timm.py runs/from-python/backbone ./target
"""

from __future__ import annotations

import sys
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

BATCH_SIZE = 64


def main(folder: str, images: str) -> None:
    # Wrong: timm.create_model(f"local-dir:{folder}", num_classes=0). Without pretrained=True timm reads the
    # architecture only and gives random weights, without a word of warning.
    backbone = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()

    # Size, crop, mean and standard deviation come from the export's config.json.
    transform = create_transform(**resolve_model_data_config(backbone), is_training=False)

    paths = sorted(path for path in Path(images).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    embeddings = []
    for start in range(0, len(paths), BATCH_SIZE):
        batch = [transform(Image.open(path).convert("RGB")) for path in paths[start : start + BATCH_SIZE]]
        with torch.inference_mode():
            embeddings.append(backbone(torch.stack(batch)))  # (n, D)
    print(f"embeddings: {tuple(torch.cat(embeddings).shape)}")  # (N, D)


if __name__ == "__main__":
    main(*sys.argv[1:])
