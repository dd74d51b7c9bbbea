"""Images inside tar files: found by their headers alone, read exactly, and never half of a damaged shard in silence."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from conftest import write_folder
from hostile import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from tar_files import END, header, padded, record, write_shards, write_tar
from tiny_runs import SignalAt, adapt, assert_same_run, read

from adaptkit import schedules
from adaptkit.errors import DataError, Interrupted, UsageError
from adaptkit.evaluate import probe
from adaptkit.loading import StepSampler
from adaptkit.places import absolute, expand, shards_of, short_name
from adaptkit.preflight import scan as preflight
from adaptkit.run import Run
from adaptkit.session import Silent
from adaptkit.sources import (
    BadImage,
    DecodeCache,
    FolderSource,
    fingerprint,
    load_index,
    open_images,
    open_labelled,
    save_index,
    split,
)
from adaptkit.sources import shards as shards_module
from adaptkit.sources.index import FORMAT
from adaptkit.sources.tar import DamagedTar, members
from adaptkit.train import run_adaptation

JPEG = b"\xff\xd8not really"


def paths(source: FolderSource) -> list[str]:
    return [source.path(index) for index in range(len(source))]


def contents(source: FolderSource) -> dict[str, bytes | None]:
    return {source.path(index): source.content(index) for index in range(len(source))}


def by_tarfile(file: Path) -> list[tuple[bytes, bytes]]:
    """The slow twin: (name, content) of every regular file, by python's tarfile."""
    with tarfile.open(file) as tar:
        regular = [info for info in tar if info.isreg() and not info.issparse()]
        return [(os.fsencode(info.name), tar.extractfile(info).read()) for info in regular]  # type: ignore[union-attr]


def listed(content: bytes, shortest: int = 512, longest: int = 4096) -> list[tuple[bytes, bytes]]:
    """(name, content) by our own reader."""
    found = members(lambda start, length: content[start : start + length], len(content), shortest, longest)
    return [(name, content[start : start + size]) for name, start, size in found]


# --- names of shards


def test_braces_stand_for_ranges_and_alternatives() -> None:
    assert expand("s/{008..011}.tar") == ["s/008.tar", "s/009.tar", "s/010.tar", "s/011.tar"]
    assert expand("{9..11}") == ["10", "11", "9"]
    assert expand("{2..0}") == ["0", "1", "2"]
    assert expand("{train,val}-{0..1}.tar") == ["train-0.tar", "train-1.tar", "val-0.tar", "val-1.tar"]
    assert expand("{00..01,07}.tar") == ["00.tar", "01.tar", "07.tar"]
    assert expand("{{0..1},5}") == ["0", "1", "5"]
    assert expand("plain.tar") == ["plain.tar"]
    assert expand("{x}.tar") == ["{x}.tar"]
    assert expand("{a,}") == ["", "a"]


@pytest.mark.parametrize("pattern", ["{0..99999999999}.tar", "{0..999}{0..999}{0..9}.tar", "{1..100001}.tar"])
def test_too_many_names_are_refused_at_once(pattern: str) -> None:
    started = time.process_time()
    assert "check the braces" in refused(UsageError, 2, "more than 100,000 files", lambda: shards_of(pattern))
    assert time.process_time() - started < 5


def test_a_folder_and_a_file_are_taken_by_their_very_name(tmp_path: Path) -> None:
    (tmp_path / "{0..3}.tar").mkdir()
    assert shards_of(str(tmp_path / "{0..3}.tar")) == []
    (tmp_path / "{a,b}.tar").touch()
    assert shards_of(str(tmp_path / "{a,b}.tar")) == [str(tmp_path / "{a,b}.tar")]
    assert shards_of("{a.tar,b.png}") == []
    assert shards_of("A.TAR") == ["A.TAR"]


def test_names_of_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("x/../{0..3}.tar") == f"{tmp_path}/{{0..3}}.tar"
    assert [
        short_name(place) for place in ("/data/moths/{0..9}.tar", "/data/moths", "s3://bucket/moths/", "a.tar")
    ] == [
        "moths",
        "moths",
        "moths",
        "a.tar",
    ]


# --- headers


def assorted(name: str) -> list[tuple[str, bytes]]:
    long = "/".join(["folder_" + "x" * 20] * 4)  # with its name beyond the 100 bytes of its field
    return [
        ("a.jpg", JPEG),
        (name, b""),
        (f"{long}/{'y' * 90}.jpg", b"1" * 512),
        ("z.cls", b"7"),
        ("b/c.png", b"2" * 513),
    ]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_headers_of_every_format_as_tarfile_reads_them(kind: int, tmp_path: Path) -> None:
    name = "é/ü" + "y" * 150 + "/n.jpg" if kind != tarfile.USTAR_FORMAT else "é/ü.jpg"
    file = write_tar(tmp_path / "a.tar", assorted(name), kind)
    assert len(by_tarfile(file)) == 5
    for shortest, longest in ((512, 512), (512, 4096), (4096, 2**20)):
        assert listed(file.read_bytes(), shortest, longest) == by_tarfile(file)


def test_links_devices_folders_and_sparse_files_are_left_out(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for kind in (
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.CHRTYPE,
            tarfile.BLKTYPE,
            tarfile.DIRTYPE,
            tarfile.FIFOTYPE,
        ):
            info = tarfile.TarInfo(f"{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    good = header(b"good.jpg", 3) + padded(b"abc")
    odd = {kind: header(kind + b".jpg", 600, kind) + bytes(1024) for kind in (b"V", b"M", b"Z", b"7")}
    assert listed((tmp_path / "a.tar").read_bytes().rstrip(b"\0") + bytes(2048)) == []
    for kind, content in odd.items():
        assert [name for name, _ in listed(content + good + END)] == ([b"7.jpg"] if kind == b"7" else []) + [
            b"good.jpg"
        ]
    assert listed(header(b"1.jpg", 10**6, b"1") + good + END) == [(b"good.jpg", b"abc")]  # a link's size means nothing
    sparse = bytearray(header(b"s.jpg", 512, b"S"))
    sparse[482] = 1
    sparse[148:156] = b"%06o\0 " % (sum(sparse[:148]) + sum(sparse[156:]) + 256)
    maps = bytes(504) + b"\1" + bytes(7) + bytes(512)
    assert listed(bytes(sparse) + maps + bytes(512) + good + END) == [(b"good.jpg", b"abc")]
    attributes = record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.name", b"s.jpg")
    pax = header(b"x", len(attributes), b"x") + padded(attributes)
    assert listed(pax + header(b"s.jpg", 512) + bytes(512) + good + END) == [(b"good.jpg", b"abc")]


def test_attributes_and_numbers(tmp_path: Path) -> None:
    attributes = record(b"path", b"p.jpg") + record(b"size", b"3") + record(b"comment", b"x" * 600)
    pax = header(b"x", len(attributes), b"x") + padded(attributes)
    assert listed(pax + header(b"q.jpg", 0) + padded(b"abc") + header(b"r.jpg", 0) + END) == [
        (b"p.jpg", b"abc"),
        (b"r.jpg", b""),
    ]
    whole = header(b"g", len(attributes), b"g") + padded(attributes)  # names nothing
    assert listed(whole + header(b"q.jpg", 0) + END) == [(b"q.jpg", b"")]
    assert listed(header(b"b.jpg", b"\x80" + bytes(10) + b"\3") + padded(b"abc") + END) == [(b"b.jpg", b"abc")]
    assert listed(header(b"b.jpg", b" 3         \0") + padded(b"abc") + END) == [(b"b.jpg", b"abc")]
    gnu = header(b"b.jpg", 0, prefix=b"12345", magic=b"ustar  \0")  # a time, not a folder
    assert listed(gnu + header(b"b.jpg", 0, prefix=b"dir") + END) == [(b"b.jpg", b""), (b"dir/b.jpg", b"")]
    signed = bytearray(header(b"\xff\xfe.jpg", 0))
    signed[148:156] = b"%06o\0 " % (sum(signed[:148]) + sum(signed[156:]) + 256 - 512)
    assert listed(bytes(signed) + END) == [(b"\xff\xfe.jpg", b"")]


def test_glued_archives_are_one_and_what_follows_the_end_is_nothing() -> None:
    one, other = header(b"a.jpg", 1) + padded(b"1"), header(b"b.jpg", 1) + padded(b"2")
    assert [name for name, _ in listed(one + END + bytes(10240) + other + END)] == [b"a.jpg", b"b.jpg"]
    assert [name for name, _ in listed(one + END + b"junk" * 300)] == [b"a.jpg"]
    assert [name for name, _ in listed(one + bytes(512))] == [b"a.jpg"]
    assert listed(END) == []
    size = 2**50  # a sparse file of zeros ends in time
    whole = members(lambda start, length: (one + END)[start : start + length].ljust(length, b"\0"), size, 512, 2**20)
    assert [name for name, _, _ in whole] == [b"a.jpg"]


GOOD = header(b"a.jpg", 3) + padded(b"abc")
DAMAGED = {
    "nothing": (b"", "is cut off"),
    "text": (b"hello\n" * 200, "is not a tar file"),
    "a wrong checksum": (GOOD[:10] + b"x" + GOOD[11:] + END, "is not a tar file"),
    "a wrong second header": (GOOD + b"x" * 512 + END, "is damaged at byte 1024"),
    "no end": (GOOD, "no mark at the end"),
    "a cut header": (GOOD + GOOD[:100], "is cut off at byte 1124"),
    "cut content": (header(b"b.jpg", 3000) + bytes(2000), "is cut off at byte 2512"),
    "8 EiB": (header(b"b.jpg", b"\x80\0\0\0\x7f" + b"\xff" * 7) + END, "is cut off"),
    "2**80 bytes": (header(b"b.jpg", b"\x80\1" + bytes(10)) + END, "is cut off"),
    "a negative size": (header(b"b.jpg", b"\xff" * 12) + END, "is damaged at byte 0|is cut off"),
    "a minus": (header(b"b.jpg", b"-0000000003\0") + END, "is damaged at byte 0"),
    "decimal digits": (header(b"b.jpg", b"00000000009\0") + END, "is damaged at byte 0"),
    "a long name of 2 MiB": (header(b"L", 2**21, b"L") + bytes(2**21) + GOOD + END, "attributes of 2097152 bytes"),
    "a name of 5 kB": (header(b"L", 5000, b"L") + padded(b"n" * 5000) + GOOD + END, "a name of 5000 bytes"),
    "attributes without an end": (header(b"x", 9, b"x") + padded(b"99 path=x") + GOOD + END, "is damaged"),
    "attributes without a space": (header(b"x", 9, b"x") + padded(b"123456789") + GOOD + END, "is damaged"),
    "attributes of no length": (header(b"x", 9, b"x") + padded(b"0 path=x\n") + GOOD + END, "is damaged"),
    "a line break and no number": (header(b"x", 3, b"x") + padded(b"ab\n") + GOOD + END, "is damaged"),
    "a size that is no number": (
        header(b"x", 11, b"x") + padded(record(b"size", b"-1")) + GOOD + END,
        "is damaged",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name: str) -> None:
    content, words = DAMAGED[name]
    with pytest.raises(DamagedTar, match=words):
        listed(content)


FIELDS = (0, 1, 99, *range(124, 136), 148, 153, 156, 257, 262, 345, 482, 504)  # what a header is read for


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.sampled_from(FIELDS), st.sampled_from(b"0137LSxg\x80\xff\0 =\n")), max_size=6
    ),
    st.booleans(),
    st.integers(0, 9 * 512),
)
def test_no_damage_is_more_than_a_damaged_tar(changes: list[tuple[int, int, int]], mend: bool, cut: int) -> None:
    """Bytes of headers changed, checksums made good again or not, the end cut off."""
    attributes = record(b"path", b"deep/c.jpg") + record(b"size", b"5")
    start = header(b"././@LongLink", 9, b"L") + padded(b"long.jpg\0") + header(b"a.jpg", 3) + padded(b"abc")
    content = bytearray(start + header(b"x", len(attributes), b"x") + padded(attributes) + header(b"c.jpg", 5) + END)
    for block, position, value in changes:
        content[(block * 512 + position) % len(content)] = value
    for first in range(0, len(content), 512) if mend else ():
        sector = content[first : first + 512]
        if any(sector):
            total = sum(sector[:148]) + sum(sector[156:]) + 256
            content[first + 148 : first + 156] = b"%06o\0 " % total
    kept = bytes(content[: max(cut, 512)])
    found = []
    with suppress(DamagedTar):
        for each in members(lambda start, length: kept[start : start + length], len(kept), 512, 1024):
            found.append(each)
    assert all(0 < start <= start + size <= len(kept) for _, start, size in found)
    assert len(found) <= len(kept) // 512


# --- images


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder") / "images", classes=3, per_class=8, px=32)


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> str:
    return write_shards(tmp_path / "shards", folder, 3)


def test_images_are_those_of_the_folder(folder: Path, shards: str) -> None:
    source, plain = open_images([shards]), open_images([folder])
    assert source.root == Path(shards).parent
    assert sorted(path.partition("/")[2] for path in paths(source)) == paths(plain)
    assert {path.partition("/")[0] for path in paths(source)} == {"00.tar", "01.tar", "02.tar"}
    where = {path: index for index, path in enumerate(paths(plain))}
    for index, path in enumerate(paths(source)):
        other = where[path.partition("/")[2]]
        np.testing.assert_array_equal(np.asarray(source.read(index)), np.asarray(plain.read(other)))
        assert source.sizes[index] == plain.sizes[other]
    assert [len(part) for part in vars(split(source, "file")).values()] == [16, 4, 4]


def test_several_places_in_any_order_and_their_common_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    write_tar(tmp_path / "b.tar", [("2.jpg", JPEG)])
    write_tar(tmp_path / "deep" / "a.tar", [("./1.jpg", JPEG), ("./.hidden.jpg", JPEG), ("._2.jpg", JPEG)])
    monkeypatch.chdir(tmp_path)
    source = open_images(["deep/a.tar", tmp_path / "b.tar"])
    assert paths(source) == ["b.tar/2.jpg", "deep/a.tar/1.jpg"]
    assert fingerprint(source) == fingerprint(open_images(["b.tar", "deep/a.tar"]))
    assert paths(open_images(["deep/a.tar"])) == ["a.tar/1.jpg"]


