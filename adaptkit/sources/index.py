"""Keeps what a scan found in a file, so that a resumed run does not walk a million files again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from adaptkit.errors import AdaptkitError, DataError, MachineError, UsageError
from adaptkit.sources.folder import FolderSource, evenly_spaced
from adaptkit.sources.images import common_root
from adaptkit.sources.parquet import restore_parquet
from adaptkit.sources.pixels import Scale
from adaptkit.sources.scan import Scan, absolute, file_size, stamp
from adaptkit.sources.shards import TarStore, stamps_of
from adaptkit.sources.source import shown
from adaptkit.sources.store import Store

Arrays = Mapping[str, NDArray[Any]]

FORMAT = "adaptkit.index/1"
NAMES = ("names", "offsets", "sizes", "places", "stamps")
STORE = "store."  # in front of the names of a store's own arrays
STORES: dict[str, Callable[[Arrays, FolderSource, Scan], Store]] = {
    "tar": TarStore.restored,
    "parquet": restore_parquet,
}
SAMPLED_FILES = 1_000


def save_index(file: Path, source: FolderSource) -> None:
    """Write all files that the scan of `source` found, whole or not at all; labels and subsets are not kept.

    `source` comes from `open_images` or `open_folder`, also by way of `subset`. Raises `MachineError` when the file
    cannot be written.
    """
    if source.scan is None:
        raise ValueError("only the source of a scan can be indexed")
    arrays: dict[str, NDArray[Any]] = {
        "names": source.names,
        "offsets": source.offsets,
        "sizes": source.file_sizes,
        "places": np.frombuffer(source.scan.places, dtype=np.uint8),
        "stamps": source.scan.stamps,
    }
    header = {"asked": json.dumps([FORMAT, source.scan.asked]), "store": ""}
    if source.store is not None:
        arrays |= {f"{STORE}{name}": array for name, array in source.store.arrays().items()}
        header["store"] = source.store.kind
    content = save(arrays, header | {"digest": _digest(arrays)})
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            stream.write(content)
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise MachineError(f"{shown(file)}: cannot be written ({error.strerror})") from error


def load_index(file: Path, paths: Sequence[str | Path], scale: Scale = "range") -> FolderSource | None:
    """What `open_images(paths, scale)` would find, or None when it has to be asked.

    That is: no index, a damaged one, one of other paths, a folder, list or shard that has changed since, or a file of
    another size. All folders, lists and shards are looked at, but only 1,000 files, evenly spaced. Of objects behind a
    URL only a new listing tells.
    """
    header, arrays = _read(file)
    if header.get("asked") != json.dumps([FORMAT, absolute(paths)]) or not _fits_together(arrays):
        return None
    kind = header.get("store", "")
    try:
        source = _source(arrays, paths, scale)
        if not kind:
            return source if _is_true(source) else None
        return _with_store(source, kind, arrays) if kind in STORES else None
    # something is gone or out of reach; a path with a NUL; more places than stamps; arrays that do not fit together
    except (OSError, ValueError, KeyError, DataError, MachineError, UsageError):
        return None


def _read(file: Path) -> tuple[Mapping[str, str], Arrays]:
    """The header and the arrays; empty when the file is missing or damaged."""
    try:
        with safe_open(file, framework="numpy") as content:
            header = content.metadata()
            own = sorted(name for name in content.keys() if name.startswith(STORE))  # noqa: SIM118
            arrays = {name: content.get_tensor(name) for name in (*NAMES, *own)}
        return (header, arrays) if header["digest"] == _digest(arrays) else ({}, {})
    except AdaptkitError:  # from a signal handler, not from the file
        raise
    except Exception:  # a damaged header makes safetensors raise nearly anything: TypeError, AttributeError, ...
        return {}, {}


def _digest(arrays: Arrays) -> str:
    digest = blake2b(digest_size=16)
    for name in (*NAMES, *sorted(arrays.keys() - {*NAMES})):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _fits_together(arrays: Arrays) -> bool:
    names, offsets, sizes = (arrays[name] for name in NAMES[:3])
    kinds = [(arrays[name].dtype, arrays[name].ndim) for name in NAMES]
    byte, number = np.dtype(np.uint8), np.dtype(np.int64)
    if kinds != [(byte, 1), (number, 1), (number, 1), (byte, 1), (number, 2)]:
        return False
    return bool(
        len(offsets) == len(sizes) + 1 >= 2
        and offsets[0] == 0
        and offsets[-1] == len(names)
        and (offsets[1:] > offsets[:-1]).all()
        and (sizes >= 0).all()
    )


def _source(arrays: Arrays, paths: Sequence[str | Path], scale: Scale) -> FolderSource:
    return FolderSource(
        root=common_root(paths),
        names=arrays["names"].astype(np.uint8, copy=False),
        offsets=arrays["offsets"].astype(np.int64, copy=False),
        file_sizes=arrays["sizes"].astype(np.int64, copy=False),
        rows=np.arange(len(arrays["sizes"]), dtype=np.int64),
        scale=scale,
        scan=Scan(absolute(paths), arrays["places"].tobytes(), arrays["stamps"].astype(np.int64, copy=False)),
    )


def _with_store(source: FolderSource, kind: str, arrays: Arrays) -> FolderSource | None:
    """With the store that holds the images, if its shards or tables are as they were."""
    own = {name.removeprefix(STORE): array for name, array in arrays.items() if name.startswith(STORE)}
    if source.scan is None:
        return None
    store = STORES[kind](own, source, source.scan)
    if isinstance(store, TarStore):  # its shards may lie behind a URL
        unchanged = np.array_equal(stamps_of(store.shards), source.scan.stamps)
    else:
        unchanged = _are_true(source.scan)
    return replace(source, store=store) if unchanged else None


def _is_true(source: FolderSource) -> bool:
    if source.scan is None or not _are_true(source.scan):
        return False
    sample = evenly_spaced(len(source), SAMPLED_FILES)
    return all(file_size(os.fsencode(source.file(index))) == source.file_sizes[index] for index in sample.tolist())


def _are_true(scan: Scan) -> bool:
    """Whether all folders, lists and tables are as they were."""
    places = zip(scan.places.split(b"\0"), scan.stamps.tolist(), strict=True)
    return all(list(stamp(os.stat(place))) == then for place, then in places)
