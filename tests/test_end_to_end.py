"""Whole runs for real: what is on disk afterwards, whether it is what was measured, and every way a run can end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import write_folder
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import Recorder, adapt, assert_same_run, assert_same_tensors, command, flags, log, read

import adaptkit
from adaptkit import loop, outcome, schedules, select
from adaptkit.backbones import load_backbone
from adaptkit.embedding import Embedder
from adaptkit.errors import Collapsed, DataError, GainNotMet, UsageError
from adaptkit.inputs import open_inputs
from adaptkit.probes import Interval
from adaptkit.recipe import load_recipe
from adaptkit.select import Judge
from adaptkit.session import Session

REPORT_KEYS = {
    "schema", "verdict", "evidence", "primary_metric", "message", "probes", "selected", "guard", "selection_metric",
    "candidates", "training", "backbone", "data", "recipe", "throughput", "files", "timings", "require_gain",
}  # fmt: skip
TOP = [
    "backbone", "bad_images.jsonl", "checkpoints", "head.safetensors", "images.index", "manifest.json", "metrics.jsonl",
    "pictures.json", "recipe.yaml", "report.html", "report.json", "report.md", "status.json",
]  # fmt: skip
LABEL_FREE_METRICS = {"rankme", "d_eff", "r_eff", "view_retrieval_top1", "neighbour_overlap", "selection_score"}
LABEL_METRICS = {"knn_top1", "linear_top1", "retrieval_map"}


@pytest.fixture(autouse=True)
def _short_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps instead of fifty for the head of an export that is not the last teacher."""
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)


@pytest.fixture(scope="module")
def plain(vit: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> adaptkit.AdaptResult:
    """A run without labels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules, "MIN_REFIT_STEPS", 2)
        return adapt(vit, images, tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture(scope="module")
def with_labels(
    vit: Path, images: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory
) -> adaptkit.AdaptResult:
    """A run with labels in train/ and test/, from which the adapted weights are exported: any gain is believed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules, "MIN_REFIT_STEPS", 2)
        patch.setattr(outcome, "choose", lambda candidates: max(candidates, key=lambda c: (c.alpha < 1, c.value)))
        patch.setattr(outcome, "verdict", lambda selected, delta, collapsed: ("unchanged", False))
        return adapt(vit, images, tmp_path_factory.mktemp("runs") / "labels", labels=labelled)


def trained_on(run: Path) -> Path:
    return run / "backbone" / "model.safetensors"


# --- the run directory and the report


def test_the_run_directory_holds_exactly_what_is_promised(plain: adaptkit.AdaptResult) -> None:
    run = plain.run
    assert sorted(path.name for path in run.iterdir()) == TOP
    assert sorted(path.name for path in (run / "backbone").iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *(f"candidate-{step:08d}.safetensors" for step in (2, 4, 6)),
        "last.safetensors",
    ]
    assert read(run, "status.json") == {"state": "done", "exit_code": 0, "message": plain.report["message"]}
    assert read(run, "report.json") == plain.report
    assert plain.backbone == run / "backbone"


def test_files_can_be_read_by_others(plain: adaptkit.AdaptResult) -> None:
    """safetensors gives its files to their owner alone, whatever the umask."""
    usual = (plain.run / "recipe.yaml").stat().st_mode
    files = [path for path in plain.run.rglob("*") if path.is_file()]
    assert {path.name for path in files if path.stat().st_mode != usual} == set()


def test_report_of_a_run_without_labels(plain: adaptkit.AdaptResult, images: Path, vit: Path) -> None:
    report = plain.report
    assert set(report) == REPORT_KEYS
    assert report["schema"] == "adaptkit.report/1"
    assert (report["evidence"], report["primary_metric"]) == ("label_free", "selection_score")
    assert set(report["probes"]["before"]) == set(report["probes"]["after"]) == LABEL_FREE_METRICS
    assert set(report["probes"]["delta"]) == LABEL_FREE_METRICS
    for side in ("before", "after", "delta"):
        for score in report["probes"][side].values():
            assert set(score) == {"value", "ci95"}
            assert score["ci95"][0] <= score["value"] <= score["ci95"][1]
    data = report["data"]
    assert (data["num_images"], data["train"], data["selection"], data["report"]) == (120, 84, 18, 18)
    assert (data["path"], data["labels"], data["left_out"], data["bad_images"]) == (str(images), None, 0, 0)
    assert report["backbone"]["name"] == str(vit)
    assert (report["backbone"]["architecture"], report["backbone"]["embed_dim"]) == ("test_vit", 64)
    assert report["training"]["steps"] == 6
    assert report["training"]["epochs"] == pytest.approx(0.6)
    assert report["training"]["stopped"] is None
    assert {(c["step"], c["alpha"]) for c in report["candidates"]} >= {(2, 1.0), (4, 1.0), (6, 1.0)}
    assert sum(c["alpha"] == 0.5 for c in report["candidates"]) == 1
    assert report["require_gain"] is None
    for file in report["files"].values():
        assert (plain.run / file).exists()
    assert "accuracy" not in report["message"]


