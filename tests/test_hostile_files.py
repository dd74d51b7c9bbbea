"""Hostile lists, recipes and weights: one line with its exit code; no code of theirs runs, nothing is written."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import draw_image
from hostile import refused
from safetensors.torch import load_file, save

from adaptkit.backbones import load_backbone
from adaptkit.backbones.reading import read_weights
from adaptkit.checkpoints import load_state, load_tensors, pack_training, unpack_training_
from adaptkit.errors import BackboneError, DataError, UsageError
from adaptkit.recipe import Recipe, load_recipe
from adaptkit.run import Run
from adaptkit.sources import BadImages, has_class_folders, open_folder, open_images, open_labelled

# --- lists of labels

ROWS = "0.jpg,a\n1.jpg,a\n2.jpg,b\n3.jpg,b\n"


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder of four images, and one image beside it."""
    (tmp_path / "mine").mkdir()
    for index in range(4):
        draw_image(0, index).save(tmp_path / "mine" / f"{index}.jpg")
    draw_image(0, 9).save(tmp_path / "beside.jpg")
    return tmp_path / "mine"


BAD_LABELS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "the first line must be the header"),
    "only a mark of the byte order": (b"\xef\xbb\xbf", "the first line must be the header"),
    "unknown header": (b"file,class\n0.jpg,a\n", "the first line must be the header path,label and is 'file,class'"),
    "header in capitals": (b"Path,Label\n0.jpg,a\n", "the first line must be the header"),
    "header of a megabyte": (b"x" * 100_000 + b"\n", "the first line must be the header"),
    "header twice": (b"path,label,label\n0.jpg,a,b\n1.jpg,b,a\n", "has 2 columns label; keep one"),
    "semicolons": (f"path,label\n{ROWS}".replace(",", ";").encode(), "separated by semicolons"),
    "semicolons below the header": (b"path,label\n0.jpg;a\n", "line 2: .* needs a path and a label"),
    "UTF-32": (f"path,label\n{ROWS}".encode("utf-32"), "is not UTF-8 text"),
    "NUL in a label": (b"path,label\n0.jpg,a\0\n", "is not UTF-8 text"),
    "NUL in a path": (b"path,label\n0\0.jpg,a\n", "is not UTF-8 text"),
    "an image": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"is not UTF-8 text|first line must be"),
    "a field of 200,000 letters": (b"path,label\n0.jpg," + b"a" * 200_000, "field larger than field limit"),
    "a path of 100,000 letters": (b"path,label\n" + b"a" * 100_000 + b",a\n", "line 2: no such file"),
    "a quote that is not closed": (b'path,label\n0.jpg,a\n1.jpg,"a\n2.jpg,b\n3.jpg,b\n', "unexpected end of data"),
    "a quote in the middle": (b'path,label\n0.jpg,"a"b\n', "cannot be read as a path,label list"),
    "a comma without quotes": (b"path,label\n0.jpg,a, or b\n1.jpg,b\n", "line 2: has more cells than the header"),
    "the same row twice": (f"path,label\n{ROWS}0.jpg,a\n".encode(), r"line 6: 0\.jpg is listed twice"),
    "two labels of one image": (f"path,label\n{ROWS}0.jpg,b\n".encode(), r"line 6: 0\.jpg is listed twice"),
    "two labels, spelt otherwise": (f"path,label\n{ROWS}../mine/./0.jpg,b\n".encode(), r"0\.jpg is listed twice"),
    "one class": (b"path,label\n0.jpg,a\n1.jpg,a\n", "only the class 'a'"),
    "one class with line breaks": (b'path,label\n0.jpg,"a\n\x1bb"\n1.jpg,"a\n\x1bb"\n', "only the class"),
    "one image per class": (b"path,label\n0.jpg,a\n1.jpg,b\n", "one image per class"),
    "missing file": (f"path,label\n{ROWS}4.jpg,b\n".encode(), r"line 6: no such file .*4\.jpg; paths are relative"),
    "missing file with a line break": (b'path,label\n"0\n.jpg",a\n', r"line 3: no such file .*0\\n\.jpg"),
    "a path that leads to nothing": (b"path,label\n../../../../no/such.jpg,a\n", "line 2: no such file"),
    "a folder": (b"path,label\n..,a\n", "line 2: .* is not a file"),
    "a device": (b"path,label\n/dev/zero,a\n", "line 2: /dev/zero is not a file"),
    "a web address": (b"path,label\nhttp://localhost/0.jpg,a\n", "line 2: no such file"),
    "empty cells": (b"path,label\n,\n", "line 2: .* needs a path and a label"),
    "only commas": (b",,,,\n,,,,\n", "the first line must be the header"),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_a_bad_list_of_labels_is_refused(case: str, mine: Path) -> None:
    content, words = BAD_LABELS[case]
    (mine / "labels.csv").write_bytes(content)
    before = sorted(mine.parent.rglob("*"))
    assert "labels.csv" in refused(DataError, 3, words, lambda: open_labelled(mine / "labels.csv"))
    assert not has_class_folders(mine / "labels.csv")
    assert sorted(mine.parent.rglob("*")) == before


