"""Images behind URLs: in memory, in a file system that fails, and on a local server that speaks S3."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
from conftest import write_folder
from fsspec.implementations.memory import MemoryFileSystem
from hostile import refused
from tar_files import write_shards, write_tar
from tiny_runs import Recorder, SignalAt, adapt, assert_same_run, command

from adaptkit import schedules
from adaptkit.errors import DataError, Interrupted, MachineError, UsageError
from adaptkit.evaluate import probe
from adaptkit.places import absolute
from adaptkit.recipe import load_recipe
from adaptkit.run import Run
from adaptkit.session import Silent
from adaptkit.sources import BadImage, FolderSource, fingerprint, load_index, open_images, open_labelled, save_index
from adaptkit.sources import remote as remote_module
from adaptkit.train import run_adaptation

pytestmark = pytest.mark.long

SHORT: dict[str, Any] = {"steps": 4, "probe__every": "never", "select__alphas": []}
RUN: dict[str, Any] = {"steps": 6, "log_every": 2, "checkpoint_every": "2 steps", "batch_size": 4}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedules, "MIN_REFIT_STEPS", 2)
    monkeypatch.setattr(remote_module, "PAUSES", (0.0, 0.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder") / "images", classes=3, per_class=8, px=32)


def upload(files: Any, folder: Path, place: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            files.pipe_file(f"{place}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    """`folder` in memory, with what has to be left out."""
    files = fsspec.filesystem("memory")
    upload(files, folder, "/photos")
    for name in ("/photos/.hidden.jpg", "/photos/.cache/1.jpg", "/photos/notes.md", "/other/1.jpg"):
        files.pipe_file(name, b"x")
    yield "memory://photos"
    for name in files.ls("/", detail=False):
        files.rm(name, recursive=True)


def paths(source: FolderSource) -> list[str]:
    return [source.path(index) for index in range(len(source))]


def assert_same_images(one: FolderSource, other: FolderSource) -> None:
    assert paths(one) == paths(other)
    assert fingerprint(one) == fingerprint(other)
    for index in range(len(one)):
        np.testing.assert_array_equal(np.asarray(one.read(index)), np.asarray(other.read(index)))


# --- any protocol


@pytest.mark.parametrize("end", ["", "/", "//"])
def test_a_url_is_read_as_the_folder_is(memory: str, folder: Path, end: str) -> None:
    assert_same_images(open_images([memory + end]), open_images([folder]))
    assert_same_images(open_images([f"file://{folder}{end}"]), open_images([folder]))


def test_several_urls_lie_below_their_common_start(memory: str, folder: Path) -> None:
    both = [folder / "class_0", folder / "class_2"]
    assert_same_images(open_images([f"{memory}/class_2", f"{memory}/class_0/"]), open_images(both))
    assert "other/1.jpg" in paths(open_images([memory, "memory://other"]))
    everything = open_images(["memory://"])
    assert len(everything) == 25
    assert everything.content(0) == b"x"


def test_names_with_signs_that_urls_know(memory: str) -> None:
    files = fsspec.filesystem("memory")
    names = ["a b.jpg", "50%.jpg", "50%25.jpg", "#1.jpg", "what?.jpg", "é.jpg", "x//y.jpg", "..jpg.jpg", "a\nb.jpg"]
    for name in names:
        files.pipe_file(f"/odd/{name}", name.encode())
    source = open_images(["memory://odd"])
    assert {source.path(index): source.content(index) for index in range(len(source))} == {
        name: name.encode() for name in names if not name.startswith(".")
    }


def test_what_cannot_be_opened_is_one_line(memory: str, folder: Path, tmp_path: Path) -> None:
    def wrong(kind: Any, code: int, words: str, *places: str) -> None:
        refused(kind, code, words, lambda: open_images(places))

    wrong(DataError, 3, "no such place|no .jpg", "memory://nowhere")
    wrong(DataError, 3, "is a file; give the folder", f"{memory}/class_0/0000.jpg")
    wrong(DataError, 3, "is named twice", memory, f"{memory}/")
    wrong(DataError, 3, "lies inside memory://photos", memory, f"{memory}/class_0")
    wrong(DataError, 3, "are memory:// images and folders and lists", memory, str(folder))
    wrong(DataError, 3, "are memory:// images and file:// images", memory, f"file://{folder}")
    wrong(DataError, 3, "are memory:// images and memory:// tar shards", memory, "memory://a.tar")
    wrong(DataError, 3, "memory://gone/0.tar: no such place", "memory://gone/{0..3}.tar")
    wrong(UsageError, 2, r"unheard://\.\.\.: no such protocol", "unheard://bucket/images")
    wrong(UsageError, 2, "chained URLs", "zip://a::memory://photos/x.zip")
    refused(DataError, 3, "labels come from class folders", lambda: open_labelled(memory))
    refused(DataError, 3, "labels come from class folders", lambda: open_labelled(folder, "memory://photos"))


def test_a_missing_package_is_named() -> None:
    fsspec.register_implementation("rare", "no_such_package.core.RareFileSystem", errtxt="Install it")
    refused(
        UsageError,
        2,
        r"^rare://\.\.\.: needs no_such_package; pip install no_such_package$",
        lambda: open_images(["rare://x"]),
    )


SECRET = [
    "s3://KEYKEY:SECRET@bucket/images",
    "s3://KEYKEY:SEC/RET@bucket/images",
    "sftp://me:SECRET@host/images",
    "https://host/images?X-Amz-Signature=SECRET",
    "abfs://container/images?sig=SECRET",
]


@pytest.mark.parametrize("url", SECRET)
def test_a_secret_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    recipe = load_recipe(overrides={"data": url})
    for refuse in (lambda: recipe.with_absolute_paths(), lambda: open_images([url, url]), lambda: probe("nano", url)):
        assert "SECRET" not in refused(UsageError, 2, "holds a password or a query", refuse)


def test_no_secret_reaches_the_terminal_or_the_disk(tmp_path: Path) -> None:
    done = command("adapt", "--backbone", "nano", "--data", SECRET[0], "--output", tmp_path / "run")
    assert done.returncode == 2
    assert "SECRET" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "url", ["hf://datasets/me/moths@main/data", "sftp://me@host:22/a@b", "s3://bucket/a:b/c", "s3://b"]
)
def test_urls_stay_as_they_are(url: str) -> None:
    assert absolute(url) == url
    assert load_recipe(overrides={"data": url}).with_absolute_paths().data.path == (url,)


def test_shards_behind_a_url_are_those_on_the_disk(memory: str, folder: Path, tmp_path: Path) -> None:
    pattern = write_shards(tmp_path / "shards", folder, 3)
    upload(fsspec.filesystem("memory"), tmp_path / "shards", "/shards")
    url = "memory://shards/{00..02}.tar"
    source = open_images([url])
    assert_same_images(source, open_images([pattern]))
    assert_same_images(source, open_images([f"file://{pattern}"]))
    save_index(tmp_path / "index", source)
    loaded = load_index(tmp_path / "index", [url])
    assert loaded is not None
    assert_same_images(loaded, source)
    upload(fsspec.filesystem("memory"), tmp_path / "shards", "/shards")  # as large, but written later
    assert load_index(tmp_path / "index", [url]) is None
    write_tar(tmp_path / "shards" / "01.tar", [("a.jpg", b"1")])
    upload(fsspec.filesystem("memory"), tmp_path / "shards", "/shards")
    with pytest.raises(BadImage):
        source.read(len(source) // 2)
    fsspec.filesystem("memory").rm("/shards/01.tar")
    assert load_index(tmp_path / "index", [url]) is None
    with pytest.raises(BadImage, match="No such file"):
        source.read(len(source) // 2)


def test_a_truncated_or_compressed_shard_behind_a_url(memory: str, folder: Path, tmp_path: Path) -> None:
    files = fsspec.filesystem("memory")
    write_shards(tmp_path, folder, 1)
    files.pipe_file("/s/00.tar", (tmp_path / "00.tar").read_bytes()[:9000])
    refused(DataError, 3, "memory://s/00.tar: is cut off at byte", lambda: open_images(["memory://s/00.tar"]))
    files.pipe_file("/s/00.tar.gz", b"\x1f\x8b" + bytes(30))
    refused(DataError, 3, "is compressed with gzip", lambda: open_images(["memory://s/00.tar.gz"]))


# --- what fails


class Flaky(MemoryFileSystem):
    """Fails the next `failures` questions."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures = 0
    questions = 0
    error: Exception = OSError("the line is down: https://me:SECRET@host/x?sig=SECRET")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.replace("flaky://", "memory://")))

    def _fail(self) -> None:
        type(self).questions += 1
        if type(self).failures > 0:
            type(self).failures -= 1
            raise self.error

    def cat_file(self, *arguments: Any, **options: Any) -> bytes:
        self._fail()
        content: bytes = super().cat_file(*arguments, **options)
        return content

    def find(self, *arguments: Any, **options: Any) -> Any:
        self._fail()
        return super().find(*arguments, **options)


