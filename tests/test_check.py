"""`adaptkit check`: what would spoil a run is found in real files, and nothing is written."""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from click.testing import CliRunner, Result
from conftest import picture, write_folder
from PIL import Image
from tiny_runs import Recorder, flags, tiny

from adaptkit.cli import main
from adaptkit.cli.check_page import print_check
from adaptkit.cli.command_adapt import adapt_command
from adaptkit.cli.options import overrides
from adaptkit.estimate import dry_run
from adaptkit.preflight import check
from adaptkit.preflight import scan as scanning
from adaptkit.preflight.findings import HELD_OUT, TRAIN, copies, few, memory, uneven
from adaptkit.preflight.findings import tiny as tiny_images
from adaptkit.preflight.likeness import near_copies, nearly_seen
from adaptkit.preflight.scan import Look, scan
from adaptkit.preflight.worth import half_width
from adaptkit.recipe import Recipe, load_recipe
from adaptkit.sources import dhash, evenly_spaced, open_folder

SOUND = 80
TINY_CHECK = tiny(steps=2)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 sound images, and one or more of everything that the preflight knows."""
    root = write_pictures(tmp_path_factory.mktemp("spoilt") / "images", SOUND)
    (root / "text.jpg").write_text("no image")
    sound = (root / "01.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(sound[: len(sound) // 2])
    picture(8, 4, seed=500).save(root / "dot.png")
    picture(12, 40, seed=501).save(root / "thumbnail.png")
    shutil.copy(root / "02.jpg", root / "copy.jpg")
    Image.open(root / "03.jpg").resize((64, 64)).save(root / "resized.png")
    deep(0, 4095, seed=502).save(root / "dark.png")
    deep(0, 65535, seed=503).save(root / "bright.png")
    picture(48, 48, seed=504).save(root / "pages.tiff", save_all=True, append_images=[picture(48, 48, seed=505)])
    return root


@pytest.fixture(scope="module")
def found(spoilt: Path, vit: Path) -> dict[str, Any]:
    """The document of a preflight of the spoilt images."""
    result = check(str(vit), spoilt, data__max_bad="10", **TINY_CHECK)
    assert result.error is None, result.error
    return result.document


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `adaptkit check ARGS` with tiny settings in an empty folder, which must stay so."""
    monkeypatch.chdir(tmp_path)
    words = flags({"steps": 2})

    def run(*args: object) -> Result:
        result = CliRunner().invoke(main, ["check", *map(str, args), *words], prog_name="adaptkit")
        assert list(tmp_path.iterdir()) == []
        return result

    return run


def write_pictures(root: Path, count: int, px: int = 48) -> Path:
    """`root/00.jpg`, ...: pictures of which none looks like another."""
    root.mkdir(parents=True)
    for index in range(count):
        picture(px, px, seed=index).save(root / f"{index:02d}.jpg", quality=92)
    return root


def deep(low: int, high: int, seed: int) -> Image.Image:
    """A 16-bit grey picture that uses the levels from `low` to `high`."""
    levels = np.asarray(picture(48, 48, seed).convert("L")).astype(np.float64)
    share = (levels - levels.min()) / (levels.max() - levels.min())
    return Image.fromarray((low + share * (high - low)).astype(np.uint16))


def of_kind(document: dict[str, Any], kind: str) -> dict[str, Any]:
    (finding,) = [each for each in document["warnings"] if each["kind"] == kind]
    return finding


def kinds(document: dict[str, Any]) -> set[str]:
    return {finding["kind"] for finding in document["warnings"]}


@pytest.mark.parametrize(
    ("kind", "paths", "words"),
    [
        ("unreadable", ["text.jpg"], "not a readable image file"),
        ("damaged", ["cut.jpg"], "truncated"),
        ("too_small", ["dot.png"], "4 x 8 px"),
        ("tiny", ["thumbnail.png"], "under 16 px, half of the backbone's 32"),
        ("flat", ["dark.png"], "--set data.scale=percentile"),
        ("frames", ["pages.tiff"], "only the first is used"),
        ("duplicates", ["copy.jpg"], "02.jpg and copy.jpg"),
        ("near_duplicates", ["resized.png"], "03.jpg and resized.png"),
    ],
)
def test_everything_that_spoils_a_run_is_found(found: dict[str, Any], kind: str, paths: list[str], words: str) -> None:
    finding = of_kind(found, kind)
    assert finding["paths"] == paths
    assert words in finding["message"]


