"""Choice, verdict, guard and required gain, case by case."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from adaptkit import select
from adaptkit.backbones import load_backbone
from adaptkit.checkpoints import candidate_file
from adaptkit.embedding import Embedder
from adaptkit.errors import UsageError
from adaptkit.inputs import open_inputs
from adaptkit.probes import Interval
from adaptkit.recipe import load_recipe
from adaptkit.requirement import Requirement
from adaptkit.select import Candidate, Judge, best, choose, verdict
from adaptkit.supervise import Supervisor

CLEAR, DOUBTFUL, WORSE = Interval(2, 1, 3), Interval(2, -1, 5), Interval(-2, -3, -1)


def candidate(step: int, value: float, delta: Interval, alpha: float = 1.0) -> Candidate:
    return Candidate(step, alpha, value, delta)


# --- choice


def test_the_best_value_wins_only_if_it_is_beyond_doubt() -> None:
    clear, doubtful, worse = candidate(1, 60, CLEAR), candidate(2, 90, DOUBTFUL), candidate(3, 95, WORSE)
    assert choose([clear, doubtful, worse]) == clear
    assert best([clear, doubtful, worse]) == worse
    assert choose([clear, candidate(4, 61, CLEAR, alpha=0.5)]) == candidate(4, 61, CLEAR, alpha=0.5)


def test_the_original_wins_without_a_clear_candidate() -> None:
    assert choose([]) is None
    assert best([]) is None
    assert choose([candidate(1, 60, DOUBTFUL), candidate(2, 70, WORSE)]) is None
    assert choose([candidate(1, 60, Interval(1, 0, 2))]) is None, "a bound of exactly 0 is not above 0"
    assert choose([candidate(1, 60, Interval(1, -math.inf, math.inf))]) is None


CHOSEN = candidate(5, 60, CLEAR)


@pytest.mark.parametrize(
    ("selected", "delta", "collapsed", "expected"),
    [
        (CHOSEN, Interval(2, 1, 3), False, ("improved", False)),
        (CHOSEN, Interval(2, -1, 5), False, ("unchanged", False)),
        (CHOSEN, Interval(1, 0, 2), False, ("unchanged", False)),
        (CHOSEN, Interval(-1, -2, 0), False, ("unchanged", False)),
        (CHOSEN, Interval(-2, -3, -1), False, ("kept_original", True)),
        (CHOSEN, None, False, ("unchanged", False)),
        (None, None, False, ("kept_original", False)),
        (None, None, True, ("collapsed", False)),
        (CHOSEN, Interval(2, 1, 3), True, ("collapsed", False)),
        (CHOSEN, Interval(-2, -3, -1), True, ("collapsed", True)),
        (CHOSEN, None, True, ("collapsed", False)),
    ],
)
def test_verdict_and_guard(
    selected: Candidate | None, delta: Interval | None, collapsed: bool, expected: tuple[str, bool]
) -> None:
    assert verdict(selected, delta, collapsed) == expected


@pytest.mark.parametrize("delta", [CLEAR, Interval(0.5, -math.inf, math.inf)])
def test_a_candidate_survives_strict_json(delta: Interval) -> None:
    one = candidate(3, 61.5, delta, alpha=0.25)
    text = json.dumps(one.to_json(), allow_nan=False)
    assert Candidate.from_json(json.loads(text)) == one


def test_the_file_of_the_candidate_that_would_be_chosen_is_kept(tmp_path: Path) -> None:
    """Those with the highest values may all be in doubt, and the clear one beneath them."""
    all_of_them = [candidate(1, 50, CLEAR), candidate(2, 60, CLEAR), *(candidate(s, 70 + s, DOUBTFUL) for s in (3, 4))]
    state = SimpleNamespace(candidates=[c.to_json() for c in all_of_them])
    session: Any = SimpleNamespace(
        state=state,
        recipe=SimpleNamespace(select=SimpleNamespace(keep=1)),
        accelerator=SimpleNamespace(is_main_process=True),
        teacher=SimpleNamespace(backbone=nn.Identity(), head=nn.Identity()),
    )
    supervisor = Supervisor(session, SimpleNamespace(path=tmp_path), *(None,) * 3)  # type: ignore[arg-type]
    (tmp_path / "checkpoints").mkdir()
    for each in all_of_them:
        candidate_file(supervisor.folder, each.step).touch()
    supervisor._prune()
    assert [step for step in (1, 2, 3, 4) if candidate_file(supervisor.folder, step).exists()] == [2, 4]


def test_the_gallery_of_the_best_candidate_is_embedded_once(
    vit: Path, images: Path, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it scores is the same as without keeping it; another backbone is embedded anew."""
    recipe = load_recipe(overrides={"data": str(images), "labels": str(labelled)})
    inputs, backbone = open_inputs(recipe), load_backbone(str(vit))
    other = load_backbone("test_vit", pretrained=False, image_px=32, seed=5)
    judge = Judge(inputs, recipe, Embedder(), list)
    judge.measure_original(backbone)
    monkeypatch.setattr(select, "compare", lambda before, after: {judge.metric: CLEAR})
    judge.consider(other, 3, 1.0)
    asked: list[object] = []
    embed = Embedder.__call__
    monkeypatch.setattr(Embedder, "__call__", lambda self, b, source: asked.append(source) or embed(self, b, source))
    assert inputs.scored is not None
    kept = judge.measure_selected(other.clone()).scores
    assert inputs.scored.gallery not in asked
    judge.measure_selected(backbone)
    assert inputs.scored.gallery in asked
    judge._kept = None
    again = judge.measure_selected(other).scores
    assert {name: score.value for name, score in kept.items()} == {name: score.value for name, score in again.items()}


