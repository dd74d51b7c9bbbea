"""What several processes do as one: they share batches, and agree on errors, signals and bad images.

The collectives are Accelerate's. With one process everything here is what it would be without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from adaptkit.errors import AdaptkitError
from adaptkit.sources import BadImages

T = TypeVar("T")
Failure = tuple[str, str]  # path, reason


def everywhere(work: Callable[[], T]) -> T:
    """`work()` in every process. If it fails in some, all raise the error of the first of them.

    That holds for errors a user can mend. A bug stays where it is, and the launcher ends the other processes.
    """
    result: T | None = None
    error: AdaptkitError | OSError | None = None
    try:
        result = work()
    except (AdaptkitError, OSError) as raised:
        if PartialState().num_processes == 1:
            raise
        error = raised
    for each in gather_object([error]):
        if each is not None:
            each.is_local = False  # every process raises it, the main one speaks
            raise each
    return cast(T, result)


def on_main(work: Callable[[], T]) -> T | None:
    """`work()` in the main process alone, the others wait; if it fails, all raise its error."""
    return everywhere(lambda: work() if PartialState().is_main_process else None)


def main_first(work: Callable[[], T]) -> T:
    """`work()` in the main process, then, with what that left on the disk, in the others; errors as in `everywhere`."""
    mine = on_main(work)
    return everywhere(lambda: cast(T, mine) if PartialState().is_main_process else work())


def in_any(flag: bool) -> bool:
    """Whether `flag` is true in any process."""
    return any(gather_object([flag]))


@dataclass(frozen=True)
class Share:
    """The batches of a pass over images that this process takes: every `num_processes`-th.

    Whole batches, so that each is composed as it would be with one process, and its result the same to the bit.
    """

    process: int = 0
    num_processes: int = 1

    @classmethod
    def mine(cls) -> Share:
        """This process's among all of the launch."""
        return cls(PartialState().process_index, PartialState().num_processes)

    def batches(self, num_images: int, batch_size: int) -> list[range]:
        """The indices of each batch."""
        starts = range(self.process * batch_size, num_images, self.num_processes * batch_size)
        return [range(start, min(start + batch_size, num_images)) for start in starts]

    def gather(self, results: Sequence[T]) -> list[T]:
        """What all processes made of their batches, none of it None, in the order of the batches."""
        if self.num_processes == 1:
            return list(results)
        rounds = zip_longest(*gather_object([list(results)]))
        return [result for each in rounds for result in each if result is not None]


ALONE = Share()


class Noticed:
    """Bad images met in training, on their way to the run's list.

    One process counts them at once. Several keep them until `share`, which all call: the count, the list and the error
    when there are too many are then the same everywhere.
    """

    def __init__(self, bad: BadImages) -> None:
        self.bad = bad
        self.waiting: list[Failure] = []

    def __call__(self, failures: Iterable[Failure]) -> None:
        """Take in what a batch met."""
        self.waiting += failures
        if self.waiting and PartialState().num_processes == 1:
            self.share()

    def share(self) -> None:
        """Count what all processes have met. Raises `DataError`, `MachineError` as `BadImages.add`."""
        failures, self.waiting = gather_object(self.waiting), []
        self.count(failures)

    def count(self, failures: Iterable[Failure]) -> None:
        """Count what every process knows already, as after a shared pass. Raises as `share`."""
        everywhere(lambda: self.bad.add_all(failures))


@torch.no_grad()
def average_statistics_(network: nn.Module) -> None:
    """Give all processes the mean of their BatchNorm statistics: each has seen its share of the batch only."""
    if PartialState().num_processes == 1:
        return
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    statistics = [each for norm in norms for each in (norm.running_mean, norm.running_var) if each is not None]
    if statistics:
        means = reduce(torch.cat(statistics), "mean").split([len(each) for each in statistics])
        torch._foreach_copy_(statistics, list(means))
