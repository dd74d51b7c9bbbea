"""Small saved backbones for the tests of `adaptkit.backbones`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adaptkit.backbones import Backbone, load_backbone

SMALL_VIT = {"embed_dim": 32, "num_heads": 2, "depth": 2}
NETWORKS: dict[str, tuple[str, int, dict[str, Any]]] = {  # name: timm's architecture, px, arguments that make it small
    "vit": ("test_vit", 64, {"img_size": 64}),
    "vit_patch8": ("vit_small_patch8_224", 32, SMALL_VIT | {"img_size": 32}),
    "vit_patch16": ("vit_small_patch16_224", 64, SMALL_VIT | {"img_size": 64}),
    "vit_relpos": ("test_vit_relpos", 64, {"img_size": 64}),
    "dinov2": ("vit_small_patch14_dinov2", 56, SMALL_VIT | {"img_size": 56, "depth": 4}),
    "dinov2_reg": ("vit_small_patch14_reg4_dinov2", 56, SMALL_VIT | {"img_size": 56, "depth": 4}),
    "dinov2_giant": ("vit_giant_patch14_reg4_dinov2", 56, SMALL_VIT | {"img_size": 56, "depth": 4}),
    "dinov3": ("vit_small_patch16_dinov3", 64, SMALL_VIT | {"img_size": 64}),
    "dinov3_qkvb": ("vit_small_patch16_dinov3_qkvb", 64, SMALL_VIT | {"img_size": 64}),
    "dinov3_plus": ("vit_small_plus_patch16_dinov3_qkvb", 64, SMALL_VIT | {"img_size": 64}),
    "resnet": ("test_resnet", 64, {}),
    "convnext": ("test_convnext", 64, {}),
    "efficientnet": ("test_efficientnet", 64, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "mobilenetv4": ("mobilenetv4_conv_small_035", 64, {}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        56,
        {"img_size": 56, "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4]},
    ),
}


def network_folder(network: str, root: Path) -> Path:
    """A folder that says which of `NETWORKS` it is, with no weights inside."""
    architecture, px, args = NETWORKS[network]
    folder = root / network
    folder.mkdir(exist_ok=True)
    cfg = {"input_size": [3, px, px], "fixed_input_size": "img_size" in args}
    config = {"architecture": architecture, "model_args": args, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def drawn(network: str, root: Path) -> Backbone:
    """One of `NETWORKS` with every tensor off its initialisation."""
    return random_(load_backbone(str(network_folder(network, root)), pretrained=False))


def random_(backbone: Backbone) -> Backbone:
    """Move every parameter and statistic off its initialisation, so that no norm is the identity by chance."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, tensor in backbone.module.state_dict().items():
            if tensor.is_floating_point():
                noise = 0.2 * torch.rand(tensor.shape, generator=generator)
                tensor.add_(noise if "running_var" in key else noise - 0.1)
    return backbone


def pixels(px: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, px, px, generator=torch.Generator().manual_seed(1))


def embeddings(module: torch.nn.Module, px: int) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = module.eval()(pixels(px))
    return result


def edit(folder: Path, target: Path, change: Any = None, config: Any = None) -> Path:
    """A copy of `folder` with its tensors and configuration passed through the two functions."""
    target.mkdir()
    state = load_file(folder / "model.safetensors")
    tree = json.loads((folder / "config.json").read_text())
    save_file(change(state) if change else state, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(config(tree) if config else tree))
    return target
