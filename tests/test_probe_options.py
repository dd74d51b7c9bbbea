"""What `adaptkit probe` can do beyond its default probes: drift, a reference, a cache, probes of data of their own."""

from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import timm
import torch
from conftest import write_folder

import adaptkit
from adaptkit import evaluate, vector_cache
from adaptkit.backbones import Backbone, load_backbone, save_backbone
from adaptkit.checkpoints import save_tensors
from adaptkit.cli import command_probe
from adaptkit.cli.summary import print_probe
from adaptkit.embedding import Embedder, Embeddings
from adaptkit.errors import DataError, UsageError
from adaptkit.probes import DEFAULT_PROBES, PROBES, SOURCE_PROBES, Interval, alpha_req, lidar
from adaptkit.probes.drift import linear_cka
from adaptkit.probes.fixed_views import embed_views
from adaptkit.probes.measure import Measurement, Unpaired
from adaptkit.probes.score import whole_score
from adaptkit.report.comparison import compare_backbones
from adaptkit.sources import FolderSource, open_folder, open_labelled
from adaptkit.vector_cache import JPEG, MAKERS, VectorCache, backbone_facts, content_digest

EMBEDDER = Embedder(batch_size=16, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbones") / "other"
    save_backbone(load_backbone("test_vit", pretrained=False, image_px=32, seed=5), path)
    return path


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("few") / "images", classes=3, per_class=6)


def test_the_command_names_the_probes_there_are() -> None:
    assert command_probe.DEFAULTS == DEFAULT_PROBES
    assert set(command_probe.NAMES) == {*PROBES, *SOURCE_PROBES, *evaluate.OWN_DATA}


def test_drift_lidar_and_alpha_are_those_of_their_functions(vit: Path, other: Path, few: Path) -> None:
    document = adaptkit.probe([str(vit), str(other)], few, metrics=["drift", "lidar", "alpha-req"]).document
    split = open_labelled(few)
    first, second = (load_backbone(str(path)) for path in (vit, other))
    a, b = (EMBEDDER(backbone, split.queries).vectors for backbone in (first, second))
    assert document["drift"]["cka"]["value"] == pytest.approx(linear_cka(a, b), abs=1e-6)
    assert 0 <= document["drift"]["neighbour_overlap"]["value"] <= 100
    views = embed_views(first, split.gallery, EMBEDDER)
    assert views.shape == (9, 2, first.embed_dim)
    assert document["metrics"]["lidar"]["value"] == pytest.approx(lidar(views))
    gallery = EMBEDDER(first, split.gallery).vectors
    assert document["metrics"]["alpha_req"]["value"] == pytest.approx(alpha_req(gallery), rel=1e-4)
    assert set(document["delta"]) == {"lidar", "alpha_req"}
    assert document["notes"] == [evaluate.UNCORRECTED]
    assert "better" not in document["verdict"], "a higher rank alone is not better"


def test_drift_alone_has_no_better_and_no_worse(vit: Path, other: Path, few: Path) -> None:
    document = adaptkit.probe([str(vit), str(other)], few, metrics=["drift"]).document
    assert (document["metrics"], document["delta"], document["primary_metric"]) == ({}, {}, None)
    assert "not whether it is better" in document["verdict"]
    same = adaptkit.probe([str(vit), str(vit)], few, metrics=["drift"]).document["drift"]
    assert same["cka"]["value"] == pytest.approx(1)
    assert same["neighbour_overlap"]["value"] == 100
    with pytest.raises(UsageError, match="give two"):
        adaptkit.probe(str(vit), few, metrics=["drift"])


@pytest.mark.long
def test_a_reference_gets_the_same_probes(vit: Path, other: Path, few: Path, labelled: Path) -> None:
    options: dict[str, Any] = {"metrics": ["clustering", "knn", "drift"]}
    document = adaptkit.probe([str(vit), str(other)], labelled, reference=few, **options).document
    alone = adaptkit.probe([str(vit), str(other)], few, **options).document
    for group, expected in (
        (document["metrics"], alone["metrics"]),
        (document["compared_with"]["metrics"], alone["compared_with"]["metrics"]),
        (document["delta"], alone["delta"]),
        (document["drift"], alone["drift"]),
    ):
        assert {name[10:]: value for name, value in group.items() if name.startswith("reference_")} == expected
    assert document["reference"]["num_queries"] == 9
    assert document["num_queries"] == 60
    assert document["primary_metric"] == "cluster_accuracy"
    with pytest.raises(UsageError, match="give --backbone twice"):
        adaptkit.probe(str(vit), labelled, reference=few)


