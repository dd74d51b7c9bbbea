"""What every source of images offers, and the order by hash that all splits are made from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class BadImage(Exception):
    """One image that cannot be used. Counted by `BadImages`; users see it only when there are too many."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both in args, so that it survives pickling out of a worker
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{shown(self.path)}: {self.reason}"


class ImageSource(Protocol):
    """N images, addressed by index."""

    @property
    def class_names(self) -> tuple[str, ...] | None: ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> Image.Image:
        """The image, RGB and upright. Raises `BadImage`."""
        ...

    def path(self, index: int) -> str:
        """Relative to the source's root, with `/` between the parts; bytes that are not UTF-8 are surrogates."""
        ...

    def label(self, index: int) -> int | None:
        """Index into `class_names`, or None when the source has no labels."""
        ...


def hash_order(names: Iterable[str], salt: str) -> NDArray[np.int64]:
    """Positions of the names, sorted by the hash of salt and name: random-like, and the same for any listing order."""
    prefix = salt.encode() + b"\0"
    digests = bytearray()
    for name in names:
        digests += blake2b(prefix + os.fsencode(name), digest_size=16).digest()
    halves = np.frombuffer(bytes(digests), dtype=">u8").reshape(-1, 2)
    return np.lexsort((halves[:, 1], halves[:, 0])).astype(np.int64)


def shown(path: str | os.PathLike[str]) -> str:
    """A path for a message of one line: line breaks, control characters and bytes that are not UTF-8 are escaped."""
    text = os.fspath(path)
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
