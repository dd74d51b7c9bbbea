"""Photometric changes on the device: a batch of uint8 views -> normalised float, every view with its own factors.

The factors are drawn in the workers (`multicrop.draw_factors`) and arrive as one small tensor, so nothing here is
random, nothing is read back to the host, and the views of a seed are the same on every device. Jitter, grey and
solarise equal torchvision's float functions with the same factors; the tests compare them.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GREY, SIGMA, SOLARIZE = range(8)  # columns of the factors
NUM_FACTORS = 8
ORDERS = tuple(permutations((BRIGHTNESS, CONTRAST, SATURATION, HUE)))  # ColorJitter applies its parts in random order
NEUTRAL = (1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
BLUR_RADIUS = 4  # taps on each side; a 9-tap kernel, as in DINOv2
LUMA = (0.299, 0.587, 0.114)
SOLAR = 128 / 255


def photometric(
    views: Tensor,
    factors: Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    parts: frozenset[str],
) -> Tensor:
    """(N, 3, H, W) uint8 views, (N, 8) factors -> (N, 3, H, W) float32, normalised by the backbone's mean and std.

    `parts` names what can occur at all ("jitter", "hue", "grey", "blur", "solarize"): a recipe without blur does
    not pay for blur.
    """
    x = views.float() / 255
    x = _change_rows(x, factors, parts) if x.device.type == "cpu" else _change_all(x, factors, parts)
    return (x - _constant(mean, x.device).view(1, 3, 1, 1)) / _constant(std, x.device).view(1, 3, 1, 1)


def _change_all(x: Tensor, factors: Tensor, parts: frozenset[str]) -> Tensor:
    """Every part on every view, kept where its factor says so: no view is chosen, so no GPU waits for the host."""
    if "jitter" in parts:
        x = _jitter(x, factors, with_hue="hue" in parts)
    if "grey" in parts:
        x = torch.where(_column(factors, GREY) > 0, _luma(x), x)
    if "blur" in parts:
        x = _blur(x, factors[:, SIGMA])
    if "solarize" in parts:
        x = torch.where((_column(factors, SOLARIZE) > 0) & (x >= SOLAR), 1 - x, x)
    return x


def _change_rows(x: Tensor, factors: Tensor, parts: frozenset[str]) -> Tensor:
    """The same, each part only on the views that get it: on a CPU a third of the work."""
    if "jitter" in parts:
        orders = torch.tensor(ORDERS)[factors[:, ORDER].long()]
        for slot in range(4):
            for part in (BRIGHTNESS, CONTRAST, SATURATION, HUE):
                changes = (orders[:, slot] == part) & (factors[:, part] != NEUTRAL[part])
                _change_rows_(x, changes, factors[:, part], PARTS[part])
    if "grey" in parts:
        _change_rows_(x, factors[:, GREY] > 0, factors[:, GREY], lambda rows, _: _luma(rows).expand_as(rows))
    if "blur" in parts:
        _change_rows_(x, factors[:, SIGMA] > 0, factors[:, SIGMA], lambda rows, sigmas: _blur(rows, sigmas.flatten()))
    if "solarize" in parts:
        chosen = factors[:, SOLARIZE] > 0
        _change_rows_(x, chosen, factors[:, SOLARIZE], lambda rows, _: torch.where(rows >= SOLAR, 1 - rows, rows))
    return x


def _change_rows_(x: Tensor, chosen: Tensor, values: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """x[rows] <- change(x[rows], their values as (n, 1, 1, 1)), one view at a time: it stays in the cache."""
    for row in chosen.nonzero().flatten().tolist():
        x[row : row + 1] = change(x[row : row + 1], values[row].view(1, 1, 1, 1))


def _constant(values: tuple[Any, ...], device: torch.device) -> Tensor:
    """On the device without waiting for it; `torch.tensor(..., device=...)` waits until all earlier work is done."""
    return torch.tensor(values).to(device, non_blocking=True)


def _column(factors: Tensor, index: int) -> Tensor:
    return factors[:, index].view(-1, 1, 1, 1)


def _luma(x: Tensor) -> Tensor:
    return (LUMA[0] * x[:, 0] + LUMA[1] * x[:, 1] + LUMA[2] * x[:, 2]).unsqueeze(1)


def _jitter(x: Tensor, factors: Tensor, with_hue: bool) -> Tensor:
    """Four slots; in each slot every view gets the part that its own order puts there.

    Brightness, contrast and saturation are one blend, f x + (1 - f) r, with reference r = 0, the view's mean
    luma, or the luma image: so a slot costs one blend, whatever the mixture of orders in the batch.
    """
    orders = _constant(ORDERS, x.device)[factors[:, ORDER].long()]  # (N, 4)
    for slot in range(4):
        part = orders[:, slot].view(-1, 1, 1, 1)
        factor = factors.gather(1, orders[:, slot : slot + 1]).view(-1, 1, 1, 1)
        luma = _luma(x)
        reference = luma.mean((2, 3), keepdim=True) * (part == CONTRAST) + luma * (part == SATURATION)
        blended = _blend(x, factor, reference)
        turned = _rotate_hue(x, _column(factors, HUE)) if with_hue else x
        x = torch.where(part == HUE, turned, blended)
    return x


def _rotate_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Shift the hue by `turns` of the colour circle, through HSV. (N, 3, H, W), (N, 1, 1, 1) -> (N, 3, H, W)."""
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    hue = (sector / 6 + turns.view(-1, 1, 1)) * 6
    channels = []
    for offset in (5.0, 3.0, 1.0):  # red, green, blue
        k = (offset + hue) % 6
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.where(turns == 0, x, torch.stack(channels, 1))


def _blend(x: Tensor, factor: Tensor, reference: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * reference).clamp(0, 1)


PARTS: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    BRIGHTNESS: lambda x, factor: (factor * x).clamp(0, 1),
    CONTRAST: lambda x, factor: _blend(x, factor, _luma(x).mean((2, 3), keepdim=True)),
    SATURATION: lambda x, factor: _blend(x, factor, _luma(x)),
    HUE: _rotate_hue,
}


def _blur(x: Tensor, sigmas: Tensor) -> Tensor:
    """Separable Gaussian blur, one sigma per view (0: none). Reflected edges."""
    radius = min(BLUR_RADIUS, x.shape[2] - 1, x.shape[3] - 1)
    taps = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (taps / sigmas.clamp_min(1e-3).unsqueeze(1)) ** 2)  # (N, taps); sigma 0 -> identity
    kernel = (kernel / kernel.sum(1, keepdim=True)).view(x.shape[0], -1, 1, 1, 1)
    height, width = x.shape[2:]
    padded = pad(x, (radius, radius, 0, 0), mode="reflect")
    x = sum((kernel[:, t] * padded[..., t : t + width] for t in range(2 * radius + 1)), torch.zeros_like(x))
    padded = pad(x, (0, 0, radius, radius), mode="reflect")
    return sum((kernel[:, t] * padded[..., t : t + height, :] for t in range(2 * radius + 1)), torch.zeros_like(x))