def test_a_verdict_on_the_reference_is_no_praise_of_its_rank() -> None:
    change = {"reference_rankme": Interval(2.0, 1.0, 3.0), "reference_knn_top1": Interval(-2.0, -3.0, -1.0)}
    assert compare_backbones("b", ["reference_rankme"], change) == ("reference_rankme", "b: higher in reference_rankme")
    both = ["rankme", "reference_rankme", "reference_knn_top1"]
    assert compare_backbones("b", both, change) == ("reference_knn_top1", "b: worse in reference_knn_top1")
    assert compare_backbones("b", ["rankme", "reference_rankme"], {}) == ("rankme", "b: cannot tell in rankme")


def test_queries_that_find_themselves_are_counted(vit: Path, few: Path, tmp_path: Path) -> None:
    def notes(queries: Path, metric: str) -> list[str]:
        found: list[str] = adaptkit.probe(str(vit), few, queries=queries, metrics=[metric]).document["notes"]
        return found

    (note,) = notes(few, "retrieval")
    assert note.startswith("18 of 18 queries are also gallery images")
    assert notes(few, "clustering") == [], "which has no gallery"
    assert notes(write_folder(tmp_path / "new", classes=3, per_class=2, start=90), "retrieval") == []


def test_backbones_that_read_other_images_are_not_compared(
    vit: Path, few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, missing = evaluate._embed, iter([0, 0, 1, 0])  # one image of each set, but not the same queries

    def forgetful(*given: Any) -> Embeddings:
        made, lost = embed(*given), next(missing)
        assert made.labels is not None
        kept = [row for row in range(len(made.paths)) if row != lost]
        return replace(
            made, vectors=made.vectors[kept], labels=made.labels[kept], paths=tuple(made.paths[row] for row in kept)
        )

    monkeypatch.setattr(evaluate, "_embed", forgetful)
    with pytest.raises(Unpaired, match="for one backbone but not for the other"):
        adaptkit.probe([str(vit), str(vit)], few, metrics=["knn"])


def test_small_classes_leave_a_note(vit: Path, few: Path) -> None:
    document = adaptkit.probe(str(vit), few, metrics=["few-shot"]).document
    assert list(document["metrics"]) == ["few_shot_1", "few_shot_2"]
    assert document["notes"] == ["left out: few_shot_5, few_shot_10, few_shot_20 (a class has only 3 gallery images)"]


# --- probes that open their own data


def tiny_probe(backbone: Backbone, data: Path, queries: Path | None, **options: Any) -> Measurement:
    assert set(options) == {"seed", "precision", "batch_size", "workers", "device"}
    values = np.random.default_rng([options["seed"], len(backbone.name)]).normal(50, 10, 30)
    return Measurement({"mean_iou": whole_score(lambda drawn: float(values[drawn].mean()), 30)}, notes=(data.name,))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evaluate.OWN_DATA, "segmentation", tiny_probe)


@pytest.mark.usefixtures("registered")
def test_a_probe_of_its_own_data_is_measured_and_compared(vit: Path, other: Path, tmp_path: Path) -> None:
    document = adaptkit.probe([str(vit), str(other)], tmp_path / "masks", metrics=["segmentation"]).document
    before, after = document["metrics"]["mean_iou"], document["compared_with"]["metrics"]["mean_iou"]
    delta = document["delta"]["mean_iou"]
    assert delta["value"] == pytest.approx(after["value"] - before["value"])
    assert delta["ci95"][0] <= delta["value"] <= delta["ci95"][1]
    assert (document["num_gallery"], document["num_queries"], document["notes"]) == (None, 30, ["masks"])
    assert document["primary_metric"] == "mean_iou"


@pytest.mark.usefixtures("registered")
def test_a_probe_of_its_own_data_stands_alone(vit: Path, few: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="layout of its own; give knn, rank a command of their own"):
        adaptkit.probe(str(vit), few, metrics=["knn", "segmentation", "rank"])
    with pytest.raises(UsageError, match="takes no --cache"):
        adaptkit.probe(str(vit), few, metrics=["segmentation"], cache=tmp_path / "cache")


