"""The cache of small images: what a run sees does not depend on it, and it destroys nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import picture
from PIL import Image
from tiny_runs import Recorder, SignalAt, adapt, assert_same_run, tiny

import adaptkit
from adaptkit import caching, schedules
from adaptkit.backbones import load_backbone
from adaptkit.caching import drop_cache, open_cached, settle_cache
from adaptkit.errors import Interrupted, MachineError, UsageError
from adaptkit.estimate import StepCost, dry_run, time_steps
from adaptkit.inputs import open_inputs
from adaptkit.loading import StepSampler, ViewDataset, view_loader
from adaptkit.recipe import load_recipe
from adaptkit.run import Run
from adaptkit.schedules import Plan
from adaptkit.settings import ViewSettings
from adaptkit.sources import BadImage, DecodeCache, FolderSource, decode, open_folder
from adaptkit.sources import cache as cache_module
from adaptkit.train import run_adaptation
from adaptkit.views import MultiCrop

LARGE = 6  # of the images of `mixed`


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """As smooth as a photograph at full size."""
    return picture(height // 8, width // 8, seed).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large JPEGs, one of them turned and one above the size that is decoded at reduced scale; two small files."""
    root = tmp_path_factory.mktemp("mixed")
    for index, (height, width) in enumerate([(700, 900), (1100, 1300), (641, 641)]):
        photo(height, width, index).save(root / f"{index}.jpg", quality=92)
    turned = Image.Exif()
    turned[0x0112] = 6
    photo(800, 700, 3).save(root / "3.jpg", exif=turned)
    ramp = np.linspace(0, 65535, 900 * 700).reshape(700, 900).astype(np.uint16)
    Image.fromarray(ramp).save(root / "4.png")
    Image.fromarray(ramp.T.copy()).save(root / "5.tif")
    photo(640, 900, 6).save(root / "6.jpg")
    photo(48, 64, 7).save(root / "7.png")
    return root


@pytest.fixture
def cache(tmp_path: Path) -> DecodeCache:
    return DecodeCache.make(tmp_path / "cache")


def pixels(source: FolderSource, cache: DecodeCache | None) -> list[np.ndarray]:
    cached = replace(source, cache=cache)
    return [np.asarray(cached.read(index)) for index in range(len(cached))]


