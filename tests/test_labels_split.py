"""Galleries, queries and held-out parts: disjoint, stratified, and independent of listing order."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptkit.errors import DataError
from adaptkit.sources import (
    FolderSource,
    Split,
    halve,
    has_class_folders,
    open_folder,
    open_labelled,
    same_content,
    split,
)
from adaptkit.sources.folder import from_files


def listed(names: list[str]) -> FolderSource:
    """A source of files that need not exist: splitting looks at paths only."""
    return from_files(Path("/nowhere"), ((os.fsencode(name), 1) for name in names))


def paths(source: FolderSource, indices: np.ndarray | None = None) -> list[str]:
    return [source.path(int(index)) for index in (range(len(source)) if indices is None else indices)]


def parts(answer: Split) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return answer.train, answer.selection, answer.report


def write(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


@pytest.mark.parametrize(
    ("num_images", "held_out"),
    [(8, 2), (100, 15), (499, 75), (500, 50), (1000, 100), (20_000, 2000), (30_000, 2000)],
)
def test_sizes_of_the_split(num_images: int, held_out: int) -> None:
    answer = split(listed([f"{i:06d}.jpg" for i in range(num_images)]), "file")
    assert [len(part) for part in parts(answer)] == [num_images - 2 * held_out, held_out, held_out]
    joined = np.concatenate(parts(answer))
    np.testing.assert_array_equal(np.sort(joined), np.arange(num_images))
    for part in parts(answer):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()


@pytest.mark.parametrize("split_by", ["file", "folder"])
def test_split_does_not_depend_on_the_order_of_the_listing(split_by: str) -> None:
    names = [f"clip_{i % 17}/{i}.jpg" for i in range(400)]
    source = listed(names)
    shuffled = source.subset(np.random.default_rng(0).permutation(len(source)))
    for one, other in zip(parts(split(source, split_by)), parts(split(shuffled, split_by)), strict=True):
        assert sorted(paths(source, one)) == sorted(paths(shuffled, other))


def test_a_new_image_moves_few_others() -> None:
    names = [f"{i}.jpg" for i in range(1000)]
    before = split(listed(names), "file")
    after = split(listed([*names, "new.jpg"]), "file")
    assert len(set(before.selection.tolist()) ^ set(after.selection.tolist())) <= 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=3, max_size=12).filter(lambda sizes: sum(sizes) >= 8))
def test_folders_stay_together_and_never_use_up_the_data(sizes: list[int]) -> None:
    source = listed([f"clip_{k}/{i}.jpg" for k, size in enumerate(sizes) for i in range(size)])
    answer = split(source, "folder")
    folders = [{path.split("/")[0] for path in paths(source, part)} for part in parts(answer)]
    assert all(folders)
    assert not folders[0] & folders[1]
    assert not folders[0] & folders[2]
    assert not folders[1] & folders[2]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts(answer))), np.arange(len(source)))


def test_folder_split_reaches_its_share_and_spares_the_giant() -> None:
    names = [f"small_{k}/{i}.jpg" for k in range(40) for i in range(20)] + [f"giant/{i}.jpg" for i in range(3000)]
    answer = split(listed(names), "folder")
    assert 380 <= len(answer.selection) <= 570
    assert len(answer.train) >= 3000
    assert answer.train[0] < 3000  # the giant's images, which are listed last here, are not all of it


def test_held_out_folders_are_capped_at_2000_images_without_leaking_the_rest_into_train() -> None:
    source = listed([f"clip_{k}/{i}.jpg" for k in range(4) for i in range(3000)])
    answer = split(source, "folder")
    assert [len(part) for part in parts(answer)] == [6000, 2000, 2000]
    folders = [{path.split("/")[0] for path in paths(source, part)} for part in parts(answer)]
    assert [len(names) for names in folders] == [2, 1, 1]
    assert len(set.union(*folders)) == 4


def test_split_refuses_too_little() -> None:
    with pytest.raises(DataError, match="7 images are too few"):
        split(listed([f"{i}.jpg" for i in range(7)]), "file")
    with pytest.raises(DataError, match=r"at least 3 folders and found 2; use --set data\.split_by=file"):
        split(listed([f"{i % 2}/{i}.jpg" for i in range(100)]), "folder")


def test_halve_is_stratified_disjoint_and_independent_of_the_order() -> None:
    names = [f"{label}/{i}.jpg" for label, size in enumerate((70, 1, 1, 120, 32)) for i in range(size)]
    labels = [int(name[0]) for name in names]
    source = listed(names).with_labels(labels, ("a", "b", "c", "d", "e"))
    selection, report = halve(source, "probe")
    np.testing.assert_array_equal(np.sort(np.concatenate([selection, report])), np.arange(len(source)))
    assert len(selection) == len(report) == 112
    counts = [Counter(labels[i] for i in part) for part in (selection, report)]
    assert all(abs(counts[0][label] - counts[1][label]) <= 1 for label in range(5))
    shuffled = source.subset(np.random.default_rng(1).permutation(len(source)))
    again, _ = halve(shuffled, "probe")
    assert sorted(paths(source, selection)) == sorted(paths(shuffled, again))
    assert halve(source, "other salt")[0].tolist() != selection.tolist()


def test_halve_without_labels() -> None:
    selection, report = halve(listed([f"{i}.jpg" for i in range(11)]), "x")
    assert (len(selection), len(report)) == (6, 5)
    assert not set(selection.tolist()) & set(report.tolist())


def test_train_and_test_folders_are_gallery_and_queries(labelled: Path) -> None:
    answer = open_labelled(labelled)
    assert answer.explicit_split
    assert answer.class_names == ("class_0", "class_1", "class_2", "class_3")
    assert answer.gallery.root == labelled / "train"
    assert answer.queries.root == labelled / "test"
    assert (len(answer.gallery), len(answer.queries)) == (60, 60)
    for source in (answer.gallery, answer.queries):
        assert source.class_names == answer.class_names
        assert [source.label(i) for i in range(60)] == [int(path[6]) for path in paths(source)]


def test_halving_class_folders_by_hash_and_seed(tmp_path: Path) -> None:
    write(tmp_path, *(f"cat/{i}.jpg" for i in range(9)), *(f"dog/deep/{i}.png" for i in range(4)), "fox/only.jpg")
    answer = open_labelled(tmp_path)
    assert not answer.explicit_split
    assert Counter(path.split("/")[0] for path in paths(answer.gallery)) == {"cat": 5, "dog": 2, "fox": 1}
    assert Counter(path.split("/")[0] for path in paths(answer.queries)) == {"cat": 4, "dog": 2}
    assert not set(paths(answer.gallery)) & set(paths(answer.queries))
    assert paths(open_labelled(tmp_path).gallery) == paths(answer.gallery)
    assert any(paths(open_labelled(tmp_path, seed=seed).gallery) != paths(answer.gallery) for seed in (1, 2))
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert paths(open_labelled(moved).gallery) == paths(answer.gallery)


def test_queries_given_match_classes_by_name(tmp_path: Path) -> None:
    write(tmp_path, "g/ant/1.jpg", "g/bee/1.jpg", "g/cow/1.jpg", "q/cow/1.jpg", "q/ant/2.jpg")
    answer = open_labelled(tmp_path / "g", tmp_path / "q")
    assert answer.explicit_split
    assert len(answer.gallery) == 3
    assert [answer.queries.label(i) for i in range(2)] == [0, 2]  # of the gallery's classes, not of its own two
    assert answer.left_out is None


def test_queries_of_a_class_without_gallery_are_left_out_unless_most_are(tmp_path: Path) -> None:
    write(tmp_path, "g/ant/1.jpg", "g/bee/1.jpg", "g/cow/1.jpg", "q/cow/1.jpg", "q/ant/2.jpg", "q/yak/1.jpg")
    answer = open_labelled(tmp_path / "g", tmp_path / "q")
    assert paths(answer.queries) == ["ant/2.jpg", "cow/1.jpg"]
    assert [answer.queries.label(i) for i in range(2)] == [0, 2]
    assert answer.left_out is not None
    assert paths(answer.left_out) == ["yak/1.jpg"]
    write(tmp_path, "q/yak/2.jpg", "q/zebra/1.jpg")
    with pytest.raises(DataError, match=r"yak/1\.jpg: class 'yak' has no image in the gallery .* 3 of 5 queries"):
        open_labelled(tmp_path / "g", tmp_path / "q")


def test_queries_beside_a_split_folder_are_ambiguous(labelled: Path) -> None:
    with pytest.raises(DataError, match="train/ and test/ inside"):
        open_labelled(labelled, labelled / "test")


def test_folders_that_are_no_class_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_labelled(tmp_path / "nowhere")
    write(tmp_path, "one/a/1.jpg", "one/a/2.jpg", "loose/a/1.jpg", "loose/b/1.jpg", "loose/x.jpg")
    write(tmp_path, "split/train/a/1.jpg", "split/val/a/1.jpg", "single/a/1.jpg", "single/b/1.jpg")
    with pytest.raises(DataError, match=r"only the class 'a'; at least two"):
        open_labelled(tmp_path / "one")
    with pytest.raises(DataError, match=r"loose/x\.jpg: lies in no class folder"):
        open_labelled(tmp_path / "loose")
    with pytest.raises(DataError, match=r"train/, val/ are no classes"):
        open_labelled(tmp_path / "split")
    with pytest.raises(DataError, match="one image per class"):
        open_labelled(tmp_path / "single")


def test_has_class_folders(tmp_path: Path, labelled: Path, images: Path) -> None:
    write(tmp_path, "one/a/1.jpg", "loose/a/1.jpg", "loose/b/1.jpg", "loose/x.jpg", "split/train/a/1.jpg", "t.csv")
    write(tmp_path, "split/val/a/1.jpg", "flat/1.jpg")
    assert has_class_folders(images)
    assert has_class_folders(labelled)
    for name in ("one", "loose", "split", "flat", "nowhere", "t.csv"):
        assert not has_class_folders(tmp_path / name), name


def test_list_of_labelled_files(tmp_path: Path) -> None:
    write(tmp_path, "in/b.jpg", "in/a.jpg", "out/c.jpg", "in/d,e.jpg")
    lines = ["path,label", "b.jpg,yes", "./a.jpg,no", f"{tmp_path / 'out' / 'c.jpg'},yes", '"d,e.jpg",no', ""]
    (tmp_path / "in" / "list.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    answer = open_labelled(tmp_path / "in" / "list.csv")
    found = {
        path: source.class_names[source.label(i)]
        for source in (answer.gallery, answer.queries)
        for i, path in enumerate(paths(source))
    }
    assert found == {"a.jpg": "no", "b.jpg": "yes", (tmp_path / "out" / "c.jpg").as_posix(): "yes", "d,e.jpg": "no"}
    assert (len(answer.gallery), len(answer.queries)) == (2, 2)
    assert all(answer.gallery.file(i).is_file() for i in range(2))


def test_other_columns_and_quoted_commas_are_no_hindrance(tmp_path: Path) -> None:
    write(tmp_path, "a, b.jpg", "c.jpg")
    lines = ["id,label,note,path", '1,yes,"one, two","a, b.jpg"', '2,no,,"c.jpg"']
    (tmp_path / "list.csv").write_text("\r\n".join(lines), newline="")
    answer = open_labelled(tmp_path / "list.csv", tmp_path / "list.csv")
    assert paths(answer.gallery) == ["a, b.jpg", "c.jpg"]
    assert answer.class_names == ("no", "yes")
    assert [answer.gallery.label(index) for index in range(2)] == [1, 0]


def test_a_list_in_utf16_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\na.jpg,x\n", encoding="utf-16")
    with pytest.raises(DataError, match=r"list\.csv: is not UTF-8 text"):
        open_labelled(tmp_path / "list.csv")


@pytest.mark.parametrize("kind", ["folders", "split", "list"])
def test_scale_reaches_gallery_and_queries(tmp_path: Path, kind: str) -> None:
    write(tmp_path, *(f"{side}/{name}/1.jpg" for side in ("train", "test") for name in "ab"))
    (tmp_path / "list.csv").write_text("path,label\ntrain/a/1.jpg,a\ntest/a/1.jpg,a\ntest/b/1.jpg,b\n")
    data, queries = {
        "folders": (tmp_path / "train", tmp_path / "test"),
        "split": (tmp_path, None),
        "list": (tmp_path / "list.csv", None),
    }[kind]
    answer = open_labelled(data, queries, scale="percentile")
    assert (answer.gallery.scale, answer.queries.scale) == ("percentile", "percentile")
    assert open_labelled(data, queries).queries.scale == "range"


def test_order_of_the_list_does_not_matter(tmp_path: Path) -> None:
    write(tmp_path, *(f"{i}.jpg" for i in range(20)))
    lines = [f"{i}.jpg,{'even' if i % 2 == 0 else 'odd'}" for i in range(20)]
    answers = []
    for order in (lines, lines[::-1]):
        (tmp_path / "list.csv").write_text("\n".join(["path,label", *order]))
        answers.append(paths(open_labelled(tmp_path / "list.csv").queries))
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg,x\nb.jpg,y\n", r"list\.csv: the first line must be the header path,label and is 'a\.jpg,x'"),
        ("path;label\na.jpg;x\n", r"list\.csv: the columns are separated by semicolons; save it with commas"),
        ('"path"\t"label"\na.jpg\tx\n', "separated by tabs"),
        ("name;class\na.jpg;x\n", "header path,label and is 'name;class'"),
        ("path\na.jpg\n", "header path,label and is 'path'"),
        ("", "header path,label"),
        ("path,label\n", "lists no image"),
        ("path,label\na.jpg,x\ngone.jpg,y\nlost.jpg,y\n", r"line 3: no such file .*gone\.jpg"),
        ("path,label\na.jpg,x\nb.jpg\n", "line 3: .* needs a path and a label"),
        ("path,label\na.jpg,\n", "line 2: .* needs a path and a label"),
        ("path,label\na.jpg,x\n./a.jpg,y\n", r"line 3: a\.jpg is listed twice"),
        ("path,label\na.jpg,x\nb.jpg,x\n", "only the class 'x'"),
    ],
)
def test_errors_in_a_list_name_the_first_offender(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        open_labelled(tmp_path / "list.csv")


def test_same_content_finds_copies_under_other_names_only(tmp_path: Path) -> None:
    write(tmp_path, "data/a.jpg", "data/b.jpg", "data/c.jpg", "data/d/e.jpg", "labels/x/1.jpg", "labels/y/22.jpg")
    (tmp_path / "labels/x/copy.jpg").write_bytes((tmp_path / "data/b.jpg").read_bytes())
    (tmp_path / "labels/y/copy.jpg").write_bytes((tmp_path / "data/d/e.jpg").read_bytes())
    (tmp_path / "labels/y/same_size.jpg").write_bytes(b"data/A.jpg")
    (tmp_path / "data" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "labels" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    source, other = open_folder(tmp_path / "data"), open_folder(tmp_path / "labels")
    assert paths(source, same_content(source, [other])) == ["b.jpg", "d/e.jpg"]
    assert paths(source, same_content(source, [other.subset(np.array([1])), other.subset(np.array([2]))])) == ["b.jpg"]
    assert same_content(source, []).tolist() == []
    backwards = source.subset(np.arange(len(source))[::-1])
    assert paths(backwards, same_content(backwards, [other])) == ["d/e.jpg", "b.jpg"]


def test_same_content_reads_only_files_whose_size_occurs_on_both_sides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "data/a.jpg", "data/longer.jpg", "labels/x/b.jpg", "labels/longest.jpg")
    (tmp_path / "labels/x/b.jpg").write_bytes(b"data/a.jpg")
    opened: list[str] = []
    original = Path.open

    def spy(self: Path, *args: object, **options: object) -> object:
        opened.append(self.name)
        return original(self, *args, **options)

    monkeypatch.setattr(Path, "open", spy)
    source = open_folder(tmp_path / "data")
    assert same_content(source, [open_folder(tmp_path / "labels")]).tolist() == [0]
    assert sorted(opened) == ["a.jpg", "b.jpg"]
