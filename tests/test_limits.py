"""A hostile `config.json` asks for a network larger than the memory: one line at once, and next to no memory."""

from __future__ import annotations

import json
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_files import edit
from hostile import at_most, refused
from safetensors.torch import load_file, save_file
from torch import nn

from adaptkit.backbones import limits, load_backbone
from adaptkit.backbones.limits import MAX_PARTS, TooLarge, _limited, build_within
from adaptkit.errors import BackboneError

CPU_SECONDS = 10.0
MEMORY_MB = 200
PLAIN = "only words, whole numbers up to 100000, others up to 10000, and short lists are taken"
GIANT: dict[str, tuple[str, dict[str, Any], str]] = {
    "a width of a billion": ("test_vit", {"embed_dim": 10**9}, f"'embed_dim' is 1000000000; {PLAIN}"),
    "a depth of a million": ("test_vit", {"depth": 10**6}, f"'depth' is 1000000; {PLAIN}"),
    "a negative million": ("test_vit", {"depth": -(10**6)}, PLAIN),
    "a number of 4,000 digits": ("test_vit", {"depth": int("9" * 4000)}, PLAIN),
    "the largest width": ("test_vit", {"embed_dim": 99_999, "num_heads": 1}, "more than 10,000,000,000 parameters"),
    "the largest depth": ("test_vit", {"depth": 99_999}, "more than 10,000 parts"),
    "a ratio of a billion": ("test_vit", {"mlp_ratio": 1e9}, f"'mlp_ratio' is 1000000000.0; {PLAIN}"),
    "a ratio that is no number": ("test_vit", {"mlp_ratio": float("nan")}, f"'mlp_ratio' is nan; {PLAIN}"),
    "the largest ratio": ("test_vit", {"mlp_ratio": 1e4, "embed_dim": 8192}, "more than 10,000,000,000 parameters"),
    "the largest multiple": ("test_efficientnet", {"depth_multiplier": 1e4}, "more than 10,000 parts"),
    "images of a million": ("test_vit", {"img_size": 10**6}, "whole numbers up to 4096"),
    "a token for every pixel": ("test_vit", {"img_size": 4096, "patch_size": 1, "embed_dim": 4096}, "parameters"),
    "wide stages": ("test_convnext", {"dims": [99_999] * 4}, "more than 10,000,000,000 parameters"),
    "a wide window": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 2048, "window_size": 256},
        "more than 10,000,000,000",
    ),
    "a wide stem": ("test_resnet", {"stem_width": 8192}, "an image would take more than 1,073,741,824 values"),
    "no channels": ("test_resnet", {"stem_width": 0}, "cannot take images"),  # and no remark of torch on the terminal
    "no heads": ("test_vit", {"num_heads": 0}, "timm cannot build test_vit"),
    "a list of 10,000": ("test_vit", {"depth": [1] * 10_000}, "'depth' is a list; only words"),
    "lists in lists": ("test_vit", {"depth": [[[[[[1]]]]]]}, "'depth' is a list; only words"),
    "a word of 10,000 letters": ("test_vit", {"act_layer": "x" * 10_000}, "'act_layer' is x+; only words"),
    "a long name": ("test_vit", {"x" * 10_000: 1}, "timm cannot build test_vit"),
    "a thousand arguments": ("test_vit", {f"a{index}": "y" * 200 for index in range(1000)}, "timm cannot build"),
}


def folder_of(architecture: str, model_args: dict[str, Any], root: Path, px: int = 1024) -> str:
    config = {"architecture": architecture, "model_args": model_args, "pretrained_cfg": {"input_size": [3, px, px]}}
    (root / "config.json").write_text(json.dumps(config))
    return str(root)


@pytest.mark.parametrize("case", GIANT)
def test_a_giant_is_refused_before_it_takes_memory(case: str, tmp_path: Path) -> None:
    architecture, model_args, words = GIANT[case]
    folder = folder_of(architecture, model_args, tmp_path)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with at_most(120):
        refused(BackboneError, 4, words, lambda: load_backbone(folder, pretrained=False))
    assert time.process_time() - started < CPU_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_MB * 1024


