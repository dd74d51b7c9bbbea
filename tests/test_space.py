"""No room on the disk is told before anything is written, and in numbers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Recorder, SignalAt, adapt, read, tiny

import adaptkit
from adaptkit import schedules
from adaptkit.backbones import load_backbone
from adaptkit.checkpoints import load_state, save_tensors
from adaptkit.errors import Interrupted, MachineError
from adaptkit.recipe import load_recipe
from adaptkit.run import Run
from adaptkit.schedules import Plan
from adaptkit.space import num_candidates, require_space, require_space_for_run, run_bytes

pytestmark = pytest.mark.long

NO_ROOM = r"No space left on device; free some space \(\d+ MiB needed, \d+ MiB free\)$"
MANY_BITS = {"objective__num_bits": 10**6, "objective__hidden_dim": 10**6}  # more than any disk holds


def test_a_run_that_does_not_fit_is_refused_before_it_begins(vit: Path, images: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(MachineError, match=f"^{re.escape(str(tmp_path))}/run: {NO_ROOM}"):
        adapt(vit, images, tmp_path / "run", reporter=recorder, **MANY_BITS)
    assert not [phase for phase in recorder.phases if "probing" in phase]
    assert read(tmp_path / "run", "status.json")["exit_code"] == 8
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["images.index", "recipe.yaml", "status.json"]


def test_a_file_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    file = tmp_path / "last.safetensors"
    save_tensors(file, {"a": torch.ones(3)}, {"step": 1})
    before = file.read_bytes()
    with pytest.raises(MachineError, match=f"^{re.escape(str(file))}: {NO_ROOM}"):
        save_tensors(file, {"a": torch.zeros(1).expand(2**55)}, {"step": 2})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.safetensors"]


def test_the_sizes_in_the_line_cannot_look_equal(tmp_path: Path) -> None:
    with pytest.raises(MachineError) as caught:
        require_space(tmp_path, shutil.disk_usage(tmp_path).free + 2**24, tmp_path)
    needed, free = (int(number) for number in re.findall(r"(\d+) MiB", str(caught.value)))
    assert needed > free
    require_space(tmp_path, 2**10, tmp_path)


def test_a_file_system_that_tells_nothing_is_trusted(tmp_path: Path) -> None:
    require_space(Path("/proc"), 2**60, tmp_path)  # its total is 0
    require_space(tmp_path / "missing", 2**60, tmp_path)


@pytest.mark.parametrize(
    ("objective", "tune"), [("bits", "full"), ("bits", "last-1-blocks"), ("simdino", "full"), ("dino", "full")]
)
def test_the_estimate_is_what_a_run_takes(
    objective: str, tune: str, vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)
    settings = tiny(objective__name=objective, tune=tune)
    if objective != "bits":
        del settings["objective__num_bits"]
    run = Run.open(adaptkit.adapt(str(vit), images, output=tmp_path / "run", **settings).run)
    sizes = {path.name: path.stat().st_size for path in run.path.rglob("*.safetensors")}
    candidates = [size for name, size in sizes.items() if "candidate" in name]
    plan = Plan.make(run.recipe, 100)
    not_taken = num_candidates(plan) - len(candidates)
    at_most = sum(sizes.values()) + not_taken * candidates[0] + 2 * sizes["last.safetensors"]  # the two before
    assert run_bytes(load_backbone(str(vit)), plan) == pytest.approx(at_most, rel=0.05)


@pytest.mark.parametrize(
    ("probe", "checkpoint", "expected"),
    [("20 steps", "20 steps", 5), ("1 steps", "50 steps", 54), ("100%", "1 steps", 1), ("10 steps", "never", 10)],
)
def test_candidates_when_they_are_most(probe: str, checkpoint: str, expected: int) -> None:
    given = {"data": "x", "steps": 100, "batch_size": 8, "probe.every": probe, "checkpoint_every": checkpoint}
    assert num_candidates(Plan.make(load_recipe("bits-reset", given), 100)) == expected


def small_disk(folder: Path, size: int, patch: pytest.MonkeyPatch) -> None:
    """`folder` seems to lie on a disk of `size` bytes; not everybody may mount a real one."""
    before = shutil.disk_usage(folder)

    def usage(_: Path) -> Any:
        return before._replace(free=size - sum(path.stat().st_size for path in folder.rglob("*.safetensors*")))

    patch.setattr(shutil, "disk_usage", usage)


def test_what_a_stopped_run_has_written_is_not_asked_for_again(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        adapt(vit, images, tmp_path / "run", reporter=SignalAt(4))
    run = Run.open(tmp_path / "run")
    original, plan = load_backbone(str(vit)), Plan.make(run.recipe, 100)
    size = run_bytes(original, plan)
    small_disk(run.path, size, monkeypatch)
    require_space_for_run(run.path, original, plan)
    small_disk(run.path, size - 1, monkeypatch)
    with pytest.raises(MachineError):
        require_space_for_run(run.path, original, plan)


def test_what_a_killed_process_left_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "last.safetensors"
    file.with_name("last.safetensors.part").write_bytes(bytes(900))
    small_disk(tmp_path, 1000, monkeypatch)
    save_tensors(file, {"a": torch.ones(100)}, {"step": 1})
    assert load_state(file) == {"step": 1}
