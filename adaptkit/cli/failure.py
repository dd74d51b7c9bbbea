"""Exceptions: which exit code and line they become, and the record that a run keeps of them."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO, TYPE_CHECKING

import click

from adaptkit.errors import (
    AdaptkitError,
    ConnectionLost,
    FailedElsewhere,
    Interrupted,
    MachineError,
    did_you_mean,
    is_local,
)
from adaptkit.shortage import shortage
from adaptkit.signals import heeded_signals

if TYPE_CHECKING:
    from adaptkit.run import Run

RESULT_CODES = (5, 6)  # the run is complete, only its result is not what was asked for
MAIN_SPEAKS_SECONDS = 120.0  # by how much one process may be slower than another to see that the images are unusable
HEAD_START_SECONDS = 2.0  # for the main process to print why, before a launcher stops it
ECHOES = (KeyboardInterrupt, Interrupted, ConnectionLost, FailedElsewhere)  # of what happened in another process


@dataclass(frozen=True)
class Failure:
    """What the user is told: an exit code of the contract and one line."""

    exit_code: int
    message: str


def describe(error: BaseException, run: Run | None = None) -> Failure:
    """The exit code and the line for any exception; code 1 is a bug."""
    if isinstance(error, AdaptkitError):
        return Failure(error.exit_code, one_line(str(error)))
    if isinstance(error, click.Abort | KeyboardInterrupt):
        advice = f"go on with `adaptkit resume {run.path}`" if run else "nothing was saved; run the same command again"
        return Failure(Interrupted.exit_code, one_line(f"interrupted; {advice}"))
    if isinstance(error, click.ClickException):
        command, text = getattr(getattr(error, "ctx", None), "command_path", "adaptkit"), error.format_message()
        if isinstance(error, click.NoSuchOption):
            close = did_you_mean(error.option_name, error.possibilities or [])
            text = f"no such option {error.option_name}{close}"
        return Failure(error.exit_code, one_line(f"{text.rstrip('.')}; see `{command} --help`"))
    if (of_memory := shortage(error)) is not None:
        return Failure(of_memory.exit_code, str(of_memory))
    if isinstance(error, OSError):
        from adaptkit.run import MACHINE_ERRNOS

        if error.errno in MACHINE_ERRNOS:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "free some space" if full else "check the permissions, or choose another --output"
            return Failure(MachineError.exit_code, one_line(f"{error.filename or 'disk'}: {error.strerror}; {advice}"))
    return Failure(1, one_line(f"internal error: {type(error).__name__}: {error}"))


def report_failure(error: BaseException, failure: Failure, as_json: bool) -> int:
    """Print the line (a traceback only for a bug; with `as_json` also the document) and return the exit code."""
    rank = _rank()
    if rank > 0 and not is_local(error, failure.exit_code):
        ignore_signals()  # else the launcher, which stops all after the first, makes a traceback of the wait
        time.sleep(HEAD_START_SECONDS)
        return failure.exit_code  # the main process says the same
    if failure.exit_code == 1 and not isinstance(error, FailedElsewhere):
        say_traceback(error)
    prefix = f"[process {rank}] " if rank else ""
    say(f"{prefix}error: {failure.message}", sys.stderr)
    if as_json and rank == 0:
        say(json.dumps({"error": {"exit_code": failure.exit_code, "message": failure.message}}), sys.stdout)
    return failure.exit_code


def say(text: str, stream: IO[str]) -> None:
    """Lines on stdout or stderr. That nobody reads them any more ends nothing and changes no exit code."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        drop_output(stream)


def say_traceback(error: BaseException) -> None:
    """Where an error came from, on stderr."""
    say("".join(traceback.format_exception(error)).rstrip(), sys.stderr)


def drop_output(stream: IO[str]) -> None:
    """Whoever read this stream has gone: what is still buffered goes nowhere, instead of failing at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def heed_signals() -> None:
    """From now on a signal to stop becomes a KeyboardInterrupt, so that it is recorded before training has its own
    handlers too. A burst of them is one request: once interrupted, the process ignores the others until it has ended.
    """
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for number in heeded_signals():
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    ignore_signals()
    raise KeyboardInterrupt


def ignore_signals() -> None:
    """The process is about to end anyway."""
    for number in heeded_signals():
        if signal.getsignal(number) is _interrupt:  # else this is somebody else's process, which goes on
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def recorded(run: Run) -> Iterator[None]:
    """Whatever ends the block early is in the run's `status.json` before it goes on upwards."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt | Interrupted):
            ignore_signals()
        if _rank() > 0 and isinstance(error, AdaptkitError) and not is_local(error, error.exit_code):
            error = _await_main(run, error)
        failure = describe(error, run)
        with suppress(AdaptkitError, OSError):  # a full disk must not hide the error itself
            _record(run, failure, error)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(failure.message) from None
        raise error


def _await_main(run: Run, error: Exception) -> Exception:
    """Of several processes all but the main one fail in silence, and last: a launcher stops all after the first.

    If the main process does not fail too, what this one sees is not what the others see.
    """
    from adaptkit.run import RUNNING, read_status

    deadline = time.monotonic() + MAIN_SPEAKS_SECONDS
    while read_status(run.path).get("state") == RUNNING:
        if time.monotonic() > deadline:
            where = f"process {_rank()} on {platform.node()} alone; do all processes see the same files?"
            return error if isinstance(error, Interrupted) else MachineError(f"{error} ({where})")
        time.sleep(0.1)
    return error


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _record(run: Run, failure: Failure, error: BaseException) -> None:
    """One process of several may fail alone; what that causes in the others, an echo, must not cover its reason."""
    if _rank() > 0 and not is_local(error, failure.exit_code):
        return
    from adaptkit.run import read_status

    if isinstance(error, ECHOES) and read_status(run.path).get("state") == "failed":
        return
    states = {Interrupted.exit_code: "interrupted"} | dict.fromkeys(RESULT_CODES, "done")
    run.status(states.get(failure.exit_code, "failed"), failure.exit_code, failure.message, error)


def one_line(text: str) -> str:
    """Text from users and files made safe for a terminal: line breaks and control characters are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.strip())
