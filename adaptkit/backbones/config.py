"""`config.json` of a backbone folder (timm's format), checked field by field: the file may come from anyone."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, is_model

from adaptkit.backbones.limits import check_arguments
from adaptkit.backbones.reading import line
from adaptkit.errors import BackboneError
from adaptkit.settings import MAX_PX

MAX_CONFIG_BYTES = 16 << 20  # some list every label of ImageNet-21k
NOT_ARCHITECTURE = (  # arguments of training or of timm's factory that do not say what the backbone is
    "drop_path_rate", "dynamic_img_size", "num_classes", "in_chans", "device", "dtype",
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path", "cache_dir",
    "features_only", "scriptable", "exportable", "no_jit",
)  # fmt: skip
KEPT = (  # fields of timm's pretrained_cfg that an export keeps; not where the weights once came from
    "tag", "input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std", "pool_size",
    "first_conv", "classifier", "license", "description", "origin_url", "paper_name", "paper_ids", "notes",
)  # fmt: skip


def read_config(path: Path, where: str) -> tuple[str, dict[str, Any], dict[str, Any], str | None]:
    """architecture, model_args, pretrained_cfg, global_pool of a `config.json`. Raises `BackboneError`."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise BackboneError(f"{where}: config.json is larger than {MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"{where}: config.json cannot be read ({line(error)}); export it again") from None
    if isinstance(config, dict) and isinstance(config.get("module"), str):
        raise BackboneError(
            f"{where}: holds weights of {config['module'][:80]}, a class of your own; make it in Python, then "
            f"module.load_state_dict(safetensors.torch.load_file('{path.parent / 'model.safetensors'}'))"
        )
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise BackboneError(f"{where}: config.json names no timm architecture; it must be a folder timm can load")
    architecture = config["architecture"]
    if not is_model(architecture):
        raise BackboneError(f"{where}: config.json names {architecture!r}, which this timm does not know; upgrade timm")
    cfg = config.get("pretrained_cfg", config)  # older folders keep everything on one level
    model_args = config.get("model_args") or {}
    if not isinstance(cfg, dict) or not isinstance(model_args, dict):
        raise BackboneError(f"{where}: config.json: model_args and pretrained_cfg must be mappings")
    if model_args.get("in_chans", 3) != 3:
        raise BackboneError(f"{where}: config.json: in_chans is {model_args['in_chans']}; only 3 is supported")
    model_args = {key: value for key, value in model_args.items() if key not in NOT_ARCHITECTURE}
    check_arguments(model_args, where)
    fields = {field.name for field in dataclasses.fields(PretrainedCfg)}
    global_pool = config.get("global_pool")
    return (
        architecture,
        model_args,
        {key: value for key, value in cfg.items() if key in fields},
        global_pool if isinstance(global_pool, str) else None,
    )


def preprocessing(cfg: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of `cfg` an export keeps, each of them checked. Raises `BackboneError`."""
    kept: dict[str, Any] = {
        field.name: field.default for field in dataclasses.fields(PretrainedCfg) if field.name in KEPT
    }
    kept.update({key: cfg[key] for key in KEPT if cfg.get(key) is not None})
    for key in ("mean", "std"):
        values = kept[key]
        if not _numbers(values, 3) or (key == "std" and min(values) <= 0):
            raise BackboneError(f"{where}: {key} must be 3 numbers{' above 0' if key == 'std' else ''}, not {values!r}")
        kept[key] = [float(value) for value in values]
    size = kept["input_size"]
    if not _numbers(size, 3) or size[0] != 3 or any(v != int(v) or not 1 <= v <= MAX_PX for v in size):
        what = f"[3, height, width] of at most {MAX_PX}"
        raise BackboneError(f"{where}: input_size must be {what}, not {str(size)[:80]}")
    kept["input_size"] = [int(value) for value in size]
    if not _numbers([kept["crop_pct"]], 1) or not 0.05 <= kept["crop_pct"] <= 2:
        raise BackboneError(f"{where}: crop_pct must be a number between 0.05 and 2, not {kept['crop_pct']!r}")
    for key, choices in (
        ("interpolation", ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming", "random")),
        ("crop_mode", ("center", "squash", "border")),
    ):
        if kept[key] not in choices:
            raise BackboneError(f"{where}: {key} must be one of {', '.join(choices)}, not {kept[key]!r}")
    if kept["interpolation"] == "random":  # evaluation must not depend on chance
        kept["interpolation"] = "bicubic"
    kept["fixed_input_size"] = bool(kept["fixed_input_size"])
    return {key: value for key, value in kept.items() if value is not None} | {"num_classes": 0, "custom_load": False}


def _numbers(values: object, count: int) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == count
        and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )
