"""Backbones: names, readouts, and an export that timm loads bit for bit."""

from __future__ import annotations

import json
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from backbone_files import embeddings, pixels, random_
from conftest import draw_image
from safetensors.torch import load_file, save_file
from timm.models import get_pretrained_cfg

from adaptkit.backbones import ALIASES, backbone_names, backbone_rows, hub, load_backbone, names, save_backbone
from adaptkit.errors import BackboneError, MachineError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved `test_vit` with random weights."""
    path = tmp_path_factory.mktemp("saved") / "vit"
    save_backbone(random_(load_backbone("test_vit", pretrained=False, image_px=64)), path)
    return path


# --- export


@pytest.mark.parametrize(
    ("name", "readout", "expected", "dim"),
    [
        ("test_vit", "auto", "cls", 64),
        ("test_vit", "mean", "mean", 64),
        ("test_vit2", "mean", "mean", 64),
        ("test_vit3", "auto", "pool", 96),
        ("test_resnet", "auto", "pool", 96),
        ("test_convnext", "pool", "pool", 64),
        ("test_efficientnet", "auto", "pool", 256),
        ("test_vit_relpos", "auto", "mean", 96),
    ],
)
def test_export_is_bit_equal_in_timm_and_here(name: str, readout: str, expected: str, dim: int, tmp_path: Path) -> None:
    backbone = random_(load_backbone(name, pretrained=False, readout=readout, image_px=64))
    assert (backbone.readout, backbone.embed_dim) == (expected, dim)
    save_backbone(backbone, tmp_path / "backbone")
    reference = embeddings(backbone.module, 64)
    module = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True, num_classes=0)
    assert torch.equal(embeddings(module, 64), reference)
    assert module.pretrained_cfg["input_size"][-1] == 64
    again = load_backbone(str(tmp_path / "backbone"))
    assert torch.equal(embeddings(again.module, 64), reference)
    assert again.readout == expected
    assert again.image_px == 64
    assert sorted(path.name for path in (tmp_path / "backbone").iterdir()) == ["config.json", "model.safetensors"]


def test_export_has_preprocessing_and_nothing_of_training(tmp_path: Path) -> None:
    student = load_backbone("test_vit", pretrained=False, drop_path=0.3, image_px=64)
    rates = [m.drop_prob for m in student.module.modules() if type(m).__name__ == "DropPath"]
    assert max(rates) == pytest.approx(0.3)
    save_backbone(student, tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "drop_path" not in text
    assert "dynamic_img_size" not in text
    assert "hf_hub" not in text
    cfg = json.loads(text)["pretrained_cfg"]
    assert {"input_size", "mean", "std", "interpolation", "crop_pct"} <= set(cfg)
    assert student.module(pixels(32)).shape == (2, 64)  # a local crop


def test_export_is_float32_whatever_was_trained(folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(folder))
    reference = {key: value.to(torch.bfloat16).float() for key, value in backbone.module.state_dict().items()}
    backbone.module.to(torch.bfloat16)
    save_backbone(backbone, tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(saved[key], reference[key]) for key in reference)
    assert saved["pos_embed"].dtype == torch.float32


def test_a_failed_export_leaves_no_half_files(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("adaptkit.backbones.save.save_file", full)
    with pytest.raises(MachineError, match="out: No space left on device; free some space"):
        save_backbone(load_backbone(str(folder)), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


# --- readout


def test_mean_of_a_cls_backbone_averages_normalised_patch_tokens(folder: Path) -> None:
    cls, mean = load_backbone(str(folder)), load_backbone(str(folder), readout="mean")
    assert mean.load_report is not None
    assert mean.load_report.missing == ()
    with torch.inference_mode():
        tokens = cls.module.forward_features(pixels(64))  # (N, 1 + 16, D), after the final norm
    assert torch.equal(embeddings(cls.module, 64), tokens[:, 0])
    assert torch.allclose(embeddings(mean.module, 64), tokens[:, 1:].mean(1), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "readout"),
    [("test_resnet", "cls"), ("test_convnext", "mean"), ("test_vit2", "cls"), ("test_vit", "pool"), ("test_vit", "x")],
)
def test_a_readout_the_backbone_lacks_is_refused(name: str, readout: str) -> None:
    with pytest.raises(BackboneError, match="readout"):
        load_backbone(name, pretrained=False, readout=readout)


def test_pooling_stated_beside_the_arguments_is_honoured(tmp_path: Path) -> None:
    module = timm.create_model("test_vit", num_classes=0, img_size=64, global_pool="avg")
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "test_vit", "global_pool": "avg", "model_args": {"img_size": 64}, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))  # as older versions of timm write it
    backbone = load_backbone(str(tmp_path))
    assert backbone.readout == "mean"
    assert torch.equal(embeddings(backbone.module, 64), embeddings(module, 64))


# --- names


def test_aliases_are_timm_names_with_weights_on_the_hub() -> None:
    assert {alias.timm_name for alias in ALIASES.values()} <= set(timm.list_pretrained())
    assert all(get_pretrained_cfg(alias.timm_name).hf_hub_id for alias in ALIASES.values())
    backbone = load_backbone("dino_vits16", pretrained=False)
    assert (backbone.architecture, backbone.embed_dim, backbone.readout) == ("vit_small_patch16_224", 384, "cls")
    assert backbone.name == "dino_vits16"


VIT_DIMS = {"vits": 384, "vitb": 768, "vitl": 1024, "vith": 1280}
HUB_FACTS: dict[str, tuple[int, int | None, int]] = {  # torch.hub name: embed_dim, patch px, tokens before the patches
    **{f"dino_{size}{patch}": (VIT_DIMS[size], patch, 1) for size in ("vits", "vitb") for patch in (16, 8)},
    **{f"dinov2_{size}14": (VIT_DIMS[size], 14, 1) for size in ("vits", "vitb", "vitl")},
    **{f"dinov2_{size}14_reg": (VIT_DIMS[size], 14, 5) for size in ("vits", "vitb", "vitl")},
    "dinov2_vitg14": (1536, 14, 1),
    "dinov2_vitg14_reg": (1536, 14, 5),
    **{f"dinov3_{size}16": (VIT_DIMS[size], 16, 5) for size in ("vits", "vitb", "vitl")},
    **{f"dinov3_{size}16plus": (VIT_DIMS[size], 16, 5) for size in ("vits", "vith")},
    "dinov3_vit7b16": (4096, 16, 5),
    "dinov3_convnext_tiny": (768, None, 0),
    "dinov3_convnext_small": (768, None, 0),
    "dinov3_convnext_base": (1024, None, 0),
    "dinov3_convnext_large": (1536, None, 0),
}


def test_aliases_are_the_networks_of_their_hub_names() -> None:
    assert set(HUB_FACTS) == set(ALIASES)
    for name, (dim, patch, prefix_tokens) in HUB_FACTS.items():
        origin = names.find(name)
        shallow = {} if patch is None else {"depth": 1}
        with torch.device("meta"):
            module = timm.create_model(origin.architecture, num_classes=0, **origin.model_args, **shallow)
        assert module.num_features == dim, name
        if patch is None:
            assert isinstance(module.head.norm, torch.nn.Module), name
            continue
        assert module.patch_embed.patch_size == (patch, patch), name
        assert module.num_prefix_tokens == prefix_tokens, name
        assert module.global_pool == "token", name  # the hub's networks return the class token, after the norm
        assert isinstance(module.fc_norm, torch.nn.Identity), name
        assert not isinstance(module.norm, torch.nn.Identity), name


def test_dinov3_aliases_read_the_class_token() -> None:
    alias = load_backbone("dinov3_vits16", pretrained=False, image_px=32)
    timms = load_backbone("vit_small_patch16_dinov3.lvd1689m", pretrained=False, image_px=32)
    assert (alias.readout, timms.readout) == ("cls", "mean")
    with torch.inference_mode():
        tokens = timms.module.forward_features(pixels(32))
    assert torch.equal(embeddings(alias.module, 32), tokens[:, 0])


def test_dinov2_aliases_take_224_px_unless_told_otherwise() -> None:
    assert load_backbone("dinov2_vits14", pretrained=False).image_px == 224
    assert {row[2] for row in backbone_rows("dinov2_vit*")} == {224}
    assert load_backbone("dinov2_vits14", pretrained=False, image_px=70).image_px == 70
    assert names.find("dinov2_vits14").pretrained_cfg["input_size"][-1] == 518  # the grid of the weights


def test_rows_name_everything_that_can_be_loaded() -> None:
    start = time.process_time()
    rows = backbone_rows()
    assert time.process_time() - start < 2
    by_name = {row[0]: row for row in rows}
    assert rows[0] == ("nano", "vit_tiny_patch16_224", 64, "research use, see its model card")
    assert [row[0] for row in rows[1 : 1 + len(ALIASES)]] == list(ALIASES)
    assert by_name["dinov2_vits14"] == ("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m", 224, "apache-2.0")
    assert by_name["dinov3_vits16"][2:] == (256, "dinov3-license")
    assert by_name["resnet50.a1_in1k"] == ("resnet50.a1_in1k", "resnet50.a1_in1k", 224, "apache-2.0")
    assert "gcvit_tiny.in1k" not in by_name  # its weights are elsewhere
    assert len(by_name) == len(rows) > 1000
    assert backbone_names() == list(by_name)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("NANO", {"nano", "convnext_nano.in12k"}),
        ("dinov2_*", {"dinov2_vitl14_reg"}),
        ("small_patch14_dinov2", {"dinov2_vits14", "vit_small_patch14_dinov2.lvd142m"}),
        ("vit_?mall_*.dino", {"vit_small_patch8_224.dino", "dino_vits8"}),
    ],
)
def test_rows_are_found_by_glob_or_part(pattern: str, expected: set[str]) -> None:
    found = {row[0] for row in backbone_rows(pattern)}
    assert expected <= found
    assert len(found) < 100
    assert backbone_rows("no such network") == []


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("dino_vits61", "did you mean 'dino_vits16'"),
        ("resnet81", "did you mean 'resnet"),
        ("vit_small_patch16_224.dinoo", "did you mean 'vit_small_patch16_224.dino'"),
        ("no/such/folder", "no such folder; for a repository of the hub write hf-hub:"),
        ("local-dir:nowhere", r"no config\.json"),
        ("resnet81", "see `adaptkit backbones`"),
        ("", "unknown backbone"),
        ("x" * 5000, "unknown backbone"),
        ("a\0b", "unknown backbone"),
    ],
)
def test_unknown_names(name: str, match: str) -> None:
    with pytest.raises(BackboneError, match=match):
        load_backbone(name, pretrained=False)


def test_an_architecture_without_weights_says_so() -> None:
    with pytest.raises(BackboneError, match="--no-pretrained"):
        load_backbone("vit_base_patch16_18x2_224")
    with pytest.raises(BackboneError, match="keep one"):
        load_backbone("test_vit", weights="x.pth", pretrained=False)


def test_nano_is_a_packaged_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "NANO_FOLDER", folder)
    assert load_backbone("nano").name == "nano"
    monkeypatch.setattr(names, "NANO_FOLDER", folder / "absent")
    with pytest.raises(BackboneError, match="nano: the packaged backbone is missing"):
        load_backbone("nano")


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and no name that resolves."""

    def refuse(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))


