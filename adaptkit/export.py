"""What a user takes away: the backbone as timm or its own class loads it, and the head; reloaded and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

from adaptkit.backbones import Backbone, load_backbone, save_backbone
from adaptkit.checkpoints import load_tensors, save_tensors
from adaptkit.embedding import Embedder
from adaptkit.errors import BackboneError, UsageError
from adaptkit.objectives.head import ProjectionHead
from adaptkit.sources import FolderSource, evenly_spaced

NUM_COMPARED = 64
TOLERANCE = 1e-4  # relative to the largest entry; a GPU may choose other kernels, a CPU gives 0


def export_backbone(backbone: Backbone, folder: Path, images: FolderSource, embedder: Embedder) -> float:
    """Write config.json and model.safetensors; load them as a user would; compare embeddings of 64 images.

    Returns the largest difference relative to the largest entry. Raises `RuntimeError` (a bug) if it is not tiny.
    """
    save_backbone(backbone, folder)
    sample = images.subset(evenly_spaced(len(images), NUM_COMPARED))  # one bad folder must not be all of it
    ours = embedder(backbone, sample).vectors
    reloaded = _reloaded(backbone, folder)
    reloaded.module.to(next(backbone.module.parameters()).device)
    theirs = embedder(reloaded, sample).vectors
    difference = float((ours - theirs).abs().max() / ours.abs().max().clamp_min(1e-12))
    if not difference <= TOLERANCE:
        raise RuntimeError(f"{folder}: the exported backbone differs from the one probed by {difference:.1e}")
    return difference


def _reloaded(backbone: Backbone, folder: Path) -> Backbone:
    """What a user gets from the folder: by timm, or for a class of their own by its `load_state_dict`."""
    if not backbone.architecture:
        twin = backbone.clone()
        twin.module.load_state_dict(load_file(folder / "model.safetensors"))
        return twin
    reloaded = load_backbone(str(folder))
    reloaded.module = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    return reloaded


def export_head(head: nn.Module, file: Path, embed_dim: int, objective: str) -> None:
    """Write the projection head: embeddings -> outputs, for the objective `bits` logits whose sign is the bit."""
    tensors = {name: tensor.to(torch.float32) for name, tensor in head.state_dict().items()}
    facts: dict[str, Any] = {"objective": objective, "embed_dim": embed_dim}
    if objective == "bits":
        facts["num_bits"] = [layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
    save_tensors(file, tensors, facts)


def load_head(file: Path, embed_dim: int) -> ProjectionHead:
    """The head of a run that learnt codes, as `export_head` wrote it.

    Raises `UsageError` if the run's objective makes no codes, `BackboneError` if it is of another network.
    """
    if not file.is_file():
        raise BackboneError(f"{file}: no such file; the run has no head to make codes with")
    tensors, facts = load_tensors(file)
    if facts.get("objective") != "bits":
        raise UsageError(f"{file}: the head of objective {facts.get('objective')}; only bits makes codes")
    if facts.get("embed_dim") != embed_dim:
        raise BackboneError(f"{file}: does not fit a backbone with embeddings of {embed_dim} numbers")
    try:
        head = ProjectionHead(embed_dim, int(facts["num_bits"]), tensors["0.weight"].shape[0])
        head.load_state_dict(tensors)
    except (KeyError, RuntimeError):
        raise BackboneError(f"{file}: damaged, or of another kind of head; export the run again") from None
    return head.eval()
