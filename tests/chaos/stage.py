"""Where a run is attacked: a temporary folder with images and a backbone, and processes that can be struck.

Most processes are forked from this one, which has torch imported already, and call the real `main()` of the command
line: starting Python and importing torch takes longer than the whole run. The others are `python -m adaptkit`.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from chaos.invariants import snapshot, violations
from conftest import write_folder
from tiny_runs import environment, flags

SETTINGS = {
    "steps": 14,
    "log_every": 3,
    "checkpoint_every": "4 steps",
    "probe.every": "3 steps",
    "head.reset_every": "50%",
    "drop_path": 0.1,
    "select.keep": 2,
}
PATIENCE = 180.0  # seconds for a process that nobody strikes
STOP_SECONDS = 30.0  # for one that was asked to stop
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")


@dataclass(frozen=True)
class Blow:
    """One attack: after `delay` seconds from outside, or inside just before the `event`-th access to the run's files.

    `strike` gets the process id.
    """

    strike: Callable[[int], None]
    delay: float | None = None
    event: int | None = None
    name: str = ""


@dataclass(frozen=True)
class Ended:
    """How a process ended. `events` counts its accesses to the run's files, `struck` says whether the blow fell."""

    code: int
    errors: str
    seconds: float
    after_blow: float
    struck: bool
    events: int


@dataclass
class Stage:
    """The folder, and the runs in it."""

    base: Path
    workers: int = 0
    problems: list[str] = field(default_factory=list)

    def build(self) -> Stage:
        """Images (two of them damaged) and a tiny backbone; in a child, so that this process computes nothing."""
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # children of a `nohup` would ignore it
        for name in ("home", "cwd", "tmp", "runs"):
            (self.base / name).mkdir()
        write_folder(self.base / "data", classes=4, per_class=30)
        for name in ("class_0/0003.jpg", "class_2/0011.jpg"):
            file = self.base / "data" / name
            file.write_bytes(file.read_bytes()[:300])
        self._in_child(self._save_backbone, self.base / "log")
        for name in ("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME"):
            os.environ[name] = str(self.base / "home")
        os.environ["TMPDIR"] = str(self.base / "tmp")
        return self

    def _save_backbone(self) -> int:
        from adaptkit.backbones import load_backbone, save_backbone

        save_backbone(load_backbone("test_vit", pretrained=False, image_px=32), self.base / "vit")
        return 0

    def words(self, run: Path) -> list[str]:
        """The command that begins the run, or goes on with it once there is one."""
        if (run / "recipe.yaml").exists():
            return ["resume", str(run)]
        where = {"backbone": self.base / "vit", "data": self.base / "data", "output": run}
        given = [word for key, value in where.items() for word in (f"--{key}", str(value))]
        return ["adapt", *given, *flags(SETTINGS | {"workers": self.workers})]

    def go(
        self,
        run: Path,
        blow: Blow | None = None,
        real: bool = False,
        limit_bytes: int | None = None,
        killed_by: Sequence[int] = (),
        outside: Sequence[Path] = (),
    ) -> Ended:
        """Begin or resume `run`, strike, wait, and note every invariant that does not hold."""
        free = (run, self.base / "tmp", self.base / "log", *outside)
        before = snapshot(self.base, *free)
        ended = self._execute(run, blow, real, limit_bytes)
        found = violations(run, ended.code, ended.errors, tuple(killed_by), before, snapshot(self.base, *free))
        label = f"{run.name}, {blow.name if blow else 'undisturbed'}, exit code {ended.code}"
        self.problems += [f"{label}: {problem}" for problem in found]
        return ended

    def _execute(self, run: Path, blow: Blow | None, real: bool, limit_bytes: int | None) -> Ended:
        words, log, events = self.words(run), self.base / "log", mmap.mmap(-1, 8)
        log.write_text("")
        started = time.monotonic()
        if real:
            pid = self._spawn(words, log)
        else:
            pid = os.fork()
            if pid == 0:
                self._become(words, run, log, blow, limit_bytes, events)
        code, struck_at = self._wait(pid, blow, started)
        ended, num_events = time.monotonic(), int.from_bytes(events[:4], "little")
        struck = struck_at is not None or events[4] == 1
        since = ended - struck_at if struck_at is not None else 0.0
        return Ended(code, log.read_text(errors="replace"), ended - started, since, struck, num_events)

    def _spawn(self, words: list[str], log: Path) -> int:
        with open(log, "wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "adaptkit", *words],
                env=environment(),
                cwd=self.base / "cwd",
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
            )
        process.returncode = 0  # waited for here, not by subprocess
        return process.pid

    def _wait(self, pid: int, blow: Blow | None, started: float) -> tuple[int, float | None]:
        """Wait for the process, strike when it is time; the exit code, and when it was struck from outside."""
        struck_at = None
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), struck_at
            now = time.monotonic()
            if blow and blow.delay is not None and struck_at is None and now - started >= blow.delay:
                blow.strike(pid)
                struck_at = now
            if now - started > PATIENCE:
                self.problems.append(f"process still there after {PATIENCE:.0f} s")
                os.killpg(pid, signal.SIGKILL)
            time.sleep(0.002)

    def _become(
        self, words: list[str], run: Path, log: Path, blow: Blow | None, limit_bytes: int | None, events: mmap.mmap
    ) -> NoReturn:
        """In the child: count accesses to the run's files, strike at the right one, be `adaptkit WORDS`."""
        os.chdir(self.base / "cwd")
        here, inside, count = os.getpid(), str(run), 0

        def hear(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event not in EVENTS or os.getpid() != here or not _path(arguments[0]).startswith(inside):
                return
            count += 1
            events[:4] = count.to_bytes(4, "little")
            if blow and blow.event == count:
                events[4] = 1
                blow.strike(here)

        def play() -> int:
            from adaptkit.cli import main

            sys.addaudithook(hear)
            if limit_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
            main(words, prog_name="adaptkit")
            return 0

        self._be(play, log)

    def _in_child(self, work: Callable[[], int], log: Path) -> None:
        pid = os.fork()
        if pid == 0:
            self._be(work, log)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError(log.read_text(errors="replace"))

    def _be(self, work: Callable[[], int], log: Path) -> NoReturn:
        code: Any = 1
        try:
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = work()
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)


def _path(argument: Any) -> str:
    return os.fsdecode(argument) if isinstance(argument, str | bytes | os.PathLike) else ""
