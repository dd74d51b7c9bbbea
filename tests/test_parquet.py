"""Images in Parquet files: what the same images are in files, however they are written; one line for what is broken."""

from __future__ import annotations

import io
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hostile import refused
from PIL import Image
from tables import FEATURE, count_reads, feature, jpeg, set_window, write
from test_processes import launch
from tiny_runs import Recorder, SignalAt, adapt, assert_same_run, flags, log, read

from adaptkit import schedules
from adaptkit.errors import AdaptkitError, DataError, Interrupted, UsageError
from adaptkit.inputs import open_inputs
from adaptkit.recipe import Recipe
from adaptkit.run import Run
from adaptkit.session import Silent
from adaptkit.sources import (
    BadImage,
    FolderSource,
    fingerprint,
    load_index,
    open_images,
    open_labelled,
    parquet_table,
    save_index,
    split,
)
from adaptkit.sources.parquet_table import ParquetTable
from adaptkit.train import run_adaptation

IMAGES = [jpeg(index) for index in range(25)]


def contents(source: FolderSource) -> list[bytes | str]:
    """Every image's bytes, or why there are none."""
    found: list[bytes | str] = []
    for index in range(len(source)):
        try:
            found.append(source.content(index) or b"")
        except BadImage as bad:
            found.append(bad.reason)
    return found


def paths(source: FolderSource) -> list[str]:
    return [source.path(index) for index in range(len(source))]


# --- the column


def binary(images: list[bytes]) -> pyarrow.Array:
    return pyarrow.array(images, pyarrow.binary())


TABLES: dict[str, Callable[[], dict[str, Any]]] = {
    "Hugging Face's feature": lambda: {"image": feature(IMAGES), "label": pyarrow.array(range(25))},
    "the feature under another name": lambda: {"photo": feature(IMAGES)},
    "the feature, fields the other way round": lambda: {
        "image": feature(IMAGES).cast(pyarrow.struct([("path", pyarrow.string()), ("bytes", pyarrow.binary())]))
    },
    "the feature with large bytes": lambda: {
        "x": feature(IMAGES).cast(pyarrow.struct([("bytes", pyarrow.large_binary())]))
    },
    "binary image": lambda: {"id": pyarrow.array(range(25)), "image": binary(IMAGES)},
    "binary IMG beside binary": lambda: {"thumbnail": binary([b"x"] * 25), "IMG": binary(IMAGES)},
    "bytes": lambda: {"thumbnail": binary([b"x"] * 25), "bytes": binary(IMAGES), "content": binary([b"y"] * 25)},
    "the only binary column": lambda: {"url": pyarrow.array(["x"] * 25), "my.photo": binary(IMAGES)},
    "large binary": lambda: {"jpg": pyarrow.array(IMAGES, pyarrow.large_binary())},
    "two features, one with a usual name": lambda: {"audio": feature([b"x"] * 25), "image": feature(IMAGES)},
    "beside columns of one name": lambda: {"image": feature(IMAGES), "n": pyarrow.array(range(25))},
    "beside a list and a struct": lambda: {
        "objects": pyarrow.array([[{"bytes": b"x"}]] * 25),
        "about": pyarrow.array([{"bytes": "text"}] * 25),
        "image": binary(IMAGES),
    },
}


@pytest.mark.parametrize("name", TABLES)
def test_the_images_are_found_in(name: str, tmp_path: Path) -> None:
    file = tmp_path / "photos.parquet"
    pyarrow.parquet.write_table(pyarrow.table(TABLES[name]()), file, row_group_size=10)
    source = open_images([file])
    assert contents(source) == IMAGES
    assert paths(source) == [f"photos.parquet/{row:08d}" for row in range(25)]
    assert source.sizes.tolist() == [len(image) for image in IMAGES]
    np.testing.assert_array_equal(source.read(7), Image.open(io.BytesIO(IMAGES[7])))