NOT_TO_BE_HAD = [
    "dino_vits16",
    "dinov3_vith16plus",
    "vit_so150m2_patch16_reg1_gap_256.sbb_e200_in12k_ft_in1k",
    "hf-hub:some/thing",
    f"hf-hub:{'organisation' * 5}/{'thing' * 10}@revision",
]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("offline", [False, True], ids=["no network", "HF_HUB_OFFLINE=1"])
def test_no_network_is_a_quick_one_line_error(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    for name in NOT_TO_BE_HAD:
        with pytest.raises(BackboneError, match="give --weights FILE, or name a local folder") as error:
            load_backbone(name)
        message = str(error.value)
        assert message.startswith(name[:40])
        assert "is not cached" in message
        assert "\n" not in message
        assert len(message) <= 240
    assert time.monotonic() - start < 30


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["hf-hub:not a/valid/name", f"hf-hub:{'x' * 5000}", "hf-hub:"])
def test_names_the_hub_cannot_have_are_refused_shortly(name: str) -> None:
    with pytest.raises(BackboneError, match="HFValidationError") as error:
        load_backbone(name)
    assert len(str(error.value)) <= 240


def test_weights_that_are_elsewhere_are_named() -> None:
    for name in ("gcvit_tiny", "gcvit_tiny.in1k", "legacy_senet154.in1k", "vit_giant_patch16_gap_224.in22k_ijepa"):
        with pytest.raises(BackboneError, match=r"not on the hub; fetch https://.*, give --weights FILE") as error:
            load_backbone(name)
        assert len(str(error.value)) <= 240


