"""Weight files of other projects: the right network of the file, bit for bit, by whatever names it has there."""

from __future__ import annotations

import argparse
import collections
import functools
import os
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import weight_layouts as layouts
from backbone_files import drawn, embeddings, network_folder

from adaptkit.backbones import Backbone, load_backbone
from adaptkit.backbones.layouts import WRAPPERS, networks
from adaptkit.errors import BackboneError

Build = Callable[[layouts.State], Any]
CASES: list[tuple[str, Build, str]] = [
    ("vit", dict, "timm"),
    ("vit", layouts.timm_with_classifier, "timm"),
    ("vit", layouts.timm_training, "timm (state_dict)"),
    ("vit", layouts.timm_training_with_ema, "timm (state_dict_ema)"),
    ("vit", layouts.data_parallel, "timm (module)"),
    ("vit", layouts.compiled, "timm"),
    ("vit", layouts.compiled_in_ddp, "timm (model.module)"),
    ("vit", layouts.dino_checkpoint, "DINO (teacher.backbone)"),
    ("resnet", layouts.dino_checkpoint_with_batchnorm, "DINO (teacher.module.backbone)"),
    ("vit", layouts.simdino_checkpoint, "DINO (teacher.backbone)"),
    ("dinov2", layouts.dinov2_backbone, "DINOv2"),
    ("dinov2_reg", layouts.dinov2_backbone, "DINOv2"),
    ("dinov2_giant", layouts.dinov2_backbone, "DINOv2"),
    ("dinov2_reg", layouts.dinov2_teacher, "DINOv2 (teacher.backbone)"),
    ("dinov2", layouts.dinov2_teacher_chunked, "DINOv2, block chunks (teacher.backbone)"),
    ("dinov2_giant", layouts.dinov2_teacher_chunked, "DINOv2, block chunks (teacher.backbone)"),
    ("dinov2", layouts.dinov2_training, "DINOv2 (model.teacher.backbone)"),
    ("dinov2_reg", layouts.simdinov2_teacher, "DINOv2 (teacher.backbone)"),
    ("dinov2", layouts.dinov2_activation_checkpointing, "DINOv2 (teacher.backbone)"),
    ("dinov3_qkvb", layouts.dinov3_backbone, "DINOv3"),
    ("dinov3", layouts.dinov3_backbone, "DINOv3"),
    ("dinov3_plus", layouts.dinov3_teacher, "DINOv3 (teacher.backbone)"),
    ("convnext", layouts.dinov3_convnext, "timm"),
    ("vit", layouts.lightly_dino, "Lightly (state_dict.teacher_backbone)"),
    ("vit", layouts.lightly_dinov2, "Lightly (state_dict.teacher_backbone.vit)"),
    ("resnet", layouts.lightly_resnet, "Lightning (state_dict.backbone)"),
    ("vit", layouts.lightly_train_dino, "LightlyTrain (state_dict.teacher_embedding_model.wrapped_model._model)"),
    (
        "dinov2_reg",
        layouts.lightly_train_dinov2,
        "LightlyTrain, DINOv2, block chunks (state_dict.teacher_embedding_model.model_wrapper._model)",
    ),
    (
        "vit",
        layouts.lightly_train_distillation,
        "LightlyTrain (state_dict.student_embedding_model.wrapped_model._model)",
    ),
    ("vit", layouts.lightly_train_embedding_model, "timm (wrapped_model._model)"),
    (
        "resnet",
        layouts.lightly_train_torchvision,
        "LightlyTrain (state_dict.embedding_model.wrapped_model._features)",
    ),
    ("vit", layouts.under("model"), "Lightning (state_dict.model)"),
    ("vit", layouts.under("net"), "Lightning (state_dict.net)"),
    ("resnet", layouts.under("backbone"), "Lightning (state_dict.backbone)"),
    ("vit", layouts.under("model.teacher.backbone"), "Lightning (state_dict.model.teacher.backbone)"),
]


