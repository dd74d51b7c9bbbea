"""Walks folders for images, and remembers what would show that the result is out of date."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaptkit import places
from adaptkit.errors import DataError, MachineError
from adaptkit.sources.source import shown

SUFFIXES = (b".jpg", b".jpeg", b".png", b".webp", b".bmp", b".tif", b".tiff", b".gif")


@dataclass(frozen=True, eq=False)
class Scan:
    """What a listing was made from: the K folders and list files, and how each of them was when it was read."""

    asked: tuple[str, ...]  # absolute paths of the folders and lists the user named
    places: bytes  # K absolute paths, NUL between them
    stamps: NDArray[np.int64]  # (K, 2), see `stamp`


class Scanner:
    """Walks one folder or several; no file is found twice and no link is followed in a circle."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.others: Counter[str] = Counter()  # suffixes of files that are no images
        self.stamps: dict[bytes, tuple[int, int]] = {}  # by absolute path
        self._real_roots = [os.path.realpath(os.fsencode(folder)) for folder in folders]
        self._seen: set[tuple[int, int]] = set()

    def files(self, folder: Path) -> Iterator[tuple[bytes, int]]:
        """(path relative to `folder`, size) of its images, in byte order of the path."""
        base = os.fsencode(folder)
        pending = [b""]  # a stack; folders end in "/", which also puts their content in path order among files
        while pending:
            name = pending.pop()
            if name.endswith(b"/") or not name:
                pending += sorted(self._list(base, name), reverse=True)
            elif name.lower().endswith(SUFFIXES):
                size = file_size(os.path.join(base, name))
                if size is not None:
                    yield name, size
            else:
                self.others[os.fsdecode(os.path.splitext(name)[1].lower())] += 1

    def record(self, asked: Sequence[str | Path]) -> Scan:
        """What was read so far."""
        stamps = np.array(list(self.stamps.values()), dtype=np.int64).reshape(-1, 2)
        return Scan(absolute(asked), b"\0".join(self.stamps), stamps)

    def _list(self, base: bytes, folder: bytes) -> list[bytes]:
        path = os.path.join(base, folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in self._seen:
                return []
            self._seen.add((status.st_dev, status.st_ino))
            self.stamps[os.path.abspath(path)] = stamp(status)
            with os.scandir(path) as entries:
                names = []
                for entry in entries:
                    if entry.name.startswith(b"."):
                        continue
                    link = entry.is_symlink()
                    if not (os.path.isdir(entry.path) if link else entry.is_dir()):  # isdir: it may lead to itself
                        names.append(folder + entry.name)
                    elif not (link and self._overlaps(os.path.realpath(entry.path))):
                        names.append(folder + entry.name + b"/")
                return names
        except OSError as error:
            raise MachineError(
                f"{shown(os.fsdecode(path))}: cannot be listed ({error.strerror}); check the permissions"
            ) from error

    def _overlaps(self, target: bytes) -> bool:
        """Whether a link leads to a root, below one (listed there anyway) or above one (a loop)."""
        return any(inside(target, root) or inside(root, target) for root in self._real_roots)


def absolute(paths: Sequence[str | Path]) -> tuple[str, ...]:
    """The paths as seen from anywhere; links and URLs stay."""
    return tuple(places.absolute(path) for path in paths)


def is_hidden(name: bytes) -> bool:
    """Whether a path relative to what the user named is left out: one of its parts begins with a dot."""
    if not name.startswith(b".") and b"/." not in name:
        return False
    return any(part.startswith(b".") and part not in (b".", b"..") for part in name.split(b"/"))


def nothing_found(place: str | Path, others: Counter[str]) -> DataError:
    """The error about a place without images; `others` counts the suffixes of the files that are there instead."""
    kinds = ", ".join(suffix.decode() for suffix in SUFFIXES[:-1])
    advice = "; check the path"
    if others:
        suffixes = ", ".join(shown(suffix) or "no suffix" for suffix, _ in others.most_common(3))
        advice = f" (but {others.total()} other files: {suffixes}; convert them to PNG or JPEG)"
    if others and others[".tar"] == others.total():
        example = f"{shown(place)}/{{000..{others.total() - 1:03d}}}.tar"
        advice = f" (but {others.total()} tar files; name them, as in --data '{example}')"
    if others[".parquet"]:
        advice = f" (but {others['.parquet']} Parquet files; name them, or a folder that holds nothing else)"
    return DataError(f"{shown(place)}: no {kinds} or {SUFFIXES[-1].decode()} file at any depth{advice}")


def inside(path: bytes, folder: bytes) -> bool:
    """Whether `path` is `folder` or lies below it; both are real paths."""
    return os.path.join(path, b"").startswith(os.path.join(folder, b""))


def stamp(status: os.stat_result) -> tuple[int, int]:
    """(ns of the last change, bytes; -1 for a folder, which changes when a file comes, goes or is renamed)."""
    return status.st_mtime_ns, -1 if stat.S_ISDIR(status.st_mode) else status.st_size


def file_size(path: bytes) -> int | None:
    """Bytes; 0 for a link that leads nowhere; None for what is no file: opening a pipe would wait for ever."""
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else None
