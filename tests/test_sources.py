"""Folders of images as numpy arrays, their fingerprint, and the count of bad images."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_image
from PIL import Image

from adaptkit.errors import DataError, MachineError
from adaptkit.sources import BadImage, BadImages, FolderSource, fingerprint, open_folder
from adaptkit.sources import folder as folder_module


def fill(root: Path, *names: str) -> Path:
    """Files with an image's name only: listing does not open them."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def paths(source: FolderSource) -> list[str]:
    return [source.path(index) for index in range(len(source))]


def test_lists_images_at_any_depth_in_byte_order(tmp_path: Path) -> None:
    names = ["b.JPG", "a/z.jpeg", "a.jpg", "a-b.png", "a/b/c/d.Png", "a/B.jpg", "é.jpg"]
    fill(tmp_path, *names, "notes.txt", "table.csv", ".hidden.jpg", ".cache/x.jpg", "a/._z.jpeg")
    source = open_folder(tmp_path)
    assert paths(source) == sorted(names, key=os.fsencode)
    assert source.sizes.tolist() == [len(source.path(index).encode()) for index in range(len(source))]
    assert source.sizes.dtype == np.int64
    assert source.root == tmp_path
    assert source.class_names is None
    assert source.label(0) is None


def test_read_gives_the_image_and_names_a_bad_one_by_its_relative_path(images: Path, tmp_path: Path) -> None:
    image = open_folder(images).read(0)
    assert (image.mode, image.size) == ("RGB", (48, 48))
    source = open_folder(fill(tmp_path, "a/not_an_image.jpg"))
    with pytest.raises(BadImage) as caught:
        source.read(0)
    assert caught.value.path == "a/not_an_image.jpg"
    assert str(tmp_path) not in caught.value.reason