UNCLEAR: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "text": (lambda: {"image": pyarrow.array(["a.jpg"])}, r"there are: image \(string\)"),
    "two binary columns": (lambda: {"a": binary([b"x"]), "b": binary([b"x"])}, r"a \(binary\), b \(binary\)"),
    "two features": (lambda: {"a": feature([b"x"]), "b": feature([b"x"])}, r"a \(struct<bytes: binary, path"),
    "a list of images": (lambda: {"image": pyarrow.array([[b"x"]])}, r"image \(list<"),
    "values of fixed size": (lambda: {"image": pyarrow.array([b"x"], pyarrow.binary(1))}, "fixed_size_binary"),
    "numbers": (lambda: {"image": pyarrow.array([[1, 2]])}, r"image \(list<"),
    "no columns": (dict, "there are: none"),
    "hundreds of columns": (lambda: {f"column {i}": pyarrow.array([1]) for i in range(500)}, "column 1 "),
    "names of control characters": (lambda: {"a\x1b[31m\nb": pyarrow.array([1])}, r"a\\x1b\[31m\\nb"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_table_without_a_clear_column_names_the_columns(name: str, tmp_path: Path) -> None:
    columns, words = UNCLEAR[name]
    pyarrow.parquet.write_table(pyarrow.table(columns()), tmp_path / "t.parquet")
    assert "t.parquet" in refused(DataError, 3, words, lambda: open_images([tmp_path / "t.parquet"]))


def test_columns_of_one_name_are_not_guessed_at(tmp_path: Path) -> None:
    twice = pyarrow.Table.from_arrays([binary(IMAGES), binary(IMAGES)], ["image", "image"])
    pyarrow.parquet.write_table(twice, tmp_path / "t.parquet")
    refused(DataError, 3, r"image \(binary\), image \(binary\)", lambda: open_images([tmp_path / "t.parquet"]))


# --- files, rows, names


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
def test_how_the_file_is_written_changes_nothing(compression: str, tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", IMAGES, 7, compression=compression, use_dictionary=compression != "zstd")
    other = write(tmp_path / "other" / "t.parquet", IMAGES, 1, data_page_size=100, data_page_version="2.0")
    assert contents(open_images([file])) == contents(open_images([other])) == IMAGES
    assert fingerprint(open_images([file])) == fingerprint(open_images([other]))


def test_several_files_are_one_source(tmp_path: Path) -> None:
    """The slow twin: all tables read whole, in the order of their names."""
    names = ["b/train-1.parquet", "a.parquet", "b/train-0.parquet", "a.parquet.parquet"]
    files = [write(tmp_path / name, IMAGES[5 * k : 5 * k + 5 + k], 3) for k, name in enumerate(names)]
    write(tmp_path / "b" / "empty.parquet", [])
    source = open_images([*files, tmp_path / "b" / "empty.parquet"])
    expected = [
        (f"{name}/{row:08d}", image["bytes"])
        for name in sorted(names, key=lambda name: f"{name}/")
        for row, image in enumerate(pyarrow.parquet.read_table(tmp_path / name)["image"].to_pylist())
    ]
    assert list(zip(paths(source), contents(source), strict=True)) == expected
    assert source.root == tmp_path
    assert fingerprint(open_images(files[::-1])) == fingerprint(source)
    assert np.bincount(source.store.blocks).tolist() == [3, 3, 2, 3, 3, 3, 3, 1, 3, 2]
    assert len(set(split(source, "folder").train.tolist())) > 0  # a file is a folder


def test_a_folder_of_parquet_files_stands_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write(tmp_path / "data" / f"train-{k:05d}-of-00003.parquet", IMAGES[8 * k : 8 * k + 8]) for k in range(3)]
    (tmp_path / "data" / "README.md").write_text("about")
    (tmp_path / "data" / ".cache").mkdir()
    whole = open_images([tmp_path / "data"])
    assert paths(open_images([tmp_path / "data" / "train-{00000..00002}-of-00003.parquet"])) == paths(whole)
    assert paths(whole) == paths(open_images(files))
    assert paths(whole)[8] == "train-00001-of-00003.parquet/00000000"
    monkeypatch.chdir(tmp_path)
    assert contents(open_images(["data"])) == IMAGES[:24]
    (tmp_path / "data" / "one.jpg").write_bytes(IMAGES[0])
    assert paths(open_images([tmp_path / "data"])) == ["one.jpg"]  # a folder of images, as ever
    refused(DataError, 3, "Parquet files and other images", lambda: open_images([files[0], tmp_path / "data"]))


def test_a_folder_of_folders_of_tables_says_what_to_name(tmp_path: Path) -> None:
    write(tmp_path / "repository" / "data" / "train.parquet", IMAGES)
    words = r"\(but 1 Parquet files; name them, or a folder that holds nothing else\)"
    refused(DataError, 3, words, lambda: open_images([tmp_path / "repository"]))


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    write(tmp_path / "t.parquet", IMAGES).rename(folder / os.fsdecode(b"\xff.parquet"))
    source = open_images([folder / os.fsdecode(b"\xff.parquet")])
    assert contents(source) == IMAGES
    assert os.fsencode(source.path(3)) == b"\xff.parquet/00000003"


def test_rows_without_an_image_are_bad_images(tmp_path: Path) -> None:
    rows = [
        {"bytes": IMAGES[0], "path": None},
        None,
        {"bytes": None, "path": "elsewhere.jpg"},
        {"bytes": b"", "path": ""},
        {"bytes": b"no image", "path": ""},
        {"bytes": IMAGES[1][:300], "path": ""},
    ]
    table = pyarrow.table({"image": pyarrow.array(rows, FEATURE)})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=4)
    source = open_images([tmp_path / "t.parquet"])
    assert source.sizes.tolist() == [len(IMAGES[0]), 0, 0, 0, 8, 300]
    reasons = [why(source, index) for index in range(6)]
    assert reasons[:5] == [
        "",
        *["the row has no image"] * 2,
        "the row's image has no bytes",
        "not a readable image file",
    ]
    assert "Truncated" in reasons[5]


def why(source: FolderSource, index: int) -> str:
    """The reason why an image is a bad one, or nothing."""
    try:
        source.read(index)
    except BadImage as bad:
        return bad.reason if bad.path == source.path(index) else "another path"
    return ""


def test_bytes_under_a_null_are_no_image(tmp_path: Path) -> None:
    fields = [binary(IMAGES[:2]), pyarrow.array(["a", "b"])]
    hidden = pyarrow.StructArray.from_arrays(fields, ["bytes", "path"], mask=pyarrow.array([True, False]))
    pyarrow.parquet.write_table(pyarrow.table({"image": hidden}), tmp_path / "t.parquet")
    assert contents(open_images([tmp_path / "t.parquet"])) == ["the row has no image", IMAGES[1]]


def test_the_fingerprint_notices_a_changed_image(tmp_path: Path) -> None:
    before = fingerprint(open_images([write(tmp_path / "t.parquet", IMAGES)]))
    assert fingerprint(open_images([write(tmp_path / "t.parquet", IMAGES)])) == before
    for changed in (IMAGES[:-1], [*IMAGES, IMAGES[0]], [IMAGES[0] + b"\0", *IMAGES[1:]], [None, *IMAGES[1:]]):
        assert fingerprint(open_images([write(tmp_path / "t.parquet", changed)])) != before


# --- the store


def test_row_groups_are_kept_up_to_a_number_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_images([write(tmp_path / "t.parquet", IMAGES, 5)])
    store: Any = source.store
    set_window(monkeypatch, int(store.num_bytes[:3].sum()))
    reads = count_reads(monkeypatch)
    for row in (0, 5, 10, 9, 14, 4):
        assert store.read(row) == IMAGES[row]
    assert reads == [0, 1, 2]
    store.read(15)  # in place of 1, which was used longest ago
    assert list(store.kept.groups) == [2, 0, 3]
    set_window(monkeypatch, 1)
    assert store.read(20) == IMAGES[20]
    assert list(store.kept.groups) == [4]  # at least one


def read_there(source: FolderSource) -> tuple[int, list[bytes | str], int]:
    """What another process has of a source when it gets it, and what it reads."""
    store: Any = source.store
    store.kept.forget_other_process_()
    return len(store.kept.groups), contents(source), os.getpid()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_another_process_opens_the_files_itself(method: str, tmp_path: Path) -> None:
    source = open_images([write(tmp_path / "t.parquet", IMAGES)])
    assert contents(source) == IMAGES
    with get_context(method).Pool(1) as pool:
        held, found, process = pool.apply(read_there, [source])
    assert (held, found) == (0, IMAGES)
    assert process != os.getpid()
    assert len(pickle.dumps(source)) < 3_000 + 100 * len(source)


