"""Which images are trained on, which choose the checkpoint, and which report the result."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adaptkit.errors import DataError
from adaptkit.sources.folder import FolderSource
from adaptkit.sources.scan import file_size
from adaptkit.sources.source import BadImage, ImageSource, hash_order

MIN_IMAGES = 8
MIN_HELD_OUT = 2  # one image always finds itself again: nothing could be measured on it
MAX_HELD_OUT = 2_000
DIGEST_BYTES = 64  # of blake2b
SALT = "split"

Parts = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


@dataclass(frozen=True)
class Split:
    """Sorted, disjoint positions in the source."""

    train: NDArray[np.int64]
    selection: NDArray[np.int64]
    report: NDArray[np.int64]


def split(source: ImageSource, split_by: Literal["file", "folder"]) -> Split:
    """Hold out 10 % of the images for selection and 10 % for the report (under 500 images 15 %), at most 2,000 each.

    The hash of the relative path decides: the answer depends neither on a seed nor on the order of the listing. By
    folder, the images of one parent folder stay together, because neighbouring frames of a video would leak; images of
    such a folder beyond the 2,000 are in no part. Raises `DataError` for fewer than 8 images, or by folder for
    fewer than 3 folders.
    """
    num_images = len(source)
    if num_images < MIN_IMAGES:
        raise DataError(f"{num_images} images are too few to split; at least {MIN_IMAGES} are needed, add some")
    share = 0.15 if num_images < 500 else 0.10
    count = min(max(round(share * num_images), MIN_HELD_OUT), MAX_HELD_OUT)
    order = hash_order(map(source.path, range(num_images)), SALT)  # not a list: of 10 million it takes a gigabyte
    if split_by == "file":
        train, selection, report = order[2 * count :], order[:count], order[count : 2 * count]
    else:
        train, selection, report = _by_folder(list(map(source.path, range(num_images))), order, count)
    return Split(np.sort(train), np.sort(selection), np.sort(report))


def _by_folder(paths: list[str], order: NDArray[np.int64], count: int) -> Parts:
    """Train, selection and report positions; `order` is the files' order by hash."""
    members: dict[str, list[int]] = {}
    for index in order.tolist():
        members.setdefault(paths[index].rpartition("/")[0], []).append(index)
    if len(members) < 3:
        raise DataError(
            f"split_by folder needs images in at least 3 folders and found {len(members)}; use --set data.split_by=file"
        )
    names = list(members)
    folders = [members[names[index]] for index in hash_order(names, SALT)]
    selection, folders = _take(folders, count, leave=2)
    report, folders = _take(folders, count, leave=1)
    train = [index for folder in folders for index in folder]
    return np.array(train), np.array(selection), np.array(report)


def _take(folders: list[list[int]], count: int, leave: int) -> tuple[list[int], list[list[int]]]:
    """(positions of whole folders with about `count` images together, at most 2,000 of them; the folders left).

    In order of hash, passing over a folder that would make it more than half too many again: one folder may hold nearly
    everything. When that leaves too little, the smallest folders are taken whatever their size.
    """
    left, taken = list(folders), list[int]()
    for folder in folders:
        if len(taken) < count and len(left) > leave and len(taken) + len(folder) <= 1.5 * count:
            taken += folder
            left.remove(folder)
    while len(taken) < max(count / 2, 1) and len(left) > leave:
        smallest = min(left, key=len)
        taken += smallest
        left.remove(smallest)
    return taken[:MAX_HELD_OUT], left


def same_content(source: FolderSource, others: Iterable[FolderSource]) -> NDArray[np.int64]:
    """Sorted positions in `source` of files that are, byte for byte, also in one of `others`.

    Only files of a size that occurs on both sides are read. A file that cannot be read equals nothing.
    """
    sizes = source.sizes
    known: set[bytes] = set()
    shared: set[int] = set()
    for other in others:
        candidates = np.flatnonzero(np.isin(other.sizes, sizes))
        shared.update(other.sizes[candidates].tolist())
        known.update(_digests(other, candidates).values())
    candidates = np.flatnonzero(np.isin(sizes, sorted(shared)))
    equal = [index for index, digest in _digests(source, candidates).items() if digest in known]
    return np.array(equal, dtype=np.int64)


def _digests(source: FolderSource, indices: NDArray[np.int64]) -> dict[int, bytes]:
    return {i: digest for i in indices.tolist() if (digest := image_digest(source, i)) is not None}


def image_digest(source: FolderSource, index: int) -> bytes | None:
    """Of an image's bytes, 64 bytes long; None when they cannot be read. A file is never held in memory as a whole."""
    if source.store is not None:
        try:
            return hashlib.blake2b(source.store.read(int(source.rows[index]))).digest()
        except BadImage:
            return None
    file = source.file(index)
    if file_size(os.fsencode(file)) is None:  # a pipe by now
        return None
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "blake2b").digest()
    except OSError:
        return None
