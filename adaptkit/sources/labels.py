"""Labelled images: class folders or a `path,label` list, with a gallery and queries."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adaptkit.errors import DataError
from adaptkit.places import FILES, kind_of
from adaptkit.sources.folder import FolderSource, from_files
from adaptkit.sources.images import open_folder
from adaptkit.sources.lists import locate, read_table
from adaptkit.sources.pixels import Scale
from adaptkit.sources.source import ImageSource, hash_order, shown

MAX_UNKNOWN = 0.5
"""Share of queries whose class the gallery may lack: a rare class may be missing, but not most of them."""

SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass(frozen=True)
class Labelled:
    """Gallery (what is known) and queries (what is scored), with labels into the same class names."""

    gallery: FolderSource
    queries: FolderSource
    class_names: tuple[str, ...]
    explicit_split: bool  # given by the user, not drawn by us
    left_out: FolderSource | None = None  # queries of classes that the gallery lacks: nothing could find them


def open_labelled(
    data: str | Path, queries: str | Path | None = None, seed: int = 0, scale: Scale = "range"
) -> Labelled:
    """Open class folders (the first part of the path is the class) or a `path,label` CSV.

    With `queries`, `data` is all gallery; with `train/` and `test/` inside, these are gallery and queries; otherwise
    every class is halved by hash of path and seed, the gallery getting the odd image. Raises `DataError` naming the
    first offender: missing file, image outside class folders, no header, fewer than two classes, most queries of
    classes without gallery (a few are `left_out`). `scale` is for images of more than 8 bits, see `decode`.
    """
    for place in (data, queries or data):
        if kind_of([os.fspath(place)]) != ("", FILES):
            raise DataError(
                f"{shown(place)}: labels come from class folders or a .csv on a disk, not from shards or URLs"
            )
    data = Path(data)
    if queries is not None:
        for side in (data, Path(queries)):
            if _has_train_and_test(side):
                raise DataError(f"{shown(side)}: has train/ and test/ inside; name one of them, or leave --queries out")
        return _given_split(data, Path(queries), scale)
    if _has_train_and_test(data):
        return _given_split(data / "train", data / "test", scale)
    source, names = _open(data, scale)
    source = _label(source, names, _class_names(names, data))
    gallery, held = _halve_classes(source, seed)
    if not len(held):
        raise DataError(f"{shown(data)}: one image per class, so none is left to query with; add images or --queries")
    return Labelled(source.subset(gallery), source.subset(held), source.class_names or (), explicit_split=False)


def has_class_folders(root: str | Path) -> bool:
    """Whether every image lies in a class folder and there are two classes or more (also in `train/` and `test/`)."""
    root = Path(root)
    parts = (root / "train", root / "test") if _has_train_and_test(root) else (root,)
    try:
        return os.path.isdir(root) and all(len(set(_open(part)[1])) >= 2 for part in parts)
    except DataError:
        return False


def halve(source: ImageSource, salt: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sorted (selection, report) positions: halves by hash of path and salt, of every class when there are labels.

    Both halves of a class, and of the whole, differ by one image at most.
    """
    order = hash_order((source.path(index) for index in range(len(source))), f"halve {salt}")
    labels = np.array([source.label(index) or 0 for index in range(len(source))], dtype=np.int64)
    by_class = order[np.argsort(labels[order], kind="stable")]
    return np.sort(by_class[0::2]), np.sort(by_class[1::2])


def _given_split(data: Path, queries: Path, scale: Scale) -> Labelled:
    gallery, gallery_names = _open(data, scale)
    held, query_names = _open(queries, scale)
    class_names = _class_names(gallery_names, data)
    known = set(class_names)
    is_known = np.array([name in known for name in query_names])
    unknown = np.flatnonzero(~is_known)
    if len(unknown) > MAX_UNKNOWN * len(held):
        first = int(unknown[0])
        raise DataError(
            f"{shown(held.file(first))}: class {shown(query_names[first])!r} has no image in the gallery {shown(data)}"
            f", nor have those of {len(unknown)} of {len(held)} queries; use the same class names in both"
        )
    kept = held.subset(np.flatnonzero(is_known))
    labelled = _label(kept, [name for name in query_names if name in known], class_names)
    left_out = held.subset(unknown) if len(unknown) else None
    return Labelled(_label(gallery, gallery_names, class_names), labelled, class_names, True, left_out)


def _halve_classes(source: FolderSource, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = hash_order((source.path(index) for index in range(len(source))), f"labels {seed}")
    labels = np.array([source.label(index) for index in range(len(source))], dtype=np.int64)
    gallery: list[int] = []
    queries: list[int] = []
    for label in np.unique(labels):
        members = order[labels[order] == label].tolist()
        half = (len(members) + 1) // 2
        gallery += members[:half]
        queries += members[half:]
    return np.sort(np.array(gallery, dtype=np.int64)), np.sort(np.array(queries, dtype=np.int64))


def _open(path: Path, scale: Scale = "range") -> tuple[FolderSource, list[str]]:
    """The images, without labels yet, and the name of each one's class."""
    if os.path.isfile(path):
        return _read_list(path, scale)
    source = open_folder(path, scale)
    names = []
    for index in range(len(source)):
        name, slash, _ = source.path(index).partition("/")
        if not slash:
            raise DataError(
                f"{shown(source.file(index))}: lies in no class folder; "
                "labelled images are CLASS/IMAGE, or a .csv with path,label"
            )
        names.append(name)
    if set(names) <= SPLIT_FOLDERS:
        found = ", ".join(f"{name}/" for name in sorted(set(names)))
        raise DataError(f"{shown(path)}: {found} are no classes; name train/ and test/, or give gallery and queries")
    return source, names


def _read_list(file: Path, scale: Scale) -> tuple[FolderSource, list[str]]:
    """A CSV with the columns path and label; paths are absolute or relative to the file."""
    rows: dict[bytes, tuple[int, str]] = {}
    for where, (path, label) in read_table(file, ("path", "label")):
        name, size = locate(path, file.parent, file.parent, where)
        if name in rows:
            raise DataError(f"{where}: {shown(os.fsdecode(name))} is listed twice; keep one")
        rows[name] = size, label
    if not rows:
        raise DataError(f"{shown(file)}: lists no image")
    names = sorted(rows)
    source = from_files(file.parent, ((name, rows[name][0]) for name in names), scale)
    return source, [rows[name][1] for name in names]


def _class_names(names: Sequence[str], path: Path) -> tuple[str, ...]:
    class_names = tuple(sorted(set(names)))
    if len(class_names) < 2:
        raise DataError(f"{shown(path)}: only the class {shown(class_names[0])!r}; at least two are needed")
    return class_names


def _label(source: FolderSource, names: Sequence[str], class_names: tuple[str, ...]) -> FolderSource:
    index_of = {name: index for index, name in enumerate(class_names)}
    return source.with_labels((index_of[name] for name in names), class_names)


def _has_train_and_test(root: Path) -> bool:
    return os.path.isdir(root / "train") and os.path.isdir(root / "test")  # unlike Path's they take any text
