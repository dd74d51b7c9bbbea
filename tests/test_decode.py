"""Decoding: whole, upright, 8-bit RGB images, or a `BadImage` with the reason."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from adaptkit.errors import Interrupted
from adaptkit.sources import BadImage, decode
from adaptkit.sources import decoding as decoding_module


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(7).integers(0, 256, (height, width, channels), dtype=np.uint8)


def gradient(width: int, height: int) -> Image.Image:
    """Bright at the right and red at the bottom, so that every orientation looks different."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([y, x, x], axis=-1).astype(np.uint8))


def jpeg_bytes(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 0.5, 0.8, 0.95, 0.995])
def test_truncated_jpeg_is_bad(tmp_path: Path, share: float, progressive: bool) -> None:
    content = jpeg_bytes(Image.fromarray(noise(96, 128)), progressive=progressive)
    file = tmp_path / "cut.jpg"
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BadImage) as caught:
        decode(file)
    assert caught.value.path == str(file)
    assert str(tmp_path) not in caught.value.reason
    assert 0 < len(caught.value.reason) < 100


def test_truncated_large_jpeg_is_bad_although_drafted(tmp_path: Path) -> None:
    content = jpeg_bytes(gradient(1800, 1800))
    file = tmp_path / "cut.jpg"
    file.write_bytes(content[: len(content) * 9 // 10])
    with pytest.raises(BadImage, match="truncated"):
        decode(file)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.95])
def test_truncated_png_is_bad(tmp_path: Path, share: float) -> None:
    file = tmp_path / "cut.png"
    Image.fromarray(noise(64, 64)).save(file)
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
    with pytest.raises(BadImage):
        decode(file)


@pytest.mark.parametrize("width_height", [(1792, 1000), (1000, 1792), (896, 896), (4000, 1900)])
def test_large_jpeg_is_drafted_and_stays_at_least_448(tmp_path: Path, width_height: tuple[int, int]) -> None:
    width, height = width_height
    gradient(width, height).save(tmp_path / "large.jpg", quality=90)
    image = decode(tmp_path / "large.jpg")
    assert 448 <= min(image.size) < 896
    assert image.width / image.height == pytest.approx(width / height, rel=0.01)
    full = np.asarray(gradient(*image.size), dtype=np.float32)
    assert np.abs(np.asarray(image, dtype=np.float32) - full).mean() < 3  # the same picture, not a crop of it


def test_draft_happens_in_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts: list[tuple[int, int]] = []
    original = JpegImageFile.draft

    def spy(self: JpegImageFile, mode: str | None, size: tuple[int, int]) -> object:
        answer = original(self, mode, size)
        drafts.append(self.size)
        return answer

    monkeypatch.setattr(JpegImageFile, "draft", spy)
    for width, height in ((895, 2000), (900, 1000)):
        gradient(width, height).save(tmp_path / "x.jpg")
        decode(tmp_path / "x.jpg")
    assert drafts == [(450, 500)]


def test_large_png_keeps_its_size(tmp_path: Path) -> None:
    gradient(1000, 900).save(tmp_path / "x.png")
    assert decode(tmp_path / "x.png").size == (1000, 900)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_agrees_with_pil_and_is_applied_once(tmp_path: Path, orientation: int) -> None:
    file = tmp_path / "x.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    gradient(60, 40).save(file, exif=exif, quality=95)
    image = decode(file)
    with Image.open(file) as raw:
        expected = ImageOps.exif_transpose(raw).convert("RGB")
    assert image.size == ((40, 60) if orientation >= 5 else (60, 40))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(image)), np.asarray(image))


