"""The backbone: the network that gives one embedding per image, and what is needed to feed and rebuild it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor  # type: ignore[import-untyped, unused-ignore]

Readout = Literal["cls", "mean", "pool"]
Channels = tuple[float, float, float]  # red, green, blue


@dataclass(frozen=True)
class LoadReport:
    """What became of every key: names as the backbone's state dict has them, `unexpected` as the file has them."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # left at their initialisation, because `allow_missing` named them
    unexpected: tuple[str, ...]  # in the file, not in the backbone; classifier keys are not listed
    resampled: tuple[str, ...]  # position embeddings fitted to another image or patch grid
    sha256: str | None
    source: str
    layout: str = "timm"  # whose names the file's keys have, and in brackets where in the file the network lay


class EvalTransform:
    """PIL image -> uint8 tensor (3, image_px, image_px), by the backbone's own resize and crop; can be pickled."""

    def __init__(self, image_px: int, interpolation: str, crop_pct: float, crop_mode: str, mean: tuple[float, ...]):
        transform = create_transform(
            (3, image_px, image_px),
            is_training=False,
            use_prefetcher=True,  # geometry only: normalising is the device's work
            interpolation=interpolation,
            crop_pct=crop_pct,
            crop_mode=crop_mode,
            mean=mean,  # the colour of the border in crop mode `border`
        )
        self.geometry: list[Callable[[Image.Image], Image.Image]] = list(transform.transforms[:-1])

    def __call__(self, image: Image.Image) -> Tensor:
        for step in self.geometry:
            image = step(image)
        pixels: Tensor = pil_to_tensor(image)
        return pixels


@dataclass
class Backbone:
    """`module`: (N, 3, H, W) float images normalised by `mean` and `std` -> (N, D) embeddings, D = `embed_dim`."""

    name: str
    module: nn.Module
    embed_dim: int
    image_px: int
    mean: Channels
    std: Channels
    readout: Readout
    architecture: str
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    load_report: LoadReport | None

    def eval_transform(self) -> Callable[[Image.Image], Tensor]:
        """The backbone's own preprocessing up to uint8 (3, image_px, image_px); normalise on the device."""
        return EvalTransform(
            self.image_px,
            self.pretrained_cfg["interpolation"],
            self.pretrained_cfg["crop_pct"],
            self.pretrained_cfg["crop_mode"],
            self.mean,
        )

    def clone(self) -> Backbone:
        """The same backbone with its own copy of the parameters and buffers."""
        return replace(
            self,
            module=copy.deepcopy(self.module),
            model_args=copy.deepcopy(self.model_args),
            pretrained_cfg=copy.deepcopy(self.pretrained_cfg),
        )