@pytest.fixture
def flaky(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    upload(fsspec.filesystem("flaky"), folder, "/photos")
    monkeypatch.setattr(Flaky, "failures", 0)
    monkeypatch.setattr(Flaky, "questions", 0)
    monkeypatch.setattr(Flaky, "error", Flaky.error)
    remote_module._connect.cache_clear()
    return "flaky://photos"


def test_a_moment_of_silence_costs_nothing(flaky: str, folder: Path) -> None:
    Flaky.failures = 2
    source = open_images([flaky])
    Flaky.failures = 2
    np.testing.assert_array_equal(np.asarray(source.read(3)), np.asarray(open_images([folder]).read(3)))


def test_an_image_out_of_reach_is_bad_and_the_next_one_is_asked_for_once(flaky: str) -> None:
    source = open_images([flaky])
    Flaky.failures, Flaky.questions = 4, 0
    for index, questions in ((5, 3), (6, 4)):
        with pytest.raises(BadImage) as bad:
            source.read(index)
        assert (bad.value.path, Flaky.questions) == (source.path(index), questions)
        assert bad.value.reason == "cannot be reached (OSError: the line is down: https://host/x)"
    source.read(7)
    Flaky.failures = 2
    source.read(8)  # asked for three times again


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError("down"), MachineError, r"cannot be reached \(OSError: down\); check the network"),
        (PermissionError("Access Denied"), MachineError, r"may not be read \(PermissionError: Access Denied\)"),
        (FileNotFoundError("gone"), DataError, "no such place"),
        (ValueError("bad bucket"), DataError, r"cannot be listed \(ValueError: bad bucket\)"),
        (RuntimeError("a\nb\x1b" + "x" * 1000), MachineError, "cannot be reached"),
    ],
)
def test_a_listing_that_fails_is_one_line(error: Exception, kind: Any, words: str, flaky: str) -> None:
    Flaky.failures, Flaky.error = 10, error
    refused(kind, kind.exit_code, words, lambda: open_images([flaky]))


