"""Bits that flip on the disk: `last` is refused or `previous` taken; files that no checkpoint names go."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Recorder, SignalAt, adapt, assert_same_run, read

import adaptkit
from adaptkit import schedules
from adaptkit.checkpoints import LAST, PREVIOUS, load_state, load_tensors, save_tensors
from adaptkit.errors import DataError, Interrupted

pytestmark = pytest.mark.long

# checkpoints at 4 and 8, a line of the log at 9: a run stopped there has `last` of 9 and `previous` of 8
SETTINGS: dict[str, Any] = {
    "steps": 12,
    "log_every": 3,
    "checkpoint_every": "4 steps",
    "probe__every": "3 steps",
    "select__keep": 2,
}


@pytest.fixture(autouse=True)
def _short_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)


@pytest.fixture(scope="module")
def runs(vit: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`undisturbed`, and `stopped` at step 9 of 12."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules, "MIN_REFIT_STEPS", 2)
        adapt(vit, images, folder / "undisturbed", **SETTINGS)
        with pytest.raises(Interrupted):
            adapt(vit, images, folder / "stopped", reporter=SignalAt(9), **SETTINGS)
    steps = [load_state(folder / "stopped" / name)["train"]["step"] for name in (LAST, PREVIOUS)]
    assert steps == [9, 8]
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(runs / "stopped", tmp_path / "run")


def flip(file: Path, at: float = 0.5) -> None:
    """One bit, at this share of the file."""
    content = bytearray(file.read_bytes())
    content[int(at * len(content))] ^= 4
    file.write_bytes(content)


def candidates(run: Path) -> list[str]:
    return sorted(file.name for file in (run / "checkpoints").glob("candidate-*"))


def resumed(run: Path) -> Recorder:
    recorder = Recorder()
    adaptkit.resume(run, reporter=recorder)
    return recorder


@pytest.mark.parametrize("harm", ["flipped", "missing"])
def test_the_checkpoint_before_takes_the_place_of_a_damaged_one(harm: str, runs: Path, run: Path) -> None:
    flip(run / LAST) if harm == "flipped" else (run / LAST).unlink()
    recorder = resumed(run)
    assert [note for note in recorder.notes if "damaged" in note] == [
        f"{run / LAST}: damaged checkpoint; going on from the one before"
    ]
    assert recorder.steps == [9, 12]
    assert_same_run(runs / "undisturbed", run)


@pytest.mark.parametrize("previous", ["flipped", "missing"])
def test_without_a_sound_checkpoint_nothing_is_computed(previous: str, run: Path) -> None:
    flip(run / LAST)
    flip(run / PREVIOUS) if previous == "flipped" else (run / PREVIOUS).unlink()
    kept = (run / LAST).read_bytes(), candidates(run)
    recorder = Recorder()
    with pytest.raises(DataError, match=r"last\.safetensors: damaged checkpoint \(its bytes are not those that"):
        adaptkit.resume(run, reporter=recorder)
    assert not [phase for phase in recorder.phases if "probing" in phase]
    assert (read(run, "status.json")["state"], read(run, "status.json")["exit_code"]) == ("failed", 3)
    assert ((run / LAST).read_bytes(), candidates(run)) == kept


def test_a_damaged_checkpoint_before_is_removed(runs: Path, run: Path) -> None:
    """A collapse would go back to it."""
    flip(run / PREVIOUS)
    with pytest.raises(Interrupted):
        adaptkit.resume(run, reporter=(recorder := SignalAt(phase="probing the original")))
    assert not (run / PREVIOUS).exists()
    assert f"{run / PREVIOUS}: damaged checkpoint; removed" in recorder.notes
    assert resumed(run).steps == [12]
    assert_same_run(runs / "undisturbed", run)


def test_a_damaged_candidate_is_refused_before_anything_is_computed(run: Path) -> None:
    named = load_state(run / LAST)["train"]["candidates"]
    best = max(named, key=lambda candidate: candidate["value"])
    flip(run / "checkpoints" / f"candidate-{best['step']:08d}.safetensors")
    recorder = Recorder()
    with pytest.raises(DataError, match=rf"candidate-{best['step']:08d}\.safetensors: damaged checkpoint"):
        adaptkit.resume(run, reporter=recorder)
    assert not [phase for phase in recorder.phases if "probing" in phase]


@pytest.mark.parametrize("state", [{}, {"train": []}, {"train": {"channel": 1}, "window_steps": 0}, "candidates"])
def test_a_checkpoint_of_something_else_is_refused(state: Any, run: Path) -> None:
    tensors, sound = load_tensors(run / LAST)
    (run / PREVIOUS).unlink()
    if state == "candidates":
        state = sound | {"train": sound["train"] | {"candidates": [{"step": 3}]}}
    save_tensors(run / LAST, tensors, state)
    with pytest.raises(DataError, match=r"last\.safetensors: damaged checkpoint; start again with --overwrite"):
        adaptkit.resume(run)


def test_settings_that_changed_since_the_last_checkpoint_are_told(run: Path) -> None:
    """By hand, or because the disk lost half of the file: the rest is at its defaults then."""
    text = (run / "recipe.yaml").read_text()
    assert "log_every: 3\n" in text
    (run / "recipe.yaml").write_text(text.replace("log_every: 3\n", "log_every: 5\n").replace("  keep: 2\n", ""))
    stop = SignalAt(phase="probing the original")
    with pytest.raises(Interrupted):
        adaptkit.resume(run, reporter=stop)
    told = [note for note in stop.notes if "recipe.yaml" in note]
    assert told == [f"{run / 'recipe.yaml'}: log_every 3 -> 5, select.keep 2 -> 3 since the last checkpoint"]


def test_settings_that_did_not_change_are_not_told(run: Path) -> None:
    stop = SignalAt(phase="probing the original")
    with pytest.raises(Interrupted):
        adaptkit.resume(run, reporter=stop)
    assert not [note for note in stop.notes if "recipe.yaml" in note]


# --- candidates that no checkpoint names


def orphan(run: Path, step: int) -> Path:
    """What a process leaves that is killed after a candidate is saved and before the checkpoint that names it."""
    named = sorted((run / "checkpoints").glob("candidate-*"))
    return Path(shutil.copy(named[0], named[0].with_name(f"candidate-{step:08d}.safetensors")))


def test_orphans_go_when_a_run_is_resumed_and_no_others(run: Path) -> None:
    """`previous` names one that `last` does not know: it stays, as a collapse goes back there."""
    other, mine = orphan(run, 7), orphan(run, 10)
    tensors, state = load_tensors(run / PREVIOUS)
    state["train"]["candidates"].append(state["train"]["candidates"][0] | {"step": 7})
    save_tensors(run / PREVIOUS, tensors, state)
    before = candidates(run)
    with pytest.raises(Interrupted):
        adaptkit.resume(run, reporter=SignalAt(phase="probing the original"))
    assert not mine.exists()
    assert other.exists()
    assert candidates(run) == [name for name in before if name != mine.name]


def test_orphans_go_when_a_run_ends(runs: Path, run: Path) -> None:
    class Litter(Recorder):
        def phase(self, title: str) -> None:
            if "exporting" in title:
                orphan(run, 11)

    adaptkit.resume(run, reporter=Litter())
    assert_same_run(runs / "undisturbed", run)


def test_without_a_checkpoint_every_candidate_is_an_orphan(runs: Path, run: Path) -> None:
    for file in (LAST, PREVIOUS):
        (run / file).unlink()
    orphan(run, 7)
    with pytest.raises(Interrupted):
        adaptkit.resume(run, reporter=SignalAt(phase="probing the original"))
    assert candidates(run) == []
    assert read(run, "status.json")["exit_code"] == 75


def test_a_run_without_candidates_is_resumed(run: Path) -> None:
    """All of them are orphans then, and none is looked for."""
    for file in (LAST, PREVIOUS):
        tensors, state = load_tensors(run / file)
        save_tensors(
            run / file, tensors, json.loads(json.dumps(state)) | {"train": state["train"] | {"candidates": []}}
        )
    with pytest.raises(Interrupted):
        adaptkit.resume(run, reporter=SignalAt(phase="probing the original"))
    assert candidates(run) == []
