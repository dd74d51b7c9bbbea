"""SIGTERM, SIGINT, SIGHUP (a closed terminal) and SIGUSR1 (a time limit is near): finish the step, save, leave.

A second signal leaves at once.
"""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType

from adaptkit.errors import Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
AGAIN_SECONDS = 2.0  # a launcher and a scheduler may both pass on the same stop; a person's second try comes later
STOP_SECONDS = 600.0  # a launcher waits this long for its processes, and they live so long without it
PARENT_SECONDS = 1.0  # between two looks for the parent
LAST_WORD_SECONDS = 2.0  # for `before_leaving`: a disk that hangs must not hold the process


def heeded_signals() -> list[int]:
    """`SIGNALS`, but not a SIGHUP that is ignored already: under `nohup` a run outlives its terminal."""
    hangup = getattr(signal, "SIGHUP", None)
    return [each for each in SIGNALS if each != hangup or signal.getsignal(each) != signal.SIG_IGN]


def stop_without_parent() -> None:
    """From now on a launcher that is killed stops this process too: as by SIGTERM, and for good 10 minutes later."""
    threading.Thread(target=_watch, args=(os.getppid(),), name="parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STOP_SECONDS)
    os._exit(Interrupted.exit_code)


class StopRequest:
    """While active, the first signal only sets `received`; a later second ends the process with exit code 75.

    `before_leaving` is called before that end, and not waited for longer than 2 seconds.
    """

    def __init__(self, before_leaving: Callable[[], None] = lambda: None) -> None:
        self.received = False
        self.since = 0.0
        self.before_leaving = before_leaving

    def __enter__(self) -> StopRequest:
        # Python allows handlers only in the main thread; elsewhere (a notebook's worker) signals stay as they are
        self.active = threading.current_thread() is threading.main_thread()
        if self.active:
            self.previous = {number: signal.signal(number, self._handle) for number in heeded_signals()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self.since = True, time.monotonic()
        elif time.monotonic() - self.since > AGAIN_SECONDS:
            self._leave()

    def _leave(self) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        done = _thread.allocate_lock()  # not `threading.Thread`: it takes locks that the interrupted code may hold
        done.acquire()
        with suppress(RuntimeError):  # no thread can be started
            _thread.start_new_thread(self._last_word, (done,))
            done.acquire(timeout=LAST_WORD_SECONDS)
        os._exit(Interrupted.exit_code)

    def _last_word(self, done: _thread.LockType) -> None:
        with suppress(Exception):  # nobody is left to tell
            self.before_leaving()
        done.release()
