"""Lists of image files: one path per line (.txt), or a table with a header (.csv)."""

from __future__ import annotations

import csv
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from adaptkit.errors import DataError
from adaptkit.sources.source import shown

SUFFIXES = (".txt", ".csv")
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def is_list(path: Path) -> bool:
    """Whether the name says that the file is a list."""
    return path.suffix.lower() in SUFFIXES


def read_paths(file: Path) -> Iterator[tuple[str, str]]:
    """(where it stands, for messages; the path as written) of every image in a list.

    In a .txt blank lines and lines that start with # are left out; in a .csv the column `path` counts.
    """
    if file.suffix.lower() == ".csv":
        yield from ((where, cells[0]) for where, cells in read_table(file, ("path",)))
        return
    for number, line in enumerate(_lines(file), start=1):
        path = line.strip()
        if path and not path.startswith("#"):
            yield f"{shown(file)} line {number}", path


def read_table(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(where it stands, the cells of these columns) of every row. Raises `DataError` for a wrong header or a gap."""
    lines = _lines(file)
    first = csv.reader(lines)
    reader = csv.reader(lines, strict=True)  # else a quote that is not closed swallows all rows after it
    try:
        header = next(first, [])
        positions = _positions(header, columns, file)
        for row in reader:
            if not row:
                continue
            where = f"{shown(file)} line {first.line_num + reader.line_num}"
            if len(row) <= max(positions) or not all(row[position].strip() for position in positions):
                raise DataError(f"{where}: {shown(','.join(row))[:80]!r} needs a {' and a '.join(columns)}")
            if any(cell.strip() for cell in row[len(header) :]):
                raise DataError(f"{where}: has more cells than the header; put quotes around what has a comma in it")
            yield where, [row[position].strip() for position in positions]
    except csv.Error as error:
        raise DataError(f"{shown(file)}: cannot be read as a {','.join(columns)} list ({error})") from None


def locate(path: str, folder: Path, root: Path, where: str) -> tuple[bytes, int]:
    """(path relative to `root`, size in bytes) of a file that is listed relative to `folder` or absolute.

    A file that is listed absolute and lies elsewhere stays absolute. Raises `DataError` when there is no such file.
    """
    file = os.path.join(folder, path)
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        raise DataError(f"{where}: no such file {shown(file)[:300]}; paths are relative to the list's folder") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{where}: {shown(file)} is not a file; a list names image files")
    base, name = os.path.abspath(root), os.path.normpath(path)
    if not os.path.isabs(path):
        name = os.path.relpath(os.path.join(os.path.abspath(folder), name), base)
    elif name.startswith(os.path.join(base, "")):
        name = os.path.relpath(name, base)
    return os.fsencode(name.replace(os.sep, "/")), status.st_size


def refuse_pipe(file: Path) -> None:
    """Raises `DataError` for a list that one would wait for, or that never ends."""
    if os.path.exists(file) and not (file.is_file() or file.is_dir()):
        raise DataError(f"{shown(file)}: is a pipe or a device; save the list as a file")


def _positions(header: Sequence[str], columns: Sequence[str], file: Path) -> list[int]:
    words = [word.strip() for word in header]
    if all(column in words for column in columns):
        for column in columns:
            if words.count(column) > 1:
                raise DataError(f"{shown(file)}: has {words.count(column)} columns {column}; keep one")
        return [words.index(column) for column in columns]
    line = ",".join(header)
    for separator, name in SEPARATORS.items():
        if all(column in [word.strip(' "') for word in line.split(separator)] for column in columns):
            raise DataError(f"{shown(file)}: the columns are separated by {name}; save it with commas between them")
    wanted = f"{'the header ' if len(columns) > 1 else 'a header with the column '}{','.join(columns)}"
    raise DataError(f"{shown(file)}: the first line must be {wanted} and is {shown(line)[:80]!r}")


def _lines(file: Path) -> Iterator[str]:
    refuse_pipe(file)
    try:
        # surrogateescape: file names need not be UTF-8; utf-8-sig: spreadsheets write a byte order mark
        with file.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
            for line in lines:
                if "\0" in line:
                    raise DataError(f"{shown(file)}: is not UTF-8 text (UTF-16?); save it as UTF-8")
                yield line
    except OSError as error:
        raise DataError(f"{shown(file)}: cannot be read ({error.strerror})") from None
