"""Images that are objects behind a URL: listed once, each read by itself."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from adaptkit.errors import DataError
from adaptkit.places import absolute, common_folder, common_start
from adaptkit.sources.folder import FolderSource, from_files
from adaptkit.sources.pixels import Scale
from adaptkit.sources.remote import MAX_IMAGE_BYTES, Remote
from adaptkit.sources.scan import SUFFIXES, Scan, is_hidden, nothing_found
from adaptkit.sources.source import BadImage, shown


@dataclass(frozen=True, eq=False)
class UrlStore:
    """M objects below one prefix. See `Store`."""

    remote: Remote
    prefix: str  # of the paths, as the file system names them
    names: NDArray[np.uint8]  # as in FolderSource
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]  # (M,) bytes when they were listed

    kind: ClassVar[str] = "url"
    blocks: ClassVar[None] = None

    def read(self, row: int) -> bytes:
        """The object, as long as it was when it was listed. Raises `BadImage`."""
        size = int(self.sizes[row])
        name = os.fsdecode(self.names[self.offsets[row] : self.offsets[row + 1]].tobytes())
        if size > MAX_IMAGE_BYTES:
            raise BadImage(name, f"{size} bytes are over the limit of {MAX_IMAGE_BYTES} for one image")
        # a range: of a whole object s3fs asks for the size first, which doubles the time of a small one
        return self.remote.read(self.prefix + name, *((0, size) if size else ()))

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """Nothing: what is there now only a listing tells."""
        return {}


def open_urls(paths: Sequence[str | Path], scale: Scale = "range") -> FolderSource:
    """The images below one or several URLs of one protocol, at any depth, by suffix, sorted by the bytes of their path.

    Hidden ones are left out, as in folders. Raises `DataError` for a place that is missing, named twice, inside another
    one, or without images, `MachineError` where nothing can be reached, `UsageError` when a package is missing.
    """
    urls = [_trimmed(absolute(path)) for path in paths]
    remote = Remote.to(urls)
    bases = [remote.path(url) for url in urls]
    _check_distinct(urls, bases)
    prefix = common_start(bases)
    prefix += "/" if prefix or bases[0].startswith("/") else ""
    found = [entry for url, base in zip(urls, bases, strict=True) for entry in _images(remote, url, base, prefix)]
    source = from_files(Path(common_folder(urls)), sorted(found), scale)
    return replace(
        source,
        scan=Scan(tuple(absolute(path) for path in paths), b"", np.empty((0, 2), dtype=np.int64)),
        store=UrlStore(remote, prefix, source.names, source.offsets, source.file_sizes),
    )


def _images(remote: Remote, url: str, base: str, prefix: str) -> list[tuple[bytes, int]]:
    """(path after `prefix`, bytes) of the images below one place."""
    found: list[tuple[bytes, int]] = []
    others: Counter[str] = Counter()
    for path, size in remote.files(url):
        if path.rstrip("/") == base:
            raise DataError(f"{shown(url)}: is a file; give the folder that its images lie in")
        name = os.fsencode(path[len(base) + 1 :])
        if is_hidden(name):
            continue
        if name.lower().endswith(SUFFIXES):
            found.append((os.fsencode(path[len(prefix) :]), size))
        else:
            others[os.path.splitext(path)[1].lower()] += 1
    if not found:
        raise nothing_found(url, others)
    return found


def _trimmed(url: str) -> str:
    trimmed = url.rstrip("/")
    return trimmed if "://" in trimmed else url


def _check_distinct(urls: Sequence[str], bases: Sequence[str]) -> None:
    for one, other in permutations(range(len(urls)), 2):
        if bases[one] == bases[other]:
            raise DataError(f"{shown(urls[other])}: is named twice; leave one out")
        if f"{bases[one]}/".startswith(f"{bases[other]}/"):
            raise DataError(f"{shown(urls[one])}: lies inside {shown(urls[other])}, which is named too; leave one out")
