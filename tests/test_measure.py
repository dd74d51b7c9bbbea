"""Measuring and comparing backbones, against slow versions; and the document that `adaptkit probe` prints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_image, write_folder

import adaptkit
from adaptkit.backbones import load_backbone
from adaptkit.embedding import Embedder, Embeddings
from adaptkit.errors import DataError, UsageError
from adaptkit.probes import Score, d_eff, paired_jackknife, r_eff, rankme
from adaptkit.probes.measure import KEPT_WEIGHT, Measurement, compare, measure_labelled, measure_target, selection_score
from adaptkit.sources import open_folder, open_labelled

EMBEDDER = Embedder(batch_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("few") / "images", classes=3, per_class=8)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another backbone than `vit`: other weights, same architecture."""
    from adaptkit.backbones import save_backbone

    path = tmp_path_factory.mktemp("backbones") / "other"
    save_backbone(load_backbone("test_vit", pretrained=False, image_px=32, seed=5), path)
    return path


def slow_overlap(before: np.ndarray, after: np.ndarray, k: int = 10) -> list[float]:
    def neighbours(vectors: np.ndarray, i: int) -> set[int]:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        order = [int(j) for j in np.argsort(-(unit @ unit[i]), kind="stable") if j != i]
        return set(order[:k])

    return [len(neighbours(before, i) & neighbours(after, i)) / k for i in range(len(before))]


def test_the_original_keeps_all_its_neighbours(vit: Path, folder: Path) -> None:
    scores = measure_target(load_backbone(str(vit)), open_folder(folder), None, EMBEDDER).scores
    assert scores["neighbour_overlap"].value == 100
    assert scores["selection_score"].value == pytest.approx(
        100 * KEPT_WEIGHT + (1 - KEPT_WEIGHT) * scores["view_retrieval_top1"].value
    )
    assert set(scores) == {"rankme", "d_eff", "r_eff", "view_retrieval_top1", "neighbour_overlap", "selection_score"}


def test_overlap_and_score_against_a_slow_version(vit: Path, other: Path, folder: Path) -> None:
    first, second = load_backbone(str(vit)), load_backbone(str(other))
    source = open_folder(folder)
    before = measure_target(first, source, None, EMBEDDER)
    after = measure_target(second, source, before, EMBEDDER)
    a, b = (EMBEDDER(backbone, source).vectors.double().numpy() for backbone in (first, second))
    expected = 100 * np.array(slow_overlap(a, b))
    kept, found = after.scores["neighbour_overlap"], after.scores["view_retrieval_top1"]
    assert kept.per_query is not None
    assert found.per_query is not None
    assert np.allclose(kept.per_query.numpy(), expected, atol=1e-4)
    assert set(found.per_query.tolist()) <= {0.0, 100.0}
    score = after.scores["selection_score"].per_query
    assert score is not None
    assert torch.allclose(score, KEPT_WEIGHT * kept.per_query + (1 - KEPT_WEIGHT) * found.per_query)
    alone = measure_target(second, source, None, EMBEDDER).scores
    assert alone["view_retrieval_top1"].value == found.value, "only what is kept depends on the original"


def test_views_are_fixed_by_the_image_alone(vit: Path, folder: Path) -> None:
    """Neither chance, nor the batch, nor the image's place in the list changes them."""
    backbone, source = load_backbone(str(vit)), open_folder(folder)
    first = measure_target(backbone, source, None, EMBEDDER).scores["view_retrieval_top1"].per_query
    torch.manual_seed(99)
    order = np.arange(len(source))[::-1].copy()
    second = measure_target(backbone, source.subset(order), None, Embedder(batch_size=5))
    again = second.scores["view_retrieval_top1"].per_query
    assert first is not None
    assert again is not None
    assert torch.equal(first, again.flip(0))


def test_measuring_leaves_the_backbone_and_chance_as_they_were(vit: Path, folder: Path) -> None:
    backbone = load_backbone(str(vit))
    backbone.module.train()
    before = {name: tensor.clone() for name, tensor in backbone.module.state_dict().items()}
    state = torch.get_rng_state()
    measure_target(backbone, open_folder(folder), None, EMBEDDER)
    assert backbone.module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.module.state_dict().items())