def test_manifest_and_recipe_say_what_the_run_was_made_with(plain: adaptkit.AdaptResult) -> None:
    manifest = read(plain.run, "manifest.json")
    assert torch.__version__.startswith(manifest["versions"]["torch"])
    assert manifest["num_processes"] == 1
    assert manifest["preprocessing"]["image_px"] == 32
    assert manifest["data_fingerprint"] == plain.report["data"]["fingerprint"]
    assert manifest["weights_sha256"] == plain.report["backbone"]["sha256"] is not None
    assert yaml.safe_load((plain.run / "recipe.yaml").read_text()).keys() == plain.report["recipe"].keys()
    assert load_recipe(plain.run / "recipe.yaml").model_dump(mode="json") == plain.report["recipe"]


def test_log_has_a_line_for_every_window_and_every_evaluation(plain: adaptkit.AdaptResult) -> None:
    lines = log(plain.run)
    assert [(line["step"], line["kind"]) for line in lines] == [
        (step, kind) for step in (2, 4, 6) for kind in ("train", "evaluation")
    ]
    assert {"loss", "bce", "coding_rate", "bit_agreement", "bit_information", "live_bits", "bit_entropy"} <= set(
        lines[0]
    )
    evaluated = {line["step"]: line["value"] for line in lines if line["kind"] == "evaluation"}
    assert evaluated == {c["step"]: c["value"] for c in plain.report["candidates"] if c["alpha"] == 1}


def test_report_of_a_run_with_labels(with_labels: adaptkit.AdaptResult, labelled: Path) -> None:
    report = with_labels.report
    assert (report["evidence"], report["primary_metric"]) == ("labels", "knn_top1")
    assert report["selection_metric"] == "knn_top1"
    assert set(report["probes"]["after"]) == LABEL_METRICS | LABEL_FREE_METRICS
    facts = report["data"]["labels"]
    assert facts["path"] == str(labelled)
    assert (facts["num_classes"], facts["gallery"], facts["selection"], facts["report"]) == (4, 60, 30, 30)
    assert report["selected"]["alpha"] == 0.5
    assert report["probes"]["after"]["neighbour_overlap"]["value"] < 100, "what is kept is kept of the original"


# --- what is exported is what was measured


@pytest.mark.parametrize("name", ["plain", "with_labels"])
def test_after_is_what_the_exported_folder_scores(name: str, request: pytest.FixtureRequest) -> None:
    result: adaptkit.AdaptResult = request.getfixturevalue(name)
    recipe = load_recipe(result.run / "recipe.yaml")
    judge = Judge(open_inputs(recipe), recipe, Embedder(recipe.probe.batch_size), lambda failures: None)
    judge.measure_original(load_backbone(str(recipe.backbone)))
    scores = judge.measure_selected(load_backbone(str(result.backbone))).scores
    after = result.report["probes"]["after"]
    assert {metric: score.value for metric, score in scores.items()} == pytest.approx(
        {metric: score["value"] for metric, score in after.items()}, rel=1e-5
    )


def test_the_export_loads_in_timm_and_embeds_as_it_was_probed(with_labels: adaptkit.AdaptResult, vit: Path) -> None:
    """The export is the midpoint of the original and the best candidate, whatever else the run did."""
    report = with_labels.report
    step = report["selected"]["step"]
    teacher = load_file(with_labels.run / "checkpoints" / f"candidate-{step:08d}.safetensors")
    original = load_file(vit / "model.safetensors")
    middle = {name: (original[name] + teacher[f"backbone.{name}"]) / 2 for name in original}
    expected = load_backbone(str(vit)).module
    expected.load_state_dict(middle)
    module = timm.create_model(f"local-dir:{with_labels.backbone}", pretrained=True, num_classes=0)
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(module.eval()(pixels), expected.eval()(pixels), atol=1e-5)
        assert not torch.allclose(module(pixels), load_backbone(str(vit)).module(pixels), atol=1e-3)


