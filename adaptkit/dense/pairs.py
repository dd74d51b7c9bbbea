"""Images and their masks, in two folders with the same names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adaptkit.dense.masks import IGNORED, check_size, read_mask
from adaptkit.errors import DataError, MachineError
from adaptkit.sources import BadImage, upright_size
from adaptkit.sources.source import hash_order, shown

IMAGES, MASKS = "images", "masks"
SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Pair:
    """An image and its mask."""

    image: Path
    mask: Path


@dataclass(frozen=True)
class Pairs:
    """What the head is fitted to and what it is scored on; classes are 0 .. num_classes - 1."""

    train: Sequence[Pair]
    test: Sequence[Pair]
    num_classes: int


def open_pairs(data: Path, queries: Path | None, seed: int) -> Pairs:
    """Training and test images, their masks looked through.

    A folder holds images/NAME.jpg or .png and masks/NAME.png with a class number per pixel, 255 where none counts. With
    `queries` that folder is the test and `data` the training; with train/ and test/ inside, these are; otherwise `data`
    is halved by hash of name and seed, and training gets the odd image. Classes are those up to the largest number in
    the training masks (of all masks, where we halved). Raises `DataError` naming the first offender: an image without a
    mask or the other way round, another size, no 8-bit grey or palette PNG, a number beyond the classes.
    """
    inner = (data / "train", data / "test")
    is_split = all(os.path.isdir(part) for part in inner)
    if queries is not None:
        if is_split:
            raise DataError(f"{shown(data)}: has train/ and test/ inside; name one of them, or leave --queries out")
        return _given(_pairs_of(data), _pairs_of(queries))
    if is_split:
        return _given(_pairs_of(inner[0]), _pairs_of(inner[1]))
    pairs = _pairs_of(data)
    if len(pairs) < 2:
        raise DataError(f"{shown(data)}: one image, so none is left to score; add images or --queries")
    order = hash_order((pair.mask.name for pair in pairs), f"masks {seed}")
    half = (len(pairs) + 1) // 2
    train, test = ([pairs[index] for index in np.sort(part)] for part in (order[:half], order[half:]))
    return Pairs(train, test, _num_classes(pairs))


def _given(train: Sequence[Pair], test: Sequence[Pair]) -> Pairs:
    num_classes = _num_classes(train)
    for pair in test:
        largest = _largest(pair)
        if largest >= num_classes:
            raise DataError(
                f"{shown(pair.mask)}: has class {largest}, but those of the training masks are 0 to {num_classes - 1}; "
                f"add training images of it, or set its pixels to {IGNORED}"
            )
    return Pairs(train, test, num_classes)


def _num_classes(pairs: Sequence[Pair]) -> int:
    num_classes = 1 + max(_largest(pair) for pair in pairs)
    if num_classes < 2:
        raise DataError(
            f"{shown(pairs[0].mask.parent)}: the masks have only class 0 ({IGNORED} counts as none); "
            "number the classes 0, 1, ..."
        )
    return num_classes


def _largest(pair: Pair) -> int:
    """The largest class of a mask, -1 if all of it is ignored. Raises `DataError` for a mask of another size."""
    mask = read_mask(pair.mask)
    try:
        size = upright_size(pair.image)[::-1]
    except BadImage as bad:
        raise DataError(f"{shown(pair.image)}: {bad.reason}; mend it, or take it and its mask away") from None
    check_size(mask, pair.mask, size, pair.image)
    known = mask[mask != IGNORED]
    return int(known.max()) if known.size else -1


def _pairs_of(folder: Path) -> list[Pair]:
    images = _by_stem(folder / IMAGES, SUFFIXES)
    masks = _by_stem(folder / MASKS, (".png",))
    for stem, image in images.items():
        if stem not in masks:
            raise DataError(f"{shown(image)}: has no mask {MASKS}/{shown(stem)}.png; add it, or take the image away")
    for stem, mask in masks.items():
        if stem not in images:
            raise DataError(f"{shown(mask)}: has no image of that name in {IMAGES}/; add it, or take the mask away")
    if not images:
        raise DataError(f"{shown(folder)}: no pair of {IMAGES}/NAME.jpg and {MASKS}/NAME.png; add some")
    return [Pair(image, masks[stem]) for stem, image in images.items()]


def _by_stem(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """Files by name without suffix, in order of the name; hidden ones are left out."""
    found: dict[str, Path] = {}
    for name in listed(folder):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in suffixes and not name.startswith("."):
            if stem in found:
                raise DataError(f"{shown(folder / name)}: {shown(found[stem].name)} has the same name; keep one")
            found[stem] = folder / name
    return found


def listed(folder: Path) -> list[str]:
    """Sorted names inside. Raises `DataError` for a folder that is missing, `MachineError` for one that is closed."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise DataError(f"{shown(folder)}: no such folder; check the path and its layout") from None
    except OSError as error:
        raise MachineError(f"{shown(folder)}: cannot be listed ({error.strerror}); check its permissions") from None
