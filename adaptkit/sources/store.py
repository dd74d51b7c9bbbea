"""Where the bytes of images lie that are no files of their own: shards, tables, object stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Store(Protocol):
    """The content of M images, by row; picklable and cheap to copy into loader processes.

    Rows are those of `FolderSource.names`. Nothing is opened before the first read of a process.
    """

    @property
    def kind(self) -> str:
        """A word for the index and the manifest: `tar`, `parquet`, `url`."""
        ...

    @property
    def blocks(self) -> NDArray[np.int64] | None:
        """(M,) which rows are cheap to read together, as 0, 1, ...; None when any order costs the same."""
        ...

    def read(self, row: int) -> bytes:
        """The encoded image. Raises `BadImage` for what is gone, cut off or out of reach."""
        ...

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """What an index has to keep to make this store again."""
        ...
