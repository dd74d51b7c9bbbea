"""The keys of a network's last attention: what the normalised cut compares, where there are any."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adaptkit.backbones import Backbone
from adaptkit.dense.patches import num_prefix, patch_tokens


@torch.no_grad()
def patch_keys(backbone: Backbone, pixels: Tensor, precision: str = "fp32") -> Tensor:
    """(n, 3, H, W) images -> (n, h, w, D) float32: see `patch_tokens`, which it returns for networks without keys.

    All heads of the last attention layer side by side, as TokenCut (sect. 4.1) and MaskCut take them. Tokens after the
    final norm share a large common part: with it hardly any pair has a cosine below the thresholds of these methods.
    Keys are read off timm's `qkv` layers (queries, keys and values end to end) when each token has them in one row.
    """
    own = (getattr(module, "qkv", None) for module in backbone.module.modules())
    layers = [layer for layer in own if isinstance(layer, nn.Linear)]
    if not layers:
        return patch_tokens(backbone, pixels, precision)
    rows: list[Tensor] = []
    hook = layers[-1].register_forward_hook(lambda layer, inputs, output: rows.append(output))
    try:
        tokens = patch_tokens(backbone, pixels, precision)
    finally:
        hook.remove()
    images, height, width, _ = tokens.shape
    prefix = num_prefix(backbone.module)
    if len(rows) != 1 or rows[0].ndim != 3 or rows[0].shape[:2] != (images, prefix + height * width):
        return tokens  # windows, or a network that goes round the layer
    keys = rows[0][:, prefix:].chunk(3, dim=-1)[1]
    return keys.reshape(images, height, width, -1).float()
