"""The speed benchmark: its contestants do the same work, and its arithmetic and table are right."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import click
import psutil
import pytest
import torch
from PIL import Image
from tiny_runs import ROOT

from adaptkit import loop
from adaptkit.loading import Batch, ViewDataset, collate
from adaptkit.session import Session

sys.path.append(str(ROOT / "benchmarks" / "speed"))
import classical
import ours
import photos
import ratios
import referee
from setting import Setting, lightly_arguments

pytestmark = pytest.mark.long

SPEED = ROOT / "benchmarks" / "speed"


def by_path(name: str) -> ModuleType:
    """The other benchmark has modules of these names too."""
    spec = importlib.util.spec_from_file_location(f"speed_{name}", SPEED / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = by_path("table")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos.write_photos(tmp_path_factory.mktemp("speed") / "photos", 4)


@pytest.fixture
def session(folder: Path) -> Session:
    return ours.open_contest(Setting("nano", "fp32", 4, 2, 0, 1, str(folder)))


def test_the_photos_are_jpeg_files_of_500_by_375_with_detail(folder: Path) -> None:
    files = sorted(folder.iterdir())
    assert len(files) == 4
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))
        assert 50_000 < file.stat().st_size < 150_000
    assert len({file.read_bytes() for file in files}) == 4


def test_links_give_every_file_under_several_names(folder: Path, tmp_path: Path) -> None:
    links = photos.repeat_by_links(folder, tmp_path / "links", 3)
    assert len(list(links.iterdir())) == 12
    assert {link.read_bytes() for link in links.iterdir()} == {file.read_bytes() for file in folder.iterdir()}


def test_the_contestants_see_the_same_shapes_and_number_of_views(session: Session) -> None:
    loaded = collate([ViewDataset(session.source, session.multicrop, 0)[0, index] for index in range(4)])
    assert isinstance(loaded, Batch)
    resident = ours.resident_batch(session)
    for name in ("global_crops", "local_crops", "factors"):
        mine, theirs = getattr(resident, name), getattr(loaded, name)
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
    crops = next(iter(classical.classical_loader(session)))
    sides = [(4, *loaded.global_crops.shape[2:])] * 2 + [(4, *loaded.local_crops.shape[2:])] * 2
    assert [tuple(crop.shape) for crop in crops] == sides
    assert {crop.dtype for crop in crops} == {torch.float32}
    assert abs(float(crops[0].mean())) < 3  # normalised, not 0 to 255


def test_lightly_is_asked_for_the_same_views(session: Session) -> None:
    setting = Setting("vit_tiny_patch16_224", "bf16", 4, 2, 0, 1, "images")
    arguments = lightly_arguments(setting, session.multicrop.global_px, session.multicrop.local_px)
    transform = arguments["transform_args"]
    assert transform["image_size"] == [session.multicrop.global_px] * 2
    assert transform["local_view"]["view_size"] == [session.multicrop.local_px] * 2
    assert transform["local_view"]["num_views"] == session.multicrop.settings.num_local
    assert json.loads(json.dumps(arguments)) == arguments


def test_the_classical_loss_and_its_gradients_are_adaptkits_on_equal_views(session: Session) -> None:
    views, num_images = loop.to_device(session, ours.resident_batch(session))
    before = {name: value.clone() for name, value in session.teacher.state_dict().items()}
    session.student.train()
    crops = [crop for view in views for crop in view.split(num_images)]

    theirs = classical.classical_losses(session, crops, step=3)
    theirs.loss.backward()
    gradients = [parameter.grad.clone() for parameter in session.student.parameters() if parameter.grad is not None]
    session.student.zero_grad()
    session.teacher.load_state_dict(before)

    recorded: list[Any] = []
    objective = session.objective

    class Recording:
        """The objective, which also remembers what it said."""

        def __getattr__(self, name: str) -> Any:
            return getattr(objective, name)

        def __call__(self, student: torch.Tensor, teacher: torch.Tensor, step: int) -> Any:
            losses = objective(student, teacher, step)
            losses.loss.backward(retain_graph=True)
            recorded.append(losses.loss.detach())
            recorded.append([p.grad.clone() for p in session.student.parameters() if p.grad is not None])
            return losses

    session.objective = Recording()  # type: ignore[assignment]
    session.state.last_draw, session.state.step = 0, 3  # as a step in mid-run: no fresh head
    ours.train_on(ours.resident_batch(session), session, lambda step: "enough")
    torch.testing.assert_close(recorded[0], theirs.loss.detach(), rtol=1e-4, atol=1e-5)
    assert len(recorded[1]) == len(gradients) > 70
    for mine, other in zip(recorded[1], gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-4)


def test_bare_steps_read_no_file_and_train(session: Session, tmp_path: Path) -> None:
    batch = ours.resident_batch(session)
    before = [parameter.clone() for parameter in session.student.parameters()]
    loader = loop.view_loader
    object.__setattr__(session.source, "root", tmp_path)  # where no image is
    ours.train_on(batch, session, lambda step: "enough" if step == 2 else None)
    assert loop.view_loader is loader
    assert session.state.step == 2
    changed = [not torch.equal(a, b) for a, b in zip(before, session.student.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2


CHILD = """
import sys, threading, time
sys.path.append({speed!r})
from turns import Turns