def test_bad_images_are_left_out_on_both_sides(vit: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", classes=2, per_class=6)
    (data / "class_0" / "0002.jpg").write_bytes(b"no image")
    measured = measure_target(load_backbone(str(vit)), open_folder(data), None, EMBEDDER)
    assert [path for path, _ in measured.failures] == ["class_0/0002.jpg"]
    for name in ("view_retrieval_top1", "neighbour_overlap"):
        assert len(measured.scores[name].per_query) == 11  # type: ignore[arg-type]


def test_selection_score_rewards_both_what_is_found_and_what_is_kept() -> None:
    found, kept = torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.5])
    assert 0 < KEPT_WEIGHT < 1, "spread alone would reward harm"
    expected = [1.0, KEPT_WEIGHT, 1 - KEPT_WEIGHT, KEPT_WEIGHT / 2]
    assert selection_score(found, kept).tolist() == pytest.approx(expected)


# --- comparing


def test_compare_pairs_image_by_image() -> None:
    before, after = torch.tensor([0.0, 100, 0, 100]), torch.tensor([100.0, 100, 0, 100])
    deltas = compare(Measurement({"m": Score(50, before)}), Measurement({"m": Score(75, after), "new": Score(1)}))
    assert set(deltas) == {"m"}
    delta = deltas["m"]
    assert delta is not None
    assert (delta.value, delta.lo) == (25, 0), "pairing leaves no query that got worse"


def test_compare_gives_no_interval_for_one_query_and_refuses_other_queries() -> None:
    one = Measurement({"m": Score(50, torch.tensor([50.0]))})
    assert compare(one, one) == {"m": None}
    with pytest.raises(DataError, match="could be read before but not after"):
        compare(one, Measurement({"m": Score(50, torch.tensor([50.0, 50.0]))}))


def test_compare_refuses_as_many_other_images() -> None:
    def measured(*paths: str) -> Measurement:
        queries = Embeddings(torch.zeros(len(paths), 2), None, None, paths)
        return Measurement({"m": Score(50, torch.tensor([0.0, 100.0]))}, queries=queries)

    assert compare(measured("a", "b"), measured("a", "b"))
    with pytest.raises(DataError, match="not the same images"):
        compare(measured("a", "b"), measured("a", "c"))


def test_compare_ranks_leaves_out_the_same_images_on_both_sides(vit: Path, other: Path, folder: Path) -> None:
    source = open_folder(folder)
    before = measure_target(load_backbone(str(vit)), source, None, EMBEDDER)
    after = measure_target(load_backbone(str(other)), source, before, EMBEDDER)
    delta = compare(before, after)["rankme"]
    assert delta is not None
    assert delta.value == pytest.approx(after.scores["rankme"].value - before.scores["rankme"].value)
    same = compare(before, before)["rankme"]
    assert same is not None
    assert (same.value, same.lo, same.hi) == (0, 0, 0)


def test_measurements_are_joined() -> None:
    left = Measurement({"a": Score(1)}, None, (("x", "bad"),))
    right = Measurement({"b": Score(2)}, torch.ones(1, 1), (("y", "bad"),))
    assert set((left | right).scores) == {"a", "b"}
    assert (left | right).vectors is right.vectors
    assert (right | left).vectors is right.vectors
    assert (left | right).failures == (("x", "bad"), ("y", "bad"))


# --- probe

DOCUMENT = {"schema", "backbone", "data", "metrics", "num_gallery", "num_queries", "num_classes", "num_bad", "seed"} | {
    "num_without_gallery",
    "notes",
}


def test_probe_of_labelled_images(vit: Path, labelled: Path) -> None:
    document = adaptkit.probe(str(vit), labelled).document
    assert set(document) == DOCUMENT
    assert document["schema"] == "adaptkit.probe/1"
    assert (document["backbone"], document["data"]) == (str(vit), str(labelled))
    assert (document["num_gallery"], document["num_queries"], document["num_classes"]) == (60, 60, 4)
    assert {"knn_top1", "linear_top1", "retrieval_map", "rankme"} <= set(document["metrics"])
    json.dumps(document, allow_nan=False)
    split = open_labelled(labelled)
    backbone = load_backbone(str(vit))
    expected = measure_labelled(EMBEDDER(backbone, split.gallery), EMBEDDER(backbone, split.queries), ["knn"])
    assert document["metrics"]["knn_top1"]["value"] == pytest.approx(expected.scores["knn_top1"].value)