def test_the_head_of_the_export_gives_its_codes(with_labels: adaptkit.AdaptResult) -> None:
    head = load_file(with_labels.run / "head.safetensors")
    assert [tuple(head[name].shape) for name in sorted(head) if name.endswith("weight")] == [
        (32, 64),
        (32, 32),
        (16, 32),
    ]
    assert all(bool(tensor.isfinite().all()) for tensor in head.values())


def test_the_last_teacher_is_exported_with_its_own_head(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        outcome, "choose", lambda candidates: next(c for c in candidates if (c.step, c.alpha) == (6, 1.0))
    )
    run = adapt(vit, images, tmp_path / "run").run
    last = load_file(run / "checkpoints" / "last.safetensors")
    head = load_file(run / "head.safetensors")
    assert head.keys() == {name.removeprefix("teacher.head.") for name in last if name.startswith("teacher.head.")}
    assert all(torch.equal(head[name], last[f"teacher.head.{name}"]) for name in head)
    report = read(run, "report.json")
    if not report["guard"]["fired"]:
        exported = load_file(trained_on(run))
        assert all(torch.equal(exported[name], last[f"teacher.backbone.{name}"]) for name in exported)


# --- which images are trained on


def trained_paths(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Fills with the paths that training reads; the run stops there."""
    seen: list[list[str]] = []

    def stop(accelerator: Any, plan: Any, source: Any, *rest: Any) -> Session:
        seen.append([source.path(index) for index in range(len(source))])
        raise RuntimeError("enough seen")

    monkeypatch.setattr("adaptkit.train.open_session", stop)
    return seen


@pytest.mark.parametrize("explicit", [False, True], ids=["class folders", "train and test"])
def test_labelled_images_are_left_out_of_training(
    explicit: bool, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flat class folders: all of them. With train/ and test/: the user has said that only test is to be held out."""
    data = write_folder(tmp_path / "data", classes=2, per_class=20)
    inside = write_folder(tmp_path / "labels" / "train" if explicit else tmp_path / "labels", 2, 10)
    if explicit:
        write_folder(tmp_path / "labels" / "test", 2, 5, start=10)
    held_out = {path.read_bytes() for path in ((tmp_path / "labels" / "test") if explicit else inside).rglob("*.jpg")}
    seen = trained_paths(monkeypatch)
    with pytest.raises(RuntimeError, match="enough seen"):
        adapt(vit, data, tmp_path / "run", labels=tmp_path / "labels", batch_size=4)
    content = {(data / path).read_bytes() for path in seen[0]}
    assert not content & held_out
    gallery = {path.read_bytes() for path in inside.rglob("*.jpg")}
    assert bool(content & gallery) == explicit


def test_held_out_images_are_never_trained_on(
    plain: adaptkit.AdaptResult, vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = trained_paths(monkeypatch)
    with pytest.raises(RuntimeError, match="enough seen"):
        adapt(vit, images, tmp_path / "run")
    inputs = open_inputs(load_recipe(plain.run / "recipe.yaml"))
    held = [source.path(i) for source in (inputs.selection, inputs.report) for i in range(len(source))]
    assert len(seen[0]) == 84
    assert not set(seen[0]) & set(held)


# --- how a run can end


def test_a_required_gain_that_is_met(vit: Path, images: Path, tmp_path: Path) -> None:
    result = adapt(vit, images, tmp_path / "run", require_gain="selection_score>=-50", steps=2)
    assert result.report["require_gain"]["met"] is True
    assert read(result.run, "status.json")["exit_code"] == 0


def test_a_required_gain_that_is_not_met(vit: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(GainNotMet, match="selection_score >= 50 is not met"):
        adapt(vit, images, tmp_path / "run", require_gain="selection_score>=50", steps=2)
    status, report = read(tmp_path / "run", "status.json"), read(tmp_path / "run", "report.json")
    assert (status["state"], status["exit_code"]) == ("done", 5)
    assert report["require_gain"] == {
        "metric": "selection_score",
        "points": 50.0,
        "lower": report["probes"]["delta"]["selection_score"]["ci95"][0],
        "met": False,
    }
    assert (tmp_path / "run" / "backbone" / "model.safetensors").is_file()


def test_a_required_gain_in_a_metric_of_labels_needs_labels(vit: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="need --labels"):
        adapt(vit, images, tmp_path / "run", require_gain="knn_top1>=1")
    assert read(tmp_path / "run", "status.json")["exit_code"] == 2


def test_the_original_is_kept_when_training_only_harms(vit: Path, images: Path, labelled: Path, tmp_path: Path) -> None:
    result = adapt(vit, images, tmp_path / "run", labels=labelled, optim__lr=0.5, optim__layer_decay=1.0)
    report = result.report
    assert report["candidates"]
    assert max(c["delta"]["value"] for c in report["candidates"] if c["alpha"] == 1) < 0
    assert (report["verdict"], report["selected"]) == ("kept_original", {"step": 0, "alpha": 0.0})
    assert report["probes"]["after"] == report["probes"]["before"]
    assert {score["value"] for score in report["probes"]["delta"].values()} == {0.0}
    assert_same_tensors(trained_on(result.run), vit / "model.safetensors")


def test_the_guard_fires_when_the_report_contradicts_the_selection(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consider = select.Judge.consider

    def flatter(self: Judge, backbone: Any, step: int, alpha: float) -> select.Candidate:
        consider(self, backbone, step, alpha)
        return select.Candidate(step, alpha, 100 + step * alpha, Interval(5.0, 1.0, 9.0))

    measure_selected = select.Judge.measure_selected

    def harm(self: Judge, backbone: Any) -> Any:
        blind = backbone.clone()
        blind.module.patch_embed.proj.weight.data.zero_()
        return measure_selected(self, blind)

    monkeypatch.setattr(select.Judge, "consider", flatter)
    monkeypatch.setattr(select.Judge, "measure_selected", harm)
    result = adapt(vit, images, tmp_path / "run")
    report = result.report
    assert (report["verdict"], report["guard"]["fired"]) == ("kept_original", True)
    assert report["guard"]["delta"]["ci95"][1] < 0
    assert report["selected"] == {"step": 0, "alpha": 0.0}
    assert report["probes"]["after"] == report["probes"]["before"]
    assert "worse on the held-out images" in report["message"]
    assert_same_tensors(trained_on(result.run), vit / "model.safetensors")


@pytest.mark.long
def test_a_channel_that_stays_dead_ends_the_run_as_collapsed(vit: Path, tmp_path: Path) -> None:
    """Black images give every view the same code: no bit says anything, whatever the head."""
    for index in range(40):
        (tmp_path / "black").mkdir(exist_ok=True)
        Image.new("RGB", (48, 48)).save(tmp_path / "black" / f"{index}.png")
    recorder = Recorder()
    with pytest.raises(Collapsed, match="the code collapsed"):
        adapt(
            vit,
            tmp_path / "black",
            tmp_path / "run",
            reporter=recorder,
            steps=30,
            log_every=1,
            checkpoint_every="4 steps",
            objective__balance="never",
            objective__beta=0,
        )
    status, report = read(tmp_path / "run", "status.json"), read(tmp_path / "run", "report.json")
    assert (status["state"], status["exit_code"]) == ("done", 6)
    assert report["verdict"] == "collapsed"
    assert report["training"]["head_redraws_after_collapse"] == 2
    assert "collapsed" in report["training"]["stopped"]
    assert sum("new head, learning rate" in note for note in recorder.notes) == 2
    assert_same_tensors(trained_on(tmp_path / "run"), vit / "model.safetensors")


def break_step(monkeypatch: pytest.MonkeyPatch, when: Callable[[Session, int], bool]) -> None:
    """Make the student NaN before the steps that `when` names."""
    real = loop.set_schedule_

    def poisoned(optimizer: Any, plan: Any, step: int, lr_factor: float) -> None:
        real(optimizer, plan, step, lr_factor)
        if when(optimizer, step):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.data.fill_(float("nan"))

    monkeypatch.setattr(loop, "set_schedule_", poisoned)


@pytest.mark.long
@pytest.mark.parametrize("log_every", [1, 4], ids=["seen in the log", "seen by a probe between lines of the log"])
def test_nan_goes_back_to_the_last_good_checkpoint(
    log_every: int, vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[int] = []

    def once(optimizer: Any, step: int) -> bool:
        if step == 4 and not broken:
            broken.append(step)
            return True
        return False

    break_step(monkeypatch, once)
    recorder = Recorder()
    result = adapt(
        vit, images, tmp_path / "run", reporter=recorder, log_every=log_every, probe__every="1 steps", steps=9
    )
    assert broken == [4]
    assert len(recorder.notes) == 1
    assert "not finite; going back" in recorder.notes[0]
    assert result.report["training"]["head_redraws_after_collapse"] == 1
    assert all(np.isfinite(c["value"]) for c in result.report["candidates"])
    lr = {line["step"]: line["lr"] for line in log(result.run) if line["kind"] == "train"}
    assert result.report["training"]["last"]["loss"] is not None
    assert lr[9 if log_every == 1 else 8] > 0


@pytest.mark.long
def test_a_run_that_always_diverges_ends_as_collapsed_with_a_readable_report(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_step(monkeypatch, lambda optimizer, step: step == 5)
    with pytest.raises(Collapsed, match="not finite"):
        adapt(vit, images, tmp_path / "run")
    assert read(tmp_path / "run", "status.json")["exit_code"] == 6
    report = read(tmp_path / "run", "report.json")
    assert report["training"]["last"]["loss"] is None  # NaN is no JSON
    assert report["candidates"], "those from before it diverged still count"
    assert all(bool(t.isfinite().all()) for t in load_file(trained_on(tmp_path / "run")).values())


# --- bad and scarce images


def damage(folder: Path, count: int, every: int) -> None:
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        if number % every == 0 and number // every < count:
            path.write_bytes(path.read_bytes()[:200])


def test_bad_images_are_skipped_and_listed(vit: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", classes=2, per_class=30)
    damage(data, count=5, every=7)
    result = adapt(vit, data, tmp_path / "run", epochs=1, steps=None)
    lines = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    assert 0 < len(lines) == result.report["data"]["bad_images"] <= 5
    assert all('"reason"' in line for line in lines)
    assert result.report["training"]["steps"] == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_bad_images_end_the_run(workers: int, vit: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", classes=2, per_class=30)
    damage(data, count=30, every=2)
    with pytest.raises(DataError, match="images cannot be used, 5 are accepted"):
        adapt(vit, data, tmp_path / "run", workers=workers, steps=12)
    assert read(tmp_path / "run", "status.json")["exit_code"] == 3


def test_bad_images_that_only_training_meets_count_too(vit: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", classes=2, per_class=30)
    train_part = open_inputs(load_recipe(overrides={"data": str(data)})).train
    for index in range(6):
        train_part.file(index).write_bytes(b"no image")
    with pytest.raises(DataError, match="6 of 60 images cannot be used, 5 are accepted"):
        adapt(vit, data, tmp_path / "run", steps=12)


def test_a_handful_of_labelled_queries_gives_no_interval_but_a_report(vit: Path, images: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "labels" / "train", 2, 5, start=500)
    write_folder(tmp_path / "labels" / "test", 2, 1, start=600)
    result = adapt(vit, images, tmp_path / "run", labels=tmp_path / "labels")
    assert {c["delta"]["ci95"] for c in result.report["candidates"]} == {None}
    assert (result.verdict, result.report["selected"]["step"]) == ("kept_original", 0)


def test_an_explicit_batch_that_does_not_fit_is_an_error_and_the_default_shrinks(vit: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", classes=2, per_class=12)
    with pytest.raises(DataError, match="try --batch-size 16"):
        adapt(vit, data, tmp_path / "explicit", batch_size=64)
    recorder = Recorder()
    settings = {key: value for key, value in adapt_settings().items() if key != "batch_size"}
    result = adaptkit.adapt(str(vit), data, output=tmp_path / "run", reporter=recorder, **settings)
    assert result.report["recipe"]["batch_size"] == 8
    assert any("batch size 8 instead of 64" in note for note in recorder.notes)


def adapt_settings() -> dict[str, Any]:
    from tiny_runs import tiny

    return tiny(steps=2)


# --- reproducing a run


def test_the_recipe_of_a_run_reproduces_it_bit_for_bit(plain: adaptkit.AdaptResult, tmp_path: Path) -> None:
    adaptkit.adapt(recipe=plain.run / "recipe.yaml", output=tmp_path / "again")
    assert_same_run(plain.run, tmp_path / "again")


@pytest.mark.long
def test_workers_change_nothing(plain: adaptkit.AdaptResult, vit: Path, images: Path, tmp_path: Path) -> None:
    assert_same_run(plain.run, adapt(vit, images, tmp_path / "workers", workers=2).run)


def test_another_seed_is_another_run(plain: adaptkit.AdaptResult, vit: Path, images: Path, tmp_path: Path) -> None:
    other = adapt(vit, images, tmp_path / "seed", seed=1)
    assert log(other.run)[0]["loss"] != log(plain.run)[0]["loss"]
    assert other.report["probes"]["before"] == plain.report["probes"]["before"]  # splits and views have no seed


def test_what_was_run_before_in_the_process_changes_nothing(
    plain: adaptkit.AdaptResult, vit: Path, images: Path, tmp_path: Path
) -> None:
    torch.manual_seed(12345)
    np.random.seed(12345)
    assert_same_run(plain.run, adapt(vit, images, tmp_path / "again").run)


@pytest.mark.long
def test_the_command_line_and_python_do_the_same(
    vit: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from adaptkit.cli import main

    python = adapt(vit, images, tmp_path / "python")
    arguments = ["adapt", "--backbone", vit, "--data", images, "--output", tmp_path / "cli", *flags(), "--quiet"]
    outcome_of_cli = CliRunner().invoke(main, [str(word) for word in arguments])
    assert outcome_of_cli.exit_code == 0, outcome_of_cli.output
    assert_same_run(python.run, tmp_path / "cli")
    assert read(tmp_path / "cli", "status.json") == read(python.run, "status.json")


@pytest.mark.slow
def test_the_command_itself(vit: Path, images: Path, tmp_path: Path) -> None:
    done = command("adapt", "--backbone", vit, "--data", images, "--output", tmp_path / "run", *flags(), "--json")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{")
    assert read(tmp_path / "run", "report.json")["training"]["steps"] == 6


# --- other backbones


def test_a_backbone_with_batchnorm(resnet: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpolated weights get statistics of their own, estimated on training images, not interpolated ones."""
    monkeypatch.setattr(outcome, "choose", lambda candidates: next(c for c in candidates if c.alpha == 0.5))
    monkeypatch.setattr(outcome, "verdict", lambda selected, delta, collapsed: ("unchanged", False))
    result = adapt(resnet, images, tmp_path / "run", optim__lr=3e-3)
    step = result.report["selected"]["step"]
    teacher = load_file(result.run / "checkpoints" / f"candidate-{step:08d}.safetensors")
    original, exported = load_file(resnet / "model.safetensors"), load_file(trained_on(result.run))
    for name, tensor in exported.items():
        middle = (original[name].double() + teacher[f"backbone.{name}"].double()) / 2
        if name.endswith(("running_mean", "running_var")):
            assert not torch.allclose(tensor.double(), middle, rtol=1e-3), name
        elif not name.endswith("num_batches_tracked"):
            assert torch.allclose(tensor.double(), middle, atol=1e-6), name


def test_a_frozen_warm_up_leaves_batchnorm_alone(resnet: Path, images: Path, tmp_path: Path) -> None:
    result = adapt(resnet, images, tmp_path / "run", head__warmup="100%", steps=2)
    last, original = load_file(result.run / "checkpoints" / "last.safetensors"), load_file(resnet / "model.safetensors")
    assert all(torch.equal(last[f"student.backbone.{name}"], tensor) for name, tensor in original.items())
    assert all(torch.equal(last[f"teacher.backbone.{name}"], tensor) for name, tensor in original.items())
    assert result.report["candidates"] == []


def test_overwrite_replaces_a_run(vit: Path, images: Path, tmp_path: Path) -> None:
    adapt(vit, images, tmp_path / "run", steps=2, seed=3)
    with pytest.raises(UsageError, match="--overwrite"):
        adapt(vit, images, tmp_path / "run", steps=2)
    again = adapt(vit, images, tmp_path / "run", steps=2, overwrite=True)
    shutil.copytree(again.run, tmp_path / "kept")
    assert again.report["recipe"]["seed"] == 0
    assert [line["step"] for line in log(again.run)] == [2, 2]
