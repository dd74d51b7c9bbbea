"""embed(): the same vectors as one image at a time, whatever the batches, workers and bad images."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from adaptkit.embedding import embed
from adaptkit.errors import DataError, DeviceMemoryError, UsageError
from adaptkit.sources import open_folder


def to_pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1)


class TinyNetwork(nn.Module):
    """(N, 3, H, W) -> (N, 5), with a BatchNorm and a dropout that would show training mode."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm, self.dropout, self.last = nn.BatchNorm1d(12), nn.Dropout(0.5), nn.Linear(12, 5)
        nn.init.normal_(self.last.weight, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)
        vectors: Tensor = self.last(self.dropout(self.norm(pooled)))
        return vectors


@dataclass
class TinyBackbone:
    """What embed() asks of a backbone."""

    module: nn.Module = field(default_factory=TinyNetwork)
    mean: tuple[float, float, float] = (0.5, 0.4, 0.3)
    std: tuple[float, float, float] = (0.2, 0.3, 0.4)

    def eval_transform(self) -> object:
        return to_pixels


@pytest.fixture
def backbone() -> TinyBackbone:
    return TinyBackbone()


def one_by_one(backbone: TinyBackbone, source: object, indices: list[int]) -> Tensor:
    rows = []
    for index in indices:
        pixels = to_pixels(source.read(index)).numpy().astype(np.float64) / 255  # type: ignore[attr-defined]
        scaled = (pixels - np.reshape(backbone.mean, (3, 1, 1))) / np.reshape(backbone.std, (3, 1, 1))
        with torch.no_grad():
            rows.append(backbone.module.eval()(torch.from_numpy(scaled).float()[None])[0])
    return torch.stack(rows)


@pytest.mark.parametrize(("batch_size", "workers"), [(128, 0), (7, 0), (16, 2)])
def test_embeddings_are_those_of_single_images(
    backbone: TinyBackbone, images: Path, batch_size: int, workers: int
) -> None:
    source = open_folder(images)
    result = embed(backbone, source, batch_size=batch_size, workers=workers)  # type: ignore[arg-type]
    assert result.vectors.dtype == torch.float32
    torch.testing.assert_close(result.vectors, one_by_one(backbone, source, list(range(120))), rtol=1e-4, atol=1e-5)
    assert result.paths == tuple(source.path(i) for i in range(120))
    assert result.failures == ()


def test_labels_follow_their_images(backbone: TinyBackbone, labelled: Path) -> None:
    source = open_folder(labelled / "train")
    result = embed(backbone, source)  # type: ignore[arg-type]
    expected = [source.label(i) for i in range(len(source))]
    assert result.class_names == source.class_names
    if result.labels is None:
        assert None in expected
    else:
        assert result.labels.dtype == torch.int64
        assert result.labels.tolist() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_left_out_and_listed(backbone: TinyBackbone, tmp_path: Path, workers: int) -> None:
    for index in range(7):
        Image.new("RGB", (20, 20), (index * 30, 10, 200)).save(tmp_path / f"{index}.png")
    for index in (2, 3, 6):  # 2 and 3 make up a whole batch
        (tmp_path / f"{index}.png").write_bytes(b"not an image at all")
    source = open_folder(tmp_path)
    result = embed(backbone, source, batch_size=2, workers=workers)  # type: ignore[arg-type]
    assert result.paths == ("0.png", "1.png", "4.png", "5.png")
    assert [path for path, _ in result.failures] == ["2.png", "3.png", "6.png"]
    assert all(reason for _, reason in result.failures)
    torch.testing.assert_close(result.vectors, one_by_one(backbone, source, [0, 1, 4, 5]), rtol=1e-4, atol=1e-5)


def test_no_readable_image_is_the_users_error(backbone: TinyBackbone, tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"none of the 3 images could be read; the first: 0\.jpg"):
        embed(backbone, open_folder(tmp_path))  # type: ignore[arg-type]


def test_modes_statistics_and_random_state_are_left_alone(backbone: TinyBackbone, images: Path) -> None:
    network = backbone.module
    network.train()
    network.norm.eval()  # type: ignore[union-attr, operator]  # frozen on purpose inside a network that trains
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.random.get_rng_state()
    embed(backbone, open_folder(images))  # type: ignore[arg-type]
    assert [m.training for m in network.modules()] == [True, False, True, True]
    assert torch.equal(torch.random.get_rng_state(), random)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_embeddings_can_be_used_in_a_later_gradient(backbone: TinyBackbone, images: Path) -> None:
    """Tensors made in inference mode cannot be saved for backward; the linear probe needs that."""
    result = embed(backbone, open_folder(images))  # type: ignore[arg-type]
    weight = torch.zeros(5, 2, requires_grad=True)
    (result.vectors @ weight).sum().backward()
    assert weight.grad is not None


def test_low_precision_gives_float32_close_to_it(backbone: TinyBackbone, images: Path) -> None:
    full = embed(backbone, open_folder(images)).vectors  # type: ignore[arg-type]
    low = embed(backbone, open_folder(images), precision="bf16").vectors  # type: ignore[arg-type]
    assert low.dtype == torch.float32
    assert not torch.equal(low, full)
    torch.testing.assert_close(low, full, rtol=0.1, atol=0.1)


def test_float32_is_exact_while_embedding_and_the_setting_comes_back(backbone: TinyBackbone, images: Path) -> None:
    seen = []

    class Spy(TinyNetwork):
        def forward(self, images: Tensor) -> Tensor:
            seen.append((torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
            return super().forward(images)

    backbone.module = Spy()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # what a training loop may have asked for
    try:
        allowed = torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        embed(backbone, open_folder(images))  # type: ignore[arg-type]
        assert seen == [("ieee", "ieee")]
        assert (torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision) == allowed
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32  # reading the older flag raises when the two disagree
    finally:
        torch.set_float32_matmul_precision(before)


def test_unknown_precision(backbone: TinyBackbone, images: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'fp32'"):
        embed(backbone, open_folder(images), precision="fp23")  # type: ignore[arg-type]


def test_out_of_memory_names_the_way_out(backbone: TinyBackbone, images: Path) -> None:
    class Hungry(TinyNetwork):
        def forward(self, images: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    backbone.module = Hungry().train()
    with pytest.raises(DeviceMemoryError, match="use a smaller batch size"):
        embed(backbone, open_folder(images))  # type: ignore[arg-type]
    assert backbone.module.training