def forked(source: FolderSource) -> list[bytes | str]:
    """What a child reads that was forked while this process held row groups."""
    inbound, outbound = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)  # it may wait for ever
        os.write(outbound, pickle.dumps(read_there(source)[:2]))
        os._exit(0)
    os.close(outbound)
    with os.fdopen(inbound, "rb") as stream:
        held, found = pickle.load(stream)
    os.waitpid(child, 0)
    assert held == 0
    return list(found)


def test_a_forked_process_does_not_use_what_its_parent_holds(tmp_path: Path) -> None:
    source = open_images([write(tmp_path / "t.parquet", IMAGES[:12])])
    store: Any = source.store
    store.read(0)
    with store.kept.lock:  # as another thread may at that moment
        assert forked(source) == IMAGES[:12]


def test_threads_may_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_images([write(tmp_path / "t.parquet", IMAGES, 2)])
    set_window(monkeypatch, 5 * len(IMAGES[0]))
    pieces, reading = ParquetTable.pieces, Lock()

    def alone(self: ParquetTable, group: int) -> list[Any]:
        assert reading.acquire(blocking=False)  # pyarrow's readers are not made for two at once
        time.sleep(0.0005)
        found = list(pieces(self, group))
        reading.release()
        return found

    monkeypatch.setattr(ParquetTable, "pieces", alone)
    order = np.random.default_rng(0).integers(0, 25, 400).tolist()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.content, order)) == [IMAGES[index] for index in order]


@pytest.mark.parametrize("change", ["removed", "cut", "other images", "touched"])
def test_a_file_that_changes_under_a_run_gives_bad_images(change: str, tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", IMAGES)
    source = open_images([file])
    if change == "removed":
        file.unlink()
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:500])
    elif change == "other images":
        write(file, IMAGES[::-1])
    os.utime(tmp_path, ns=(1, 1))
    if file.exists():
        os.utime(file, ns=(1, 1))
    words = "row group 0: No such file" if change == "removed" else "row group 0: the file has changed"
    for index in (0, 5):
        with pytest.raises(BadImage, match=words):
            source.read(index)


