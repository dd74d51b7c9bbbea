"""The continuous baselines as parts of the whole: settings, several processes, detectors, runs, resuming, exports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from baselines import NAMES, NUM_IMAGES, NUM_PROCESSES, run_process, two_steps
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import TINY, Recorder, SignalAt, assert_same_run, log, read, tiny
from torch import Tensor

import adaptkit
from adaptkit import schedules
from adaptkit.checkpoints import with_prefix
from adaptkit.collapse import PATIENCE, Channel
from adaptkit.errors import Collapsed, Interrupted, UsageError
from adaptkit.objectives import Health
from adaptkit.objectives.head import PrototypeHead, UnitHead
from adaptkit.recipe import dump_recipe, load_recipe
from adaptkit.run import Run
from adaptkit.session import Silent
from adaptkit.train import run_adaptation

pytestmark = pytest.mark.long

# --- settings


@pytest.mark.parametrize(
    ("recipe", "setting", "message"),
    [
        ("simdino", "beta=0.2", "beta is a setting of bits, not of simdino"),
        ("simdino", "num_bits=128", "num_bits is a setting of bits, not of simdino"),
        ("simdino", "num_prototypes=64", "num_prototypes is a setting of dino, not of simdino"),
        ("dino", "eps=0.1", "eps is a setting of bits and simdino, not of dino"),
        ("dino", "balance=never", "balance is a setting of bits, not of dino"),
        ("bits-fixed", "output_dim=64", "output_dim is a setting of simdino and dino, not of bits"),
        ("bits-fixed", "final_teacher_temperature=0.05", "final_teacher_temperature is a setting of dino, not of bits"),
    ],
)
def test_a_setting_of_another_objective_is_refused(recipe: str, setting: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe(recipe, assignments=[f"objective.{setting}"])


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_may_be_written_out_and_protects_like_that_of_bits(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert (recipe.objective.name, recipe.head.reset_every) == (name, "never")
    assert recipe.head == load_recipe("bits-fixed").head
    assert recipe.views == load_recipe("bits-fixed").views
    (tmp_path / "written.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(tmp_path / "written.yaml") == recipe


# --- two processes against one


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, dict[str, Tensor]]]]:
    """What each of two processes gets from its half of the batch, by objective."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run_process, args=(str(folder),), nprocs=NUM_PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(NUM_PROCESSES)]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one_with_twice_the_batch(
    name: str, processes: list[dict[str, dict[str, dict[str, Tensor]]]]
) -> None:
    """DINO's second step uses the centre that both processes made in the first."""
    shares, whole = [share[name] for share in processes], two_steps(name, NUM_IMAGES * NUM_PROCESSES, first=0)
    for key, expected in whole["grads"].items():
        mean = torch.stack([share["grads"][key] for share in shares]).mean(0)  # what DDP does to gradients
        torch.testing.assert_close(mean, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert not torch.allclose(shares[0]["grads"][key], expected, rtol=1e-2)  # the shares do differ
    for key, expected in whole["report"].items():
        total = torch.stack([share["report"][key] for share in shares]).sum(0)
        is_mean = key in ("loss", "cosine", "coding_rate")  # the others count
        torch.testing.assert_close(total / (NUM_PROCESSES if is_mean else 1), expected, rtol=1e-4, atol=1e-6)
    for share in shares:
        assert share["state"].keys() == whole["state"].keys() == ({"centre"} if name == "dino" else set())
        for key, expected in whole["state"].items():
            torch.testing.assert_close(share["state"][key], expected)
            assert expected.abs().max() > 1e-3


# --- detectors

ALIVE, DEAD = Health(1.0, None), Health(0.0, "it collapsed")
RECORD = {"loss": 1.0}


def test_a_collapse_must_last_and_a_fresh_head_is_left_alone() -> None:
    channel = Channel()
    assert [channel.update(RECORD, DEAD, resting=True) for _ in range(2 * PATIENCE)] == [None] * 2 * PATIENCE
    lasting = [channel.update(RECORD, DEAD, resting=False) for _ in range(PATIENCE)]
    assert lasting == [None] * (PATIENCE - 1) + ["it collapsed"]
    assert channel.update(RECORD, ALIVE, resting=False) is None
    assert channel.update(RECORD, DEAD, resting=False) is None  # counted anew
    assert channel.update({"loss": math.nan}, ALIVE, resting=True) == "the loss is not finite"


def test_candidates_wait_for_half_of_the_best_information() -> None:
    channel, seen = Channel(), []
    for information in (0.0, 0.8, 0.3, 0.5):
        channel.update(RECORD, Health(information, None), resting=False)
        seen.append(channel.transmits)
    assert seen == [False, True, False, True]


# --- whole runs

RESUMED: dict[str, Any] = {  # a line of the log every 3 steps, a checkpoint every 4, a redraw at 6
    "steps": 12,
    "log_every": 3,
    "checkpoint_every": "4 steps",
    "probe__every": "3 steps",
    "head__reset_every": "50%",
    "select__keep": 2,
}
PROTOTYPES = 24


@pytest.fixture(autouse=True)
def _short_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)


