"""What a tracker is to a run, and the words for what it is sent."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

PROJECT = "adaptkit"  # W&B's project and MLflow's experiment, unless their own variables name another
DONE, FAILED, INTERRUPTED = "done", "failed", "interrupted"  # the states of `status.json`
UPLOAD_SECONDS = 60  # a server that no longer answers must not hold a finished run for longer

Scalar = str | int | float | bool


@dataclass(frozen=True)
class Result:
    """What there is at the end of a run. Only one that is done has numbers, files and pictures."""

    state: str
    exit_code: int
    step: int = 0
    summary: Mapping[str, Scalar] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)


class Tracker(Protocol):
    """One run in one tracker, made with the run's tracking folder and its name. Any method may raise anything."""

    environment: Mapping[str, str]  # variables for as long as it is used; those that the user has set stay

    def start(self, known: str | None) -> str:
        """Open the run: a new one, or that of the id it had before. Returns the id."""

    def parameters(self, values: Mapping[str, Scalar]) -> None:
        """The resolved recipe, by dotted key."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """A line of the log."""

    def finish(self, result: Result) -> None:
        """The end, also of a run that can be resumed."""


@contextmanager
def environment(defaults: Mapping[str, str]) -> Iterator[None]:
    """While active, environment variables that are not set or empty have these values."""
    before = {name: os.environ.get(name) for name in defaults if not os.environ.get(name)}
    os.environ.update({name: defaults[name] for name in before})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
