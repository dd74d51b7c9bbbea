"""From what PIL decoded to 8-bit RGB: deep images are scaled, transparency is laid over white."""

from __future__ import annotations

import re
import sys
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Scale = Literal["range", "percentile"]

DEEP = re.compile(r"(?:I|F|LA|RGB[AaX]?|CMYK);(12|16|32)")  # BMP's BGR;16 is 16 bits a pixel, not a channel
PERCENTILES = (1, 99)
ROWS_AT_ONCE = 256  # float64 copies of a whole satellite scene would take gigabytes in every worker

# PIL gives the high bytes of 16-bit colour; reading them in the other byte order gives the low ones.
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
LOW_BYTES = {
    f"{mode};16{order}": f"{mode};16{other}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order, other in _OTHER_ORDER.items()
}


def raw_mode(image: Image.Image) -> str:
    """How the file stores its pixels, in PIL's words (`RGB;16B`), or an empty string. Not known after loading."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def bits_per_channel(image: Image.Image) -> int:
    """1, 8, 12, 16 or 32; of an image that is not loaded yet."""
    deep = DEEP.match(raw_mode(image))
    if deep:
        return int(deep[1])
    return 1 if image.mode == "1" else 8


def deep_to_8_bit(image: Image.Image, raw: str, scale: Scale, low_bytes: NDArray[np.uint8] | None) -> Image.Image:
    """A loaded image of more than 8 bits a channel as L, RGB or RGBA; see `decode` for `scale`.

    `raw` is its `raw_mode`; `low_bytes` (H, W, C) are those that PIL leaves out of 16-bit colour. Raises `ValueError`
    for pixels that are not finite.
    """
    if image.mode[0] in "IF":
        levels = np.asarray(image)
        if raw == "I;32N":  # PIL has no unsigned 32-bit mode; the bits are right
            levels = levels.view(np.uint32)
        return Image.fromarray(_stretch(levels, *_limits(levels, raw, scale)))
    if scale == "range":
        return image
    pixels = np.asarray(image if image.mode == "RGBA" else image.convert("RGB"))
    colour: NDArray[Any] = pixels[..., :3]
    if low_bytes is not None:
        colour = colour.astype(np.uint16) * 256 + low_bytes[..., :3]
    seen = colour[pixels[..., 3] > 0] if image.mode == "RGBA" else colour
    stretched = _stretch(colour, *_percentiles(seen if seen.size else colour))
    return Image.fromarray(np.concatenate([stretched, pixels[..., 3:]], axis=-1))


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of 8 bits a channel as RGB."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _limits(levels: NDArray[Any], raw: str, scale: Scale) -> tuple[float, float]:
    """The levels that become black and white."""
    if levels.dtype.kind == "f" and not np.isfinite(levels).all():
        raise ValueError("some pixels are NaN or infinite")
    if scale == "percentile":
        return _percentiles(levels)
    if raw == "I;12":
        return 0, 4095
    if "16" in raw:
        return (-32768, 32767) if raw.endswith("S") else (0, 65535)
    low, high = float(levels.min()), float(levels.max())
    for limit in (1, 255):
        if low >= 0 and high <= limit:
            return 0, limit
    return low, high


def _percentiles(levels: NDArray[Any]) -> tuple[float, float]:
    low, high = np.percentile(levels, PERCENTILES, method="nearest")
    if low == high:  # a few bright spots on black
        low, high = levels.min(), levels.max()
    return float(low), float(high)


def _stretch(levels: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    """0..255 from `low` to `high`; a constant image becomes black."""
    pixels = np.zeros(levels.shape, dtype=np.uint8)
    if high > low:
        for start in range(0, len(levels), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            share = (levels[rows].astype(np.float64) - low) / (high - low)
            pixels[rows] = np.rint(share.clip(0, 1) * 255)
    return pixels