def test_the_document_says_what_is_there(found: dict[str, Any], spoilt: Path, vit: Path) -> None:
    assert (found["schema"], found["ok"], found["labels"]) == ("adaptkit.check/1", True, None)
    data = found["data"]
    assert (data["num_images"], data["looked_at"], data["unusable"]) == (SOUND + 9, SOUND + 9, 3)
    assert data["train"] + data["selection"] + data["report"] == SOUND + 9
    assert data["formats"] == {"JPEG": SOUND + 1, "PNG": 4, "TIFF": 1}
    assert data["bits"] == {"8": SOUND + 4, "16": 2}
    assert data["short_side"] == {"min": 12, "median": 48, "max": 64}
    weights = found["backbone"]["weights"]
    assert weights["source"] == str(vit / "model.safetensors")
    assert (len(weights["sha256"]), weights["missing"]) == (64, [])
    assert "few_images" in kinds(found)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_plan_is_that_of_a_dry_run(found: dict[str, Any], spoilt: Path, vit: Path) -> None:
    overrides = {key.replace("__", "."): value for key, value in TINY_CHECK.items()}
    recipe = load_recipe("bits-reset", {"backbone": str(vit), "data": str(spoilt), **overrides})
    plan = dry_run(recipe, Recorder())["plan"]
    measured = ("step_seconds", "seconds", "peak_bytes")
    assert {key: found["plan"][key] for key in plan if key not in measured} == {
        key: value for key, value in plan.items() if key not in measured
    }
    assert all(found["plan"][key] > 0 for key in measured)


def test_worth_is_facts_and_a_command(found: dict[str, Any]) -> None:
    worth = found["worth"]
    assert worth["measured_images"] == found["data"]["selection"] + found["data"]["report"]
    assert 0 <= worth["view_retrieval_top1"]["value"] <= 100
    assert worth["rankme"]["value"] >= 1
    assert worth["queries"] == found["data"]["report"]
    assert worth["sentence"].startswith("Only a run can tell")
    assert worth["command"].endswith("--budget 30m")


def test_interval_widths_are_those_of_simulated_answers() -> None:
    rng = np.random.default_rng(0)
    right = rng.random((20_000, 250)) < 0.5
    assert half_width(0.25, 250) == pytest.approx(1.96 * 100 * right.mean(1).std(), rel=0.03)
    changed = rng.choice([-1, 0, 1], (20_000, 250), p=[0.05, 0.9, 0.05])
    assert half_width(0.1, 250) == pytest.approx(1.96 * 100 * changed.mean(1).std(), rel=0.03)


def test_the_command_repeats_the_recipe(images: Path, labelled: Path, vit: Path) -> None:
    settings = {"head__reset_every": "never", "select__alphas": [0.5], "teacher__momentum": 0.9, "batch_size": 8}
    given = {"steps": 2, "precision": "fp32", "workers": 0, **settings}
    document = check(str(vit), [images, labelled / "test"], labels=labelled, recipe="bits-fixed", **given).document
    words = shlex.split(document["worth"]["command"])
    assert words[:2] == ["adaptkit", "adapt"]
    options = dict(adapt_command.make_context("adapt", words[2:]).params)
    recipe = load_recipe(options.pop("recipe"), overrides(only_settings(options)), options["assignments"])
    paths = {"backbone": str(vit), "data": [str(images), str(labelled / "test")], "labels": str(labelled)}
    asked = load_recipe("bits-fixed", {**paths, **{key.replace("__", "."): value for key, value in given.items()}})
    assert recipe == asked.model_copy(update={"budget": "30m"})


def only_settings(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in (*Recipe.model_fields, "max_bad", "lr")}


def test_labelled_images_that_training_would_see_are_found(labelled: Path, vit: Path, tmp_path: Path) -> None:
    labels = shutil.copytree(labelled, tmp_path / "labels")
    images = write_pictures(tmp_path / "images", 40)
    for index in range(10):  # which of them would be trained on, a hash decides
        shutil.copy(images / f"{index:02d}.jpg", labels / "test" / "class_0" / f"same_{index}.jpg")
    for index in range(10, 40):
        query = labels / "test" / "class_1" / f"like_{index}.png"
        Image.open(images / f"{index:02d}.jpg").resize((60, 60)).save(query)
    document = check(str(vit), images, labels=labels, **TINY_CHECK).document
    leak = of_kind(document, "label_leak")
    trained_on = int(leak["message"].split()[0])
    assert 15 < trained_on <= 30
    assert all(path.startswith("class_1/like_") for path in leak["paths"])
    assert len(leak["paths"]) == 10
    found = document["labels"]
    assert 4 < found["left_out_of_training"] <= 10
    assert found["classes"] == {"class_0": 40, "class_1": 60, "class_2": 30, "class_3": 30}
    assert (found["looked_at"], found["unusable"]) == (160, 0)
    assert document["data"]["train"] + found["left_out_of_training"] == 28
    assert document["worth"]["metric"] == "knn_top1"
    assert document["worth"]["queries"] == found["report"]


def test_sound_images_give_no_finding_about_pixels(tmp_path: Path, vit: Path) -> None:
    document = check(str(vit), write_pictures(tmp_path / "images", 60), **TINY_CHECK).document
    assert kinds(document) == {"few_images", "few_queries"}


