"""From a file to an upright RGB image, or a `BadImage` that says why not."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from adaptkit.errors import AdaptkitError
from adaptkit.sources.source import BadImage

MAX_PIXELS = 178_956_970
"""More is a decompression bomb. Our own limit: PIL's is a global that other code switches off."""

DRAFT_SIDE = 448
"""DCT-scaled decoding keeps the short side at least this long, so it starts at twice this."""

# Files are often misnamed, so the content decides; decoders that call other programs stay out of reach.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")

ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(path: Path, *, min_side: int = 8) -> Image.Image:
    """Read one image file as 8-bit RGB with its EXIF orientation applied.

    A JPEG whose short side is at least 896 px is decoded at 1/2, 1/4 or 1/8 scale with the short side still at least
    448 px. 16-bit grey is scaled by its whole range, transparency is laid over white. Raises `BadImage` for a
    file that is missing, truncated, no image, smaller than `min_side` px, or larger than `MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about odd metadata, and about sizes we check ourselves
            with Image.open(path, formats=FORMATS) as image:
                _check_size(image, str(path), min_side)
                if isinstance(image, JpegImageFile):
                    _draft_(image)
                image.load()
                return _upright(_to_rgb(image), _orientation(image))
    except (BadImage, AdaptkitError):  # the latter comes from a signal handler, not from the file
        raise
    except Exception as error:  # a damaged file makes PIL raise nearly anything: SyntaxError, struct.error, ...
        raise BadImage(str(path), _reason(error)) from error


def _check_size(image: Image.Image, path: str, min_side: int) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(path, f"{width} x {height} px is over the limit of {MAX_PIXELS:,} pixels")
    if min(width, height) < min_side:
        raise BadImage(path, f"{width} x {height} px is too small, at least {min_side} px a side are needed")


def _draft_(image: JpegImageFile) -> None:
    if min(image.size) >= 2 * DRAFT_SIDE:
        image.draft(None, (DRAFT_SIDE, DRAFT_SIDE))  # PIL takes the smallest scale that is not below this size


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey PNG (I;16; older Pillow: I), which convert("RGB") clips to white
        levels = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        image = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata beside sound pixels: no reason to lose the image
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    image.info = {}  # a tag left behind would let later code turn the image a second time
    return image


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a readable image file"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    text = " ".join(str(error).split())[:200]
    return text or type(error).__name__