# --- required gain

KNOWN = ["knn_top1", "selection_score"]


@pytest.mark.parametrize("text", ["knn_top1>=0.5", " knn_top1 >= 0.5 ", "knn_top1>=+5e-1"])
def test_requirement_is_read(text: str) -> None:
    assert Requirement.parse(text, KNOWN) == Requirement("knn_top1", 0.5)


@pytest.mark.parametrize(
    "text",
    ["knn_top1", "knn_top1>0.5", "knn_top1=0.5", "knn_top1>=", "knn_top1>=x", "knn_top1>=nan", "knn_top1>=inf"],
)
def test_another_form_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match="write METRIC>=POINTS"):
        Requirement.parse(text, KNOWN)


def test_an_unknown_metric_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean 'knn_top1'"):
        Requirement.parse("knn_top>=1", KNOWN)
    with pytest.raises(UsageError, match="metrics of labels need --labels"):
        Requirement.parse("knn_top1>=1", ["selection_score"])


@pytest.mark.parametrize(
    ("lower", "met"),
    [(1, True), (0.5, False), (None, False), (2, True)],
)
def test_the_lower_end_decides(lower: float | None, met: bool) -> None:
    assert Requirement("knn_top1", 1).judge(lower) == {"metric": "knn_top1", "points": 1, "lower": lower, "met": met}


# --- images that come and go while a run trains


@pytest.mark.parametrize("with_labels", [False, True])
def test_an_image_lost_since_the_original_was_measured_ends_nothing(
    with_labels: bool, vit: Path, labelled: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(labelled, folder)
    recipe = load_recipe(overrides={"data": str(folder), **({"labels": str(folder)} if with_labels else {})})
    inputs, backbone = open_inputs(recipe), load_backbone(str(vit))
    judge = Judge(inputs, recipe, Embedder(), list)
    before = judge.measure_original(backbone)
    parts = [inputs.selection, inputs.report]
    if inputs.scored is not None:
        parts += [inputs.scored.selection, inputs.scored.report]
    for part in parts:
        part.file(0).write_bytes(b"gone")
    considered = judge.consider(backbone, 1, 1.0)
    assert (considered.delta.value, considered.delta.lo, considered.delta.hi) == (0, 0, 0)
    after = judge.measure_selected(backbone)
    for name in ("view_retrieval_top1", *(("knn_top1",) if with_labels else ())):
        now, then, first = (m.scores[name].per_query.tolist() for m in (after, judge.original_report, before))
        assert len(now) == len(then) < len(first)