def test_hub_weights_come_from_the_cache_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached(repo: str, filename: str, **options: Any) -> str:
        assert options["local_files_only"]
        assert "/" in repo
        return str(folder / filename)

    monkeypatch.setattr(hub, "hf_hub_download", cached)
    reference = embeddings(load_backbone(str(folder)).module, 64)
    for name in ("test_vit", "hf-hub:some/vit"):
        assert torch.equal(embeddings(load_backbone(name, image_px=64).module, 64), reference)


# --- random weights, preprocessing, copies


def test_random_weights_follow_the_seed_and_leave_the_generator_alone() -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    states = [load_backbone("test_vit", pretrained=False, seed=s).module.state_dict() for s in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["pos_embed"], states[2]["pos_embed"])
    assert load_backbone("test_vit", pretrained=False).load_report is None


def test_eval_transform_is_the_backbones_own(folder: Path) -> None:
    backbone = load_backbone(str(folder))
    transform = pickle.loads(pickle.dumps(backbone.eval_transform()))
    image = draw_image(1, 2, px=90).crop((0, 0, 90, 70))
    tensor = transform(image)
    assert tensor.dtype == torch.uint8
    assert tensor.shape == (3, 64, 64)
    module = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0)
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(module))(image)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (backbone.mean, backbone.std))
    assert np.allclose((tensor / 255 - mean) / std, theirs, atol=1e-6)


def test_clone_shares_nothing(folder: Path) -> None:
    backbone = load_backbone(str(folder))
    twin = backbone.clone()
    reference = embeddings(backbone.module, 64)
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.zero_()
    twin.pretrained_cfg["crop_pct"] = 0.1
    assert torch.equal(embeddings(backbone.module, 64), reference)
    assert backbone.pretrained_cfg["crop_pct"] != 0.1
