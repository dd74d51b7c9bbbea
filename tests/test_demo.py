"""`adaptkit demo`: nothing but `adapt --recipe quick` on what the package brings along."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_runs import command, read

from adaptkit.cli import main
from adaptkit.cli.command_demo import SAMPLES
from adaptkit.inputs import open_inputs
from adaptkit.recipe import load_recipe

BUDGET_S = 300


def test_samples_are_disjoint_readable_and_licensed() -> None:
    inputs = open_inputs(load_recipe("quick", SAMPLES))
    scored = inputs.scored
    assert scored is not None
    assert len(inputs.everything) == 1500
    assert (len(scored.gallery), len(scored.selection) + len(scored.report)) == (500, 1000)
    assert inputs.facts["left_out"] == 0
    assert len(scored.gallery.class_names or ()) == 10
    sources = (inputs.everything, scored.gallery, scored.selection, scored.report)
    contents = [hashlib.sha256(s.file(i).read_bytes()).digest() for s in sources for i in range(len(s))]
    assert len(set(contents)) == len(contents) == 3000
    assert all(source.read(0).size == (64, 64) for source in sources)
    assert "Patrick Helber" in (inputs.everything.root / "LICENSE").read_text()


def test_demo_is_adapt_with_the_recipe_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both write the same recipe and hand over to the same function."""
    recipes: list[str] = []

    def execute(run: Any, as_json: bool, quiet: bool, gpus: int | None) -> None:
        recipes.append((run.path / "recipe.yaml").read_text())

    monkeypatch.setattr("adaptkit.cli.command_adapt.execute", execute)
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["demo", "--seed", "3"]).exit_code == 0
    options = ["--backbone", "nano", "--data", SAMPLES["data"][0], "--labels", SAMPLES["labels"]]
    assert CliRunner().invoke(main, ["adapt", "--recipe", "quick", "--seed", "3", *options]).exit_code == 0
    assert recipes[0] == recipes[1]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["eurosat-nano", "eurosat-nano-2"]


@pytest.mark.slow
def test_the_demo_finishes_offline_within_five_minutes(tmp_path: Path) -> None:
    """On two cores; the verdict is whatever was measured."""
    started = time.monotonic()
    offline = {"HF_HUB_OFFLINE": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    run = tmp_path / "demo"
    done = command("demo", "--output", run, "--json", timeout=2 * BUDGET_S, **offline, OMP_NUM_THREADS="2")
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < BUDGET_S
    report = json.loads(done.stdout)
    assert report["verdict"] in ("improved", "unchanged", "kept_original")
    assert report == read(run, "report.json")
    assert SimpleNamespace(**report["data"]).train == 1200