@pytest.mark.parametrize(
    ("network", "build", "layout"), CASES, ids=[f"{network}-{layout}" for network, _, layout in CASES]
)
def test_a_file_of_the_layout_gives_the_same_embeddings(
    network: str, build: Build, layout: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reference = drawn(network, tmp_path)
    torch.save(build(reference.module.state_dict()), tmp_path / "file.pth")
    backbone = load_backbone(str(network_folder(network, tmp_path)), weights=str(tmp_path / "file.pth"))
    report, px = backbone.load_report, reference.image_px
    assert report is not None
    assert torch.equal(embeddings(backbone.module, px), embeddings(reference.module, px))
    assert (report.layout, report.missing, report.unexpected, report.resampled) == (layout, (), (), ())
    assert set(report.matched) == set(reference.module.state_dict())
    assert capfd.readouterr() == ("", "")  # timm prints about DINOv3


# --- which network of the file


def loaded(content: Any, tmp_path: Path, network: str = "vit", **options: Any) -> Backbone:
    torch.save(content, tmp_path / "content.pth")
    return load_backbone(str(network_folder(network, tmp_path)), weights=str(tmp_path / "content.pth"), **options)


def test_a_teacher_with_a_gap_is_refused_and_not_replaced_by_its_student(tmp_path: Path) -> None:
    content = layouts.dino_checkpoint(drawn("vit", tmp_path).module.state_dict())
    del content["teacher"]["backbone.norm.bias"]
    with pytest.raises(BackboneError, match=r"1 missing \(norm.bias\)"):
        loaded(content, tmp_path)


@pytest.mark.parametrize("nested", [True, False])
def test_keys_of_two_networks_are_never_mixed(nested: bool, tmp_path: Path) -> None:
    state = drawn("vit", tmp_path).module.state_dict()
    partial = {key: tensor for key, tensor in layouts.noise(state).items() if key.startswith("blocks.0")}
    content: dict[str, Any] = layouts.prefixed(state, "backbone.")
    content |= {"module": partial} if nested else layouts.prefixed(partial, "module.")  # looked at first
    report = loaded(content, tmp_path).load_report
    assert report is not None
    assert report.layout == "timm (backbone)"
    both = layouts.prefixed(state, "net.") | layouts.prefixed(layouts.noise(state), "encoder.")
    taken = loaded(both, tmp_path).module.state_dict()
    assert all(torch.equal(taken[key], state[key]) for key in state)


def test_names_that_would_coincide_stay_apart(tmp_path: Path) -> None:
    state = drawn("vit", tmp_path).module.state_dict()
    backbone = loaded(state | layouts.prefixed(layouts.noise(state), "_orig_mod."), tmp_path)
    assert all(torch.equal(tensor, state[key]) for key, tensor in backbone.module.state_dict().items())


def test_chunks_that_count_anew_are_refused(tmp_path: Path) -> None:
    state = layouts.dinov2_backbone(drawn("dinov2", tmp_path).module.state_dict())
    anew = {
        re.sub(r"^blocks\.(\d)\.", lambda m: f"blocks.{int(m[1]) // 2}.{int(m[1]) % 2}.", key): tensor
        for key, tensor in state.items()
    }
    with pytest.raises(BackboneError, match=r"missing \(blocks.0.norm1.weight"):
        loaded(anew, tmp_path, "dinov2")


def test_a_part_of_the_network_is_not_taken_for_a_place_in_the_file() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.nn.Linear(2, 2)

    module = Wrapper()
    (network,) = networks(module.state_dict(), module)
    assert set(network.state) == {"backbone.weight", "backbone.bias"}


def test_unknown_layouts_are_refused_with_the_names_of_both_sides(tmp_path: Path) -> None:
    content = {f"vision.layer_{i}.weight": torch.ones(2) for i in range(5)}
    with pytest.raises(BackboneError) as error:
        loaded({"model": content}, tmp_path)
    message = str(error.value)
    assert error.value.exit_code == 4
    assert "\n" not in message
    assert "0 parameters fit; 78 missing (cls_token, pos_embed, patch_embed.proj.weight and 75 more)" in message
    assert "the file has vision.layer_0.weight, vision.layer_1.weight, ..." in message


def test_attention_biases_that_would_get_lost_are_refused(tmp_path: Path) -> None:
    content = layouts.dinov3_backbone(drawn("dinov3_qkvb", tmp_path).module.state_dict())
    with pytest.raises(BackboneError, match="name vit_small_patch16_dinov3_qkvb"):
        loaded(content, tmp_path, "dinov3")
    for key in content:
        if key.endswith("bias_mask"):
            content[key].zero_()
    assert loaded(content, tmp_path, "dinov3").load_report is not None


def test_another_grid_is_reported_as_resampled(tmp_path: Path) -> None:
    content = layouts.dinov2_teacher(drawn("dinov2_reg", tmp_path).module.state_dict())
    backbone = loaded(content, tmp_path, "dinov2_reg", image_px=84)
    assert backbone.load_report is not None
    assert backbone.load_report.resampled == ("pos_embed",)


# --- files from anyone


class Options(argparse.Namespace):
    """A class torch does not know, as training scripts keep them."""


class Trap:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (open, (str(self.mark), "w"))


class StateTrap(argparse.Namespace):
    def __setstate__(self, state: Any) -> None:
        Path(state["mark"]).touch()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_options_beside_the_weights_are_neither_needed_nor_run(zipped: bool, tmp_path: Path) -> None:
    reference = drawn("vit", tmp_path)
    content = {"model": reference.module.state_dict(), "args": argparse.Namespace(lr=np.float32(1.0))}
    if zipped:
        mark = tmp_path / "code ran"
        content |= {"options": Options(a=1), "trap": Trap(mark), "state": StateTrap(mark=str(mark)), "path": mark}
        content |= {"eval": eval, "partial": functools.partial(print, "x"), "metrics": collections.defaultdict(list)}
    path, known = tmp_path / "file.pth", set(torch.serialization.get_safe_globals())
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    backbone = load_backbone(str(network_folder("vit", tmp_path)), weights=str(path))
    assert torch.equal(embeddings(backbone.module, 64), embeddings(reference.module, 64))
    assert not (tmp_path / "code ran").exists()
    assert set(torch.serialization.get_safe_globals()) == known


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_file_of_nothing_but_code_is_refused(protocol: int, tmp_path: Path) -> None:
    mark = tmp_path / "code ran"
    for name, content in {
        "plain": pickle.dumps(Trap(mark), protocol),
        "state": pickle.dumps(StateTrap(mark=str(mark))),
    }.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
    torch.save({"model": Trap(mark), "cls_token": StateTrap(mark=str(mark))}, tmp_path / "zip.pth")
    torch.save({"system": os.system, "cls_token": torch.ones(1)}, tmp_path / "os.pth")
    for path in sorted(tmp_path.glob("*.pth")):
        with pytest.raises(BackboneError) as error:
            load_backbone("test_vit", weights=str(path))
        assert "\n" not in str(error.value)
        assert "weights_only" not in str(error.value)  # torch's advice to switch the protection off
    assert not mark.exists()


def test_endless_nesting_is_refused_quickly(tmp_path: Path) -> None:
    inner: dict[str, Any] = {"a": torch.ones(1)}
    for _ in range(12):
        inner = dict.fromkeys(WRAPPERS, inner)  # 24 ** 12 ways down
    inner[".".join(["model"] * 3000)] = torch.ones(1)
    start = time.process_time()
    with pytest.raises(BackboneError, match="0 parameters fit"):
        loaded(inner, tmp_path)
    assert time.process_time() - start < 5
