"""Patch tokens: one embedding per patch of an image instead of one for the whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaptkit.backbones import Backbone
from adaptkit.backbones.reading import line
from adaptkit.embedding import AUTOCAST
from adaptkit.errors import BackboneError
from adaptkit.shortage import shortage

MAX_ASPECT = 4
"""Long side / short side that a resized image keeps: what is longer is squashed, or a strip would take gigabytes."""


@torch.no_grad()
def patch_tokens(backbone: Backbone, pixels: Tensor, precision: str = "fp32") -> Tensor:
    """(n, 3, H, W) images -> (n, h, w, D) float32 tokens on the same device, with H = h * patch and W = w * patch.

    `pixels` are uint8, or floats that are normalised already. Tokens are what timm's `forward_features` gives: after
    the final norm, where the network norms its tokens at all, and without class, register and other prefix tokens. A
    ViT takes any whole number of patches (see `fitting_size`): position embeddings are resampled to the grid, at the
    backbone's own size they stay as they are. Networks without tokens (ConvNeXt, ResNet, Swin) give their last feature
    map. Nothing is moved, and the module's mode is the caller's. Raises `BackboneError` for a network that has neither,
    and for images that it cannot take.
    """
    height, width = pixels.shape[-2:]
    rows, columns = patch_size(backbone)
    if height % rows or width % columns:
        fit_height, fit_width = fitting_size(height, width, (rows, columns))
        raise BackboneError(
            f"{backbone.name}: images of {width} x {height} px are no multiple of its {columns} x {rows} px patches; "
            f"resize them to {fit_width} x {fit_height}"
        )
    if pixels.dtype == torch.uint8:
        mean = torch.tensor(backbone.mean, device=pixels.device).view(1, 3, 1, 1)
        std = torch.tensor(backbone.std, device=pixels.device).view(1, 3, 1, 1)
        pixels = (pixels.float() / 255 - mean) / std
    dtype = AUTOCAST[precision]
    try:
        with torch.autocast(pixels.device.type, dtype=dtype, enabled=dtype is not None):
            features = backbone.module.forward_features(pixels)  # type: ignore[operator]  # `patch_size` found it
    except Exception as error:  # some were built for one size only, and say so in every way
        if shortage(error):  # of a GPU, or of the machine
            raise
        raise BackboneError(f"{backbone.name}: gives no tokens at {width} x {height} px ({line(error)})") from None
    return _as_grid(backbone, features, height // rows, width // columns).float()


def patch_size(backbone: Backbone) -> tuple[int, int]:
    """Rows and columns of pixels that a token stands for. Raises `BackboneError` for a network without tokens."""
    module = backbone.module
    embed, stages = getattr(module, "patch_embed", None), getattr(module, "feature_info", None)
    if callable(getattr(module, "forward_features", None)):
        if embed is not None and hasattr(module, "num_prefix_tokens") and hasattr(embed, "feat_ratio"):
            rows, columns = embed.feat_ratio(as_scalar=False)
            return int(rows), int(columns)
        if isinstance(stages, list) and stages and isinstance(stages[-1], dict) and "reduction" in stages[-1]:
            return int(stages[-1]["reduction"]), int(stages[-1]["reduction"])
    kind = backbone.architecture or type(module).__name__
    raise BackboneError(f"{backbone.name}: {kind} has no patch tokens; use a ViT or another network of timm's")


def fitting_size(
    height: int, width: int, patch: tuple[int, int], *, least: int = 1, most: int | None = None
) -> tuple[int, int]:
    """The size in pixels, of whole patches, to which an image of `height` x `width` is resized; nothing is cut off.

    The short side becomes its own length, at least `least` and at most `most`; the other keeps the aspect up to
    `MAX_ASPECT`; then each side goes to the nearest multiple of its patch, at least one.
    """
    short = min(height, width)
    wanted = max(short if most is None else min(short, most), least)
    sides = (min(side * wanted / short, MAX_ASPECT * wanted) for side in (height, width))
    rows, columns = (max(round(side / step), 1) * step for side, step in zip(sides, patch, strict=True))
    return rows, columns


def _as_grid(backbone: Backbone, features: object, rows: int, columns: int) -> Tensor:
    """(n, prefix + h * w, D) tokens or an (n, D, h, w) or (n, h, w, D) map -> (n, h, w, D)."""
    grid: Tensor | None = None
    if isinstance(features, Tensor) and features.ndim == 3:
        tokens = features[:, num_prefix(backbone.module) :]
        if tokens.shape[1] == rows * columns:
            grid = tokens.reshape(len(tokens), rows, columns, -1)
    elif isinstance(features, Tensor) and features.ndim == 4:
        is_last = getattr(backbone.module, "output_fmt", "NCHW") == "NHWC"
        grid = features if is_last else features.permute(0, 2, 3, 1)
    if grid is None or grid.shape[1:3] != (rows, columns):
        found = tuple(features.shape) if isinstance(features, Tensor) else f"a {type(features).__name__}"
        raise BackboneError(
            f"{backbone.name}: gives {found} instead of tokens for {rows} x {columns} patches; use a plain ViT"
        )
    return grid


def num_prefix(module: nn.Module) -> int:
    """Class, distillation and register tokens, which stand before those of the patches."""
    return int(getattr(module, "num_prefix_tokens", 0))
