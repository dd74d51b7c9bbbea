"""What Python code can do that the command line cannot: adapt a network of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import SignalAt, assert_same_run, command, read, tiny
from torch import nn

import adaptkit
from adaptkit import schedules
from adaptkit.backbones import load_backbone
from adaptkit.errors import Interrupted


@pytest.fixture(autouse=True)
def _short_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)


class Pooled(nn.Module):
    """A network that timm does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 8, 5, 2), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.norm(self.first(x)))).mean((2, 3))


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(5)
    return Pooled()


def test_a_module_is_adapted_on_a_copy_and_loads_back(module: nn.Module, images: Path, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = adaptkit.adapt(module, images, output=tmp_path / "run", image_px=32, **tiny())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert result.report["backbone"]["name"] == "module:Pooled"
    assert result.report["backbone"]["image_px"] == 32
    text = (result.run / "report.md").read_text()
    assert "module.load_state_dict(load_file('RUN/backbone/model.safetensors'))" in text
    assert "timm.create_model" not in text
    module.load_state_dict(load_file(result.backbone / "model.safetensors"))
    with torch.inference_mode():
        assert module.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 12)


@pytest.mark.long
def test_a_run_of_a_module_is_resumed_with_it(module: nn.Module, images: Path, tmp_path: Path) -> None:
    settings = tiny(image_px=32)
    adaptkit.adapt(module, images, output=tmp_path / "whole", **settings)
    with pytest.raises(Interrupted):
        adaptkit.adapt(module, images, output=tmp_path / "cut", reporter=SignalAt(2), **settings)
    done = command("resume", tmp_path / "cut")
    assert done.returncode == 4
    assert "adaptkit.resume(run, backbone=module)" in done.stderr
    adaptkit.resume(tmp_path / "cut", backbone=module)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_backbone_made_of_a_module_keeps_what_was_said_of_it(module: nn.Module, images: Path, tmp_path: Path) -> None:
    backbone = load_backbone(module, image_px=40, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 1.0))
    adaptkit.adapt(backbone, images, output=tmp_path / "run", **tiny(steps=2))
    preprocessing = read(tmp_path / "run", "manifest.json")["preprocessing"]
    assert (preprocessing["image_px"], preprocessing["mean"]) == (40, [0.1, 0.2, 0.3])


def test_several_folders_and_lists_are_one_target(vit: Path, images: Path, tmp_path: Path) -> None:
    listed = sorted((images / "class_2").iterdir())
    (tmp_path / "files.txt").write_text("".join(f"{path}\n" for path in listed))
    data = [images / "class_0", images / "class_1", tmp_path / "files.txt"]
    result = adaptkit.adapt(str(vit), data, output=tmp_path / "run", **tiny(steps=2))
    assert result.report["data"]["num_images"] == 90
    assert result.report["recipe"]["data"]["path"] == [str(path) for path in data]
