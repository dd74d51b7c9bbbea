"""A backbone from a module that Python code holds: timm's become ordinary backbones, others stay what they are."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from timm.models import PretrainedCfg, is_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adaptkit.backbones.backbone import Backbone, Channels, LoadReport
from adaptkit.backbones.build import build, embed_dim, is_vit, norm_args, square_px
from adaptkit.backbones.checkpoints import fit_
from adaptkit.backbones.config import NOT_ARCHITECTURE, preprocessing
from adaptkit.backbones.names import Origin
from adaptkit.backbones.reading import line
from adaptkit.errors import BackboneError

MODULE = "module:"
TOLERANCE = 1e-5  # between a timm module and the one rebuilt from its architecture, relative to the largest entry


def module_name(module: nn.Module) -> str:
    """`module:CLASS`, the backbone's name where a command line would say `resnet18`."""
    return f"{MODULE}{type(_unwrapped(module)).__name__}"


def from_module(
    module: nn.Module,
    *,
    readout: str = "auto",
    image_px: int | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    drop_path: float = 0.0,
) -> Backbone:
    """A copy of `module` as a backbone, in float32 and evaluation mode, on the CPU.

    A module that timm rebuilds with the same embeddings is exported for timm; any other keeps its class, has
    `architecture` "" and readout `pool`. Raises `BackboneError`.
    """
    name = module_name(module)
    twin = _copy(module, name)
    given = {key: list(value) for key, value in (("mean", mean), ("std", std)) if value is not None}
    backbone = _as_timm(twin, name, given, readout, image_px, drop_path)
    if backbone is not None:
        return backbone
    if readout not in ("auto", "pool") or drop_path:
        option = f"drop_path {drop_path}" if drop_path else f"readout {readout!r}"
        raise BackboneError(f"{name}: {option} needs a network that timm can build; its own output is the embedding")
    cfg = preprocessing(_known_cfg(twin) | given, name)
    px = square_px(cfg, {}, image_px, name)
    backbone = Backbone(
        name=name,
        module=twin,
        embed_dim=0,
        image_px=px,
        mean=(cfg["mean"][0], cfg["mean"][1], cfg["mean"][2]),
        std=(cfg["std"][0], cfg["std"][1], cfg["std"][2]),
        readout="pool",
        architecture="",
        model_args={},
        pretrained_cfg=cfg | {"input_size": [3, px, px]},
        load_report=LoadReport(tuple(twin.state_dict()), (), (), (), None, name, layout="module"),
    )
    backbone.embed_dim = embed_dim(backbone)
    return backbone


def _unwrapped(module: nn.Module) -> nn.Module:
    """The network inside `torch.compile`, DataParallel and DistributedDataParallel."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if isinstance(module, nn.DataParallel | DistributedDataParallel):
            module = module.module
        elif isinstance(inner, nn.Module):
            module = inner
        else:
            return module


def _copy(module: nn.Module, name: str) -> nn.Module:
    """The network in float32 and evaluation mode on the CPU, without timm's classifier; trainable if all was frozen."""
    try:
        twin = copy.deepcopy(_unwrapped(module)).to("cpu").float().eval()
        _remove_classifier_(twin)
        finite = all(bool(tensor.isfinite().all()) for tensor in twin.state_dict().values())
    except Exception as error:  # code of others: hooks, lazy, meta and quantised tensors
        raise BackboneError(f"{name}: cannot be copied to the CPU in float32 ({line(error)})") from None
    if not finite:
        raise BackboneError(f"{name}: has values that are not finite; load its weights again")
    parameters = list(twin.parameters())
    if not parameters:
        raise BackboneError(f"{name}: has no parameters, so there is nothing to adapt")
    if not any(parameter.requires_grad for parameter in parameters):
        twin.requires_grad_(True)
    return twin


def _remove_classifier_(module: nn.Module) -> None:
    """timm's own `reset_classifier` would change the pooling of some networks too."""
    names = _known_cfg(module).get("classifier") or ()
    for name in (names,) if isinstance(names, str) else names:
        if name in dict(module.named_modules()):
            module.set_submodule(name, nn.Identity())


def _known_cfg(module: nn.Module) -> dict[str, Any]:
    """timm's own description of the network; empty for others."""
    cfg = getattr(module, "pretrained_cfg", None)
    cfg = dataclasses.asdict(cfg) if isinstance(cfg, PretrainedCfg) else cfg
    if not isinstance(cfg, dict) or not isinstance(cfg.get("architecture"), str) or not is_model(cfg["architecture"]):
        return {}
    return cfg


def _as_timm(
    twin: nn.Module, name: str, given: dict[str, Any], readout: str, image_px: int | None, drop_path: float
) -> Backbone | None:
    """The same network built by timm, if timm can: arguments of its making that are not known may be in the way."""
    cfg = _known_cfg(twin)
    if not cfg:
        return None
    fields = {field.name for field in dataclasses.fields(PretrainedCfg)}
    known = {key: value for key, value in cfg.items() if key in fields} | given
    origin = Origin(name, cfg["architecture"], _model_args(twin), known)
    try:
        backbone = build(origin, "auto", None, 0.0, seed=0)
        backbone.load_report = _fit(backbone, twin, name)
        same = _same_embeddings(backbone, twin)
    except (BackboneError, RuntimeError, ValueError, TypeError, AssertionError, AttributeError):
        return None
    if not same:
        return None
    if (readout, drop_path) != ("auto", 0.0) or image_px not in (None, backbone.image_px):
        backbone = build(origin, readout, image_px, drop_path, seed=0)
        backbone.load_report = _fit(backbone, twin, name)
    backbone.embed_dim = embed_dim(backbone)
    return backbone


def _model_args(twin: nn.Module) -> dict[str, Any]:
    """What timm has to be told beside the architecture, as far as the network itself shows it."""
    args = dict(getattr(twin, "pretrained_model_args", None) or {})
    args = {key: value for key, value in args.items() if key not in NOT_ARCHITECTURE}
    size = getattr(getattr(twin, "patch_embed", None), "img_size", None)
    if isinstance(size, tuple):
        args["img_size"] = list(size)
    return args | ({"global_pool": twin.global_pool, **norm_args(twin)} if is_vit(twin) else {})


def _fit(backbone: Backbone, twin: nn.Module, name: str) -> LoadReport:
    """Copy the weights, and which of them are frozen."""
    state, frozen = twin.state_dict(), {key for key, p in twin.named_parameters() if not p.requires_grad}
    report = fit_(backbone.module, state, architecture=backbone.architecture, source=name, sha256=None)
    for key, parameter in backbone.module.named_parameters():
        parameter.requires_grad_(key not in frozen)
    return report


def _same_embeddings(backbone: Backbone, twin: nn.Module) -> bool:
    px = backbone.image_px
    images = torch.randn(2, 3, px, px, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, theirs = backbone.module(images), twin(images)
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max())
