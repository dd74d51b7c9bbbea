"""A backbone from a module that Python code holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from backbone_files import drawn, embeddings, network_folder, random_
from safetensors.torch import load_file
from torch import Tensor, nn

from adaptkit.backbones import Backbone, load_backbone, module_name, save_backbone
from adaptkit.embedding import Embedder
from adaptkit.errors import BackboneError
from adaptkit.export import export_backbone
from adaptkit.sources import open_folder


class Small(nn.Module):
    """(N, 3, H, W) -> (N, 8), with BatchNorm, and one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.GELU())
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(self.stem(images).mean((2, 3))))
        return result


class Ends(nn.Module):
    """`Small` with something after it."""

    def __init__(self, end: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.small, self.end = Small(), end

    def forward(self, images: Tensor) -> object:
        return self.end(self.small(images))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in module.state_dict().items()}


def unchanged(module: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())


# --- modules of timm


@pytest.mark.parametrize(
    "name", ["test_vit", "test_vit2", "test_convnext", "test_resnet", "test_efficientnet", "mobilenetv3_small_050"]
)
def test_a_module_of_timm_is_a_backbone_that_timm_loads_again(name: str, tmp_path: Path) -> None:
    module = timm.create_model(name, num_classes=7, drop_path_rate=0.1).train()
    before, training = state(module), [part.training for part in module.modules()]
    expected = timm.create_model(name, num_classes=0)
    expected.load_state_dict({k: v for k, v in before.items() if k in expected.state_dict()})
    backbone = load_backbone(module)
    assert (backbone.name, backbone.architecture) == (f"module:{type(module).__name__}", name)
    cfg = module.pretrained_cfg
    assert (backbone.image_px, backbone.mean, backbone.std) == (cfg["input_size"][-1], cfg["mean"], cfg["std"])
    reference = embeddings(backbone.module, backbone.image_px)
    assert torch.equal(reference, embeddings(expected, backbone.image_px))
    save_backbone(backbone, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0)
    assert torch.equal(embeddings(again, backbone.image_px), reference)
    assert unchanged(module, before)
    assert [part.training for part in module.modules()] == training
    assert module(torch.zeros(2, 3, 160, 160)).shape == (2, 7)


def test_a_module_loaded_from_an_export_keeps_its_arguments(tmp_path: Path) -> None:
    original = drawn("dinov2_reg", tmp_path)
    save_backbone(original, tmp_path / "export")
    for module in (timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True), original.module):
        backbone = load_backbone(module, readout="mean", image_px=84, mean=(0.1, 0.2, 0.3), std=(1.0, 1.0, 2.0))
        assert (backbone.architecture, backbone.readout, backbone.image_px, backbone.mean, backbone.std) == (
            "vit_small_patch14_reg4_dinov2", "mean", 84, (0.1, 0.2, 0.3), (1.0, 1.0, 2.0),
        )  # fmt: skip
        by_folder = load_backbone(str(tmp_path / "export"), readout="mean", image_px=84)
        assert torch.equal(embeddings(backbone.module, 84), embeddings(by_folder.module, 84))
        assert backbone.load_report is not None
        assert backbone.load_report.resampled == ("pos_embed",)


def test_pooling_of_a_timm_module_is_its_own() -> None:
    vit = load_backbone(timm.create_model("test_vit", global_pool="avg", img_size=64))
    assert (vit.readout, vit.architecture, vit.image_px) == ("mean", "test_vit", 64)
    resnet = timm.create_model("test_resnet", global_pool="max")
    other = load_backbone(resnet)
    assert other.architecture == ""  # timm would be told the name only, and would average
    resnet.fc = nn.Identity()
    assert torch.equal(embeddings(other.module, 64), embeddings(resnet, 64))


def test_arguments_that_a_network_does_not_show_make_it_a_class_of_its_own() -> None:
    module = timm.create_model("test_vit", img_size=64, depth=1, num_classes=10)
    backbone = load_backbone(module)
    assert (backbone.architecture, backbone.embed_dim, backbone.readout) == ("", 64, "pool")


def test_stochastic_depth_is_for_the_student() -> None:
    backbone = load_backbone(timm.create_model("test_vit", img_size=64), drop_path=0.3)
    rates = [part.drop_prob for part in backbone.module.modules() if type(part).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)


# --- any other module