def test_a_probe_that_is_not_installed_says_so(vit: Path, few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(evaluate.OWN_DATA, "video", evaluate._of_module("not_there"))
    with pytest.raises(UsageError, match=r"has no adaptkit\.dense\.not_there"):
        adaptkit.probe(str(vit), few, metrics=["video"])
    with pytest.raises(UsageError, match="did you mean 'few-shot'"):
        adaptkit.probe(str(vit), few, metrics=["few_shot"])


# --- the cache


class Counting(Embedder):
    """Counts its passes over images."""

    def __call__(self, backbone: Backbone, source: Any) -> Any:
        passes.append(backbone.name)
        return super().__call__(backbone, source)


passes: list[str] = []


def embedded(cache: Path, backbone: Backbone, source: FolderSource, **options: Any) -> tuple[int, Any]:
    """How often the images were passed through the backbone, and the embeddings."""
    passes.clear()
    made = VectorCache.make(cache).embeddings(backbone, source, Counting(**{"batch_size": 16} | options))
    return len(passes), made


def test_the_cache_gives_back_what_was_computed(vit: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", classes=2, per_class=4)
    (data / "class_1" / "0001.jpg").write_bytes(b"no image")
    backbone, source = load_backbone(str(vit)), open_labelled(data).gallery
    plain = EMBEDDER(backbone, source)
    assert len(plain.failures) + len(plain.paths) == 4
    for expected in (1, 0):
        count, made = embedded(tmp_path / "cache", backbone, source)
        assert count == expected
        assert torch.equal(made.vectors, plain.vectors)
        assert torch.equal(made.labels, plain.labels)
        assert (made.paths, made.failures, made.class_names) == (plain.paths, plain.failures, plain.class_names)


def test_other_libraries_make_another_key(
    vit: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key() -> str:
        return VectorCache.make(tmp_path)._key("images", "fp32", load_backbone(str(vit)), open_folder(few), EMBEDDER)

    assert (torch.__version__, timm.__version__, PIL.__version__, JPEG) == MAKERS
    before = key()
    assert key() == before
    monkeypatch.setattr(vector_cache, "MAKERS", (*MAKERS[:3], "a newer libjpeg"))
    assert key() != before


@pytest.mark.long
def test_everything_that_decides_an_embedding_is_in_the_key(vit: Path, other: Path, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "data", classes=2, per_class=3)
    backbone, cache = load_backbone(str(vit)), tmp_path / "cache"
    assert embedded(cache, backbone, open_folder(data))[0] == 1
    assert embedded(cache, backbone, open_folder(data))[0] == 0
    assert embedded(cache, backbone, open_folder(data), precision="bf16")[0] == 1
    assert embedded(cache, backbone, open_folder(data), batch_size=5)[0] == 1
    assert embedded(cache, backbone, open_folder(data, "percentile"))[0] == 1
    assert embedded(cache, load_backbone(str(other)), open_folder(data))[0] == 1
    for changed in ({"image_px": 48}, {"readout": "mean"}, {"mean": (0.1, 0.2, 0.3)}):
        clone = backbone.clone()
        for name, value in changed.items():
            setattr(clone, name, value)
        assert backbone_facts(clone) != backbone_facts(backbone)
    clone = backbone.clone()
    with torch.no_grad():
        next(clone.module.parameters()).view(-1)[0] += 1e-3
    assert embedded(cache, clone, open_folder(data))[0] == 1
    file = data / "class_0" / "0001.jpg"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # as long as before
    file.write_bytes(content)
    assert embedded(cache, backbone, open_folder(data))[0] == 1
    data.rename(tmp_path / "moved")
    moved = open_folder(tmp_path / "moved")
    assert embedded(cache, backbone, moved)[0] == 0, "only the content counts"
    assert content_digest(moved) != content_digest(moved.subset(np.arange(6)[::-1].copy()))


def test_a_large_file_is_not_held_in_memory_to_know_it_again(tmp_path: Path) -> None:
    (tmp_path / "large.tif").touch()
    os.truncate(tmp_path / "large.tif", 1 << 25)
    source = open_folder(tmp_path)
    tracemalloc.start()
    content_digest(source)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 22


def test_damaged_entries_are_computed_anew(vit: Path, few: Path, tmp_path: Path) -> None:
    backbone, source = load_backbone(str(vit)), open_folder(few)
    _, good = embedded(tmp_path, backbone, source)
    (entry,) = (tmp_path / "embeddings").iterdir()
    whole = entry.read_bytes()
    swapped = whole.replace(b'"digest"', b'"dugest"')
    for damaged in (whole[:-9], whole[:-20] + b"\1" + whole[-19:], b"", swapped, b"\xff" * 400):
        entry.write_bytes(damaged)
        count, made = embedded(tmp_path, backbone, source)
        assert count == 1
        assert torch.equal(made.vectors, good.vectors)
        assert embedded(tmp_path, backbone, source)[0] == 0, "mended"
    entry.unlink()
    entry.mkdir()  # in the way of the entry: nothing can be kept, nothing is lost
    assert embedded(tmp_path, backbone, source)[0] == 1
    assert list((tmp_path / "embeddings").iterdir()) == [entry], "nothing half written is left"


@pytest.mark.parametrize("kind", ["file", "link to nowhere", "link to itself"])
def test_what_is_in_the_way_of_the_embeddings_costs_their_keeping_alone(
    vit: Path, few: Path, tmp_path: Path, kind: str
) -> None:
    folder = VectorCache.make(tmp_path).folder
    if kind == "file":
        folder.write_text("mine")
    else:
        folder.symlink_to("nowhere" if kind.endswith("nowhere") else folder)
    count, made = embedded(tmp_path, load_backbone(str(vit)), open_folder(few))
    assert (count, len(made.vectors)) == (1, 18)


def test_entries_that_fit_no_images_are_computed_anew(vit: Path, few: Path, tmp_path: Path) -> None:
    backbone, source = load_backbone(str(vit)), open_folder(few)
    _, good = embedded(tmp_path, backbone, source)
    (entry,) = (tmp_path / "embeddings").iterdir()
    rows = torch.arange(18)
    for tensors, failures in (
        ({"rows": rows.double()}, []),
        ({"rows": rows[:, None]}, []),
        ({"rows": rows[:17], "vectors": good.vectors[:17]}, 17),
        ({"rows": rows[:17], "vectors": good.vectors[:17]}, ["ab"]),
        ({"rows": rows[:17], "vectors": good.vectors[:17]}, [[None, "bad"]]),
        ({"rows": rows.flip(0)[:17], "vectors": good.vectors[:17]}, [[1, "bad"]]),
    ):
        whole = {"vectors": good.vectors.clone()} | {name: each.contiguous() for name, each in tensors.items()}
        save_tensors(entry, whole, {"key": entry.stem, "failures": failures})
        count, made = embedded(tmp_path, backbone, source)
        assert (count, torch.equal(made.vectors, good.vectors)) == (1, True), failures


def test_what_another_command_is_writing_is_left_alone(vit: Path, few: Path, tmp_path: Path) -> None:
    backbone, source = load_backbone(str(vit)), open_folder(few)
    embedded(tmp_path, backbone, source)
    (entry,) = (tmp_path / "embeddings").iterdir()
    entry.unlink()
    half = entry.with_name(f"{entry.name}.part")
    half.write_bytes(b"half")
    assert [embedded(tmp_path, backbone, source)[0] for _ in range(2)] == [1, 0]
    assert half.read_bytes() == b"half"


def test_commands_share_a_cache_of_images_and_views(
    vit: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"metrics": ["knn", "lidar", "rank"], "cache": tmp_path / "cache"}
    first = adaptkit.probe(str(vit), few, **options).document

    def refuse(*args: Any, **options: Any) -> Any:
        raise DataError("embedded again")

    monkeypatch.setattr("adaptkit.vector_cache.embed_views", refuse)
    monkeypatch.setattr(Embedder, "__call__", refuse)
    assert adaptkit.probe(str(vit), few, **options).document == first
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="give --cache a new or an empty folder"):
        adaptkit.probe(str(vit), few, cache=tmp_path / "photos")


# --- the table


def score(value: float, lo: float, hi: float) -> dict[str, Any]:
    return {"value": value, "ci95": [lo, hi]}


def test_fifteen_metrics_and_a_reference_fit_into_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["knn_top1", "linear_top1", "retrieval_map", *(f"few_shot_{n}" for n in (1, 2, 5, 10, 20))]
    names += ["cluster_accuracy", "nmi", "ari", "rankme", "d_eff", "r_eff", "alpha_req"]
    assert len(names) == 15
    metrics = {name: score(61.25, 58.11, 64.3) for name in names}
    metrics |= dict.fromkeys(("nmi", "ari"), score(0.6131, 0.5811, 0.643)) | {"alpha_req": score(3.34, 3.31, 3.36)}
    metrics |= {f"reference_{name}": value for name, value in metrics.items()}
    deltas = {name: score(-13.2, -15.3, -11.1) for name in metrics}
    deltas |= dict.fromkeys(("nmi", "ari", "alpha_req"), score(0.0312, 0.0111, 0.0532))
    drift = {"cka": score(0.91234, 0.9, 0.92), "reference_neighbour_overlap": score(71.2, 70.1, 72.3)}
    document = {"backbone": "a", "compared_with": {"backbone": "b", "metrics": metrics}, "metrics": metrics}
    document |= {"delta": deltas, "drift": drift, "verdict": "b: worse in knn_top1", "notes": [evaluate.UNCORRECTED]}
    document |= {"num_gallery": 60_000, "num_queries": 40_000, "seed": 0}
    document["reference"] = {"data": "photos", "num_gallery": 600, "num_queries": 400}
    json.dumps(document)
    print_probe(document)
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split()[0] for line in text.splitlines() if line]
    assert rows.count("cluster_accuracy") == 2, "here and on the reference"
    words = [" ".join(line.split()) for line in text.splitlines()]
    assert "nmi 0.61 [0.58, 0.64] 0.61 [0.58, 0.64] +0.031 [+0.011, +0.053]" in words
    assert "cka 0.912 [0.900, 0.920]" in words
    assert "not corrected" in text
    assert "60,000 gallery images, 40,000 queries, seed 0" in text