def test_damage_found_while_training_is_a_bad_image(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", IMAGES, 10)
    source = open_images([file])
    status, content = file.stat(), bytearray(file.read_bytes())
    content[10:400] = bytes(390)
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(BadImage, match="row group 0: "):
        source.read(3)
    assert source.content(12) == IMAGES[12]


# --- what is refused


def test_row_groups_too_large_to_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = sum(map(len, IMAGES))
    file = write(tmp_path / "t.parquet", IMAGES, 25)
    monkeypatch.setattr(parquet_table, "MAX_GROUP_BYTES", total + 2_000)
    assert len(open_images([file])) == 25
    monkeypatch.setattr(parquet_table, "MAX_GROUP_BYTES", total - 1)
    monkeypatch.setattr(parquet_table, "GOOD_GROUP_BYTES", total // 5)
    told = refused(DataError, 3, "row group 0 holds over", lambda: open_images([file]))
    assert "row_group_size=4" in told or "row_group_size=5" in told
    assert len(open_images([write(tmp_path / "t.parquet", IMAGES, 5)])) == 25


def test_one_image_a_thousand_times_is_counted_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary makes such a column small in the file; read, it is as large as any."""
    file = write(tmp_path / "t.parquet", [IMAGES[0]] * 1_000, 1_000)
    assert file.stat().st_size < 20 * len(IMAGES[0])
    monkeypatch.setattr(parquet_table, "MAX_GROUP_BYTES", 500 * len(IMAGES[0]))
    refused(DataError, 3, "row group 0 holds over", lambda: open_images([file]))


def test_files_that_are_not_there_or_no_files(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", IMAGES)
    (tmp_path / "link.parquet").symlink_to(file)
    os.mkfifo(tmp_path / "pipe.parquet")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(IMAGES[0])
    cases: dict[str, list[str]] = {
        r"none\.parquet: no such file; check the path": ["none.parquet"],
        r"t\.parquet: is given twice": ["t.parquet", "t.parquet"],
        r"link\.parquet: is given twice": ["t.parquet", "link.parquet"],
        r"pipe\.parquet: is not a file": ["pipe.parquet"],
        r"images: Parquet files and other images cannot be given together": ["t.parquet", "images"],
        r"list\.txt: Parquet files and other images": ["list.txt", "t.parquet"],
    }
    for words, names in cases.items():
        refused(DataError, 3, words, lambda names=names: open_images([tmp_path / name for name in names]))


def test_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "t.parquet", [])
    pyarrow.parquet.ParquetWriter(tmp_path / "no_groups.parquet", pyarrow.schema([("image", FEATURE)])).close()
    for name in ("t", "no_groups"):
        refused(DataError, 3, f"{name}.parquet: no rows", lambda name=name: open_images([tmp_path / f"{name}.parquet"]))
    refused(DataError, 3, "no rows", lambda: open_images([tmp_path]))


def test_files_of_different_tables(tmp_path: Path) -> None:
    one = write(tmp_path / "1.parquet", IMAGES)
    pyarrow.parquet.write_table(pyarrow.table({"photo": binary(IMAGES)}), tmp_path / "2.parquet")
    words = r"2\.parquet: its images are in the column photo, those of .*1\.parquet in image\.bytes"
    refused(DataError, 3, words, lambda: open_images([one, tmp_path / "2.parquet"]))
    more = pyarrow.table({"image": feature(IMAGES), "split": pyarrow.array(["train"] * 25)})
    pyarrow.parquet.write_table(more, tmp_path / "2.parquet")
    assert len(open_images([one, tmp_path / "2.parquet"])) == 50  # other columns are nobody's business


@pytest.mark.parametrize("encrypted_footer", [True, False])
def test_an_encrypted_file(encrypted_footer: bool, tmp_path: Path) -> None:
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Plain(encryption.KmsClient):  # type: ignore[misc,name-defined]
        def wrap_key(self, key: bytes, name: str) -> bytes:
            return key

        def unwrap_key(self, key: bytes, name: str) -> bytes:
            return key

    factory = encryption.CryptoFactory(lambda config: Plain())
    settings = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"c": ["image.bytes"]}, plaintext_footer=not encrypted_footer
    )
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    table = pyarrow.table({"image": feature(IMAGES)})
    with pyarrow.parquet.ParquetWriter(tmp_path / "t.parquet", table.schema, encryption_properties=properties) as to:
        to.write_table(table)
    words = "cannot be read as a Parquet file .*(encrypt|decrypt)"
    refused(DataError, 3, words, lambda: open_images([tmp_path / "t.parquet"]))


def try_all(file: Path) -> None:
    """Whatever a file holds, it is refused in one line, or every row is bytes or a bad image."""
    source = None
    with suppress(DataError):
        source = open_images([file])
    if source is not None:
        contents(source)


def test_truncated_files(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", IMAGES[:6], 2, compression="none")
    content = file.read_bytes()
    for cut in [*range(0, len(content) - 1, 211), *range(len(content) - 60, len(content))]:
        file.write_bytes(content[:cut])
        refused(DataError, 3, r"t\.parquet: cannot be read as a Parquet file \(.+\)", lambda: open_images([file]))


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_damaged_files(compression: str, tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", [b"a", *IMAGES[:2], None], 2, compression=compression)
    content, rng = file.read_bytes(), np.random.default_rng(3)
    footer = int.from_bytes(content[-8:-4], "little")
    for number in range(400):
        damaged = bytearray(content)
        start = len(content) - 8 - footer if number % 2 else 4
        for _ in range(int(rng.integers(1, 6))):
            damaged[int(rng.integers(start, len(content)))] = int(rng.integers(0, 256))
        file.write_bytes(damaged)
        try_all(file)


def test_files_of_something_else(tmp_path: Path) -> None:
    file, rng = tmp_path / "t.parquet", np.random.default_rng(4)
    for content in (b"", b"PAR1", b"PAR1PAR1", b"PAR1" + bytes(8) + b"PAR1", b"PARE" * 9, IMAGES[0], b"{}\n" * 50):
        file.write_bytes(content)
        refused(DataError, 3, r"t\.parquet: cannot be read as a Parquet file \(.+\)", lambda: open_images([file]))
    for size in (10, 1_000, 50_000):
        noise = rng.bytes(size)
        for content in (noise, b"PAR1" + noise + min(size, 900).to_bytes(4, "little") + b"PAR1"):
            file.write_bytes(content)
            refused(DataError, 3, "cannot be read", lambda: open_images([file]))


def test_without_pyarrow_it_is_a_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "t.parquet", IMAGES)
    save_index(tmp_path / "index", open_images([file]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert load_index(tmp_path / "index", [file]) is None
    refused(UsageError, 2, r"pip install 'adaptkit\[parquet\]'", lambda: open_images([file]))


def test_a_table_as_labels_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "t.parquet", IMAGES)
    refused(DataError, 3, r"t\.parquet", lambda: open_labelled(file))


# --- the index


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    """A folder with two tables an hour old, and the index of it."""
    for name in ("a", "b"):
        file = write(tmp_path / "data" / f"{name}.parquet", IMAGES[:12], 5)
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 3600))
    os.utime(tmp_path / "data", (0, 3600))
    save_index(tmp_path / "index", open_images([tmp_path / "data"]))
    return tmp_path / "index"


def test_an_index_gives_the_same_source_without_reading_a_table(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = indexed.parent / "data"
    scanned = open_images([data])
    reads = count_reads(monkeypatch)
    loaded = load_index(indexed, [data])
    assert loaded is not None
    assert reads == []
    assert paths(loaded) == paths(scanned)
    assert contents(loaded) == contents(scanned) == IMAGES[:12] * 2
    assert fingerprint(loaded) == fingerprint(scanned)
    one, other = loaded.blocks, scanned.blocks
    assert one is not None
    assert other is not None
    np.testing.assert_array_equal(one.of_images, other.of_images)
    np.testing.assert_array_equal(one.num_bytes, other.num_bytes)
    save_index(indexed, loaded)  # a loaded one can be saved as well
    again = load_index(indexed, [data])
    assert again is not None
    assert contents(again) == contents(scanned)


@pytest.mark.parametrize("change", ["touched", "rewritten", "removed", "added", "replaced by a folder"])
def test_a_change_makes_the_caller_scan_again(change: str, indexed: Path) -> None:
    data = indexed.parent / "data"
    assert load_index(indexed, [data]) is not None
    if change == "touched":
        os.utime(data / "b.parquet", ns=(5, 5))
    elif change == "rewritten":
        write(data / "b.parquet", IMAGES[:12], 4)
    elif change == "added":
        write(data / "c.parquet", IMAGES)
    else:
        (data / "b.parquet").unlink()
        if change != "removed":
            (data / "b.parquet").mkdir()
    assert load_index(indexed, [data]) is None


HOSTILE: dict[str, dict[str, Any]] = {
    "ends beyond the rows": {"ends": np.array([5, 10, 12, 17, 22, 25])},
    "ends that go back": {"ends": np.array([5, 10, 9, 17, 22, 24])},
    "negative ends": {"ends": np.array([-5, 10, 12, 17, 22, 24])},
    "no row groups": {"ends": np.empty(0, np.int64), "groups": np.empty((0, 2), np.int64)},
    "too few ends": {"ends": np.array([24])},
    "ends of another type": {"ends": np.arange(6, dtype=np.float64)},
    "a file too many": {"groups": np.full((6, 2), 2)},
    "a negative file": {"groups": np.full((6, 2), -1)},
    "no pairs": {"groups": np.zeros((6, 3), np.int64)},
    "a size too few": {"num_bytes": np.zeros(5, np.int64)},
    "negative sizes": {"num_bytes": np.full(6, -1)},
    "stamps of one file": {"stamps": np.zeros((1, 2), np.int64)},
    "one file": {"files": np.zeros(3, np.uint8) + 97},
    "an array missing": {"files": None},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_none(name: str, indexed: Path) -> None:
    class Forged:
        """A store that says what it is told to."""

        def __init__(self, store: Any, changes: dict[str, Any]) -> None:
            self.kind = "parquet"
            self.kept = {key: array for key, array in ({**store.arrays()} | changes).items() if array is not None}

        def arrays(self) -> Any:
            return self.kept

    data = indexed.parent / "data"
    source = open_images([data])
    save_index(indexed, replace(source, store=Forged(source.store, {})))  # type: ignore[arg-type]
    assert load_index(indexed, [data]) is not None
    save_index(indexed, replace(source, store=Forged(source.store, HOSTILE[name])))  # type: ignore[arg-type]
    assert load_index(indexed, [data]) is None


# --- whole runs


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images in two files, 8 rows to a row group."""
    root = tmp_path_factory.mktemp("table") / "data"
    for part in range(2):
        write(root / f"train-{part}.parquet", [jpeg(100 + 60 * part + row) for row in range(60)], 8)
    return root


SETTINGS: dict[str, Any] = {"steps": 8, "checkpoint_every": "4 steps", "probe__every": "100%", "select__alphas": ()}


@pytest.mark.long
def test_a_run_from_tables_and_its_resumption(
    vit: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In windows of a few row groups; workers of which each reads what it needs."""
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)
    set_window(monkeypatch, 2 * 8 * len(jpeg(0)))
    reads = count_reads(monkeypatch)
    told = Recorder()
    whole = adapt(vit, table, tmp_path / "whole", reporter=told, **SETTINGS)
    assert any("shuffled within windows of about" in note for note in told.notes)
    assert len(reads) < 165  # probes included: 137, and 195 when training does not keep row groups together
    with pytest.raises(Interrupted):
        adapt(vit, table, tmp_path / "run", reporter=SignalAt(4), workers=2, **SETTINGS)
    run_adaptation(Run.open(tmp_path / "run"), Silent())
    assert_same_run(whole.run, tmp_path / "run")
    assert read(tmp_path / "run", "report.json")["data"]["num_images"] == 120
    assert (tmp_path / "run" / "bad_images.jsonl").read_text() == ""


def test_resuming_on_another_table_is_refused(vit: Path, table: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    images = [jpeg(index) for index in range(60)]
    with pytest.raises(Interrupted):
        adapt(vit, write(file, images), tmp_path / "run", reporter=SignalAt(2))
    write(file, [*images[:-1], images[0]])
    words = r"changed since .* began \(1 changed: t\.parquet/00000059\)"
    refused(DataError, 3, words, lambda: run_adaptation(Run.open(tmp_path / "run"), Silent()))


def test_labelled_images_in_the_table_are_not_trained_on(table: Path, tmp_path: Path) -> None:
    for name, rows in (("x", range(100, 104)), ("y", range(104, 108))):
        (tmp_path / "labels" / name).mkdir(parents=True)
        for row in rows:
            (tmp_path / "labels" / name / f"{row}.jpg").write_bytes(jpeg(row))
    alone = open_inputs(Recipe(data=str(table)))
    inputs = open_inputs(Recipe(data=str(table), labels=str(tmp_path / "labels")))
    assert inputs.facts["train"] + inputs.facts["left_out"] == alone.facts["train"]
    assert 0 < inputs.facts["left_out"] <= 8
    kept = set(paths(inputs.train))
    assert not kept & {f"train-0.parquet/{row:08d}" for row in range(8)}


def test_a_row_group_that_breaks_is_counted_and_ends_the_run(vit: Path, tmp_path: Path) -> None:
    rows = [b"damaged" if index % 5 == 0 else jpeg(index) for index in range(60)]
    file = write(tmp_path / "t.parquet", rows)
    with pytest.raises(AdaptkitError, match=r"max_bad 1%.*first: t\.parquet/000000") as caught:
        adapt(vit, file, tmp_path / "run")
    assert caught.value.exit_code == 3


@pytest.mark.slow
def test_two_processes_read_a_table_as_one(vit: Path, table: Path, tmp_path: Path) -> None:
    settings = {"steps": 4, "optim.lr": 1e-3}
    options = ["--backbone", vit, "--data", table, "--output", tmp_path / "two", *flags(settings), "--quiet"]
    done = launch("adapt", *options)
    assert done.returncode == 0, done.stderr
    one = adapt(vit, table, tmp_path / "one", steps=4, optim__lr=1e-3).run
    for mine, theirs in zip(log(one), log(tmp_path / "two"), strict=True):
        assert theirs.get("loss", 0) == pytest.approx(mine.get("loss", 0), rel=1e-4, abs=1e-6)
