"""Patch tokens against timm's own ways to get them, and against adaptkit's readout at the native size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

from adaptkit.backbones import Backbone, load_backbone
from adaptkit.cli.failure import describe
from adaptkit.dense.patches import fitting_size, patch_size, patch_tokens
from adaptkit.errors import BackboneError
from adaptkit.shortage import shortage


def drawn(name: str, **options: object) -> Backbone:
    return load_backbone(name, pretrained=False, **options)  # type: ignore[arg-type]


def small(architecture: str, **options: object) -> Backbone:
    """An architecture that timm has in large sizes only."""
    return replace(drawn("nano"), module=timm.create_model(architecture, num_classes=0, **options).eval())


def noise(height: int, width: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


SMALL = {"img_size": 32, "depth": 2, "embed_dim": 24, "dynamic_img_size": True}


@pytest.mark.parametrize(
    ("name", "num_prefix", "options"),
    [
        ("test_vit", 1, {}),
        ("test_vit4", 1, {}),  # norms after pooling only
        ("deit_tiny_distilled_patch16_224", 2, SMALL),
        ("vit_tiny_patch16_224", 5, SMALL | {"reg_tokens": 4}),
        ("vit_tiny_patch16_224", 0, SMALL | {"class_token": False, "global_pool": "avg"}),
    ],
)
def test_tokens_are_those_of_forward_intermediates_at_any_size(
    name: str, num_prefix: int, options: dict[str, object]
) -> None:
    backbone = small(name, **options) if options else drawn(name, image_px=32)
    assert backbone.module.num_prefix_tokens == num_prefix
    rows, columns = patch_size(backbone)
    for height, width in ((32, 32), (32 + rows, 32 + 2 * columns)):
        pixels = noise(height, width)
        with torch.inference_mode():
            _, (expected,) = backbone.module.forward_intermediates(pixels, indices=1, norm=True)
        tokens = patch_tokens(backbone, pixels)
        assert tokens.shape == (2, height // rows, width // columns, expected.shape[1])
        torch.testing.assert_close(tokens, expected.permute(0, 2, 3, 1))


@pytest.mark.parametrize("name", ["nano", "test_vit4"])
def test_the_mean_of_the_tokens_is_the_mean_readout(name: str) -> None:
    """`test_vit4` norms what it has pooled, not its tokens."""
    backbone = drawn(name, image_px=64, readout="mean")
    pixels = noise(64, 64)
    with torch.inference_mode():
        pooled = backbone.module.fc_norm(patch_tokens(backbone, pixels).mean(dim=(1, 2)))
        torch.testing.assert_close(pooled, backbone.module(pixels))


def test_a_network_without_tokens_gives_its_last_map() -> None:
    swin = small("swin_tiny_patch4_window7_224", img_size=(64, 96), window_size=2, embed_dim=12, depths=(1, 1, 1, 1))
    for backbone, is_last in ((drawn("test_resnet"), False), (drawn("test_convnext"), False), (swin, True)):
        with torch.inference_mode():
            expected = backbone.module.forward_features(noise(64, 96))
        tokens = patch_tokens(backbone, noise(64, 96))
        assert tokens.shape[:3] == (2, 2, 3)
        torch.testing.assert_close(tokens, expected if is_last else expected.permute(0, 2, 3, 1))


def test_uint8_images_are_normalised_and_tokens_stand_where_their_patches_are() -> None:
    backbone = drawn("nano")
    pixels = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (backbone.mean, backbone.std))
    black = patch_tokens(backbone, pixels)
    torch.testing.assert_close(black, patch_tokens(backbone, (pixels / 255 - mean) / std))
    pixels[:, :, 16:24, 80:88] = 255  # row 2, column 10
    changed = (patch_tokens(backbone, pixels) - black).norm(dim=-1)
    assert divmod(int(changed.argmax()), 12) == (2, 10)


def test_images_and_networks_that_do_not_fit_are_refused_in_one_line() -> None:
    with pytest.raises(BackboneError, match=r"nano: images of 64 x 70 px are no multiple .* to 64 x 72$"):
        patch_tokens(drawn("nano"), noise(70, 64))
    own = load_backbone(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), image_px=32)
    with pytest.raises(BackboneError, match=r"module:Sequential: Sequential has no patch tokens; [^\n]*$"):
        patch_tokens(own, noise(32, 32))
    with pytest.raises(BackboneError, match=r"gives no tokens at 48 x 32 px \([^\n]*\)$"):
        patch_tokens(small("convit_tiny", img_size=32, depth=1, embed_dim=8), noise(32, 48))


def test_a_machine_without_memory_is_not_taken_for_a_network_without_tokens() -> None:
    def forward_features(pixels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")

    backbone = drawn("nano")
    backbone.module.forward_features = forward_features  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="can't allocate memory") as raised:
        patch_tokens(backbone, noise(64, 64))
    failure = describe(raised.value)
    assert (failure.exit_code, failure.message) == (8, str(shortage(raised.value)))


@pytest.mark.parametrize(
    ("height", "width", "least", "most", "expected"),
    [
        (480, 854, 1, 480, (480, 856)),
        (100, 100, 1, None, (96, 96)),
        (20, 30, 64, 256, (64, 96)),
        (1000, 500, 64, 256, (512, 256)),
        (4, 4, 1, None, (8, 8)),
        (10, 2000, 16, 256, (16, 64)),
    ],
)
def test_an_image_is_resized_to_whole_patches(
    height: int, width: int, least: int, most: int | None, expected: tuple[int, int]
) -> None:
    assert fitting_size(height, width, (8, 8), least=least, most=most) == expected
