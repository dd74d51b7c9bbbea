"""Gates on the image pipeline: its speed as ratios of CPU time, its draws against torchvision's, its memory."""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torchvision.transforms import InterpolationMode, v2

import adaptkit
from adaptkit.loading import ViewDataset
from adaptkit.settings import ViewSettings
from adaptkit.sources.decoding import decode
from adaptkit.sources.folder import from_files
from adaptkit.views import MultiCrop
from adaptkit.views.multicrop import draw_factors
from adaptkit.views.photometric import GREY, NEUTRAL, SIGMA, SOLARIZE

TILES = Path(adaptkit.__file__).parent / "assets" / "eurosat"
ROUNDS = 5
DRAWS = 6000
TEN = ViewSettings(num_global=2, num_local=8)


def photo(width: int, height: int, tile_px: int) -> Image.Image:
    """A mosaic of enlarged satellite tiles: smooth with edges, as photographs are."""
    mosaic = Image.new("RGB", (width, height))
    tiles = sorted(TILES.glob("*.jpg"))
    for place, top in enumerate(range(0, height, tile_px)):
        for column, left in enumerate(range(0, width, tile_px)):
            with Image.open(tiles[(7 * place + column) % len(tiles)]) as tile:
                mosaic.paste(tile.resize((tile_px, tile_px), Image.Resampling.BICUBIC), (left, top))
    return mosaic


@pytest.fixture(scope="module")
def small_jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "photo.jpg"
    photo(500, 375, 125).save(path, quality=90)
    return path


@pytest.fixture(scope="module")
def large_jpeg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "photo.jpg"
    photo(4000, 3000, 500).save(path, quality=90)
    return path


def cpu_ratio(slow: Callable[[], object], fast: Callable[[], object]) -> float:
    """Median over interleaved rounds of the CPU time of `slow` / that of `fast`."""
    ratios = []
    for _ in range(ROUNDS + 1):
        moments = [time.thread_time()]
        for work in (slow, fast):
            work()
            moments.append(time.thread_time())
        ratios.append((moments[1] - moments[0]) / (moments[2] - moments[1]))
    return median(ratios[1:])  # the first round warms up


def classical(size: int, scale: tuple[float, float], blur: float) -> v2.Transform:
    """One view as DINO makes it: everything on PIL images, in the worker."""
    parts = [
        v2.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(0.5),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([v2.Lambda(blurred)], p=blur),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    return v2.Compose(parts)


def blurred(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))


def test_the_worker_is_four_times_as_fast_as_the_classical_one(small_jpeg: Path) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    views = [classical(224, (0.4, 1.0), 1.0), classical(224, (0.4, 1.0), 0.1)]
    views += [classical(96, (0.05, 0.4), 0.5)] * 8
    ours = MultiCrop(TEN, 224, 96)

    def theirs() -> None:
        for _ in range(3):
            with Image.open(small_jpeg) as image:
                pixels = image.convert("RGB")
            for view in views:
                view(pixels)

    def worker() -> None:
        for _ in range(3):
            ours(decode(small_jpeg), rng)

    assert cpu_ratio(theirs, worker) >= 4


def test_large_photos_are_decoded_faster_than_in_full(large_jpeg: Path) -> None:
    content = large_jpeg.read_bytes()
    assert cpu_ratio(lambda: Image.open(io.BytesIO(content)).convert("RGB"), lambda: decode(large_jpeg)) >= 1.7


def test_a_million_paths_are_no_python_objects() -> None:
    """Forked workers share arrays; they would copy a list page by page, as reading it counts references."""
    files = ((b"folder_%03d/image_%07d.jpg" % (index // 1000, index), 1000) for index in range(1_000_000))
    dataset = ViewDataset(from_files(Path("images"), files), MultiCrop(ViewSettings(), 224, 96), 0)
    buffers: list[pickle.PickleBuffer] = []
    objects = pickle.dumps(dataset, protocol=5, buffer_callback=buffers.append)
    assert len(objects) < 10_000
    assert sum(buffer.raw().nbytes for buffer in buffers) < 60 * 1_000_000
    assert dataset.source.path(999_999) == "folder_999/image_0999999.jpg"


def test_blur_is_drawn_as_torchvision_draws_it() -> None:
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    settings = ViewSettings(blur=(1.0, 1.0, 1.0), blur_sigma=(0.1, 2.0))
    ours = [draw_factors(settings, 0, 224, rng)[SIGMA] for _ in range(DRAWS)]
    blur = v2.GaussianBlur(9, (0.1, 2.0))
    theirs = [blur.make_params([])["sigma"][0] for _ in range(DRAWS)]
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-3


def test_parts_occur_as_often_as_the_settings_say() -> None:
    settings = ViewSettings(jitter=0.8, grey=0.2, blur=(1.0, 0.1, 0.5), solarize=0.2)
    rng = np.random.default_rng(2)
    factors = np.array([draw_factors(settings, 1, 224, rng) for _ in range(DRAWS)])
    occurs = {
        "jitter": (factors[:, :4] != np.array(NEUTRAL[:4])).any(axis=1),
        "grey": factors[:, GREY] > 0,
        "blur": factors[:, SIGMA] > 0,
        "solarize": factors[:, SOLARIZE] > 0,
    }
    expected = {"jitter": 0.8, "grey": 0.2, "blur": 0.1, "solarize": 0.2}
    for name, happened in occurs.items():
        assert stats.binomtest(int(happened.sum()), DRAWS, expected[name]).pvalue > 1e-3, name