def test_orientation_of_a_drafted_jpeg(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    gradient(1200, 1000).save(tmp_path / "x.jpg", exif=exif)
    assert decode(tmp_path / "x.jpg").size == (500, 600)


def test_damaged_exif_does_not_lose_the_image(tmp_path: Path) -> None:
    gradient(60, 40).save(tmp_path / "x.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "x.jpg").size == (60, 40)


def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    pixels = np.asarray(decode(tmp_path / "deep.png"))
    np.testing.assert_array_equal(pixels, np.repeat(np.round(levels / 257)[..., None], 3, axis=-1))
    assert 0.45 < (pixels < 128).mean() < 0.55  # clipped to white, nearly every pixel would be 255


def test_16_bit_colour_is_scaled_not_clipped(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = b"\0" + struct.pack(">HHH", 0, 32768, 65535) * 16
    header = struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(row * 16)), chunk(b"IEND", b"")
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert decode(tmp_path / "deep.png").getpixel((3, 3)) == (0, 128, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA"])
def test_png_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    gradient(32, 24).convert("RGBA").convert(mode).save(tmp_path / "x.png")
    image = decode(tmp_path / "x.png")
    assert (image.mode, image.size) == ("RGB", (32, 24))
    assert len(np.unique(np.asarray(image))) > 1


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    layer = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    layer.paste((200, 0, 0, 255), (0, 0, 8, 16))
    layer.save(tmp_path / "rgba.png")
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.paste(1, (0, 0, 8, 16))
    palette.save(tmp_path / "palette.png", transparency=0)
    for name in ("rgba.png", "palette.png"):
        image = decode(tmp_path / name)
        assert image.getpixel((12, 8)) == (255, 255, 255)
        assert image.getpixel((4, 8)) == (200, 0, 0)


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    gradient(1000, 950).convert(mode).save(tmp_path / "x.jpg", quality=95)
    image = decode(tmp_path / "x.jpg")
    assert image.mode == "RGB"
    expected = np.asarray(gradient(*image.size).convert(mode).convert("RGB"), dtype=np.float32)
    assert np.abs(np.asarray(image, dtype=np.float32) - expected).mean() < 3


def test_misnamed_file_is_read_by_content_but_only_safe_formats(tmp_path: Path) -> None:
    gradient(32, 32).save(tmp_path / "really_png.jpg", format="PNG")
    assert decode(tmp_path / "really_png.jpg").size == (32, 32)
    gradient(32, 32).save(tmp_path / "really_eps.jpg", format="EPS")
    with pytest.raises(BadImage, match="not a readable image file"):
        decode(tmp_path / "really_eps.jpg")


def test_small_image_is_bad(tmp_path: Path) -> None:
    gradient(100, 7).save(tmp_path / "x.png")
    with pytest.raises(BadImage, match=r"100 x 7 px is too small, at least 8 px"):
        decode(tmp_path / "x.png")
    assert decode(tmp_path / "x.png", min_side=7).size == (100, 7)


@pytest.mark.parametrize("pil_limit", [None, Image.MAX_IMAGE_PIXELS])
def test_decompression_bomb_is_refused_whatever_pil_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pil_limit: int | None
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pil_limit)
    content = bytearray(jpeg_bytes(gradient(64, 64)))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    (tmp_path / "bomb.jpg").write_bytes(content)
    with pytest.raises(BadImage, match=r"60000 x 60000|decompression bomb"):
        decode(tmp_path / "bomb.jpg")


def test_large_but_allowed_image_does_not_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)  # PIL warns above its limit, raises above twice that
    gradient(64, 64).save(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode(tmp_path / "x.png").size == (64, 64)


def test_missing_file_empty_file_and_folder_are_bad(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in (("no.jpg", "No such file"), ("empty.jpg", "not a readable image"), ("folder.jpg", "director")):
        with pytest.raises(BadImage, match=reason):
            decode(tmp_path / name)


def test_an_interruption_is_not_taken_for_a_bad_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise Interrupted("stopped")

    gradient(32, 32).save(tmp_path / "x.png")
    monkeypatch.setattr(decoding_module, "to_rgb", interrupt)
    with pytest.raises(Interrupted):
        decode(tmp_path / "x.png")


def test_bad_image_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadImage("a/b.jpg", "truncated")))
    assert (error.path, error.reason, str(error)) == ("a/b.jpg", "truncated", "a/b.jpg: truncated")
