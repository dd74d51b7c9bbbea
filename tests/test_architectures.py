"""Every kind of network: embeds, exports, comes back from timm bit for bit, and trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from backbone_files import NETWORKS, drawn, embeddings, pixels
from torch import Tensor, nn

from adaptkit.backbones import Backbone, load_backbone, save_backbone
from adaptkit.distill import Branch, build_pair, train_mode_
from adaptkit.errors import BackboneError
from adaptkit.objectives.bits import Bits
from adaptkit.session import check_views, local_px
from adaptkit.settings import ObjectiveSettings

NUM_IMAGES = 4
ARCHITECTURES = [  # network, readout, embed_dim
    ("vit_patch8", "cls", 32),
    ("vit_patch16", "cls", 32),
    ("vit_relpos", "mean", 96),
    ("dinov2", "cls", 32),
    ("dinov2_reg", "cls", 32),
    ("dinov3", "mean", 32),
    ("convnext", "pool", 64),
    ("resnet", "pool", 96),
    ("swin", "pool", 64),
    ("mobilenetv3", "pool", 1024),
    ("mobilenetv4", "pool", 1280),
    ("efficientnet", "pool", 256),
]
FIXED_SIZE = {"vit_relpos"}  # timm builds Swin for any size


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}


def step(student: Branch, px: int, side: int, frozen: bool) -> None:
    """One step of the student on two global and two local crops of each image."""
    train_mode_(student, frozen)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-2, eps=1e-30)
    views = [pixels(px, 2 * NUM_IMAGES), pixels(side, 2 * NUM_IMAGES)]
    logits = student(views, NUM_IMAGES, frozen)
    assert logits.shape == (4, NUM_IMAGES, 16)
    logits.square().mean().backward()
    optimizer.step()


def crops_of(backbone: Backbone, network: str) -> int:
    """The side of its local crops: by the recipe's default, or, where that is refused, as the refusal advises."""
    side = local_px(backbone, 0.43)
    assert side < backbone.image_px
    if network not in FIXED_SIZE:
        check_views(backbone, side, num_local=2)
        return side
    with pytest.raises(BackboneError, match=r"views\.local_ratio=1"):
        check_views(backbone, side, num_local=2)
    return local_px(backbone, 1.0)


@pytest.mark.parametrize(("network", "readout", "dim"), ARCHITECTURES)
def test_an_architecture_exports_reloads_and_trains(network: str, readout: str, dim: int, tmp_path: Path) -> None:
    backbone = drawn(network, tmp_path)
    px = backbone.image_px
    reference = embeddings(backbone.module, px)
    assert (reference.shape, backbone.readout, px) == ((2, dim), readout, NETWORKS[network][1])

    save_backbone(backbone, tmp_path / "export")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True, num_classes=0)
    assert torch.equal(embeddings(theirs, px), reference)
    assert torch.equal(embeddings(load_backbone(str(tmp_path / "export")).module, px), reference)

    side = crops_of(backbone, network)
    objective = Bits(ObjectiveSettings(num_bits=16, hidden_dim=8))
    student, teacher = build_pair(backbone.module, backbone.clone().module, backbone.embed_dim, objective, seed=0)
    before, head = state(student.backbone), state(student.head)
    step(student, px, side, frozen=True)
    assert changed(student.backbone, before) == set()  # nor BatchNorm's statistics
    assert changed(student.head, head)
    assert torch.equal(embeddings(student.backbone, px), reference)
    step(student, px, side, frozen=False)
    moved = changed(student.backbone, before)
    statistics = {name for name in before if "running" in name or "num_batches" in name}
    assert statistics <= moved
    assert len(moved) > 0.8 * len(before)
    assert changed(teacher.backbone, before) == set()
