"""examples/nightly_adapt.sh: what it puts into service, and what it never does."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import ROOT, environment, flags

from adaptkit.backbones import load_backbone

SCRIPT = ROOT / "examples" / "nightly_adapt.sh"
SAMPLE = ROOT / "adaptkit" / "assets"
DEADLINE_S = 300.0
REAL = f'#!/bin/sh\nexec "{sys.executable}" -m adaptkit "$@"\n'
STAND_IN = """#!/usr/bin/env bash
# Instead of adaptkit: notes its arguments and ends with the next of CODES; "wait": with 75 at a signal.
trap 'exit 75' TERM
printf '%s\\n' "$*" >> calls
[ "$1" = resume ] || { mkdir -p "runs/$NIGHT/backbone" && touch "runs/$NIGHT/recipe.yaml"; }
code=$(head -n 1 codes) && sed -i 1d codes
echo "{\\"exit_code\\": \\"$code\\"}"
while [ "$code" = wait ]; do sleep 0.05; done
exit "$code"
"""


def begin(folder: Path, adaptkit: str, *arguments: object, **variables: str) -> subprocess.Popen[str]:
    """The script in `folder`, with a backbone in service, and `adaptkit` as the content of the command it calls."""
    command = folder / "bin" / "adaptkit"
    command.parent.mkdir(exist_ok=True)
    command.write_text(adaptkit)
    command.chmod(0o755)
    if not (folder / "live").is_symlink():
        (folder / "old").mkdir()
        (folder / "live").symlink_to("old")
    path = f"{command.parent}{os.pathsep}{os.environ['PATH']}"
    given = environment(PATH=path, **{"NIGHT": "tonight"} | variables)
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([str(SCRIPT), *map(str, arguments)], env=given, cwd=folder, text=True, **pipes)


def nightly(folder: Path, adaptkit: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    process = begin(folder, adaptkit, *arguments, **variables)
    out, err = process.communicate(timeout=DEADLINE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def stand_in(folder: Path, *codes: object, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes))
    return nightly(folder, STAND_IN, "nano", "my images", "labelled", "runs", "live", "--epochs", "5", **variables)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ([0], "promoted: live is "),
        ([75, 0], "promoted: live is "),
        ([75, 75, 5], "not promoted: the gain knn_top1>=0.5 was not reached; see runs/tonight/report.html"),
        ([75, 75, 75, 75], "not promoted: interrupted; the same command goes on, or: adaptkit resume runs/tonight"),
        ([6], "not promoted: training collapsed"),
        ([7], "not promoted: out of GPU memory; see runs/tonight.log"),
        ([8], "not promoted: adaptkit ended with exit code 8"),
        ([3], "not promoted: adaptkit ended with exit code 3"),
        ([1], "not promoted: adaptkit ended with exit code 1"),
    ],
)
def test_only_success_puts_a_backbone_into_service(codes: list[int], words: str, tmp_path: Path) -> None:
    done = stand_in(tmp_path, *codes)
    assert (done.returncode, done.stderr) == (codes[-1], "")
    assert done.stdout.startswith(words)
    new = tmp_path / "runs" / "tonight" / "backbone"
    assert (tmp_path / "live").resolve() == (new if codes[-1] == 0 else tmp_path / "old")
    assert (tmp_path / "live.previous").is_symlink() == (codes[-1] == 0)
    assert json.loads((tmp_path / "runs" / "tonight.json").read_text()) == {"exit_code": str(codes[-1])}
    first, *others = (tmp_path / "calls").read_text().splitlines()
    options = "--labels labelled --output runs/tonight --require-gain knn_top1>=0.5 --epochs 5 --json"
    assert first == f"adapt --backbone nano --data my images {options}"
    assert others == ["resume runs/tonight --json"] * (len(codes) - 1)


def test_the_one_before_is_kept_and_stays_when_the_night_is_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        assert stand_in(tmp_path, 0).returncode == 0
        assert (tmp_path / "live.previous").resolve() == tmp_path / "old"
    assert (tmp_path / "calls").read_text().splitlines()[1] == "resume runs/tonight --json"
    assert stand_in(tmp_path, 0, NIGHT="tomorrow").returncode == 0
    assert (tmp_path / "live").readlink() == tmp_path / "runs" / "tomorrow" / "backbone"
    assert (tmp_path / "live.previous").readlink() == tmp_path / "runs" / "tonight" / "backbone"


def test_a_second_one_at_once_leaves_everything_alone(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with open(tmp_path / "runs" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = stand_in(tmp_path, 0)
    assert (done.returncode, done.stdout, done.stderr) == (75, "", "another one is at work in runs\n")
    assert not (tmp_path / "calls").exists()
    assert stand_in(tmp_path, 0).returncode == 0


def test_a_signal_reaches_adaptkit_and_starts_nothing_again(tmp_path: Path) -> None:
    (tmp_path / "codes").write_text("wait\n0\n")
    process = begin(tmp_path, STAND_IN, "nano", "images", "labelled", "runs", "live")
    wait_for(tmp_path / "runs" / "tonight.json", process)
    process.terminate()
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 75
    assert out.startswith("not promoted: interrupted")
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_a_slash_at_the_end_of_the_link_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "codes").write_text("0\n")
    done = nightly(tmp_path, STAND_IN, "nano", "images", "labelled", "runs", "live//")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "live").readlink() == tmp_path / "runs" / "tonight" / "backbone"


def test_what_is_in_service_must_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    done = nightly(tmp_path, STAND_IN, "nano", "images", "labelled", "runs", "folder")
    assert (done.returncode, "folder is no link" in done.stderr) == (2, True)
    done = nightly(tmp_path, STAND_IN, "nano", "images")
    assert (done.returncode, "BACKBONE DATA LABELS RUNS IN_SERVICE" in done.stderr) == (2, True)
    assert not (tmp_path / "calls").exists()


# --- with adaptkit itself


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 of the embedded images."""
    folder = tmp_path_factory.mktemp("sample") / "images"
    folder.mkdir()
    for path in sorted((SAMPLE / "eurosat").glob("*.jpg"))[:100]:
        shutil.copy(path, folder)
    return folder