def work_on():  # as a loader's worker does
    while True:
        sum(range(1000))

turns = Turns()
print("a library's chatter")
threading.Thread(target=work_on, daemon=True).start()
while True:
    time.sleep(0.02)
    turns.step_done()
"""


def test_a_contestant_works_only_in_its_turns(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD.format(speed=str(SPEED))]
    with referee.Contestant("sleeper", command, 1, tmp_path / "log") as contestant:
        contestant.warm_up()
        process = psutil.Process(contestant.process.pid)
        while process.status() != psutil.STATUS_STOPPED:  # a signal takes its time
            time.sleep(0.01)
        time.sleep(0.2)  # its other thread
        before = contestant.cpu_seconds()
        time.sleep(0.5)
        assert contestant.cpu_seconds() - before < 0.05
        turns = referee.race({"sleeper": contestant}, rounds=3, steps=4)["sleeper"]
        assert all(0.02 <= seconds < 60 for seconds in turns["seconds"])
        assert all(0 < seconds < 60 for seconds in turns["cpu_seconds"])
        assert all(peak > 1e6 for peak in turns["peak_bytes"])
    assert contestant.process.poll() is not None
    assert "chatter" in (tmp_path / "log").read_text()


def test_a_contestant_that_fails_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such network')"]
    with (
        referee.Contestant("broken", command, 1, tmp_path / "log") as contestant,
        pytest.raises(click.ClickException, match=r"(?s)broken failed: .*no such network"),
    ):
        contestant.warm_up()


def test_the_order_rotates() -> None:
    orders = ["".join(referee.rotated("abc", turn)) for turn in range(4)]
    assert orders == ["abc", "bca", "cab", "abc"]


def turns_of(*seconds: float) -> dict[str, list[float]]:
    return {"seconds": list(seconds), "cpu_seconds": [2 * s for s in seconds], "peak_bytes": [1e9, 3e9, 2e9]}


TURNS = {"bare": turns_of(1, 2, 4), "adaptkit": turns_of(2, 2, 5), "classical": turns_of(8, 2, 10)}


def test_ratios_by_hand() -> None:
    figures = ratios.summarise(TURNS, batch_size=8)
    assert figures["classical"]["relative_seconds"] == {"of_medians": 8 / 2, "median_of_rounds": 2.0}
    assert figures["classical"]["relative_cpu_seconds"] == {"of_medians": 8 / 2, "median_of_rounds": 2.0}
    assert figures["bare"]["relative_seconds"] == {"of_medians": 1.0, "median_of_rounds": 0.8}
    assert figures["adaptkit"]["relative_seconds"] == {"of_medians": 1.0, "median_of_rounds": 1.0}
    assert figures["bare"]["images_per_second"] == {"median": 4, "q1": 3, "q3": 6}
    assert figures["bare"]["peak_bytes"] == 3e9
    assert ratios.spread([5.0]) == {"median": 5.0, "q1": 5.0, "q3": 5.0}
    assert ratios.use_of_peak(3e12, 2.0, 6.0) == {"tflops_per_second": 1.5, "share_of_peak": 0.25}


def results() -> dict[str, Any]:
    figures = ratios.summarise(TURNS, batch_size=8)
    figures["bare"] |= ratios.use_of_peak(2e12, 2.0, 5.0)
    costs = {"global_px": 64, "local_px": 32, "flops": 2e12, "photometric_share": 0.05, "coding_rate_share": 0.01}
    cell = {"backbone": "nano", "precision": "fp32", "batch_size": 8, "num_local": 2, "workers": 0, "rounds": 3}
    cell |= {"steps_per_round": 1, "data": "made", "costs": costs, "contestants": figures, "turns": TURNS}
    machine = {"cpu": "a <fast> one", "gpu": None, "cores": 2, "threads": 1}
    return {"machine": machine | dict.fromkeys(("python", "torch", "torchvision", "timm"), "1.0"), "cells": [cell]}


def test_the_table_and_the_plot_render(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "DOCS", tmp_path)
    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    (tmp_path / "results.json").write_text(json.dumps(results()))
    table.main([str(tmp_path / "results.json")])
    text = page.read_text()
    assert text.startswith("before\n<!-- results -->\n")
    assert text.endswith("<!-- /results -->\nafter\n")
    assert "old" not in text
    assert "| classical | 1.00 | 0.90 to 2.50 | 8.000 | 4.00 (2.00) | 4.00 (2.00) | 3.00 |" in text
    assert "A step is 2.00 TFLOP; bare does 1.000 TFLOP/s, 20 % of the peak." in text
    assert max(map(len, text.splitlines())) <= 120
    plot = ElementTree.fromstring((tmp_path / "performance.svg").read_text())
    bars = [float(each.attrib["width"]) for each in plot if each.tag.endswith("rect")]
    assert bars == pytest.approx([4 / 6 * 500, 4 / 6 * 500, 1 / 6 * 500], abs=0.1)  # the longest quartile fills 500 px


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="lacks <!-- results -->"):
        table.put_between_markers("no markers", "text")


def test_the_docs_have_the_markers() -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    assert "NEW" in table.put_between_markers(page, "NEW")


def test_the_referee_imports_no_torch() -> None:
    """Its memory would be the floor of every child's peak."""
    code = f"import sys; sys.path.insert(0, {str(SPEED)!r}); import run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
