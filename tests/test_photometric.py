"""Photometrics against torchvision's float functions, and without a look at the device's values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import picture
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchvision.transforms.v2 import functional as F

from adaptkit.settings import ViewSettings
from adaptkit.views import MultiCrop, photometric
from adaptkit.views.multicrop import draw_factors
from adaptkit.views.photometric import (
    BLUR_RADIUS,
    HUE,
    NEUTRAL,
    NUM_FACTORS,
    ORDERS,
    SIGMA,
    SOLARIZE,
    _change_all,
    _change_rows,
)

ALL_PARTS = frozenset({"jitter", "hue", "grey", "blur", "solarize"})
MEAN_LEVELS, MAX_LEVELS = 0.05, 0.5  # grey levels of 255
ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)  # by column


def uint8_batch(num_views: int, px: int = 24) -> Tensor:
    return torch.stack([F.pil_to_tensor(picture(px, px + 8, seed)) for seed in range(num_views)])


def neutral(num_views: int) -> Tensor:
    return torch.tensor(NEUTRAL).repeat(num_views, 1)


def levels(views: Tensor, factors: Tensor, parts: frozenset[str] = ALL_PARTS) -> Tensor:
    """What `photometric` gives, in grey levels, not normalised."""
    return 255 * photometric(views, factors, (0.0,) * 3, (1.0,) * 3, parts)


def assert_close_levels(ours: Tensor, expected: Tensor) -> None:
    difference = (ours - 255 * expected).abs()
    assert float(difference.mean()) < MEAN_LEVELS
    assert float(difference.max()) < MAX_LEVELS


def jittered(view: Tensor, factors: Tensor) -> Tensor:
    """torchvision's chain on one uint8 view, in the order of its factors; float in [0, 1]."""
    x = view.float() / 255
    for part in ORDERS[int(factors[4])]:
        x = ADJUST[part](x, float(factors[part]))
    return x


def test_neutral_factors_only_normalise() -> None:
    views, mean, std = uint8_batch(2), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    expected = F.normalize(views.float() / 255, list(mean), list(std))
    torch.testing.assert_close(photometric(views, neutral(2), mean, std, ALL_PARTS), expected)
    torch.testing.assert_close(photometric(views, neutral(2), mean, std, frozenset()), expected)


@pytest.mark.parametrize("order", range(24))
def test_jitter_is_torchvisions_in_every_order(order: int) -> None:
    rng = np.random.default_rng(order)
    factors = neutral(4)
    factors[:, :3] = torch.from_numpy(rng.uniform(0.4, 1.6, (4, 3)))
    factors[:, HUE] = torch.from_numpy(rng.uniform(-0.5, 0.5, 4))
    factors[:, 4] = order
    views = uint8_batch(4)
    expected = torch.stack([jittered(view, row) for view, row in zip(views, factors, strict=True)])
    assert_close_levels(levels(views, factors), expected)


@pytest.mark.parametrize("part", range(4))
def test_each_part_of_the_jitter_alone(part: int) -> None:
    factors = neutral(1)
    factors[0, part] = 0.3
    views = uint8_batch(1)
    expected = ADJUST[part](views.float() / 255, 0.3)
    assert (expected - views / 255).abs().mean() > 0.01
    assert_close_levels(levels(views, factors), expected)


