"""What a user takes away: the backbone as timm loads it, and the channel's head; reloaded and compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from torch import nn

from adaptkit.backbones import Backbone, load_backbone, save_backbone
from adaptkit.checkpoints import save_tensors
from adaptkit.embedding import Embedder
from adaptkit.sources import FolderSource

NUM_COMPARED = 64
TOLERANCE = 1e-4  # relative to the largest entry; a GPU may choose other kernels, a CPU gives 0


def export_backbone(backbone: Backbone, folder: Path, images: FolderSource, embedder: Embedder) -> float:
    """Write config.json and model.safetensors; load them as a user would; compare embeddings of 64 images.

    Returns the largest difference relative to the largest entry. Raises `RuntimeError` (a bug) if it is not tiny.
    """
    save_backbone(backbone, folder)
    spread = np.linspace(0, len(images) - 1, min(NUM_COMPARED, len(images)))  # one bad folder must not be all of it
    sample = images.subset(spread.astype(np.int64))
    ours = embedder(backbone, sample).vectors
    reloaded = load_backbone(str(folder))
    reloaded.module = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    reloaded.module.to(next(backbone.module.parameters()).device)
    theirs = embedder(reloaded, sample).vectors
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{folder}: the exported backbone differs from the one probed by {difference:.1e}")
    return difference


def export_head(head: nn.Module, file: Path, embed_dim: int) -> None:
    """Write the projection head: embeddings -> logits; the sign of a logit is its bit."""
    tensors = {name: tensor.to(torch.float32) for name, tensor in head.state_dict().items()}
    num_bits = [layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
    save_tensors(file, tensors, {"embed_dim": embed_dim, "num_bits": num_bits})
