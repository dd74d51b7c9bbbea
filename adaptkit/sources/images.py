"""Opens unlabelled images: folders and lists of files, tar shards, Parquet files, what lies behind URLs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

from adaptkit.errors import DataError
from adaptkit.places import TAR, kind_of, shards_of
from adaptkit.sources.folder import FolderSource, from_files
from adaptkit.sources.lists import is_list, locate, read_paths
from adaptkit.sources.parquet import open_parquet, parquet_files
from adaptkit.sources.pixels import Scale
from adaptkit.sources.scan import Scanner, absolute, inside, nothing_found, stamp
from adaptkit.sources.shards import open_shards, root_of
from adaptkit.sources.source import shown
from adaptkit.sources.urls import open_urls


def open_folder(root: str | Path, scale: Scale = "range") -> FolderSource:
    """All images below `root` at any depth, by suffix, sorted by the bytes of their relative path.

    Hidden files and folders are left out. Links to files are followed; links to folders are too, unless they lead into
    or above `root` or to a folder already listed, so no loop and no image twice. A link that leads nowhere is listed:
    reading it is a `BadImage`, not a silent loss. `scale` is for images of more than 8 bits, see `decode`. Raises
    `DataError` when `root` is missing, a file, or without images, `MachineError` when a folder may not be listed.
    """
    if os.path.exists(root) and not os.path.isdir(root):
        raise DataError(f"{shown(root)}: is a file, not a folder of images")
    return open_images([root], scale)


def open_images(paths: Sequence[str | Path], scale: Scale = "range") -> FolderSource:
    """The images of one or several folders and lists, sorted by the bytes of their path below the common root.

    Tar shards are `open_shards`, Parquet files `open_parquet`, URLs `open_urls`; nothing else may stand beside these.
    One folder is `open_folder`. Several things lie below their common parent. A list is a .txt with a path per line or
    a .csv with a column `path`, relative to the list's folder or absolute; an image that is listed twice, or also lies
    in one of the folders, counts once. Raises `DataError` for what is missing, named twice, inside another of the
    folders, neither folder nor list, or without images.
    """
    if not paths:
        raise DataError("no images: name a folder or a list")
    protocol, kind = kind_of([os.fspath(path) for path in paths])
    if kind == TAR:
        return open_shards(paths, scale)
    if protocol:
        return open_urls(paths, scale)
    places = [Path(path) for path in paths]
    if tables := parquet_files(places):
        return open_parquet(tables, common_root(paths), paths, scale)
    for place in places:
        if not os.path.exists(place):
            raise DataError(f"{shown(place)}: no such folder{' or list' if is_list(place) else ''}; check the path")
        if not place.is_dir() and not (place.is_file() and is_list(place)):
            raise DataError(f"{shown(place)}: is neither a folder nor a list (.txt, or .csv with a column path)")
    _check_distinct(places)
    root = common_root(paths)
    scanner = Scanner([place for place in places if place.is_dir()])
    found: Iterable[tuple[bytes, int]] = (file for place in places for file in _files(place, root, scanner))
    if len(places) > 1 or not places[0].is_dir():  # a single folder comes sorted, and may be too large to hold
        found = _each_once(found, root)
    return replace(from_files(root, found, scale), scan=scanner.record(paths))


def common_root(paths: Sequence[str | Path]) -> Path:
    """What the paths of `open_images(paths)` are relative to; those of a URL are known by listing it only."""
    if kind_of([os.fspath(path) for path in paths])[1] == TAR:
        return Path(root_of([shard for path in absolute(paths) for shard in shards_of(path)]))
    folders = [Path(path) if os.path.isdir(path) else Path(path).parent for path in paths]
    return folders[0] if len(folders) == 1 else Path(os.path.commonpath(absolute(folders)))


def _check_distinct(places: Sequence[Path]) -> None:
    for one, other in permutations(places, 2):
        first, second = (os.path.realpath(os.fsencode(place)) for place in (one, other))
        if first == second:
            raise DataError(f"{shown(other)}: is named twice; leave one out")
        if one.is_dir() and inside(first, second):
            raise DataError(f"{shown(one)}: lies inside {shown(other)}, which is named too; leave one out")


def _files(place: Path, root: Path, scanner: Scanner) -> Iterator[tuple[bytes, int]]:
    """(path relative to `root`, size) of what one folder or list holds; `DataError` when that is nothing."""
    num_files = 0
    before = Counter(scanner.others)
    for file in _listed(place, root, scanner) if place.is_file() else _walked(place, root, scanner):
        num_files += 1
        yield file
    if not num_files and place.is_file():
        raise DataError(f"{shown(place)}: lists no image")
    if not num_files:
        raise nothing_found(place, scanner.others - before)


def _walked(folder: Path, root: Path, scanner: Scanner) -> Iterator[tuple[bytes, int]]:
    below = os.path.relpath(folder, root)
    prefix = b"" if below == "." else os.fsencode(below.replace(os.sep, "/")) + b"/"
    return ((prefix + name, size) for name, size in scanner.files(folder))


def _listed(file: Path, root: Path, scanner: Scanner) -> Iterator[tuple[bytes, int]]:
    scanner.stamps[os.fsencode(os.path.abspath(file))] = stamp(file.stat())
    base = os.path.abspath(file.parent)
    for where, path in read_paths(file):
        found = locate(path, file.parent, root, where)
        folder = os.fsencode(os.path.dirname(os.path.join(base, path)))
        if folder not in scanner.stamps:  # its time changes when a listed file goes
            scanner.stamps[folder] = stamp(os.stat(folder))
        yield found


def _each_once(files: Iterable[tuple[bytes, int]], root: Path) -> Iterator[tuple[bytes, int]]:
    """Sorted; a file outside `root` may be listed both relative and absolute."""
    base = os.fsencode(os.path.abspath(root))
    seen = set()
    for name, size in sorted(files):
        place = os.path.normpath(os.path.join(base, name))
        if place not in seen:
            seen.add(place)
            yield name, size
