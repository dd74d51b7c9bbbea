"""What several processes agree on: errors, the list of images, bad images, the sums between two lines of the log."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from several import endings, together
from tiny_runs import adapt, read

from adaptkit import inputs as inputs_module
from adaptkit import prepare, session
from adaptkit.backbones import load_backbone
from adaptkit.errors import AdaptkitError, DataError, DeviceMemoryError, FailedElsewhere, MachineError
from adaptkit.inputs import open_inputs
from adaptkit.meter import Meter
from adaptkit.prepare import open_run_inputs
from adaptkit.processes import Noticed, everywhere, in_any, main_first, on_main
from adaptkit.recipe import Recipe
from adaptkit.run import INDEX, Run
from adaptkit.session import open_accelerator
from adaptkit.sources import BadImages

pytestmark = pytest.mark.long


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def fail(by: int) -> str:
    if rank() == by:
        raise MachineError(f"process {by}: disk full")
    return f"process {rank()} is well"


def agree(folder: Path) -> dict[str, Any]:
    """One thing after the other: a process that is left behind would hang."""
    open_accelerator("fp32")
    seen: dict[str, Any] = {}
    for name, work in {
        "all well": lambda: everywhere(lambda: fail(by=-1)),
        "the last fails": lambda: everywhere(lambda: fail(by=1)),
        "the main one fails": lambda: on_main(lambda: fail(by=0)),
        "not asked to": lambda: on_main(lambda: fail(by=1)),
        "folder is full": lambda: on_main(lambda: (folder / "gone" / "file").write_text("")),
        "main first": lambda: main_first(lambda: leave_a_file(folder / "file")),
    }.items():
        try:
            seen[name] = work()
        except (AdaptkitError, OSError) as error:
            seen[name] = (type(error).__name__, str(error), error.is_local)  # type: ignore[union-attr]
    return seen | {"any": in_any(rank() == 1), "none": in_any(False)}


def leave_a_file(file: Path) -> bool:
    """Whether it was there already."""
    if file.exists():
        return True
    file.write_text("")
    return False


def test_an_error_of_one_process_is_raised_by_all(tmp_path: Path) -> None:
    first, second = together(2, agree, tmp_path)
    assert first["all well"] == "process 0 is well"
    assert second["all well"] == "process 1 is well"
    assert first["the last fails"] == second["the last fails"] == ("MachineError", "process 1: disk full", False)
    assert (
        first["the main one fails"] == second["the main one fails"] == ("MachineError", "process 0: disk full", False)
    )
    assert (first["not asked to"], second["not asked to"]) == ("process 0 is well", None)
    assert first["folder is full"] == second["folder is full"]
    assert first["folder is full"][0] == "FileNotFoundError"
    assert (first["main first"], second["main first"]) == (False, True)
    assert (first["any"], first["none"]) == (second["any"], second["none"]) == (True, False)


def test_the_error_of_a_single_process_is_its_own() -> None:
    error = MachineError("disk full")

    def work() -> None:
        raise error

    with pytest.raises(MachineError) as raised:
        on_main(work)
    assert raised.value is error
    assert error.is_local is None


def read_images(vit: Path, images: Path, folder: Path, disturb: bool) -> tuple[list[str], dict[str, Any]]:
    """What a run of two processes reads; the second may not walk the folder, or finds it changed."""
    open_accelerator("fp32")
    run = Run(folder, Recipe(data=str(images)))
    if rank() == 1 and not disturb:
        inputs_module.open_images = partial(pytest.fail, "walked")  # type: ignore[assignment]
    if rank() == 1 and disturb:

        def open_changed(recipe: Recipe, index: Path) -> Any:
            next(images.rglob("*.jpg")).unlink()
            return open_inputs(recipe, index)

        prepare.open_inputs = open_changed  # type: ignore[assignment]
    found = open_run_inputs(run, load_backbone(str(vit)))
    return [found.train.path(index) for index in range(len(found.train))], found.facts


def test_only_the_main_process_walks_the_folder(vit: Path, images: Path, tmp_path: Path) -> None:
    first, second = together(2, read_images, vit, images, tmp_path, False)
    assert first == second
    assert first[1]["num_images"] == 120
    assert (tmp_path / INDEX).is_file()


def test_images_that_change_while_processes_read_them_end_the_run(vit: Path, images: Path, tmp_path: Path) -> None:
    own = shutil.copytree(images, tmp_path / "images")
    ended = endings(2, read_images, vit, own, tmp_path, True)
    assert [type(error) for error in ended] == [DataError] * 2
    assert str(ended[0]) == str(ended[1])
    assert "not the same images for all processes" in str(ended[0])


def notice(folder: Path) -> list[Any]:
    """Bad images in turns; those of the last turn are too many."""
    open_accelerator("fp32")
    bad = main_first(lambda: BadImages(folder / "bad.jsonl", 100, "1%", writes=rank() == 0))
    noticed, counts = Noticed(bad), []
    for turn in ([("a.jpg", "torn"), (f"{rank()}.jpg", "torn")], [("a.jpg", "torn")], [(f"{rank()}-b.jpg", "empty")]):
        noticed(turn)
        counts.append(len(bad.paths))
        noticed.share()
        counts.append(len(bad.paths))
    try:
        noticed([(f"{rank()}-{index}.jpg", "torn") for index in range(3)])
        noticed.share()
    except DataError as error:
        return [*counts, str(error)]
    return counts


def test_bad_images_are_counted_together_and_written_once(tmp_path: Path) -> None:
    first, second = together(2, notice, tmp_path)
    assert first == second
    assert first[:-1] == [0, 3, 3, 3, 3, 5]
    assert "6 of 100 images cannot be used, 5 are accepted (max_bad 1%); first: a.jpg (torn)" in first[-1]
    listed = [json.loads(line)["path"] for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert listed == ["a.jpg", "0.jpg", "1.jpg", "0-b.jpg", "1-b.jpg", "0-0.jpg"]


def test_one_process_counts_at_once(tmp_path: Path) -> None:
    (alone,) = together(1, notice, tmp_path)
    assert alone == [2, 2, 2, 2, 3, 3, alone[-1]]
    assert "6 of 100" in alone[-1]


def stop_between_lines(vit: Path, images: Path, file: Path) -> bool:
    """Whether each process finds its own sums in a checkpoint from the middle of a window."""
    from parity import session as tiny_session

    from adaptkit.loop import train_steps

    first = tiny_session(vit, images, steps=3)
    train_steps(first, lambda step: None)
    first.save(file)
    again = tiny_session(vit, images, steps=3)
    again.restore(file)
    equal = [torch.equal(again.meter.sums[name], value) for name, value in first.meter.sums.items()]
    return all(equal) and len(equal) > 3


def test_a_checkpoint_between_two_lines_holds_the_sums_of_every_process(
    vit: Path, images: Path, tmp_path: Path
) -> None:
    assert together(2, stop_between_lines, vit, images, tmp_path / "last.safetensors") == [True, True]


def run_with(trouble: str, vit: Path, images: Path, folder: Path) -> None:
    """A run of two processes in which something goes wrong in one."""
    if trouble == "full disk" and rank() == 0:
        session.save_tensors = partial(_raise, MachineError("checkpoints: No space left"))
    if trouble == "full GPU" and rank() == 1:
        Meter.add = partial(_raise, torch.OutOfMemoryError("out of memory"))  # type: ignore[method-assign]
    adapt(vit, images, folder)


def _raise(error: Exception, *_: Any, **__: Any) -> Any:
    raise error


def test_what_the_main_process_cannot_write_ends_all(vit: Path, images: Path, tmp_path: Path) -> None:
    ended = endings(2, run_with, "full disk", vit, images, tmp_path / "run")
    assert [(type(error), str(error)) for error in ended] == [(MachineError, "checkpoints: No space left")] * 2
    status = read(tmp_path / "run", "status.json")
    assert (status["state"], status["exit_code"], status["message"]) == ("failed", 8, "checkpoints: No space left")


def test_a_process_that_fails_alone_is_the_reason_of_the_others(vit: Path, images: Path, tmp_path: Path) -> None:
    first, second = endings(2, run_with, "full GPU", vit, images, tmp_path / "run")
    assert isinstance(second, DeviceMemoryError)
    assert isinstance(first, FailedElsewhere)
    assert (first.exit_code, str(first)) == (7, str(second))
    assert read(tmp_path / "run", "status.json")["exit_code"] == 7


def test_no_folder_is_the_same_error_everywhere(vit: Path, tmp_path: Path) -> None:
    ended = endings(2, run_with, "no folder", vit, tmp_path / "nowhere", tmp_path / "run")
    assert [type(error) for error in ended] == [DataError] * 2
    assert str(ended[0]) == str(ended[1])
    assert read(tmp_path / "run", "status.json")["exit_code"] == 3
