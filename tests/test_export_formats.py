"""`adaptkit export`: what other tools load is what the run exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from click.testing import CliRunner, Result
from conftest import write_folder
from formats_matrix import NETWORKS, RUNS, build_network, differences, finished_run, run_of
from tiny_runs import adapt

from adaptkit.backbones import load_backbone
from adaptkit.cli import main
from adaptkit.errors import BackboneError
from adaptkit.formats import export_run


@pytest.fixture(scope="module")
def finished(vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return adapt(vit, write_folder(folder / "images", 2, 20), folder / "run", steps=2, objective__hidden_dim=8).run


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(main, ["export", *map(str, args)], prog_name="adaptkit")


def embeddings(run: Path, images: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return load_backbone(str(run / "backbone")).module(images).numpy()


def load(form: str, output: Path, images: torch.Tensor) -> np.ndarray:
    """As its users load it, without adaptkit."""
    with torch.inference_mode():
        if form == "timm":
            return timm.create_model(f"local-dir:{output}", pretrained=True, num_classes=0).eval()(images).numpy()
        if form == "torch":
            return torch.export.load(str(output)).module()(images).numpy()
    session = onnxruntime.InferenceSession(str(output), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["embeddings"], {"images": images.numpy()})[0])


@pytest.mark.long
@pytest.mark.parametrize(("form", "name"), [("timm", "folder"), ("onnx", "b.onnx"), ("torch", "b.pt2")])
def test_a_run_in_every_format(form: str, name: str, finished: Path, tmp_path: Path) -> None:
    document = export_run(finished, form, tmp_path / "new" / name).document
    assert document["compared_on"] == "40 images of the run"
    assert document["max_difference"] < 1e-5
    for count in (1, 7):
        images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        expected = embeddings(finished, images)
        assert np.abs(load(form, tmp_path / "new" / name, images) - expected).max() < 1e-5 * np.abs(expected).max()
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.long
def test_the_file_says_how_to_normalise(finished: Path, tmp_path: Path) -> None:
    export_run(finished, "onnx", tmp_path / "b.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "b.onnx"), providers=["CPUExecutionProvider"])
    backbone = load_backbone(str(finished / "backbone"))
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["adaptkit.mean"].replace("(", "[").replace(")", "]")) == list(backbone.mean)
    assert facts["adaptkit.image_px"] == "32"
    files = {"adaptkit.std": ""}
    torch.export.load(str(export_run(finished, "torch", tmp_path / "b.pt2").document["output"]), extra_files=files)
    assert files["adaptkit.std"] == str(backbone.std)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_and_readouts(name: str, finished: Path, tmp_path: Path) -> None:
    run = run_of(build_network(NETWORKS[name]), finished, tmp_path / "run")
    assert_small(differences(run, sorted((finished.parent / "images").rglob("*.jpg")), tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_runs_in_bf16_and_with_lora(name: str, vit: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path, vit, **RUNS[name])
    assert_small(differences(run, sorted((tmp_path / "images").rglob("*.jpg")), tmp_path / "out"))


def assert_small(found: dict[str, float]) -> None:
    assert found.keys() == {"timm", "onnx", "torch", "transformers"}
    for form, difference in found.items():
        assert difference < 1e-4, form


@pytest.mark.long
def test_images_that_are_gone(finished: Path, tmp_path: Path) -> None:
    images = finished.parent / "images"
    images.rename(tmp_path / "elsewhere")
    try:
        document = export_run(finished, "torch", tmp_path / "b.pt2").document
    finally:
        (tmp_path / "elsewhere").rename(images)
    assert document["compared_on"] == "64 images of noise, as the run's are gone"


class DataDependent(torch.nn.Module):
    """No graph can express it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) if float(images.sum()) > 0 else images.amax((2, 3))


@pytest.mark.long
@pytest.mark.parametrize("form", ["onnx", "torch"])
def test_what_cannot_be_expressed_is_one_line(form: str, finished: Path, tmp_path: Path) -> None:
    from adaptkit import formats

    backbone = load_backbone(str(finished / "backbone"))
    backbone.module = DataDependent()
    with pytest.raises(BackboneError, match=f"cannot be expressed as {form}") as caught:
        formats.FORMATS[form](finished / "backbone", backbone, tmp_path / "b")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_the_command_and_its_mistakes(invoke: Callable[..., Result], finished: Path, tmp_path: Path) -> None:
    done = invoke(finished, "--format", "timm", "--output", "mine")
    assert done.exit_code == 0, done.stderr
    assert "40 images of the run" in done.stdout
    again = invoke(finished, "--format", "timm", "--output", "mine")
    assert (again.exit_code, "add --overwrite" in again.stderr) == (2, True)
    replaced = invoke(finished, "--format", "timm", "--output", "mine", "--overwrite", "--json", "--quiet")
    assert json.loads(replaced.stdout)["schema"] == "adaptkit.export/1"
    (tmp_path / "mine" / "diary.txt").write_text("mine")
    kept = invoke(finished, "--format", "timm", "--output", "mine", "--overwrite")
    assert (kept.exit_code, "holds more than a backbone" in kept.stderr) == (2, True)
    assert (tmp_path / "mine" / "diary.txt").read_text() == "mine"
    for words, message in (
        ((tmp_path, "--format", "timm", "--output", "x"), "no run here"),
        ((finished, "--format", "onxx", "--output", "x"), "onnx"),
        ((finished, "--format", "torch", "--output", "mine", "--overwrite"), "torch makes a file"),
    ):
        mistake = invoke(*words)
        assert (mistake.exit_code, message in mistake.stderr) == (2, True), mistake.stderr