def equal(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return len(some) == len(others) and all(map(np.array_equal, some, others))


def entries(cache: DecodeCache) -> list[Path]:
    return sorted(path for path in cache.folder.rglob("*") if path.is_file() and path.name != cache_module.MARKER)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the originals that are decoded."""
    names: list[str] = []
    real = cache_module.decode_sized

    def counted(path: Path, *rest: Any, content: bytes | None = None, **options: Any) -> Any:
        if content is None:
            names.append(path.name)
        return real(path, *rest, content=content, **options)

    monkeypatch.setattr(cache_module, "decode_sized", counted)
    return names


# --- the pixels


def test_pixels_are_the_same_for_an_empty_a_filled_and_an_unwritable_cache(mixed: Path, tmp_path: Path) -> None:
    source = open_folder(mixed)
    cache, blocked = DecodeCache.make(tmp_path / "cache"), DecodeCache.make(tmp_path / "blocked")
    for group in range(256):
        (blocked.folder / f"{group:02x}").touch()  # a file where a folder would have to be: holds for root too
    first = pixels(source, cache)
    assert len(entries(cache)) == LARGE
    assert equal(first, pixels(source, cache))
    assert equal(first, pixels(source, blocked))
    assert all(not path.stat().st_size for path in entries(blocked))


def test_a_full_disk_is_silent_and_leaves_nothing_behind(mixed: Path, cache: DecodeCache) -> None:
    source = open_folder(mixed)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        seen = pixels(source, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert entries(cache) == []
    assert equal(seen, pixels(source, cache))


def test_a_folder_that_goes_away_is_silent(mixed: Path, cache: DecodeCache) -> None:
    seen = pixels(open_folder(mixed), cache)
    shutil.rmtree(cache.folder)
    assert equal(seen, pixels(open_folder(mixed), cache))


def test_small_images_are_as_decode_gives_them_and_not_kept(mixed: Path, cache: DecodeCache) -> None:
    for name in ("6.jpg", "7.png"):
        seen = cache.read(mixed / name, "range")
        assert np.array_equal(np.asarray(seen), np.asarray(decode(mixed / name)))
    assert entries(cache) == []


@pytest.mark.parametrize(
    ("name", "size"),
    [("0.jpg", (658, 512)), ("1.jpg", (605, 512)), ("2.jpg", (512, 512)), ("3.jpg", (585, 512)), ("4.png", (658, 512))],
)
def test_large_images_keep_their_content(name: str, size: tuple[int, int], mixed: Path, cache: DecodeCache) -> None:
    """Upright, of 512 px short side, and close to a plain resize of the original."""
    for _ in ("made", "kept"):
        seen = cache.read(mixed / name, "range")
        assert (seen.mode, seen.size, seen.info) == ("RGB", size, {})
        plain = decode(mixed / name).resize(size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(seen, dtype=float) - np.asarray(plain, dtype=float)).mean() < 3


@pytest.mark.parametrize(("short_side", "decoded"), [(1000, 1000), (1024, 512), (2100, 525)])
def test_a_jpeg_is_reduced_in_its_decoder_to_no_less_than_512(
    short_side: int, decoded: int, tmp_path: Path, cache: DecodeCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`decode` itself would take 1000 px to 500, which would have to be enlarged."""
    sides: list[int] = []
    real = cache_module._shrink
    monkeypatch.setattr(cache_module, "_shrink", lambda image: (sides.append(min(image.size)), real(image))[1])
    photo(short_side, short_side).save(tmp_path / "a.jpg")
    assert cache.read(tmp_path / "a.jpg", "range").size == (512, 512)
    assert sides == [decoded]


def test_16_bit_pixels_follow_the_scale_and_each_scale_its_own_entry(tmp_path: Path, cache: DecodeCache) -> None:
    ramp = np.linspace(1000, 1999, 700 * 700).reshape(700, 700).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    for _ in range(2):
        dark = np.asarray(cache.read(tmp_path / "deep.png", "range"))
        wide = np.asarray(cache.read(tmp_path / "deep.png", "percentile"))
        assert dark.max() < 12
        assert wide.max() > 240


def test_an_image_too_long_for_a_jpeg_is_used_as_it_is(tmp_path: Path, cache: DecodeCache) -> None:
    Image.new("L", (82_200, 641), 90).save(tmp_path / "long.bmp")
    assert cache.read(tmp_path / "long.bmp", "range").size == (82_200, 641)
    assert entries(cache) == []


def test_bad_images_stay_bad(mixed: Path, tmp_path: Path, cache: DecodeCache) -> None:
    (tmp_path / "cut.jpg").write_bytes((mixed / "0.jpg").read_bytes()[:5000])
    (tmp_path / "copy.jpg").write_bytes((mixed / "0.jpg").read_bytes())
    cache.read(tmp_path / "copy.jpg", "range")
    (tmp_path / "copy.jpg").unlink()
    for name in ("cut.jpg", "copy.jpg", "missing.jpg"):
        with pytest.raises(BadImage):
            cache.read(tmp_path / name, "range")


@pytest.mark.parametrize("workers", [0, 2])
def test_views_do_not_depend_on_workers_or_on_what_is_kept(workers: int, mixed: Path, cache: DecodeCache) -> None:
    source = replace(open_folder(mixed), cache=cache)
    crop = MultiCrop(ViewSettings(), 32, 16)

    def batches(workers: int) -> list[torch.Tensor]:
        dataset, sampler = ViewDataset(source, crop, 0), StepSampler(len(source), 4, 0, 0, 4)
        return [batch.global_crops for batch in view_loader(dataset, sampler, workers, False)]

    first = batches(workers)
    again = batches(0)
    assert all(map(torch.equal, first, again))


def test_a_second_epoch_opens_no_large_original(mixed: Path, cache: DecodeCache, opened: list[str]) -> None:
    source = pickle.loads(pickle.dumps(open_folder(mixed)))
    first = pixels(source, cache)
    assert opened == [source.path(index) for index in range(len(source))]
    opened.clear()
    assert equal(first, pixels(source, cache))
    assert opened == ["6.jpg", "7.png"]


# --- entries


@pytest.mark.parametrize("change", ["size", "mtime"])
def test_a_changed_file_is_read_anew(change: str, tmp_path: Path, cache: DecodeCache, opened: list[str]) -> None:
    file = tmp_path / "a.bmp"
    photo(700, 700, 1).save(file)
    cache.read(file, "range")
    status = file.stat()
    photo(*((700, 720) if change == "size" else (700, 700)), seed=2).save(file)
    if change == "size":
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert file.stat().st_size == status.st_size
    seen = np.asarray(cache.read(file, "range"))
    expected = np.asarray(DecodeCache.make(tmp_path / "other").read(file, "range"))
    assert np.array_equal(seen, expected)
    assert opened.count("a.bmp") == 3
    assert len(entries(cache)) == 1  # replaced


def jpeg(height: int, width: int) -> bytes:
    stream = io.BytesIO()
    photo(height, width, 99).save(stream, "JPEG")
    return stream.getvalue()


def sealed(file: Path, content: bytes) -> bytes:
    """An entry that claims to be whole, by somebody who knows the format."""
    origin = cache_module._origin(file, "range")
    assert origin
    return cache_module.MAGIC + cache_module._digest(origin, content) + content


@pytest.mark.parametrize(
    "damage",
    ["truncated", "empty", "one bit", "swapped", "garbage", "a jpeg", "other size", "no image", "folder", "pipe"],
)
def test_a_damaged_or_foreign_entry_is_a_miss(damage: str, mixed: Path, cache: DecodeCache, opened: list[str]) -> None:
    file, other = mixed / "0.jpg", mixed / "2.jpg"
    first = np.asarray(cache.read(file, "range"))
    entry = cache._entry(file)
    whole = entry.read_bytes()
    cache.read(other, "range")
    contents = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "one bit": whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:],
        "swapped": cache._entry(other).read_bytes(),
        "garbage": os.urandom(5000),
        "a jpeg": jpeg(512, 600),
        "other size": sealed(file, jpeg(64, 64)),
        "no image": sealed(file, b"not a jpeg"),
    }
    entry.unlink()
    if damage in contents:
        entry.write_bytes(contents[damage])
    elif damage == "folder":
        entry.mkdir()
    else:
        os.mkfifo(entry)
    opened.clear()
    assert np.array_equal(np.asarray(cache.read(file, "range")), first)
    assert opened == ["0.jpg"]
    if damage != "folder":
        assert entry.read_bytes() == whole  # mended
    assert not list(cache.folder.rglob("*.part"))