def test_every_view_of_a_batch_has_its_own_factors() -> None:
    rng = np.random.default_rng(5)
    settings = ViewSettings(jitter=1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.3, solarize=0.5)
    factors = torch.tensor([draw_factors(settings, view % 3, 48, rng) for view in range(12)])
    assert len(factors[:, 4].unique()) > 4
    views = uint8_batch(12)
    alone = torch.cat([levels(views[i : i + 1], factors[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(levels(views, factors), alone, rtol=0, atol=1e-2)


def test_grey_is_the_luma_of_all_channels() -> None:
    factors = neutral(2)
    factors[1, 5] = 1
    views = uint8_batch(2)
    expected = torch.stack([views[0] / 255, F.rgb_to_grayscale(views[1] / 255, 3)])
    assert_close_levels(levels(views, factors), expected)


def test_solarise_inverts_from_128_on() -> None:
    factors = neutral(2)
    factors[1, SOLARIZE] = 1
    views = torch.arange(256).byte().view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    expected = torch.stack([views[0], F.solarize(views[1], 128)]) / 255
    assert_close_levels(levels(views, factors), expected)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_torchvisions_with_nine_taps(sigma: float) -> None:
    factors = neutral(3)
    factors[1:, SIGMA] = torch.tensor([sigma, 0.7])
    views = uint8_batch(3)
    size = 2 * BLUR_RADIUS + 1
    blurred = [F.gaussian_blur(views[i] / 255, [size, size], [s, s]) for i, s in ((1, sigma), (2, 0.7))]
    assert_close_levels(levels(views, factors), torch.stack([views[0] / 255, *blurred]))


def test_blur_of_a_view_smaller_than_the_kernel() -> None:
    factors = neutral(1)
    factors[0, SIGMA] = 1.5
    views = torch.randint(0, 256, (1, 3, 3, 5), generator=torch.Generator().manual_seed(0)).byte()
    assert_close_levels(levels(views, factors), F.gaussian_blur(views / 255, [5, 5], [1.5, 1.5]))


def test_the_parts_follow_one_another() -> None:
    """Jitter, then grey, then blur, then solarise."""
    factors = torch.tensor([[1.3, 0.7, 1.0, 0.0, 2.0, 1.0, 1.2, 1.0]])
    views = uint8_batch(1)
    grey = F.rgb_to_grayscale(jittered(views[0], factors[0]), 3)
    blurred = F.gaussian_blur(grey, [9, 9], [1.2, 1.2])
    difference = (levels(views, factors)[0] - 255 * F.solarize(blurred, 128 / 255)).abs()
    assert float(difference.mean()) < MEAN_LEVELS
    assert float(difference.max()) < 1.5  # a value beside the threshold may fall on the other side


def test_leaving_out_parts_changes_nothing_when_their_factors_are_neutral() -> None:
    settings = ViewSettings(jitter=1, hue=0, grey=0, blur=(0, 0, 0))
    rng = np.random.default_rng(0)
    factors = torch.tensor([draw_factors(settings, view, 48, rng) for view in range(6)])
    views = uint8_batch(6)
    torch.testing.assert_close(
        levels(views, factors, MultiCrop(settings, 48, 24).parts), levels(views, factors), rtol=0, atol=1e-2
    )


def test_nothing_is_read_back_from_the_device() -> None:
    """On a fake CUDA device there are no values to read: whatever asks for one raises."""
    with FakeTensorMode():
        views = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="cuda")
        factors = torch.empty(4, NUM_FACTORS, device="cuda")
        x = photometric(views, factors, (0.5,) * 3, (0.2,) * 3, ALL_PARTS)
        assert (x.device.type, x.dtype, x.shape) == ("cuda", torch.float32, views.shape)
        with pytest.raises(DataDependentOutputException):  # the check itself works
            factors[0, 0].item()


@pytest.mark.parametrize("side", [3, 40])
def test_view_by_view_on_a_cpu_equals_all_at_once_on_a_gpu(side: int) -> None:
    rng = np.random.default_rng(1)
    settings = ViewSettings(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.5, grey=0.3, solarize=0.9)
    drawn = torch.tensor([draw_factors(settings, view % 4, side, rng) for view in range(200)], dtype=torch.float32)
    x = torch.from_numpy(rng.random((200, 3, side, side), dtype=np.float32))
    parts = frozenset({"jitter", "hue", "grey", "blur", "solarize"})
    for present in (parts, parts - {"hue"}, parts - {"blur"}, frozenset({"solarize"})):
        factors = drawn.clone()
        if "hue" not in present:
            factors[:, HUE] = NEUTRAL[HUE]
        torch.testing.assert_close(_change_rows(x.clone(), factors, present), _change_all(x, factors, present))
