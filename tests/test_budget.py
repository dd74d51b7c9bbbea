"""`--budget`, `--dry-run` and the clockwork behind them: what fits into a time, and what a run would be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from tiny_runs import Recorder, SignalAt, adapt, assert_same_tensors, command, flags, log, read, tiny

import adaptkit
from adaptkit import estimate, schedules
from adaptkit.backbones import load_backbone
from adaptkit.errors import Interrupted, UsageError
from adaptkit.estimate import Passes, StepCost, dry_run, fit_budget, run_seconds, time_steps
from adaptkit.inputs import open_inputs
from adaptkit.recipe import Recipe, load_recipe
from adaptkit.schedules import Plan
from adaptkit.settings import budget_seconds

COST = StepCost(seconds=0.5, peak_bytes=1)
PASSES = Passes(before=300, candidate=100, after=200)
PER_IMAGE = 0.01


@pytest.fixture(autouse=True)
def _short_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)


def plan_of(budget: str, **changes: Any) -> Plan:
    return Plan.make(Recipe(budget=budget, batch_size=10, **changes), num_images=1000)  # 10 epochs: 1,000 steps


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5 h", 5400)])
def test_times_have_units(text: str, seconds: float) -> None:
    assert budget_seconds(text) == seconds


@pytest.mark.parametrize("text", ["30", "m", "-5m", "0s", "5 days", "1e9m"])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="as in 90s, 30m, 2h"):
        load_recipe(overrides={"budget": text})


def test_the_estimate_is_a_plain_sum() -> None:
    recipe = Recipe(batch_size=10, steps=100, select={"alphas": (0.5,)}, probe={"every": "50 steps"})
    plan = Plan.make(recipe, 1000)
    steps = (100 + max(2, plan.head_warmup)) * 0.5
    evaluations = (2 * 100 + 1 * 100 + 200) * 0.01  # two candidates, one point between, the selected one
    assert run_seconds(plan, PASSES, COST, PER_IMAGE) == pytest.approx(steps + evaluations)


@pytest.mark.parametrize("minutes", [1, 2, 5])
def test_as_many_steps_as_fit_and_not_one_more(minutes: int) -> None:
    spent = 7.0
    plan = fit_budget(plan_of(f"{minutes}m"), 1000, PASSES, COST, PER_IMAGE, spent)
    assert plan.recipe.budget is None
    assert plan.recipe.steps == plan.total_steps < 1000
    used = spent + run_seconds(plan, PASSES, COST, PER_IMAGE)
    assert used <= 60 * minutes
    longer = Plan.make(plan.recipe.model_copy(update={"steps": plan.total_steps + 4}), 1000)
    assert spent + run_seconds(longer, PASSES, COST, PER_IMAGE) > 60 * minutes
    assert plan.lr(plan.total_steps - 1) == pytest.approx(plan.recipe.optim.lr * plan.recipe.optim.final_lr)


def test_a_long_budget_gives_no_more_than_the_recipe_asks() -> None:
    assert fit_budget(plan_of("10h"), 1000, PASSES, COST, PER_IMAGE, 0.0).total_steps == 1000
    assert fit_budget(plan_of("10h", steps=30), 1000, PASSES, COST, PER_IMAGE, 0.0).total_steps == 30


def test_a_budget_that_teaches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"budget 15s is too short: 20 steps .* minutes"):
        fit_budget(plan_of("15s"), 1000, PASSES, COST, PER_IMAGE, spent=0.0)


def test_passes_are_what_the_judge_embeds(
    vit: Path, images: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by looking: every image that goes through the frozen network."""
    from adaptkit.embedding import Embedder
    from adaptkit.select import Judge

    for options in ({}, {"labels": str(labelled)}, {"labels": str(labelled), "select.by": "label-free"}):
        recipe = load_recipe(overrides={"data": str(images)} | options)
        inputs, backbone = open_inputs(recipe), load_backbone(str(vit))
        seen = [0]
        backbone.module.register_forward_pre_hook(lambda module, x, seen=seen: seen.append(len(x[0])))
        judge, expected = Judge(inputs, recipe, Embedder(), list), Passes.count(inputs, recipe)
        judge.measure_original(backbone)
        assert sum(seen) == expected.before
        seen.clear()
        judge.consider(backbone, 1, 1.0)
        assert sum(seen) == expected.candidate
        seen.clear()
        judge.measure_selected(backbone)
        assert sum(seen) == expected.after


