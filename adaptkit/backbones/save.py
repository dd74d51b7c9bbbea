"""The folder a backbone is exported to: as timm's `local-dir:` source reads it, or as its own class does."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from adaptkit.backbones.backbone import Backbone
from adaptkit.backbones.reading import line
from adaptkit.errors import MachineError


def save_backbone(backbone: Backbone, folder: Path) -> None:
    """Write `model.safetensors` (float32) and `config.json`; each file is whole or absent.

    `timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)` then gives the same embeddings. What
    belongs to training only (stochastic depth, dynamic image sizes) is not written. The weights of a module that is
    not timm's are for `module.load_state_dict`. Raises `MachineError`.
    """
    state = {
        key: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for key, tensor in backbone.module.state_dict().items()
    }
    state = {key: tensor.contiguous() for key, tensor in state.items()}
    text = json.dumps(_config(backbone), indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The configuration comes last: where it is, the weights are too.
        _write(folder / "model.safetensors", lambda part: save_file(state, part, metadata={"format": "pt"}))
        _write(folder / "config.json", lambda part: part.write_text(text, encoding="utf-8"))
    except Exception as error:  # safetensors wraps a full disk in an error class of its own
        full = os.strerror(errno.ENOSPC)
        if full in str(error):
            raise MachineError(f"{folder}: {full}; free some space") from error
        raise MachineError(f"{folder}: the backbone cannot be saved ({line(error)}); choose another folder") from error


def _config(backbone: Backbone) -> dict[str, object]:
    if not backbone.architecture:
        return _module_config(backbone)
    config: dict[str, object] = {
        "architecture": backbone.architecture,
        "num_classes": 0,
        "num_features": backbone.embed_dim,
        "model_args": backbone.model_args,
        "pretrained_cfg": backbone.pretrained_cfg,
    }
    if "global_pool" in backbone.model_args:
        config["global_pool"] = backbone.model_args["global_pool"]
    return config


def _module_config(backbone: Backbone) -> dict[str, object]:
    """For a reader who has the class; timm has to refuse it."""
    kind = type(backbone.module)
    return {
        "architecture": None,
        "module": f"{kind.__module__}.{kind.__qualname__}",
        "load": "module.load_state_dict(safetensors.torch.load_file('model.safetensors'))",
        "num_features": backbone.embed_dim,
        "image_px": backbone.image_px,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "interpolation": backbone.pretrained_cfg["interpolation"],
        "crop_pct": backbone.pretrained_cfg["crop_pct"],
    }


def _write(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        os.chmod(part, mode)  # safetensors makes files that only their owner can read
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
