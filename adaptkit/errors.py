"""One family of errors; each knows the exit code that the command line and `status.json` report.

The library raises them with one line that says what happened, where, and what to do. Only the command
line prints and exits. Anything outside this family is a bug: exit code 1, the only one with a traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


class AdaptkitError(Exception):
    """Base of every error a user can cause or mend. Never raised itself."""

    exit_code = 1
    is_local: bool | None = None  # whether one process of several met it alone and speaks; None: as its code says


class UsageError(AdaptkitError):
    """A wrong option, recipe or key, or an output folder that is not empty."""

    exit_code = 2


class DataError(AdaptkitError):
    """No such folder, no usable image, too many bad ones, an explicit batch larger than the data."""

    exit_code = 3


class BackboneError(AdaptkitError):
    """An unknown backbone, or weights that are missing, corrupt or do not fit."""

    exit_code = 4


class NotFinite(BackboneError):
    """Embeddings that contain NaN or infinity."""


class GainNotMet(AdaptkitError):
    """`--require-gain` was asked for and not reached. The run itself is complete."""

    exit_code = 5


class Collapsed(AdaptkitError):
    """Training collapsed or diverged. The best backbone so far is exported."""

    exit_code = 6


class DeviceMemoryError(AdaptkitError):
    """The accelerator ran out of memory."""

    exit_code = 7


class MachineError(AdaptkitError):
    """The machine's fault, not the data's: disk full, no permission."""

    exit_code = 8


class ConnectionLost(MachineError):
    """Another process of the launch is gone. Its own message, if it had time for one, is the reason."""


class Interrupted(AdaptkitError):
    """Stopped by a signal with the state saved; `adaptkit resume RUN` goes on."""

    exit_code = 75


LOCAL_CODES = (1, DeviceMemoryError.exit_code, MachineError.exit_code)


class FailedElsewhere(AdaptkitError):
    """Another process of the launch failed and said why; this one has only lost its company."""

    is_local = False

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self) -> str:
        return str(self.args[0])


def is_local(error: BaseException | None, exit_code: int | None) -> bool:
    """Whether one process of several may have met this alone: then it speaks for itself."""
    known: bool | None = getattr(error, "is_local", None)
    return exit_code in LOCAL_CODES if known is None else known


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A suffix for error messages: `; did you mean 'lr'?`, or nothing when no choice is close."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(choices), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
