"""A run that is stopped and resumed ends bit for bit where an undisturbed one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import write_folder
from tiny_runs import (
    Recorder,
    SignalAt,
    adapt,
    assert_same_run,
    assert_same_tensors,
    command,
    environment,
    flags,
    log,
    read,
)

import adaptkit
from adaptkit import schedules
from adaptkit.errors import AdaptkitError, DataError, Interrupted, UsageError
from adaptkit.run import Run
from adaptkit.session import Silent
from adaptkit.train import run_adaptation

# a line of the log every 3 steps, a checkpoint every 4, a redraw at 6: resuming starts in the middle of a window
SETTINGS: dict[str, Any] = {
    "steps": 12,
    "log_every": 3,
    "checkpoint_every": "4 steps",
    "probe__every": "3 steps",
    "head__reset_every": "50%",
    "drop_path": 0.1,
    "select__keep": 2,
}


@pytest.fixture(autouse=True)
def _short_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)


@pytest.fixture(scope="module")
def undisturbed(vit: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules, "MIN_REFIT_STEPS", 2)
        return adapt(vit, images, tmp_path_factory.mktemp("runs") / "undisturbed", **SETTINGS).run


def resume(path: Path, reporter: Any = None) -> adaptkit.AdaptResult:
    return run_adaptation(Run.open(path), reporter or Silent())


@pytest.mark.parametrize("step", [3, 6, 12], ids=["early", "just before a redraw", "after the last step"])
def test_a_signal_saves_and_resuming_ends_the_same(
    step: int, undisturbed: Path, vit: Path, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted, match="adaptkit resume"):
        adapt(vit, images, tmp_path / "run", reporter=SignalAt(step), **SETTINGS)
    status = read(tmp_path / "run", "status.json")
    assert (status["state"], status["exit_code"]) == ("interrupted", 75)
    assert not (tmp_path / "run" / "report.json").exists()
    recorder = Recorder()
    resume(tmp_path / "run", recorder)
    assert recorder.steps == [s for s in (3, 6, 9, 12) if s > step]  # nothing is done twice
    assert_same_run(undisturbed, tmp_path / "run")
    assert read(tmp_path / "run", "status.json")["state"] == "done"


@pytest.mark.long
def test_a_run_may_be_stopped_again_and_again(undisturbed: Path, vit: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        adapt(vit, images, tmp_path / "run", reporter=SignalAt(phase="probing the original"), **SETTINGS)
    for stop in (SignalAt(3, number=signal.SIGINT), SignalAt(9), SignalAt(phase="exporting")):
        with pytest.raises(Interrupted):
            resume(tmp_path / "run", stop)
    resume(tmp_path / "run")
    assert_same_run(undisturbed, tmp_path / "run")


@pytest.mark.long
def test_a_signal_while_the_head_is_fitted_is_not_kept_waiting(vit: Path, images: Path, tmp_path: Path) -> None:
    settings = {"select__alphas": [], "probe__every": "never", "steps": 4}
    reporter = SignalAt(phase="exporting")
    with pytest.raises(Interrupted, match="stopped while the head was fitted; go on with: adaptkit resume"):
        adapt(vit, images, tmp_path / "run", reporter=reporter, **settings)
    assert read(tmp_path / "run", "status.json")["exit_code"] == 75
    assert not (tmp_path / "run" / "backbone").exists()
    resume(tmp_path / "run")
    assert read(tmp_path / "run", "status.json")["state"] == "done"


class Killed(BaseException):
    """Stands for a kill: nothing may be saved on the way out."""


@pytest.mark.long
def test_a_kill_between_checkpoints_repeats_steps_but_no_lines(
    undisturbed: Path, vit: Path, images: Path, tmp_path: Path
) -> None:
    """The last checkpoint is of step 4, the log and a candidate already of step 6; the last line is cut off."""

    class KillAt(Recorder):
        def evaluation(self, step: int, *rest: Any) -> None:
            if step == 6:
                raise Killed

    with pytest.raises(Killed):
        adapt(vit, images, tmp_path / "run", reporter=KillAt(), **SETTINGS)
    assert read(tmp_path / "run", "status.json")["state"] == "running"
    assert [line["step"] for line in log(tmp_path / "run")][-1] == 6
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "ki')
    recorder = Recorder()
    resume(tmp_path / "run", recorder)
    assert recorder.steps == [6, 9, 12]
    assert_same_run(undisturbed, tmp_path / "run")


def adapt_words(vit: Path, images: Path, run: Path, settings: dict[str, Any]) -> list[str]:
    """The command line of a run in a process of its own."""
    where = ["--backbone", vit, "--data", images, "--output", run]
    return [sys.executable, "-m", "adaptkit", "adapt", *map(str, where), *map(str, flags(settings)), "--quiet"]


@pytest.mark.slow
@pytest.mark.parametrize("lines", [2, 5])
def test_sigkill_of_the_process_and_resume_by_command(
    lines: int, undisturbed: Path, vit: Path, images: Path, tmp_path: Path
) -> None:
    settings = {key.replace("__", "."): value for key, value in SETTINGS.items()}
    words = adapt_words(vit, images, tmp_path / "run", settings)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    with subprocess.Popen(words, env=environment()) as process:
        try:
            while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= lines):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            process.kill()
    done = command("resume", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert log(undisturbed) == log(tmp_path / "run")
    for name in ("checkpoints/last.safetensors", "backbone/model.safetensors"):
        assert_same_tensors(undisturbed / name, tmp_path / "run" / name)


@pytest.mark.long
def test_a_signal_to_all_processes_does_not_take_the_workers_away(vit: Path, images: Path, tmp_path: Path) -> None:
    """A scheduler signals every process of a job; the step that is under way still needs its batch."""
    settings = {"workers": 1, "steps": 400, "probe.every": "100%", "checkpoint_every": "100%", "log_every": 1}
    words = adapt_words(vit, images, tmp_path / "run", settings)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    with subprocess.Popen(
        words, env=environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            while not (metrics.exists() and metrics.stat().st_size):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.killpg(process.pid, signal.SIGTERM)
            _, errors = process.communicate(timeout=200)
        finally:
            with suppress(ProcessLookupError):  # whoever is left of them, also when the wait was too long
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, errors
    assert read(tmp_path / "run", "status.json")["state"] == "interrupted"


# --- what resume refuses, and what it does to a finished run


def test_resuming_a_finished_run_only_shows_it(undisturbed: Path, tmp_path: Path) -> None:
    import shutil

    from click.testing import CliRunner

    from adaptkit.cli import main

    run = shutil.copytree(undisturbed, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    result = CliRunner().invoke(main, ["resume", str(run), "--json", "--quiet"])
    assert result.exit_code == 0, result.output
    assert read(run, "report.json")["message"] in result.output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.long
@pytest.mark.parametrize("change", ["added", "removed", "resized"])
def test_resuming_on_other_images_is_refused(change: str, vit: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", classes=2, per_class=20)
    with pytest.raises(Interrupted):
        adapt(vit, data, tmp_path / "run", reporter=SignalAt(2))
    victim = sorted(data.rglob("*.jpg"))[0]
    content = victim.read_bytes()
    if change == "added":
        (data / "new.jpg").write_bytes(content)
    elif change == "removed":
        victim.unlink()
    else:
        victim.write_bytes(content + b"\0")
    last = (tmp_path / "run" / "checkpoints" / "last.safetensors").read_bytes()
    with pytest.raises(DataError, match="added, removed or changed"):
        resume(tmp_path / "run")
    assert read(tmp_path / "run", "status.json")["exit_code"] == 3
    assert (tmp_path / "run" / "checkpoints" / "last.safetensors").read_bytes() == last
    (data / "new.jpg").unlink(missing_ok=True)
    victim.write_bytes(content)
    assert resume(tmp_path / "run").report["training"]["steps"] == 6  # restored: it goes on


def test_resuming_with_other_labels_is_refused(vit: Path, images: Path, tmp_path: Path) -> None:
    labels = write_folder(tmp_path / "labels", classes=2, per_class=8, start=700)
    with pytest.raises(Interrupted):
        adapt(vit, images, tmp_path / "run", labels=labels, reporter=SignalAt(2))
    sorted(labels.rglob("*.jpg"))[0].unlink()
    with pytest.raises(DataError, match=f"{labels}: files were added"):
        resume(tmp_path / "run")


def test_images_may_change_before_anything_was_learnt(vit: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", classes=2, per_class=20)
    with pytest.raises(Interrupted):
        adapt(vit, data, tmp_path / "run", reporter=SignalAt(phase="probing the original"))
    sorted(data.rglob("*.jpg"))[0].unlink()
    assert resume(tmp_path / "run").report["data"]["num_images"] == 39


def test_a_batch_size_nobody_asked_for_may_still_shrink_after_an_early_stop(vit: Path, tmp_path: Path) -> None:
    """Stopped before the images were counted, the recipe must not hold 128 as if it had been asked for."""
    data = write_folder(tmp_path / "data", classes=2, per_class=12)
    with pytest.raises(Interrupted):
        adapt_default_batch(vit, data, tmp_path / "run", SignalAt(phase="loading"))
    assert resume(tmp_path / "run").report["recipe"]["batch_size"] == 8


def adapt_default_batch(vit: Path, data: Path, output: Path, reporter: Any) -> None:
    from tiny_runs import tiny

    settings = {key: value for key, value in tiny().items() if key != "batch_size"}
    adaptkit.adapt(str(vit), data, output=output, reporter=reporter, **settings)


def test_a_damaged_checkpoint_is_named(vit: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        adapt(vit, images, tmp_path / "run", reporter=SignalAt(2))
    last = tmp_path / "run" / "checkpoints" / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    last.with_name("previous.safetensors").unlink()  # else it takes the place
    with pytest.raises(DataError, match=r"last\.safetensors: damaged checkpoint"):
        resume(tmp_path / "run")


def test_resuming_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run here"):
        Run.open(tmp_path)


def test_a_signal_handler_is_put_back(vit: Path, images: Path, tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(AdaptkitError):
        adapt(vit, images, tmp_path / "run", reporter=SignalAt(phase="loading"))
    assert {number: signal.getsignal(number) for number in before} == before
