"""The size of an image as `decode` turns it, read from its header."""

from __future__ import annotations

from pathlib import Path

from PIL.TiffImagePlugin import TiffImageFile

from adaptkit.sources.decoding import opened, orientation

TURNED = (5, 6, 7, 8)  # EXIF orientations that lay the image on its side


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of what `decode` gives where it reduces nothing. Raises `BadImage`."""
    with opened(path) as image:
        width, height = image.size
        is_turned = not isinstance(image, TiffImageFile) and orientation(image) in TURNED  # PIL has turned a TIFF
        return (height, width) if is_turned else (width, height)
