"""Hostile images: each is read whole, or skipped and listed with a reason. Nothing else is raised, nothing waits.

Truncation, bombs and random damage of every format are in test_formats.
"""

from __future__ import annotations

import io
import json
import os
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.ImageFile
import pytest
from bad_machine import namespaces
from conftest import draw_image, picture
from hostile import assert_one_line, at_most
from PIL import Image
from tiny_runs import adapt, environment

from adaptkit.errors import DataError
from adaptkit.preflight.scan import look_at
from adaptkit.sources import BadImage, BadImages, decode, image_facts, open_folder, same_content, split


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


IMAGE = picture(40, 48)
FRAMES = {"save_all": True, "append_images": [IMAGE.transpose(Image.Transpose.ROTATE_180)]}
FORMATS = {kind: encode(IMAGE, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def with_chunk(inserted: bytes) -> bytes:
    """The PNG with something between header and pixels."""
    return FORMATS["PNG"][:33] + inserted + FORMATS["PNG"][33:]


def with_size(kind: str, width: int, height: int) -> bytes:
    """The header says so, the pixels are those of 48 x 40."""
    content = bytearray(FORMATS[kind])
    if kind == "JPEG":
        frame = content.index(b"\xff\xc0")
        content[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    elif kind == "PNG":
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif kind == "GIF":
        content[6:10] = struct.pack("<HH", width, height)
    else:
        content[18:26] = struct.pack("<ii", width, height)
    return bytes(content)


def zeros_from_half(kind: str) -> bytes:
    """A download that reserved its space on the disk and was never finished."""
    content = FORMATS[kind]
    return content[: len(content) // 2].ljust(len(content), b"\0")


def with_wrong_checksum() -> bytes:
    content = bytearray(FORMATS["PNG"])
    content[-13] ^= 1  # the last byte of the checksum of IDAT; IEND takes 12
    return bytes(content)


def endless_tiff() -> bytes:
    """A directory of tags that is followed by itself, and has no image."""
    return b"II*\0\x08\0\0\0" + struct.pack("<HHHIII", 1, 256, 4, 1, 48, 8)


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a readable image"),
    "one byte": (b"\xff", "not a readable image"),
    "text": (b"a cat sits on a mat\n" * 20, "not a readable image"),
    "a page that says 404": (b"<!doctype html><title>404</title>", "not a readable image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", "not a readable"),
    "postscript": (encode(IMAGE, "EPS"), "not a readable image"),
    "pdf": (encode(IMAGE, "PDF"), "not a readable image"),
    "photoshop": (b"8BPS\0\1" + bytes(40), "not a readable image"),
    "program": (b"\x7fELF" + bytes(60), "not a readable image"),
    "zip": (b"PK\3\4" + bytes(60), "not a readable image"),
    "NUL bytes": (bytes(4096), "not a readable image"),
    "only the start of a JPEG": (b"\xff\xd8\xff", "."),
    "a JPEG that ends at once": (b"\xff\xd8\xff\xd9", "."),
    "only the signature of a PNG": (b"\x89PNG\r\n\x1a\n", "."),
    "only the start of a GIF": (b"GIF89a", "."),
    "a GIF without frames": (FORMATS["GIF"][:13] + bytes(768) + b";", "."),
    "only the start of a BMP": (b"BM", "."),
    "only the start of a TIFF": (b"II*\0", "a TIFF that is damaged"),
    "a TIFF that follows itself": (endless_tiff(), "."),
    "only the start of a WebP": (b"RIFF\xff\xff\xff\xffWEBPVP8 ", "."),
    "PNG without pixels": (FORMATS["PNG"][:33] + chunk(b"IEND", b""), "."),
    "PNG with a wrong checksum": (with_wrong_checksum(), "damaged or cut off"),
    "PNG with a chunk of 4 GiB": (with_chunk(b"\xff\xff\xff\xfftEXt"), "."),
    "PNG of width 0": (with_size("PNG", 0, 40), "."),
    "PNG, second half zeros": (zeros_from_half("PNG"), "damaged or cut off"),
    "JPEG, second half zeros": (zeros_from_half("JPEG"), "truncated"),
    "GIF, second half zeros": (zeros_from_half("GIF"), "."),
    "JPEG of 30000 x 30000": (with_size("JPEG", 30_000, 30_000), "over the limit|bomb"),
    "PNG of 30000 x 30000": (with_size("PNG", 30_000, 30_000), "over the limit|bomb"),
    "GIF of 30000 x 30000": (with_size("GIF", 30_000, 30_000), "over the limit|bomb"),
    "BMP of 30000 x -30000": (with_size("BMP", 30_000, -30_000), "over the limit|bomb"),
    "PNG whose text unpacks to 200 MB": (
        with_chunk(chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000), 1))),
        "[Tt]oo large",
    ),
    "1 x 1": (encode(Image.new("RGB", (1, 1)), "PNG"), "1 x 1 px is too small"),
    "1 x 20000": (encode(Image.new("RGB", (1, 20_000)), "PNG"), "1 x 20000 px is too small"),
    "20000 x 1": (encode(Image.new("RGB", (20_000, 1)), "JPEG"), "20000 x 1 px is too small"),
    "8 x 20000": (encode(Image.new("RGB", (8, 20_000)), "JPEG"), "8 x 20000 px is too narrow"),
    "2,000,000 x 9": (encode(Image.new("1", (2_000_000, 9)), "PNG"), "2000000 x 9 px is too narrow"),
}


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_image_is_listed_with_a_reason(case: str, suffix: str, tmp_path: Path) -> None:
    content, reason = BAD[case]
    data = tmp_path / "data"
    data.mkdir()
    (data / f"bad.{suffix}").write_bytes(content)
    draw_image(0, 0).save(data / "good.png")
    source, bad = open_folder(data), BadImages(tmp_path / "bad_images.jsonl", 2, "1%")
    with pytest.raises(BadImage, match=reason) as caught, at_most(10):
        source.read(0)
    bad.add(caught.value.path, caught.value.reason)
    (line,) = map(json.loads, (tmp_path / "bad_images.jsonl").read_text().splitlines())
    assert line == {"path": f"bad.{suffix}", "reason": caught.value.reason}
    assert 0 < len(line["reason"]) <= 200
    assert line["reason"].isprintable()
    assert str(tmp_path) not in line["reason"]
    look = look_at(source, 0, has_twin=False)  # what `adaptkit check` says
    assert (look.path, look.reason) == (line["path"], line["reason"])
    assert source.read(1).size == (48, 48)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad_images.jsonl", "data"]


