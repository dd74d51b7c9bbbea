"""An order of images that reads neighbours together, for stores in which one image costs a whole block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW_BYTES = 1 << 28
"""Images are shuffled within windows of blocks of at most this size. Every loader process needs all blocks of a window,
so this is also what a store keeps in the memory of each: with what Arrow needs besides, 0.4 to 0.5 GB per process."""

FILLED = 0.9  # share of a window that is used: whole blocks do not fill it exactly


@dataclass(frozen=True, eq=False)
class Blocks:
    """Which of R blocks each of N images lies in, and what it costs to read one."""

    of_images: NDArray[np.int64]  # (N,) 0 ... R - 1
    num_bytes: NDArray[np.int64]  # (R,) also of images that are not among the N

    def shuffled(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """(N,) a permutation of the images: blocks in random order, and the images of a window in random order.

        A window is one block or several that together fit into `WINDOW_BYTES`. When all do, it is a permutation like
        any other.
        """
        blocks = generator.permutation(len(self.num_bytes))
        windows = np.empty(len(blocks), dtype=np.int64)
        windows[blocks] = windows_of(self.num_bytes[blocks], WINDOW_BYTES)
        images = generator.permutation(len(self.of_images))
        return images[np.argsort(windows[self.of_images[images]], kind="stable")]

    @property
    def per_window(self) -> float:
        """About how many blocks an image is shuffled with; infinite when one window holds all."""
        windows = windows_of(self.num_bytes, WINDOW_BYTES)  # another order may need one more or less
        return len(windows) / (windows[-1] + 1) if windows[-1] else float("inf")


def windows_of(sizes: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """(R,) which window each of these blocks falls into, in this order: 0, 0, 1, ...

    No window is larger than `limit` unless it is a single block. They are about equal, lest a small one at the end
    shuffles hardly anything.
    """
    total = int(sizes.sum())
    count = -int(-total // (FILLED * limit)) if total > limit else 1
    windows = np.empty(len(sizes), dtype=np.int64)
    window = held = seen = 0
    for block, size in enumerate(sizes.tolist()):
        if held and (held + size > limit or seen * count >= total * (window + 1)):
            window, held = window + 1, 0
        windows[block] = window
        held, seen = held + size, seen + size
    return windows
