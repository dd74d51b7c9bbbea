"""`report.json` is what its published schema says, whatever the verdict, and has no key that is not in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner
from tiny_runs import adapt, read

from adaptkit.cli import main
from adaptkit.errors import Collapsed, GainNotMet
from adaptkit.report.schema import report_schema

pytestmark = pytest.mark.long


def published() -> dict[str, Any]:
    done = CliRunner().invoke(main, ["report", "--schema"], prog_name="adaptkit")
    assert done.exit_code == 0, done.stderr
    schema: dict[str, Any] = json.loads(done.stdout)
    return schema


def closed(schema: Any) -> Any:
    """The same schema, in which keys that are not described are errors."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: closed(part) for key, part in schema.items()}
    return strict | {"additionalProperties": False} if "properties" in strict else strict


def check(run: Path) -> dict[str, Any]:
    report: dict[str, Any] = read(run, "report.json")
    jsonschema.Draft202012Validator(published()).validate(report)
    jsonschema.Draft202012Validator(closed(published())).validate(report)
    return report


def test_the_schema_is_sound() -> None:
    assert published() == report_schema()
    jsonschema.Draft202012Validator.check_schema(published())
    required = {"schema", "verdict", "evidence", "primary_metric", "probes", "selected", "backbone", "data", "recipe"}
    assert required | {"throughput", "files", "timings"} <= set(published()["required"])


def test_with_labels(vit: Path, images: Path, labelled: Path, tmp_path: Path) -> None:
    report = check(adapt(vit, images, tmp_path / "run", labels=labelled).run)
    assert report["evidence"] == "labels"
    assert report["data"]["labels"] is not None


def test_without_labels(vit: Path, images: Path, tmp_path: Path) -> None:
    assert check(adapt(vit, images, tmp_path / "run").run)["evidence"] == "label_free"


def test_a_gain_that_is_not_met(vit: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(GainNotMet):
        adapt(vit, images, tmp_path / "run", require_gain="rankme>=1000")
    assert check(tmp_path / "run")["require_gain"]["met"] is False


def test_a_collapse(vit: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(Collapsed):
        adapt(vit, images, tmp_path / "run", optim__lr=1e9, head__lr=1e9, optim__warmup="never", optim__clip_norm=1e9)
    assert check(tmp_path / "run")["verdict"] == "collapsed"


@pytest.mark.parametrize(
    "damage",
    [
        lambda report: report.pop("verdict"),
        lambda report: report.update(verdict="better"),
        lambda report: report["probes"]["delta"]["rankme"].update(ci95=[1.0]),
        lambda report: report["selected"].update(alpha=2),
        lambda report: report.update(schema="adaptkit.report/2"),
    ],
)
def test_another_document_is_refused(damage: Any, a_report: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(a_report))
    damage(changed)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(published()).validate(changed)


@pytest.fixture(scope="module")
def a_report(vit: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    report: dict[str, Any] = read(adapt(vit, images, tmp_path_factory.mktemp("runs") / "run").run, "report.json")
    return report


def test_schema_or_run(tmp_path: Path) -> None:
    for words in (["report"], ["report", str(tmp_path), "--schema"]):
        done = CliRunner().invoke(main, words, prog_name="adaptkit")
        assert done.exit_code == 2
        assert "--schema alone" in done.stderr