@pytest.mark.parametrize("size", [[3, 10**9, 10**9], [3, 4097, 4097]])
def test_giant_images_are_refused(size: list[int], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "test_resnet", "pretrained_cfg": {"input_size": size}})
    )
    words = r"input_size must be \[3, height, width\] of at most 4096"
    refused(BackboneError, 4, words, lambda: load_backbone(str(tmp_path), pretrained=False))


def test_a_network_has_no_more_parameters_than_its_weights_have_bytes(vit: Path, tmp_path: Path) -> None:
    def wider(config: dict[str, Any]) -> dict[str, Any]:
        return config | {"model_args": {"img_size": 32, "embed_dim": 2400, "num_heads": 2}}

    mine = str(edit(vit, tmp_path / "mine", config=wider))  # 400 million parameters
    refused(BackboneError, 4, r"more than 10\d,\d{3},\d{3} parameters", lambda: load_backbone(mine))


def test_what_is_described_is_what_the_name_gives(tmp_path: Path) -> None:
    """The rehearsal draws nothing, so the seed decides as before."""
    by_name = load_backbone("test_vit", pretrained=False, seed=5).module.state_dict()
    args = {"class_token": True, "init_values": None, "img_size": [160, 160]}
    by_folder = load_backbone(folder_of("test_vit", args, tmp_path, 160), pretrained=False, seed=5).module.state_dict()
    assert by_name.keys() == by_folder.keys()
    assert all(torch.equal(by_name[key], by_folder[key]) for key in by_name)


# --- the rehearsal itself


def images(module: nn.Module) -> torch.Tensor:
    return torch.zeros(2, 3)


def test_what_cannot_be_rehearsed_is_counted_as_it_is_made() -> None:
    """Networks of older timm ask tensors for their values, which those without memory have not."""

    def make(width: int) -> nn.Module:
        return nn.Linear(3, int(torch.tensor(width).item()))

    assert isinstance(build_within(400, lambda: make(100), images), nn.Linear)
    with pytest.raises(TooLarge, match="more than 299 parameters"):
        build_within(299, lambda: make(100), images)


def test_every_kind_of_part_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = lambda: nn.BatchNorm1d(3)  # noqa: E731  (6 parameters, 7 numbers in buffers)
    assert isinstance(build_within(13, norm, images), nn.BatchNorm1d)
    with pytest.raises(TooLarge):
        build_within(12, norm, images)
    with pytest.raises(TooLarge, match="more than 10,000 parts"):
        build_within(1, lambda: nn.Sequential(*[nn.Identity()] * (MAX_PARTS + 1)), images)
    monkeypatch.setattr(limits, "MAX_VALUES", 199)
    with pytest.raises(TooLarge, match="more than 199 values"):
        build_within(10_000, lambda: nn.Linear(3, 100), images)


def test_the_limits_end_with_the_block_and_hold_for_one_thread() -> None:
    made: list[nn.Module] = []
    with _limited(0):
        thread = threading.Thread(target=lambda: made.append(nn.Linear(3, 3)))
        thread.start()
        thread.join()
        with pytest.raises(TooLarge):
            nn.Linear(3, 3)
    made.append(nn.Linear(3, 3))
    assert len(made) == 2


# --- float8


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_float8_weights_are_to_be_converted_first(dtype: torch.dtype, suffix: str, vit: Path, tmp_path: Path) -> None:
    state = load_file(vit / "model.safetensors")
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].to(dtype)
    file = tmp_path / f"mine.{suffix}"
    save_file(state, file) if suffix == "safetensors" else torch.save(state, file)
    words = r"blocks\.0\.attn\.qkv\.weight is float8, without its scales; convert the weights to float16 first"
    refused(BackboneError, 4, words, lambda: load_backbone(str(vit), weights=str(file)))
