"""The loader: which images, in which order, whoever loads them, and what becomes of a bad one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tables import count_reads, set_window, write

from adaptkit.loading import MAX_TRIES, Batch, Failure, StepSampler, Stuck, ViewDataset, view_loader
from adaptkit.settings import ViewSettings
from adaptkit.sources import BadImage, Blocks, FolderSource, open_images
from adaptkit.views import MultiCrop

NUM_IMAGES, BATCH_SIZE, SEED = 11, 4, 5
STEPS_PER_EPOCH = NUM_IMAGES // BATCH_SIZE
SETTINGS = ViewSettings(num_global=2, num_local=1)


class Numbered:
    """Image i is noise in red and blue and 20 i in green: a view says which of the first dozen it is of."""

    class_names = None

    def __init__(self, num_images: int = NUM_IMAGES, bad: tuple[int, ...] = ()) -> None:
        self.num_images, self.bad = num_images, bad

    def __len__(self) -> int:
        return self.num_images

    def read(self, index: int) -> Image.Image:
        if index in self.bad:
            raise BadImage(self.path(index), "truncated")
        pixels = np.random.default_rng(index).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        pixels[..., 1] = 20 * index % 256
        return Image.fromarray(pixels)

    def path(self, index: int) -> str:
        return f"{index}.jpg"

    def label(self, index: int) -> int | None:
        return None


def sampler(start: int = 0, stop: int = 6, process: int = 0, num_processes: int = 1) -> StepSampler:
    return StepSampler(NUM_IMAGES, BATCH_SIZE, SEED, start, stop, process, num_processes)


def load(which: StepSampler, workers: int = 0, bad: tuple[int, ...] = ()) -> list[Batch]:
    dataset = ViewDataset(Numbered(bad=bad), MultiCrop(SETTINGS, 8, 4), SEED)
    return list(view_loader(dataset, which, workers, pin_memory=False))


def numbers(batch: Batch) -> list[int]:
    """Which images the batch shows."""
    green = batch.global_crops[:, 0, 1, 0, 0]
    return [int(value) // 20 for value in green]


def assert_equal(ours: Batch, other: Batch) -> None:
    assert ours.global_crops.dtype == ours.local_crops.dtype == torch.uint8
    assert torch.equal(ours.global_crops, other.global_crops)
    assert torch.equal(ours.local_crops, other.local_crops)
    assert torch.equal(ours.factors, other.factors)
    assert ours.failures == other.failures


def test_batches_are_the_same_for_any_number_of_workers() -> None:
    alone = load(sampler(), 0, bad=(3,))
    assert len(alone) == 6
    assert sum(len(batch.failures) for batch in alone) > 0
    for workers in (1, 2):
        batches = load(sampler(), workers, bad=(3,))
        assert len(batches) == len(alone)
        for ours, other in zip(batches, alone, strict=True):
            assert_equal(ours, other)


def test_a_batch_holds_the_views_its_sampler_named() -> None:
    keys, batches = list(sampler()), load(sampler())
    for batch, batch_keys in zip(batches, keys, strict=True):
        assert numbers(batch) == [index for _, index in batch_keys]
        assert batch.global_crops.shape == (BATCH_SIZE, 2, 3, 8, 8)
        assert batch.local_crops.shape == (BATCH_SIZE, 1, 3, 4, 4)
        assert batch.factors.shape == (BATCH_SIZE, 3, 8)


@pytest.mark.parametrize("start", range(7))
def test_resuming_anywhere_gives_the_rest_of_the_run(start: int) -> None:
    assert list(sampler(start)) == list(sampler())[start:]
    assert len(sampler(start)) == 6 - start


def test_resumed_batches_hold_the_same_views() -> None:
    for ours, other in zip(load(sampler(3)), load(sampler())[3:], strict=True):
        assert_equal(ours, other)


@pytest.mark.parametrize("num_processes", [2, 4])
def test_shares_of_the_processes_make_up_the_batch(num_processes: int) -> None:
    shares = [list(sampler(process=process, num_processes=num_processes)) for process in range(num_processes)]
    together = [[key for share in step for key in share] for step in zip(*shares, strict=True)]
    assert together == list(sampler())
    assert all(len(batch) == BATCH_SIZE // num_processes for share in shares for batch in share)


def test_views_of_an_image_do_not_depend_on_the_number_of_processes() -> None:
    alone = load(sampler(stop=2))
    shares = [load(sampler(stop=2, process=process, num_processes=2)) for process in range(2)]
    for step in range(2):
        together = torch.cat([share[step].global_crops for share in shares])
        assert torch.equal(together, alone[step].global_crops)


def epoch_orders(num_images: int, batch_size: int, seed: int, epochs: int = 4) -> list[list[int]]:
    steps = num_images // batch_size
    batches = list(StepSampler(num_images, batch_size, seed, 0, epochs * steps))
    assert [{epoch for epoch, _ in batch} for batch in batches] == [{step // steps} for step in range(len(batches))]
    return [[index for batch in batches[e * steps : (e + 1) * steps] for _, index in batch] for e in range(epochs)]


def test_every_epoch_is_another_permutation() -> None:
    orders = epoch_orders(12, 3, seed=0)
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert tuple(range(12)) not in {tuple(order) for order in orders}
    assert orders != epoch_orders(12, 3, seed=1)
    assert orders == epoch_orders(12, 3, seed=0)


def test_an_incomplete_batch_is_left_out_but_not_always_the_same_images() -> None:
    orders = epoch_orders(NUM_IMAGES, BATCH_SIZE, SEED, epochs=12)
    assert all(len(set(order)) == len(order) == STEPS_PER_EPOCH * BATCH_SIZE for order in orders)
    assert {index for order in orders for index in order} == set(range(NUM_IMAGES))


def test_a_run_shorter_than_an_epoch_ends_where_it_should() -> None:
    assert len(list(StepSampler(100, 10, 0, 0, 3))) == 3
    assert list(StepSampler(100, 10, 0, 3, 3)) == []


def item(index: int, bad: tuple[int, ...], num_images: int = NUM_IMAGES) -> tuple[int | None, tuple[Failure, ...]]:
    """The image that stands in for `index` (None: no good one was found), and the reported failures."""
    dataset = ViewDataset(Numbered(num_images, bad), MultiCrop(SETTINGS, 8, 4), SEED)
    views, failures = dataset[0, index]
    return None if views is None else int(views.global_crops[0, 1, 0, 0]) // 20, failures


def test_a_bad_image_is_replaced_by_the_next_good_one_and_reported() -> None:
    assert item(2, bad=(3,)) == (2, ())
    assert item(3, bad=(3,)) == (4, (("3.jpg", "truncated"),))
    assert item(3, bad=(3, 4, 6)) == (5, (("3.jpg", "truncated"), ("4.jpg", "truncated")))
    assert item(10, bad=(10, 0)) == (1, (("10.jpg", "truncated"), ("0.jpg", "truncated")))  # round the end


def test_failures_reach_the_batch() -> None:
    bad = tuple(range(1, 10))
    for batch, keys in zip(load(sampler(), bad=bad), sampler(), strict=True):
        wanted = [index for _, index in keys]
        assert numbers(batch) == [10 if index in bad else index for index in wanted]
        expected = [(f"{met}.jpg", "truncated") for index in wanted if index in bad for met in range(index, 10)]
        assert list(batch.failures) == expected


def test_a_bad_image_changes_no_other_image() -> None:
    whole, damaged = load(sampler()), load(sampler(), bad=(3,))
    for ours, other, keys in zip(damaged, whole, sampler(), strict=True):
        good = [position for position, (_, index) in enumerate(keys) if index != 3]
        assert torch.equal(ours.global_crops[good], other.global_crops[good])
        assert torch.equal(ours.factors[good], other.factors[good])


def test_nothing_but_bad_images_gives_no_views() -> None:
    image, failures = item(4, bad=tuple(range(NUM_IMAGES)))
    assert image is None
    assert len(failures) == NUM_IMAGES
    assert failures[0] == ("4.jpg", "truncated")


def test_the_search_for_a_good_image_ends() -> None:
    many = tuple(range(MAX_TRIES))
    image, failures = item(0, bad=many, num_images=MAX_TRIES + 1)
    assert image is None
    assert len(failures) == MAX_TRIES
    assert len(item(0, bad=many[:-1], num_images=MAX_TRIES + 1)[1]) == MAX_TRIES - 1


@pytest.mark.parametrize("workers", [0, 1])
def test_only_bad_images_are_one_line_also_from_a_worker(workers: int) -> None:
    (stuck,) = load(sampler(stop=1), workers=workers, bad=tuple(range(NUM_IMAGES)))
    assert isinstance(stuck, Stuck)
    assert "\n" not in str(stuck.error())
    assert "truncated, and so are the images after it; check the data" in str(stuck.error())


# --- the order that reads neighbours together


def some_blocks(sizes: list[int], num_images: int = 60) -> Blocks:
    """Images in blocks of these sizes, in no order: some blocks hold many of them."""
    of_images = np.random.default_rng(0).integers(0, len(sizes) ** 2, num_images) // len(sizes)
    of_images[: len(sizes)] = np.arange(len(sizes))
    return Blocks(of_images, np.array(sizes))


SIZES = {
    "equal": [10] * 12,
    "small": [3] * 46,
    "of all sizes": [1, 7, 30, 2, 22, 9, 0, 14, 3, 5, 28, 4],
    "one that is too large": [10, 10, 90, 10, 10, 10, 10],
    "all too large": [50] * 5,
    "all in one window": [2, 3, 4],
    "empty": [0, 0, 0, 0],
}


def block_sampler(blocks: Blocks, start: int = 0, stop: int = 45, process: int = 0, processes: int = 1) -> StepSampler:
    return StepSampler(len(blocks.of_images), BATCH_SIZE, SEED, start, stop, process, processes, blocks)


@pytest.mark.parametrize("name", SIZES)
def test_windows_of_blocks_are_shuffled_as_a_double_loop_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_window(monkeypatch, 35)
    blocks = some_blocks(SIZES[name])
    generator = np.random.default_rng(9)
    order_of_blocks = generator.permutation(len(SIZES[name])).tolist()
    order_of_images = generator.permutation(60).tolist()
    windows: list[list[int]] = []
    seen, held, total = 0, 0, sum(SIZES[name])
    count = 1 if total <= 35 else int(np.ceil(total / 31.5))  # nine tenths of 35
    for block in order_of_blocks:
        size = SIZES[name][block]
        is_full = held + size > 35 or seen >= total * len(windows) / count
        if not windows or (held and is_full):
            windows.append([])
            held = 0
        windows[-1].append(block)
        held, seen = held + size, seen + size
    expected = []
    for window in windows:
        for image in order_of_images:
            if blocks.of_images[image] in window:
                expected.append(image)
    assert blocks.shuffled(np.random.default_rng(9)).tolist() == expected
    sizes = [sum(SIZES[name][block] for block in window) for window in windows]
    assert all(size <= 35 or len(window) == 1 for size, window in zip(sizes, windows, strict=True))
    if name in ("equal", "small", "of all sizes"):
        assert min(sizes) > 10


@pytest.mark.parametrize("name", SIZES)
def test_every_image_comes_once_an_epoch_and_every_epoch_in_another_order(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_window(monkeypatch, 35)
    blocks = some_blocks(SIZES[name])
    batches = list(block_sampler(blocks))
    orders = [[index for batch in batches[15 * e : 15 * e + 15] for _, index in batch] for e in range(3)]
    assert all(sorted(order) == list(range(60)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert list(block_sampler(blocks)) == batches
    other = StepSampler(60, BATCH_SIZE, SEED + 1, 0, 45, blocks=blocks)
    assert list(other) != batches


def test_blocks_resume_anywhere_and_are_shared_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    set_window(monkeypatch, 35)
    blocks = some_blocks(SIZES["of all sizes"], num_images=62)  # an epoch leaves two images out
    whole = list(block_sampler(blocks))
    for start in range(0, 45, 7):
        assert list(block_sampler(blocks, start)) == whole[start:]
    for processes in (2, 4):
        shares = [list(block_sampler(blocks, process=process, processes=processes)) for process in range(processes)]
        assert [[key for share in step for key in share] for step in zip(*shares, strict=True)] == whole
    for first in range(0, 45, 15):
        together = [index for batch in whole[first : first + 15] for _, index in batch]
        assert len(set(together)) == len(together) == 60


def test_without_blocks_the_order_is_what_it_always_was(tmp_path: Path) -> None:
    expected = [np.random.default_rng([SEED, epoch]).permutation(NUM_IMAGES)[:8] for epoch in range(3)]
    batches = [index for batch in sampler() for _, index in batch]
    assert batches == np.concatenate(expected).tolist()
    (tmp_path / "1.jpg").touch()
    assert open_images([tmp_path]).blocks is None


def test_blocks_of_a_part_of_a_table(tmp_path: Path) -> None:
    source = open_images([write(tmp_path / "t.parquet", [bytes(10 + row) for row in range(12)], 4)])
    blocks = source.subset(np.array([1, 9, 10])).blocks
    assert blocks is not None
    assert blocks.of_images.tolist() == [0, 1, 1]
    assert blocks.num_bytes.tolist() == [46, 78]  # the rows that are not among these are read as well


def read_epochs(source: FolderSource, blocks: Blocks | None, workers: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Row groups read in two epochs of batches of 8, dealt to workers as the loader does, by all of them together."""
    total = 0
    for worker in range(workers):
        own = open_images([source.root / "t.parquet"]).subset(source.rows)
        with monkeypatch.context() as patch:
            reads = count_reads(patch)
            sampler = StepSampler(len(own), 8, SEED, 0, 2 * (len(own) // 8), blocks=blocks)
            for batch in list(sampler)[worker::workers]:
                for _, index in batch:
                    assert own.content(index) == b"%05d" % own.rows[index]
            total += len(reads)
    return total / 2


@pytest.mark.parametrize("workers", [1, 3])
def test_block_by_block_a_row_group_is_read_about_once(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By each worker; in the plain order nearly every image costs a row group."""
    write(tmp_path / "t.parquet", [b"%05d" % row for row in range(1_000)], 20)
    source = open_images([tmp_path / "t.parquet"])
    source = source.subset(np.flatnonzero(np.arange(1_000) % 10))  # a tenth is held out
    set_window(monkeypatch, 8 * 20 * 5)  # 8 of the 50 row groups
    assert read_epochs(source, source.blocks, workers, monkeypatch) <= 1.05 * 50 * workers
    assert read_epochs(source, None, workers, monkeypatch) > 700
