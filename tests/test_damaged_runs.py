"""A run whose own files are damaged or gone either goes on or says so in one line, with its exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import refused
from tiny_runs import SignalAt, adapt, log, read

import adaptkit
from adaptkit.checkpoints import LAST, load_state
from adaptkit.errors import AdaptkitError, DataError, Interrupted, UsageError

pytestmark = pytest.mark.long

Damage = Callable[[Path], object]
RUNS_ON = None  # beside the kind of error and its words: it is resumed


@pytest.fixture(scope="module")
def stopped(vit: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after step 4 of 6."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted):
        adapt(vit, images, run, reporter=SignalAt(4))
    return run


def gone(file: Path) -> None:
    file.unlink()


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def content(text: bytes) -> Damage:
    return lambda file: file.write_bytes(text)


def halved(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flipped(file: Path) -> None:
    found = file.read_bytes()
    middle = len(found) // 2
    file.write_bytes(found[:middle] + bytes([found[middle] ^ 0x80]) + found[middle + 1 :])


def with_values(**values: object) -> Damage:
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | values))


NOISE = bytes(range(1, 256))
BRACKETS = b"[" * 100_000
Expected = tuple[type[AdaptkitError], str] | None
JSON: Expected = (UsageError, r"manifest\.json: damaged; restore it, or run again with `adaptkit adapt --overwrite`")
LINES: Expected = (UsageError, r"metrics\.jsonl: damaged; remove it to go on without the log so far")
IS_FOLDER = "is a folder, and a file is wanted there"
CASES: dict[str, tuple[str, Damage, Expected]] = {
    "no recipe": ("recipe.yaml", gone, (UsageError, r"no run here \(no recipe.yaml\)")),
    "a recipe that is a folder": ("recipe.yaml", folder, (UsageError, r"no run here \(no recipe.yaml\)")),
    "an empty recipe": ("recipe.yaml", content(b""), (UsageError, "no backbone: give --backbone NAME")),
    "a recipe of NUL bytes": ("recipe.yaml", content(bytes(2000)), (UsageError, "not valid YAML")),
    "a recipe of noise": ("recipe.yaml", content(NOISE), (UsageError, "cannot be read as a recipe")),
    "a flipped recipe": ("recipe.yaml", flipped, (UsageError, "cannot be read as a recipe")),
    "no status": ("status.json", gone, RUNS_ON),
    "a status of brackets": ("status.json", content(BRACKETS), RUNS_ON),
    "a status that is a folder": ("status.json", folder, (UsageError, IS_FOLDER)),
    "no manifest": ("manifest.json", gone, RUNS_ON),
    "an empty manifest": ("manifest.json", content(b""), JSON),
    "half a manifest": ("manifest.json", halved, JSON),
    "a manifest of noise": ("manifest.json", content(NOISE), JSON),
    "a manifest that is a list": ("manifest.json", content(b"[]"), JSON),
    "a manifest that is a folder": ("manifest.json", folder, (UsageError, IS_FOLDER)),
    "a manifest of nothing": ("manifest.json", content(b"{}"), (DataError, "added, removed or changed since")),
    "versions that are a list": ("manifest.json", with_values(versions=[1]), JSON),
    "versions that are null": ("manifest.json", with_values(versions=None), JSON),
    "resumed parts that are a number": ("manifest.json", with_values(resumed=5), JSON),
    "a resumed part that is a number": ("manifest.json", with_values(resumed=[5]), JSON),
    "resumed versions that are a list": ("manifest.json", with_values(resumed=[{"versions": []}]), JSON),
    "weights that are a number": ("manifest.json", with_values(weights_sha256=5), JSON),
    "images that are a list": ("manifest.json", with_values(data_fingerprint=[]), (DataError, "added, removed")),
    "no log": ("metrics.jsonl", gone, RUNS_ON),
    "a log cut off in a line": ("metrics.jsonl", halved, RUNS_ON),
    "a log of noise": ("metrics.jsonl", content(NOISE), LINES),
    "a log of lists": ("metrics.jsonl", content(b"[]\n"), LINES),
    "a log without steps": ("metrics.jsonl", content(b"{}\n"), LINES),
    "a log of brackets": ("metrics.jsonl", content(BRACKETS + b"\n"), LINES),
    "a log that is a folder": ("metrics.jsonl", folder, (UsageError, IS_FOLDER)),
    "no index": ("images.index", gone, RUNS_ON),
    "a flipped index": ("images.index", flipped, RUNS_ON),
}
OTHERS = [case for case, (*_, expected) in CASES.items() if expected is not RUNS_ON]
GO_ON = [case for case, (*_, expected) in CASES.items() if expected is RUNS_ON]


def damaged(case: str, stopped: Path, tmp_path: Path) -> Path:
    name, damage, _ = CASES[case]
    run = shutil.copytree(stopped, tmp_path / "run")
    damage(run / name)
    return run


@pytest.mark.parametrize("case", OTHERS)
def test_a_damaged_run_is_refused_in_one_line(case: str, stopped: Path, tmp_path: Path) -> None:
    run = damaged(case, stopped, tmp_path)
    before = (run / LAST).read_bytes()
    kind, words = CASES[case][2] or (AdaptkitError, "")
    refused(kind, kind.exit_code, words, lambda: adaptkit.resume(run))
    assert (run / LAST).read_bytes() == before
    assert not list(run.rglob("*.part"))


@pytest.mark.parametrize("case", GO_ON)
def test_a_damaged_run_goes_on(case: str, stopped: Path, tmp_path: Path) -> None:
    run = damaged(case, stopped, tmp_path)
    reporter = SignalAt(6)
    with pytest.raises(Interrupted):
        adaptkit.resume(run, reporter=reporter)
    assert read(run, "status.json")["state"] == "interrupted"
    assert load_state(run / LAST)["train"]["step"] == 6
    assert [line["step"] for line in log(run) if line["kind"] == "train"][-1] == 6
    told = [note for note in reporter.notes if "the last checkpoint" in note or "missing;" in note]
    assert len(told) == (case == "no manifest")
