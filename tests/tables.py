"""Parquet files of small images, for the tests that read them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import draw_image

from adaptkit.sources import blocks, parquet
from adaptkit.sources.parquet_table import ParquetTable

FEATURE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])  # Hugging Face's Image


def jpeg(index: int, px: int = 48) -> bytes:
    """An image of one of four kinds, different for every index."""
    stream = io.BytesIO()
    draw_image(index % 4, index, px).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def feature(images: Iterable[bytes | None]) -> pyarrow.Array:
    """A column as Hugging Face's datasets write it."""
    return pyarrow.array([{"bytes": image, "path": f"{i}.jpg"} for i, image in enumerate(images)], FEATURE)


def write(file: Path, images: Sequence[bytes | None], group: int = 10, **options: Any) -> Path:
    """The images beside a label, `group` rows to a row group."""
    file.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"label": pyarrow.array(range(len(images))), "image": feature(images)})
    pyarrow.parquet.write_table(table, file, row_group_size=group, **options)
    return file


def set_window(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """As if memory were short."""
    for module in (blocks, parquet):
        monkeypatch.setattr(module, "WINDOW_BYTES", num_bytes)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on the list gets the number of every row group that this process reads."""
    groups: list[int] = []
    pieces = ParquetTable.pieces

    def spy(self: ParquetTable, group: int) -> Any:
        groups.append(group)
        return pieces(self, group)

    monkeypatch.setattr(ParquetTable, "pieces", spy)
    return groups
