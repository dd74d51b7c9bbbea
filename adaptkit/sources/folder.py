"""Images below one root, files or members of a store, held as a few numpy arrays."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adaptkit.sources.blocks import Blocks
from adaptkit.sources.cache import DecodeCache
from adaptkit.sources.decoding import decode
from adaptkit.sources.pixels import Scale
from adaptkit.sources.scan import Scan
from adaptkit.sources.source import BadImage
from adaptkit.sources.store import Store


@dataclass(frozen=True, eq=False)
class FolderSource:
    """N files below `root`.

    The M >= N relative paths lie end to end in one byte array: reading it touches no reference counts, so forked
    workers keep sharing the memory, where a list of strings would be copied page by page into each of them.
    """

    root: Path
    names: NDArray[np.uint8]  # all M paths, end to end
    offsets: NDArray[np.int64]  # (M + 1,) where they begin
    file_sizes: NDArray[np.int64]  # (M,) bytes
    rows: NDArray[np.int64]  # (N,) which of the M files these are
    file_labels: NDArray[np.int64] | None = None  # (M,)
    class_names: tuple[str, ...] | None = None
    scale: Scale = "range"  # of images of more than 8 bits, see `decode`
    scan: Scan | None = None  # what the M files were found by
    cache: DecodeCache | None = None  # large images are read by way of it
    store: Store | None = None  # holds the content of images that are no files of their own

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """(N,) file sizes in bytes; 0 for a link that leads nowhere."""
        return self.file_sizes[self.rows]

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """(N,) indices into `class_names`, or None."""
        return None if self.file_labels is None else self.file_labels[self.rows]

    @property
    def blocks(self) -> Blocks | None:
        """What is cheap to read together; None when any order costs the same."""
        if self.store is None or (rows := self.store.blocks) is None:
            return None
        num_bytes = np.bincount(rows, weights=self.file_sizes).astype(np.int64)
        present, of_images = np.unique(rows[self.rows], return_inverse=True)
        return Blocks(of_images, num_bytes[present])

    def path(self, index: int) -> str:
        """Relative to the root, with `/` between the parts (absolute when a list names a file elsewhere)."""
        row = self.rows[index]
        return os.fsdecode(self.names[self.offsets[row] : self.offsets[row + 1]].tobytes())

    def file(self, index: int) -> Path:
        """Where the file lies; of a member of a store its name, for messages."""
        return self.root / self.path(index)

    def content(self, index: int) -> bytes | None:
        """The encoded image out of a store; None for a file, which need not be read whole. Raises `BadImage`."""
        return None if self.store is None else self.store.read(int(self.rows[index]))

    def label(self, index: int) -> int | None:
        return None if self.file_labels is None else int(self.file_labels[self.rows[index]])

    def read(self, index: int) -> Image.Image:
        """The image, RGB and upright; large JPEGs at reduced scale, and with a cache all large images.

        Raises `BadImage` with the relative path.
        """
        file = self.file(index)
        try:
            content = self.content(index)
            if self.cache:
                return self.cache.read(file, self.scale, content)
            return decode(file, scale=self.scale, content=content)
        except BadImage as error:
            raise BadImage(self.path(index), error.reason) from error

    def subset(self, indices: NDArray[np.int64]) -> FolderSource:
        """The images at these positions, in this order; labels are kept and no path is copied."""
        return replace(self, rows=self.rows[indices])

    def with_labels(self, labels: Iterable[int], class_names: tuple[str, ...]) -> FolderSource:
        """The same images with one label each."""
        file_labels = np.full(len(self.file_sizes), -1, dtype=np.int64)
        file_labels[self.rows] = np.fromiter(labels, dtype=np.int64, count=len(self))
        return replace(self, file_labels=file_labels, class_names=class_names)


def from_files(root: Path, files: Iterable[tuple[bytes, int]], scale: Scale = "range") -> FolderSource:
    """A source from (path relative to `root`, size in bytes), in the order given."""
    names, offsets, sizes = bytearray(), array("q", [0]), array("q")
    for name, size in files:
        names += name
        offsets.append(len(names))
        sizes.append(size)
    return FolderSource(
        root=root,
        names=np.frombuffer(names, dtype=np.uint8),  # no copies: of millions of files they would double the peak
        offsets=np.frombuffer(offsets, dtype=np.int64),
        file_sizes=np.frombuffer(sizes, dtype=np.int64),
        rows=np.arange(len(sizes), dtype=np.int64),
        scale=scale,
    )


def evenly_spaced(count: int, limit: int) -> NDArray[np.int64]:
    """At most `limit` positions of `count`, first and last among them: of sorted files it keeps the folders' shares."""
    return np.unique(np.linspace(0, count - 1, min(count, limit)).round().astype(np.int64))


def fingerprint(source: FolderSource) -> str:
    """Hash of the sorted relative paths and sizes: changes when a file is added, removed, renamed or resized."""

    def path(index: int) -> bytes:
        return os.fsencode(source.path(index))

    sizes, digest, indices = source.sizes, blake2b(digest_size=16), range(len(source))
    in_order = all(one <= other for one, other in pairwise(map(path, indices)))  # of a listing they nearly always are
    for index in indices if in_order else sorted(indices, key=path):
        digest.update(b"%d\0%s\0" % (sizes[index], path(index)))
    return digest.hexdigest()
