"""Small saved backbones for the tests of `adaptkit.backbones`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adaptkit.backbones import Backbone


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
