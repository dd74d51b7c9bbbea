"""Every detector on a real run that is broken in the way it watches for: what is noticed, done, reported, exported."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny_runs import ROOT, Recorder, SignalAt, adapt, assert_same_tensors, environment, flags, log, read

from adaptkit import outcome, schedules, train
from adaptkit.checkpoints import load_state
from adaptkit.cli import main
from adaptkit.collapse import MIN_VIEWS, PATIENCE, RANK, Channel, LastInput, advice, effective_directions
from adaptkit.distill import Branch
from adaptkit.errors import Collapsed, DeviceMemoryError, Interrupted
from adaptkit.objectives import Health, Losses, bits
from adaptkit.objectives.bits import Bits
from adaptkit.probes import Interval, rank
from adaptkit.recipe import load_recipe
from adaptkit.run import Run
from adaptkit.select import Candidate, Judge, best
from adaptkit.session import Session, Silent
from adaptkit.shortage import LESS_MEMORY
from adaptkit.supervise import Supervisor
from adaptkit.views import MultiCrop

WATCHED: dict[str, Any] = {
    "steps": 12,
    "log_every": 1,
    "checkpoint_every": "4 steps",
    "probe__every": "2 steps",
    "optim__warmup": "never",
    "select__alphas": [],
}
BREAKS_AT = 6  # the step after which weights are broken, where they are


@pytest.fixture(autouse=True)
def _short_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)


# --- ways to break a run


def after_step(monkeypatch: pytest.MonkeyPatch, do: Callable[[Session, int], None]) -> None:
    """Do something to the networks after what is due between two steps."""
    real = Supervisor.__call__

    def disturbed(self: Supervisor, step: int) -> str | None:
        reason = real(self, step)
        do(self.session, step)
        return reason

    monkeypatch.setattr(Supervisor, "__call__", disturbed)


@torch.no_grad()
def constant_teacher(s: Session, step: int) -> None:
    """Its backbone gives all images one embedding."""
    if step >= BREAKS_AT:
        norm = s.teacher.get_submodule("backbone.norm")
        norm.weight.zero_()  # type: ignore[operator, union-attr]


@torch.no_grad()
def rank_one(s: Session, step: int) -> None:
    """The embeddings differ along one axis only."""
    if step >= BREAKS_AT:
        for branch in (s.student, s.teacher):
            branch.get_submodule("backbone.norm").weight[1:] = 0  # type: ignore[operator, union-attr, index]


@torch.no_grad()
def nan_weights(s: Session) -> None:
    s.student.get_submodule("backbone.norm").weight.fill_(math.nan)  # type: ignore[operator, union-attr]


@torch.no_grad()
def infinite_statistics(s: Session) -> None:
    """As a batch of huge activations leaves BatchNorm: every weight is finite, and so is the student."""
    for name, buffer in s.student.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.fill_(math.inf)


@torch.no_grad()
def nan_teacher(s: Session) -> None:
    next(s.teacher.backbone.parameters()).fill_(math.nan)


def infinite_loss(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The loss of step `BREAKS_AT` is infinite, the first so many times that it comes."""
    real, left = Bits.__call__, [times]

    def overflowing(self: Bits, student: torch.Tensor, teacher: torch.Tensor, step: int) -> Losses:
        losses = real(self, student, teacher, step)
        if step != BREAKS_AT or not left[0]:
            return losses
        left[0] -= 1
        loss = losses.loss + math.inf
        return Losses(loss, losses.report | {"loss": loss.detach()})

    monkeypatch.setattr(Bits, "__call__", overflowing)


# --- what to expect of a run


def lines(run: Path, kind: str = "train") -> list[int]:
    return [line["step"] for line in log(run) if line["kind"] == kind]


def reasons(run: Path) -> list[str]:
    return [line["reason"] for line in log(run) if line["kind"] == "collapse"]


def learning_rates(run: Path) -> list[float]:
    """Of the last step before each way back and at the end, as shares of what the schedule asked for."""
    document = log(run)
    ends = [document[i - 1] for i, line in enumerate(document) if line["kind"] == "collapse"]
    plan = schedules.Plan.make(load_recipe(run / "recipe.yaml"), 84)
    return [round(line["lr"] / plan.lr(line["step"] - 1), 6) for line in ends]