def adapt(name: str, backbone: Path, data: Path, output: Path, **changes: Any) -> adaptkit.AdaptResult:
    """A tiny run of the shipped recipe. `num_bits` is a setting of BITS."""
    settings = {key: value for key, value in tiny().items() if key != "objective__num_bits"}
    settings |= {"objective__output_dim": TINY["objective.num_bits"]}
    settings |= {"objective__num_prototypes": PROTOTYPES} if name == "dino" else {}
    reporter = changes.pop("reporter", None)
    return adaptkit.adapt(str(backbone), data, output=output, recipe=name, reporter=reporter, **settings | changes)


@pytest.fixture(scope="module")
def undisturbed(vit: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, adaptkit.AdaptResult]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules, "MIN_REFIT_STEPS", 2)
        folder = tmp_path_factory.mktemp("undisturbed")
        return {name: adapt(name, vit, images, folder / name, **RESUMED) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_adapts_reports_and_exports_its_head(name: str, undisturbed: dict[str, adaptkit.AdaptResult]) -> None:
    result = undisturbed[name]
    last = result.report["training"]["last"]
    measures = {"simdino": {"agreement", "coding_rate"}, "dino": {"agreement", "teacher_entropy", "choice_entropy"}}
    assert {"loss"} | measures[name] < set(last)
    assert not any(key.startswith("bit_") or key == "live_bits" for key in last)
    assert all(math.isfinite(line["loss"]) for line in log(result.run) if line["kind"] == "train")
    assert result.report["training"]["head_redraws_after_collapse"] == 0
    assert result.report["candidates"]
    head = UnitHead(64, 16, 32) if name == "simdino" else PrototypeHead(64, 16, PROTOTYPES, 32)
    head.load_state_dict(load_file(result.run / "head.safetensors"))  # plain tensors, none left over


def test_prototypes_are_frozen_after_a_draw_and_the_centre_is_saved(
    undisturbed: dict[str, adaptkit.AdaptResult],
) -> None:
    saved = load_file(undisturbed["dino"].run / "checkpoints" / "last.safetensors")
    updates = with_prefix(saved, "optimizer.step.head.")
    assert float(updates["mlp.4.weight"]) == 6  # since the draw in the middle of the run
    assert float(updates["prototypes.weight"]) == 5  # not for a tenth of the run
    assert saved["objective.centre"].shape == (PROTOTYPES,)
    assert saved["objective.centre"].norm() > 0.1


def test_a_new_head_starts_with_a_new_centre(vit: Path, images: Path, tmp_path: Path) -> None:
    """After one step the centre is a tenth of a batch's mean, and outputs are cosines, at most 1."""
    settings = {"steps": 7, "head__reset_every": "6 steps", "head__warmup": "never", "checkpoint_every": "1 steps"}
    result = adapt("dino", vit, images, tmp_path / "run", **settings)
    centre = load_file(result.run / "checkpoints" / "last.safetensors")["objective.centre"]
    assert 0 < centre.abs().max() <= 0.1


@pytest.mark.parametrize(("name", "step"), [("simdino", 9), ("dino", 3), ("dino", 6)])
def test_resuming_ends_the_same(
    name: str, step: int, undisturbed: dict[str, adaptkit.AdaptResult], vit: Path, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        adapt(name, vit, images, tmp_path / "run", reporter=SignalAt(step), **RESUMED)
    run_adaptation(Run.open(tmp_path / "run"), Silent())
    assert_same_run(undisturbed[name].run, tmp_path / "run")


@pytest.mark.parametrize("name", NAMES)
def test_dead_outputs_end_the_run_as_collapsed(name: str, vit: Path, tmp_path: Path) -> None:
    """Black images give every view the same output, whatever the head."""
    (tmp_path / "black").mkdir()
    for index in range(40):
        Image.new("RGB", (48, 48)).save(tmp_path / "black" / f"{index}.png")
    recorder, settings = Recorder(), {"steps": 30, "log_every": 1, "checkpoint_every": "4 steps"}
    with pytest.raises(Collapsed, match="the outputs collapsed"):
        adapt(name, vit, tmp_path / "black", tmp_path / "run", reporter=recorder, **settings)
    report = read(tmp_path / "run", "report.json")
    assert (report["verdict"], report["training"]["head_redraws_after_collapse"]) == ("collapsed", 2)
    assert sum("new head, learning rate" in note for note in recorder.notes) == 2


def test_a_teacher_that_outruns_the_centre_is_noticed(vit: Path, images: Path, tmp_path: Path) -> None:
    """Why the recipe starts with a slow teacher: all images choose one prototype within a few steps."""
    settings = {"steps": 12, "teacher__momentum": 0.5, "log_every": 1}
    with pytest.raises(Collapsed, match=r"the outputs collapsed: entropy 0\.\d+ bits over all images"):
        adapt("dino", vit, images, tmp_path / "run", **settings)
