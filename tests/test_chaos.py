"""Runs that are killed, stopped and robbed of images at moments drawn from a seed end as undisturbed ones do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chaos.invariants import differences, snapshot, violations
from tiny_runs import environment

DRIVE = Path(__file__).parent / "chaos" / "drive.py"


def drive(*words: str, timeout: float) -> None:
    """Run the driver; it must find no problem and must have done all it was asked for."""
    done = subprocess.run(
        [sys.executable, str(DRIVE), "--json", *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.stdout, done.stderr
    results = json.loads(done.stdout)
    assert [result["problems"] for result in results] == [[]] * len(results)
    assert done.returncode == 0
    assert all(count for result in results for count in result["done"].values())


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the driver forks and looks into /proc")
def test_three_kills_one_burst_and_damaged_images() -> None:
    drive("--scenario", "kill,bursts,images", "--kills", "3", "--rounds", "1", "--workers", "0", timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the driver forks and looks into /proc")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scenario", ["kill", "bursts", "disk", "images"])
def test_twenty_kills_and_every_other_attack(scenario: str, seed: int) -> None:
    words = ["--kills", "20", "--rounds", "7", "--seed", str(seed), "--scenario", scenario]
    drive(*words, timeout=3600)


# --- the checker itself


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files of a finished run, as far as the checker looks into them."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    (run / "status.json").write_text('{"state": "done", "exit_code": 0, "message": "the end"}')
    (run / "report.json").write_text('{"verdict": "improved", "timings": {"train": 1.0}}')
    (run / "metrics.jsonl").write_text('{"step": 2, "loss": 0.5, "images_per_second": 7.0}\n')
    (run / "bad_images.jsonl").write_text("")
    return run


def test_a_finished_run_violates_nothing(run: Path) -> None:
    assert violations(run, 0, "", (), {}, {}) == []
    assert violations(run, -9, "", (9,), {}, {}) == []


@pytest.mark.parametrize(
    ("file", "content", "code", "errors", "words"),
    [
        ("status.json", '{"state": "asleep"}', -9, "", "unknown state"),
        ("status.json", '{"state": "run', -9, "", "status.json"),
        ("status.json", '{"state": "running"}', 0, "", "the state is 'running'"),
        ("status.json", '{"state": "running"}', 75, "error: stopped", "the state is 'running'"),
        ("head.safetensors.part", "", 0, "", "left behind"),
        ("checkpoints/last.safetensors", "half", -9, "", "damaged checkpoint"),
        ("report.md", "", 1, "error: internal", "exit code 1"),
        ("report.md", "", 3, "", "without its one line"),
        ("report.md", "", -9, "Traceback (most recent call last)", "traceback"),
    ],
)
def test_a_violation_is_found(file: str, content: str, code: int, errors: str, words: str, run: Path) -> None:
    (run / file).write_text(content)
    assert words in "".join(violations(run, code, errors, (9,), {}, {}))


def test_a_file_outside_the_run_is_found(run: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path, run)
    (tmp_path / "stray").write_text("x")
    assert "stray" in violations(run, 0, "", (), before, snapshot(tmp_path, run))[0]


def test_what_a_clock_decides_is_no_difference_but_a_digit_is(run: Path, tmp_path: Path) -> None:
    twin = shutil.copytree(run, tmp_path / "twin")
    (twin / "metrics.jsonl").write_text('{"step": 2, "loss": 0.5, "images_per_second": 9.0}\n')
    (twin / "report.json").write_text('{"verdict": "improved", "timings": {"train": 3.0}}')
    assert differences(run, twin) == []
    (twin / "metrics.jsonl").write_text('{"step": 2, "loss": 0.51, "images_per_second": 7.0}\n')
    assert differences(run, twin) == ["metrics.jsonl"]