def test_names_are_only_names(tmp_path: Path) -> None:
    names = [
        "../../up.jpg",
        "/etc/absolute.jpg",
        os.fsdecode(b"\xff\xfe.png"),
        "line\nbreak.jpg",
        "a/../b.jpg",
        "C:\\x.GIF",
    ]
    before = sorted(os.listdir(tmp_path))
    write_tar(tmp_path / "a.tar", [(name, name.encode(errors="replace")) for name in names], tarfile.PAX_FORMAT)
    source = open_images([tmp_path / "a.tar"])
    assert paths(source) == [f"a.tar/{name}" for name in names]
    assert list(contents(source).values()) == [name.encode(errors="replace") for name in names]
    fingerprint(source)
    for index in range(len(source)):
        with pytest.raises(BadImage) as bad:
            source.read(index)
        assert bad.value.path == source.path(index)
    assert sorted(os.listdir(tmp_path)) == [*before, "a.tar"]


def test_of_members_with_one_name_the_last_counts(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", b"old"), ("2.jpg", b"two"), ("./1.jpg", b"new")])
    source = open_images([tmp_path / "a.tar"])
    assert contents(source) == {"a.tar/2.jpg": b"two", "a.tar/1.jpg": b"new"}


def test_compressed_damaged_and_missing_shards_are_refused(shards: str, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    whole = (folder / "01.tar").read_bytes()
    for pack, name, word in (
        (gzip.compress, "gz", "gzip"),
        (bz2.compress, "bz2", "bzip2"),
        (lzma.compress, "xz", "xz"),
    ):
        (folder / f"c.tar.{name}").write_bytes(pack(whole))
        words = f"is compressed with {word}, .*decompress it"
        refused(DataError, 3, words, lambda name=name: open_images([folder / f"c.tar.{name}"]))  # type: ignore[misc]
        (folder / "c.tar").write_bytes(pack(whole))
        refused(DataError, 3, words, lambda: open_images([folder / "c.tar"]))
    (folder / "01.tar").write_bytes(whole[:9000])
    (folder / "02.tar").write_bytes(b"")
    text = refused(DataError, 3, r"01\.tar: is cut off at byte", lambda: open_images([shards]))
    assert ", after 3 images; copy it again, or leave it out (2 of 3 shards cannot be used)" in text
    (folder / "02.tar").unlink()
    refused(DataError, 3, "02.tar: no such file", lambda: open_images([shards]))
    refused(DataError, 3, r"no such file", lambda: open_images([tmp_path / "gone.tar"]))
    os.mkfifo(tmp_path / "pipe.tar")
    refused(DataError, 3, "pipe.tar: is not a file", lambda: open_images([tmp_path / "pipe.tar"]))
    with pytest.raises(DataError, match="no such file"):
        open_images(["a\0b.tar"])


def test_one_kind_at_a_time(folder: Path, shards: str, tmp_path: Path) -> None:
    both = "are folders and lists and tar shards; images must be of one kind"
    refused(DataError, 3, both, lambda: open_images([folder, shards]))
    refused(DataError, 3, "is named twice", lambda: open_images([shards, tmp_path / "shards" / "00.tar"]))
    (tmp_path / "link.tar").symlink_to(tmp_path / "shards" / "00.tar")
    refused(DataError, 3, "is named twice", lambda: open_images([shards, tmp_path / "link.tar"]))
    hint = r"but 3 tar files; name them, as in --data '.*/shards/\{000\.\.002\}\.tar'"
    refused(DataError, 3, hint, lambda: open_images([tmp_path / "shards"]))
    write_tar(tmp_path / "other.tar", [("a.npy", b"1"), ("a.cls", b"1")])
    refused(
        DataError, 3, r"other\.tar: no \.jpg.*but 2 other files", lambda: open_images([shards, tmp_path / "other.tar"])
    )
    refused(DataError, 3, "labels come from class folders", lambda: open_labelled(shards))


def test_a_shard_that_changes_later_is_bad_images(shards: str, tmp_path: Path) -> None:
    source = open_images([shards])
    last = len(source) - 1
    assert source.content(last)
    file = tmp_path / "shards" / "02.tar"
    os.utime(file, ns=(1, 1))
    assert source.content(last)  # what is open stays readable
    shards_module._open.cache_clear()
    with pytest.raises(BadImage, match=r"02\.tar/.*its shard has changed"):
        source.read(last)
    (tmp_path / "shards" / "00.tar").unlink()
    with pytest.raises(BadImage, match="No such file"):
        source.read(0)
    with open(tmp_path / "shards" / "01.tar", "r+b") as cut:
        assert source.content(8)
        cut.truncate(600)
        with pytest.raises(BadImage, match="cut off"):
            source.read(8)


def test_an_image_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.tar", "wb") as file:
        file.write(header(b"a.jpg", 2**31 - 512))
        file.seek(2**31)
        file.write(END)
    with pytest.raises(BadImage, match="over the limit"):
        open_images([tmp_path / "a.tar"]).read(0)


def _first_bytes(source: FolderSource, index: int) -> bytes | None:
    return source.content(index)


def test_reads_after_a_fork_in_a_spawned_process_and_from_threads(
    shards: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = open_images([shards])
    expected = [source.content(index) for index in range(len(source))]
    everything = [(source, index) for index in range(len(source))]
    with get_context("fork").Pool(1) as pool:
        assert pool.starmap(_first_bytes, everything) == expected
    copy = pickle.loads(pickle.dumps(source.subset(np.arange(4))))
    assert [copy.content(index) for index in range(4)] == expected[:4]
    monkeypatch.setattr(shards_module, "_open", shards_module.lru_cache(maxsize=1)(shards_module._open.__wrapped__))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with ThreadPoolExecutor(8) as threads:  # each displaces what another one reads from
        order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(source)), 40)).tolist()
        assert list(threads.map(source.content, order)) == [expected[index] for index in order]
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_two_processes_share_the_images_without_overlap(shards: str) -> None:
    source = open_images([shards])
    shares = [
        [source.path(index) for batch in StepSampler(len(source), 8, 0, 0, 3, process, 2) for _, index in batch]
        for process in range(2)
    ]
    assert sorted(shares[0] + shares[1]) == sorted(paths(source))


