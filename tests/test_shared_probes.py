"""Several processes share the batches of a probe; each ends with what one process would have, to the bit."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import draw_image
from several import endings, together

from adaptkit.backbones import load_backbone
from adaptkit.embedding import Embedder, Embeddings
from adaptkit.errors import DataError
from adaptkit.outcome import reestimate_batchnorm_
from adaptkit.probes.fixed_views import retrieve_views
from adaptkit.processes import Share, on_main
from adaptkit.session import open_accelerator
from adaptkit.sources import open_folder

pytestmark = pytest.mark.long

BAD = (2, 3, 4, 5, 11, 18)  # of 19 images in batches of 2: two batches are bad altogether, and so is the last


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """19 images, some of them unreadable."""
    folder = tmp_path_factory.mktemp("spoilt")
    for index in range(19):
        file = folder / f"{index:02d}.png"
        file.write_bytes(b"no image") if index in BAD else draw_image(index % 4, index, px=40).save(file)
    return folder


def embed_all(vit: Path, resnet: Path, labelled: Path, spoilt: Path) -> dict[str, Any]:
    """Everything that a run embeds, in this process or in this one of several."""
    open_accelerator("fp32")
    backbone, convnet = load_backbone(str(vit)), load_backbone(str(resnet))
    source, bad = open_folder(labelled / "train"), open_folder(spoilt)
    shared = Embedder(batch_size=2, shared=True)
    result = {
        "uneven shares": Embedder(7, shared=True)(backbone, source),
        "with loader workers": Embedder(7, workers=1, shared=True)(backbone, source),
        "fewer batches than processes": Embedder(1000, shared=True)(backbone, source),
        "bad images": shared(backbone, bad),
        "one good image": shared(backbone, bad.subset(np.array([2, 3, 4, 5, 11, 12]))),
        "views": retrieve_views(backbone, source, Embedder(7, shared=True)),
        "views of bad images": retrieve_views(backbone, bad, shared),
    }
    on_main(lambda: Embedder(7)(backbone, source))  # not shared: the others do not come
    reestimate_batchnorm_(convnet, source, Embedder(7, shared=True))
    return result | {"statistics": dict(convnet.module.named_buffers())}


@pytest.fixture(scope="module")
def alone(vit: Path, resnet: Path, labelled: Path, spoilt: Path) -> dict[str, Any]:
    return together(1, embed_all, vit, resnet, labelled, spoilt)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("num_processes", [2, 3])
def test_every_process_has_what_one_would_have(
    num_processes: int, alone: dict[str, Any], vit: Path, resnet: Path, labelled: Path, spoilt: Path
) -> None:
    for each in together(num_processes, embed_all, vit, resnet, labelled, spoilt):
        different = [name for name in alone if not same(each[name], alone[name])]
        assert not different


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Embeddings):
        return all(map(same, astuple(one), astuple(other)))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_one_process_has_all_readable_images_in_order(alone: dict[str, Any]) -> None:
    found = alone["bad images"]
    assert found.paths == tuple(f"{index:02d}.png" for index in range(19) if index not in BAD)
    assert tuple(path for path, _ in found.failures) == tuple(f"{index:02d}.png" for index in BAD)
    assert alone["one good image"].paths == ("12.png",)
    assert len(alone["uneven shares"].vectors) == 60
    assert not same(alone["uneven shares"], alone["bad images"])


def embed_unreadable(vit: Path, spoilt: Path) -> None:
    open_accelerator("fp32")
    Embedder(2, shared=True)(load_backbone(str(vit)), open_folder(spoilt).subset(np.array(BAD)))


def test_a_source_without_readable_images_is_the_same_error_everywhere(vit: Path, spoilt: Path) -> None:
    ended = endings(1, embed_unreadable, vit, spoilt) + endings(3, embed_unreadable, vit, spoilt)
    assert [type(error) for error in ended] == [DataError] * 4
    assert len({str(error) for error in ended}) == 1
    assert "none of the 6 images could be read; the first: 02.png" in str(ended[0])


@pytest.mark.parametrize("num_images", [0, 1, 4, 5, 13])
@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_shares_are_the_batches_of_one_process_dealt_out(num_images: int, num_processes: int) -> None:
    whole = [list(range(num_images))[start : start + 4] for start in range(0, num_images, 4)]
    for process in range(num_processes):
        batches = Share(process, num_processes).batches(num_images, 4)
        assert [list(batch) for batch in batches] == whole[process::num_processes]
