"""What a view is: random resized crops and flips, uint8, made in the workers; photometric factors drawn beside them.

Everything random about a view is drawn here, from a generator seeded by (seed, epoch, image), so a run sees the
same views whatever the number of workers or processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from adaptkit.settings import ViewSettings
from adaptkit.views.photometric import NEUTRAL, ORDERS

ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10  # draws of a crop that fits before the fallback, as in torchvision's RandomResizedCrop
REFERENCE_PX = 224  # blur is stated in pixels of a crop of this side


@dataclass(frozen=True)
class Views:
    """The views of one image: global crops (G, 3, S, S) and local crops (L, 3, s, s) uint8, factors (G + L, 8)."""

    global_crops: Tensor
    local_crops: Tensor
    factors: Tensor


@dataclass(frozen=True)
class MultiCrop:
    """Makes the views of an image. Sides in pixels."""

    settings: ViewSettings
    global_px: int
    local_px: int

    @property
    def num_views(self) -> int:
        """V = G + L."""
        return self.settings.num_global + self.settings.num_local

    @property
    def parts(self) -> frozenset[str]:
        """Photometric parts that can occur under these settings; see `photometric`."""
        s = self.settings
        jitter = s.jitter > 0 and (s.brightness, s.contrast, s.saturation, s.hue) != (0, 0, 0, 0)
        present = {
            "jitter": jitter,
            "hue": jitter and s.hue > 0,
            "grey": s.grey > 0,
            "blur": max(s.blur) > 0,
            "solarize": s.solarize > 0,
        }
        return frozenset(name for name, is_present in present.items() if is_present)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Views:
        """RGB image -> its views. The image is never enlarged before cropping, so no detail is lost."""
        pixels = F.pil_to_tensor(image)
        s = self.settings
        global_crops = [self._crop(pixels, s.global_scale, self.global_px, rng) for _ in range(s.num_global)]
        local_crops = [self._crop(pixels, s.local_scale, self.local_px, rng) for _ in range(s.num_local)]
        factors = [draw_factors(s, view, self.global_px, rng) for view in range(self.num_views)]
        return Views(
            torch.stack(global_crops),
            torch.stack(local_crops) if local_crops else torch.empty(0, 3, self.local_px, self.local_px).byte(),
            torch.tensor(factors, dtype=torch.float32),
        )

    def _crop(self, pixels: Tensor, scale: tuple[float, float], side: int, rng: np.random.Generator) -> Tensor:
        top, left, height, width = draw_box(pixels.shape[1], pixels.shape[2], scale, rng)
        crop: Tensor = F.resized_crop(
            pixels, top, left, height, width, [side, side], InterpolationMode.BICUBIC, antialias=True
        )
        if rng.random() < self.settings.hflip:
            crop = crop.flip(2)
        if rng.random() < self.settings.vflip:
            crop = crop.flip(1)
        return crop


def draw_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a random crop: area share uniform, log aspect uniform (Szegedy et al. 2015)."""
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for _ in range(ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(low, high))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(0, height - box_height + 1))
            left = int(rng.integers(0, width - box_width + 1))
            return top, left, box_height, box_width
    box_width = min(width, max(1, round(height * ASPECT[1])))  # the largest centred crop of an allowed aspect
    box_height = min(height, max(1, round(width / ASPECT[0])))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def draw_factors(settings: ViewSettings, view: int, global_px: int, rng: np.random.Generator) -> tuple[float, ...]:
    """The eight photometric factors of one view (columns of `photometric`). Global views are numbered first.

    Always the same number of draws, so that switching one part off leaves the others' draws as they were.
    """
    jitter, grey, blur, solarize, *strengths, sigma = rng.random(9)
    order = float(rng.integers(len(ORDERS)))
    brightness, contrast, saturation, hue = NEUTRAL[:4]
    if jitter < settings.jitter:
        ranges = (settings.brightness, settings.contrast, settings.saturation)
        brightness, contrast, saturation = (
            1 + strength * (2 * u - 1) for strength, u in zip(ranges, strengths, strict=False)
        )
        hue = settings.hue * (2 * strengths[3] - 1)
    is_global = view < settings.num_global
    low, high = settings.blur_sigma
    blurred = blur < settings.blur[min(view, 1) if is_global else 2]
    return (
        brightness,
        contrast,
        saturation,
        hue,
        order,
        float(grey < settings.grey),
        (low + (high - low) * sigma) * global_px / REFERENCE_PX if blurred else 0.0,
        float(view == 1 and solarize < settings.solarize),
    )