# --- index, cache, commands


def test_an_index_of_shards(shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, file = open_images([shards]), tmp_path / "images.index"
    save_index(file, source.subset(np.array([2, 1])))
    monkeypatch.setattr(shards_module, "members", None)  # no header is read again
    loaded = load_index(file, [shards])
    assert loaded is not None
    assert (loaded.root, paths(loaded), fingerprint(loaded)) == (source.root, paths(source), fingerprint(source))
    assert contents(loaded) == contents(source)
    save_index(file, loaded)
    assert load_index(file, [shards]) is not None
    assert load_index(file, [tmp_path / "shards" / "00.tar"]) is None
    changed = tmp_path / "shards" / "01.tar"
    content, status = changed.read_bytes(), changed.stat()
    os.utime(changed, ns=(0, 0))
    assert load_index(file, [shards]) is None
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load_index(file, [shards]) is not None
    changed.write_bytes(content + bytes(512))
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load_index(file, [shards]) is None
    changed.unlink()
    assert load_index(file, [shards]) is None


FORGED = {
    "shards that are not there": ("shard_of", np.full(24, 3, np.int32)),
    "negative shards": ("shard_of", np.full(24, -1, np.int32)),
    "starts beyond the end": ("starts", np.full(24, 2**62, np.int64)),
    "negative starts": ("starts", np.full(24, -1, np.int64)),
    "too few": ("starts", np.zeros(23, np.int64)),
    "of another type": ("starts", np.zeros(24, np.float64)),
    "no array": ("shard_of", None),
    "sizes beyond the end": ("sizes", np.full(24, 2**62, np.int64)),
    "an unknown store": ("store", "zip"),
    "no store": ("store", ""),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_index_of_shards_is_none(name: str, shards: str, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    from adaptkit.sources.index import _digest

    file = tmp_path / "images.index"
    save_index(file, open_images([shards]))
    with safe_open(file, framework="numpy") as content:
        head = content.metadata()
        arrays = {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
    assert FORMAT in head["asked"]
    key, value = FORGED[name]
    if key == "store":
        head["store"] = value
    elif value is None:
        del arrays[f"store.{key}"]
    else:
        arrays[key if key == "sizes" else f"store.{key}"] = value
    head["digest"] = _digest(arrays)
    save_file(arrays, file, head)
    assert load_index(file, [shards]) is None


def test_a_cache_knows_images_by_their_content(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "large", classes=1, per_class=2, px=700)
    source = open_images([write_shards(tmp_path / "shards", folder, 1)])
    cached = FolderSource(**{**vars(source), "cache": DecodeCache.make(tmp_path / "cache")})
    assert cached.cache is not None
    assert cached.cache.lacks(cached.file(0), cached.content(0))
    first = np.asarray(cached.read(0))
    assert first.shape == (512, 512, 3)
    assert not cached.cache.lacks(cached.file(0), cached.content(0))
    assert cached.cache.lacks(cached.file(1), cached.content(1))
    np.testing.assert_array_equal(np.asarray(cached.read(0)), first)
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == 2  # with the marker


def test_check_and_probe_read_shards(shards: str, vit: Path) -> None:
    looks = preflight.scan(open_images([shards])).looks
    assert len(looks) == 24
    assert all(look.facts is not None and look.facts.width == 32 and not look.reason for look in looks)
    document = probe(str(vit), shards, metrics=["rank"]).document
    assert document["num_queries"] == 24
    refused(DataError, 3, "no labels for knn", lambda: probe(str(vit), shards, metrics=["knn"]))


def test_labelled_images_inside_shards_are_not_trained_on(folder: Path, shards: str, vit: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))[:6]):
        (labels / f"{number % 2}").mkdir(parents=True, exist_ok=True)
        (labels / f"{number % 2}" / path.name).write_bytes(path.read_bytes())
    from adaptkit.inputs import open_inputs
    from adaptkit.recipe import load_recipe

    inputs = open_inputs(load_recipe(overrides={"data": shards, "labels": str(labels)}))
    assert inputs.facts["left_out"] > 0
    assert len(inputs.train) + inputs.facts["left_out"] == 16


RUN = {"steps": 6, "log_every": 2, "checkpoint_every": "2 steps", "batch_size": 4}


@pytest.fixture(autouse=True)
def _short_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)


def test_a_run_on_shards_resumes_bit_for_bit_without_indexing_again(
    shards: str, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = adapt(vit, shards, tmp_path / "whole", **RUN).run
    with pytest.raises(Interrupted):
        adapt(vit, shards, tmp_path / "run", reporter=SignalAt(2), **RUN)
    monkeypatch.setattr(shards_module, "members", None)
    run_adaptation(Run.open(tmp_path / "run"), Silent())
    assert_same_run(whole, tmp_path / "run")
    assert read(whole, "report.json")["data"]["path"] == shards


def test_a_run_is_not_resumed_on_other_shards(shards: str, vit: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        adapt(vit, shards, tmp_path / "run", reporter=SignalAt(2), **RUN)
    with tarfile.open(tmp_path / "shards" / "02.tar", "a") as tar:
        tar.add(tmp_path / "run" / "recipe.yaml", "new.jpg")
    refused(DataError, 3, r"1 added: 02\.tar/new\.jpg", lambda: run_adaptation(Run.open(tmp_path / "run"), Silent()))
