"""Sums of what a step reports, kept on the device between lines of the log, and the clock beside them."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from adaptkit.objectives import Objective


class Meter:
    """Collects `log_every` steps, then gives one record. Reading it is the loop's only host synchronisation."""

    def __init__(self, accelerator: Accelerator, objective: Objective) -> None:
        self.accelerator, self.objective = accelerator, objective
        self.total_images, self.total_seconds, self.total_wait = 0, 0.0, 0.0
        self.restart()

    def restart(self) -> None:
        """Start an empty window."""
        self.sums: dict[str, Tensor] = {}
        self.num_steps, self.num_images, self.wait = 0, 0, 0.0
        self.started = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Time the step waited for its batch."""
        self.wait += seconds

    def exclude(self, seconds: float) -> None:
        """Time that was not training's, such as an evaluation in the middle of a window."""
        self.started += seconds

    def add(self, report: dict[str, Tensor], num_images: int) -> None:
        """One step's report, and its images over all processes."""
        for name, value in report.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.num_steps += 1
        self.num_images += num_images

    def shares(self) -> list[dict[str, Tensor]]:
        """The window's sums so far, of each process."""
        shares: list[dict[str, Tensor]] = gather_object([{name: value.cpu() for name, value in self.sums.items()}])
        return shares

    def read(self) -> dict[str, float]:
        """The window's numbers over all processes; starts the next window."""
        names = sorted(self.sums)
        flat = torch.cat([self.sums[name].double().flatten() for name in names])
        flat = self.accelerator.reduce(flat, reduction="sum")
        parts = flat.cpu().split([self.sums[name].numel() for name in names])
        sums = {name: part.view(self.sums[name].shape) for name, part in zip(names, parts, strict=True)}
        steps = self.num_steps * self.accelerator.num_processes
        seconds = time.perf_counter() - self.started
        record = self.objective.summary(sums, steps)
        record["grad_norm"] = float(sums["grad_norm"]) / steps
        record["images_per_second"] = self.num_images / seconds
        record["data_wait_percent"] = 100 * self.wait / seconds
        self.total_images += self.num_images
        self.total_seconds += seconds
        self.total_wait += self.wait
        self.restart()
        return record
