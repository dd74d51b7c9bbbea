"""Files of embeddings: Parquet, NumPy, safetensors. Written part by part, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from adaptkit.errors import UsageError, did_you_mean
from adaptkit.run import atomic, write_text

Part = tuple[list[str], list[str] | None, NDArray[np.float32], NDArray[np.uint8] | None]
"""Paths, classes, vectors (n, D), packed codes (n, bytes)."""


class Writer(Protocol):
    """One kind of file."""

    def files(self, output: Path, codes: bool) -> list[Path]:
        """What `write` makes."""
        ...

    def write(self, output: Path, parts: Iterable[Part], num_images: int, dim: int, num_bits: int | None) -> None:
        """Write all parts."""
        ...


class ParquetFile:
    """Columns `path`, `label` (images in class folders), `vector` (list of float32), `code` (binary)."""

    def files(self, output: Path, codes: bool) -> list[Path]:
        return [output]

    def write(self, output: Path, parts: Iterable[Part], num_images: int, dim: int, num_bits: int | None) -> None:
        arrow, parquet = _pyarrow()
        with atomic(output) as temporary:
            file = None
            try:
                for paths, classes, vectors, codes in parts:
                    columns: dict[str, Any] = {"path": arrow.array([_text(path) for path in paths], arrow.string())}
                    if classes is not None:
                        columns["label"] = arrow.array([_text(name) for name in classes], arrow.string())
                    offsets = np.arange(0, vectors.size + 1, dim, dtype=np.int32)
                    columns["vector"] = arrow.ListArray.from_arrays(offsets, vectors.ravel())
                    if codes is not None:
                        columns["code"] = arrow.array([row.tobytes() for row in codes], arrow.binary())
                    table = arrow.table(columns)
                    file = file or parquet.ParquetWriter(temporary, table.schema)
                    file.write_table(table)
            finally:
                if file is not None:
                    file.close()


class NumpyFile:
    """`NAME.npy` (N, D) float32; beside it `NAME.paths.json`, `NAME.labels.json` and `NAME.codes.npy` (N, bytes)."""

    def files(self, output: Path, codes: bool) -> list[Path]:
        return [output, output.with_suffix(".paths.json"), *([output.with_suffix(".codes.npy")] if codes else [])]

    def write(self, output: Path, parts: Iterable[Part], num_images: int, dim: int, num_bits: int | None) -> None:
        paths: list[str] = []
        classes: list[str] = []
        num_bytes = -(-(num_bits or 0) // 8)
        with atomic(output) as one, atomic(output.with_suffix(".codes.npy")) as other:
            vectors = _memmap(one, np.float32, (num_images, dim))
            packed = _memmap(other, np.uint8, (num_images, num_bytes)) if num_bytes else None
            for part in parts:
                rows = slice(len(paths), len(paths) + len(part[0]))
                vectors[rows] = part[2]
                if packed is not None:
                    packed[rows] = part[3]
                paths += part[0]
                classes += part[1] or []
            vectors.flush()
            if packed is not None:
                packed.flush()
        if packed is None:
            output.with_suffix(".codes.npy").unlink()
        write_text(output.with_suffix(".paths.json"), json.dumps(paths) + "\n")
        if classes:
            write_text(output.with_suffix(".labels.json"), json.dumps(classes) + "\n")


class SafetensorsFile:
    """Tensors `vectors` (N, D) float32, `codes` (N, bytes) uint8, and as bytes of a JSON list `paths` and `labels`.

    The one kind that is put together in memory.
    """

    def files(self, output: Path, codes: bool) -> list[Path]:
        return [output]

    def write(self, output: Path, parts: Iterable[Part], num_images: int, dim: int, num_bits: int | None) -> None:
        listed = list(parts)
        tensors: dict[str, Any] = {"vectors": np.concatenate([part[2] for part in listed])}
        if num_bits is not None:
            tensors["codes"] = np.concatenate([part[3] for part in listed if part[3] is not None])
        tensors["paths"] = _as_bytes(part[0] for part in listed)
        if listed[0][1] is not None:
            tensors["labels"] = _as_bytes(part[1] or [] for part in listed)
        with atomic(output) as temporary:
            save_file(tensors, temporary)


WRITERS: dict[str, Writer] = {".parquet": ParquetFile(), ".npy": NumpyFile(), ".safetensors": SafetensorsFile()}


def writer_for(output: Path) -> Writer:
    """By the suffix. Raises `UsageError` for another one, or when Parquet's library is missing."""
    if output.suffix not in WRITERS:
        hint = did_you_mean(output.suffix, WRITERS)
        raise UsageError(
            f"{output}: write the suffix {', '.join(WRITERS)}, which says what kind of file you want{hint}"
        )
    if output.suffix == ".parquet":
        _pyarrow()
    return WRITERS[output.suffix]


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError("Parquet needs pyarrow; pip install 'adaptkit[parquet]', or write .npy") from None
    return pyarrow, pyarrow.parquet


def _memmap(file: Path, kind: type, shape: tuple[int, int]) -> Any:
    return np.lib.format.open_memmap(file, mode="w+", dtype=kind, shape=shape)


def _as_bytes(texts: Iterable[list[str]]) -> NDArray[np.uint8]:
    """In a tensor, because the header of a safetensors file has a limit."""
    return np.frombuffer(json.dumps(list(chain.from_iterable(texts))).encode(), dtype=np.uint8)


def _text(path: str) -> str:
    """Parquet's texts are UTF-8: bytes that are not are escaped, as in `shown`."""
    return path if path.isascii() else os.fsencode(path).decode("utf-8", "backslashreplace")
