"""From an image source to batches of views: which images, in which order, and what to do with a bad one.

Nothing here keeps state between steps: the batch of a step is a function of (seed, step), so a resumed run sees
what an undisturbed one would have seen, and the number of workers changes nothing.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from adaptkit.errors import DataError
from adaptkit.sources import BadImage, Blocks, ImageSource
from adaptkit.views import MultiCrop, Views

GRACE_SECONDS = 30  # of a worker after SIGTERM
MAX_TRIES = 100  # consecutive bad images before a batch gives up

Failure = tuple[str, str]  # path, reason


@dataclass(frozen=True)
class Stuck:
    """In place of a batch: so many bad images in a row that none could be replaced."""

    failures: tuple[Failure, ...]

    def error(self) -> DataError:
        """What the user is told."""
        path, reason = self.failures[0]
        error = DataError(f"{path}: {reason}, and so are the images after it; check the data")
        error.is_local = True  # other processes may have good images
        return error


@dataclass(frozen=True)
class Batch:
    """Views of n images of this process: (n, G, 3, S, S) and (n, L, 3, s, s) uint8, (n, V, 8); bad images met."""

    global_crops: Tensor
    local_crops: Tensor
    factors: Tensor
    failures: tuple[Failure, ...]

    def pin_memory(self) -> Batch:
        """Called by the loader, for fast transfers to a GPU."""
        return Batch(
            self.global_crops.pin_memory(), self.local_crops.pin_memory(), self.factors.pin_memory(), self.failures
        )


Item = tuple[Views | None, tuple[Failure, ...]]
"""The views of an image and the bad images met on the way; no views when there was no good one near."""


class ViewDataset(Dataset[Item]):
    """The views of image `index` in epoch `epoch`; a bad image is replaced by the next good one."""

    def __init__(self, source: ImageSource, multicrop: MultiCrop, seed: int) -> None:
        self.source = source
        self.multicrop = multicrop
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        failures: list[Failure] = []
        for offset in range(min(MAX_TRIES, len(self.source))):
            try:
                image = self.source.read((index + offset) % len(self.source))
            except BadImage as bad:
                failures.append((bad.path, bad.reason))
                continue
            return self.multicrop(image, np.random.default_rng([self.seed, epoch, index])), tuple(failures)
        return None, tuple(failures)  # an error raised in a worker would reach the user as a traceback


class StepSampler(Sampler[list[tuple[int, int]]]):
    """The batches of steps `start` to `stop`, as (epoch, index) pairs: this process's share of each global batch.

    Every epoch is a fresh permutation seeded by (seed, epoch), which keeps the images of `blocks` together where there
    are any; a last incomplete batch is left out.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        process: int = 0,
        num_processes: int = 1,
        blocks: Blocks | None = None,
    ) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.start, self.stop = start, stop
        self.share = batch_size // num_processes
        self.offset = process * self.share
        self.blocks = blocks

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_images // self.batch_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start, self.stop):
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                order = self._order(np.random.default_rng([self.seed, epoch]))
            first = step % steps_per_epoch * self.batch_size + self.offset
            yield [(epoch, int(index)) for index in order[first : first + self.share]]

    def _order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        return self.blocks.shuffled(generator) if self.blocks else generator.permutation(self.num_images)


def collate(items: list[Item]) -> Batch | Stuck:
    """Stack the views of n images."""
    views = [item[0] for item in items if item[0] is not None]
    if len(views) < len(items):
        return Stuck(tuple(failure for item in items for failure in item[1]))
    return Batch(
        torch.stack([view.global_crops for view in views]),
        torch.stack([view.local_crops for view in views]),
        torch.stack([view.factors for view in views]),
        tuple(failure for item in items for failure in item[1]),
    )


def start_worker(worker: int) -> None:
    """Start of a worker: one thread each, the processes are the parallelism.

    A terminal or scheduler signals every process of a job, but the step under way still needs its batch: workers leave
    the answer to the process that trains, which ends them. SIGTERM only sets a limit, lest one stay for ever.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows, where nothing sends SIGTERM to workers either
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_SECONDS))


def view_loader(dataset: ViewDataset, sampler: StepSampler, workers: int, pin_memory: bool) -> DataLoader[Any]:
    """Batches of views in the sampler's order."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=start_worker,
        prefetch_factor=2 if workers else None,
    )
