"""Two processes never write one run: who is alive, who only has a dead one's number, who comes second."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_runs import environment, read

from adaptkit.cli import main
from adaptkit.errors import UsageError
from adaptkit.owner import alone, is_alive_elsewhere, this_process
from adaptkit.recipe import Recipe
from adaptkit.run import Run

RECIPE = Recipe(data="/images", backbone="vit", batch_size=16)
CLAIM = """
import sys
from adaptkit.run import Run
Run.open(sys.argv[1]).claim()
print("mine", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(RECIPE, tmp_path / "run")


@pytest.fixture
def other(run: Run) -> Iterator[subprocess.Popen[str]]:
    """A living process that has claimed the run."""
    run.status("interrupted", 75, "stopped")  # else this process, which made the run, would be alive itself
    words = [sys.executable, "-c", CLAIM, str(run.path)]
    with subprocess.Popen(
        words, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def test_a_running_run_says_who_writes_it_and_an_ended_one_no_more(run: Run) -> None:
    status = read(run.path, "status.json")
    assert (status["state"], status["pid"], status["host"]) == ("running", os.getpid(), platform.node())
    run.status("done", 0, "finished")
    assert read(run.path, "status.json") == {"state": "done", "exit_code": 0, "message": "finished"}


def test_a_run_that_another_process_writes_is_neither_resumed_nor_overwritten(
    run: Run, other: subprocess.Popen[str]
) -> None:
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    expected = f"still running as process {other.pid} on this machine; stop it first"
    result = CliRunner().invoke(main, ["resume", str(run.path)])
    assert (result.exit_code, result.stderr) == (2, f"error: {run.path}: {expected}\n")
    with pytest.raises(UsageError, match=expected):
        Run.create(RECIPE, run.path, overwrite=True)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_a_killed_process_holds_nothing_even_unburied(run: Run, other: subprocess.Popen[str]) -> None:
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked how it ended
    run.claim()
    assert read(run.path, "status.json")["pid"] == os.getpid()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="nothing tells when a process began")
def test_a_program_with_the_number_of_a_dead_process_is_not_it(other: subprocess.Popen[str], run: Run) -> None:
    status = read(run.path, "status.json")
    assert is_alive_elsewhere(status)
    assert not is_alive_elsewhere(status | {"start_ticks": status["start_ticks"] - 1})
    assert is_alive_elsewhere(status | {"start_ticks": None})  # written where nothing told
    assert not is_alive_elsewhere(status | {"host": "another machine"})


@pytest.mark.parametrize("pid", [None, "1", 1.0, True, 0, -1, 2**70])
def test_a_number_that_is_no_process_is_not_alive(pid: Any) -> None:
    assert not is_alive_elsewhere({"pid": pid, "host": platform.node()})


def test_this_process_is_no_other() -> None:
    assert not is_alive_elsewhere(this_process())


def test_a_damaged_status_does_not_stop_a_claim(run: Run) -> None:
    (run.path / "status.json").write_text("[]")
    run.claim()
    assert read(run.path, "status.json")["state"] == "running"


def test_a_claim_removes_what_a_kill_left_half_written(run: Run) -> None:
    (run.path / "checkpoints").mkdir()
    for name in ("images.index.77.part", "status.json.part", "checkpoints/candidate-00000004.safetensors.part"):
        (run.path / name).write_text("half")
    (run.path / "checkpoints" / "last.safetensors").write_text("whole")
    run.claim()
    assert sorted(p.name for p in run.path.rglob("*") if p.is_file()) == [
        "last.safetensors",
        "recipe.yaml",
        "status.json",
    ]


def test_only_the_first_process_of_a_launch_claims(
    run: Run, other: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    run.claim()  # the first one is alive, and of the same launch
    assert read(run.path, "status.json")["pid"] == other.pid


def test_one_at_a_time_looks_who_owns_a_run(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with alone(tmp_path):
        second = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(second)


# --- a kill at the very beginning and the very end


def test_a_start_that_was_killed_before_its_first_file_may_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml.part").write_text("backb")
    run = Run.create(RECIPE, tmp_path / "run")
    assert sorted(path.name for path in run.path.iterdir()) == ["recipe.yaml", "status.json"]


def test_an_overwrite_that_was_killed_in_between_may_be_repeated(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        """Stands for a kill."""

    def kill(*_: Any) -> None:
        raise Killed

    (run.path / "checkpoints").mkdir()
    (run.path / "report.md").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", kill)
        with pytest.raises(Killed):
            Run.create(RECIPE, run.path, overwrite=True)
    again = Run.create(RECIPE, run.path, overwrite=True)
    assert sorted(path.name for path in again.path.iterdir()) == ["recipe.yaml", "status.json"]


@pytest.mark.parametrize(("verdict", "code"), [("improved", 0), ("collapsed", 6)])
def test_a_kill_between_report_and_record_is_mended_by_resume(verdict: str, code: int, run: Run) -> None:
    finished = {"verdict": verdict, "message": "the end"}
    (run.path / "report.json").write_text(json.dumps(finished))
    result = CliRunner().invoke(main, ["resume", str(run.path), "--json", "--quiet"])
    assert result.exit_code == code, result.output
    assert read(run.path, "status.json") == {"state": "done", "exit_code": code, "message": "the end"}