def test_any_module_that_gives_embeddings_is_a_backbone() -> None:
    module = random_(load_backbone(Small())).module.train()
    before = state(module)
    backbone = load_backbone(module, image_px=32)
    assert (backbone.name, backbone.architecture, backbone.readout) == ("module:Small", "", "pool")
    assert (backbone.embed_dim, backbone.image_px) == (8, 32)
    assert backbone.mean == pytest.approx((0.485, 0.456, 0.406))
    assert not any(part.training for part in backbone.module.modules())
    twin = load_backbone(module, image_px=32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    assert (twin.mean, twin.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with torch.no_grad():
        for tensor in backbone.module.state_dict().values():
            tensor.zero_()
    assert unchanged(module, before)
    assert all(part.training for part in module.modules())
    assert load_backbone(Small()).image_px == 224


def test_its_export_is_weights_and_a_plain_instruction(images: Path, tmp_path: Path) -> None:
    backbone = random_(load_backbone(Small(), image_px=32))
    assert export_backbone(backbone, tmp_path / "backbone", open_folder(str(images)), Embedder()) == 0
    config = json.loads((tmp_path / "backbone" / "config.json").read_text())
    assert config["module"] == f"{__name__}.Small"
    assert (config["architecture"], config["image_px"], config["num_features"]) == (None, 32, 8)
    assert config["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert len(config["std"]) == 3
    assert "load_state_dict" in config["load"]
    module = Small()
    module.load_state_dict(load_file(tmp_path / "backbone" / "model.safetensors"))
    assert torch.equal(embeddings(module, 32), embeddings(backbone.module, 32))
    assert module.second.weight is module.first.weight
    with pytest.raises(BackboneError, match=r"module\.load_state_dict\(safetensors\.torch\.load_file\(") as error:
        load_backbone(str(tmp_path / "backbone"))
    assert "\n" not in str(error.value)


def test_an_export_that_differs_is_found(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_other(backbone: Backbone, folder: Path) -> None:
        save_backbone(random_(backbone.clone()), folder)

    monkeypatch.setattr("adaptkit.export.save_backbone", save_other)
    with pytest.raises(RuntimeError, match="differs"):
        export_backbone(load_backbone(Small(), image_px=32), tmp_path, open_folder(str(images)), Embedder())


def test_wrappers_are_looked_through() -> None:
    small = Small()
    compiled = torch.compile(small)
    for wrapped in (torch.nn.DataParallel(small), compiled, nn.DataParallel(compiled)):
        backbone = load_backbone(wrapped, image_px=32)
        assert (backbone.name, module_name(wrapped)) == ("module:Small", "module:Small")
        assert set(backbone.module.state_dict()) == set(small.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_becomes_float32(dtype: torch.dtype) -> None:
    backbone = load_backbone(Small().to(dtype), image_px=32)
    assert {p.dtype for p in backbone.module.parameters()} == {torch.float32}


def test_a_frozen_module_can_be_trained_and_frozen_parts_stay_frozen() -> None:
    module = Small().requires_grad_(False)
    assert all(p.requires_grad for p in load_backbone(module, image_px=32).module.parameters())
    assert not any(p.requires_grad for p in module.parameters())
    module.first.requires_grad_(True)
    trainable = [name for name, p in load_backbone(module, image_px=32).module.named_parameters() if p.requires_grad]
    assert trainable == ["first.weight", "first.bias"]
    vit = timm.create_model("test_vit", img_size=64)
    vit.blocks.requires_grad_(False)
    frozen = [name for name, p in load_backbone(vit).module.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, p in vit.named_parameters() if not p.requires_grad]


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten())


def spoilt() -> nn.Module:
    module = Small()
    nn.init.constant_(module.first.bias, float("nan"))
    return module


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a map": (lambda: nn.Conv2d(3, 4, 3), r"gives \(2, 4, 30, 30\) for two images"),
    "a dictionary": (lambda: Ends(lambda x: {"embedding": x}), "gives a dict"),
    "one embedding": (lambda: Ends(lambda x: x.mean(0)), r"gives \(8,\)"),
    "one of two": (lambda: Ends(lambda x: x[:1]), r"gives \(1, 8\)"),
    "no floats": (lambda: Ends(lambda x: x > 0), "floats"),
    "one channel": (lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten()), "cannot take images of 32 px"),
    "no parameters": (nn.Flatten, "has no parameters"),
    "not finite": (spoilt, "not finite"),
    "meta": (lambda: Small().to("meta"), "cannot be copied to the CPU"),
    "lazy": (lazy, "cannot be copied to the CPU"),
    "features": (lambda: timm.create_model("test_resnet", features_only=True), "gives a list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_modules_that_give_no_embeddings_are_refused_in_one_line(case: str) -> None:
    build, match = REFUSED[case]
    with pytest.raises(BackboneError, match=match) as error:
        load_backbone(build(), image_px=32)
    assert "\n" not in str(error.value)


def test_options_that_mean_nothing_for_a_module_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="its own weights"):
        load_backbone(Small(), weights="x.pth")
    with pytest.raises(BackboneError, match="its own weights"):
        load_backbone(Small(), pretrained=False)
    with pytest.raises(BackboneError, match="readout 'cls' needs a network that timm can build"):
        load_backbone(Small(), readout="cls", image_px=32)
    with pytest.raises(BackboneError, match=r"drop_path 0\.1 needs"):
        load_backbone(Small(), drop_path=0.1, image_px=32)
    with pytest.raises(BackboneError, match="image_px is 0"):
        load_backbone(Small(), image_px=0)
    with pytest.raises(BackboneError, match="std must be 3 numbers above 0"):
        load_backbone(Small(), image_px=32, std=(1.0, 1.0, 0.0))
    with pytest.raises(BackboneError, match="mean and std are its own"):
        load_backbone(str(network_folder("vit", tmp_path)), pretrained=False, mean=(0.0, 0.0, 0.0))