def real(folder: Path, data: Path, gain: str, **changes: Any) -> subprocess.Popen[str]:
    settings = flags({"steps": 2, "probe.max_gallery": 40, "probe.max_queries": 40} | changes)
    words = ("nano", data, SAMPLE / "eurosat_labelled", "runs", "live", *settings, "--quiet")
    return begin(folder, REAL, *words, GAIN=gain)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=DEADLINE_S)
    assert err == ""
    return process.returncode, out


@pytest.mark.long
def test_a_real_run_that_reached_the_gain_is_put_into_service(sample: Path, tmp_path: Path) -> None:
    code, out = ended(real(tmp_path, sample, "knn_top1>=-100"))
    assert (code, out.startswith("promoted")) == (0, True)
    assert json.loads((tmp_path / "runs" / "tonight.json").read_text())["require_gain"]["met"] is True
    assert (tmp_path / "live").readlink() == tmp_path / "runs" / "tonight" / "backbone"
    assert load_backbone(str(tmp_path / "live")).embed_dim > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "live", "live.previous", "old", "runs"]


@pytest.mark.slow
def test_real_runs_that_are_not_wanted_are_not_put_into_service(sample: Path, tmp_path: Path) -> None:
    code, out = ended(real(tmp_path, sample, "knn_top1>=100"))
    assert (code, "the gain knn_top1>=100 was not reached" in out) == (5, True)
    assert json.loads((tmp_path / "runs" / "tonight.json").read_text())["error"]["exit_code"] == 5
    (tmp_path / "runs" / "tonight").rename(tmp_path / "runs" / "yesterday")
    code, out = ended(real(tmp_path, tmp_path / "nowhere", "knn_top1>=-100"))
    assert (code, "exit code 3" in out) == (3, True)
    assert "no such" in (tmp_path / "runs" / "tonight.log").read_text()
    assert (tmp_path / "live").readlink() == Path("old")
    assert not (tmp_path / "live.previous").is_symlink()


@pytest.mark.slow
def test_a_real_run_that_was_interrupted_goes_on(sample: Path, tmp_path: Path) -> None:
    changes = {"steps": 60, "checkpoint_every": "10 steps", "probe.every": "never"}
    process = real(tmp_path, sample, "knn_top1>=-100", **changes)
    wait_for(tmp_path / "runs" / "tonight" / "metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    code, out = ended(process)
    assert (code, out.startswith("not promoted: interrupted")) == (75, True)
    assert (tmp_path / "live").readlink() == Path("old")
    code, out = ended(real(tmp_path, sample, "knn_top1>=-100", **changes))
    assert (code, out.startswith("promoted")) == (0, True)
    assert (tmp_path / "live").readlink() == tmp_path / "runs" / "tonight" / "backbone"
