"""Masks carried through drawn videos whose answer is known; propagation and J and F against double loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_scenes import moving_things, save_mask, write_video
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from adaptkit.backbones import load_backbone
from adaptkit.dense import video
from adaptkit.dense.masks import read_mask
from adaptkit.dense.overlap import TOLERANCE, contour_f, dilated, outline, reach, region_j
from adaptkit.dense.propagation import first_shares, object_numbers, propagate
from adaptkit.errors import DataError, UsageError
from adaptkit.probes.measure import Measurement, compare


def measured(backbone: str | Path, data: Path, **options: object) -> Measurement:
    keywords = {"precision": "fp32", "batch_size": 4, "workers": 0, "device": torch.device("cpu")} | options
    return video.measure(load_backbone(str(backbone)), data, None, seed=0, **keywords)  # type: ignore[arg-type]


def test_what_stands_still_is_followed_without_a_fault(tmp_path: Path) -> None:
    scenes = moving_things(0, 4, 64, 128, starts=((0, 0),), steps=((0, 0),), side=64)
    scores = measured("nano", write_video(tmp_path, "still", scenes)).scores
    assert {name: score.value for name, score in scores.items()} == {"video_jf": 100, "video_j": 100, "video_f": 100}


def test_things_that_move_by_whole_patches_are_followed(tmp_path: Path) -> None:
    write_video(tmp_path, "one", moving_things(0, 5))
    write_video(tmp_path, "two", moving_things(2, 5, starts=((8, 8), (40, 64)), steps=((0, 8), (0, -8)), side=16))
    nano = measured("nano", tmp_path)
    j, f, both = (nano.scores[name] for name in ("video_j", "video_f", "video_jf"))
    assert j.num_images == 2
    assert j.of_images is not None
    assert min(j.of_images(np.array([0])), j.of_images(np.array([1]))) > 85  # boxes lose corners: patches are squares
    assert both.value == pytest.approx((j.value + f.value) / 2)
    assert all(delta is not None and delta.lo == delta.hi == 0 for delta in compare(nano, nano).values())


def test_an_interval_draws_whole_videos() -> None:
    one, two = np.array([0.2, 0.4, 0.6]), np.array([1.0])
    score = video.mean_score([one, two])
    assert score.value == pytest.approx(55)  # of the four objects
    assert score.of_images is not None
    assert score.of_images(np.array([1, 1])) == pytest.approx(100)
    assert score.of_images(np.array([0, 1])) == pytest.approx(score.value)
    assert score.ci95 == pytest.approx((40, 100))


def slow_propagate(
    frames: list[Tensor], first: Tensor, last: int, top_k: int, heat: float, radius: int
) -> list[Tensor]:
    """Patch by patch, candidate by candidate."""
    h, w, _ = first.shape
    given = [first]
    for time in range(1, len(frames)):
        carried = torch.zeros_like(first)
        context = [0, *range(max(1, time - last), time)]
        for y in range(h):
            for x in range(w):
                candidates = []
                for t in context:
                    for v in range(h):
                        for u in range(w):
                            if abs(v - y) <= radius and abs(u - x) <= radius:
                                cosine = torch.cosine_similarity(frames[time][y, x], frames[t][v, u], dim=0)
                                candidates.append((float(cosine), given[t][v, u]))
                candidates = sorted(candidates, key=lambda pair: -pair[0])[:top_k]
                weights = np.exp(np.array([cosine for cosine, _ in candidates]) / heat)
                weights /= weights.sum()
                carried[y, x] = sum(
                    float(weight) * shares for weight, (_, shares) in zip(weights, candidates, strict=True)
                )
        given.append(carried)
    return given[1:]


@pytest.mark.parametrize(("last", "top_k", "radius"), [(2, 3, 1), (1, 5, 9), (7, 100, 2)])
def test_propagation_is_that_of_double_loops(last: int, top_k: int, radius: int) -> None:
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randn(3, 4, 6, generator=generator) for _ in range(5)]
    first = torch.rand(3, 4, 2, generator=generator)
    expected = slow_propagate(frames, first, last, top_k, 0.1, radius)
    found = list(propagate(iter(frames), first, last_frames=last, top_k=top_k, radius=radius))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))


def slow_outline(region: NDArray[np.bool_]) -> list[tuple[int, int]]:
    height, width = region.shape
    points = []
    for y in range(height):
        for x in range(width):
            others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            others = [(min(v, height - 1), min(u, width - 1)) for v, u in others]
            if any(region[y, x] != region[v, u] for v, u in others):
                points.append((y, x))
    return points


def slow_f(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Every outline pixel against every one of the other outline."""
    ours, theirs = slow_outline(found), slow_outline(truth)
    if not ours or not theirs:
        return float(len(ours) == len(theirs))
    radius = np.ceil(TOLERANCE * np.hypot(*found.shape))

    def share(points: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
        return sum(any(np.hypot(y - v, x - u) <= radius for v, u in others) for y, x in points) / len(points)

    precision, recall = share(ours, theirs), share(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_f_is_that_of_all_pairs_of_outline_pixels() -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:24, 0:270]
    values = []
    for _ in range(4):
        row, column, size = rng.uniform(5, 20), rng.uniform(20, 250), rng.uniform(3, 12)
        truth = np.hypot(y - row, x - column) < size
        found = np.hypot(y - row - rng.normal(0, 2), x - column - rng.normal(0, 3)) < size * rng.uniform(0.7, 1.3)
        found[:, -1] = rng.random(24) < 0.1
        values.append(contour_f(found, truth))
        assert values[-1] == pytest.approx(slow_f(found, truth))
    assert reach((24, 270)) == 3
    assert 0 < min(values) < max(values)
    nothing = np.zeros((24, 270), dtype=bool)
    for pair in ((nothing, nothing), (nothing, truth), (truth, nothing), (truth, truth)):
        assert contour_f(*pair) == slow_f(*pair) == region_j(*pair)


def test_dilation_reaches_as_far_as_the_radius_and_no_farther() -> None:
    points = np.random.default_rng(0).random((13, 17)) < 0.02
    points[0, 0] = points[12, 16] = True
    y, x = np.mgrid[0:13, 0:17]
    for radius in (0, 1, 3, 30):
        near = [np.hypot(y - v, x - u) <= radius for v, u in zip(*np.nonzero(points), strict=True)]
        assert (dilated(points, radius) == np.any(near, axis=0)).all()
    assert outline(np.ones((3, 3), dtype=bool)).sum() == 0


def test_the_first_mask_becomes_shares_and_shares_become_a_mask() -> None:
    mask = np.zeros((16, 24), dtype=np.uint8)
    mask[:8, 8:16], mask[8:, 16:], mask[8:, :8] = 7, 3, 255
    shares = first_shares(mask, np.array([3, 7], dtype=np.uint8), 2, 3)
    assert shares.argmax(dim=-1).tolist() == [[0, 2, 0], [0, 0, 1]]
    found = object_numbers(shares, (16, 24))
    assert (found[2:6, 10:14] == 2).all()
    assert (found[10:, 18:] == 1).all()
    assert (found[10:, :8] == 0).all()
    weak = shares * torch.tensor([1.0, 0.01, 1.0])  # stretched to 0..1, it wins where it is
    weak[1, 2, 0] = 0.5
    assert (object_numbers(weak, (16, 24))[14:, 22:] == 1).all()


def test_the_first_and_the_last_frame_are_not_scored(vit: Path, tmp_path: Path) -> None:
    write_video(tmp_path, "still", moving_things(0, 4, 32, 64, starts=((0, 0),), steps=((0, 0),), side=32))
    (tmp_path / "Annotations/480p/still/00003.png").unlink()
    (tmp_path / "JPEGImages/480p/still/00003.jpg").write_text("not read")
    whole = measured(vit, tmp_path).scores["video_j"].value
    save_mask(np.zeros((32, 64), dtype=np.uint8), tmp_path / "Annotations/480p/still/00002.png")
    assert measured(vit, tmp_path).scores["video_j"].value == pytest.approx(whole / 2)


def test_a_list_names_the_videos(vit: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_video(tmp_path, name, moving_things(0, 3, 32, 64, starts=((0, 0),), side=32))
    (tmp_path / "ImageSets/2017").mkdir(parents=True)
    (tmp_path / "ImageSets/2017/val.txt").write_text("b\n")
    assert [each.name for each in video.open_videos(tmp_path)] == ["b"]
    for outside in ("../b", "/b", ".."):
        (tmp_path / "ImageSets/2017/val.txt").write_text(f"b\n{outside}\n")
        with pytest.raises(DataError, match="is no name of a folder"):
            measured(vit, tmp_path)
    (tmp_path / "ImageSets/2017/val.txt").write_text("b\nc\n")
    with pytest.raises(DataError, match=r"JPEGImages/480p/c: no such folder"):
        video.open_videos(tmp_path)


def _no_mask(root: Path) -> None:
    (root / "Annotations/480p/a/00001.png").unlink()


def _no_object(root: Path) -> None:
    save_mask(np.full((32, 64), 255, dtype=np.uint8), root / "Annotations/480p/a/00000.png")


def _other_size(root: Path) -> None:
    save_mask(np.zeros((32, 32), dtype=np.uint8), root / "Annotations/480p/a/00001.png")


def _other_frame(root: Path) -> None:
    Image.new("RGB", (32, 32)).save(root / "JPEGImages/480p/a/00001.jpg")


def _colours(root: Path) -> None:
    Image.new("RGB", (64, 32)).save(root / "Annotations/480p/a/00000.png")


def _short(root: Path) -> None:
    for number in (2, 3):
        (root / f"JPEGImages/480p/a/0000{number}.jpg").unlink()


def _cut(root: Path) -> None:
    file = root / "JPEGImages/480p/a/00001.jpg"
    file.write_bytes(file.read_bytes()[:-400])


def _empty(root: Path) -> None:
    (root / "Annotations/480p/a").rename(root / "Annotations/a")


def _elsewhere(root: Path) -> None:
    (root / "Annotations/480p").rename(root / "Annotations/1080p")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (_no_mask, r"00001.jpg: has no mask .*480p/a/00001.png"),
        (_no_object, r"a/00000.png: no object in the first mask"),
        (_other_size, r"a/00001.png: is 32 x 32 px but 00001.jpg 64 x 32"),
        (_other_frame, r"a/00001.jpg: is 32 x 32 px, the first frame 64 x 32"),
        (_colours, r"a/00000.png: is PNG RGB"),
        (_short, r"480p/a: 2 frames; at least 3"),
        (_cut, r"a/00001.jpg: .*; mend"),
        (_empty, r"no video; it needs JPEGImages/480p/NAME"),
        (_elsewhere, r"Annotations/480p: no such folder"),
    ],
)
def test_hostile_folders_are_refused_in_one_line(
    break_it: Callable[[Path], None], message: str, vit: Path, tmp_path: Path
) -> None:
    write_video(tmp_path, "a", moving_things(0, 4, 32, 64, starts=((0, 0),), side=32))
    assert set(np.unique(read_mask(tmp_path / "Annotations/480p/a/00000.png"))) == {0, 1}
    break_it(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        measured(vit, tmp_path)
    assert "\n" not in str(caught.value)


def test_queries_make_no_sense(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave --queries out"):
        video.measure(
            load_backbone(str(vit)), tmp_path, tmp_path,
            seed=0, precision="fp32", batch_size=1, workers=0, device=torch.device("cpu"),
        )  # fmt: skip
