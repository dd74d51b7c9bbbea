"""More than one GPU: how many processes are started, what their launcher makes of exit codes, signals and kills.

The processes are real ones on the CPU, started as on GPUs; only how many GPUs are visible is made up.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_runs import adapt, environment, flags, log, read

from adaptkit.cli import failure, main
from adaptkit.cli.launch import LAUNCHED, _ending, check_gpus, count_processes, is_launched
from adaptkit.errors import DataError, Interrupted, MachineError, UsageError
from adaptkit.owner import is_alive_elsewhere, this_process
from adaptkit.recipe import Recipe
from adaptkit.run import Run

TWO_GPUS = """
import sys
from adaptkit.cli import launch, main
launch.visible_gpus = lambda: 2
main(prog_name="adaptkit")
"""
LONG = {"steps": 4000, "probe.every": "100%", "checkpoint_every": "100%"}
DEADLINE_S = 300.0


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(Recipe(data="/images", backbone="vit", batch_size=16), tmp_path / "run")


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make that many GPUs visible, to a process that no launcher started."""
    for name in (*LAUNCHED, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return lambda count: monkeypatch.setattr("adaptkit.cli.launch.visible_gpus", lambda: count)


# --- how many


@pytest.mark.parametrize(
    ("visible", "gpus", "began_with", "expected"),
    [
        (0, None, None, 1),
        (1, None, None, 1),
        (4, None, None, 4),
        (4, 2, None, 2),
        (4, 1, None, 1),
        (4, 0, None, 1),
        (4, None, 1, 1),  # resumed: as it began
        (4, None, 2, 2),
        (4, 3, 2, 3),
        (3, None, 8, 2),  # 16 images do not divide by 3
        (1, None, 8, 1),
        (0, None, 2, 1),
        (4, None, "many", 4),
    ],
)
def test_how_many_processes(visible: int, gpus: int | None, began_with: Any, expected: int, run: Run, see: Any) -> None:
    see(visible)
    if began_with is not None:
        run.write_json("manifest.json", {"num_processes": began_with})
    assert count_processes(run, gpus) == expected


@pytest.mark.parametrize("name", LAUNCHED)
def test_a_launched_process_launches_nothing(name: str, run: Run, see: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    see(4)
    assert not is_launched()
    monkeypatch.setenv(name, "0")
    assert is_launched()
    assert count_processes(run, None) == 1
    with pytest.raises(UsageError, match="a launcher started this process"):
        check_gpus(2)


def test_more_gpus_than_there_are_is_a_usage_error_that_leaves_nothing(see: Any, tmp_path: Path) -> None:
    see(2)
    options = ["--backbone", "nano", "--data", str(tmp_path), "--output", str(tmp_path / "run"), "--gpus", "3"]
    result = CliRunner().invoke(main, ["adapt", *options])
    assert (result.exit_code, result.stderr.splitlines()) == (
        2,
        ["error: --gpus 3: 2 visible here; lower it, or see what CUDA_VISIBLE_DEVICES hides"],
    )
    assert not (tmp_path / "run").exists()


def test_several_slurm_tasks_without_a_launcher_are_refused(see: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    see(4)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # also set for a batch script, which is one process
    check_gpus(None)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UsageError, match=r"one of 4 SLURM tasks .* examples/slurm"):
        check_gpus(None)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    check_gpus(None)


def test_no_gpus_is_the_cpu(see: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    see(4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    check_gpus(0)
    assert (os.environ["CUDA_VISIBLE_DEVICES"], os.environ["ACCELERATE_USE_CPU"]) == ("", "true")


# --- whose run it is, and who speaks


def test_a_process_takes_over_from_its_launcher_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    launcher = this_process() | {"pid": os.getppid(), "start_ticks": None}
    assert is_alive_elsewhere(launcher)  # a shell, or a notebook
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_alive_elsewhere(launcher)
    assert is_alive_elsewhere(launcher | {"pid": 1})


def fail_with(error: Exception, run: Run) -> Exception:
    """What leaves `recorded` when this process fails with `error`."""
    with pytest.raises(Exception) as caught, failure.recorded(run):  # noqa: PT011
        raise error
    return caught.value


def test_another_process_fails_after_the_main_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def main_process() -> None:
        run.write_json("status.json", {"state": "failed", "exit_code": 3, "message": "no images"})

    monkeypatch.setenv("RANK", "1")
    timer = threading.Timer(0.3, main_process)
    timer.start()
    assert isinstance(fail_with(DataError("no images"), run), DataError)
    assert read(run.path, "status.json")["message"] == "no images"  # it was waited for
    timer.join()


def test_a_process_that_fails_alone_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(failure, "MAIN_SPEAKS_SECONDS", 0.2)
    error = fail_with(DataError("no images"), run)
    assert isinstance(error, MachineError)
    assert "no images (process 1 on" in str(error)
    assert (read(run.path, "status.json")["state"], read(run.path, "status.json")["exit_code"]) == ("failed", 8)
    run.write_json("status.json", {"state": "running"})
    assert isinstance(fail_with(Interrupted("stopped"), run), Interrupted)
    assert read(run.path, "status.json")["state"] == "running"


STOPPED_WHILE_IT_WAITS = """
import os, signal, sys
from adaptkit.cli import failure
from adaptkit.errors import DataError

failure.heed_signals()
failure.time.sleep = lambda seconds: os.kill(os.getpid(), signal.SIGTERM)
error = DataError("no images")
sys.exit(failure.report_failure(error, failure.describe(error), as_json=False))
"""


def test_a_launcher_that_stops_all_makes_no_traceback_of_the_others() -> None:
    """`torchrun` does so as soon as the main process has ended with its error."""
    words = [sys.executable, "-c", STOPPED_WHILE_IT_WAITS]
    done = subprocess.run(words, env=environment(RANK="1"), capture_output=True, text=True, timeout=DEADLINE_S)
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


@pytest.mark.parametrize(
    ("state", "code", "exit_codes", "stopped", "expected", "recorded"),
    [
        ("done", 0, {}, False, 0, ("done", 0)),
        ("done", 5, {0: 5, 1: 5}, False, 5, ("done", 5)),
        ("failed", 7, {1: 7, 0: -15}, False, 7, ("failed", 7)),
        ("interrupted", 75, {}, True, 75, ("interrupted", 75)),
        ("running", None, {}, True, 75, ("interrupted", 75)),  # before anybody could say so
        ("running", None, {0: -9, 1: -15}, True, 75, ("interrupted", 75)),  # too slow
        ("running", None, {0: -15, 1: 2}, False, 2, ("failed", 2)),
        ("running", None, {}, False, 1, ("failed", 1)),
    ],
)
def test_how_a_launch_ends(
    state: str,
    code: int | None,
    exit_codes: dict[int, int],
    stopped: bool,
    expected: int,
    recorded: tuple[str, int],
    run: Run,
) -> None:
    run.status(state, code, "as its processes said")
    assert _ending(run, exit_codes, stopped) == expected
    status = read(run.path, "status.json")
    assert (status["state"], status["exit_code"]) == recorded


def test_a_process_that_was_killed_is_named(run: Run) -> None:
    with pytest.raises(MachineError, match=r"process 1 was killed \(SIGKILL\), .* `adaptkit resume "):
        _ending(run, {0: -15, 1: -9}, stopped=False)


def test_a_run_that_another_process_took_is_left_to_it(run: Run) -> None:
    owner = {"state": "running", "exit_code": None} | this_process() | {"pid": os.getppid(), "start_ticks": None}
    for stopped, expected in ((False, 2), (True, 75)):
        run.write_json("status.json", owner)
        assert _ending(run, {0: 2}, stopped) == expected
        assert read(run.path, "status.json") == owner


# --- real processes


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Launchers under way; whatever is left of them at the end is killed, and their processes with them."""
    launchers: list[subprocess.Popen[str]] = []
    yield launchers
    for launcher in launchers:
        for pid in [*children(launcher.pid), launcher.pid]:
            kill(pid, signal.SIGKILL)
        launcher.communicate()


def start(started: list[subprocess.Popen[str]], *arguments: object) -> subprocess.Popen[str]:
    """`adaptkit ARGUMENTS --json` where two GPUs seem to be visible."""
    words = [sys.executable, "-c", TWO_GPUS, *map(str, arguments), "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started.append(subprocess.Popen(words, env=environment(), text=True, **pipes))
    return started[-1]


def words_of(vit: Path, images: Path, output: Path, changes: dict[str, Any]) -> list[object]:
    return ["adapt", "--backbone", vit, "--data", images, "--output", output, *flags(changes)]


def children(pid: int) -> list[int]:
    """Of Linux's /proc: pid -> its children's."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def wait_for_steps(run: Path, launcher: subprocess.Popen[str], beyond: int = 0) -> dict[int, int]:
    """Wait until the log has more bytes than `beyond`; by number, the processes of the run."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + DEADLINE_S
    while not (metrics.exists() and metrics.stat().st_size > beyond):
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks = {}
    for pid in children(launcher.pid):
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks |= {int(value[5:]): pid for value in variables if value.startswith(b"RANK=")}
    assert sorted(ranks) == [0, 1]
    return ranks


def is_running(pid: int) -> bool:
    """Not gone, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


@pytest.mark.long
def test_two_gpus_get_two_processes_and_the_run_its_exit_code(
    vit: Path, images: Path, labelled: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    changes = {"steps": 2, "checkpoint_every": "100%", "probe.every": "100%"}
    words = words_of(vit, images, tmp_path / "run", changes)
    launcher = start(started, *words, "--labels", labelled, "--require-gain", "knn_top1>=100")
    output, errors = launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 5, errors
    assert read(tmp_path / "run", "manifest.json")["num_processes"] == 2
    status = read(tmp_path / "run", "status.json")
    assert (status["state"], status["exit_code"]) == ("done", 5)
    document = json.loads(output)  # one document, of the main process
    assert document["error"]["exit_code"] == 5
    assert document["training"]["steps"] == 2
    assert errors.count("error: ") == 1
    assert "Traceback" not in errors
    assert "ChildFailedError" not in errors
    assert f"run {tmp_path / 'run'}" in errors.splitlines()[0]
    assert "starting 2 processes" in errors.splitlines()[1]


@pytest.mark.slow
def test_unusable_images_end_all_processes_with_their_code(
    vit: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    launcher = start(started, *words_of(vit, tmp_path / "nowhere", tmp_path / "run", {}))
    output, errors = launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 3, errors
    assert json.loads(output)["error"]["exit_code"] == read(tmp_path / "run", "status.json")["exit_code"] == 3
    assert [line for line in errors.splitlines() if "error" in line.lower()] == [
        f"error: {json.loads(output)['error']['message']}"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_all"),
    [(signal.SIGTERM, False), (signal.SIGUSR1, True)],
    ids=["SIGTERM to the launcher", "SIGUSR1 to all"],
)
def test_a_signal_stops_all_and_resuming_ends_as_undisturbed(
    number: int, to_all: bool, vit: Path, images: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    """A container runtime signals the first process, a scheduler every process of a job."""
    changes = {"steps": 60, "probe.every": "100%", "checkpoint_every": "100%"}
    launcher = start(started, *words_of(vit, images, tmp_path / "run", changes))
    ranks = wait_for_steps(tmp_path / "run", launcher)
    began = time.monotonic()
    for pid in [launcher.pid, *ranks.values()] if to_all else [launcher.pid]:
        kill(pid, number)
    output, errors = launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 75, errors
    assert time.monotonic() - began < 120
    assert "Traceback" not in errors
    assert json.loads(output)["error"]["exit_code"] == read(tmp_path / "run", "status.json")["exit_code"] == 75
    assert not any(map(is_running, ranks.values()))
    assert log(tmp_path / "run")[-1]["step"] < 60
    launcher = start(started, "resume", tmp_path / "run", "--quiet")
    output, errors = launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 0, errors
    assert read(tmp_path / "run", "manifest.json")["num_processes"] == 2
    assert "resumed" not in read(tmp_path / "run", "manifest.json")
    one = adapt(vit, images, tmp_path / "one", **{key.replace(".", "__"): value for key, value in changes.items()}).run
    for mine, theirs in zip(log(one), log(tmp_path / "run"), strict=True):
        assert (mine["step"], mine["kind"]) == (theirs["step"], theirs["kind"])
        if "loss" in mine:
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-2)


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_processes_and_a_run_that_goes_on(
    vit: Path, images: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    launcher = start(started, *words_of(vit, images, tmp_path / "run", LONG))
    ranks = wait_for_steps(tmp_path / "run", launcher)
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + DEADLINE_S
    while any(map(is_running, ranks.values())):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert read(tmp_path / "run", "status.json")["exit_code"] == 75
    written = (tmp_path / "run" / "metrics.jsonl").stat().st_size
    wait_for_steps(tmp_path / "run", start(started, "resume", tmp_path / "run"), written)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_with_a_line_that_says_so(
    victim: int, vit: Path, images: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    launcher = start(started, *words_of(vit, images, tmp_path / "run", LONG))
    ranks = wait_for_steps(tmp_path / "run", launcher)
    kill(ranks[victim], signal.SIGKILL)
    output, errors = launcher.communicate(timeout=DEADLINE_S)
    assert launcher.returncode == 8, errors
    assert "Traceback" not in errors
    assert "adaptkit resume" in errors
    status = read(tmp_path / "run", "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 8)
    if output:  # the main process, or the launcher for it
        assert json.loads(output)["error"]["exit_code"] == 8
    assert not any(map(is_running, ranks.values()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [["torch.distributed.run", "--nproc_per_node", "2"], ["accelerate.commands.launch", "--multi_gpu"]],
    ids=["torchrun", "accelerate launch"],
)
def test_other_launchers_hide_no_message(launcher: list[str], vit: Path, tmp_path: Path) -> None:
    """Neither when nothing is wrong with the arguments, nor when something is."""
    address = ["--num_processes", "2", "--main_process_port", "0"] if "accelerate" in launcher[0] else ["--standalone"]
    start_of = [sys.executable, "-m", *launcher, *address, "-m", "adaptkit"]
    misspelt = [*start_of, "adapt", "--bakbone", "nano"]
    done = subprocess.run(misspelt, env=environment(), capture_output=True, text=True, timeout=DEADLINE_S)
    assert "error: no such option --bakbone; did you mean '--backbone'?" in done.stderr
    words = list(map(str, words_of(vit, tmp_path / "nowhere", tmp_path / "run", {})))
    done = subprocess.run([*start_of, *words], env=environment(), capture_output=True, text=True, timeout=DEADLINE_S)
    assert read(tmp_path / "run", "status.json")["exit_code"] == 3
    assert f"error: {read(tmp_path / 'run', 'status.json')['message']}" in done.stderr
