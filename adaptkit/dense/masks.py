"""Masks: one number per pixel, of a class or an object."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaptkit.errors import DataError
from adaptkit.sources import BadImage, decode_indices
from adaptkit.sources.source import shown

IGNORED = 255  # belongs to nothing and is not scored


def read_mask(file: Path) -> NDArray[np.uint8]:
    """(H, W) numbers. Raises `DataError` for what is no 8-bit grey or palette PNG."""
    try:
        return decode_indices(file)
    except BadImage as bad:
        raise DataError(f"{shown(file)}: {bad.reason}; save it anew") from None


def check_size(mask: NDArray[np.uint8], file: Path, size: tuple[int, int], image: Path) -> None:
    """Raises `DataError` unless the mask has the height and width of its image."""
    if mask.shape != size:
        raise DataError(
            f"{shown(file)}: is {mask.shape[1]} x {mask.shape[0]} px but {shown(image.name)} {size[1]} x {size[0]}; "
            "a mask has the size of its image"
        )
