"""report.html: says what the run found, holds everything it shows, runs nothing, and survives hostile names."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from conftest import draw_image
from PIL import Image
from test_markdown import REPORT, score
from tiny_runs import Recorder, adapt, read

import adaptkit
from adaptkit import outcome, page, pictures, schedules
from adaptkit.cli import main
from adaptkit.errors import MachineError
from adaptkit.pictures import MAX_POOL, principal_plane
from adaptkit.report.html import Facts, render_html
from adaptkit.report.html.charts import Chart, Series, line_chart, number, whisker
from adaptkit.report.html.curves import draw_curves, undisturbed
from adaptkit.report.html.examples import draw_examples
from adaptkit.run import Run

pytestmark = pytest.mark.long

SECTIONS = [
    "change", "load", "selection", "curves", "neighbours", "maps", "views", "bits", "images", "time", "provenance",
]  # fmt: skip
VOID = {"meta", "img", "br", "hr", "wbr", "input", "link"}
LOADS = {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background", "formaction"}
MAX_BYTES = 3_000_000
HOSTILE = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
HOSTILE_FILE = "<script>alert(1)<\\script>\"' onload=x .jpg"  # a file name holds no slash


class Page(HTMLParser):
    """What is on a page, after checking that its tags are balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.by_section: dict[str, str] = {}
        self.section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        assert len(given) == len(attrs), f"an attribute of {tag} is given twice"
        self.tags.append((tag, given))
        if tag == "section":
            self.section = given["id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data
            self.by_section[self.section] = self.by_section.get(self.section, "") + data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(run: Path) -> tuple[Page, str]:
    text = (run / "report.html").read_text(encoding="utf-8")
    return Page(text), text


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images, one with a hostile name, one that is none."""
    folder = tmp_path_factory.mktemp("target") / "<b>images</b>"
    folder.mkdir(parents=True)  # the slash makes two of it
    for index in range(48):
        draw_image(index % 4, index).save(folder / f"{index:02d}{HOSTILE_FILE if index % 3 == 0 else '.jpg'}")
    (folder / '<script>alert("bad").jpg').write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes of 12, one of them with a hostile name."""
    root = tmp_path_factory.mktemp("labelled")
    for label, name in enumerate(("<script>alert(3)<!--", "b&amp;b", "plain")):
        (root / name).mkdir()
        for index in range(12):
            draw_image(label, 500 + index).save(root / name / f"{index:02d}.jpg")
    return root


def fixture_run(backbone: Path, target: Path, output: Path, **changes: Any) -> adaptkit.AdaptResult:
    """A run of 4 steps, whose head is not refitted for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules, "MIN_REFIT_STEPS", 1)
        if changes.pop("believe", False):
            patch.setattr(outcome, "choose", lambda candidates: candidates[0] if candidates else None)
            patch.setattr(outcome, "verdict", lambda selected, delta, collapsed: ("unchanged", False))
        return adapt(backbone, target, output, steps=4, select__alphas=[], data__max_bad="3", **changes)


@pytest.fixture(scope="module")
def runs(vit: Path, target: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs: with labels (adapted weights exported), without (the original kept)."""
    folder = tmp_path_factory.mktemp("runs")
    with_labels = fixture_run(vit, target, folder / "labels", labels=labelled, believe=True)
    without = fixture_run(vit, target, folder / "plain")
    assert (with_labels.verdict, without.verdict) == ("unchanged", "kept_original")
    return {"labels": with_labels.run, "plain": without.run}


# --- what a page holds


@pytest.mark.parametrize("name", ["labels", "plain"])
def test_every_section_is_there_and_filled(name: str, runs: dict[str, Path]) -> None:
    found, text = page_of(runs[name])
    report = read(runs[name], "report.json")
    assert [section["id"] for section in found.all("section")] == SECTIONS
    assert "Not shown" not in found.text
    assert not found.by_section.keys() & {"absent"}
    assert report["message"] in found.text
    for metric, value in report["probes"]["before"].items():
        assert metric in found.by_section["change"]
        if value["value"] < 100:  # without a digit after the point from there on
            assert f"{value['value']:.1f}" in found.by_section["change"]
    assert "pretrained=True" in found.by_section["load"]
    for words in ("Loss", "Live bits", "Learning rate", "Probes: change of", "Rank", "entropy"):
        assert words in found.by_section["curves"]
    assert "Unreadable" not in found.by_section["images"].replace("Unreadable images", "")
    assert "no image" not in found.by_section["bits"]
    assert report["backbone"]["sha256"] in found.by_section["provenance"]
    assert report["data"]["fingerprint"] in found.by_section["provenance"]
    assert "batch_size: 8" in found.by_section["provenance"]
    assert "images a second" in found.by_section["time"]
    assert ("before and after" in found.by_section["neighbours"]) == (name == "labels")
    assert ("of its class" in found.by_section["neighbours"]) == (name == "labels")
    assert len(re.findall('<svg class="map"', text)) == (2 if name == "labels" else 1)


def test_labels_and_their_absence_are_said(runs: dict[str, Path]) -> None:
    plain, labels = (page_of(runs[name])[0] for name in ("plain", "labels"))
    assert "No labels were given." in plain.text
    assert "accuracy" not in plain.text
    assert "before and after are the same" in plain.by_section["change"]
    assert "No labels were given." not in labels.text
    assert "never for a gradient" in labels.by_section["images"]


@pytest.mark.parametrize("name", ["labels", "plain"])
def test_the_page_is_well_made_for_those_who_read_it_otherwise(name: str, runs: dict[str, Path]) -> None:
    found, _ = page_of(runs[name])
    assert found.all("html")[0]["lang"] == "en"
    headings = [int(tag[1]) for tag, _ in found.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert all(image["alt"] for image in found.all("img"))
    assert all(cell["scope"] in ("row", "col") for cell in found.all("th"))
    assert all(("role" in svg) != ("aria-hidden" in svg) for svg in found.all("svg"))
    ids = [given["id"] for _, given in found.tags if "id" in given]
    assert len(set(ids)) == len(ids)
    assert {link["href"].removeprefix("#") for link in found.all("a")} == set(SECTIONS)
    assert {given["aria-labelledby"] for _, given in found.tags if "aria-labelledby" in given} <= set(ids)


@pytest.mark.parametrize("name", ["labels", "plain"])
def test_nothing_is_loaded_or_run(name: str, runs: dict[str, Path]) -> None:
    found, text = page_of(runs[name])
    for tag, given in found.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base", "form")
        for attribute, value in given.items():
            assert not attribute.startswith("on"), (tag, attribute)
            if attribute in LOADS:
                assert value.startswith(("data:image/jpeg;base64,", "#")), (tag, attribute, value[:80])
    (policy,) = (meta["content"] for meta in found.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_names_of_images_and_classes_stay_text(runs: dict[str, Path]) -> None:
    labels, text = page_of(runs["labels"])
    assert "<script" not in text
    assert "<script>alert(3)<!--: <script>alert(3)<!--/" in labels.by_section["maps"]  # class and path of a dot
    assert any("b&amp;b" in image["alt"] for image in labels.all("img"))
    plain, text = page_of(runs["plain"])
    assert "<script" not in text
    shown = HOSTILE_FILE  # printable, so as it is
    assert any(image["alt"].endswith(shown) for image in plain.all("img"))
    assert '<script>alert("bad").jpg' in plain.by_section["images"]
    assert "<b>images</b>" in plain.by_section["images"]


def test_hostile_facts_stay_text() -> None:
    """Every string of every document may be anything: none becomes markup, and none breaks a line or hides text."""
    nasty = HOSTILE + "\n\x1b[31m\u202e\udcff"

    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key if key in KEPT_KEYS else key + HOSTILE: spoil(part) for key, part in value.items()}
        return (
            [spoil(part) for part in value] if isinstance(value, list) else nasty if isinstance(value, str) else value
        )

    changed = spoil(copy.deepcopy({k: REPORT[k] for k in ("data", "backbone", "recipe", "throughput", "timings")}))
    report = REPORT | changed | {"message": nasty, "verdict": nasty, "files": {"backbone": nasty}}
    report["training"] = REPORT["training"] | {"stopped": nasty}
    log = [{"step": 1, "kind": "train", "loss": 1.0, nasty: 2.0}, {"step": 2, "kind": "collapse", "reason": nasty}]
    pictures_ = synthetic_pictures(name=nasty)
    manifest = {"versions": {nasty: nasty}, "command": [nasty], "resumed": [{"from_step": nasty}], "python": nasty}
    bad = [{"path": nasty, "reason": nasty}]
    text = render_html(Facts(nasty, report, log, bad, manifest, pictures_ | {"missing": {"bits": nasty}}, [1], [nasty]))
    found = Page(text)
    text.encode("utf-8")
    assert {tag for tag, _ in found.tags} & {"script", "iframe"} == set()
    assert not [given for _, given in found.tags if any(key.startswith("on") for key in given)]
    assert all(image["src"].startswith("data:") for image in found.all("img"))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\u202e\\udcff" in found.text


KEPT_KEYS = {key for part in ("data", "backbone", "throughput") for key in REPORT[part]} | set(REPORT["data"]["labels"])


def jpeg(seed: int) -> str:
    """The largest thumbnail there can be: noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=pictures.QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def synthetic_pictures(name: str = "images/of/some/longer/path", classes: int = 12) -> dict[str, Any]:
    """As many pictures as there can be, with the default's two global and six local crops."""
    count, sides = MAX_POOL, ("before", "after")
    images = [{"path": f"{name}/{i}", "class": f"{name} {i % classes}", "jpeg": jpeg(i)} for i in range(count)]
    near = {side: [[(7 * q + k + 1) % count for k in range(5)] for q in range(6)] for side in sides}
    points = np.random.default_rng(0).uniform(-1, 1, (count, 2)).round(3).tolist()
    views = [{"path": name, "jpeg": jpeg(0), "global_px": 224, "local_px": 96} for _ in range(4)]
    crops = {"global": [jpeg(1)] * 2, "local": [jpeg(2)] * 6}
    bits = [{"bit": b, "ones": 0.4, "zero": list(range(6)), "one": list(range(6, 12))} for b in range(4)]
    return {
        "schema": pictures.SCHEMA,
        "images": images,
        "neighbours": {"queries": list(range(6))} | near,
        "maps": {side: {"points": points, "percent": 41.0} for side in sides},
        "bits": {"num_bits": 256, "num_usable": 200, "bits": bits},
        "views": [view | crops for view in views],
        "missing": {},
    }


def test_the_largest_page_is_still_small() -> None:
    log = [{"step": 10 * i, "kind": "train", **{f"key_{k}": i * 0.1 for k in range(12)}} for i in range(1, 10_001)]
    bad = [{"path": "x" * 200, "reason": "y" * 100}] * 500
    delta = score(1.0, -0.3, 2.2)
    candidates = [{"step": step, "alpha": 1.0, "value": 62.0, "delta": delta} for step in range(1, 1001)]
    report = REPORT | {"candidates": candidates, "selected": {"step": 500, "alpha": 1.0}}
    text = render_html(Facts("run", report, log, bad, {}, synthetic_pictures(), list(range(1, 100_000, 50))))
    found = Page(text)
    assert "41 of 1000 candidates, the selected one among them" in found.by_section["selection"]
    assert "2000 times after the first draw, too often to be drawn" in found.by_section["curves"]
    assert len(text.encode()) < MAX_BYTES
    assert "Each point is the mean of 50 lines of the log." in found.by_section["curves"]
    assert "The first 10 of 500" in found.by_section["images"]
    assert "2 rarer classes share grey dots" in found.by_section["maps"]


def test_a_bare_report_is_a_page() -> None:
    found = Page(
        render_html(Facts("run", {key: REPORT[key] for key in ("message", "verdict", "primary_metric", "probes")}))
    )
    assert [section["id"] for section in found.all("section")] == SECTIONS
    for name in ("neighbours", "maps", "views", "bits"):
        assert "Not shown" in found.by_section[name]
    assert "no training step" in found.by_section["curves"]


@pytest.mark.parametrize(
    ("changes", "section", "words"),
    [
        ({"verdict": "collapsed", "message": "Training collapsed (why)."}, "", "Training collapsed (why)."),
        ({"selected": {"step": 0, "alpha": 0.0}, "candidates": []}, "selection", "Selected: the original backbone."),
        ({"selected": {"step": 0, "alpha": 0.0}, "candidates": []}, "selection", "There was no candidate."),
        (
            {"guard": {"fired": True, "delta": score(-2.0, -3.0, -1.0)}},
            "selection",
            "There it changed -2.0 [-3.0, -1.0].",
        ),
        ({"guard": {"fired": True, "delta": score(-2.0, -3.0, -1.0)}}, "selection", "The guard fired"),
        ({"require_gain": {"metric": "m", "points": 9, "lower": None, "met": False}}, "selection", "is not met."),
        (
            {"training": {"steps": 3, "epochs": 1.0, "stopped": "the loss is not finite"}},
            "time",
            "the loss is not finite",
        ),
        ({"throughput": {"images_per_second": None, "data_wait_percent": None}}, "time", "n/a"),
        ({"recipe": {"objective": {"name": "dino"}}}, "bits", "The objective dino has no bits."),
        ({"backbone": {"architecture": ""}}, "load", "load_state_dict"),
        ({"data": REPORT["data"] | {"labels": None}}, "images", "none"),
    ],
)
def test_the_other_outcomes(changes: dict[str, Any], section: str, words: str) -> None:
    text = Page(render_html(Facts("run", copy.deepcopy(REPORT) | changes))).by_section[section]
    assert words in " ".join(text.split())


# --- when it is made, and made again


def test_the_same_files_give_the_same_bytes_even_without_the_images(runs: dict[str, Path], tmp_path: Path) -> None:
    for name, run in runs.items():
        moved = shutil.copytree(run, tmp_path / name)
        written = (moved / "report.html").read_bytes()
        (moved / "report.html").unlink()
        recipe = (moved / "recipe.yaml").read_text()
        (moved / "recipe.yaml").write_text(re.sub(r"(?m)^- /.*", "- /gone", recipe))  # nothing is looked for there
        result = CliRunner().invoke(main, ["report", str(moved)])
        assert result.exit_code == 0, result.output
        assert (moved / "report.html").read_bytes() == written


def test_what_is_missing_or_damaged_is_said(runs: dict[str, Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs["labels"], tmp_path / "run")
    (run / "pictures.json").unlink()
    (run / "manifest.json").write_text("{")
    (run / "bad_images.jsonl").unlink()
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"step": 9, "ki')
    assert CliRunner().invoke(main, ["report", str(run)]).exit_code == 0
    found, _ = page_of(run)
    for words in (
        "pictures.json is not there.",
        "manifest.json is damaged.",
        "bad_images.jsonl is not there.",
        "metrics.jsonl: 1 damaged lines are left out.",
    ):
        assert words in found.text
    for name in ("neighbours", "maps", "views", "bits"):
        assert "taken only once, at the end of a run" in found.by_section[name]
    assert "Loss" in found.by_section["curves"]
    assert not found.all("img")


def test_a_page_that_fails_loses_no_run_and_is_not_silent(
    vit: Path, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no\nsuch thing")

    monkeypatch.setattr(page, "write_page", fail)
    monkeypatch.setattr(pictures, "views", fail)
    recorder = Recorder()
    result = fixture_run(vit, target, tmp_path / "run", reporter=recorder)
    assert read(result.run, "report.json")["files"].keys() & {"html"} == set()
    assert read(result.run, "status.json")["state"] == "done"
    assert any("report.html could not be made (RuntimeError: no such thing)" in note for note in recorder.notes)
    assert any("the report has no views: RuntimeError: no such thing" in note for note in recorder.notes)
    monkeypatch.undo()
    assert CliRunner().invoke(main, ["report", str(result.run)]).exit_code == 0
    found, _ = page_of(result.run)
    assert "Not shown: RuntimeError: no such thing." in found.by_section["views"]
    assert "Not shown" not in found.by_section["neighbours"]


def test_pictures_that_cannot_be_written_are_noted(runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise MachineError("no space left")

    notes: list[str] = []
    run = Run.open(runs["plain"])
    monkeypatch.setattr(Run, "write", full)
    page.try_page(run, {"files": {"html": "report.html"}} | copy.deepcopy(REPORT), notes.append)
    assert notes == [
        "report.html could not be made (MachineError: no space left); "
        f"all else is there, and `adaptkit report {run.path}` tries again"
    ]


# --- what is shown


def test_pictures_are_of_held_out_images_only(runs: dict[str, Path], target: Path) -> None:
    from adaptkit.inputs import open_inputs

    for name, run in runs.items():
        inputs, found = open_inputs(Run.open(run).recipe), read(run, "pictures.json")
        assert found["missing"] == {}
        source = inputs.scored.report if inputs.scored else inputs.report
        paths = [source.path(i) for i in range(len(source))]
        assert [image["path"] for image in found["images"]] == [path for path in paths if "bad" not in path]
        assert (found["images"][0]["class"] is not None) == (name == "labels")
        trained = {inputs.train.path(i) for i in range(len(inputs.train))}
        assert {view["path"] for view in found["views"]} <= trained
        sizes = [Image.open(io.BytesIO(base64.b64decode(i["jpeg"]))).size for i in found["images"] if i["jpeg"]]
        assert sizes
        assert all(max(size) <= 96 for size in sizes)


def test_neighbours_against_a_double_loop() -> None:
    vectors = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    pool = make_pool(vectors)
    found = pictures.neighbours(pool)
    x = vectors.numpy() / np.linalg.norm(vectors.numpy(), axis=1, keepdims=True)
    assert found["queries"] == [0, 4, 8, 11, 15, 19]
    for query, near in zip(found["queries"], found["before"], strict=True):
        by_cosine = sorted((-float(x[query] @ x[other]), other) for other in range(20) if other != query)
        assert near == [other for _, other in by_cosine[:5]]
    assert "after" not in found


def make_pool(vectors: torch.Tensor) -> pictures.Pool:
    """Without files: thumbnails are None."""
    from adaptkit.embedding import Embeddings

    class Unread(pictures.Pool):
        def show(self, rows: Any) -> list[int]:
            return list(rows)

    paths = tuple(map(str, range(len(vectors))))
    return Unread(None, Embeddings(vectors, None, None, paths), None)  # type: ignore[arg-type]


def test_the_plane_against_an_eigendecomposition() -> None:
    vectors = torch.randn(30, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 3, 1, 1, 1, 1])
    scores, percent = principal_plane(vectors)
    x = vectors.double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    x = x - x.mean(0)
    values, axes = np.linalg.eigh(x.T @ x)
    assert percent == pytest.approx(100 * values[-2:].sum() / values.sum())
    for column, axis in enumerate((-1, -2)):
        np.testing.assert_allclose(np.abs(scores[:, column].numpy()), np.abs(x @ axes[:, axis]), atol=1e-9)
        assert scores[scores[:, column].abs().argmax(), column] > 0


def test_the_second_map_is_turned_as_close_to_the_first_as_it_can_be() -> None:
    """Against every turn in steps of a degree, mirrored or not; distances within the map stay those of its plane."""
    from dataclasses import replace

    vectors = torch.randn(40, 6, generator=torch.Generator().manual_seed(2)) * torch.tensor([5.0, 4, 1, 1, 1, 1])
    later = vectors * torch.tensor([-0.5, 1, 1, 1, 1, 1])  # the first component becomes the second
    pool = make_pool(vectors)
    found = pictures.maps(replace(pool, after=replace(pool.before, vectors=later)))
    first, second = (np.array(found[side]["points"]) for side in ("before", "after"))
    angles = np.deg2rad(np.arange(360))
    turns = [np.array([[np.cos(a), m * np.sin(a)], [-np.sin(a), m * np.cos(a)]]) for a in angles for m in (1, -1)]
    assert ((second - first) ** 2).sum() <= min(((second @ turn - first) ** 2).sum() for turn in turns) + 1e-2
    plane = principal_plane(later)[0].numpy()
    ratio = np.linalg.norm(second[1:] - second[0], axis=1) / np.linalg.norm(plane[1:] - plane[0], axis=1)
    np.testing.assert_allclose(ratio, ratio[0], rtol=2e-2)
    assert np.abs(first).max() == np.abs(second).max() == 1


def test_bits_show_the_surest_images() -> None:
    vectors = torch.randn(24, 4, generator=torch.Generator().manual_seed(4))
    head = torch.nn.Linear(4, 8)
    with torch.no_grad():
        head.bias[3] = 100.0  # always 1: nothing to show
    found = pictures.bits(make_pool(vectors), head)
    logits = head(vectors).detach().numpy()
    usable = [b for b in range(8) if min((logits[:, b] > 0).mean(), (logits[:, b] <= 0).mean()) >= 0.1]
    assert 3 not in usable
    assert found["num_usable"] == len(usable)
    assert [bit["bit"] for bit in found["bits"]] == [usable[round(k * (len(usable) - 1) / 3)] for k in range(4)]
    for bit in found["bits"]:
        column = logits[:, bit["bit"]]
        assert bit["zero"] == np.argsort(column)[:6].tolist()
        assert bit["one"] == np.argsort(-column)[:6].tolist()
        assert bit["ones"] == pytest.approx((column > 0).mean())


def test_a_view_is_what_the_network_was_given(vit: Path, target: Path) -> None:
    """Undoing the normalisation gives the crop back, where no colour was changed; grey is grey."""
    from adaptkit.backbones import load_backbone
    from adaptkit.settings import ViewSettings
    from adaptkit.views import MultiCrop
    from adaptkit.views.photometric import GREY, NEUTRAL

    seen = pictures.Seen(None, None, None, None, load_backbone(str(vit)), None, MultiCrop(ViewSettings(), 32, 16), 0)  # type: ignore[arg-type]
    crops = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    factors = torch.tensor([NEUTRAL, NEUTRAL])
    factors[1, GREY] = 1
    plain, grey = pictures._as_seen(seen, crops, factors)
    np.testing.assert_array_equal(np.asarray(plain), crops[0].permute(1, 2, 0).numpy())
    assert np.ptp(np.asarray(grey).astype(int), axis=2).max() == 0


def test_after_a_collapse_only_the_second_try_is_drawn() -> None:
    lines = [{"step": step, "kind": "train", "loss": float(step)} for step in (10, 20, 30)]
    again = [{"step": step, "kind": "train", "loss": 0.5} for step in (20, 30, 40)]
    log = [*lines, {"step": 30, "kind": "collapse", "reason": "dead"}, *again]
    kept, collapses = undisturbed(log)
    assert [(line["step"], line["loss"]) for line in kept] == [(10, 10.0), (20, 0.5), (30, 0.5), (40, 0.5)]
    assert collapses == [(30, "dead")]
    svg = str(draw_curves(log, [20], REPORT)["charts"][0]["svg"])
    assert svg.count('class="mark reset"') == 1
    assert svg.count('class="mark collapse"') == 1


def test_resets_are_those_of_the_schedule(tmp_path: Path) -> None:
    from adaptkit.recipe import load_recipe

    changes = {
        "backbone": "nano",
        "data": "x",
        "steps": 40,
        "batch_size": 8,
        "head.reset_every": "25%",
        "head.min_steps": 1,
    }
    run = Run.create(load_recipe("bits-fixed", changes), tmp_path / "run")
    assert page._resets(run, {"data": {"train": 100}, "training": {"steps": 40}}) == [10, 20, 30]
    assert page._resets(run, {"data": {"train": 100}, "training": {"steps": 15}}) == [10]
    assert page._resets(run, {}) == []


# --- drawings


def numbers_of(pattern: str, svg: str) -> list[tuple[float, ...]]:
    return [tuple(map(float, match.groups())) for match in re.finditer(pattern, svg)]


def test_a_line_lies_where_its_figures_are() -> None:
    """The y of every point, read back by the labels of the axis, is its value."""
    values = [0.42, 0.185, 0.18, 0.163]
    svg = str(line_chart(Chart("Loss", [Series("total", list(zip((10, 20, 30, 40), values, strict=True)))]), 40))
    ticks = numbers_of(r'<text text-anchor="end" x="[\d.]+" y="([\d.]+)">([\d.]+)</text>', svg)[:-1] or []
    labels = [(y - 4, value) for y, value in ticks]
    (y0, v0), (y1, v1) = labels[0], labels[-1]
    points = numbers_of(r"[ML]([\d.]+) ([\d.]+)", svg)
    assert len(points) == 4
    for (x, y), step, value in zip(points, (10, 20, 30, 40), values, strict=True):
        assert v0 + (y - y0) / (y1 - y0) * (v1 - v0) == pytest.approx(value, abs=2e-3)
        assert x == pytest.approx(46 + 284 * step / 40)
    assert "Loss: total 0.42 at step 10, 0.163 at 40." in svg


@pytest.mark.parametrize("values", [[0.0, 0.0], [5.0], [-3e-9, 2e12], [1e-7, 2e-7], [256.0] * 500, [-1.0, 0.1]])
def test_any_values_stay_inside_the_drawing(values: list[float]) -> None:
    series = Series("x", list(enumerate(values)), [(value - 1, value + 1) for value in values])
    for zero in (False, True):
        svg = str(line_chart(Chart("X", [series], zero=zero), max(1, len(values) - 1)))
        points = numbers_of(r"[ML]([\d.-]+) ([\d.-]+)", svg)
        assert len(points) <= 200
        assert all(46 <= x <= 330 and 10 <= y <= 148 for x, y in points)
        assert len(re.findall('class="(?:grid|zero)"', svg)) <= 7


@pytest.mark.parametrize(
    ("delta", "style"),
    [(score(2.0, 1.0, 3.0), "sure"), (score(-2.0, -3.0, -1.0), "sure"), (score(1.0, 0.0, 3.0), "unsure")],
)
def test_a_whisker_says_whether_the_interval_covers_zero(delta: dict[str, Any], style: str) -> None:
    svg = str(whisker(delta))
    assert f'class="{style}"' in svg
    (low, high), (middle,) = (
        numbers_of(r'class="bar" x1="([\d.]+)" y1="9" x2="([\d.]+)"', svg)[0],
        numbers_of(r'cx="([\d.]+)"', svg)[0],
    )
    reach = max(abs(end) for end in delta["ci95"])
    assert [low, middle, high] == pytest.approx(
        [64 + 60 * value / reach for value in (delta["ci95"][0], delta["value"], delta["ci95"][1])], abs=0.06
    )


def test_no_interval_no_whisker() -> None:
    assert whisker(None) == whisker(score(1.0)) == ""


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [(0, None, "0"), (0.18531, 0.3, "0.185"), (256, 300, "256"), (3e-4, None, "3e-4"), (2.86e-5, None, "2.9e-5"),
     (12345.678, None, "12,346"), (-0.5, 1, "-0.5"), (60.0, 20, "60"), (1e-12, None, "1e-12")],
)  # fmt: skip
def test_numbers_are_short(value: float, spread: float | None, text: str) -> None:
    assert number(value, spread) == text


def test_few_classes_have_colours_of_their_own_and_many_share_the_last() -> None:
    few, many = (draw_examples(synthetic_pictures(classes=count))["maps"] for count in (10, 30))
    assert (len(few["legend"]), few["num_others"]) == (10, 0)
    assert (len(many["legend"]), many["num_others"]) == (10, 20)
    assert str(many["sides"][0]["svg"]).count('class="other"') == 20 * 8


def test_text_has_contrast_in_light_and_dark() -> None:
    style = (Path(page.__file__).parent / "report" / "html" / "style.css").read_text()
    blocks = [dict(re.findall(r"--([a-z0-9]+): #([0-9a-f]{6});", part)) for part in style.split("@media screen")[:2]]
    assert len(blocks) == 2
    for colours in blocks:
        for ink in ("ink", "soft", "good", "plain", "bad"):
            for paper in ("paper", "tint"):
                assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        for line in ("s1", "s2"):
            assert contrast(colours[line], colours["paper"]) >= 3
        for mark in re.findall(r"\.(?:[cr]\d|other) \{ fill: #([0-9a-f]{6})", style):
            assert contrast(mark, colours["paper"]) >= 3, mark


def contrast(one: str, two: str) -> float:
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(one), luminance(two)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


# --- in a browser

FRAME = """<!doctype html><title>waiting</title><body style="margin:0">
<iframe id="page" src="file://{file}" width="{width}" height="900" style="border:0"></iframe><script>
window.onload = () => {{
  const page = document.getElementById("page"), root = page.contentDocument.documentElement;
  const loaded = page.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
  const broken = [...page.contentDocument.images].filter(image => !image.naturalWidth).length;
  document.title = JSON.stringify({{over: root.scrollWidth - root.clientWidth, broken: broken,
    sections: root.querySelectorAll("section").length, loaded: loaded.filter(name => !name.startsWith("data:"))}});
}}</script>"""


def browse(file: Path, width: int, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What a browser makes of the page in a frame that wide, and what it says on its console."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert browser, "this test needs a browser: install chromium, or leave it out with -m 'not slow'"
    frame = folder / f"frame-{width}.html"
    frame.write_text(FRAME.format(file=file, width=width))
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    words += ["--disable-background-networking", "--disable-component-update", "--proxy-server=127.0.0.1:9"]
    words += ["--allow-file-access-from-files", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run([*words, "--dump-dom", f"file://{frame}"], capture_output=True, text=True, timeout=120)
    title = re.search("<title>({.*})</title>", done.stdout)
    assert title, done.stdout[:500] + done.stderr[-2000:]
    return json.loads(title[1]), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 360, 1200])
def test_a_browser_shows_it_without_a_request_an_error_or_a_sideways_scroll(
    width: int, runs: dict[str, Path], tmp_path: Path
) -> None:
    pages = {name: run / "report.html" for name, run in runs.items()}
    pages["largest"] = tmp_path / "largest.html"
    log = [{"step": step, "kind": "train", "loss": 1 / step, "lr": 1e-4} for step in range(1, 100)]
    bad = [{"path": "x" * 200, "reason": "y" * 300}]
    manifest = {"command": ["adaptkit", "z" * 300]}
    pages["largest"].write_text(render_html(Facts("r" * 100, REPORT, log, bad, manifest, synthetic_pictures("p" * 90))))
    for name, file in pages.items():
        found, console = browse(file, width, tmp_path)
        assert console == [], name
        assert found == {"over": 0, "broken": 0, "sections": len(SECTIONS), "loaded": []}, name


@pytest.mark.slow
def test_the_browser_would_notice(runs: dict[str, Path], tmp_path: Path) -> None:
    """The policy refuses what a page tries to load, and the console says so; a wide table is seen."""
    text = (runs["plain"] / "report.html").read_text()
    spoilt = tmp_path / "spoilt.html"
    wide = '<img src="http://127.0.0.1:9/x.png" alt=""><script>alert(1)</script><div style="width: 2000px">x</div>'
    spoilt.write_text(text.replace("<main>", f"<main>{wide}"))
    found, console = browse(spoilt, 360, tmp_path)
    assert found["over"] > 1000
    assert found["broken"] == 1
    assert len([line for line in console if "Content Security Policy" in line]) == 2
