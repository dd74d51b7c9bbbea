"""Images inside tar files (shards, as WebDataset writes them): found once by their headers, each read by itself."""

from __future__ import annotations

import os
import stat
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from adaptkit.errors import DataError, MachineError
from adaptkit.places import absolute, common_folder, scheme, shards_of
from adaptkit.sources.folder import FolderSource, from_files
from adaptkit.sources.pixels import Scale
from adaptkit.sources.remote import MAX_IMAGE_BYTES, THREADS, Remote
from adaptkit.sources.scan import SUFFIXES, Scan, is_hidden, nothing_found, stamp
from adaptkit.sources.source import BadImage, shown
from adaptkit.sources.tar import DamagedTar, Read, members

OPEN_FILES = 64  # of a process, at most
READS = (2**12, 2**20)  # shortest and longest, of headers on a disk
REMOTE_READS = (2**18, 2**22)
MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}

Stamp = tuple[int, int]


class _Open:
    """A file descriptor that is closed with its last user: a thread may still read what another one displaces."""

    def __init__(self, shard: str) -> None:
        self.descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=OPEN_FILES)
def _open(shard: str, expected: Stamp, process: int) -> _Open:
    opened = _Open(shard)
    if stamp(os.fstat(opened.descriptor)) != expected:
        raise BadImage(shard, "its shard has changed since it was indexed")
    return opened


@dataclass(frozen=True, eq=False)
class TarStore:
    """M images in K shards. See `Store`."""

    shards: tuple[str, ...]  # K absolute paths, or URLs
    stamps: NDArray[np.int64]  # (K, 2) when they were indexed
    shard_of: NDArray[np.int32]  # (M,)
    starts: NDArray[np.int64]  # (M,) first byte
    sizes: NDArray[np.int64]  # (M,) bytes
    remote: Remote | None = None

    kind: ClassVar[str] = "tar"
    blocks: ClassVar[None] = None

    def read(self, row: int) -> bytes:
        """The bytes of one member. Raises `BadImage`."""
        number, start, size = int(self.shard_of[row]), int(self.starts[row]), int(self.sizes[row])
        shard = self.shards[number]
        if size > MAX_IMAGE_BYTES:
            raise BadImage(shard, f"{size} bytes are over the limit of {MAX_IMAGE_BYTES} for one image")
        if self.remote is not None:
            content = self.remote.read(shard, start, start + size)
        else:
            try:
                opened = _open(shard, tuple(self.stamps[number].tolist()), os.getpid())
                content = os.pread(opened.descriptor, size, start)
            except OSError as error:
                raise BadImage(shard, error.strerror or "cannot be read") from error
        if len(content) != size:
            raise BadImage(shard, "its shard is cut off")
        return content

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """Where the members lie; sizes, shards and their stamps are in every index."""
        return {"shard_of": self.shard_of, "starts": self.starts}

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]], source: FolderSource, scan: Scan) -> TarStore:
        """The store of an index. Raises `ValueError` or `KeyError` for arrays that do not belong together."""
        shards = tuple(os.fsdecode(place) for place in scan.places.split(b"\0"))
        shard_of, starts, sizes = arrays["shard_of"], arrays["starts"], source.file_sizes
        kinds = [(array.dtype, array.shape) for array in (shard_of, starts, scan.stamps)]
        rows = sizes.shape
        if kinds != [(np.dtype(np.int32), rows), (np.dtype(np.int64), rows), (np.dtype(np.int64), (len(shards), 2))]:
            raise ValueError("arrays of other shapes")
        if not (shard_of >= 0).all() or not (shard_of < len(shards)).all():
            raise ValueError("shards that are not there")
        ends = scan.stamps[shard_of, 1]
        if not ((starts >= 0) & (starts <= ends) & (sizes <= ends - starts)).all():
            raise ValueError("images beyond their shards")
        return cls(shards, scan.stamps, shard_of, starts, sizes, _remote(shards))


@dataclass
class _Found:
    """What one shard holds."""

    images: dict[bytes, tuple[int, int]] = field(default_factory=dict)  # name: first byte, bytes; in their order
    others: Counter[str] = field(default_factory=Counter)  # suffixes of files that are no images
    damage: str = ""


def open_shards(paths: Sequence[str | Path], scale: Scale = "range") -> FolderSource:
    """The images inside the tar files that `paths` name, as `places.shards_of`, by suffix; shard by shard.

    Only headers are read. Of members with one name the last counts, as if the shard were unpacked; hidden ones are left
    out, as in folders. The path of an image is that of its shard, below the common folder, and its name inside. Raises
    `DataError` for shards that are missing, named twice, compressed, damaged or cut off: how many images are lost with
    it nobody knows, so it is never used in part; and for a place without images. Raises `MachineError` for what cannot
    be read.
    """
    named = _named(paths)
    shards = tuple(named)
    remote = _remote(shards)
    stamps = stamps_of(shards)
    shard_of, starts = array("i"), array("q")
    with _found_in(shards, stamps, remote) as all_found:
        images = _gathered(named, all_found, shard_of, starts)
        source = from_files(Path(root_of(shards)), images, scale)
    where = np.frombuffer(shard_of, dtype=np.int32), np.frombuffer(starts, dtype=np.int64)
    return replace(
        source,
        scan=Scan(tuple(map(absolute, paths)), b"\0".join(map(os.fsencode, shards)), stamps),
        store=TarStore(shards, stamps, *where, source.file_sizes, remote),
    )