GOOD_LABELS: dict[str, bytes] = {
    "byte order mark": b"\xef\xbb\xbfpath,label\n" + ROWS.encode(),
    "CRLF": f"path,label\n{ROWS}".replace("\n", "\r\n").encode(),
    "CR": f"path,label\n{ROWS}".replace("\n", "\r").encode(),
    "blank lines": f"path,label\n\n{ROWS}\n\n".replace("\n", "\n\n").encode(),
    "no last line break": f"path,label\n{ROWS}".rstrip().encode(),
    "empty cells at the end": f"path,label\n{ROWS}".replace("\n", ",,\n").encode(),
    "all in quotes": b'"path","label"\n"0.jpg","a"\n"1.jpg","a"\n"2.jpg","b"\n"3.jpg","b"\n',
    "../ that comes back": f"path,label\n{ROWS}".replace("0.jpg", "../mine/0.jpg").encode(),
    "a formula": f"path,label\n{ROWS}".replace(",a", ",=cmd()").encode(),
    "labels that are not UTF-8": f"path,label\n{ROWS}".encode().replace(b",a", b",caf\xe9"),
}


@pytest.mark.parametrize("case", GOOD_LABELS)
def test_odd_but_sound_lists_are_read(case: str, mine: Path) -> None:
    (mine / "labels.csv").write_bytes(GOOD_LABELS[case])
    answer = open_labelled(mine / "labels.csv")
    found = [source.path(index) for source in (answer.gallery, answer.queries) for index in range(len(source))]
    assert sorted(found) == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert len(answer.class_names) == 2


def test_a_list_may_lead_out_of_its_folder_for_reading_only(mine: Path, tmp_path: Path) -> None:
    (mine / "labels.csv").write_text(f"path,label\n{ROWS}../beside.jpg,a\n")
    before = sorted(tmp_path.rglob("*"))
    answer = open_labelled(mine / "labels.csv", mine / "labels.csv")
    assert answer.gallery.path(0) == "../beside.jpg"
    assert answer.gallery.read(0).size == (48, 48)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["x" * 5000, "x" * 5000 + ".csv", "a\0b", "\ud800", "/dev/null", "/dev/zero"])
