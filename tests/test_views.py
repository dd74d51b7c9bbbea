"""Views: crops against PIL, draws against torchvision's, and the same views for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import picture
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from adaptkit.loading import ViewDataset
from adaptkit.settings import ViewSettings
from adaptkit.views import MultiCrop, Views, multicrop
from adaptkit.views.multicrop import draw_box, draw_factors
from adaptkit.views.photometric import NEUTRAL, NUM_FACTORS, ORDERS, SIGMA, SOLARIZE


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, {"jitter", "hue", "grey", "blur"}),
        ({"solarize": 0.2, "hue": 0.0}, {"jitter", "grey", "blur", "solarize"}),
        ({"jitter": 0.0, "blur": (0.0, 0.0, 0.1)}, {"grey", "blur"}),
        ({"jitter": 0.0, "grey": 0.0, "blur": (0.0, 0.0, 0.0)}, set()),
        ({"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}, {"grey", "blur"}),
        ({"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "grey": 0.0}, {"jitter", "hue", "blur"}),
    ],
)
def test_parts_that_cannot_occur_are_not_computed(settings: dict[str, object], parts: set[str]) -> None:
    assert MultiCrop(ViewSettings(**settings), 32, 16).parts == parts  # type: ignore[arg-type]


@pytest.mark.parametrize(("hflip", "vflip"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_crops_are_pils(monkeypatch: pytest.MonkeyPatch, hflip: int, vflip: int) -> None:
    boxes: list[tuple[int, int, int, int]] = []

    def recorded(*args: object) -> tuple[int, int, int, int]:
        boxes.append(draw_box(*args))  # type: ignore[arg-type]
        return boxes[-1]

    monkeypatch.setattr(multicrop, "draw_box", recorded)
    image = picture(90, 130)
    views = MultiCrop(ViewSettings(hflip=hflip, vflip=vflip), 40, 18)(image, np.random.default_rng(hflip))
    crops = [*views.global_crops, *views.local_crops]
    assert len(crops) == len(boxes) == 8
    for crop, (top, left, height, width) in zip(crops, boxes, strict=True):
        box = (left, top, left + width, top + height)
        expected = image.crop(box).resize((crop.shape[2], crop.shape[1]), Image.Resampling.BICUBIC)
        if hflip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if vflip:
            expected = expected.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
        assert float((F.pil_to_tensor(expected).float() - crop.float()).abs().mean()) < 0.3


def test_views_are_uint8_and_of_the_stated_shapes() -> None:
    views = MultiCrop(ViewSettings(num_global=3, num_local=4), 32, 12)(picture(40, 50), np.random.default_rng(0))
    assert (views.global_crops.dtype, views.local_crops.dtype) == (torch.uint8, torch.uint8)
    assert (views.global_crops.shape, views.local_crops.shape) == ((3, 3, 32, 32), (4, 3, 12, 12))
    assert (views.factors.shape, views.factors.dtype) == ((7, NUM_FACTORS), torch.float32)
    none = MultiCrop(ViewSettings(num_local=0), 32, 12)(picture(40, 50), np.random.default_rng(0))
    assert (none.local_crops.shape, none.local_crops.dtype) == ((0, 3, 12, 12), torch.uint8)
    assert none.factors.shape == (2, NUM_FACTORS)


@pytest.mark.parametrize("size", [(300, 400), (60, 500), (500, 60)])  # the long ones often need the fallback
@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_boxes_are_drawn_as_torchvision_draws_them(size: tuple[int, int], scale: tuple[float, float]) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(1500)])
    ours = np.array([draw_box(*size, scale, rng) for _ in range(1500)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    for derived in (box_area, box_aspect):
        assert stats.ks_2samp(derived(ours), derived(theirs)).pvalue > 1e-3
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()


def box_area(boxes: NDArray[np.int64]) -> NDArray[np.float64]:
    return boxes[:, 2] * boxes[:, 3] * 1.0


def box_aspect(boxes: NDArray[np.int64]) -> NDArray[np.float64]:
    return boxes[:, 3] / boxes[:, 2]


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (1, 1)])
def test_fallback_box_is_torchvisions(size: tuple[int, int]) -> None:
    expected = RandomResizedCrop.get_params(torch.empty(3, *size), [0.9, 1.0], [3 / 4, 4 / 3])
    assert draw_box(*size, (0.9, 1.0), np.random.default_rng(0)) == tuple(expected)


def drawn(settings: ViewSettings, view: int, count: int = 3000, px: int = 224) -> NDArray[np.float64]:
    rng = np.random.default_rng(11)
    return np.array([draw_factors(settings, view, px, rng) for _ in range(count)])


def test_jitter_factors_are_drawn_as_torchvision_draws_them() -> None:
    torch.manual_seed(0)
    settings = ViewSettings(jitter=1, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    ours = drawn(settings, 0)
    jitter = ColorJitter(0.4, 0.3, 0.2, 0.1)
    theirs = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(3000)]
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], [draw[1 + column] for draw in theirs]).pvalue > 1e-3
    positions = [ORDERS.index(tuple(draw[0].tolist())) for draw in theirs]
    table = np.array([np.bincount(orders, minlength=24) for orders in (ours[:, 4].astype(int), positions)])
    assert stats.chi2_contingency(table).pvalue > 1e-3
    correlations = np.corrcoef(ours[:, :5].T)
    assert np.abs(correlations - np.eye(5)).max() < 0.08


def test_probabilities_and_ranges_are_those_of_the_settings() -> None:
    settings = ViewSettings(jitter=0.7, grey=0.2, blur=(0.6, 0.1, 0.35), solarize=0.25, blur_sigma=(0.5, 1.5))
    for view, blur, solarize in ((0, 0.6, 0.0), (1, 0.1, 0.25), (2, 0.35, 0.0), (5, 0.35, 0.0)):
        factors = drawn(settings, view, px=112)
        assert (factors[:, :4] != NEUTRAL[:4]).all(1).mean() == pytest.approx(0.7, abs=0.04)
        assert (factors[:, :4] == NEUTRAL[:4]).all(1).mean() == pytest.approx(0.3, abs=0.04)
        assert factors[:, 5].mean() == pytest.approx(0.2, abs=0.03)
        assert (factors[:, SIGMA] > 0).mean() == pytest.approx(blur, abs=0.04)
        assert factors[:, SOLARIZE].mean() == pytest.approx(solarize, abs=0.04)
        sigmas = factors[:, SIGMA][factors[:, SIGMA] > 0] * 224 / 112  # stated for crops of 224 px
        assert stats.kstest(sigmas, stats.uniform(0.5, 1.0).cdf).pvalue > 1e-3


def test_further_global_views_are_blurred_like_the_second() -> None:
    settings = ViewSettings(num_global=3, blur=(1.0, 0.0, 1.0))
    assert [(drawn(settings, view, 20)[:, SIGMA] > 0).all() for view in range(4)] == [True, False, False, True]


def test_switching_a_part_off_leaves_the_other_draws_as_they_were() -> None:
    everything = drawn(ViewSettings(jitter=1, grey=1, blur=(1, 1, 1), solarize=1), 1, 50)
    for off, columns in (("jitter", range(4)), ("grey", [5]), ("blur", [SIGMA]), ("solarize", [SOLARIZE])):
        values = {"jitter": 1, "grey": 1, "blur": (1, 1, 1), "solarize": 1} | {off: (0, 0, 0) if off == "blur" else 0}
        without = drawn(ViewSettings(**values), 1, 50)  # type: ignore[arg-type]
        expected = everything.copy()
        expected[:, list(columns)] = np.array(NEUTRAL)[list(columns)]
        np.testing.assert_array_equal(without, expected)


class OnePicture:
    """A source of the same image under every index."""

    class_names = None

    def __len__(self) -> int:
        return 5

    def read(self, index: int) -> Image.Image:
        return picture(40, 50)

    def path(self, index: int) -> str:
        return f"{index}.png"

    def label(self, index: int) -> int | None:
        return None


def test_views_are_a_function_of_seed_epoch_and_index() -> None:
    def views(seed: int, epoch: int, index: int) -> Views:
        return ViewDataset(OnePicture(), MultiCrop(ViewSettings(), 24, 12), seed)[epoch, index][0]

    first, again = views(3, 1, 2), views(3, 1, 2)
    assert all(torch.equal(getattr(first, name), getattr(again, name)) for name in vars(first))
    for other in (views(4, 1, 2), views(3, 2, 2), views(3, 1, 3), views(3, 2, 1)):
        assert not torch.equal(first.global_crops, other.global_crops)
        assert not torch.equal(first.local_crops, other.local_crops)
        assert not torch.equal(first.factors, other.factors)


def test_the_views_of_an_image_differ_from_one_another() -> None:
    views = MultiCrop(ViewSettings(), 24, 12)(picture(40, 50), np.random.default_rng(0))
    assert len({crop.numpy().tobytes() for crop in views.global_crops}) == 2
    assert len({crop.numpy().tobytes() for crop in views.local_crops}) == 6
    assert len({tuple(row.tolist()) for row in views.factors}) == 8
