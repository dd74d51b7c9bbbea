"""Weights and configurations of backbones: strict, and safe with files from anyone."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from backbone_files import edit, embeddings, random_

from adaptkit.backbones import load_backbone, save_backbone
from adaptkit.backbones.reading import read_weights
from adaptkit.errors import BackboneError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved `test_vit` with random weights."""
    path = tmp_path_factory.mktemp("saved") / "vit"
    save_backbone(random_(load_backbone("test_vit", pretrained=False, image_px=64)), path)
    return path


def test_the_report_names_every_key_and_the_file(folder: Path) -> None:
    backbone = load_backbone(str(folder))
    report = backbone.load_report
    assert report is not None
    assert set(report.matched) == set(backbone.module.state_dict())
    assert (report.missing, report.unexpected, report.resampled) == ((), (), ())
    assert report.sha256 is not None
    assert len(report.sha256) == 64
    assert report.source.endswith("model.safetensors")
    assert not backbone.module.training


@pytest.mark.parametrize("key", ["blocks.0.norm1.weight", "norm.bias", "pos_embed"])
def test_a_missing_parameter_is_refused_unless_allowed(key: str, folder: Path, tmp_path: Path) -> None:
    broken = edit(folder, tmp_path / "b", lambda state: {k: v for k, v in state.items() if k != key})
    with pytest.raises(BackboneError, match=f"1 missing \\({key}\\)") as error:
        load_backbone(str(broken))
    assert "\n" not in str(error.value)
    backbone = load_backbone(str(broken), allow_missing=(key[:-2] + "*",))
    assert backbone.load_report is not None
    assert backbone.load_report.missing == (key,)