def test_an_entry_of_another_file_of_the_same_size_and_time_is_a_miss(tmp_path: Path, cache: DecodeCache) -> None:
    files = [tmp_path / "a.bmp", tmp_path / "b.bmp"]
    seen = []
    for seed, file in enumerate(files):
        photo(650, 650, seed).save(file)
        os.utime(file, ns=(10**18, 10**18))
        seen.append(np.asarray(cache.read(file, "range")))
    shutil.copyfile(cache._entry(files[0]), cache._entry(files[1]))
    assert np.array_equal(np.asarray(cache.read(files[1], "range")), seen[1])


# --- the folder


def test_a_folder_of_somebody_elses_is_refused_and_untouched(tmp_path: Path) -> None:
    for name, content in (("photos/a.jpg", b"mine"), ("odd/adaptkit-cache.json", b'{"format": "adaptkit.cache/9"}')):
        file = tmp_path / name
        file.parent.mkdir()
        file.write_bytes(content)
        with pytest.raises(UsageError, match=r"not empty, and no cache .* give --cache a new or an empty folder$"):
            DecodeCache.make(file.parent)
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        assert file.read_bytes() == content
    with pytest.raises(UsageError, match="is not a folder"):
        DecodeCache.make(tmp_path / "photos" / "a.jpg")
    with pytest.raises(MachineError, match="cannot be used as a cache"):
        DecodeCache.make(tmp_path / "photos" / "a.jpg" / "below")
    with pytest.raises(MachineError, match="cannot be used as a cache"):
        DecodeCache.make(tmp_path / "nul\0")
    with pytest.raises(MachineError, match="cannot be used as a cache"):
        DecodeCache.make(tmp_path / ("x" * 300))


