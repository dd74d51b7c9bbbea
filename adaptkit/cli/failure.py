"""Exceptions: which exit code and line they become, and the record that a run keeps of them."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import click

from adaptkit.errors import AdaptkitError, DeviceMemoryError, Interrupted, MachineError
from adaptkit.signals import heeded_signals

if TYPE_CHECKING:
    from adaptkit.run import Run

RESULT_CODES = (5, 6)  # the run is complete, only its result is not what was asked for
LOCAL_CODES = (1, 7, 8)  # may strike one process of several, whose voice is then the only one
MEMORY_ADVICE = "lower it with --batch-size, use smaller crops (--set image_px=...), or --precision bf16"


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
        command = getattr(getattr(error, "ctx", None), "command_path", "adaptkit")
        return Failure(error.exit_code, one_line(f"{error.format_message().rstrip('.')}; see `{command} --help`"))
    if _is_device_memory(error):
        return Failure(DeviceMemoryError.exit_code, f"the GPU has too little memory for this batch; {MEMORY_ADVICE}")
    if isinstance(error, MemoryError):
        return Failure(MachineError.exit_code, "the machine ran out of memory; lower --workers or --batch-size")
    if isinstance(error, OSError):
        from adaptkit.run import MACHINE_ERRNOS

        if error.errno in MACHINE_ERRNOS:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "free some space" if full else "check the permissions, or choose another --output"
            return Failure(MachineError.exit_code, one_line(f"{error.filename or 'disk'}: {error.strerror}; {advice}"))
    return Failure(1, one_line(f"internal error: {type(error).__name__}: {error}"))


def report_failure(error: BaseException, failure: Failure, as_json: bool) -> int:
    """Print the line (a traceback only for a bug; with `as_json` also the document) and return the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0 and failure.exit_code not in LOCAL_CODES:
        return failure.exit_code  # the main process says the same
    if failure.exit_code == 1:
        traceback.print_exception(error, file=sys.stderr)
    prefix = f"[process {rank}] " if rank else ""
    print(f"{prefix}error: {failure.message}", file=sys.stderr)
    if as_json and rank == 0:
        print(json.dumps({"error": {"exit_code": failure.exit_code, "message": failure.message}}))
    return failure.exit_code


def heed_signals() -> None:
    """From now on a signal to stop becomes a KeyboardInterrupt, so that it is recorded before training has its own
    handlers too. A burst of them is one request: once interrupted, the process ignores the others until it has ended.
    """
    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for number in heeded_signals():
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
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
            _ignore_signals()
        failure = describe(error, run)
        with suppress(AdaptkitError, OSError):  # a full disk must not hide the error itself
            _record(run, failure)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(failure.message) from None
        raise


def _record(run: Run, failure: Failure) -> None:
    """One process of several may fail alone; the stop it causes in the others must not cover its reason."""
    rank, interrupted = int(os.environ.get("RANK", "0")), failure.exit_code == Interrupted.exit_code
    if rank > 0 and failure.exit_code not in LOCAL_CODES:
        return
    from adaptkit.run import read_status

    if interrupted and read_status(run.path).get("state") == "failed":
        return
    states = {Interrupted.exit_code: "interrupted"} | dict.fromkeys(RESULT_CODES, "done")
    run.status(states.get(failure.exit_code, "failed"), failure.exit_code, failure.message)


def one_line(text: str) -> str:
    """Text from users and files made safe for a terminal: line breaks and control characters are escaped."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text.strip())


def _is_device_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    if torch is None:
        return False
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
