"""The benchmark's selection study: what it measures of checkpoints, and what it says of label-free measures."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import draw_image, write_folder
from scipy.stats import spearmanr
from tiny_runs import ROOT, adapt, read
from torch import nn

from adaptkit import outcome, schedules
from adaptkit.backbones import Backbone
from adaptkit.checkpoints import load_tensors, with_prefix
from adaptkit.embedding import Embedder
from adaptkit.inputs import open_inputs
from adaptkit.probes.measure import measure_labelled, measure_target
from adaptkit.recipe import load_recipe
from adaptkit.sources import open_folder, open_labelled

sys.path.append(str(ROOT / "benchmarks" / "quality"))
import measures
import run as benchmark
import selection

pytestmark = pytest.mark.long


def checkpoint(step: int, knn: float, **label_free: float | None) -> dict[str, Any]:
    return {"step": step, "labels": {"knn_top1": knn}, "label_free": label_free}


def line(target: str, *checkpoints: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"source": "nano", "target": target, "checkpoints": list(checkpoints)} | more


def slow_ranks(values: list[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


@pytest.mark.parametrize("seed", range(5))
def test_spearman_with_ties_against_scipy_and_a_double_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, two = rng.integers(0, 6, 20).tolist(), rng.integers(0, 6, 20).tolist()
    assert selection.ranks(one).tolist() == slow_ranks(one)
    assert selection.spearman(one, two) == pytest.approx(spearmanr(one, two).statistic)
    assert selection.spearman(one, [math.exp(value) for value in one]) == pytest.approx(1)


def test_spearman_needs_three_pairs_that_vary() -> None:
    assert selection.spearman([1, 2], [1, 2]) is None
    assert selection.spearman([1, 1, 1], [1, 2, 3]) is None
    assert selection.spearman([1, 2, 3], [5, 5, 5]) is None


def test_lines_without_checkpoints_are_left_out_and_goodness_has_a_direction() -> None:
    plain = {"source": "nano", "target": "a"}
    (run,) = selection.runs_of([plain, line("b", checkpoint(0, 50, bce=0.2, rankme=7, alpha_req=1.5, lidar=None))])
    assert (run.target, run.group) == ("b", "nano on b")
    assert run.checkpoints[0].goodness == {"bce": -0.2, "rankme": 7, "alpha_req": -0.5}
    (inner,) = selection.runs_of([line("b", checkpoint(0, 50), split="inner")])
    assert inner.group == "nano on b (inner)"
    assert "No line has checkpoints" in selection.render([plain])


def test_the_original_of_a_group_counts_once() -> None:
    lines = [line("a", checkpoint(0, 50), checkpoint(9, 60)), line("a", checkpoint(0, 50), checkpoint(9, 40))]
    runs = selection.runs_of([*lines, line("b", checkpoint(0, 30))])
    assert [c.labels["knn_top1"] for c in selection.pooled(runs)] == [50, 60, 40, 30]


def test_correlations_pooled_and_within_runs() -> None:
    """Between the runs the measure follows k-NN, within them it runs against it."""
    low = line("a", *(checkpoint(i, 10 + i, rankme=10 - i) for i in range(1, 4)))
    high = line("a", *(checkpoint(i, 90 + i, rankme=90 - i) for i in range(1, 4)))
    runs = selection.runs_of([low, high])
    x, y = [9, 8, 7, 89, 88, 87], [11, 12, 13, 91, 92, 93]
    assert selection.correlation(selection.pooled(runs), "rankme", "knn_top1") == pytest.approx(
        spearmanr(x, y).statistic
    )
    assert selection.within(runs, "rankme", "knn_top1") == pytest.approx(-1)
    assert selection.within(runs, "bce", "knn_top1") is None
    assert selection.correlation(selection.pooled(runs), "rankme", "linear_top1") is None


def test_regret_and_harm_of_every_way_to_choose() -> None:
    run = line(
        "a",
        checkpoint(0, 50, rankme=1, weight_distance=0.0),
        checkpoint(5, 60, rankme=2, weight_distance=0.5, bce=0.1),
        checkpoint(9, 40, rankme=3, weight_distance=0.9, bce=0.3),
    )
    runs = selection.runs_of([run])

    def outcome_of(choose: selection.Chooser) -> tuple[float, float]:
        (choice,) = selection.choices(runs, choose)
        return choice.regret, choice.harm

    assert outcome_of(selection.best) == (0, -10)
    assert outcome_of(selection.first) == (10, 0)
    assert outcome_of(selection.last) == (20, 10)
    assert outcome_of(selection.by_measure("rankme")) == (20, 10)
    assert outcome_of(selection.by_measure("weight_distance")) == (10, 0)
    assert outcome_of(selection.by_measure("bce")) == (0, -10)
    assert selection.choices(runs, selection.by_measure("lidar")) == []


def weighted(target: str, gain: float, overlap: float) -> dict[str, Any]:
    """A run whose last teacher has 10 points more view retrieval, `gain` more k-NN and this overlap."""
    original = checkpoint(0, 50, view_retrieval_top1=40, neighbour_overlap=100)
    return line(target, original, checkpoint(9, 50 + gain, view_retrieval_top1=50, neighbour_overlap=overlap))


def test_the_weight_is_fitted_without_the_target_it_is_judged_on() -> None:
    """In a and b the teacher that lost much overlap (w > 0.2) is worse, in c it is better."""
    lines = [weighted("a", -5, 50), weighted("b", -5, 50), weighted("c", 7, 50)]
    runs = selection.runs_of(lines)
    assert selection.fitted_weight([run for run in runs if run.target == "c"]) < 0.2
    assert selection.fitted_weight([run for run in runs if run.target != "c"]) > 0.2
    result = selection.leave_one_out(runs)
    weight, (choice,) = result["c"]
    assert weight == pytest.approx(2)  # the middle of 0.5, 1, 2, 5, 10
    assert choice.regret == 7
    assert result["a"][0] < 0.2, "c would lose more than b would win"
    assert selection.leave_one_out(runs[:1]) == {}


def test_the_page_has_every_measure_and_known_figures() -> None:
    text = selection.render([weighted("a", -5, 50), weighted("b", -5, 50), weighted("c", 7, 50)])
    assert "**Spearman correlation with k-NN**, 6 checkpoints of 3 runs" in text
    assert "| always last | 3 | 5.00 | 5.00 | 0.00 | 3.33 | 5.0 | 2 of 3 |" in text
    assert "| always original | 3 | 0.00 | 0.00 | 7.00 | 2.33 | 7.0 | 0 of 3 |" in text
    assert "| oracle | 3 | 0.00 | 0.00 | 0.00 | 0.00 | 0.0 | 0 of 3 |" in text
    assert "| c | 2 | 7.00 |" in text
    assert all(f"| {name}" in text for name in selection.MEASURES)


@pytest.fixture(scope="module")
def tiny(vit: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the train part of `labelled` that kept its candidates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules, "MIN_REFIT_STEPS", 2)
        output = tmp_path_factory.mktemp("tiny") / "run"
        return adapt(vit, labelled / "train", output, labels=labelled, select__keep=9, optim__lr=3e-3).run


@pytest.fixture(scope="module")
def rows(tiny: Path, vit: Path, labelled: Path) -> list[dict[str, Any]]:
    images = measures.target_images(str(vit), labelled, 1)
    return measures.measure_teachers(tiny, images, str(vit), labelled, checkpoints=True)


def last_teacher(tiny: Path, original: Backbone) -> Backbone:
    tensors, _ = load_tensors(tiny / "checkpoints" / "last.safetensors")
    backbone = original.clone()
    backbone.module.load_state_dict(with_prefix(tensors, "teacher.backbone."))
    return backbone


def test_the_original_every_candidate_and_the_last_teacher_are_measured(tiny: Path, rows: list[dict[str, Any]]) -> None:
    candidates = [c["step"] for c in read(tiny, "report.json")["candidates"] if c["alpha"] == 1]
    assert len(candidates) >= 2
    assert [row["step"] for row in rows] == [0, *candidates]
    assert candidates[-1] == 6


def test_held_out_images_are_those_of_the_run(tiny: Path, vit: Path, labelled: Path) -> None:
    inputs = open_inputs(load_recipe(tiny / "recipe.yaml"))
    ours = measures.held_out_of(str(vit), labelled, "file").source
    theirs = sorted(part.path(i) for part in (inputs.selection, inputs.report) for i in range(len(part)))
    assert [ours.path(index) for index in range(len(ours))] == theirs
    assert not set(theirs) & {inputs.train.path(index) for index in range(len(inputs.train))}


def test_label_free_measures_are_those_of_the_package(
    tiny: Path, vit: Path, labelled: Path, rows: list[dict[str, Any]]
) -> None:
    held_out = measures.held_out_of(str(vit), labelled, "file")
    before = measure_target(held_out.original, held_out.source, None, Embedder())
    after = measure_target(last_teacher(tiny, held_out.original), held_out.source, before, Embedder())
    for row, measured in ((rows[0], before), (rows[-1], after)):
        for name, score in measured.scores.items():
            assert row["label_free"][name] == pytest.approx(score.value, rel=1e-5), name
    original, last = rows[0]["label_free"], rows[-1]["label_free"]
    assert original["cosine_to_original"] == pytest.approx(1)
    assert original["weight_distance"] == 0
    assert 0 < last["weight_distance"] < 1
    assert last["cosine_to_original"] < 1
    assert set(original) == set(selection.MEASURES) - {"bit_entropy", "bit_information", "bce"}
    assert set(last) == set(selection.MEASURES)


def test_labels_side_is_that_of_the_probes(tiny: Path, labelled: Path, rows: list[dict[str, Any]]) -> None:
    data, backbone = open_labelled(labelled), last_teacher(tiny, rows[0]["backbone"])
    gallery, queries = (Embedder()(backbone, side) for side in (data.gallery, data.queries))
    expected = measure_labelled(gallery, queries, ["knn", "linear", "retrieval"]).scores
    assert rows[-1]["scores"].values() == {name: score.value for name, score in expected.items()}


def test_without_checkpoints_only_the_last_teacher_is_measured(
    tiny: Path, vit: Path, labelled: Path, rows: list[dict[str, Any]]
) -> None:
    images = measures.target_images(str(vit), labelled, 1)
    (row,) = measures.measure_teachers(tiny, images, str(vit), labelled, checkpoints=False)
    assert row["scores"].values() == rows[-1]["scores"].values()
    assert "label_free" not in row


def test_code_measures_against_a_slow_version() -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 5)
    views = torch.randn(40, 6)
    pair = (views, views + 0.5 * torch.randn(40, 6))
    first, second = (head(view).double().detach().numpy() for view in pair)
    losses, information, entropies = [], [], []
    for bit in range(5):
        counts = np.zeros((2, 2))
        for student, teacher in ((first, second), (second, first)):
            for a, z in zip(student[:, bit], teacher[:, bit] > 0, strict=True):
                losses.append(-math.log(1 / (1 + math.exp(-a if z else a))))
                counts[int(a > 0), int(z)] += 1
        joint = counts / counts.sum()
        rows, columns = joint.sum(1), joint.sum(0)
        terms = [(joint[i, j], rows[i] * columns[j]) for i in range(2) for j in range(2) if joint[i, j]]
        information.append(sum(p * math.log2(p / q) for p, q in terms))
        entropies.append(-sum(p * math.log2(p) for p in columns if p))
    measured = measures.code_measures(head, *pair)
    assert measured["bce"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert measured["bit_information"] == pytest.approx(np.mean(information), rel=1e-5)
    assert measured["bit_entropy"] == pytest.approx(np.mean(entropies), rel=1e-5)


def test_images_are_decoded_once_while_there_is_room(tmp_path: Path) -> None:
    source = open_folder(write_folder(tmp_path / "images", classes=1, per_class=2, px=16))
    images = measures.Decoded(source, measures.Memory(max_bytes=3 * 16 * 16))
    first, second = images.read(0), images.read(1)
    draw_image(3, 3, px=16).save(source.file(0))
    draw_image(3, 3, px=16).save(source.file(1))
    assert images.read(0) is first
    assert np.asarray(images.read(1)).tolist() != np.asarray(second).tolist(), "no room: read again"
    assert images.path(1) == source.path(1)


def test_the_inner_split_takes_two_thirds_of_every_class_of_train(labelled: Path, tmp_path: Path) -> None:
    inner = benchmark.inner_split(labelled, tmp_path / "inner")
    train, test = (open_folder(inner / side) for side in ("train", "test"))
    parts = [{side.path(index) for index in range(len(side))} for side in (train, test)]
    everything = open_folder(labelled / "train")
    assert parts[0].isdisjoint(parts[1])
    assert parts[0] | parts[1] == {everything.path(index) for index in range(len(everything))}
    for label in range(4):
        assert [sum(path.startswith(f"class_{label}/") for path in part) for part in parts] == [10, 5]
    assert all(train.file(i).resolve().parent.parent == (labelled / "train").resolve() for i in range(len(train)))
    again = open_folder(benchmark.inner_split(labelled, tmp_path / "again") / "test")
    assert {again.path(index) for index in range(len(again))} == parts[1]


def test_lines_without_a_split_are_of_the_test_part() -> None:
    old = {"source": "nano", "target": "a", "variant": "dino", "seed": 0, "images": 5}
    assert benchmark.cell_key(old) == benchmark.cell_key(old | {"split": "test"})
    assert benchmark.cell_key(old) != benchmark.cell_key(old | {"split": "inner"})


@pytest.mark.parametrize(
    ("names", "assignments", "name", "message"),
    [
        (["bits-rest"], [], None, "unknown variant 'bits-rest'"),
        (["dino"], ["optim.lr=1"], None, "belong together"),
        (["dino"], [], "mine", "belong together"),
        (["dino", "simdino"], ["optim.lr=1"], "mine", "one --variant"),
        (["dino"], ["optim.lr=1"], "simdino", "study.yaml has not"),
        (["dino"], ["optim.lr"], "mine", "write KEY=VALUE"),
        (["dino"], ["steps=3"], "mine", "use --images"),
    ],
)
def test_a_trial_that_cannot_be_named_is_refused(
    names: list[str], assignments: list[str], name: str | None, message: str
) -> None:
    with pytest.raises(click.UsageError, match=message):
        benchmark.named_variants(names, assignments, name)


def test_a_trial_is_a_variant_with_changes() -> None:
    trial = benchmark.named_variants(["lr-3x"], ["optim.lr=5e-4", "views.vflip=0.5"], "mine")
    assert trial == {"mine": {"recipe": "bits-reset", "optim.lr": "5e-4", "views.vflip": "0.5"}}


def test_a_whole_trial_on_the_inner_split(
    vit: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)
    monkeypatch.setattr(outcome, "NUM_REESTIMATED", 8)
    changes = ("batch_size=8", "workers=0", "precision=fp32", "objective.hidden_dim=32", "objective.num_bits=16")
    settings = [word for each in (*changes, "head.warmup=1 steps") for word in ("--set", each)]
    words = ["--source", vit, "--target", f"t={labelled}", "--variant", "bits-reset", "--seeds", "0", "--images", "32"]
    words += ["--split", "inner", "--kept", f"k={labelled}", "--results", tmp_path / "r.jsonl", "--name", "mine"]
    words = [str(word) for word in words]
    done = CliRunner().invoke(benchmark.main, words + settings)
    assert done.exit_code == 0, done.output
    (found,) = [json.loads(text) for text in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert (found["split"], found["variant"], found["settings"]["batch_size"]) == ("inner", "mine", "8")
    assert found["training"]["steps"] == 4
    assert found["training"]["epochs"] == pytest.approx(4 / 3), "28 of 40 images are trained on: 3 steps an epoch"
    assert found["checkpoints"][0]["step"] == 0
    assert found["checkpoints"][0]["labels"] == found["frozen"]
    assert found["checkpoints"][-1]["labels"] == found["adapted"]
    gain = found["adapted"]["knn_top1"] - found["frozen"]["knn_top1"]
    assert found["delta"]["knn_top1"][0] == pytest.approx(gain, abs=1e-4)
    forgotten = found["forgetting"]
    assert forgotten["name"] == "k"
    assert forgotten["delta"][0] == pytest.approx(forgotten["adapted"] - forgotten["frozen"], abs=1e-4)
    assert "mine, 32 images" in done.output

    assert CliRunner().invoke(benchmark.main, words + settings).exit_code == 0, "not run again"
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1
    other = CliRunner().invoke(benchmark.main, [*words, *settings, "--set", "optim.lr=1"])
    assert other.exit_code == 2
    assert "another optim.lr" in other.output
