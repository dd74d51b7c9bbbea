"""One attack under watch: time, memory, output, and what it leaves behind."""

from __future__ import annotations

import os
import resource
import shutil
import time
from pathlib import Path

from fuzz.targets import Target
from hostile import at_most

WAIT_SECONDS = 30  # then it is taken for endless
CPU_SECONDS = 5.0
MEMORY_KB = 1 << 20  # by which one attack may raise the peak of the process


def attack(target: Target, content: bytes, base: Path) -> None:
    """Raise `AssertionError`, or whatever came out of the reader, if this content does harm. `base` is empty."""
    for name in ("here", "mine"):
        (base / name).mkdir()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    inside = os.getcwd()
    os.chdir(base / "here")  # what a file writes to a relative path is found there
    try:
        with at_most(WAIT_SECONDS):
            target.attack(content, base / "mine")
    finally:
        os.chdir(inside)
    taken = time.process_time() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken <= CPU_SECONDS, f"took {taken:.1f} s of CPU time"
    assert grown <= MEMORY_KB, f"took {grown / 1024:.0f} MB"
    assert os.listdir(base / "here") == [], f"wrote {os.listdir(base / 'here')}"
    assert sorted(os.listdir(base)) == ["here", "mine"], f"wrote {os.listdir(base)}"
    for name in ("here", "mine"):
        shutil.rmtree(base / name)
