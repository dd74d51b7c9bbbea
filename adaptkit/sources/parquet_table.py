"""The column of images in a Parquet file: which one it is, and its row groups in pieces of bounded size."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptkit.errors import DataError, UsageError
from adaptkit.sources.source import shown

IMAGE_NAMES = ("image", "img", "jpg", "png", "bytes", "content")
MAX_OPEN = 8  # files; the footer of one with many row groups takes longer to read than a row group
MAX_GROUP_BYTES = 1 << 30  # every loader process holds at least one row group
GOOD_GROUP_BYTES = 1 << 24
PIECE_BYTES, MAX_PIECE_ROWS = 1 << 23, 256
BUFFER_BYTES = 1 << 20
MAX_SHOWN = 300  # characters of a list of columns


@dataclass(frozen=True, eq=False)
class ParquetTable:
    """One open file. Its methods raise whatever pyarrow does."""

    name: str  # for messages
    file: Any  # pyarrow.parquet.ParquetFile
    leaf: str  # the column's path, as in `image.bytes`

    @property
    def num_groups(self) -> int:
        return int(self.file.num_row_groups)

    def num_rows(self, group: int) -> int:
        return int(self.file.metadata.row_group(group).num_rows)

    def pieces(self, group: int) -> Iterator[Any]:
        """Binary arrays of pyarrow: the images of a row group in order, about 8 MB at a time."""
        import pyarrow

        about = self.file.metadata.row_group(group)
        # of all columns: to ask for one that is encrypted ends the process
        num_rows = max(1, min(MAX_PIECE_ROWS, about.num_rows * PIECE_BYTES // max(1, about.total_byte_size)))
        options = {"row_groups": [group], "columns": [self.leaf], "use_threads": False}
        for batch in self.file.iter_batches(num_rows, **options):
            values = batch.column(0)
            yield values.field("bytes") if pyarrow.types.is_struct(values.type) else values

    def sizes(self, group: int) -> NDArray[np.int64]:
        """(rows,) bytes of each image, 0 where there is none. Raises `DataError` for a row group that is too large."""
        import pyarrow.compute

        found, total = [np.empty(0, dtype=np.int64)], 0
        for piece in self.pieces(group):
            lengths = pyarrow.compute.fill_null(pyarrow.compute.binary_length(piece), 0)
            found.append(lengths.to_numpy(zero_copy_only=False).astype(np.int64))
            total += int(found[-1].sum())
            if total > MAX_GROUP_BYTES:  # the footer counts images that are repeated once
                raise self._too_large(group)
        sizes = np.concatenate(found)
        if len(sizes) != self.num_rows(group):
            raise ValueError(f"row group {group} has {len(sizes)} rows and should have {self.num_rows(group)}")
        return sizes

    def _too_large(self, group: int) -> DataError:
        fitting = max(1, self.num_rows(group) * GOOD_GROUP_BYTES // MAX_GROUP_BYTES)
        return DataError(
            f"{self.name}: row group {group} holds over {MAX_GROUP_BYTES / 1e9:.1f} GB of images, and every loader "
            f"process has to keep one in memory; write the file again with row_group_size={fitting} or less"
        )


@lru_cache(maxsize=MAX_OPEN)
def open_table(file: bytes, stamp: tuple[int, int], process: int) -> ParquetTable:
    """The open file, kept open. `stamp` and `process` are those of now: neither a changed file nor a handle of a parent
    process is used again. Raises `DataError` if no column holds images, `UsageError`, and whatever pyarrow does.
    """
    parquet = import_parquet()
    from pyarrow import OSFile

    opened = parquet.ParquetFile(
        OSFile(file, "rb"), buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
    )
    name = shown(os.fsdecode(file))
    return ParquetTable(name, opened, image_column(opened.schema_arrow, name))


def import_parquet() -> Any:
    """The module `pyarrow.parquet`. Raises `UsageError` when it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError("Parquet files are read with pyarrow; pip install 'adaptkit[parquet]'") from None
    return pyarrow.parquet


def image_column(schema: Any, name: str) -> str:
    """Path of the column that holds encoded images.

    Hugging Face's Image feature (a struct with `bytes`), else a binary column; among several the one with a usual name.
    Raises `DataError` that names the columns.
    """
    from pyarrow import types

    def is_binary(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    names = [field.name for field in schema if schema.names.count(field.name) == 1]
    kinds = {column: schema.field(column).type for column in names}
    features = [
        column
        for column, kind in kinds.items()
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 and is_binary(kind.field("bytes").type)
    ]
    for columns, suffix in ((features, ".bytes"), ([c for c, kind in kinds.items() if is_binary(kind)], "")):
        if column := _usual(columns):
            return column + suffix
    present = shown(", ".join(f"{field.name} ({field.type})" for field in schema))[:MAX_SHOWN] or "none"
    raise DataError(
        f"{name}: cannot tell which column holds images; there are: {present}; encoded images are expected in a binary "
        "column `image`, or in one of Hugging Face's Image feature"
    )


def _usual(columns: Sequence[str]) -> str | None:
    for name in IMAGE_NAMES:
        for column in columns:
            if column.lower() == name:
                return column
    return columns[0] if len(columns) == 1 else None


def reason(error: Exception) -> str:
    """Why pyarrow could not read, in a few words."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    return shown(" ".join(str(error).split())[:200]) or type(error).__name__