def test_a_new_an_empty_and_a_known_folder_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / f"{cache_module.MARKER}.1.ab.part").touch()  # another run is about to mark it
    for name in ("empty", "begun", "new/deeper"):
        for _ in range(2):
            folder = DecodeCache.make(tmp_path / name).folder
            assert json.loads((folder / "adaptkit-cache.json").read_text()) == {"format": "adaptkit.cache/1"}


def test_removing_takes_only_what_is_ours(mixed: Path, cache: DecodeCache) -> None:
    pixels(open_folder(mixed), cache)
    entry = entries(cache)[0]
    entry.with_name(f"{entry.name}.1f.abcd.part").touch()  # of a killed worker
    strangers = [cache.folder / "notes.txt", entry.with_name("mine.jpg")]
    for path in strangers:
        path.write_text("mine")
    cache.remove()
    assert sorted(path for path in cache.folder.rglob("*") if path.is_file()) == sorted(strangers)
    for path in strangers:
        path.unlink()
    cache.remove()
    assert not cache.folder.exists()
    cache.remove()  # nothing there: nothing to do


# --- whole runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 images of 650 px: 12 to train on."""
    root = tmp_path_factory.mktemp("photos")
    for index in range(16):
        photo(650, 650, index).save(root / f"{index}.jpg")
    return root


@pytest.fixture(autouse=True)
def _short_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)


class Killed(BaseException):
    """Stands for a kill: nothing may be saved on the way out."""


class KillAt(Recorder):
    def evaluation(self, step: int, *rest: Any) -> None:
        if step == 4:
            raise Killed


@pytest.mark.long
def test_a_run_with_a_cache_ends_the_same_after_a_kill_and_leaves_none(
    vit: Path, photos: Path, tmp_path: Path, opened: list[str]
) -> None:
    settings = {"data__cache": "on", "checkpoint_every": "3 steps"}
    whole = adapt(vit, photos, tmp_path / "whole", **settings).run
    assert len(opened) == len(set(opened)) == 12  # every training image once, no held-out one
    assert not (whole / "cache").exists()
    with pytest.raises(Killed):
        adapt(vit, photos, tmp_path / "cut", reporter=KillAt(), **settings)
    kept = entries(DecodeCache(tmp_path / "cut" / "cache"))
    assert len(kept) == 12
    kept[0].write_bytes(b"cut off")
    kept[1].unlink()
    adaptkit.resume(tmp_path / "cut")
    assert_same_run(whole, tmp_path / "cut")
    assert not (tmp_path / "cut" / "cache").exists()


def test_a_shared_folder_stays_and_serves_the_next_run(
    vit: Path, photos: Path, tmp_path: Path, opened: list[str]
) -> None:
    kept: list[list[Path]] = []
    for name in ("first", "second"):
        with pytest.raises(Interrupted):
            adapt(vit, photos, tmp_path / name, reporter=SignalAt(2), data__cache=str(tmp_path / "shared"))
        kept.append(entries(DecodeCache(tmp_path / "shared")))
    assert len(opened) == len(set(opened)) == len(kept[0])  # two epochs, nearly all images: all by the first run
    drop_cache(Run.open(tmp_path / "second"))
    assert kept[0] == kept[1] == entries(DecodeCache(tmp_path / "shared"))


@pytest.mark.parametrize("how", ["run", "dry run"])
def test_a_foreign_folder_is_refused_before_anything_is_probed(
    how: str, vit: Path, photos: Path, tmp_path: Path
) -> None:
    recorder = Recorder()
    recipe = load_recipe(overrides={"backbone": str(vit), "data": str(photos), "data.cache": str(photos)})
    begin = {
        "run": lambda: run_adaptation(Run.create(recipe, tmp_path / "run"), recorder),
        "dry run": lambda: dry_run(recipe, recorder),
    }
    with pytest.raises(UsageError, match="no cache that this version made"):
        begin[how]()
    assert not [phase for phase in recorder.phases if "probing" in phase]


