"""A run that is tracked: trackers follow `metrics.jsonl`, which stays the truth.

How many lines a tracker has, and its run's id, are kept in `RUN/tracking/TRACKER.json`. So a resumed run goes on with
the same run of the tracker, and lines that a server missed while it was away are sent with a later one.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from adaptkit.backbones import LoadReport
from adaptkit.errors import AdaptkitError, MachineError, UsageError
from adaptkit.requirement import how_to_install
from adaptkit.run import Run, machine_errors, read_status
from adaptkit.session import Reporter
from adaptkit.tracking.contents import log_lines, numbers_of, parameters_of, result_of
from adaptkit.tracking.mlflow_run import MlflowRun
from adaptkit.tracking.tensorboard_run import TensorBoardRun
from adaptkit.tracking.tracker import Result, Tracker, environment
from adaptkit.tracking.wandb_run import WandbRun

FOLDER = "tracking"  # in the run directory
TRACKERS: dict[str, Callable[[Path, str], Tracker]] = {
    "tensorboard": TensorBoardRun,
    "wandb": WandbRun,
    "mlflow": MlflowRun,
}
RETRY_SECONDS = 60.0  # after a failure; in between the run does not wait for a server that may be gone
MAX_REASON = 200  # characters
PASSWORD = re.compile(r"://[^/?#\s]*@")  # of a URL; greedy, as a password may hold an @
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")  # in the name of a variable: WANDB_API_KEY, MLFLOW_TRACKING_TOKEN
LEAST_SECRET = 8  # characters; what is shorter may be a word of the message


class Follower:
    """Sends one tracker what the log has and it has not."""

    def __init__(self, name: str, run: Run, note: Callable[[str], None]) -> None:
        self.name, self.run, self.note = name, run, note
        self.tracker = TRACKERS[name](run.path / FOLDER, run.path.name)
        self.file = f"{FOLDER}/{name}.json"
        self.known, self.sent, self.is_described = self._kept()
        self.resources = ExitStack()
        self.is_open = self.has_warned = False
        self.retry_at = 0.0

    def _kept(self) -> tuple[str | None, int, bool]:
        """The tracker's id of the run, lines it has, whether it has the recipe. It begins anew if that is damaged."""
        try:
            kept = self.run.read_json(self.file) or {}
        except UsageError:
            kept = {"damaged": True}
        known, sent, is_described = kept.get("id"), kept.get("lines"), kept.get("parameters")
        if isinstance(known, str) and isinstance(sent, int) and sent >= 0 and isinstance(is_described, bool):
            return known, sent, is_described
        if kept:
            self.note(f"{self.run.path / self.file}: damaged, so {self.name} gets a new run with everything so far")
        return None, 0, False

    def begin(self) -> None:
        """Open the tracker's run. Raises `UsageError`, `MachineError`, but not if it was open once: then it may wait.

        A run that is resumed is worth more than its tracker.
        """
        self.resources.enter_context(environment(self.tracker.environment))
        if self.known is not None:
            self._guarded(self._open)
            return
        try:
            self._open()
        except Exception as error:
            self.resources.close()
            raise self._explained(error) from None

    def follow(self) -> None:
        """Send what is new, unless it failed a moment ago. Never raises."""
        if time.monotonic() >= self.retry_at:
            self._guarded(self._send)

    def end(self, result: Callable[[], Result]) -> None:
        """Send what is left, and the end. Never raises."""

        def finish() -> None:
            try:
                self._send()
            finally:
                if self.is_open:
                    self.tracker.finish(result())

        self._guarded(finish)
        self.resources.close()

    def _explained(self, error: Exception) -> AdaptkitError:
        if isinstance(error, AdaptkitError):
            return error
        if isinstance(error, ImportError):
            return UsageError(f"--track {self.name}: {_reason(error)}; {how_to_install(self.name)}")
        advice = f"check its settings, or leave {self.name} out of --track"
        return MachineError(f"{self.name} does not start ({_reason(error)}); {advice}")

    def _open(self) -> None:
        with machine_errors(self.run.path):
            (self.run.path / FOLDER).mkdir(exist_ok=True)
        self.known = self.tracker.start(self.known)
        self.is_open = True
        self._keep()

    def _send(self) -> None:
        if not self.is_open:
            self._open()
        if not self.is_described:
            self.tracker.parameters(parameters_of(Run.open(self.run.path).recipe))
            self.is_described = True
        new = log_lines(self.run.path / "metrics.jsonl")[self.sent :]
        for record in map(json.loads, new):
            if numbers := numbers_of(record):
                self.tracker.numbers(record["step"], numbers)
            self.sent += 1
        if new:
            self._keep()

    def _keep(self) -> None:
        kept = {"id": self.known, "parameters": self.is_described, "lines": self.sent}
        self.run.write_json(self.file, kept)

    def _guarded(self, work: Callable[[], None]) -> None:
        """A tracker that fails costs one note, never the run."""
        try:
            work()
        except Exception as error:  # trackers raise whatever their servers and libraries do
            self.retry_at = time.monotonic() + RETRY_SECONDS
            if not self.has_warned:
                self.has_warned = True
                what = f"the run goes on, tries again later, and keeps everything in {self.run.path}"
                self.note(f"{self.name} fails ({_reason(error)}); {what}")


class Tracked:
    """A reporter that passes everything on, and lets the trackers of the recipe follow; the main process calls it.

    A context manager around the run: leaving it tells the trackers what `status.json` says.
    """

    def __init__(self, run: Run, reporter: Reporter) -> None:
        self.run, self.reporter = run, reporter
        self.followers: list[Follower] = []

    def begin(self) -> None:
        """Open the trackers, before anything that takes long. Raises `UsageError`, `MachineError`."""
        for name in self.run.recipe.track:
            follower = Follower(name, self.run, self.reporter.note)
            follower.begin()
            self.followers.append(follower)

    def __enter__(self) -> Tracked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for follower in self.followers:
            follower.end(lambda: result_of(self.run, read_status(self.run.path)))

    def phase(self, title: str) -> None:
        self.reporter.phase(title)

    def load_report(self, report: LoadReport) -> None:
        self.reporter.load_report(report)

    def training(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        self.reporter.training(step, total_steps, metrics)
        self._follow()

    def evaluation(self, step: int, metric: str, before: float, value: float, lower: float, upper: float) -> None:
        self.reporter.evaluation(step, metric, before, value, lower, upper)
        self._follow()

    def note(self, message: str) -> None:
        self.reporter.note(message)

    def _follow(self) -> None:
        for follower in self.followers:
            follower.follow()


def _reason(error: BaseException) -> str:
    """An error in one short line, without the passwords and keys that servers are named and asked by."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    secrets = {value for name, value in os.environ.items() if SECRET.search(name) and len(value) >= LEAST_SECRET}
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    text = PASSWORD.sub("://***@", text)
    return text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 3]}..."