def test_small_images_get_a_fitting_size_as_advice(tmp_path: Path) -> None:
    seen = scan(open_folder(write_pictures(tmp_path / "images", 20)))
    (finding,) = tiny_images(seen, 112, 16)
    assert finding.message.startswith("20 of 20 images have a short side under 56 px")
    assert "--set image_px=48" in finding.message
    assert "image_px=" not in tiny_images(seen, 112, 32)[0].message  # a single patch a side is none
    assert tiny_images(seen, 96, 16) == []


def test_smooth_images_are_not_near_duplicates(tmp_path: Path) -> None:
    for level in range(0, 200, 20):
        Image.new("RGB", (32, 32), (level, level, 90)).save(tmp_path / f"{level}.png")
    seen = scan(open_folder(tmp_path))
    assert {look.code for look in seen.looks} == {0}
    assert not any(look.has_texture for look in seen.looks)


def test_copies_on_both_sides_of_the_split_are_counted(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "images", 6)
    shutil.copytree(data, data / "again", ignore=lambda folder, names: ["again"])
    seen = scan(open_folder(data))
    parts = np.array([TRAIN] * 8 + [HELD_OUT] * 4, dtype=np.int8)  # 0..5 and again/0..5
    (finding,) = copies(seen, parts)
    assert finding.message.startswith(
        "6 of 12 images are exact copies of another, as 00.jpg and again/00.jpg; 4 of 6 groups"
    )
    assert len(finding.paths) == 6
    assert "groups" not in copies(seen, np.full(12, TRAIN, dtype=np.int8))[0].message


def test_of_images_that_hash_alike_only_those_that_look_alike_are_copies(tmp_path: Path) -> None:
    one, other = picture(64, 64, seed=1), picture(64, 64, seed=2)
    looks = [look(0, one), look(1, one.resize((50, 50))), look(2, other), look(3, other.resize((50, 50)))]
    same_hash = [replace(each, code=0x0F0F_0F0F_0F0F_0F0F) for each in looks]
    assert [[each.position for each in group] for group in near_copies(same_hash)] == [[0, 1], [2, 3]]
    pairs = nearly_seen(same_hash[::2], [same_hash[3]])
    assert [(seen.position, asked.position) for seen, asked in pairs] == [(2, 3)]
    assert near_copies([looks[0], looks[2]]) == nearly_seen([looks[0]], [looks[2]]) == []


def look(position: int, image: Image.Image) -> Look:
    small = image.convert("L").resize((16, 16), Image.Resampling.BOX)
    return Look(position, f"{position}.png", code=dhash(image), thumbnail=small.tobytes())


