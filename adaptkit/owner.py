"""Which process writes a run: its number, machine and start, so that two never write one run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """What names this process: `pid`, `host`, `start_ticks`."""
    return {"pid": os.getpid(), "host": platform.node(), "start_ticks": _start_ticks(os.getpid())}


def is_alive_elsewhere(process: Mapping[str, Any]) -> bool:
    """Whether the process that `this_process` named is alive on this machine, and is not this one or its launcher.

    A launcher has the run for the processes that it starts. A program that was given the number since is not alive
    here. False also for another machine, of which nothing is known.
    """
    pid = process.get("pid")
    if type(pid) is not int or pid <= 0 or process.get("host") != platform.node():
        return False
    if pid == os.getpid() or (pid == os.getppid() and "WORLD_SIZE" in os.environ):
        return False
    if Path("/proc/self/stat").exists():
        started = _start_ticks(pid)
        return started is not None and process.get("start_ticks") in (None, started)
    return os.name == "posix" and _answers(pid)


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:  # somebody else's, but there
        return True
    except (OSError, OverflowError):
        return False
    return True


def _start_ticks(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None if it is gone, dead but unburied, or nothing tells."""
    try:
        # behind the name, which may contain anything: the state, and as the 20th field the start
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """One process at a time looks who owns a run, and takes it: a lock on its folder, held for a moment."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every network file system can
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
