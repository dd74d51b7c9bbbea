"""Short names of backbones: torch.hub's of the DINO family, and what timm calls them. Loads nothing."""

from __future__ import annotations

from typing import NamedTuple

NANO = "nano"

_DINO_VITS = {"vits16": "small_patch16", "vits8": "small_patch8", "vitb16": "base_patch16", "vitb8": "base_patch8"}
_SIZES = {"s": "small", "b": "base", "l": "large", "g": "giant"}
_DINOV3_VITS = {
    "vits16": "small_patch16",
    "vits16plus": "small_plus_patch16",
    "vitb16": "base_patch16",
    "vitl16": "large_patch16",
    "vith16plus": "huge_plus_patch16",
    "vit7b16": "7b_patch16",
}


class Alias(NamedTuple):
    """A torch.hub name of the DINO family in timm's words. Where timm's defaults differ, the hub's use decides."""

    timm_name: str
    image_px: int | None = None
    global_pool: str | None = None


ALIASES: dict[str, Alias] = {
    **{f"dino_{hub}": Alias(f"vit_{size}_224.dino") for hub, size in _DINO_VITS.items()},
    # trained at 224 px and, at the end, 518 px; nearly always used at 224
    **{f"dinov2_vit{s}14": Alias(f"vit_{size}_patch14_dinov2.lvd142m", 224) for s, size in _SIZES.items()},
    **{f"dinov2_vit{s}14_reg": Alias(f"vit_{size}_patch14_reg4_dinov2.lvd142m", 224) for s, size in _SIZES.items()},
    # timm averages the patch tokens of these, the hub gives the class token
    **{f"dinov3_{hub}": Alias(f"vit_{size}_dinov3.lvd1689m", None, "token") for hub, size in _DINOV3_VITS.items()},
    **{f"dinov3_convnext_{s}": Alias(f"convnext_{s}.dinov3_lvd1689m") for s in ("tiny", "small", "base", "large")},
}