def test_of_many_images_an_even_sample_is_looked_at(vit: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert evenly_spaced(10, 20).tolist() == list(range(10))
    assert evenly_spaced(1_000_001, 5).tolist() == [0, 250_000, 500_000, 750_000, 1_000_000]
    monkeypatch.setattr(scanning, "MAX_IMAGES", 10)
    data = write_pictures(tmp_path / "images", 80)
    for index in range(0, 80, 3):
        (data / f"{index:02d}.jpg").write_bytes(b"damaged")
    result = check(str(vit), data, data__max_bad="20%", **TINY_CHECK)
    seen = scan(open_folder(data))
    assert (len(seen.looks), seen.num_images, seen.is_sample) == (10, 80, True)
    assert seen.expected_unusable == 8 * len(seen.unusable) > 16
    assert result.error is not None
    assert result.error.exit_code == 3
    expected = f"about {seen.expected_unusable} images cannot be used, more than max_bad 20% of 80 accepts; first: 0"
    assert str(result.error).startswith(expected)
    assert "of 10 images looked at cannot be read" in of_kind(result.document, "unreadable")["message"]


def test_looking_leaves_the_warnings_filters_alone(images: Path) -> None:
    before = list(warnings.filters)
    scan(open_folder(images))
    assert list(warnings.filters) == before


def test_a_bad_image_that_is_also_labelled_counts_once(vit: Path, tmp_path: Path) -> None:
    labels = write_folder(tmp_path / "labels" / "train", classes=2, per_class=15).parent
    write_folder(labels / "test", classes=2, per_class=15, start=100)
    for index in range(4):
        (labels / "train" / "class_0" / f"{index:04d}.jpg").write_bytes(b"damaged")
    document = check(str(vit), labels / "train", labels=labels, data__max_bad="0", **TINY_CHECK).document
    assert document["ok"]
    assert document["data"]["unusable"] == document["labels"]["unusable"] == 4


def test_too_many_bad_images_end_it_with_what_was_found(invoke: Callable[..., Result], spoilt: Path, vit: Path) -> None:
    for index in range(4):
        (spoilt / f"more_{index}.jpg").write_text("no image")
    try:
        result = invoke("--backbone", vit, "--data", spoilt, "--max-bad", "6", "--json", "--quiet")
        readable = invoke("--backbone", vit, "--data", spoilt, "--max-bad", "6", "--quiet")
    finally:
        for index in range(4):
            (spoilt / f"more_{index}.jpg").unlink()
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert (document["ok"], document["plan"], document["worth"]) == (False, None, None)
    assert document["error"]["exit_code"] == 3
    assert document["error"]["message"].startswith(
        "7 images cannot be used, more than max_bad 6 of 93 accepts; first: "
    )
    assert result.stderr == f"error: {document['error']['message']}\n"
    assert len(of_kind(document, "unreadable")["paths"]) == 5
    assert (readable.exit_code, readable.stderr) == (3, result.stderr)
    assert "unreadable: 5 of 93 images cannot be read" in readable.stdout
    assert "A run can start" not in readable.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--backbone", "VIT", "--data", "nowhere"), 3, "no such folder"),
        (("--backbone", "vit_smal", "--data", "nowhere"), 4, "unknown backbone"),
        (("--backbone", "VIT", "--data", "IMAGES", "--select", "labels"), 2, "--labels"),
        (("--backbone", "VIT", "--data", "IMAGES", "--set", "require_gain=knn_top1>=1"), 2, "knn_top1"),
        (("--backbone", "VIT", "--data", "IMAGES", "--recipe", "bits-rest"), 2, "did you mean 'bits-reset'"),
        (("--backbone", "VIT"), 2, "--data"),
    ],
)
def test_what_ends_a_run_ends_the_check_with_its_code(
    invoke: Callable[..., Result], images: Path, vit: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    places = {"VIT": str(vit), "IMAGES": str(images)}
    result = invoke(*(places.get(word, word) for word in words), "--json", "--quiet")
    assert result.exit_code == code
    assert json.loads(result.stdout)["error"]["exit_code"] == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_an_explicit_batch_that_does_not_fit_is_refused(images: Path, vit: Path) -> None:
    result = check(str(vit), images, **TINY_CHECK | {"batch_size": 500})
    assert result.error is not None
    assert result.error.exit_code == 3
    assert result.document["error"]["message"].endswith("try --batch-size 84")
    assert result.document["data"]["train"] == 84


def test_the_page_fits_into_80_columns_and_says_what_to_do(
    invoke: Callable[..., Result], images: Path, labelled: Path, vit: Path
) -> None:
    result = invoke("--backbone", vit, "--data", images, "--labels", labelled, "--quiet")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines[:-1])
    assert lines[-1].strip().startswith(f"adaptkit adapt --backbone {vit} --data {images} --labels {labelled} --set ")
    page = " ".join(result.stdout.split())
    assert "84 to train on, 18 to select, 18 to report" in page
    assert "4 classes of 30 images" in page
    assert "0 cannot be used; none left out of training" in page
    assert "2 steps of 8 images" in page
    assert "a smaller gain cannot be shown" in page
    assert "2 warnings few_images: only 84 images to train on" in page
    assert "A run can start. Only a run can tell" in page


def test_json_is_one_document_and_progress_is_on_stderr(invoke: Callable[..., Result], images: Path, vit: Path) -> None:
    result = invoke("--backbone", vit, "--data", images, "--json")
    assert json.loads(result.stdout)["ok"] is True
    assert "looking at 120 of 120 images" in result.stderr
    assert "timing a few steps" in result.stderr


def test_hostile_names_stay_text(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    finding = {"kind": "tiny", "message": "a \x1b[31m[bold]name\nb\udcff.jpg", "paths": []}
    print_check(found | {"warnings": [finding]})
    assert "tiny: a \\x1b[31m[bold]name\\nb\\udcff.jpg" in capsys.readouterr().out


def test_a_module_is_checked_too(images: Path) -> None:
    network = timm.create_model("test_vit", pretrained=False, num_classes=0, img_size=32)
    document = check(network, images, **TINY_CHECK).document
    assert document["ok"]
    assert document["worth"]["command"] is None
    assert document["backbone"]["weights"]["sha256"] is None


def test_findings_about_counts() -> None:
    assert few(200, 200, labelled=True) == []
    assert [finding.kind for finding in few(199, 199, labelled=False)] == ["few_images", "few_queries"]
    assert uneven({"a": 90, "b": 10}) == []
    (finding,) = uneven({"a": 100, "b": 10, "c": 50})
    assert finding.message.startswith("class a has 100 labelled images and b has 10")
    assert memory(95, None, "less") == memory(80, 100, "less") == []
    message = memory(95, 100, "--set micro_batch=8")[0].message
    assert "95 %" in message
    assert "--set micro_batch=8" in message