def test_timing_changes_nothing(vit: Path, images: Path) -> None:
    recipe = load_recipe(overrides={k.replace("__", "."): v for k, v in tiny(data=str(images)).items()})
    inputs, backbone = open_inputs(recipe), load_backbone(str(vit))
    before = {name: value.clone() for name, value in backbone.module.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    cost = time_steps(Accelerator(cpu=True), recipe, inputs, backbone, workers=0, timed=2)
    assert torch.equal(torch.rand(2), expected)
    assert cost.seconds > 0
    assert cost.peak_bytes > 50 << 20  # torch alone is more
    assert all(torch.equal(value, before[name]) for name, value in backbone.module.state_dict().items())


@pytest.mark.long
def test_a_budget_becomes_steps_that_the_recipe_keeps(vit: Path, images: Path, tmp_path: Path) -> None:
    """Interrupted and resumed, and repeated from its recipe, a budgeted run ends with the same bits."""
    settings = {"budget": "10m", "steps": 8, "log_every": 2}
    whole = adapt(vit, images, tmp_path / "whole", **settings)
    kept = load_recipe(tmp_path / "whole" / "recipe.yaml")
    assert (kept.steps, kept.budget) == (8, None)
    entry = log(tmp_path / "whole")[0]
    assert (entry["kind"], entry["budget"], entry["steps"]) == ("budget", "10m", 8)
    with pytest.raises(Interrupted):
        adapt(vit, images, tmp_path / "cut", reporter=SignalAt(4), **settings)
    recorder = Recorder()
    adaptkit.resume(tmp_path / "cut", reporter=recorder)
    assert not any("timing" in title for title in recorder.phases)  # not a second time: the steps are decided
    again = adaptkit.adapt(recipe=tmp_path / "whole" / "recipe.yaml", output=tmp_path / "again")
    for other in (tmp_path / "cut", again.run):
        assert_same_tensors(whole.run / "checkpoints/last.safetensors", other / "checkpoints/last.safetensors")


def test_a_short_budget_shortens_the_run(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "MIN_STEPS", 2)
    monkeypatch.setattr("adaptkit.train.time_steps", lambda *a, **k: replace(COST, seconds=1.0))
    budget = adapt(vit, images, tmp_path / "run", budget="12s", steps=500)
    assert 2 <= budget.report["training"]["steps"] < 12
    assert read(tmp_path / "run", "report.json")["recipe"]["steps"] == budget.report["training"]["steps"]


@pytest.mark.long
def test_dry_run_resolves_and_writes_nothing(vit: Path, images: Path, labelled: Path, tmp_path: Path) -> None:
    args = ["adapt", "--backbone", vit, "--data", images, "--labels", labelled, "--dry-run", "--output", tmp_path / "r"]
    done = command(*args, *flags({"steps": 40}))
    assert done.returncode == 0, done.stderr
    assert "Dry run: nothing was written." in done.stdout
    text = done.stdout.split("\n\n")[0]
    assert load_recipe(_written(tmp_path / "out.yaml", text)).steps == 40  # what is printed is a recipe
    assert not (tmp_path / "r").exists()
    assert max(map(len, done.stdout.splitlines()[-8:])) <= 80
    done = command(*args, "--json", *flags({"steps": 40}))
    document = json.loads(done.stdout)
    assert document["schema"] == "adaptkit.dry_run/1"
    assert document["plan"]["steps"] == 40
    assert document["plan"]["batch_size"] == document["recipe"]["batch_size"] == 8
    assert document["plan"]["seconds"] > 40 * document["plan"]["step_seconds"] > 0
    assert document["data"]["train"] == 84


def _written(file: Path, text: str) -> Path:
    file.write_text(text)
    assert isinstance(yaml.safe_load(text), dict)
    return file


def test_dry_run_says_what_the_run_would_refuse(vit: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    args = ["adapt", "--backbone", vit, "--data", images, "--dry-run"]
    done = command(*args, "--output", tmp_path / "full")
    assert done.returncode == 2
    assert "not empty" in done.stderr
    with pytest.raises(UsageError, match="this run measures"):
        dry_run(load_recipe(overrides={"data": str(images), "require_gain": "knn_top1>=1"}), Recorder())


def test_a_forecast_for_several_processes_times_the_share_of_one(vit: Path, images: Path) -> None:
    settings = tiny(backbone=str(vit), data=str(images))
    recipe = load_recipe(overrides={key.replace("__", "."): value for key, value in settings.items()})
    alone, shared = dry_run(recipe, Recorder(), 1), dry_run(recipe, Recorder(), 2)
    assert (alone["plan"]["num_processes"], alone["plan"]["images_at_once"]) == (1, 8)
    assert (shared["plan"]["num_processes"], shared["plan"]["images_at_once"]) == (2, 4)
    assert shared["plan"]["batch_size"] == shared["recipe"]["batch_size"] == 8
    assert shared["plan"]["steps"] == alone["plan"]["steps"]
    assert shared["plan"]["peak_bytes"] <= 1.5 * alone["plan"]["peak_bytes"]
    with pytest.raises(UsageError, match="does not divide by 3 processes"):
        dry_run(recipe, Recorder(), 3)