def test_a_server_without_ranges_is_refused(flaky: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("flaky").pipe_file("/a.tar", bytes(2**21))
    whole = MemoryFileSystem.cat_file
    monkeypatch.setattr(Flaky, "cat_file", lambda self, path, start=None, end=None: whole(self, path))
    refused(MachineError, 8, "sends whole files only", lambda: open_images(["flaky://a.tar"]))


class Cutter(Recorder):
    """The line goes down when the first step is logged."""

    def training(self, step: int, total_steps: int, metrics: Any) -> None:
        super().training(step, total_steps, metrics)
        Flaky.failures = 10**9


def test_a_run_ends_when_all_is_gone_and_goes_on_when_it_is_back(flaky: str, vit: Path, tmp_path: Path) -> None:
    whole = adapt(vit, flaky, tmp_path / "whole", **RUN).run  # type: ignore[arg-type]
    words = "cannot be reached|cannot be used"
    refused(DataError, 3, words, lambda: adapt(vit, flaky, tmp_path / "run", reporter=Cutter(), **RUN))
    refused(MachineError, 8, "cannot be reached", lambda: run_adaptation(Run.open(tmp_path / "run"), Silent()))
    Flaky.failures = 0
    run_adaptation(Run.open(tmp_path / "run"), Silent())
    assert_same_run(whole, tmp_path / "run")


def test_other_images_behind_the_url_are_named(flaky: str, vit: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        adapt(vit, flaky, tmp_path / "run", reporter=SignalAt(2), **RUN)  # type: ignore[arg-type]
    assert load_index(tmp_path / "run" / "images.index", [flaky]) is None
    fsspec.filesystem("flaky").rm("/photos/class_0/0000.jpg")
    words = r"1 removed: class_0/0000\.jpg"
    refused(DataError, 3, words, lambda: run_adaptation(Run.open(tmp_path / "run"), Silent()))


# --- S3


@pytest.fixture(scope="module")
def bucket(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`s3://bucket` with the images below photos/ and shards/, behind a server of this machine."""
    import moto.server as moto
    import s3fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    names = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "mine"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (names | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
            patch.setenv(name, value)
        files = s3fs.S3FileSystem()
        files.mkdir("bucket")
        upload(files, folder, "bucket/photos")
        shards = tmp_path_factory.mktemp("shards")
        write_shards(shards, folder, 3)
        upload(files, shards, "bucket/shards")
        yield "s3://bucket"
    server.stop()


def _content(source: FolderSource, index: int) -> bytes | None:
    return source.content(index)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_s3_images_and_shards_also_after_a_fork(bucket: str, folder: Path) -> None:
    plain = open_images([folder])
    images, shards = open_images([f"{bucket}/photos"]), open_images([f"{bucket}/shards/{{00..02}}.tar"])
    assert_same_images(images, plain)
    assert sorted(path.partition("/")[2] for path in paths(shards)) == paths(plain)
    for source in (images, shards):
        copy = pickle.loads(pickle.dumps(source))
        assert copy.content(3) == source.content(3)
        with get_context("fork").Pool(2) as pool:  # the parent has an event loop, which the children must not use
            found = pool.starmap_async(_content, [(source, index) for index in range(len(source))]).get(60)
        assert found == [source.content(index) for index in range(len(source))]


def test_s3_that_is_not_there(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(DataError, 3, "no such place|no .jpg", lambda: open_images(["s3://nobucket/photos"]))
    refused(
        DataError,
        3,
        r"s3://bucket/shards/03\.tar: no such place",
        lambda: open_images([f"{bucket}/shards/{{00..05}}.tar"]),
    )
    hint = r"but 3 tar files; name them, as in --data 's3://bucket/shards/\{000\.\.002\}\.tar'"
    refused(DataError, 3, hint, lambda: open_images([f"{bucket}/shards"]))
    refused(DataError, 3, "cannot be listed", lambda: open_images(["s3://"]))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_runs_on_s3_are_the_same_with_and_without_workers_and_resumed(bucket: str, vit: Path, tmp_path: Path) -> None:
    url: Any = f"{bucket}/shards/{{00..02}}.tar"
    two = adapt(vit, url, tmp_path / "two", **RUN | SHORT | {"workers": 2}).run
    with pytest.raises(Interrupted):
        adapt(vit, url, tmp_path / "none", reporter=SignalAt(2), **RUN | SHORT)
    run_adaptation(Run.open(tmp_path / "none"), Silent())
    assert_same_run(two, tmp_path / "none")


def test_a_run_on_an_s3_prefix_is_that_on_the_folder(bucket: str, folder: Path, vit: Path, tmp_path: Path) -> None:
    here = adapt(vit, folder, tmp_path / "here", **RUN | SHORT).run
    there = adapt(vit, f"{bucket}/photos", tmp_path / "there", **RUN | SHORT).run  # type: ignore[arg-type]
    assert_same_run(here, there)
