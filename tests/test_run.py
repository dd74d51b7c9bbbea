"""The run directory: whole files or none, nothing deleted that no run made, a log that can be rewound."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from adaptkit.errors import MachineError, UsageError
from adaptkit.manifest import environment
from adaptkit.recipe import Recipe, load_recipe
from adaptkit.run import OURS, Run, atomic, machine_errors, write_text

RECIPE = Recipe(data="/images", backbone="vit", batch_size=16)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(RECIPE, tmp_path / "run")


# --- whole files or none


def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "status.json"
    write_text(file, "old")

    def write_half() -> None:
        with atomic(file) as part:
            part.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["status.json"]


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path: Path) -> None:
    """What a kill leaves behind does not stop the next write."""
    file = tmp_path / "status.json"
    write_text(file, "old")
    (tmp_path / "status.json.part").write_text("half of a long te")
    assert file.read_text() == "old"
    write_text(file, "new")
    assert file.read_text() == "new"
    assert os.listdir(tmp_path) == ["status.json"]


def test_the_new_file_is_on_the_disk_before_it_replaces_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b))[1])
    write_text(tmp_path / "file", "text")
    assert calls == ["fsync", "replace", "fsync"]  # the content, the name, the folder


def test_a_value_that_is_no_json_leaves_the_old_status(run: Run) -> None:
    before = (run.path / "status.json").read_text()
    with pytest.raises(ValueError, match="JSON"):
        run.write_json("status.json", {"value": float("nan")})
    assert (run.path / "status.json").read_text() == before


# --- create, open, overwrite


def test_create_leaves_a_record_at_once(run: Run) -> None:
    assert sorted(os.listdir(run.path)) == ["recipe.yaml", "status.json"]
    status = json.loads((run.path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("running", None)
    assert load_recipe(run.path / "recipe.yaml") == RECIPE
    assert Run.open(run.path) == run


def test_a_batch_size_is_written_down_only_if_it_was_asked_for(tmp_path: Path) -> None:
    Run.create(Recipe(data="/images", backbone="vit"), tmp_path / "run")
    opened = Run.open(tmp_path / "run").recipe
    assert "batch_size" not in opened.model_fields_set
    assert opened == Recipe(data="/images", backbone="vit")
    assert "batch_size" in Run.open(Run.create(RECIPE, tmp_path / "asked").path).recipe.model_fields_set


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run here"):
        Run.open(tmp_path)
    with pytest.raises(UsageError, match="no run here"):
        Run.open(tmp_path / "missing")


def test_a_folder_in_use_is_refused_with_both_ways_on(run: Run) -> None:
    with pytest.raises(UsageError, match=r"--overwrite.*adaptkit resume"):
        Run.create(RECIPE, run.path)


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert Run.create(RECIPE, tmp_path / "empty").path == tmp_path / "empty"


def test_overwrite_removes_the_files_of_a_run_also_unfinished_ones(run: Run) -> None:
    for name in OURS:
        if "." not in name:
            (run.path / name).mkdir()
            (run.path / name / "file").write_text("x")
    for name in ("report.json", "report.json.part", "status.json.1.part"):
        (run.path / name).write_text("x")
    Run.create(RECIPE, run.path, overwrite=True)
    assert sorted(os.listdir(run.path)) == ["recipe.yaml", "status.json"]


@pytest.mark.parametrize("names", [["photo.jpg"], ["recipe.yaml", "status.json", "photo.jpg"], ["recipe.yaml"]])
def test_overwrite_deletes_nothing_from_a_folder_that_is_no_run(names: list[str], tmp_path: Path) -> None:
    """Neither a stranger's file beside a run's, nor a recipe somebody wrote by hand."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("precious")
    with pytest.raises(UsageError, match="choose another --output"):
        Run.create(RECIPE, folder, overwrite=True)
    assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(names, "precious")


def test_overwrite_does_not_follow_links(run: Run, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("precious")
    (run.path / "backbone").symlink_to(tmp_path / "elsewhere")
    Run.create(RECIPE, run.path, overwrite=True)
    assert (tmp_path / "elsewhere" / "file").read_text() == "precious"


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(UsageError, match="is a file"):
        Run.create(RECIPE, tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_name_is_made_from_data_and_backbone_and_never_taken_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(data="/photos of cells/", backbone="hf-hub:org/vit.x")
    names = [Run.create(recipe).path.relative_to(tmp_path) for _ in range(3)]
    assert names == [Path("runs") / f"photos_of_cells-vit.x{suffix}" for suffix in ("", "-2", "-3")]


def test_other_processes_leave_the_directory_to_the_main_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert Run.create(RECIPE, run.path).path == run.path  # not "not empty"
    run.log({"step": 5})
    run.rewind_log(0)
    assert (run.path / "metrics.jsonl").read_text() == '{"step": 5}\n'
    with atomic(run.path / "status.json") as part:
        assert part.name == "status.json.1.part"


# --- the log


def test_log_appends_json_and_rewinds_to_a_step(run: Run) -> None:
    for step in (2, 4, 4, 6):
        run.log({"step": step, "loss": float("nan") if step == 4 else 0.5, "bound": -float("inf")})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    run.rewind_log(4)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 2, "loss": 0.5, "bound": None},
        {"step": 4, "loss": None, "bound": None},
        {"step": 4, "loss": None, "bound": None},
    ]


def test_rewinding_without_a_log_does_nothing(run: Run) -> None:
    run.rewind_log(3)
    assert not (run.path / "metrics.jsonl").exists()


# --- the machine's faults


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB; tests that need it are left out where nobody may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_the_machines_fault(tiny_disk: Path) -> None:
    import torch

    from adaptkit.checkpoints import load_tensors, save_tensors

    run = Run.create(RECIPE, tiny_disk / "run")
    save_tensors(run.path / "last", {"a": torch.ones(10)}, {"step": 1})
    with pytest.raises(MachineError, match=r"No space left on device.*free some space"):
        save_tensors(run.path / "last", {"a": torch.ones(100_000)}, {"step": 2})
    assert load_tensors(run.path / "last")[1] == {"step": 1}
    with pytest.raises(MachineError, match=r"report\.md.*No space left on device; free some space"):
        run.write("report.md", "x" * 1_000_000)
    assert sorted(os.listdir(run.path)) == ["last", "recipe.yaml", "status.json"]
    assert Run.open(run.path) == run


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "free some space"), (errno.EACCES, "choose another --output"), (errno.EROFS, "choose another")],
)
def test_disk_and_permission_errors_become_one_line(number: int, advice: str, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=advice), machine_errors(tmp_path):
        raise OSError(number, os.strerror(number), "somewhere")


def test_other_errors_of_the_system_are_bugs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), machine_errors(tmp_path):
        (tmp_path / "missing").read_text()


def test_environment_names_versions_and_command() -> None:
    found = environment()
    assert {"torch", "timm", "adaptkit"} <= set(found["versions"])
    assert found["command"]
