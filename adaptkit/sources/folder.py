"""A folder of images, or a list of files, held as a few numpy arrays."""

from __future__ import annotations

import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from adaptkit.errors import DataError, MachineError
from adaptkit.sources.decoding import decode
from adaptkit.sources.source import BadImage, shown

SUFFIXES = (b".jpg", b".jpeg", b".png")


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

    def path(self, index: int) -> str:
        """Relative to the root, with `/` between the parts (absolute when a list names a file elsewhere)."""
        row = self.rows[index]
        return os.fsdecode(self.names[self.offsets[row] : self.offsets[row + 1]].tobytes())

    def file(self, index: int) -> Path:
        """Where the file lies."""
        return self.root / self.path(index)

    def label(self, index: int) -> int | None:
        return None if self.file_labels is None else int(self.file_labels[self.rows[index]])

    def read(self, index: int) -> Image.Image:
        """The image, RGB and upright; large JPEGs at reduced scale. Raises `BadImage` with the relative path."""
        try:
            return decode(self.file(index))
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


def open_folder(root: str | Path) -> FolderSource:
    """All JPEG and PNG files below `root` at any depth, by suffix, sorted by the bytes of their relative path.

    Hidden files and folders are left out. Links to files are followed; links to folders are too, unless they lead into
    or above `root` or to a folder already listed, so no loop and no image twice. A link that leads nowhere is listed:
    reading it is a `BadImage`, not a silent loss. Raises `DataError` when `root` is missing, a file, or without
    images, `MachineError` when a folder may not be listed.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"{shown(root)}: no such folder; check the path")
    if not root.is_dir():
        raise DataError(f"{shown(root)}: is a file, not a folder of images")
    others: Counter[str] = Counter()
    source = from_files(root, _walk(root, others))
    if not len(source):
        raise DataError(f"{shown(root)}: no .jpg, .jpeg or .png file at any depth{_describe(others)}")
    return source


def from_files(root: Path, files: Iterable[tuple[bytes, int]]) -> FolderSource:
    """A source from (path relative to `root`, size in bytes), in the order given."""
    names, offsets, sizes = bytearray(), array("q", [0]), array("q")
    for name, size in files:
        names += name
        offsets.append(len(names))
        sizes.append(size)
    return FolderSource(
        root=root,
        names=np.frombuffer(bytes(names), dtype=np.uint8),
        offsets=np.array(offsets, dtype=np.int64),
        file_sizes=np.array(sizes, dtype=np.int64),
        rows=np.arange(len(sizes), dtype=np.int64),
    )


def fingerprint(source: FolderSource) -> str:
    """Hash of the sorted relative paths and sizes: changes when a file is added, removed, renamed or resized."""
    sizes = source.sizes
    paths = sorted((os.fsencode(source.path(index)), index) for index in range(len(source)))
    digest = blake2b(digest_size=16)
    for path, index in paths:
        digest.update(b"%d\0%s\0" % (sizes[index], path))
    return digest.hexdigest()


def _walk(root: Path, others: Counter[str]) -> Iterator[tuple[bytes, int]]:
    """(relative path, size) in byte order of the path; suffixes of files that are no images are counted in `others`."""
    base = os.fsencode(root)
    real_root = os.path.realpath(base)
    seen: set[tuple[int, int]] = set()
    pending = [b""]  # a stack; folders end in "/", which also puts their content in path order among files
    while pending:
        name = pending.pop()
        if name.endswith(b"/") or not name:
            pending += sorted(_list_folder(base, name, real_root, seen), reverse=True)
        elif name.lower().endswith(SUFFIXES):
            size = _file_size(os.path.join(base, name))
            if size is not None:
                yield name, size
        else:
            others[os.fsdecode(os.path.splitext(name)[1].lower())] += 1


def _list_folder(base: bytes, folder: bytes, real_root: bytes, seen: set[tuple[int, int]]) -> list[bytes]:
    path = os.path.join(base, folder)
    try:
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            return []
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(path) as entries:
            names = []
            for entry in entries:
                if entry.name.startswith(b"."):
                    continue
                link = entry.is_symlink()
                if not (os.path.isdir(entry.path) if link else entry.is_dir()):  # isdir: a link may lead to itself
                    names.append(folder + entry.name)
                elif not (link and _overlaps(os.path.realpath(entry.path), real_root)):
                    names.append(folder + entry.name + b"/")
            return names
    except OSError as error:
        raise MachineError(f"{shown(os.fsdecode(path))}: cannot be listed ({error.strerror})") from error


def _overlaps(target: bytes, real_root: bytes) -> bool:
    """Whether a link leads to the root, below it (listed there anyway) or above it (a loop)."""
    below, above = os.path.join(real_root, b""), os.path.join(target, b"")
    return above.startswith(below) or below.startswith(above)


def _file_size(path: bytes) -> int | None:
    """Bytes; 0 for a link that leads nowhere; None for what is no file: opening a pipe would wait for ever."""
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _describe(others: Counter[str]) -> str:
    if not others:
        return ""
    kinds = ", ".join(shown(suffix) or "no suffix" for suffix, _ in others.most_common(3))
    return f" (but {others.total()} other files: {kinds}; convert them to PNG or JPEG)"
