"""Two processes of torchrun: a signal to one stops both, with the state saved; resumed, they end as undisturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_processes import launch, words_of
from tiny_runs import adapt, assert_same_run, environment, flags, log, read

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc"),
]

# lines, checkpoints and redraws at steps of their own, so that resuming starts in the middle of what each counts
SETTINGS: dict[str, Any] = {
    "steps": 60,
    "log_every": 4,
    "checkpoint_every": "7 steps",
    "probe.every": "25%",
    "head.reset_every": "33%",
    "head.min_steps": 1,
}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> int:
    entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)[b"RANK"])


def start(vit: Path, images: Path, run: Path) -> list[object]:
    return ["adapt", "--backbone", vit, "--data", images, "--output", run, *flags(SETTINGS), "--quiet"]


def wait_for_line(run: Path, kind: str, launcher: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not ((run / "metrics.jsonl").exists() and any(line["kind"] == kind for line in log(run))):
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(vit: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = launch(*start(vit, images, run))
    assert done.returncode == 0, done.stderr
    return run


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_both_and_resuming_loses_nothing(
    rank: int, vit: Path, images: Path, tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    launcher = subprocess.Popen(
        words_of(*start(vit, images, run)), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_line(run, "train", launcher)
    (target,) = (child for child in children(launcher.pid) if rank_of(child) == rank)
    os.kill(target, signal.SIGTERM)
    _, errors = launcher.communicate(timeout=300)
    assert launcher.returncode != 0
    assert "internal error" not in errors
    status = read(run, "status.json")
    assert (status["state"], status["exit_code"]) == ("interrupted", 75)
    stopped_at = log(run)[-1]["step"]
    assert stopped_at < SETTINGS["steps"]
    assert not (run / "report.json").exists()
    resumed = launch("resume", run, "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(run, undisturbed)


def test_killed_between_two_lines_they_end_as_undisturbed_ones(
    vit: Path, images: Path, tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    launcher = subprocess.Popen(
        words_of(*start(vit, images, run)), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_line(
        run, "evaluation", launcher
    )  # after step 15: the checkpoint before is of step 14, the line of step 12
    processes = children(launcher.pid)
    for each in (launcher.pid, *processes):
        os.kill(each, signal.SIGKILL)
    launcher.wait()
    resumed = launch("resume", run, "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(run, undisturbed)


def test_no_room_and_no_images_are_said_once(vit: Path, tmp_path: Path) -> None:
    done = launch(*start(vit, tmp_path / "nowhere", tmp_path / "run"))
    assert done.returncode != 0
    assert done.stderr.count("nowhere: no such folder") == 1
    assert "[process 1]" not in done.stderr
    assert read(tmp_path / "run", "status.json")["exit_code"] == 3


def test_bad_images_that_two_processes_meet_are_those_that_one_meets(vit: Path, images: Path, tmp_path: Path) -> None:
    own = tmp_path / "images"
    own.mkdir()
    for index, file in enumerate(sorted(images.rglob("*.jpg"))):
        (own / f"{index}.jpg").write_bytes(b"no image" if index % 9 == 0 else file.read_bytes())
    words = [*start(vit, own, tmp_path / "two"), "--max-bad", "20"]
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    changes = {key.replace(".", "__"): value for key, value in SETTINGS.items()}
    one = adapt(vit, own, tmp_path / "one", data__max_bad="20", **changes).run
    listed = [sorted((run / "bad_images.jsonl").read_text().splitlines()) for run in (one, tmp_path / "two")]
    assert listed[0] == listed[1]
    assert len(listed[0]) == 14
    assert read(tmp_path / "two", "report.json")["data"]["bad_images"] == 14