def root_of(shards: Sequence[str]) -> str:
    """What the paths of images are relative to."""
    return common_folder([shard.rpartition("/")[0] or "/" for shard in shards])


def stamps_of(shards: Sequence[str]) -> NDArray[np.int64]:
    """(K, 2), see `scan.stamp`: what shows that a shard has changed, and its bytes.

    Raises `DataError` for one that is missing or no file, `MachineError` where it cannot be asked for.
    """
    remote = _remote(shards)
    if remote is None:
        return np.array([_stamp(shard) for shard in shards], dtype=np.int64)
    with ThreadPoolExecutor(THREADS) as pool:
        return np.array(list(pool.map(remote.stamp, shards)), dtype=np.int64)


def _named(paths: Sequence[str | Path]) -> dict[str, str]:
    """{absolute path or URL of a shard: the place that named it}, sorted. Raises `DataError` for one named twice."""
    named: dict[str, str] = {}
    real: set[str] = set()
    for place in map(str, paths):
        for shard in map(absolute, shards_of(place)):
            name = os.path.realpath(shard) if os.path.exists(shard) else shard
            if name in real:
                raise DataError(f"{shown(shard)}: is named twice; leave one out")
            real.add(name)
            named[shard] = place
    return dict(sorted(named.items()))


def _remote(shards: Sequence[str]) -> Remote | None:
    return Remote.to(shards) if scheme(shards[0]) else None


def _stamp(shard: str) -> Stamp:
    try:
        status = os.stat(shard)
    except (OSError, ValueError):
        raise DataError(f"{shown(shard)}: no such file; check the path") from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{shown(shard)}: is not a file; check the path")
    return stamp(status)


@contextmanager
def _found_in(shards: Sequence[str], stamps: NDArray[np.int64], remote: Remote | None) -> Iterator[Iterator[_Found]]:
    """What each shard holds, in their order; behind a URL several are read at once."""
    pool = ThreadPoolExecutor(THREADS if remote else 1)
    try:
        yield pool.map(partial(_index, remote), shards, stamps[:, 1].tolist())
    finally:
        pool.shutdown(cancel_futures=True)


def _gathered(
    named: Mapping[str, str], all_found: Iterator[_Found], shard_of: array[int], starts: array[int]
) -> Iterator[tuple[bytes, int]]:
    """(path, bytes) of every image; notes where it lies on the way. Raises `DataError` when all were looked at."""
    root = os.path.join(root_of(tuple(named)), "")
    num_images: Counter[str] = Counter()
    others: dict[str, Counter[str]] = {place: Counter() for place in named.values()}
    damaged = []
    for number, ((shard, place), found) in enumerate(zip(named.items(), all_found, strict=True)):
        prefix = os.fsencode(shard[len(root) :]) + b"/"
        if found.damage:
            damaged.append(f"{shown(shard)}: {found.damage}")
        num_images[place] += len(found.images)
        others[place] += found.others
        for name, (start, size) in found.images.items():
            shard_of.append(number)
            starts.append(start)
            yield prefix + name, size
    if damaged:
        count = f" ({len(damaged)} of {len(named)} shards cannot be used)" if len(named) > 1 else ""
        raise DataError(f"{damaged[0]}{count}")
    for place in others:
        if not num_images[place]:
            raise nothing_found(place, others[place])


def _index(remote: Remote | None, shard: str, size: int) -> _Found:
    """Everything that the headers of one shard say."""
    found = _Found()
    with _reader(remote, shard) as read:
        try:
            for name, start, length in members(read, size, *(REMOTE_READS if remote else READS)):
                name = name[2:] if name.startswith(b"./") else name
                if is_hidden(name):
                    continue
                if name.lower().endswith(SUFFIXES):
                    found.images[name] = start, length
                else:
                    found.others[os.path.splitext(os.fsdecode(name))[1].lower()] += 1
        except DamagedTar as error:
            found.damage = _advice(str(error), read(0, min(size, 8)), len(found.images))
    return found


def _advice(damage: str, first: bytes, num_images: int) -> str:
    for magic, name in MAGIC.items():
        if first.startswith(magic):
            return f"is compressed with {name}, so that no image can be read by itself; decompress it"
    after = f", after {num_images} images" if num_images else ""
    return f"{damage}{after}; copy it again, or leave it out"


@contextmanager
def _reader(remote: Remote | None, shard: str) -> Iterator[Read]:
    if remote is not None:
        yield lambda start, length: remote.read_header(shard, start, start + length)
        return
    try:
        with open(shard, "rb", buffering=0) as file:
            yield lambda start, length: os.pread(file.fileno(), length, start)
    except OSError as error:
        raise MachineError(f"{shown(shard)}: cannot be read ({error.strerror})") from error
