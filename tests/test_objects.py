"""Object discovery with a backbone, on drawn scenes whose boxes are known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import ROOT
from torchvision.transforms.functional import pil_to_tensor

from adaptkit.backbones import Backbone, load_backbone
from adaptkit.dense.annotations import open_boxed
from adaptkit.dense.boxes import Found, iou
from adaptkit.dense.cut import box_of, find_one, find_several
from adaptkit.dense.keys import patch_keys
from adaptkit.dense.objects import measure, object_scores, working_size
from adaptkit.dense.patches import patch_tokens
from adaptkit.errors import BackboneError, DataError, NotFinite, UsageError
from adaptkit.probes.measure import Measurement, compare

sys.path.append(str(ROOT / "benchmarks" / "objects"))
from scenes import SIDE_PX, draw_scene, write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("objects") / "scenes", 4, seed=3)


@pytest.fixture(scope="module")
def nano() -> Backbone:
    return load_backbone("nano")


def measured(backbone: Backbone, data: Path, precision: str = "fp32", queries: Path | None = None) -> Measurement:
    cpu = torch.device("cpu")
    return measure(backbone, data, queries, seed=0, precision=precision, batch_size=8, workers=0, device=cpu)


def colours(image: Image.Image, patch: int = 8) -> torch.Tensor:
    """The mean colour of each patch, less that of the image."""
    side = SIDE_PX // patch
    tokens = torch.from_numpy(np.array(image)).double().view(side, patch, side, patch, 3).mean(dim=(1, 3))
    return tokens - tokens.mean(dim=(0, 1))


def test_the_method_itself_finds_coloured_objects() -> None:
    """One of the objects as `find_one`, and of all objects of five scenes three quarters as `find_several`."""
    ones, total, found = 0, 0, 0
    for index in range(5):
        image, boxes = draw_scene(11, index)
        truth, tokens = np.array(boxes, dtype=np.float64), colours(image)
        one = np.array([box_of(find_one(tokens).mask, SIDE_PX, SIDE_PX)])
        ones += bool(iou(one, truth).max() > 0.5)
        several = np.array([box_of(segment.mask, SIDE_PX, SIDE_PX) for segment in find_several(tokens)])
        found += int((iou(several, truth).max(axis=0) > 0.5).sum())
        total += len(truth)
    assert ones >= 4
    assert found >= 0.75 * total


def test_nano_finds_objects_and_measures_are_paired(nano: Backbone, scenes: Path) -> None:
    first = measured(nano, scenes)
    assert first.failures == ()
    assert set(first.scores) == {"corloc", "ap50"}
    assert first.scores["corloc"].value >= 50
    assert first.scores["ap50"].value >= 30
    assert first.scores["corloc"].per_query is not None
    assert len(first.scores["corloc"].per_query) == first.scores["ap50"].num_images == 4
    with pytest.raises(UsageError, match="leave --queries out"):
        measured(nano, scenes, queries=scenes)
    again = measured(nano, scenes)
    deltas = compare(first, again)
    assert all(delta is not None and delta.value == delta.lo == delta.hi == 0 for delta in deltas.values())


def test_keys_are_those_of_the_last_attention(nano: Backbone) -> None:
    """Against the last block's own layers, fed by hand with what timm says goes into them."""
    image = pil_to_tensor(draw_scene(3, 0)[0])[None]
    keys = patch_keys(nano, image)
    pixels = (image.float() / 255 - torch.tensor(nano.mean).view(1, 3, 1, 1)) / torch.tensor(nano.std).view(1, 3, 1, 1)
    with torch.no_grad():
        before = nano.module.forward_intermediates(
            pixels, indices=[4], intermediates_only=True, output_fmt="NLC", return_prefix_tokens=False
        )[0]
        block = nano.module.blocks[-1]
        weight, bias = block.attn.qkv.weight[192:384], block.attn.qkv.bias[192:384]
        expected = torch.nn.functional.linear(block.norm1(before), weight, bias)
    assert keys.shape == (1, 20, 20, 192)
    torch.testing.assert_close(keys.flatten(1, 2), expected)
    assert not nano.module.blocks[-1].attn.qkv._forward_hooks


def test_a_network_without_keys_gives_its_feature_map(resnet: Path) -> None:
    backbone = load_backbone(str(resnet))
    image = torch.zeros(1, 3, 64, 96, dtype=torch.uint8)
    assert torch.equal(patch_keys(backbone, image), patch_tokens(backbone, image))


@pytest.mark.parametrize(
    ("width", "height", "patch", "expected"),
    [
        (160, 120, (8, 8), (160, 120)),
        (165, 127, (8, 8), (160, 120)),
        (1920, 1080, (16, 16), (480, 256)),
        (5, 300, (16, 16), (16, 288)),
        (480, 480, (4, 4), (240, 240)),
    ],
)
def test_images_keep_their_size_within_bounds(
    width: int, height: int, patch: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert working_size(width, height, patch) == expected
    assert expected[0] // patch[1] * (expected[1] // patch[0]) <= 3600


def test_bad_images_are_left_out(nano: Backbone, tmp_path: Path) -> None:
    data = write_scenes(tmp_path / "few", 3, seed=5)
    (data / "images" / "0001.png").write_bytes((data / "images" / "0001.png").read_bytes()[:3000])
    scores = measured(nano, data)
    assert [name for name, _ in scores.failures] == ["images/0001.png"]
    assert scores.scores["ap50"].num_images == 2
    for name in ("0000.png", "0002.png"):
        (data / "images" / name).write_bytes(b"")
    with pytest.raises(DataError, match="none of the images with boxes could be read"):
        measured(nano, data)


def test_images_without_boxes_count_in_ap50_only() -> None:
    box, none = np.array([[0.0, 0, 9, 9]]), np.zeros((0, 4))
    found = [Found(box, np.ones(1), box), Found(box, np.ones(1), none)]
    scores = object_scores(found, found)
    assert scores["corloc"].value == 100
    assert scores["corloc"].per_query is not None
    assert len(scores["corloc"].per_query) == 1
    assert (scores["ap50"].value, scores["ap50"].num_images) == (50, 2)  # half of the boxes are right


def test_what_cannot_be_measured_is_said(nano: Backbone, scenes: Path) -> None:
    with pytest.raises(UsageError, match="fp23"):
        measured(nano, scenes, precision="fp23")
    broken = nano.clone()
    with torch.no_grad():
        broken.module.patch_embed.proj.bias.fill_(float("nan"))
    with pytest.raises(NotFinite, match=r"0000\.png"):
        measured(broken, scenes)
    broken.module = torch.nn.Linear(3, 3)
    with pytest.raises(BackboneError, match="no patch tokens"):
        measured(broken, scenes)


def test_scenes_are_what_their_table_says(scenes: Path) -> None:
    images, failures = open_boxed(scenes)
    assert failures == ()
    for index, image in enumerate(images):
        picture, boxes = draw_scene(3, index)
        assert image.boxes.tolist() == [list(box) for box in boxes]
        assert np.array_equal(np.array(Image.open(image.file)), np.array(picture))
        overlap = iou(image.boxes, image.boxes)
        assert overlap.sum() == len(boxes)
