"""From a file to an upright RGB image, or a `BadImage` that says why not."""

from __future__ import annotations

import ctypes
import io
import logging
import os
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.ImageFile
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, _imaging
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import PREFIXES, TiffImageFile

from adaptkit.errors import AdaptkitError
from adaptkit.sources.pixels import DEEP, LOW_BYTES, Scale, bits_per_channel, deep_to_8_bit, raw_mode, to_rgb
from adaptkit.sources.scan import file_size
from adaptkit.sources.source import BadImage

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else PIL's remarks on odd files reach the terminal
with suppress(OSError, AttributeError):  # and libtiff's; where it is part of PIL's own file it cannot be reached
    ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)

MAX_PIXELS = 178_956_970
"""More is a decompression bomb. Our own limit: PIL's is a global that other code switches off."""

MAX_ASPECT = 200
"""Long side / short side: resized to what the backbone takes on the short one, a longer image takes gigabytes."""

DRAFT_SIDE = 448
"""DCT-scaled decoding keeps the short side at least this long, so it starts at twice this."""

# Files are often misnamed, so the content decides; decoders that call other programs stay out of reach.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")

# Left out: old-style JPEG, ThunderScan, SGI and other historic codecs that nobody tests any more.
TIFF_COMPRESSIONS = {"raw", "packbits", "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "jpeg"}
TIFF_COMPRESSIONS |= {"tiff_ccitt", "group3", "group4", "zstd", "lzma"}

# libtiff gives numbers in the machine's byte order, but PIL unpacks these as big-endian.
NATIVE_ORDER = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}

BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR, TILE_WIDTH, TILE_LENGTH, SAMPLE_FORMAT = 258, 262, 284, 322, 323, 339
ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_lock = threading.Lock()  # of `_whole_only`
_readers, _theirs = 0, False


@dataclass(frozen=True)
class ImageFacts:
    """What the header of an image file says; the pixels may still be damaged."""

    width: int  # as stored; only a TIFF is already upright
    height: int
    mode: str  # PIL's: L, RGB, I;16, ...
    bits: int  # per channel: 1, 8, 12, 16 or 32
    format: str  # JPEG, PNG, ...
    more_frames: bool  # only the first one is used


def decode(path: Path, *, min_side: int = 8, scale: Scale = "range", content: bytes | None = None) -> Image.Image:
    """Read the first frame of one image file as 8-bit RGB with its EXIF orientation applied.

    A JPEG whose short side is at least 896 px is decoded at 1/2, 1/4 or 1/8 scale with the short side still at least
    448 px. Transparency is laid over white. Images of more than 8 bits a channel are scaled:
    `range`: 12 and 16 bits by the range of the type; floats and 32-bit integers, which hardly ever use theirs, as 0..1
    if all values lie in it, else as 0..255 if they lie in that, else by the image's own minimum and maximum.
    `percentile`: from the 1st to the 99th percentile of the image, of all channels together.
    With `content`, the bytes of an image, these are decoded and `path` is only its name in messages.
    Raises `BadImage` for a file that is missing, truncated, no image, smaller than `min_side` px, larger than
    `MAX_PIXELS`, narrower than 1 : `MAX_ASPECT`, or with pixels that are NaN or infinite.
    """
    return decode_sized(path, DRAFT_SIDE, min_side=min_side, scale=scale, content=content)[0]


def decode_sized(
    path: Path, draft_side: int, *, min_side: int = 8, scale: Scale = "range", content: bytes | None = None
) -> tuple[Image.Image, int]:
    """`decode`, and the short side that the file says; a JPEG is reduced to at least `draft_side` px instead of 448."""
    with opened(path, content) as image:
        width, height = image.size
        if min(image.size) < min_side:
            raise BadImage(str(path), f"{width} x {height} px is too small, at least {min_side} px a side are needed")
        if max(image.size) > MAX_ASPECT * min(image.size):
            raise BadImage(str(path), f"{width} x {height} px is too narrow, at most 1 : {MAX_ASPECT} can be used")
        if isinstance(image, PngImageFile):
            _check_png(path, content)
        if isinstance(image, JpegImageFile):
            _draft_(image, draft_side)
        raw = raw_mode(image)
        image.load()
        pixels: Image.Image = image
        if DEEP.match(raw):
            pixels = deep_to_8_bit(image, raw, scale, _low_bytes(path, raw, content) if scale == "percentile" else None)
            pixels = _black_is_zero(pixels, image)
        return _upright(to_rgb(pixels), orientation(image)), min(width, height)


