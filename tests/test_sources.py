"""Folders of images as numpy arrays, their fingerprint, and the count of bad images."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from conftest import draw_image
from PIL import Image

from adaptkit.errors import DataError, MachineError
from adaptkit.sources import BadImage, BadImages, FolderSource, fingerprint, open_folder, open_images, split
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
    names = ["b.JPG", "a/z.jpeg", "a.jpg", "a-b.png", "a/b/c/d.Png", "a/B.jpg", "é.jpg", "f.webp", "G.BMP", "h.tif"]
    names += ["a/i.TIFF", "j.Gif"]
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


@pytest.mark.parametrize("names", [("a.jpg", "b.jpg", "c.jpg"), ("a/1.jpg", "a.jpg", "a-b/1.jpg", "b.jpg")])
def test_a_fingerprint_is_of_the_sorted_paths(names: tuple[str, ...], tmp_path: Path) -> None:
    fill(tmp_path, *names)
    source = open_folder(tmp_path)
    facts = sorted((os.fsencode(name), (tmp_path / name).stat().st_size) for name in names)
    expected = blake2b(b"".join(b"%d\0%s\0" % (size, name) for name, size in facts), digest_size=16).hexdigest()
    assert fingerprint(source) == expected
    assert fingerprint(source.subset(np.arange(len(names))[::-1])) == expected


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
    fill(tmp_path, "docs/a.dcm", "docs/b.DCM", "docs/c.txt")
    with pytest.raises(DataError, match=r"c\.txt: is a file"):
        open_folder(tmp_path / "docs" / "c.txt")
    with pytest.raises(DataError, match=r"no \.jpg.*3 other files: \.dcm, \.txt; convert"):
        open_folder(tmp_path / "docs")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.jpg, .* \.tiff or \.gif file at any depth; check the path$"):
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


def test_one_folder_is_opened_as_ever(tmp_path: Path) -> None:
    fill(tmp_path / "data", "b.jpg", "a/1.jpg", "a-b.png")
    one, same = open_folder(tmp_path / "data"), open_images([str(tmp_path / "data")])
    assert paths(one) == paths(same) == ["a-b.png", "a/1.jpg", "b.jpg"]
    assert one.root == same.root == tmp_path / "data"
    assert fingerprint(one) == fingerprint(same)


def test_several_folders_are_relative_to_their_common_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, "data/b/2.jpg", "data/a/deep/1.jpg", "data/a-b/3.jpg", "data/c/4.jpg", "data/.new/5.jpg")
    folders = [tmp_path / "data" / name for name in ("b", "a-b", "a", ".new")]
    source = open_images(folders)
    assert paths(source) == [".new/5.jpg", "a-b/3.jpg", "a/deep/1.jpg", "b/2.jpg"]
    assert source.root == tmp_path / "data"
    assert all(source.file(index).is_file() for index in range(len(source)))
    assert source.sizes.tolist() == [len(f"data/{path}") for path in paths(source)]
    assert fingerprint(open_images(folders[::-1])) == fingerprint(source)
    monkeypatch.chdir(tmp_path / "data" / "c")
    there = open_images(["../b", "../a/../a-b"])
    assert (there.root, paths(there)) == (tmp_path / "data", ["a-b/3.jpg", "b/2.jpg"])


def test_folders_that_overlap_are_refused(tmp_path: Path) -> None:
    fill(tmp_path, "data/a/1.jpg", "data/ab/2.jpg")
    (tmp_path / "alias").symlink_to(tmp_path / "data" / "a")
    for pair in (["data", "data/a"], ["data/a", "data"], ["data", "alias"]):
        with pytest.raises(DataError, match=r"(a|alias): lies inside .*data, which is named too"):
            open_images([tmp_path / name for name in pair])
    with pytest.raises(DataError, match="alias: is named twice"):
        open_images([tmp_path / "data" / "a", tmp_path / "alias"])
    assert len(open_images([tmp_path / "data" / "a", tmp_path / "data" / "ab"])) == 2


def test_links_between_several_folders_list_no_image_twice(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "b/2.jpg", "elsewhere/3.jpg")
    (tmp_path / "a" / "to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a")
    for folder in ("a", "b"):
        (tmp_path / folder / "outside").symlink_to(tmp_path / "elsewhere")
    assert paths(open_images([tmp_path / "a", tmp_path / "b"])) == ["a/1.jpg", "a/outside/3.jpg", "b/2.jpg"]


def test_list_with_a_path_per_line(tmp_path: Path) -> None:
    fill(tmp_path, "in/b.jpg", "in/#a.jpg", "in/sub/é.jpg", "out/c.jpg", "in/no suffix")
    lines = ["# a comment", "", "  b.jpg ", "./#a.jpg", "sub/é.jpg", "../out/c.jpg", "no suffix", "sub/../b.jpg"]
    lines += [f"{tmp_path / 'in' / 'b.jpg'}", f"{tmp_path / 'out'}/./c.jpg"]
    file = tmp_path / "in" / "list.TXT"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    source = open_images([file])
    assert source.root == tmp_path / "in"
    assert paths(source) == ["#a.jpg", "../out/c.jpg", "b.jpg", "no suffix", "sub/é.jpg"]
    assert source.sizes.tolist() == [9, 9, 8, 12, 13]


def test_list_with_a_path_column(tmp_path: Path) -> None:
    fill(tmp_path, "a,b.jpg", "c.jpg")
    (tmp_path / "list.csv").write_text('label,path\nx,"a,b.jpg"\n,c.jpg\ny,c.jpg\n', encoding="utf-8-sig")
    source = open_images([tmp_path / "list.csv"])
    assert paths(source) == ["a,b.jpg", "c.jpg"]
    assert source.labels is None


def test_folders_and_lists_together_count_an_image_once(tmp_path: Path) -> None:
    fill(tmp_path, "data/a/1.jpg", "data/a/2.jpg", "data/b/3.jpg", "lists/4.jpg", "far/5.jpg")
    (tmp_path / "lists" / "one.txt").write_text(f"4.jpg\n../data/a/1.jpg\n{tmp_path / 'far' / '5.jpg'}\n")
    (tmp_path / "lists" / "two.csv").write_text(f"path\n4.jpg\n{tmp_path}/data/b/3.jpg\n")
    source = open_images([tmp_path / "lists" / "two.csv", tmp_path / "data" / "a", tmp_path / "lists" / "one.txt"])
    assert source.root == tmp_path
    assert paths(source) == ["data/a/1.jpg", "data/a/2.jpg", "data/b/3.jpg", "far/5.jpg", "lists/4.jpg"]
    (tmp_path / "data" / "list.txt").write_text("a/1.jpg\nb/3.jpg\n")
    inside = open_images([tmp_path / "data", tmp_path / "data" / "list.txt"])
    assert paths(inside) == ["a/1.jpg", "a/2.jpg", "b/3.jpg"]


def test_a_list_is_found_from_any_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_image(0, 0).save(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text("a.png\n")
    monkeypatch.chdir(tmp_path)
    source = open_images(["list.txt"])
    assert paths(source) == ["a.png"]
    assert source.read(0).size == (48, 48)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("list.txt", b"a.jpg\n\n# x\ngone.jpg\n", r"list\.txt line 4: no such file .*gone\.jpg; paths are relative"),
        ("list.txt", b"a.jpg\nsub\n", r"line 2: .*sub is not a file"),
        ("list.txt", b"# nothing\n\n", r"list\.txt: lists no image"),
        ("list.txt", "a.jpg\n".encode("utf-16"), r"list\.txt: is not UTF-8 text"),
        ("list.csv", b"path\na.jpg\ngone.jpg\n", r"list\.csv line 3: no such file"),
        ("list.csv", b"file,label\na.jpg,x\n", r"must be a header with the column path and is 'file,label'"),
        ("list.csv", b"label;path\nx;a.jpg\n", "separated by semicolons"),
        ("list.csv", b"path,label\n,x\n", "line 2: ',x' needs a path"),
        ("list.csv", b"", "header with the column path and is ''"),
        ("list.json", b"[]", r"list\.json: is neither a folder nor a list \(\.txt, or \.csv"),
        ("a.jpg", b"a.jpg", r"a\.jpg: is neither a folder nor a list"),
    ],
)
def test_errors_in_lists_say_where_and_why(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    fill(tmp_path, "a.jpg", "sub/b.jpg")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_images([tmp_path / name])
    assert "\n" not in str(caught.value)


def test_errors_name_the_one_of_several_that_is_wrong(tmp_path: Path) -> None:
    fill(tmp_path, "a/1.jpg", "a/notes.md", "b/2.dcm", "c/3.raw", "c/4.raw")
    with pytest.raises(DataError, match=r"c: no \.jpg.*\(but 2 other files: \.raw; convert"):
        open_images([tmp_path / name for name in ("a", "c", "b")])
    with pytest.raises(DataError, match="nowhere: no such folder; check"):
        open_images([tmp_path / "a", tmp_path / "nowhere"])
    with pytest.raises(DataError, match=r"gone\.txt: no such folder or list; check"):
        open_images([tmp_path / "a", tmp_path / "gone.txt"])
    with pytest.raises(DataError, match="name a folder or a list"):
        open_images([])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_a_list_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "list.txt").write_text("pipe.jpg\n")
    with pytest.raises(DataError, match=r"line 1: .*pipe\.jpg is not a file"):
        open_images([tmp_path / "list.txt"])


def test_the_split_does_not_depend_on_where_the_data_lies(tmp_path: Path) -> None:
    names = [f"{folder}/{index}.jpg" for folder in ("a", "b") for index in range(20)]
    answers = []
    for place in ("here", "there"):
        fill(tmp_path / place, *names)
        source = open_images([tmp_path / place / "a", tmp_path / place / "b"])
        answers.append(paths(source.subset(split(source, "file").report)))
    assert answers[0] == answers[1]


def test_scale_is_passed_on_to_the_decoder(tmp_path: Path) -> None:
    levels = np.arange(4096, dtype=np.uint16).reshape(64, 64)  # 12 bits stored in 16
    Image.fromarray(levels).save(tmp_path / "a.png")
    assert np.asarray(open_images([tmp_path]).read(0)).max() == 16
    assert np.asarray(open_folder(tmp_path).read(0)).max() == 16
    stretched = open_images([tmp_path], scale="percentile").subset(np.array([0])).with_labels([0], ("x",))
    assert np.asarray(stretched.read(0)).max() == 255
    assert open_folder(tmp_path, "percentile").scale == "percentile"


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


def test_too_many_bad_images_are_counted_anew_once_they_may_be_mended(tmp_path: Path) -> None:
    file = tmp_path / "bad_images.jsonl"
    bad = BadImages(file, 100, "1%")
    names = [f"{index}.jpg" for index in range(6)]
    with pytest.raises(DataError, match="6 of 100"):
        bad.add_all((name, "truncated") for name in names)
    BadImages(file, 100, "1%").add_all((name, "truncated") for name in names[:5])  # one was mended
    with pytest.raises(DataError, match="6 of 100"):  # none was
        BadImages(file, 100, "1%").add_all((name, "truncated") for name in names)
    assert len(file.read_text().splitlines()) == 6  # none is listed twice


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