def test_probe_with_queries_is_the_same_as_train_and_test(vit: Path, labelled: Path) -> None:
    split = adaptkit.probe(str(vit), labelled, metrics=["knn", "retrieval"]).document
    given = adaptkit.probe(
        str(vit), labelled / "train", queries=labelled / "test", metrics=["knn", "retrieval"]
    ).document
    assert given["metrics"] == split["metrics"]
    assert set(given["metrics"]) == {"knn_top1", "retrieval_map"}


def test_probe_halves_class_folders_by_the_seed(vit: Path, folder: Path) -> None:
    documents = [adaptkit.probe(str(vit), folder, metrics=["knn"], seed=seed).document for seed in (0, 0, 1)]
    assert documents[0] == documents[1]
    assert (documents[0]["num_gallery"], documents[0]["num_queries"]) == (12, 12)
    assert documents[2]["seed"] == 1


def flat(root: Path, count: int) -> Path:
    root.mkdir()
    for index in range(count):
        draw_image(0, index).save(root / f"{index}.png")
    return root


def test_probe_of_unlabelled_images_measures_ranks(vit: Path, tmp_path: Path) -> None:
    data = flat(tmp_path / "flat", 10)
    document = adaptkit.probe(str(vit), data).document
    assert set(document["metrics"]) == {"rankme", "d_eff", "r_eff"}
    assert (document["num_queries"], document["num_classes"]) == (10, None)
    with pytest.raises(DataError, match="no labels for knn"):
        adaptkit.probe(str(vit), data, metrics=["knn"])


def test_probe_of_two_backbones_compares_them(vit: Path, other: Path, labelled: Path) -> None:
    document = adaptkit.probe([str(vit), str(other)], labelled, metrics=["knn", "rank"]).document
    assert set(document) == DOCUMENT | {"compared_with", "delta", "primary_metric", "verdict"}
    second = document["compared_with"]
    assert second["backbone"] == str(other)
    for name, delta in document["delta"].items():
        expected = second["metrics"][name]["value"] - document["metrics"][name]["value"]
        assert delta["value"] == pytest.approx(expected, abs=1e-4)
        assert delta["ci95"][0] <= delta["value"] <= delta["ci95"][1]
    assert "knn_top1" in document["verdict"]
    assert adaptkit.probe(str(other), labelled, metrics=["knn", "rank"]).document["metrics"] == second["metrics"]
    same = adaptkit.probe([str(vit), str(vit)], labelled, metrics=["knn"]).document
    assert same["delta"]["knn_top1"] == {"value": 0, "ci95": [0, 0]}


def test_two_backbones_on_too_few_images_for_an_interval(vit: Path, other: Path, tmp_path: Path) -> None:
    document = adaptkit.probe([str(vit), str(other)], flat(tmp_path / "flat", 3)).document
    assert document["delta"] == {}
    assert "cannot tell" in document["verdict"]


def test_an_unknown_probe_gets_a_suggestion(vit: Path, labelled: Path) -> None:
    with pytest.raises(UsageError, match=r"unknown probe 'kn'.*did you mean 'knn'"):
        adaptkit.probe(str(vit), labelled, metrics=["kn"])


def test_paired_ranks_equal_those_computed_anew(vit: Path, other: Path, folder: Path) -> None:
    source = open_folder(folder)
    before = measure_target(load_backbone(str(vit)), source, None, EMBEDDER)
    after = measure_target(load_backbone(str(other)), source, before, EMBEDDER)
    assert before.vectors is not None
    assert after.vectors is not None
    deltas = compare(before, after)
    for name, fn in (("rankme", rankme), ("d_eff", d_eff), ("r_eff", r_eff)):
        assert deltas[name] == paired_jackknife(fn, before.vectors, after.vectors)
