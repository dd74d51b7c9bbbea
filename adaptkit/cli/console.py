"""The Reporter of the command line: a progress bar on a terminal, plain lines elsewhere, all of it on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from adaptkit.cli.failure import drop_output, one_line
from adaptkit.cli.verbose import LOG
from adaptkit.report.numbers import change_text, value_text

if TYPE_CHECKING:
    from adaptkit.backbones import LoadReport

LINES = 10  # plain lines of training over a run, unless that is slower than ...
MAX_SILENCE = 600.0  # ... one line in this many seconds
NAMES_SHOWN = 5


def is_main_process() -> bool:
    """In a launch of several processes only the first prints."""
    return int(os.environ.get("RANK", "0")) == 0


class StreamConsole(Console):
    """A console on one stream: no ANSI codes off a terminal, and a reader that went away ends no training."""

    def __init__(self, stream: TextIO, quiet: bool = False) -> None:
        silent = quiet or not is_main_process()
        super().__init__(file=stream, force_terminal=stream.isatty(), force_jupyter=False, quiet=silent, emoji=False)

    def on_broken_pipe(self) -> None:
        """Print nothing from here on."""
        self.quiet = True
        drop_output(self.file)


class RichReporter:
    """Prints what training reports. A context manager, so that no error leaves a live bar behind."""

    def __init__(self, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.console = StreamConsole(stream or sys.stderr, quiet)
        self.begun = self.last_line = time.monotonic()
        self.title, self.phase_begun = "", self.begun
        self.first_step: tuple[int, float] | None = None  # this phase's first step and when it was
        self.part: int | None = None
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> RichReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_phase()

    def start(self, run: Path) -> None:
        """Where the run lies, before anything slow begins."""
        self._line(f"run {run}")

    def phase(self, title: str) -> None:
        """A new part of the run begins; the bar of the previous one is done."""
        self._end_phase()
        self.title, self.phase_begun = title, time.monotonic()
        self.first_step = self.part = None
        self._line(title, "bold")

    def load_report(self, report: LoadReport) -> None:
        """How the weights matched, and which weights they were."""
        sha256 = f", sha256 {report.sha256[:12]}" if report.sha256 else ""
        layout = "" if report.layout == "timm" else f", {report.layout} layout"
        self._line(f"weights {report.source}{sha256}{layout}: {len(report.matched)} parameters matched")
        for what, names, style in (
            ("resampled to this size", report.resampled, ""),
            ("not in the weights, drawn at random", report.missing, "yellow"),
            ("in the weights, not in the backbone, ignored", report.unexpected, ""),
        ):
            if names:
                more = ", ..." if len(names) > NAMES_SHOWN else ""
                self._line(f"{len(names)} {what}: {', '.join(names[:NAMES_SHOWN])}{more}", style)

    def training(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """A line of the log: moves the bar, or prints a plain line every tenth of the run."""
        if self.console.is_terminal and not self.console.is_dumb_terminal and not self.console.quiet:
            self._move_bar(step, total_steps, metrics)
            return
        now = time.monotonic()
        self.first_step = self.first_step or (step, now)
        part = step * LINES // total_steps  # of the run, in tenths
        if part != self.part or now - self.last_line > MAX_SILENCE:
            left = self._remaining(step, total_steps, now)
            self._line(f"step {step}/{total_steps}  {_numbers(metrics)}{left}")
        self.part = part

    def evaluation(self, step: int, metric: str, before: float, value: float, lower: float, upper: float) -> None:
        """The teacher on the selection split against the original."""
        delta = {"value": value - before, "ci95": [lower, upper]}
        style = "green" if lower > 0 else "red" if upper < 0 else ""
        text = f"step {step}: {metric} {value_text(metric, before)} -> {value_text(metric, value)}"
        self._line(f"{text}, change {change_text(delta)}", style)

    def note(self, message: str) -> None:
        """Something the user should read."""
        self._line(f"note: {message}", "yellow")

    def _line(self, text: str, style: str = "") -> None:
        self.last_line = time.monotonic()
        line = Text(f"{clock(self.last_line - self.begun)}  ", "dim").append(one_line(text), style or None)
        self.console.print(line, soft_wrap=not self.console.is_terminal)  # a log file's lines stay whole

    def _move_bar(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        if self.bar is None:
            self.bar = Progress(
                BarColumn(bar_width=14),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(compact=True),
                console=self.console,
                transient=True,
                redirect_stdout=False,
            )
            self.task = self.bar.add_task("training", total=total_steps, completed=step, numbers=_numbers(metrics))
            self.bar.start()
        if self.task is not None:
            self.bar.update(self.task, completed=step, total=total_steps, numbers=_numbers(metrics))

    def _end_phase(self) -> None:
        self._close_bar()
        if self.title:
            LOG.debug("%s: took %.1f s", self.title, time.monotonic() - self.phase_begun)
        self.title = ""

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar = self.task = None

    def _remaining(self, step: int, total_steps: int, now: float) -> str:
        first, then = self.first_step or (step, now)
        if step <= first or step >= total_steps:
            return ""
        return f"  {clock((now - then) / (step - first) * (total_steps - step))} left"


def clock(seconds: float) -> str:
    """4000 -> 1:06:40."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def spell(seconds: float) -> str:
    """4000 -> 1 h 7 min; for a forecast, whose seconds mean nothing beside hours."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    hours, days = minutes // 60, minutes // (24 * 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{days} days {hours % 24} h"


def pace(seconds: float) -> str:
    """0.0042 -> 4.2 ms a step."""
    return f"{seconds:.2f} s a step" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms a step"


def size(num_bytes: float) -> str:
    """314572800 -> 300 MiB."""
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.1f} GiB"


def _numbers(metrics: Mapping[str, float]) -> str:
    """The few numbers that say whether training is healthy; a metric that is not there is left out."""
    parts = {
        "loss": "loss {:.3f}",
        "bit_agreement": "agree {:.0f}%",
        "agreement": "agree {:.0f}%",
        "bit_information": "info {:.2f}",
        "images_per_second": "{:.0f} img/s",
    }
    return "  ".join(form.format(metrics[name]) for name, form in parts.items() if name in metrics)