@pytest.mark.long
def test_waiting_for_images_does_not_count_as_training(
    vit: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else training would always seem as slow as the decoding that it waits for."""
    recipe = load_recipe(overrides={key.replace("__", "."): value for key, value in tiny(data=str(images)).items()})
    slow = FolderSource.read

    def read(source: FolderSource, index: int) -> Image.Image:
        time.sleep(0.05)
        return slow(source, index)

    monkeypatch.setattr(FolderSource, "read", read)
    cost = time_steps(Accelerator(cpu=True), recipe, open_inputs(recipe), load_backbone(str(vit)), workers=0, timed=3)
    assert 0 < cost.fed_seconds <= cost.seconds - 8 * 0.05  # a batch of 8, read in this process


@pytest.mark.parametrize(("fed_seconds", "word"), [(1e-6, "on"), (1e6, "off")])
def test_auto_is_decided_by_measurement_and_kept(
    fed_seconds: float, word: str, vit: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def timed(*rest: Any) -> StepCost:
        asked.append(1)
        return StepCost(1e6, 1, fed_seconds)

    monkeypatch.setattr("adaptkit.train.time_steps", timed)
    recorder = SignalAt(4)
    with pytest.raises(Interrupted):
        adapt(vit, photos, tmp_path / "run", reporter=recorder)
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.cache == word
    assert len(asked) == 1
    kept = DecodeCache(tmp_path / "run" / "cache")
    assert len(entries(kept)) == (12 if word == "on" else 0)
    said = f"keeping up to 12 images decoded small in {kept.folder}: decoding takes "
    assert [note.startswith(said) for note in recorder.notes] == ([True] if word == "on" else [])
    with pytest.raises(Interrupted):
        adaptkit.resume(tmp_path / "run", reporter=SignalAt(6))
    assert len(asked) == 1  # decided once


@pytest.fixture
def settled(photos: Path, images: Path, tmp_path: Path) -> Any:
    """`settle_cache` and `open_cached` on real inputs: the word decided on, and what was said."""

    def settle(cost: Any, recorder: Recorder, **given: Any) -> str:
        recipe = load_recipe(
            overrides={key.replace("__", "."): v for key, v in tiny(**({"data": str(photos)} | given)).items()}
        )
        run = Run.create(recipe, tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        inputs, accelerator = open_inputs(recipe), Accelerator(cpu=True)
        plan = Plan.make(recipe, len(inputs.train))
        run, plan = settle_cache(run, plan, inputs.train, accelerator, 0, cost, recorder)
        open_cached(run, inputs.train, accelerator, recorder)
        assert plan.recipe == run.recipe == load_recipe(run.path / "recipe.yaml")
        return run.recipe.data.cache

    return settle


def never() -> StepCost:
    raise RuntimeError("steps are timed although the answer is known")


def test_auto_times_nothing_when_the_answer_is_known(
    settled: Any, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settled(never, Recorder(), steps=1) == "off"  # one epoch
    assert settled(never, Recorder(), data=str(images)) == "off"  # 48 px
    assert settled(lambda: StepCost(1, 1, 1e-6), Recorder()) == "on"
    monkeypatch.setattr(caching, "BYTES_PER_IMAGE", 10**15)
    assert settled(never, Recorder()) == "off"  # no room


def test_a_cache_that_was_asked_for_without_room_is_told_once(
    settled: Any, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    assert settled(never, recorder, data__cache="on") == "on"
    assert recorder.notes == []
    monkeypatch.setattr(caching, "BYTES_PER_IMAGE", 10**15)
    assert settled(never, recorder, data__cache="on", data=str(images)) == "on"
    assert recorder.notes == []  # nothing to keep
    assert settled(never, recorder, data__cache="on") == "on"
    (note,) = recorder.notes
    assert "MiB needed" in note
    assert note.endswith("images that find no room are decoded anew every time")
