"""The index of a scan: equal to the scan while it is true, and otherwise as if it were not there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from adaptkit.errors import MachineError
from adaptkit.sources import FolderSource, fingerprint, load_index, open_folder, open_images, save_index, split
from adaptkit.sources import index as index_module
from adaptkit.sources.folder import from_files


def fill(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.fsencode(name))
    return root


def paths(source: FolderSource) -> list[str]:
    return [source.path(index) for index in range(len(source))]


def assert_equal(one: FolderSource, other: FolderSource | None) -> None:
    assert other is not None
    assert one.root == other.root
    assert paths(one) == paths(other)
    for name in ("names", "offsets", "file_sizes", "rows"):
        first, second = getattr(one, name), getattr(other, name)
        assert first.dtype == second.dtype
        np.testing.assert_array_equal(first, second)
    assert fingerprint(one) == fingerprint(other)
    assert (one.scale, one.class_names, other.labels) == (other.scale, other.class_names, None)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Seven images in folders and behind links, and two lists."""
    root = tmp_path / "data"
    fill(root, "a/1.jpg", "a/2.jpg", "a/deep/3.png", "b/4.tif", "é/5.jpg", "notes.md", ".hidden/6.jpg")
    fill(tmp_path, "elsewhere/7.jpg", "elsewhere/8.jpg")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "list.txt").write_text("data/a/1.jpg\ndata/b/4.tif\nelsewhere/8.jpg\n")
    (tmp_path / "more.csv").write_text("path,label\ndata/a/2.jpg,x\n")
    return root


def asked(data: Path, kind: str) -> list[Path]:
    return {
        "folder": [data],
        "folders": [data / "a", data / "b", data / "é"],
        "list": [data.parent / "list.txt"],
        "mixed": [data / "a", data.parent / "list.txt", data.parent / "more.csv"],
    }[kind]


@pytest.mark.parametrize("scale", ["range", "percentile"])
@pytest.mark.parametrize("kind", ["folder", "folders", "list", "mixed"])
def test_a_loaded_index_equals_the_scan(data: Path, tmp_path: Path, kind: str, scale: str) -> None:
    file = tmp_path / "run" / "images.index"
    file.parent.mkdir()
    scanned = open_images(asked(data, kind), scale)
    save_index(file, scanned)
    assert_equal(scanned, load_index(file, asked(data, kind), scale))
    assert os.listdir(file.parent) == ["images.index"]
    again = load_index(file, [str(path) for path in asked(data, kind)], scale)
    assert again is not None
    save_index(file, again)  # a loaded one can be saved as well
    assert_equal(scanned, load_index(file, asked(data, kind), scale))


def test_two_thousand_files_without_a_second_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = fill(tmp_path / "data", *(f"clip_{index % 20:02d}/{index:05d}.jpg" for index in range(2_000)))
    scanned = open_folder(data)
    save_index(tmp_path / "index", scanned.subset(np.array([3, 1])).with_labels([0, 1], ("x", "y")))
    looked_at: list[object] = []
    real_stat = os.stat

    def spy(path: object, *more: object, **options: object) -> os.stat_result:
        looked_at.append(path)
        return real_stat(path, *more, **options)

    monkeypatch.setattr(os, "scandir", None)
    monkeypatch.setattr(os, "stat", spy)
    loaded = load_index(tmp_path / "index", [data])
    monkeypatch.undo()
    assert len(looked_at) < 1_000 + 21 + 10  # a sample of the files, all the folders
    assert_equal(scanned, loaded)
    assert loaded is not None
    for one, other in zip(*(vars(split(source, "folder")).values() for source in (scanned, loaded)), strict=True):
        np.testing.assert_array_equal(one, other)