def assert_stopped(run: Path, recorder: Recorder, reason: str, fallback: Path) -> None:
    """Two ways back, each with half the learning rate and a new head; then code 6, a report and a sound export."""
    assert [reason in each for each in reasons(run)] == [True] * 3
    assert learning_rates(run) == [1.0, 0.5, 0.25]
    assert len(recorder.notes) == 2
    for note, factor in zip(recorder.notes, (0.5, 0.25), strict=True):
        assert reason in note
        assert note.endswith(f"going back, new head, learning rate x {factor}")
    status, report = read(run, "status.json"), read(run, "report.json")
    assert (status["state"], status["exit_code"], report["verdict"]) == ("done", 6, "collapsed")
    assert report["training"]["head_redraws_after_collapse"] == 2
    assert report["training"]["stopped"].startswith(reason)
    assert status["message"] == report["message"]
    assert "\n" not in report["message"]
    assert reason in report["message"]
    assert "Try --lr 3e-05" in report["message"]
    step = report["selected"]["step"]
    exported = load_file(run / "backbone" / "model.safetensors")
    if step:
        saved = load_file(run / "checkpoints" / f"candidate-{step:08d}.safetensors")
        assert all(torch.equal(tensor, saved[f"backbone.{name}"]) for name, tensor in exported.items())
    else:
        assert_same_tensors(run / "backbone" / "model.safetensors", fallback / "model.safetensors")
    module = timm.create_model(f"local-dir:{run / 'backbone'}", pretrained=True, num_classes=0).eval()
    with torch.inference_mode():
        assert bool(module(torch.randn(4, 3, 32, 32)).isfinite().all())


# --- runs


