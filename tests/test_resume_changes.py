"""What a run began with: refused when it decides the report, told and kept when it only may move a figure."""

from __future__ import annotations

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
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import Recorder, SignalAt, adapt, assert_same_run, environment, read, tiny

import adaptkit
from adaptkit import schedules
from adaptkit.checkpoints import load_state
from adaptkit.errors import BackboneError, DataError, Interrupted
from adaptkit.manifest import changes

CHECKPOINT = "checkpoints/last.safetensors"


@pytest.fixture(autouse=True)
def _short_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)


@pytest.fixture(scope="module")
def stopped(vit: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 4 of 6, with a backbone of its own beside it."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(vit, folder / "vit")
    with pytest.raises(Interrupted):
        adapt(folder / "vit", images, folder / "run", reporter=SignalAt(4))
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped / "run", tmp_path / "run")


@pytest.fixture
def other_weights(stopped: Path, tmp_path: Path) -> Any:
    """Puts other weights in the place of the backbone's, and the first ones back in the end."""
    file = stopped / "vit" / "model.safetensors"
    kept = file.read_bytes()
    save_file({name: tensor + 0.01 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    yield file
    file.write_bytes(kept)


def edit(run: Path, **values: Any) -> dict[str, Any]:
    """Change what the manifest says of the beginning."""
    manifest = read(run, "manifest.json")
    manifest["versions"] |= values.pop("versions", {})
    manifest |= values
    (run / "manifest.json").write_text(json.dumps(manifest))
    return dict(manifest)


# --- weights


def test_resuming_with_other_weights_is_refused(run: Path, other_weights: Path) -> None:
    before = {name: (run / name).read_bytes() for name in ("manifest.json", "recipe.yaml", CHECKPOINT)}
    recorder = Recorder()
    with pytest.raises(BackboneError) as caught:
        adaptkit.resume(run, reporter=recorder)
    line = str(caught.value)
    assert line.startswith(f"{other_weights}: not the weights that {run} began with (sha256 ")
    assert line.endswith("restore them to resume, or start again with --overwrite")
    assert read(run, "status.json") == {"state": "failed", "exit_code": 4, "message": line}
    assert not [phase for phase in recorder.phases if "probing" in phase]
    assert {name: (run / name).read_bytes() for name in before} == before


def test_restored_weights_go_on(run: Path) -> None:
    assert adaptkit.resume(run).report["training"]["steps"] == 6


def test_weights_may_change_before_anything_was_learnt(run: Path, other_weights: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    known = read(run, "manifest.json")["weights_sha256"]
    report = adaptkit.resume(run).report
    assert known != report["backbone"]["sha256"] == read(run, "manifest.json")["weights_sha256"]


def test_a_module_with_other_weights_is_refused_too(images: Path, tmp_path: Path) -> None:
    def module(bias: float) -> torch.nn.Module:
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(3, 8, 8, stride=8), torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        torch.nn.init.constant_(layers[0].bias, bias)
        return torch.nn.Sequential(*layers)

    settings = {"image_px": 32, "views__local_ratio": 0.5}
    with pytest.raises(Interrupted):
        adaptkit.adapt(module(0.0), images, output=tmp_path / "run", reporter=SignalAt(2), **tiny(**settings))
    with pytest.raises(BackboneError, match="module:Sequential: not the weights"):
        adaptkit.resume(tmp_path / "run", backbone=module(0.1))
    assert adaptkit.resume(tmp_path / "run", backbone=module(0.0)).report["training"]["steps"] == 6


# --- surroundings


def test_a_resume_in_the_same_surroundings_says_and_writes_nothing(run: Path) -> None:
    before, recorder = (run / "manifest.json").read_bytes(), Recorder()
    adaptkit.resume(run, reporter=recorder)
    assert (run / "manifest.json").read_bytes() == before
    assert not [note for note in recorder.notes if "since this run began" in note]


def test_other_surroundings_are_told_in_one_line_and_kept(run: Path) -> None:
    first = edit(run, versions={"torch": "1.0", "adaptkit": "0.0.1"}, device="tpu", num_processes=8, precision="fp16")
    recorder = Recorder()
    adaptkit.resume(run, reporter=recorder)
    manifest = read(run, "manifest.json")
    resumed = manifest.pop("resumed")
    assert manifest == first
    assert len(resumed) == 1
    now = resumed[0]
    assert (now["from_step"], now["device"], now["precision"], now["num_processes"]) == (4, "cpu", "fp32", 1)
    assert now["versions"].keys() == first["versions"].keys()
    assert [note for note in recorder.notes if "since this run began" in note] == [
        f"adaptkit 0.0.1 -> {now['versions']['adaptkit']}, torch 1.0 -> {now['versions']['torch']}, "
        "device tpu -> cpu, precision fp16 -> fp32, processes 8 -> 1 since this run began; "
        "figures may differ from an undisturbed run"
    ]


@pytest.mark.long
def test_every_change_of_surroundings_is_kept_once(run: Path) -> None:
    """Stopped and resumed again in the same ones there is nothing to add; back in the first ones there is."""
    first = edit(run, versions={"timm": "0.1"})
    for _ in range(2):
        recorder = SignalAt(phase="exporting")
        with pytest.raises(Interrupted):
            adaptkit.resume(run, reporter=recorder)
        assert "timm 0.1 -> " in "\n".join(recorder.notes)
    assert [part["from_step"] for part in read(run, "manifest.json")["resumed"]] == [4]
    second = read(run, "manifest.json")["resumed"][0]
    edit(run, versions=second["versions"], resumed=[second | {"versions": first["versions"]}])
    recorder = Recorder()
    adaptkit.resume(run, reporter=recorder)
    assert "since this run began" not in "\n".join(recorder.notes)
    assert [part["from_step"] for part in read(run, "manifest.json")["resumed"]] == [4, 6]


def test_what_the_beginning_did_not_write_down_cannot_differ() -> None:
    now = {"versions": {"torch": "2", "new": "1"}, "device": "cpu", "precision": "fp32", "num_processes": 1}
    assert changes(now | {"versions": {"torch": "2", "gone": "1"}}, now) == []
    assert changes(now | {"versions": {"torch": "1"}}, now) == ["torch 1 -> 2"]
    assert changes({}, now) == []


def test_the_step_of_a_damaged_checkpoint_is_not_written_down(run: Path) -> None:
    first = edit(run, versions={"torch": "1.0"})
    last = run / CHECKPOINT
    last.write_bytes(last.read_bytes()[:-100])
    last.with_name("previous.safetensors").unlink()  # else it takes the place
    with pytest.raises(DataError, match=r"last\.safetensors: damaged checkpoint"):
        adaptkit.resume(run)
    assert read(run, "manifest.json") == first


# --- a second signal

TWICE = """
import os, signal, sys
from adaptkit import schedules, signals
from tiny_runs import Recorder, adapt
from pathlib import Path
import torch

schedules.MIN_REFIT_STEPS, signals.AGAIN_SECONDS = 2, -1.0
torch.set_num_threads(1)

class Twice(Recorder):
    def training(self, step, *rest):
        if step == 3:  # no checkpoint is due
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

vit, images, run = map(Path, sys.argv[1:])
adapt(vit, images, run, reporter=Twice(), log_every=1)
"""


@pytest.mark.long
def test_a_second_signal_leaves_a_status_and_the_checkpoint_before(vit: Path, images: Path, tmp_path: Path) -> None:
    run, tests = tmp_path / "run", str(Path(__file__).parent)
    words = [sys.executable, "-c", TWICE, vit, images, run]
    path = os.pathsep.join([tests, environment()["PYTHONPATH"]])
    done = subprocess.run(words, env=environment(PYTHONPATH=path), capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (75, "")
    assert read(run, "status.json") == {
        "state": "interrupted",
        "exit_code": 75,
        "message": f"left at once at a second signal; go on with: adaptkit resume {run}",
    }
    assert load_state(run / CHECKPOINT)["train"]["step"] == 2
    assert not list(run.rglob("*.part"))
    adaptkit.resume(run)
    assert_same_run(adapt(vit, images, tmp_path / "undisturbed", log_every=1).run, run)


LEAVE = """
import os, signal, sys, time
from adaptkit import signals

signals.AGAIN_SECONDS, signals.LAST_WORD_SECONDS = -1.0, 0.3
last_word = {"hang": lambda: time.sleep(600), "fail": lambda: 1 / 0}[sys.argv[1]]
with signals.StopRequest(last_word):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)
"""


@pytest.mark.parametrize("last_word", ["hang", "fail"])
def test_a_disk_that_hangs_or_fails_does_not_hold_the_process(last_word: str) -> None:
    started = time.monotonic()
    words = [sys.executable, "-c", LEAVE, last_word]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stderr) == (75, "")
    assert time.monotonic() - started < 100


@pytest.mark.parametrize("state", ["done", "failed"])
def test_a_second_signal_covers_no_end_that_is_written_already(state: str, run: Path) -> None:
    from adaptkit.endings import record_leaving
    from adaptkit.run import Run

    opened = Run.open(run)
    opened.status(state, 0, "before")
    record_leaving(opened)
    assert read(run, "status.json")["message"] == "before"


def test_a_run_that_python_resumes_says_running(run: Path) -> None:
    class Look(Recorder):
        def phase(self, title: str) -> None:
            self.notes.append(read(run, "status.json")["state"])
            os.kill(os.getpid(), signal.SIGTERM)

    look = Look()
    with pytest.raises(Interrupted):
        adaptkit.resume(run, reporter=look)
    assert look.notes == ["running"]