def remove_list_entry(data: Path) -> None:
    (data.parent / "list.txt").write_text("data/a/1.jpg\n")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a new image": (lambda data: fill(data, "a/deep/new.jpg"), "folder folders mixed"),
    "a new image behind a link": (lambda data: fill(data.parent, "elsewhere/new.jpg"), "folder list mixed"),
    "a new folder": (lambda data: fill(data, "b/new/new.jpg"), "folder folders"),
    "an image removed": (lambda data: (data / "a" / "1.jpg").unlink(), "folder folders list mixed"),
    "an image renamed": (lambda data: (data / "b" / "4.tif").rename(data / "b" / "5.tif"), "folder folders list mixed"),
    "an image resized in place": (lambda data: (data / "a" / "1.jpg").write_bytes(b""), "folder folders list mixed"),
    "a folder removed": (lambda data: shutil.rmtree(data / "b"), "folder folders list mixed"),
    "a link led elsewhere": (lambda data: (data / "gone.jpg").unlink(), "folder"),
    "a missing target came back": (lambda data: fill(data.parent, "nowhere.jpg"), "folder"),
    "the list changed": (remove_list_entry, "list mixed"),
    "a list of the same size": (lambda data: rewrite(data.parent / "list.txt"), "list mixed"),
    "the list removed": (lambda data: (data.parent / "list.txt").unlink(), "list mixed"),
}


def rewrite(file: Path) -> None:
    content = file.read_text().replace("a/1.jpg", "a/2.jpg")
    later = file.stat().st_mtime_ns + 1
    file.write_text(content)
    os.utime(file, ns=(later, later))


@pytest.mark.parametrize(
    ("change", "kind"), [(change, kind) for change, (_, kinds) in CHANGES.items() for kind in kinds.split()]
)
def test_a_change_makes_the_caller_scan_again(data: Path, tmp_path: Path, change: str, kind: str) -> None:
    for folder in (data, *data.rglob("*")):  # an hour old: the change below cannot fall into the same tick
        if not folder.is_symlink():
            os.utime(folder, (folder.stat().st_atime, folder.stat().st_mtime - 3600))
    save_index(tmp_path / "index", open_images(asked(data, kind)))
    assert load_index(tmp_path / "index", asked(data, kind)) is not None
    CHANGES[change][0](data)
    assert load_index(tmp_path / "index", asked(data, kind)) is None