def decode_indices(path: Path) -> NDArray[np.uint8]:
    """(H, W) numbers of classes or objects, from a PNG mask: grey levels or palette entries. Raises `BadImage`."""
    with opened(path) as image:
        if not isinstance(image, PngImageFile) or image.mode not in ("1", "L", "P"):
            kind = f"{image.format} {image.mode}"
            raise BadImage(str(path), f"is {kind}, but a mask is a PNG, 8-bit grey or palette, of class numbers")
        _check_png(path, None)
        spread = {"L;2": 85, "L;4": 17}.get(raw_mode(image), 1)  # PIL stretches these to 0..255
        return np.asarray(image).astype(np.uint8) // np.uint8(spread)


def image_facts(path: Path, content: bytes | None = None) -> ImageFacts:
    """Read only the header of an image file, or of the bytes of one.

    Raises `BadImage` when `decode` would refuse it for its kind or area.
    """
    with opened(path, content) as image:
        width, height = image.size
        mode, bits = image.mode, bits_per_channel(image)
        kind = "JPEG" if isinstance(image, JpegImageFile) else image.format or ""  # not MPO, which is JPEG as well
        return ImageFacts(width, height, mode, bits, kind, _has_second_frame(image))


@contextmanager
def opened(path: Path, content: bytes | None = None) -> Iterator[ImageFile]:
    """The image, not loaded; whatever goes wrong inside the block is a `BadImage`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns about odd metadata, and about sizes we check ourselves
            if content is None and file_size(os.fsencode(path)) is None:  # it was one when the folder was listed
                raise BadImage(str(path), "is a directory, a pipe or a device, not a file")
            # opened by us: PIL maps files that it opens into memory, and scrambles turned TIFFs while at it
            with _whole_only(), _stream(path, content) as file, Image.open(file, formats=FORMATS) as image:
                _check_pixels(image.size, str(path))
                if isinstance(image, TiffImageFile):
                    _check_tiff(image, str(path))
                    _mend_byte_order_(image)
                yield image
    except (BadImage, AdaptkitError):  # the latter comes from a signal handler, not from the file
        raise
    except Exception as error:  # a damaged file makes PIL raise nearly anything: SyntaxError, struct.error, ...
        raise BadImage(str(path), _reason(error, path, content)) from error


def _stream(path: Path, content: bytes | None) -> BinaryIO:
    return path.open("rb") if content is None else io.BytesIO(content)


@contextmanager
def _whole_only() -> Iterator[None]:
    """PIL makes what is missing of a file grey when other code has set its global for that.

    Several threads may read: the first puts the global away, the last puts it back.
    """
    global _readers, _theirs
    with _lock:
        if not _readers:
            _theirs, PIL.ImageFile.LOAD_TRUNCATED_IMAGES = PIL.ImageFile.LOAD_TRUNCATED_IMAGES, False
        _readers += 1
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers:
                PIL.ImageFile.LOAD_TRUNCATED_IMAGES = _theirs


def _check_png(path: Path, content: bytes | None) -> None:
    """Compare the checksums of the pixels, which PIL does not: it makes a picture of zeros from a broken download."""
    with _stream(path, content) as file:
        file.seek(8)  # the signature
        while len(start := file.read(8)) == 8 and start[4:] != b"IEND":
            length = int.from_bytes(start[:4], "big")
            if start[4:] != b"IDAT":
                file.seek(length + 4, os.SEEK_CUR)
            elif zlib.crc32(start[4:] + file.read(length)) != int.from_bytes(file.read(4), "big"):
                raise BadImage(str(path), "the pixels are damaged or cut off")


def _check_pixels(size: tuple[int, int], path: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadImage(path, f"{width} x {height} px is over the limit of {MAX_PIXELS:,} pixels")


def _check_tiff(image: TiffImageFile, path: str) -> None:
    """Refuse the codecs nobody tests, tiles that are bombs, and what PIL would read as noise."""
    tags = image.tag_v2
    compression = str(image.info.get("compression"))
    if compression not in TIFF_COMPRESSIONS:
        raise BadImage(path, f"TIFF compression {compression} is not supported; save it with LZW or deflate")
    _check_pixels((tags.get(TILE_WIDTH, 1), tags.get(TILE_LENGTH, 1)), path)  # a tile may be larger than its image
    planes = tags.get(PLANAR, 1) == 2 and len(image.getbands()) > 1
    if planes and (image.mode not in ("RGB", "RGBA", "CMYK") or set(tags.get(BITS_PER_SAMPLE, ())) != {8}):
        raise BadImage(path, f"TIFF with {image.mode} in separate planes is not supported; save it interleaved")
    if image.mode == "L" and tags.get(SAMPLE_FORMAT, (1,))[0] == 2:
        raise BadImage(path, "TIFF with signed 8-bit pixels is not supported; save it unsigned")


def _mend_byte_order_(image: TiffImageFile) -> None:
    raw = raw_mode(image)
    if image.tile[0][0] == "libtiff" and raw in NATIVE_ORDER:
        _reread_as_(image, NATIVE_ORDER[raw])


def _reread_as_(image: ImageFile, raw: str) -> None:
    """Make PIL unpack the pixels as another raw mode."""
    image.tile = [
        tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw) for tile in image.tile
    ]


def _low_bytes(path: Path, raw: str, content: bytes | None) -> NDArray[np.uint8] | None:
    if raw not in LOW_BYTES:
        return None
    with _stream(path, content) as file, Image.open(file, formats=FORMATS) as image:
        _reread_as_(image, LOW_BYTES[raw])
        return np.asarray(image)


def _black_is_zero(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """PIL turns round 8-bit TIFFs in which 0 is white, but not the deep ones."""
    if isinstance(image, TiffImageFile) and pixels.mode == "L" and image.tag_v2.get(PHOTOMETRIC) == 0:
        return pixels.point(lambda level: 255 - level)
    return pixels


def _draft_(image: JpegImageFile, side: int) -> None:
    if min(image.size) >= 2 * side:
        image.draft(None, (side, side))  # PIL takes the smallest scale that is not below this size


def _has_second_frame(image: Image.Image) -> bool:
    if isinstance(image, JpegImageFile):  # a camera's preview of the same picture
        return False
    try:
        image.seek(1)
    except Exception:  # EOFError; or damaged, but the first frame is all that counts
        return False
    return True


def orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata beside sound pixels: no reason to lose the image
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation in UPRIGHT:
        image = image.transpose(UPRIGHT[orientation])
    image.info = {}  # a tag left behind would let later code turn the image a second time
    return image


def _reason(error: Exception, path: Path, content: bytes | None) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not a readable image file" + _tiff_hint(path, content)
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    text = " ".join(str(error).split())[:200]
    if text.startswith("decoder error"):  # followed by a number of PIL's
        return "the pixels are damaged or cut off"
    return text or type(error).__name__


def _tiff_hint(path: Path, content: bytes | None) -> str:
    """PIL calls a sound TIFF unidentified when it has, say, 64-bit floats or seven channels."""
    try:
        with _stream(path, content) as file:
            start = file.read(4)
    except OSError:
        return ""
    return ": a TIFF that is damaged, or neither grey nor RGB of 8 or 16 bits" if start in PREFIXES else ""
