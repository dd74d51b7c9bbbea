"""report.md: says everything the JSON says, in words that hold, and survives hostile names."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import yaml

from adaptkit.report import render_markdown
from adaptkit.report.markdown import block, code, escape, snippet
from adaptkit.report.numbers import change_text, score_text, value_text


def score(value: float, *ci95: float) -> dict[str, Any]:
    return {"value": value, "ci95": list(ci95) or None}


REPORT: dict[str, Any] = {
    "schema": "adaptkit.report/1",
    "verdict": "improved",
    "evidence": "labels",
    "primary_metric": "knn_top1",
    "selection_metric": "knn_top1",
    "message": "Improved: knn_top1 rose.",
    "probes": {
        "before": {"rankme": score(120.4, 110.2, 130.9), "knn_top1": score(61.2, 58.1, 64.3)},
        "after": {"rankme": score(98.4, 90.2, 105.9), "knn_top1": score(64.4, 61.3, 67.5)},
        "delta": {"knn_top1": score(3.2, 1.1, 5.3)},
    },
    "selected": {"step": 400, "alpha": 0.5},
    "guard": {"fired": False, "delta": score(3.2, 1.1, 5.3)},
    "candidates": [
        {"step": 200, "alpha": 1.0, "value": 62.0, "delta": score(1.0, -0.3, 2.2)},
        {"step": 400, "alpha": 0.5, "value": 64.0, "delta": score(3.0, 1.3, 4.2)},
    ],
    "training": {"steps": 500, "epochs": 9.87654, "stopped": None, "last": {"loss": 0.41234}},
    "backbone": {
        "name": "dino_vits16",
        "architecture": "vit_small_patch16_224",
        "readout": "cls",
        "embed_dim": 384,
        "image_px": 224,
        "sha256": "ab" * 32,
        "source": "timm",
    },
    "data": {
        "path": "photos",
        "num_images": 12345,
        "train": 9000,
        "selection": 1200,
        "report": 1200,
        "left_out": 45,
        "bad_images": 2,
        "fingerprint": "f" * 32,
        "labels": {"path": "labelled", "num_classes": 10, "gallery": 100, "selection": 50, "report": 50},
    },
    "recipe": {"backbone": "dino_vits16", "optim": {"lr": 0.0003}, "views": {"blur": [0.5, 0.1]}},
    "throughput": {
        "images_per_second": 123.456,
        "data_wait_percent": 1.2,
        "device": "cuda",
        "precision": "bf16",
        "num_processes": 1,
    },
    "files": {"backbone": "backbone"},
    "timings": {"load": 1.2},
    "require_gain": {"metric": "knn_top1", "points": 0.5, "lower": 1.1, "met": True},
}


def report(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(REPORT) | changes


def test_the_verdict_comes_first_and_every_part_is_there() -> None:
    text = render_markdown(REPORT)
    assert text.startswith("---\n")
    assert text.split("---\n")[2].startswith("# Improved: knn_top1 rose.\n\nVerdict: **improved**\n")
    for line in (
        "| **`knn_top1`** | 61.20% [58.10, 64.30] | 64.40% [61.30, 67.50] | +3.20 [+1.10, +5.30] |",
        "| `rankme` | 120 [110, 131] | 98.40 [90.20, 106] | n/a |",
        "| 200 | 1 | 62.00% | +1.00 [-0.30, +2.20] |  |",
        "| 400 | 0.5 | 64.00% | +3.00 [+1.30, +4.20] | selected |",
        "- Trained for 500 steps (9.877 epochs).",
        "- Unreadable images: 2 (listed in `bad_images.jsonl`).",
        "- Required gain: `knn_top1` at least +0.5: met, the lower end is 1.1.",
    ):
        assert line in text.splitlines()
    for words in (
        "Intervals are 95 %, over images, not over seeds",
        "Selected: **step 400, alpha 0.5**",
        "The guard did not fire",
        "`photos`: 12,345, of which 9,000 for training, 1,200 to select, 1,200 to report, 45 left out",
        "123.5 images per second on cuda, bf16",
        "timm.create_model('local-dir:RUN/backbone', pretrained=True, num_classes=0)",
        "Without `pretrained=True` timm gives random weights",
    ):
        assert words in text


def test_the_recipe_block_is_the_recipe() -> None:
    text = render_markdown(REPORT)
    assert yaml.safe_load(text.split("```yaml\n")[1].split("\n```")[0]) == REPORT["recipe"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"selected": {"step": 0, "alpha": 0.0}, "candidates": []}, "Selected: **the original backbone**"),
        ({"selected": {"step": 0, "alpha": 0.0}, "candidates": []}, "There was no candidate."),
        ({"selected": {"step": 0, "alpha": 0.0}}, "There was nothing to guard against"),
        (
            {"selected": {"step": 0, "alpha": 0.0}, "guard": {"fired": True, "delta": score(-2.0, -3.0, -1.0)}},
            "The guard **fired**: the selected backbone was worse on the report images; the original is kept. "
            "There the selected backbone changed -2.00 [-3.00, -1.00].",
        ),
        ({"training": {"steps": 3, "epochs": 1.0, "stopped": "the loss is not finite"}}, "Stopped early: the loss is"),
        ({"require_gain": {"metric": "knn_top1", "points": 9, "lower": None, "met": False}}, "**not met**"),
        ({"throughput": {"images_per_second": None, "data_wait_percent": None}}, "n/a images per second"),
    ],
)
def test_the_other_outcomes(changes: dict[str, Any], words: str) -> None:
    assert words in render_markdown(report(**changes))


def test_a_label_free_report_does_not_speak_of_accuracy() -> None:
    data = REPORT["data"] | {"labels": None}
    text = render_markdown(report(evidence="label_free", primary_metric="selection_score", data=data))
    assert "No labels were given." in text
    assert "accura" not in text
    assert "No labels were given." not in render_markdown(REPORT)


def test_a_bare_report_renders() -> None:
    needed = ("message", "verdict", "primary_metric", "probes")
    text = render_markdown({key: REPORT[key] for key in needed})
    assert "## Before and after" in text
    assert "## Recipe" not in text


def test_hostile_names_stay_text() -> None:
    data = REPORT["data"] | {"path": "a`b``c|d\n# e\x1b[31m\udcff"}
    text = render_markdown(report(data=data, message="<b>x</b> | *y* [z](u)\n# no"))
    assert text.split("---\n")[2].splitlines()[0] == r"# \<b\>x\</b\> \| \*y\* \[z\](u)\\n\# no"
    assert "``` a`b``c|d\\n# e\\x1b[31m\\udcff ```" in text
    text.encode("utf-8")
    assert sum(line.startswith("# ") for line in text.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "shown"),
    [("snake_case", "snake_case"), ("_x_", "\\_x\\_"), ("a*b", "a\\*b"), ("a\\b", "a\\\\b"), ("a\tb", "a\\\\tb")],
)
def test_escape(given: str, shown: str) -> None:
    assert escape(given) == shown


def test_code_and_block_fences_are_longer_than_what_they_hold() -> None:
    assert code("plain") == "`plain`"
    assert code("`") == "`` ` ``"
    assert block("```\nx", "yaml") == "````yaml\n```\nx\n````"


def test_snippet_is_python_whatever_the_path() -> None:
    line = snippet("it's\\here").splitlines()[-1]
    compile(line, "snippet", "exec")
    assert '"local-dir:it\'s\\\\here"' in line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (value_text("knn_top1", 61.25, 2), "61.25%"),
        (value_text("knn_top1", None), "n/a"),
        (score_text("retrieval_map", score(99.96, 99.93, 100.0)), "100.0% [99.9, 100]"),
        (score_text("rankme", score(1123.4, 990.2, 1140.9)), "1123 [990, 1141]"),
        (score_text("rankme", score(12.34)), "12.3"),
        (score_text("rankme", None), "n/a"),
        (change_text(score(0.04, -0.04, 0.06)), "0.0 [0.0, +0.1]"),
        (change_text(score(-120.0, -150.0, -90.1)), "-120 [-150, -90]"),
        (change_text({"value": None, "ci95": None}), "n/a"),
        (change_text({"value": 1.0, "ci95": [None, 2.0]}), "+1.0"),
    ],
)
def test_numbers(text: str, shown: str) -> None:
    assert text == shown


def test_nothing_prints_as_minus_zero() -> None:
    assert change_text(score(-1e-9)) == "0.0"
    assert not math.copysign(1, float(change_text(score(-1e-9)))) < 0