def test_places_that_cannot_be(place: str) -> None:
    for read in (open_labelled, open_folder, lambda place: open_images([place, "elsewhere"])):
        with pytest.raises(DataError) as caught:
            read(place)
        assert str(caught.value).isprintable()
    assert not has_class_folders(place)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000 + b"\n", b"\xff\xfe\n", b"null\n", b'{"path": 1}\n', b"9" * 5000 + b"\n", b"\0\n"]
)
def test_a_damaged_list_of_bad_images(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_bytes(content)
    refused(DataError, 3, "damaged; delete it", lambda: BadImages(tmp_path / "bad.jsonl", 10, "1%"))


@pytest.mark.parametrize("max_bad", ["9" * 400, "9" * 400 + "%"])
def test_a_limit_beyond_all_numbers_accepts_everything(max_bad: str) -> None:
    bad = BadImages(None, 10, max_bad)
    bad.add_all((f"{index}.jpg", "damaged") for index in range(10))
    assert len(bad.paths) == 10


NO_IMAGES: dict[str, tuple[bytes, str]] = {
    "mine.tar": (b"../ran" + bytes(994), "is not a tar file"),
    "mine.zip": (b"PK\3\4", "is neither a folder nor a list"),
    "mine.parquet": (b"PAR1", "cannot be read as a Parquet file"),
    "mine.jpg": (b"\xff\xd8\xff", "is neither a folder nor a list"),
    "mine.txt": (b"\0../mine.tar\n", "is not UTF-8 text"),
    "mine.csv": (b"path\n../../../nowhere.tar\n", "line 2: no such file"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_folder_of_images_is_refused(name: str, tmp_path: Path) -> None:
    content, words = NO_IMAGES[name]
    (tmp_path / name).write_bytes(content)
    assert name in refused(DataError, 3, words, lambda: open_images([tmp_path / name]))
    assert os.listdir(tmp_path) == [name]


def test_classes_that_the_gallery_does_not_know(mine: Path) -> None:
    (mine / "gallery.csv").write_text(f"path,label\n{ROWS}")
    (mine / "queries.csv").write_text("path,label\n0.jpg,c\n1.jpg,d\n2.jpg,b\n")
    words = r"0\.jpg: class 'c' has no image in the gallery .*2 of 3 queries"
    refused(DataError, 3, words, lambda: open_labelled(mine / "gallery.csv", mine / "queries.csv"))


# --- recipes

BAD_RECIPES: dict[str, tuple[bytes, str]] = {
    "an object": (b"seed: !!python/object/apply:os.mkdir [ran]\n", "seed = "),
    "an object for a recipe": (b"!!python/object/apply:os.mkdir [ran]\n", "a recipe is a mapping"),
    "a new object": (b"seed: !!python/object/new:os.mkdir {args: [ran]}\n", "seed = "),
    "a module": (b"backbone: !!python/module:antigravity\nseed: x\n", "seed = 'x'"),
    "an unknown tag": (b"!boom {seed: x}\n", "seed = 'x'"),
    "billion laughs": (
        b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 40)),
        "aliases are not allowed",
    ),
    "an alias of itself": (b"a: &a [*a]\n", "aliases are not allowed"),
    "a merge": (b"x: &x {seed: 1}\n<<: *x\n", "aliases are not allowed"),
    "a merge without an alias": (b"<<: {seed: 1}\n", "unknown key <<"),
    "a key twice": (b"seed: 1\noptim: {}\nseed: 2\n", "seed is given twice"),
    "a key twice in one line": (b"{optim: {lr: 1, lr: 2}}\n", "lr is given twice"),
    "a key twice, once in quotes": (b"seed: 1\n'seed': 2\n", "seed is given twice"),
    "deep in brackets": (b"seed: " + b"[" * 50_000, "not valid YAML"),
    "deep in braces": (b"{a: " * 50_000, "not valid YAML"),
    "deep in dashes": (b"- " * 50_000, "not valid YAML"),
    "deep in keys": ("".join(" " * depth + "a:\n" for depth in range(600)).encode(), "not valid YAML"),
    "10 MB": (b"# " + b"x" * 10_000_000, "larger than 262144 bytes"),
    "a value of 200 kB": (b"seed: " + b"x" * 200_000, r"seed = 'xxx.*\.\.\.: Input should"),
    "a key of 1 kB": (b"x" * 1000 + b": 1\n", r"unknown key xxx.*\.\.\.;"),
    "a key with line breaks": (b'"a\\nerror: b\\e[31m": 1\n', "unknown key a error: b"),
    "a list of 20,000": (b"seed: [" + b"1, " * 20_000 + b"]", "seed = "),
    "Latin-1": ("labels: Übung\n".encode("latin-1"), "cannot be read as a recipe"),
    "UTF-16": ("seed: 1\n".encode("utf-16"), "cannot be read as a recipe"),
    "NUL bytes": (b"seed: 1\0\n", "not valid YAML"),
    "only NUL bytes": (bytes(100), "not valid YAML"),
    "an escape sequence": (b"seed: \x1b[31m1\n", "not valid YAML"),
    "tabs": (b"optim:\n\tlr: 1\n", "line 2: found character"),
    "not a number": (b"epochs: .nan\n", r"epochs = '\.nan'"),
    "nan": (b"epochs: nan\n", "epochs = 'nan': Input should be a finite number"),
    "infinity": (b"optim: {lr: inf}\n", r"optim\.lr = 'inf': Input should be a finite number"),
    "a float that overflows": (b"epochs: 1e999\n", "epochs = '1e999': Input should be a finite number"),
    "a number of 5,000 digits": (b"steps: " + b"9" * 5000 + b"\n", r"steps = '999.*\.\.\.: "),
    "a seed beyond 64 bits": (b"seed: 99999999999999999999\n", "seed = .* less than 9223372036854775808"),
    "a date": (b"seed: 2001-01-01\n", "seed = '2001-01-01'"),
    "sexagesimal": (b"seed: 1:30:00\n", "seed = '1:30:00'"),
    "hexadecimal": (b"seed: 0x10\n", "seed = '0x10'"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "not valid YAML"),
    "a directive": (b"%YAML 9.9\n---\nseed: 1\n", "not valid YAML"),
    "a list": (b"- seed: 1\n", "a recipe is a mapping"),
    "keys that are lists": (b"? [a]\n: 1\n", "keys must be plain words"),
    "JSON cut off": (b'{"seed": 1, "optim": {', "not valid YAML"),
    "steps of 30 digits": (b"steps: 1" + b"0" * 30, "steps = .*less than or equal to 100000000"),
    "an epoch for every atom": (b"epochs: 1e80\n", "epochs = '1e80': .*less than or equal to 1000000"),
    "a warm-up of 400 digits": (b"head: {warmup: " + b"9" * 400 + b" steps}", r"head\.warmup = .*at most 10+;"),
    "a share of 400 digits": (b"checkpoint_every: " + b"9" * 400 + b"%", "checkpoint_every = .*at most 10+;"),
    "a budget of 400 digits": (b"budget: " + b"9" * 400 + b"h", "budget = .*write a time"),
    "a million workers": (b"workers: 1000000\n", "workers = .*less than or equal to 1024"),
    "a million crops": (b"views: {num_local: 1000000}\n", r"views\.num_local = .*less than or equal to 1000"),
    "a head of 30 digits": (b"objective: {num_bits: 1" + b"0" * 30 + b"}", r"objective\.num_bits = .*less than"),
    "half of a surrogate pair": (b'backbone: "\\ud800"\n', "half of a surrogate pair"),
    "a private key": (b"__class__: x\n", "unknown key __class__"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_bad_recipe_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, words = BAD_RECIPES[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_bytes(content)
    text = refused(UsageError, 2, words, lambda: load_recipe(tmp_path / "mine.yaml"))
    assert "mine.yaml" in text
    assert "\n" not in text
    assert os.listdir() == ["mine.yaml"]


@pytest.mark.parametrize("name", ["x" * 5000 + ".yaml", "a\0.yaml", "/dev/zero.yaml", ".yaml", "a\nb.yaml"])
def test_recipes_that_cannot_be(name: str) -> None:
    with pytest.raises(UsageError, match="no such recipe file"):
        load_recipe(name)


SETTINGS = {
    "a key of 3,000 parts": ("seed" + ".a" * 3000 + "=1", r"unknown key seed\.a.*\.\.\.;"),
    "a key below a list of paths": ("data.path" + ".a" * 3000 + "=1", r"unknown key data\.path.*\.\.\.;"),
    "no equals sign in 5,000 letters": ("x" * 5000, r"--set xxx.*\.\.\.: write key=value"),
    "no key": ("=1", "unknown key"),
    "an alias": ("seed=*a", "--set seed: not valid YAML"),
    "an object": ("seed=!!python/object/apply:os.mkdir [ran]", "seed = "),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_bad_setting_is_refused(case: str) -> None:
    assignment, words = SETTINGS[case]
    refused(UsageError, 2, words, lambda: load_recipe(assignments=[assignment]))


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\r\n")
    assert load_recipe(tmp_path / "mine.yaml").seed == 3


# --- weights


class Call:
    """Unpickled carelessly it calls the function."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


def pt(content: object, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def safetensors(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def at(start: int, end: int, *shape: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


def rezipped(rename: tuple[str, str] = ("", ""), extra: tuple[tuple[str, bytes], ...] = (), **options: int) -> bytes:
    """Sound weights with their members renamed, compressed, or more of them."""
    with zipfile.ZipFile(io.BytesIO(pt({"a": torch.ones(300)}))) as archive:
        members = {name.replace(*rename): archive.read(name) for name in archive.namelist()}
    return zipped(members | dict(extra), **options)


def tar() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("../ran", "storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    return stream.getvalue()


TWO = {"a": at(0, 8, 2), "b": at(8, 16, 2)}
CANNOT = "cannot be read as weights"
BAD_WEIGHTS: dict[str, tuple[str, bytes, str]] = {
    "empty safetensors": ("safetensors", b"", CANNOT),
    "empty pth": ("pth", b"", CANNOT),
    "header of 2**60 bytes": ("safetensors", struct.pack("<Q", 2**60) + b"{}", CANNOT),
    "header of 2**64 - 1 bytes": ("safetensors", struct.pack("<Q", 2**64 - 1) + b"{}", CANNOT),
    "header of 0 bytes": ("safetensors", bytes(8), CANNOT),
    "header cut off": ("safetensors", safetensors(b'{"a": {"dtype"', bytes(8)), CANNOT),
    "header without end": ("safetensors", safetensors(b"[" * 100_000), CANNOT),
    "overlapping": ("safetensors", safetensors({"a": at(0, 8, 2), "b": at(4, 12, 2)}, bytes(12)), CANNOT),
    "with a hole": ("safetensors", safetensors({"a": at(0, 8, 2), "b": at(12, 20, 2)}, bytes(20)), CANNOT),
    "beyond the end": ("safetensors", safetensors({"a": at(0, 800, 200)}, bytes(8)), CANNOT),
    "before the start": ("safetensors", safetensors({"a": at(-8, 0, 2)}, bytes(8)), CANNOT),
    "backwards": ("safetensors", safetensors({"a": at(8, 0, 2)}, bytes(8)), CANNOT),
    "a shape that overflows": ("safetensors", safetensors({"a": at(0, 8, 2**63, 2**63)}, bytes(8)), CANNOT),
    "a shape that is not its size": ("safetensors", safetensors({"a": at(0, 8, 3)}, bytes(8)), CANNOT),
    "an unknown type": ("safetensors", safetensors({"a": at(0, 8, 2, dtype="X")}, bytes(8)), CANNOT),
    "more than its tensors": ("safetensors", safetensors(TWO, bytes(999)), CANNOT),
    "no tensors": ("safetensors", safetensors({}), "holds no weights"),
    "names with line breaks": ("safetensors", save({"a\n\x1b[31mb": torch.ones(2)}), "does not fit"),
    "a pickle called safetensors": ("safetensors", pt({"a": torch.ones(2)}), CANNOT),
    "safetensors called pth": ("pth", save({"a": torch.ones(2)}), CANNOT),
    "code": ("pth", pickle.dumps(Call(os.mkdir, "ran")), CANNOT),
    "code in a state": ("pth", pt({"a": Call(os.mkdir, "ran")}), CANNOT),
    "code in an old state": ("pth", pt({"a": Call(os.mkdir, "ran")}, zipped=False), CANNOT),
    "code beside tensors": ("pth", pt({"a": torch.ones(2), "b": Call(os.mkdir, "ran")}), CANNOT),
    "a call of exec": ("pth", pt([Call(exec, "open('ran', 'w')")]), "holds no weights"),
    "a call of getattr": ("pth", pickle.dumps(Call(getattr, "x", "upper")), CANNOT),
    "an import": ("pth", b"cantigravity\nfly\n.", CANNOT),
    "a pickle of 2**62 bytes": ("pth", b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b".", CANNOT),
    "a bytearray of 10 TB": ("pth", pt({"a": Call(bytearray, 10**13)}), CANNOT),
    "keys that are no text": ("pth", pt({1: torch.ones(1), None: torch.ones(2)}), "holds no weights"),
    "a zip with ../ members": ("pth", zipped({"../ran": b"x", "../../ran/data.pkl": b"x"}), CANNOT),
    "weights in ../": ("pth", rezipped(rename=("archive/", "../ran/")), CANNOT),
    "weights and ../": ("pth", rezipped(extra=(("../ran", b"x"), ("archive/../../ran", b"x"))), CANNOT),
    "compressed weights": ("pth", rezipped(compression=zipfile.ZIP_DEFLATED), "its content is compressed"),
    "a bomb": (
        "pth",
        zipped({"a/data.pkl": bytes(100_000_000), "a/version": b"3\n"}, zipfile.ZIP_DEFLATED),
        "its content is compressed",
    ),
    "a byte order of NULs": ("pth", rezipped(extra=(("archive/byteorder", bytes(200)),)), CANNOT),
    "a zip of nothing": ("pth", zipped({}), CANNOT),
    "only the start of a zip": ("pth", b"PK\3\4", CANNOT),
    "a tar with ../ members": ("tar", tar(), CANNOT),
    "a tar called pth": ("pth", tar(), CANNOT),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_refused(case: str, vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suffix, content, words = BAD_WEIGHTS[case]
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    (here / f"mine.{suffix}").write_bytes(content)
    weights = str(here / f"mine.{suffix}")
    assert weights in refused(BackboneError, 4, words, lambda: load_backbone(str(vit), weights=weights))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", f"mine.{suffix}"]  # no `ran`


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_truncated_weights_are_refused(suffix: str, vit: Path, tmp_path: Path) -> None:
    state = load_file(vit / "model.safetensors")
    content, file = save(state) if suffix == "safetensors" else pt(state), tmp_path / f"cut.{suffix}"
    for percent in range(0, 100, 5):
        file.write_bytes(content[: len(content) * percent // 100])
        refused(BackboneError, 4, CANNOT, lambda: read_weights(file))
    file.write_bytes(content[:-1])
    refused(BackboneError, 4, CANNOT, lambda: read_weights(file))


CHANGED: dict[str, tuple[torch.Tensor, str]] = {
    "int8": (torch.ones(1, 1, 64, dtype=torch.int8), "cls_token is int8; quantised weights cannot be read"),
    "uint8": (torch.ones(1, 1, 64, dtype=torch.uint8), "cls_token is uint8; quantised weights cannot be read"),
    "bool": (torch.ones(1, 1, 64, dtype=torch.bool), "cls_token is bool; quantised weights cannot be read"),
    "NaN": (torch.full((1, 1, 64), float("nan")), "cls_token has values that are not finite"),
    "infinity in float16": (torch.full((1, 1, 64), float("inf")).half(), "cls_token has values that are not finite"),
    "float64 beyond float32": (torch.full((1, 1, 64), 1e300, dtype=torch.float64), "cls_token has values that are not"),
    "another width": (torch.ones(1, 1, 65), r"cls_token is \(1, 1, 65\) in the file, \(1, 1, 64\) here"),
    "no numbers": (torch.ones(0, 1, 64), r"cls_token is \(0, 1, 64\) in the file"),
    "no dimensions": (torch.ones(()), r"cls_token is \(\) in the file"),
}


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("case", CHANGED)
def test_a_parameter_that_is_wrong_is_named(case: str, suffix: str, vit: Path, tmp_path: Path) -> None:
    tensor, words = CHANGED[case]
    state = load_file(vit / "model.safetensors") | {"cls_token": tensor}
    file = tmp_path / f"mine.{suffix}"
    file.write_bytes(save(state) if suffix == "safetensors" else pt(state))
    refused(BackboneError, 4, words, lambda: load_backbone(str(vit), weights=str(file)))


@pytest.mark.parametrize("case", ["folder", "pipe", "link to itself", "endless device", "overlong", "NUL"])
def test_weights_that_are_no_file(case: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.pth"
    if case == "folder":
        file.mkdir()
    elif case == "pipe":
        os.mkfifo(file)
    elif case == "link to itself":
        file.symlink_to(file)
    elif case == "endless device":
        file.symlink_to("/dev/zero")
    else:
        file = tmp_path / ("x" * 400 + ".pth" if case == "overlong" else "a\0.pth")
    refused(BackboneError, 4, "no such weights file", lambda: read_weights(file))


def test_a_backbone_folder_runs_no_code_beside_its_weights(vit: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / "mine")
    for name in ("__init__.py", "modeling.py", "hubconf.py", "conftest.py"):
        (tmp_path / "mine" / name).write_text("raise SystemExit('code was run')")
    (tmp_path / "mine" / "pytorch_model.bin").write_bytes(pickle.dumps(Call(os.mkdir, str(tmp_path / "ran"))))
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "modeling.Model"}, "custom_pipelines": {"x": {"impl": "modeling.run"}}}
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    assert load_backbone(str(tmp_path / "mine")).embed_dim == 64
    (tmp_path / "mine" / "model.safetensors").unlink()  # now timm's other file counts
    refused(BackboneError, 4, CANNOT, lambda: load_backbone(str(tmp_path / "mine")))
    assert os.listdir(tmp_path) == ["mine"]


# --- files of a run

BAD_DOCUMENTS = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe{}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"9" * 5000,
    b"{}{}",
    bytes(9),
]


@pytest.mark.parametrize("content", BAD_DOCUMENTS, ids=range(len(BAD_DOCUMENTS)))
def test_a_damaged_document_of_a_run(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content)
    words = r"report\.json: damaged; restore it, or run again with `adaptkit adapt --overwrite`"
    refused(UsageError, 2, words, lambda: Run(tmp_path, Recipe()).read_json("report.json"))


STATE = b'"__metadata__":{"adaptkit":"%s"}'
BAD_CHECKPOINTS: dict[str, bytes] = {
    "empty": b"",
    "text": b"no checkpoint\n" * 9,
    "a pickle": pickle.dumps(Call(os.mkdir, "ran")),
    "no state": save({"a": torch.ones(1)}),
    "a state that is a list": safetensors(b"{" + STATE % b"[]" + b"}"),
    "a state that is no JSON": safetensors(b"{" + STATE % b"{" + b"}"),
    "a state of brackets": safetensors(b"{" + STATE % (b"[" * 100_000) + b"}"),
    "a state of 5,000 digits": safetensors(b"{" + STATE % (b"9" * 5000) + b"}"),
    "beyond the end": safetensors({"a": at(0, 800, 200)}, bytes(8)),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_a_damaged_checkpoint(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "last.safetensors"
    file.write_bytes(BAD_CHECKPOINTS[case])
    for read in (load_tensors, load_state):
        refused(DataError, 3, "damaged checkpoint .*; start the run again with --overwrite", lambda: read(file))  # noqa: B023
    assert os.listdir() == ["last.safetensors"]


def trained() -> tuple[torch.nn.Module, torch.nn.Module, torch.optim.Optimizer]:
    student, teacher = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(student.parameters())
    student(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return student, teacher, optimizer


MISFITS: dict[str, tuple[str, torch.Tensor | None]] = {
    "a parameter less": ("student.weight", None),
    "a parameter more": ("teacher.more", torch.ones(1)),
    "a student of another shape": ("student.weight", torch.ones(3, 3)),
    "a teacher of another shape": ("teacher.bias", torch.ones(5)),
    "a moment of another shape": ("optimizer.exp_avg.weight", torch.ones(3, 2)),
    "a moment less": ("optimizer.exp_avg_sq.bias", None),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_checkpoint_of_another_network(case: str) -> None:
    name, tensor = MISFITS[case]
    tensors = pack_training(*trained())
    unpack_training_(tensors, *trained())
    tensors = {key: value for key, value in tensors.items() if key != name} | (
        {name: tensor} if tensor is not None else {}
    )
    words = r"last\.safetensors: does not fit this network \(.*\); start the run again with --overwrite"
    refused(DataError, 3, words, lambda: unpack_training_(tensors, *trained()))