@pytest.mark.long
def test_a_constant_teacher_stops_the_run(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was best before is exported, whatever its interval: here any candidate is believed."""
    monkeypatch.setattr(outcome, "choose", best)
    after_step(monkeypatch, constant_teacher)
    recorder = Recorder()
    with pytest.raises(Collapsed, match="the code collapsed"):
        adapt(vit, images, tmp_path / "run", reporter=recorder, **WATCHED)
    assert_stopped(tmp_path / "run", recorder, "the code collapsed", vit)
    assert 0 < read(tmp_path / "run", "report.json")["selected"]["step"] <= BREAKS_AT
    there_and_back = [*range(5, BREAKS_AT + PATIENCE + 1)]
    assert lines(tmp_path / "run") == [1, 2, 3, 4, *3 * there_and_back]
    assert [line[RANK] for line in log(tmp_path / "run") if line["kind"] == "train" and line["step"] == 8] == [0.0] * 3


@pytest.mark.long
def test_embeddings_on_a_line_stop_the_run_though_the_bits_live(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bits, "MIN_INFORMATION", 0)  # heads of a few steps say little about a line
    after_step(monkeypatch, rank_one)
    recorder = Recorder()
    with pytest.raises(Collapsed, match=r"the embeddings collapsed: 1\.00 effective directions, \d\.\d\d at the start"):
        adapt(vit, images, tmp_path / "run", reporter=recorder, **WATCHED)
    assert_stopped(tmp_path / "run", recorder, "the embeddings collapsed", vit)
    before = [line[RANK] for line in log(tmp_path / "run") if line["kind"] == "train" and line["step"] <= BREAKS_AT]
    assert min(before) > 1.5


@pytest.mark.long
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"optim__lr": 1e30, "optim__layer_decay": 1.0}, ".*not finite"),
        ({"optim__lr": 30.0, "optim__layer_decay": 1.0}, "the code collapsed: information 0.000"),
        (
            {"objective__beta": 0, "objective__rate_target": None, "objective__balance": "never", "head__lr": 0.01},
            "the code collapsed: information 0.000, entropy 0.000, 0 live bits",
        ),
    ],
    ids=["far too high a learning rate", "too high a learning rate", "no coding rate and no balance"],
)
def test_settings_that_cannot_work_stop_the_run(
    settings: dict[str, Any], reason: str, vit: Path, images: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    with pytest.raises(Collapsed, match=f"Training collapsed .{reason}.*; the best backbone so far is exported. Try "):
        adapt(vit, images, tmp_path / "run", reporter=recorder, **WATCHED | settings)
    report = read(tmp_path / "run", "report.json")
    assert len(recorder.notes) == report["training"]["head_redraws_after_collapse"] == 2
    assert learning_rates(tmp_path / "run") == [1.0, 0.5, 0.25]
    exported = load_file(tmp_path / "run" / "backbone" / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in exported.values())
    assert all(bool(t.isfinite().all()) for t in load_file(tmp_path / "run" / "head.safetensors").values())


def test_nan_weights_go_back_once(vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They break after step 6, whose line was good; the checkpoint of step 4 has finite ones."""
    done: list[int] = []

    def once(s: Session, step: int) -> None:
        if step == BREAKS_AT and not done:
            done.append(step)
            nan_weights(s)

    after_step(monkeypatch, once)
    recorder = Recorder()
    result = adapt(vit, images, tmp_path / "run", reporter=recorder, **WATCHED)
    assert result.verdict != "collapsed"
    assert recorder.notes == ["step 7: the loss is not finite; going back, new head, learning rate x 0.5"]
    assert lines(result.run) == [1, 2, 3, 4, 5, 6, 7, *range(5, 13)]
    assert lines(result.run, "collapse") == [7]
    assert load_state(result.run / "checkpoints" / "last.safetensors")["train"]["lr_factor"] == 0.5


@pytest.mark.long
def test_an_infinite_loss_goes_back_and_the_same_again_stops(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infinite_loss(monkeypatch, times=1)
    recorder = Recorder()
    result = adapt(vit, images, tmp_path / "once", reporter=recorder, **WATCHED)
    assert recorder.notes == ["step 7: the loss is not finite; going back, new head, learning rate x 0.5"]
    assert result.report["training"]["head_redraws_after_collapse"] == 1
    infinite_loss(monkeypatch, times=3)
    recorder = Recorder()
    with pytest.raises(Collapsed, match="the loss is not finite, after 2 new heads"):
        adapt(vit, images, tmp_path / "always", reporter=recorder, **WATCHED)
    assert_stopped(tmp_path / "always", recorder, "the loss is not finite", vit)


@pytest.mark.parametrize(
    ("break_it", "log_every", "note"),
    [
        (infinite_statistics, 1, "step 8: the teacher's embeddings are not finite"),
        (infinite_statistics, 3, "step 8: the weights are not finite"),
        (nan_teacher, 3, "step 8: the weights are not finite"),
    ],
    ids=["statistics in the log", "statistics at a checkpoint", "teacher at a checkpoint"],
)
def test_a_teacher_that_is_not_finite_is_noticed_and_never_saved(
    break_it: Callable[[Session], None],
    log_every: int,
    note: str,
    resnet: Path,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hard codes of NaN are zeros, so the loss does not show it."""
    done: list[int] = []

    def once(s: Session, step: int) -> None:
        if step == BREAKS_AT and not done:
            done.append(step)
            break_it(s)

    after_step(monkeypatch, once)
    recorder = Recorder()
    result = adapt(
        resnet,
        images,
        tmp_path / "run",
        reporter=recorder,
        **WATCHED | {"log_every": log_every, "probe__every": "100%"},
    )
    assert recorder.notes == [f"{note}; going back, new head, learning rate x 0.5"]
    assert all(bool(t.isfinite().all()) for t in load_file(result.run / "checkpoints" / "last.safetensors").values())


@pytest.mark.long
def test_a_checkpoint_that_the_next_line_shows_to_be_bad_is_not_gone_back_to(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that ruins finite weights shows in the step after it: those of step 8 are saved, 4 is what is good."""
    ruined: list[int] = []
    real = Session.save

    def ruin(s: Session, file: Path) -> None:
        if s.state.step == 8 and not ruined:
            ruined.append(8)
            for branch in (s.student, s.teacher):
                branch.get_submodule("backbone.norm").weight.data.zero_()  # type: ignore[operator, union-attr]
        real(s, file)

    monkeypatch.setattr(Session, "save", ruin)
    recorder = Recorder()
    result = adapt(vit, images, tmp_path / "run", reporter=recorder, **WATCHED | {"steps": 14})
    assert len(recorder.notes) == 1
    assert lines(result.run) == [*range(1, 8 + PATIENCE + 1), *range(5, 15)]
    assert not (result.run / "checkpoints" / "previous.safetensors").exists()


@pytest.mark.long
def test_bad_lines_in_between_do_not_make_a_later_checkpoint_good(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint at every step: the last one that a good line followed is that of the step before the last good."""
    after_step(monkeypatch, rank_one)
    with pytest.raises(Collapsed):
        adapt(vit, images, tmp_path / "run", **WATCHED | {"checkpoint_every": "1 steps"})
    assert lines(tmp_path / "run") == [*range(1, 10), *2 * [6, 7, 8, 9]]
    assert load_state(tmp_path / "run" / "checkpoints" / "last.safetensors")["train"]["step"] == BREAKS_AT - 1


@pytest.mark.long
def test_the_candidates_of_the_checkpoint_that_is_gone_back_to_are_kept(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is better than the ones before, and one is kept: at step 6 it is that of 6, but the way back is to 3."""

    def better(self: Judge, backbone: Any, step: int, alpha: float) -> Candidate:
        return Candidate(step, alpha, 100.0 + step, Interval(5.0, 1.0, 9.0))

    monkeypatch.setattr(Judge, "consider", better)
    after_step(monkeypatch, rank_one)
    settings = {"checkpoint_every": "3 steps", "probe__every": "3 steps", "select__keep": 1}
    with pytest.raises(Collapsed):
        adapt(vit, images, tmp_path / "run", **WATCHED | settings)
    folder = tmp_path / "run" / "checkpoints"
    state = load_state(folder / "last.safetensors")["train"]
    assert (state["step"], [candidate["step"] for candidate in state["candidates"]]) == (3, [3])
    assert (folder / "candidate-00000003.safetensors").exists()


@pytest.mark.long
def test_a_collapse_that_is_interrupted_ends_the_same(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped when two bad windows are counted, then stopped after the first way back; and resumed when all is over."""
    after_step(monkeypatch, rank_one)
    with pytest.raises(Collapsed) as undisturbed:
        adapt(vit, images, tmp_path / "one", **WATCHED)
    with pytest.raises(Interrupted):
        adapt(vit, images, tmp_path / "two", reporter=SignalAt(8), **WATCHED)
    for _ in range(2):  # the second time the run is complete but for its report
        with pytest.raises(Collapsed) as resumed:
            train.run_adaptation(Run.open(tmp_path / "two"), Silent())
        assert str(resumed.value) == str(undisturbed.value)
        assert read(tmp_path / "two", "status.json") == read(tmp_path / "one", "status.json")
    assert log(tmp_path / "two") == log(tmp_path / "one")
    for key in ("verdict", "probes", "selected", "candidates"):
        assert read(tmp_path / "two", "report.json")[key] == read(tmp_path / "one", "report.json")[key], key


@pytest.mark.parametrize(
    ("backbone", "recipe"),
    [
        ("vit", "bits-reset"),
        ("resnet", "dino"),
        *(
            pytest.param(backbone, recipe, marks=pytest.mark.slow)
            for backbone, recipe in (
                ("resnet", "bits-reset"),
                ("vit", "simdino"),
                ("resnet", "simdino"),
                ("vit", "dino"),
            )
        ),
    ],
)
def test_normal_runs_raise_no_alarm(
    backbone: str, recipe: str, request: pytest.FixtureRequest, images: Path, tmp_path: Path
) -> None:
    recorder, path = Recorder(), request.getfixturevalue(backbone)
    own = {} if recipe == "bits-reset" else {"objective__num_bits": 256, "objective__output_dim": 16}
    own |= {"objective__num_prototypes": 24} if recipe == "dino" else {}
    settings = WATCHED | own | {"steps": 20, "probe__every": "100%"}
    result = adapt(path, images, tmp_path / "run", reporter=recorder, recipe=recipe, **settings)
    assert recorder.notes == reasons(result.run) == []
    assert lines(result.run) == [*range(1, 21)]
    assert all(line[RANK] > 1.1 for line in log(result.run) if line["kind"] == "train")


@pytest.mark.long
def test_a_gpu_that_is_full_in_the_middle_of_training(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(s: Session, step: int) -> None:
        if step == BREAKS_AT:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    with monkeypatch.context() as patch:
        after_step(patch, full)
        with pytest.raises(DeviceMemoryError, match=r"^out of memory with 1 image at once; use .*--batch-size below 8"):
            adapt(vit, images, tmp_path / "run", **WATCHED)
    status = read(tmp_path / "run", "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 7)
    assert "\n" not in status["message"]
    recorder = Recorder()
    train.run_adaptation(Run.open(tmp_path / "run"), recorder)
    assert recorder.steps[0] == 5  # what was learnt is kept


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_without_memory(
    workers: int, vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: MultiCrop, *rest: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(MultiCrop, "__call__", full)
    words = ["adapt", "--backbone", vit, "--data", images, "--output", tmp_path / "run", "--quiet"]
    done = CliRunner().invoke(main, [*map(str, words), *flags({"workers": workers})])
    assert (done.exit_code, done.stdout) == (8, "")
    assert done.stderr == f"error: the machine ran out of memory; lower --workers, or use {LESS_MEMORY}\n"
    assert read(tmp_path / "run", "status.json")["exit_code"] == 8


# --- the parts

ALIVE, RECORD = Health(1.0, None), {"loss": 1.0}


def seen(channel: Channel, ranks: list[float], resting: bool = False) -> list[str | None]:
    return [channel.update(RECORD | {RANK: value}, ALIVE, resting) for value in ranks]


def test_a_rank_must_be_low_for_some_time_and_rests_with_the_head() -> None:
    channel = Channel()
    assert seen(channel, [5.0, 1.0, 1.0, 1.5, 1.0, 1.0]) == [None] * 6
    assert seen(channel, [1.0] * 5, resting=True) == [None] * 5
    assert seen(channel, [1.0, 1.0]) == [None] * 2
    (reason,) = seen(channel, [1.04])
    assert reason == "the embeddings collapsed: 1.04 effective directions, 5.00 at the start"


@pytest.mark.parametrize(
    ("first", "low", "collapsed"), [(9, 1.11, False), (9, 1.09, True), (1.2, 1.02, False), (1.2, 1, True), (0, 0, True)]
)
def test_what_was_nearly_a_line_from_the_start_may_stay_so(first: float, low: float, collapsed: bool) -> None:
    channel = Channel()
    assert (seen(channel, [first, *[low] * PATIENCE])[-1] is not None) == (collapsed and first > 0)


def test_ranks_that_are_not_finite_or_not_known() -> None:
    assert seen(Channel(), [math.nan], resting=True) == ["the teacher's embeddings are not finite"]
    channel = Channel()
    assert [channel.update(RECORD, ALIVE, resting=False) for _ in range(2 * PATIENCE)] == [None] * 2 * PATIENCE


@pytest.mark.parametrize(("count", "dim"), [(16, 64), (200, 24), (MIN_VIEWS, 1)])
def test_effective_directions_against_the_eigenvalues(count: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(count)
    cloud = torch.randn(count, dim, generator=generator) * torch.linspace(0.1, 2, dim) + 5
    assert float(effective_directions(cloud)) == pytest.approx(rank.d_eff(cloud), rel=1e-4)


def test_effective_directions_of_what_does_not_vary_and_of_nan() -> None:
    generator = torch.Generator().manual_seed(0)
    assert float(effective_directions(torch.full((32, 64), 0.3))) == 0
    noise = 0.7 + 1e-4 * torch.randn(32, 64, generator=generator)
    assert float(effective_directions(noise.bfloat16())) == 0  # rounding alone would look like many directions
    assert float(effective_directions(torch.zeros(32, 64))) == 0
    cloud = torch.randn(32, 64, generator=generator)
    torch.testing.assert_close(effective_directions(1e30 * cloud), effective_directions(cloud))
    assert math.isnan(float(effective_directions(torch.full((32, 64), math.nan))))


def test_a_copy_of_a_watched_network_is_its_own() -> None:
    branch = Branch(torch.nn.Linear(3, 2), torch.nn.Linear(2, 4))
    watched = LastInput(branch.head)
    assert watched.rows is None
    views = torch.randn(5, 3)
    branch([views], 5, micro_batch=2)
    torch.testing.assert_close(watched.rows, branch.backbone(views))


def test_advice_names_a_learning_rate_that_may_work() -> None:
    recipe = load_recipe(assignments=["optim.lr=1", "precision=fp32"])
    assert advice("the loss is not finite", recipe) == "Try --lr 0.0003."
    recipe = load_recipe(assignments=["precision=bf16"])
    assert advice("the weights are not finite", recipe) == "Try --lr 3e-05, or --precision fp32."
    assert advice("the code collapsed", recipe).startswith("Try --lr 3e-05 or a larger --batch-size, and look with")


KILLED_WORKER = """
import multiprocessing, sys
from tiny_runs import Recorder, adapt, tiny

class Killer(Recorder):
    def training(self, step, total_steps, metrics):
        for child in multiprocessing.active_children():
            child.kill()

adapt(*sys.argv[1:], reporter=Killer(), **tiny(steps=200, workers=1))
"""


@pytest.mark.long
def test_a_loader_process_that_the_system_kills(vit: Path, images: Path, tmp_path: Path) -> None:
    """As the kernel does when memory is short.

    In a process of its own: torch raises in a signal handler, wherever Python is, and a lock may stay locked.
    """
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    words = [sys.executable, "-c", KILLED_WORKER, vit, images, tmp_path / "run"]
    done = subprocess.run(words, env=environment() | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert re.search(r"MachineError: a loader process was killed.*--workers", done.stderr), done.stderr
    assert read(tmp_path / "run", "status.json")["exit_code"] == 8
