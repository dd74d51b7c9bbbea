"""Images in the rows of Parquet files: `FILE.parquet/00000012` is row 12."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptkit.errors import AdaptkitError, DataError
from adaptkit.places import expand
from adaptkit.sources.blocks import WINDOW_BYTES
from adaptkit.sources.folder import FolderSource, from_files
from adaptkit.sources.parquet_table import MAX_SHOWN, ParquetTable, import_parquet, open_table, reason
from adaptkit.sources.pixels import Scale
from adaptkit.sources.scan import SUFFIXES, Scan, absolute, stamp
from adaptkit.sources.source import BadImage, shown

SUFFIX = ".parquet"
ARRAYS = {"files": (np.uint8, 1), "stamps": (np.int64, 2), "groups": (np.int64, 2), "ends": (np.int64, 1)}
ARRAYS |= {"num_bytes": (np.int64, 1)}


class Kept:
    """The row groups that this process read last. Another process, by fork or by pickle, begins with none."""

    def __init__(self) -> None:
        self.process, self.lock = os.getpid(), Lock()
        self.groups: OrderedDict[int, list[Any]] = OrderedDict()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def forget_other_process_(self) -> None:
        """A lock or an arrow array of the process that this one was forked from must not be used."""
        if self.process != os.getpid():
            self.process, self.lock, self.groups = os.getpid(), Lock(), OrderedDict()


@dataclass(frozen=True, eq=False)
class ParquetStore:
    """The M rows of F files, in R row groups that are not empty."""

    files: tuple[bytes, ...]  # F absolute paths
    stamps: NDArray[np.int64]  # (F, 2), see `stamp`
    groups: NDArray[np.int64]  # (R, 2) file, number of the row group in it
    ends: NDArray[np.int64]  # (R,) rows up to the end of each
    num_bytes: NDArray[np.int64]  # (R,) of the images in it
    kept: Kept = field(default_factory=Kept, repr=False)

    @property
    def kind(self) -> str:
        return "parquet"

    @property
    def blocks(self) -> NDArray[np.int64]:
        """(M,) the row group of each row: one image costs reading all of it."""
        return np.repeat(np.arange(len(self.ends)), np.diff(self.ends, prepend=0))

    def read(self, row: int) -> bytes:
        """The encoded image. Raises `BadImage` for an empty row, or a file that is gone, damaged or has changed."""
        group = int(np.searchsorted(self.ends, row, side="right"))
        first = int(self.ends[group - 1]) if group else 0
        self.kept.forget_other_process_()
        with self.kept.lock:
            try:
                value = _at(self._row_group(group), row - first)
            except (AdaptkitError, MemoryError):  # from a signal handler; the machine's fault
                raise
            except Exception as error:  # a damaged file makes pyarrow raise nearly anything
                name = os.fsdecode(self.files[self.groups[group, 0]])
                raise BadImage(
                    f"{name}/{row - first}", f"row group {self.groups[group, 1]}: {reason(error)}"
                ) from error
        if not value:
            raise BadImage(f"row {row}", "the row has no image" if value is None else "the row's image has no bytes")
        return value

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """What `restore_parquet` takes."""
        files = np.frombuffer(b"\0".join(self.files), dtype=np.uint8)
        return {"files": files} | {name: getattr(self, name) for name in ARRAYS if name != "files"}

    def _row_group(self, group: int) -> list[Any]:
        """Its pieces. Room is made before reading: there are never more than `WINDOW_BYTES`, or one row group."""
        groups = self.kept.groups
        if group in groups:
            groups.move_to_end(group)
            return groups[group]
        while groups and sum(int(self.num_bytes[held]) for held in (*groups, group)) > WINDOW_BYTES:
            groups.popitem(last=False)
        number, inside = self.groups[group].tolist()
        now = stamp(os.stat(self.files[number]))
        if now != tuple(self.stamps[number].tolist()):
            raise ValueError("the file has changed since its rows were listed")
        pieces = list(open_table(self.files[number], now, os.getpid()).pieces(inside))
        groups[group] = pieces
        return pieces


def _at(pieces: Sequence[Any], position: int) -> bytes | None:
    for piece in pieces:
        if position < len(piece):
            value: bytes | None = piece[position].as_py()
            return value
        position -= len(piece)
    raise ValueError("it has fewer rows than it should have")


def parquet_files(places: Sequence[Path]) -> list[Path]:
    """The Parquet files that the places stand for, as braces and folders of nothing else do; none: they are others.

    Raises `DataError` when Parquet files and other things are given together.
    """
    found = [_parquet_files_of(place) for place in places]
    for place, files in zip(places, found, strict=True):
        if not files and any(found):
            raise DataError(f"{shown(place)}: Parquet files and other images cannot be given together; leave one out")
    return [file for files in found for file in files]


def _parquet_files_of(place: Path) -> list[Path]:
    if not os.path.isdir(place):
        files = [place] if os.path.exists(place) else [Path(name) for name in expand(str(place))]
        return files if all(file.suffix.lower() == SUFFIX for file in files) else []
    names: list[bytes] = []
    try:
        with os.scandir(os.fsencode(place)) as entries:
            for entry in entries:
                name = entry.name.lower()
                if name.startswith(b"."):
                    continue
                if entry.is_dir() or name.endswith(SUFFIXES):
                    return []  # folders or images: the scan of folders has the word
                if name.endswith(os.fsencode(SUFFIX)):
                    names.append(entry.name)
    except OSError:
        return []  # it says so too
    return [place / os.fsdecode(name) for name in sorted(names)]


def open_parquet(
    files: Sequence[Path], root: Path, asked: Sequence[str | Path], scale: Scale = "range"
) -> FolderSource:
    """The rows of all files, sorted by the files' paths below `root`. The images are read once, to know their sizes.

    Raises `DataError` for a file that is missing, given twice, damaged, encrypted, without a column of images or with
    another one than the first, for row groups too large to hold, and when there are no rows; `UsageError` without
    pyarrow.
    """
    import_parquet()
    _refuse_twice(files)
    base = os.path.abspath(root)
    places = [os.path.abspath(file) for file in files]
    prefixes = {place: os.fsencode(os.path.relpath(place, base).replace(os.sep, "/")) + b"/" for place in places}
    places.sort(key=prefixes.__getitem__)
    found = _Found()
    source = from_files(root, (row for place in places for row in _rows(place, prefixes[place], found)), scale)
    if not len(source):
        raise DataError(f"{', '.join(shown(file) for file in files)}"[:MAX_SHOWN] + ": no rows, and so no images")
    store = found.store()
    folders = [os.path.abspath(path) for path in asked if os.path.isdir(path)]  # change when a file comes or goes
    stamps = [*store.stamps.tolist(), *(stamp(os.stat(folder)) for folder in folders)]
    looked_at = b"\0".join([*store.files, *map(os.fsencode, folders)])
    return replace(source, store=store, scan=Scan(absolute(asked), looked_at, np.array(stamps, dtype=np.int64)))


def restore_parquet(arrays: Mapping[str, NDArray[Any]], source: FolderSource, scan: Scan) -> ParquetStore:
    """The store of an index. Raises `ValueError` or `KeyError` for arrays that do not belong together, `UsageError`."""
    import_parquet()
    if any((arrays[name].dtype, arrays[name].ndim) != (np.dtype(kind), ndim) for name, (kind, ndim) in ARRAYS.items()):
        raise ValueError("arrays of other types")
    files, stamps, groups, ends, num_bytes = (arrays[name] for name in ARRAYS)
    store = ParquetStore(tuple(files.tobytes().split(b"\0")), stamps, groups, ends, num_bytes)
    if not (
        np.array_equal(stamps, scan.stamps[: len(store.files)])
        and scan.places.split(b"\0")[: len(store.files)] == list(store.files)
        and groups.shape == (len(ends), 2)
        and num_bytes.shape == ends.shape
        and (np.diff(ends, prepend=0) > 0).all()
        and ends[-1:].tolist() == [len(source.file_sizes)]
        and ((groups >= 0) & (groups < [len(store.files), 1 << 31])).all()
        and (num_bytes >= 0).all()
    ):
        raise ValueError("arrays that do not fit together")
    return store


@dataclass
class _Found:
    """What the files turned out to hold, so far."""

    files: list[bytes] = field(default_factory=list)
    stamps: list[tuple[int, int]] = field(default_factory=list)
    groups: list[tuple[int, int]] = field(default_factory=list)
    num_rows: list[int] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    first: ParquetTable | None = None

    def store(self) -> ParquetStore:
        return ParquetStore(
            files=tuple(self.files),
            stamps=np.array(self.stamps, dtype=np.int64),
            groups=np.array(self.groups, dtype=np.int64),
            ends=np.cumsum(self.num_rows, dtype=np.int64),
            num_bytes=np.array(self.num_bytes, dtype=np.int64),
        )


def _rows(place: str, prefix: bytes, found: _Found) -> Iterator[tuple[bytes, int]]:
    """(name, bytes) of every row of one file, which is added to `found`."""
    table = _open(place, found)
    found.first = found.first or table
    if table.leaf != found.first.leaf:
        raise DataError(
            f"{table.name}: its images are in the column {shown(table.leaf)}, those of {found.first.name} in "
            f"{shown(found.first.leaf)}; give files of one table"
        )
    row = 0
    for group in range(table.num_groups):
        with _told(place):
            sizes = table.sizes(group)
        if len(sizes):
            found.groups.append((len(found.files) - 1, group))
            found.num_rows.append(len(sizes))
            found.num_bytes.append(int(sizes.sum()))
        for size in sizes.tolist():
            yield prefix + b"%08d" % row, size
            row += 1


def _open(place: str, found: _Found) -> ParquetTable:
    try:
        status = os.stat(place)
    except (OSError, ValueError):
        raise DataError(f"{shown(place)}: no such file; check the path") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{shown(place)}: is not a file; give Parquet files")
    found.files.append(os.fsencode(place))
    found.stamps.append(stamp(status))
    with _told(place):
        return open_table(os.fsencode(place), found.stamps[-1], os.getpid())


@contextmanager
def _told(place: str) -> Iterator[None]:
    """A damaged file makes pyarrow raise nearly anything, MemoryError for a number of bytes that is wrong included."""
    try:
        yield
    except AdaptkitError:
        raise
    except Exception as error:
        raise DataError(
            f"{shown(place)}: cannot be read as a Parquet file ({reason(error)}); write it again, or leave it out"
        ) from error


def _refuse_twice(files: Sequence[Path]) -> None:
    seen: set[str] = set()
    for file in files:
        real = os.path.realpath(file)
        if real in seen:
            raise DataError(f"{shown(file)}: is given twice; leave one out")
        seen.add(real)