def test_misshapen_parameters_are_refused(folder: Path, tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state | {"norm.weight": torch.ones(65)}

    with pytest.raises(BackboneError, match=r"norm.weight is \(65,\) in the file, \(64,\) here"):
        load_backbone(str(edit(folder, tmp_path / "b", change)))


def test_a_patch_kernel_of_another_size_is_not_resampled(folder: Path, tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state | {"patch_embed.proj.weight": torch.randn(64, 3, 8, 8)}

    with pytest.raises(BackboneError, match=r"patch_embed.proj.weight is \(64, 3, 8, 8\)"):
        load_backbone(str(edit(folder, tmp_path / "b", change)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, folder: Path, tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state["cls_token"][0, 0, 3] = value
        return state

    with pytest.raises(BackboneError, match="cls_token has values that are not finite"):
        load_backbone(str(edit(folder, tmp_path / "b", change)))


def test_classifier_keys_are_ignored_and_others_reported(folder: Path, tmp_path: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return state | {"head.weight": torch.ones(10, 64), "blocks.99.norm1.bias": torch.ones(1)}

    backbone = load_backbone(str(edit(folder, tmp_path / "b", change)))
    assert backbone.load_report is not None
    assert backbone.load_report.unexpected == ("blocks.99.norm1.bias",)


def test_head_norm_of_a_convnext_is_not_a_classifier_key(tmp_path: Path) -> None:
    save_backbone(load_backbone("test_convnext", pretrained=False), tmp_path / "a")
    broken = edit(tmp_path / "a", tmp_path / "b", lambda s: {k: v for k, v in s.items() if k != "head.norm.bias"})
    with pytest.raises(BackboneError, match=r"1 missing \(head.norm.bias\)"):
        load_backbone(str(broken))


def test_another_image_size_resamples_position_embeddings_and_says_so(folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(folder), image_px=96)
    assert backbone.image_px == 96
    assert backbone.load_report is not None
    assert backbone.load_report.resampled == ("pos_embed",)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0, img_size=96)
    assert torch.equal(embeddings(backbone.module, 96), embeddings(theirs, 96))
    save_backbone(backbone, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0)
    assert torch.equal(embeddings(again, 96), embeddings(backbone.module, 96))
    with pytest.raises(BackboneError, match="choose 96"):
        load_backbone(str(folder), image_px=100)


def test_float16_files_run_in_float32(folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(str(edit(folder, tmp_path / "b", lambda s: {k: v.half() for k, v in s.items()})))
    assert {p.dtype for p in backbone.module.parameters()} == {torch.float32}


# --- weights files


class Bomb:
    def __reduce__(self) -> Any:
        return (exec, ("import pathlib; pathlib.Path('/dev/null').read_text(); raise SystemError('code ran')",))


def test_hostile_weights_files_are_one_line_errors(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    loop: dict[str, Any] = {}
    loop["model"] = loop
    contents: dict[str, bytes | object] = {
        "empty.pth": b"",
        "noise.pth": b"\x80\x02 noise",
        "pickle.pth": pickle.dumps(Bomb()),
        "bomb.pth": {"a": Bomb()},
        "list.pth": [1, 2, 3],
        "loop.pth": loop,
        "sparse.pth": {"cls_token": torch.ones(1, 1, 64).to_sparse()},
        "complex.pth": {"cls_token": torch.ones(1, 1, 64, dtype=torch.complex64)},
        "expanded.pth": {"cls_token": torch.ones(1).expand(1 << 40)},
        "text.pth": {"model": "weights"},
        "other.pth": {"a": torch.ones(3)},
        "cut.safetensors": whole[: len(whole) // 2],
        "header.safetensors": b"\xff" * 64,
        "weights.npz": b"PK",
    }
    for name, content in contents.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(BackboneError) as error:
            load_backbone("test_vit", weights=str(tmp_path / name))
        assert "\n" not in str(error.value), name
        assert name in str(error.value)
        assert "code ran" not in str(error.value)
    with pytest.raises(BackboneError, match="no such weights file"):
        read_weights(tmp_path / "absent.pth")


CONFIG_CHANGES: list[dict[str, Any]] = [
    {"architecture": "no_such_vit"},
    {"architecture": 3},
    {"model_args": [1]},
    {"model_args": {"in_chans": 1}},
    {"model_args": {"no_such_argument": 1}},
    {"model_args": {"img_size": [64, 32]}},
    {"model_args": {"img_size": "big"}},
    {"pretrained_cfg": {"mean": [0.5, 0.5]}},
    {"pretrained_cfg": {"std": [0, 1, 1]}},
    {"pretrained_cfg": {"mean": [float("nan")] * 3}},
    {"pretrained_cfg": {"input_size": [3, -1, 8]}},
    {"pretrained_cfg": {"interpolation": "exec"}},
    {"pretrained_cfg": {"crop_pct": 0}},
    {"pretrained_cfg": {"crop_mode": ["center"]}},
]


@pytest.mark.parametrize("change", CONFIG_CHANGES, ids=str)
def test_hostile_configurations_are_one_line_errors(change: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError) as error:
        load_backbone(str(edit(folder, tmp_path / "b", config=lambda tree: tree | change)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architecture": null}', "[" * 100_000])
def test_broken_configurations_are_one_line_errors(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BackboneError, match=r"config\.json"):
        load_backbone(str(tmp_path))


def test_a_configuration_cannot_point_to_other_files(folder: Path, tmp_path: Path) -> None:
    def config(tree: dict[str, Any]) -> dict[str, Any]:
        tree["model_args"] |= {"checkpoint_path": "/etc/passwd", "pretrained": True, "features_only": True}
        tree["pretrained_cfg"] |= {"file": "/etc/passwd", "url": "http://localhost/x", "hf_hub_id": "a/b"}
        return tree

    backbone = load_backbone(str(edit(folder, tmp_path / "b", config=config)))
    assert not {"file", "url", "hf_hub_id"} & set(backbone.pretrained_cfg)
    assert torch.equal(embeddings(backbone.module, 64), embeddings(load_backbone(str(folder)).module, 64))