def test_file_name_that_is_not_utf8(tmp_path: Path) -> None:
    name = b"caf\xe9.png"
    try:
        draw_image(0, 0).save(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    source = open_folder(tmp_path)
    assert os.fsencode(source.path(0)) == name
    assert source.read(0).size == (48, 48)
    assert fingerprint(source)
    bad = BadImages(tmp_path / "bad.jsonl", 1, "1%")
    bad.add(source.path(0), "truncated")
    assert BadImages(tmp_path / "bad.jsonl", 1, "1%").paths == {source.path(0)}


def test_symbolic_links(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    fill(root, "a/1.jpg")
    fill(elsewhere, "x/2.jpg", "3.jpg")
    (root / "link.jpg").symlink_to(elsewhere / "3.jpg")
    (root / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (root / "itself.jpg").symlink_to(root / "itself.jpg")
    (root / "outside").symlink_to(elsewhere)
    (root / "outside_again").symlink_to(elsewhere / "x")  # its content is listed under outside/
    (root / "0_up").symlink_to(tmp_path)  # sorts first, yet everything is listed at its own place
    (root / "0_inside").symlink_to(root / "a")
    (root / "a" / "loop").symlink_to(root)
    (elsewhere / "back").symlink_to(root / "a")
    (elsewhere / "x" / "loop").symlink_to(elsewhere)
    source = open_folder(root)
    assert paths(source) == ["a/1.jpg", "dangling.jpg", "itself.jpg", "link.jpg", "outside/3.jpg", "outside/x/2.jpg"]
    assert source.sizes.tolist()[1:4] == [0, 0, 5]
    with pytest.raises(BadImage, match="No such file"):
        source.read(1)
    (tmp_path / "alias").symlink_to(root)
    assert paths(open_folder(tmp_path / "alias")) == paths(source)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_no_image(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert paths(open_folder(tmp_path)) == ["a.jpg"]


def test_errors_say_where_and_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        open_folder(tmp_path / "nowhere")
    fill(tmp_path, "docs/a.tif", "docs/b.TIF", "docs/c.txt")
    with pytest.raises(DataError, match=r"c\.txt: is a file"):
        open_folder(tmp_path / "docs" / "c.txt")
    with pytest.raises(DataError, match=r"no \.jpg.*3 other files: \.tif, \.txt; convert"):
        open_folder(tmp_path / "docs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.jpg, \.jpeg or \.png file at any depth$"):
        open_folder(tmp_path / "empty")


def test_a_folder_that_may_not_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "a.jpg", "secret/b.jpg")
    scandir = os.scandir

    def refuse(path: bytes) -> object:
        if path.rstrip(b"/").endswith(b"secret"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(folder_module.os, "scandir", refuse)
    with pytest.raises(MachineError, match=r"secret/: cannot be listed \(Permission denied\)"):
        open_folder(tmp_path)


def test_subset_keeps_storage_labels_and_order(tmp_path: Path) -> None:
    source = open_folder(fill(tmp_path, *(f"{i}.jpg" for i in range(6)))).with_labels([0, 1, 0, 1, 0, 1], ("x", "y"))
    twice = source.subset(np.array([5, 0, 3, 1])).subset(np.array([2, 0]))
    assert paths(twice) == ["3.jpg", "5.jpg"]
    assert twice.names is source.names
    assert [twice.label(0), twice.label(1)] == [1, 1]
    assert twice.labels is not None
    assert twice.labels.tolist() == [1, 1]
    assert twice.class_names == ("x", "y")
    assert twice.sizes.tolist() == [5, 5]
    assert len(source.subset(np.array([], dtype=np.int64))) == 0


def test_travels_to_spawned_workers(tmp_path: Path) -> None:
    draw_image(0, 0).save(tmp_path / "a.png")
    source = open_folder(tmp_path)
    assert pickle.loads(pickle.dumps(source)).read(0).size == (48, 48)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(FolderSource.read, (source, 0)).size == (48, 48)


def test_storage_is_a_handful_of_arrays_even_for_many_paths() -> None:
    files = ((b"folder/%07d.jpg" % index, index) for index in range(200_000))
    source = folder_module.from_files(Path("/somewhere"), files)
    assert source.path(123_456) == "folder/0123456.jpg"
    assert source.names.dtype == np.uint8
    assert source.names.nbytes == 200_000 * len(b"folder/0000000.jpg")
    held = [value for value in vars(source).values() if isinstance(value, (list, tuple, dict, set))]
    assert not held  # a Python container per path would be copied page by page into every worker


def test_fingerprint_sees_every_change_but_not_the_order(tmp_path: Path) -> None:
    fill(tmp_path, "a.jpg", "b/c.jpg", "b/d.jpg")
    before = fingerprint(open_folder(tmp_path))
    source = open_folder(tmp_path)
    assert fingerprint(source.subset(np.array([2, 0, 1]))) == before
    seen = {before, fingerprint(source.subset(np.array([0, 1])))}
    fill(tmp_path, "e.jpg")
    seen.add(fingerprint(open_folder(tmp_path)))
    (tmp_path / "a.jpg").write_bytes(b"longer than before")
    seen.add(fingerprint(open_folder(tmp_path)))
    (tmp_path / "a.jpg").rename(tmp_path / "a2.jpg")
    seen.add(fingerprint(open_folder(tmp_path)))
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("num_images", "max_bad", "accepted"),
    [
        (100, "1%", 5),
        (1000, "1%", 10),
        (300, "7%", 21),
        (3000, "2.3%", 69),
        (1000, "12", 12),
        (1000, "2", 5),
        (8, "100%", 8),
    ],
)
def test_bad_images_are_accepted_up_to_the_limit(num_images: int, max_bad: str, accepted: int) -> None:
    bad = BadImages(None, num_images, max_bad)
    for index in range(accepted):
        bad.add(f"{index}.jpg", "truncated")
        bad.add(f"{index}.jpg", "truncated")  # the same file in the next epoch is not another bad image
    assert len(bad.paths) == accepted
    with pytest.raises(DataError, match=rf"{accepted + 1} of {num_images} .* {accepted} are accepted.*0\.jpg \(trunc"):
        bad.add("one_more.jpg", "truncated")


def test_bad_images_are_written_down_and_counted_on_after_a_crash(tmp_path: Path) -> None:
    file = tmp_path / "bad_images.jsonl"
    bad = BadImages(file, 100, "1%")
    bad.add("a/1.jpg", "truncated")
    bad.add('odd "name"\n.jpg', "not an image")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [
        {"path": "a/1.jpg", "reason": "truncated"},
        {"path": 'odd "name"\n.jpg', "reason": "not an image"},
    ]
    with file.open("a") as torn:
        torn.write('{"path": "half a li')
    again = BadImages(file, 100, "1%")
    assert again.paths == bad.paths
    again.add("a/1.jpg", "truncated")
    for index in range(3):
        again.add(f"{index}.jpg", "truncated")
    assert len(file.read_text().splitlines()) == 5
    with pytest.raises(DataError, match=r"bad_images\.jsonl"):
        again.add("9.jpg", "truncated")
    with pytest.raises(DataError, match="6 of 100"):  # resuming does not forget that there are too many
        BadImages(file, 100, "1%")


def test_damaged_list_of_bad_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match=r"bad\.jsonl: damaged"):
        BadImages(tmp_path / "bad.jsonl", 100, "1%")


def test_list_of_bad_images_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot be written"):
        BadImages(tmp_path / "gone" / "bad.jsonl", 100, "1%")
    bad = BadImages(tmp_path / "bad.jsonl", 100, "1%")
    assert (tmp_path / "bad.jsonl").read_text() == ""  # no image was bad so far
    (tmp_path / "bad.jsonl").unlink()
    (tmp_path / "bad.jsonl").mkdir()
    with pytest.raises(MachineError, match="cannot be written"):
        bad.add("a.jpg", "truncated")


def test_images_read_back_what_was_drawn(tmp_path: Path) -> None:
    draw_image(1, 2).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as expected:
        np.testing.assert_array_equal(np.asarray(open_folder(tmp_path).read(0)), np.asarray(expected))