def exif(kind: int, value: bytes) -> bytes:
    """The orientation as a value of this TIFF type."""
    size = {2: 1, 3: 2}[kind]
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI4sI", 1, 0x0112, kind, len(value) // size, value, 0)


ORIENTATIONS = {
    "0": (3, b"\0\0"),
    "9": (3, b"\t\0"),
    "65535": (3, b"\xff\xff"),
    "a word": (2, b"six\0"),
}


GOOD: dict[str, bytes] = {
    **{f"orientation {name}": encode(IMAGE, "JPEG", exif=exif(*value)) for name, value in ORIENTATIONS.items()},
    "EXIF of noise in a PNG": encode(IMAGE, "PNG", exif=b"II*\0\xff\xff\xff\xff noise"),
    "EXIF of noise in a WebP": encode(IMAGE, "WEBP", lossless=True, exif=b"MM\0*\0\0\0\x08\xff\xff noise"),
    "EXIF that follows itself": encode(
        IMAGE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\1\0\x69\x87\4\0\1\0\0\0\x08\0\0\0"
    ),
    "ICC of noise in a JPEG": encode(IMAGE, "JPEG", icc_profile=b"noise" * 99),
    "ICC of noise in a PNG": encode(IMAGE, "PNG", icc_profile=b"noise" * 99),
    "ICC of noise in a TIFF": encode(IMAGE, "TIFF", icc_profile=b"noise" * 99),
    "ICC that does not unpack": with_chunk(chunk(b"iCCP", b"x\0\0 noise")),
    "animated GIF": encode(IMAGE, "GIF", **FRAMES),
    "animated WebP": encode(IMAGE, "WEBP", lossless=True, **FRAMES),
    "animated PNG": encode(IMAGE, "PNG", **FRAMES),
    "noise after a JPEG": FORMATS["JPEG"] + bytes(range(256)) * 40,
    "a zip after a PNG": FORMATS["PNG"] + b"PK\3\4" + bytes(300),
    "a script in a comment": encode(IMAGE, "GIF", comment=b"<?php system('id'); ?>"),
    "16-bit grey PNG": encode(Image.fromarray(np.asarray(IMAGE.convert("L")).astype(np.uint16) * 257), "PNG"),
    "float TIFF": encode(Image.fromarray(np.asarray(IMAGE.convert("L")).astype(np.float32)), "TIFF"),
    "CMYK TIFF": encode(IMAGE.convert("CMYK"), "TIFF"),
    "CMYK JPEG": encode(IMAGE.convert("CMYK"), "JPEG", quality=95),
    "narrow, but not too narrow": encode(IMAGE.resize((1600, 8)), "PNG"),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_odd_beside_the_pixels_is_no_matter(case: str, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(GOOD[case])
    pixels = np.asarray(decode(tmp_path / "x.jpg")).astype(int)
    expected = np.asarray(IMAGE if pixels.shape == (40, 48, 3) else IMAGE.resize((1600, 8))).astype(int)
    if "16-bit" in case or "float" in case:
        expected = np.asarray(IMAGE.convert("L").convert("RGB")).astype(int)
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < 15  # as stored, and not the second frame
    assert np.abs(pixels[-8:] - expected[-8:]).mean() < 20  # down to the last row


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_images_are_refused_also_where_other_code_asks_pil_to_fill_them(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    content, file = FORMATS[kind], tmp_path / "x"
    file.write_bytes(content)
    whole = np.asarray(decode(file))
    for percent in range(0, 100, 5):
        file.write_bytes(content[: len(content) * percent // 100])
        try:
            np.testing.assert_array_equal(np.asarray(decode(file)), whole)
            assert percent > 90
        except BadImage:
            pass
    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("kind", FORMATS)
def test_images_cut_at_any_offset_are_whole_or_refused(kind: str, tmp_path: Path) -> None:
    content, file = FORMATS[kind], tmp_path / "x"
    whole = np.asarray(IMAGE if kind in ("PNG", "BMP", "TIFF") else Image.open(io.BytesIO(content)).convert("RGB"))
    for end in {
        *range(0, 200, 7),
        *range(0, len(content), max(1, len(content) // 40)),
        *range(len(content) - 9, len(content)),
    }:
        file.write_bytes(content[:end])
        try:
            np.testing.assert_array_equal(np.asarray(decode(file)), whole)
        except BadImage as bad:
            assert bad.reason.isprintable()  # noqa: PT017


def test_damaged_tiffs_do_not_speak_to_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = bytearray(encode(IMAGE, "TIFF", compression="tiff_lzw"))
    content[8:200] = bytes(192)
    (tmp_path / "x.tif").write_bytes(content)
    with pytest.raises(BadImage):
        decode(tmp_path / "x.tif")
    assert tuple(capfd.readouterr()) == ("", "")


def test_folders_linked_in_a_circle_are_listed_once(tmp_path: Path) -> None:
    (tmp_path / "data" / "a").mkdir(parents=True)
    draw_image(0, 0).save(tmp_path / "data" / "a" / "0.jpg")
    for name, target in (("a/up", ".."), ("a/self", "self"), ("b", "a"), ("c", "d"), ("d", "c")):
        (tmp_path / "data" / name).symlink_to(target)
    with at_most(5):
        source = open_folder(tmp_path / "data")
    assert [source.path(index) for index in range(len(source))] == ["a/0.jpg"]


def test_threads_put_the_global_of_pil_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    (tmp_path / "x.png").write_bytes(FORMATS["PNG"][:-1000])
    (tmp_path / "y.png").write_bytes(FORMATS["PNG"])

    def is_bad(name: str) -> bool:
        try:
            decode(tmp_path / name)
        except BadImage:
            return True
        return False

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(is_bad, ["x.png", "y.png"] * 50)) == [True, False] * 50
    assert PIL.ImageFile.LOAD_TRUNCATED_IMAGES is True


NAMES = {
    "a line break": "a\nerror: all is lost.jpg",
    "a carriage return": "a\rb.jpg",
    "a tab": "a\tb.jpg",
    "quotes": "\"a' b`.jpg",
    "an escape sequence": "a\x1b[31mred\x1b[0m.jpg",
    "emoji": "\N{CAT FACE}\N{ZERO WIDTH JOINER}.jpg",
    "right to left": "a\N{RIGHT-TO-LEFT OVERRIDE}gpj.exe.jpg",
    "not UTF-8": os.fsdecode(b"caf\xe9\xff.jpg"),
    "an option": "--output=x.jpg",
    "a variable": "$HOME;{0}%s<b>.jpg",
    "a backslash": "a\\..\\..\\x.jpg",
    "250 letters": "x" * 246 + ".jpg",
    "JSON": '","reason":"","x":".jpg',
}


@pytest.mark.parametrize("case", NAMES)
def test_any_name_is_read_listed_and_shown_on_one_line(case: str, tmp_path: Path) -> None:
    name, data, listed = NAMES[case], tmp_path / "data", tmp_path / "bad_images.jsonl"
    for folder in ("bad", "good"):
        (data / folder).mkdir(parents=True)
    (data / "bad" / name).write_bytes(b"no image")
    (data / "good" / name).write_bytes(FORMATS["JPEG"])
    source = open_folder(data)
    assert source.read(1).size == (48, 40)
    with pytest.raises(BadImage) as caught:
        source.read(0)
    assert str(caught.value).isprintable()
    bad = BadImages(listed, 100, "1%")
    bad.add(caught.value.path, caught.value.reason)
    assert BadImages(listed, 100, "1%").paths == {f"bad/{name}"}
    with pytest.raises(DataError) as too_many:
        bad.add_all((f"{index}{name}", "damaged") for index in range(9))
    assert str(too_many.value).isprintable()
    assert_one_line(too_many.value)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:  # its path must be short
        folder = os.open(path.parent, os.O_RDONLY)
        listener.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "pipe": fifo,
    "socket": unix_socket,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "empty device": lambda path: path.symlink_to("/dev/null"),
    "full device": lambda path: path.symlink_to("/dev/full"),
    "folder": Path.mkdir,
    "link to a folder": lambda path: path.symlink_to("/proc/self/fd"),
}
LINKS: dict[str, Callable[[Path], None]] = {
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nowhere": lambda path: path.symlink_to("nowhere.jpg"),
    "link through a file": lambda path: path.symlink_to("a.jpg/b.jpg"),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_what_is_no_file_is_never_waited_for(case: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    draw_image(0, 0).save(data / "a.jpg")
    SPECIAL[case](data / "x.jpg")
    with at_most(5):
        if case != "link to a folder":  # what lies behind it is somebody else's
            assert [open_folder(data).path(index) for index in range(len(open_folder(data)))] == ["a.jpg"]
        for read in (decode, image_facts):
            with pytest.raises(BadImage, match="is a directory, a pipe or a device, not a file"):
                read(data / "x.jpg")


@pytest.mark.parametrize("case", LINKS)
def test_a_link_that_leads_nowhere_is_listed(case: str, tmp_path: Path) -> None:
    draw_image(0, 0).save(tmp_path / "a.jpg")
    LINKS[case](tmp_path / "x.jpg")
    source = open_folder(tmp_path)
    assert [source.path(index) for index in range(len(source))] == ["a.jpg", "x.jpg"]
    with pytest.raises(BadImage, match=r"No such file|Too many levels|Not a directory"):
        source.read(1)


CHANGES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: None,
    "emptied": Path.touch,
    "cut off": lambda path: path.write_bytes(FORMATS["JPEG"][:400]),
    "overwritten": lambda path: path.write_text("no image"),
    **SPECIAL,
    **LINKS,
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_file_that_changes_after_the_scan_is_bad(case: str, tmp_path: Path) -> None:
    for name in ("a.jpg", "x.jpg"):
        (tmp_path / name).write_bytes(FORMATS["JPEG"])
    source = open_folder(tmp_path)
    (tmp_path / "x.jpg").unlink()
    CHANGES[case](tmp_path / "x.jpg")
    with at_most(5):
        with pytest.raises(BadImage) as caught:
            source.read(1)
        assert caught.value.path == "x.jpg"
        assert look_at(source, 1, has_twin=True).reason == caught.value.reason
        assert same_content(source, [source.subset(np.array([0]))]).tolist() == [0]


def test_a_file_that_grows_after_the_scan_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(FORMATS["JPEG"][:400])
    source = open_folder(tmp_path)
    (tmp_path / "x.jpg").write_bytes(FORMATS["JPEG"] + bytes(5000))
    assert source.read(0).size == (48, 40)


FORBIDDEN = """
import sys
from pathlib import Path
from adaptkit.backbones.reading import read_weights
from adaptkit.cli.failure import describe
from adaptkit.recipe import load_recipe
from adaptkit.sources import BadImage, decode, open_labelled

mine = Path(sys.argv[1])
for read in (decode, open_labelled, load_recipe, read_weights):
    for path in sorted(mine.glob(f"{read.__name__}.*")):
        path.chmod(0)
        try:
            read(path)
        except BadImage as bad:
            print(path.name, "bad", bad.reason)
        except Exception as error:
            print(path.name, describe(error).exit_code, describe(error).message.removeprefix(f"{path}: "))
"""


def test_files_that_may_not_be_read(tmp_path: Path) -> None:
    for name in ("decode.jpg", "open_labelled.csv", "load_recipe.yaml", "read_weights.pth", "read_weights.safetensors"):
        (tmp_path / name).write_bytes(b"")
    inside = namespaces() if os.geteuid() == 0 else []  # root reads everything, unless it gives that up
    words = [*inside, sys.executable, "-c", FORBIDDEN, str(tmp_path)]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200, check=True)
    permission = "cannot be read (Permission denied)"
    assert done.stdout.splitlines() == [
        "decode.jpg bad Permission denied",
        f"open_labelled.csv 3 {permission}",
        "load_recipe.yaml 2 cannot be read as a recipe, which is a YAML file; check the path",
        f"read_weights.pth 8 {permission}; check the permissions",
        f"read_weights.safetensors 8 {permission}; check the permissions",
    ]


def test_one_image_is_too_few(tmp_path: Path) -> None:
    draw_image(0, 0).save(tmp_path / "a.jpg")
    with pytest.raises(DataError, match="at least 8 are needed"):
        split(open_folder(tmp_path), "file")


@pytest.mark.long
@pytest.mark.parametrize("case", ["all alike", "all black"])
def test_images_without_any_difference_do_not_break_a_run(case: str, vit: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for index in range(16):
        image = draw_image(0, 0) if case == "all alike" else Image.new("RGB", (48, 48))
        image.save(data / f"{index}.png")
    result = adapt(vit, data, tmp_path / "run", steps=2)
    assert result.verdict in ("unchanged", "kept_original")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "run"]
