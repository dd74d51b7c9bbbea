"""Runs contestants turn by turn. Whoever does not run is stopped, its loader workers with it.

Without the stop, workers would fill their queues while others run, and a slow pipeline would look like a fast one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import click
import psutil

LOG_TAIL = 600  # characters of a failed contestant's log that are shown


class Contestant:
    """A child process that trains; see `turns.Turns` for its side. POSIX only."""

    def __init__(self, name: str, command: Sequence[str], threads: int, log: Path) -> None:
        self.name, self.log = name, log
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,
                text=True,
            )

    def __enter__(self) -> Contestant:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._signal(signal.SIGKILL)
        self.process.communicate()

    def warm_up(self) -> None:
        """Wait for the first turn, which is not measured, and stop it."""
        self._answer()

    def turn(self, steps: int) -> dict[str, float]:
        """Let it run so many steps: seconds and CPU seconds of one step, and the peak memory so far."""
        before = self.cpu_seconds()
        self._signal(signal.SIGCONT)
        if self.process.stdin is None:
            raise click.ClickException(f"{self.name} takes no turns")
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self._answer()
        return {
            "seconds": answer["seconds"] / steps,
            "cpu_seconds": (self.cpu_seconds() - before) / steps,
            "peak_bytes": answer["peak_bytes"],
        }

    def cpu_seconds(self) -> float:
        """Of the process, its living workers and those that have ended."""
        process = psutil.Process(self.process.pid)
        own = process.cpu_times()
        workers = [child.cpu_times() for child in process.children(recursive=True)]
        ended = own.children_user + own.children_system
        return float(sum(times.user + times.system for times in (own, *workers)) + ended)

    def _answer(self) -> dict[str, float]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise click.ClickException(f"{self.name} failed: ...{self.log.read_text()[-LOG_TAIL:]}")
        self._signal(signal.SIGSTOP)
        answer: dict[str, float] = json.loads(line)
        return answer

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)  # it leads the group of its workers
        except ProcessLookupError:
            return


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """Every name is first once in so many rounds."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def race(contestants: Mapping[str, Contestant], rounds: int, steps: int) -> dict[str, dict[str, list[Any]]]:
    """Name -> seconds, cpu_seconds and peak_bytes, one of each per round. All have warmed up."""
    turns: dict[str, dict[str, list[Any]]] = {
        name: {"seconds": [], "cpu_seconds": [], "peak_bytes": []} for name in contestants
    }
    for number in range(rounds):
        for name in rotated(list(contestants), number):
            for key, value in contestants[name].turn(steps).items():
                turns[name][key].append(value)
    return turns
