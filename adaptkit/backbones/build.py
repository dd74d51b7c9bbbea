"""Build a backbone from an `Origin`: timm's module with an explicit readout and image size, weights still random."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

from adaptkit.backbones.backbone import Backbone, Readout
from adaptkit.backbones.config import preprocessing
from adaptkit.backbones.limits import MAX_NUMBERS, build_within
from adaptkit.backbones.names import Origin
from adaptkit.backbones.reading import line
from adaptkit.errors import BackboneError

TIMM_POOL = {"cls": "token", "mean": "avg"}


def build(
    origin: Origin, readout: str, image_px: int | None, drop_path: float, seed: int, most: int = MAX_NUMBERS
) -> Backbone:
    """The backbone with random weights in float32; its `embed_dim` is not known yet. Raises `BackboneError`.

    A network that a `config.json` describes may have `most` parameters.
    """
    cfg = preprocessing(origin.pretrained_cfg, origin.name)
    args = dict(origin.model_args)
    px = square_px(cfg, args, origin.image_px if image_px is None else image_px, origin.name)
    if "img_size" in args or cfg["fixed_input_size"]:
        args["img_size"] = px
    module = _create(origin, args, cfg, px, drop_path, seed, most)
    pool_args = _pool_args(module, readout, origin)
    if pool_args:
        args.update(pool_args)
        module = _create(origin, args, cfg, px, drop_path, seed, most)
    if is_vit(module):
        args["global_pool"] = module.global_pool
    _check_patches(module, px, origin.name)
    # timm's conversion reads the grid the position embeddings were trained on from these two attributes.
    own_cfg = cfg | {"architecture": origin.architecture}
    vars(module).update(pretrained_model_args=dict(origin.model_args), pretrained_cfg=own_cfg)
    return Backbone(
        name=origin.name,
        module=module.eval(),
        embed_dim=0,
        image_px=px,
        mean=(cfg["mean"][0], cfg["mean"][1], cfg["mean"][2]),
        std=(cfg["std"][0], cfg["std"][1], cfg["std"][2]),
        readout=_readout(module),
        architecture=origin.architecture,
        model_args=args,
        pretrained_cfg=cfg | {"input_size": [3, px, px]},
        load_report=None,
    )


def square_px(cfg: dict[str, Any], args: dict[str, Any], image_px: int | None, name: str) -> int:
    """The side of the images: `image_px` if given, else the backbone's own. Raises `BackboneError`."""
    if image_px is not None:
        if image_px < 1:
            raise BackboneError(f"{name}: image_px is {image_px}; it must be at least 1")
        return image_px
    size = args.get("img_size", cfg["input_size"][1:])
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    if height != width or not isinstance(height, int) or height < 1:
        raise BackboneError(f"{name}: its image size is {size!r}; only squares are supported, choose one with image_px")
    return height


def _create(
    origin: Origin, args: dict[str, Any], cfg: dict[str, Any], px: int, drop_path: float, seed: int, most: int
) -> nn.Module:
    """timm's module with no classifier, drawn by `seed`; any input size where timm can (local crops are smaller)."""
    wanted = dict(args, num_classes=0)
    if drop_path > 0:
        wanted["drop_path_rate"] = drop_path
    reason = ""
    attempts: list[dict[str, Any]] = [{"dynamic_img_size": True}, {}]
    for extra in attempts:

        def make(extra: dict[str, Any] = extra) -> nn.Module:
            torch.default_generator.manual_seed(seed)  # the CPU's only: torch.manual_seed would touch the GPU's too
            options = wanted | extra
            module: nn.Module = timm.create_model(
                origin.architecture, pretrained=False, pretrained_cfg=dict(cfg), **options
            )
            return module.float()

        with torch.random.fork_rng(devices=[]):
            try:
                if origin.is_described:
                    return build_within(most, make, lambda module: _two_images(module, px))
                return make()
            except Exception as error:  # arguments of a folder nobody has checked: timm raises what it likes
                reason = line(error)
    raise BackboneError(f"{origin.name}: timm cannot build {origin.architecture} with {str(wanted)[:200]} ({reason})")


def is_vit(module: nn.Module) -> bool:
    """Whether it has tokens that a readout can choose from."""
    return hasattr(module, "num_prefix_tokens") and isinstance(getattr(module, "global_pool", None), str)


def _readout(module: nn.Module) -> Readout:
    if not is_vit(module):
        return "pool"
    pools: dict[Any, Readout] = {"token": "cls", "avg": "mean"}
    return pools.get(module.global_pool, "pool")


def _pool_args(module: nn.Module, readout: str, origin: Origin) -> dict[str, Any]:
    """timm arguments that turn `module`'s own readout into the wanted one; empty if it is that already."""
    own = _readout(module)
    if readout == "auto":
        stated = origin.global_pool
        # Folders saved by older timm versions state the pooling beside the arguments, not in them.
        return {"global_pool": stated} if is_vit(module) and stated not in (None, module.global_pool) else {}
    if readout == own:
        return {}
    if readout not in TIMM_POOL:
        raise BackboneError(f"{origin.name}: readout {readout!r} does not exist here; its own is {own!r}, choose auto")
    if not is_vit(module):
        raise BackboneError(f"{origin.name}: has no tokens to read out by {readout!r}; choose readout pool or auto")
    if readout == "cls" and getattr(module, "cls_token", None) is None:
        raise BackboneError(f"{origin.name}: has no class token; choose readout {own} or auto")
    return {"global_pool": TIMM_POOL[readout]} | norm_args(module)


def norm_args(module: nn.Module) -> dict[str, bool]:
    """timm's argument that keeps a ViT's final norm where it is, whatever the readout."""
    if not hasattr(module, "fc_norm"):
        return {}
    norm_arg = "fc_norm" if type(module).__name__.startswith("VisionTransformer") else "use_fc_norm"
    return {norm_arg: not isinstance(module.fc_norm, nn.Identity)}


def _check_patches(module: nn.Module, px: int, name: str) -> None:
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    side = max(patch) if isinstance(patch, list | tuple) else patch
    if isinstance(side, int) and is_vit(module) and px % side:
        below = max(px // side, 1) * side
        raise BackboneError(f"{name}: image_px {px} is no multiple of its patches of {side} px; choose {below}")


def embed_dim(backbone: Backbone) -> int:
    """D, by looking: timm's `num_features` is not the output's width for every architecture.

    Raises `BackboneError` if two images do not become two embeddings.
    """
    try:
        with torch.inference_mode():
            output = backbone.module(_two_images(backbone.module, backbone.image_px))
    except Exception as error:  # a module of the user's own raises what it likes
        raise BackboneError(f"{backbone.name}: cannot take images of {backbone.image_px} px ({line(error)})") from None
    shape = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != 2 or not output.is_floating_point():
        raise BackboneError(
            f"{backbone.name}: gives {shape} for two images instead of one embedding each, (2, D) floats; "
            "choose a readout, or add the pooling to the module"
        )
    return int(output.shape[1])


def _two_images(module: nn.Module, px: int) -> Tensor:
    """(2, 3, side, side) black ones of `px`, or of a few patches where the module takes any: they say as much."""
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", None)
    if is_vit(module) and isinstance(patch, list | tuple) and getattr(module, "dynamic_img_size", False):
        px = min(px, 4 * max(patch))
    return torch.zeros(2, 3, px, px)