def test_an_index_of_other_paths_is_none(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "index"
    save_index(file, open_images([data / "a", data / "b"]))
    assert load_index(file, [data / "a"]) is None
    assert load_index(file, [data / "a", data / "é"]) is None
    assert load_index(file, [data]) is None
    assert load_index(file, []) is None
    monkeypatch.chdir(data)
    assert_equal(open_images(["a", "b"]), load_index(file, ["a", "b"]))  # the same, from there
    assert load_index(tmp_path / "no_index", ["a", "b"]) is None
    assert load_index(tmp_path, ["a", "b"]) is None


def test_a_damaged_index_is_none(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "index"
    source = open_folder(data)
    save_index(file, source)
    content = file.read_bytes()
    rng = np.random.default_rng(5)
    for position in [*range(0, 8), *rng.integers(8, len(content), 200).tolist()]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(0, 8))
        file.write_bytes(damaged)
        loaded = load_index(file, [data])
        if loaded is not None:  # only the header's spelling is not covered by the digest
            assert_equal(source, loaded)
    for cut in range(0, len(content), 97):
        file.write_bytes(content[:cut])
        assert load_index(file, [data]) is None


def forge(file: Path, **changes: np.ndarray) -> None:
    """Replace arrays of an index and sign it again."""
    with safe_open(file, framework="numpy") as content:
        header = content.metadata()
        arrays = {name: content.get_tensor(name) for name in index_module.NAMES}
    arrays.update(changes)
    header["digest"] = index_module._digest(arrays)
    save_file(arrays, file, header)


INTEGERS = np.int64
HOSTILE = {
    "offsets beyond the names": {"offsets": np.array([0, 10**12], INTEGERS), "sizes": np.array([1], INTEGERS)},
    "offsets that go back": {"offsets": np.array([0, 50, 20, 69], INTEGERS), "sizes": np.array([1, 1, 1], INTEGERS)},
    "negative offsets": {"offsets": np.array([-5, 69], INTEGERS), "sizes": np.array([1], INTEGERS)},
    "too few offsets": {"offsets": np.array([0], INTEGERS)},
    "no offsets": {"offsets": np.array([], INTEGERS), "sizes": np.array([], INTEGERS)},
    "no files": {"names": np.array([], np.uint8), "offsets": np.array([0], INTEGERS), "sizes": np.array([], INTEGERS)},
    "negative sizes": {"sizes": np.full(8, -1, INTEGERS)},
    "sizes of another type": {"sizes": np.ones(8, np.float64)},
    "names of another type": {"names": np.zeros(8, np.int16)},
    "names in two dimensions": {"names": np.zeros((3, 23), np.uint8)},
    "names of zeros": {"names": np.zeros(69, np.uint8)},
    "stamps in one dimension": {"stamps": np.zeros(12, INTEGERS)},
    "stamps missing": {"stamps": np.zeros((0, 2), INTEGERS), "places": np.array([], np.uint8)},
    "places of zeros": {"places": np.zeros(5, np.uint8)},
    "a scalar": {"sizes": np.array(3, INTEGERS)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_none(data: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "index"
    source = open_folder(data)
    assert (len(source), len(source.names)) == (8, 69)
    save_index(file, source)
    forge(file)
    assert_equal(source, load_index(file, [data]))
    forge(file, **HOSTILE[name])
    assert load_index(file, [data]) is None


def test_hostile_numbers_between_the_sampled_files(tmp_path: Path) -> None:
    data = fill(tmp_path / "data", *(f"{index:04d}.jpg" for index in range(3_000)))
    source = open_folder(data)
    offsets, sizes = source.offsets.copy(), source.file_sizes.copy()
    offsets[2] = offsets[3] + 1  # of 3,000 files 0, 3, 6, ... are looked at
    sizes[1] = -1
    for forged in ({"offsets": offsets}, {"sizes": sizes}):
        save_index(tmp_path / "index", source)
        assert load_index(tmp_path / "index", [data]) is not None
        forge(tmp_path / "index", **forged)
        assert load_index(tmp_path / "index", [data]) is None


def test_other_safetensors_files_and_odd_types_are_none(data: Path, tmp_path: Path) -> None:
    file = tmp_path / "index"
    save_file({"weight": np.zeros(3, np.float32)}, file)
    assert load_index(file, [data]) is None
    for kind in ("BF16", "F8_E4M3", "U64"):
        header = json.dumps({"names": {"dtype": kind, "shape": [0], "data_offsets": [0, 0]}, "__metadata__": {}})
        file.write_bytes(len(header).to_bytes(8, "little") + header.encode())
        assert load_index(file, [data]) is None


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    try:
        fill(tmp_path / "data", os.fsdecode(b"caf\xe9/\xff.jpg"))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    for folder in (tmp_path / "data", tmp_path / "data" / os.fsdecode(b"caf\xe9")):
        save_index(tmp_path / "index", open_folder(folder))
        assert_equal(open_folder(folder), load_index(tmp_path / "index", [folder]))


def test_an_index_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    source = open_folder(data)
    with pytest.raises(MachineError, match=r"images\.index: cannot be written \(No such file"):
        save_index(tmp_path / "gone" / "images.index", source)
    (tmp_path / "folder.index").mkdir()
    with pytest.raises(MachineError, match="cannot be written"):
        save_index(tmp_path / "folder.index", source)
    assert not list(tmp_path.glob("*.part"))


def test_only_a_scan_can_be_indexed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="scan"):
        save_index(tmp_path / "index", from_files(tmp_path, [(b"a.jpg", 1)]))
