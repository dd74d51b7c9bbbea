"""A contestant's side of the race: it trains, and after every turn waits until the referee gives it the next.

Nothing but the standard library and torch, because LightlyTrain's driver runs in an environment of its own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time

import torch

WARM_STEPS = 2  # the first steps allocate memory and start workers


class Turns:
    """Counts steps. A turn is so many steps in a row; the first one, which is not measured, warms up."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print must not be taken for an answer
        self.left = WARM_STEPS
        self.started = time.perf_counter()

    def step_done(self) -> None:
        """Call it after every step. At the end of a turn it answers, and comes back when the next one begins."""
        self.left -= 1
        if self.left:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._answer({"seconds": time.perf_counter() - self.started, "peak_bytes": peak_bytes()})
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # the referee is gone; loader workers end with their parent
        self.left = int(line)
        self.started = time.perf_counter()

    def _answer(self, answer: dict[str, float]) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()


def peak_bytes() -> int:
    """Of the GPU as allocated by torch, else of this process without its workers."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
