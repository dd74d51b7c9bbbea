"""Every format by suffix and by content: depth, transparency, orientation, first frame, bombs, truncation, damage."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from PIL import Image, ImageOps

from adaptkit.sources import BadImage, ImageFacts, decode, image_facts, open_folder
from adaptkit.sources.scan import SUFFIXES

RNG = np.random.default_rng(11)
SHORT, LONG = 3, 4  # TIFF types


def tiff(
    pixels: np.ndarray,
    *,
    order: str = "<",
    deflate: bool = False,
    planes: bool = False,
    photometric: int | None = None,
    rows: int = 5,
    tags: Sequence[tuple[int, int, list[int]]] = (),
) -> bytes:
    """(H, W) or (H, W, C) as a TIFF of strips; `tags` are added, or replace those of the same number."""
    cube = np.atleast_3d(pixels)
    height, width, channels = cube.shape
    strips = []
    for plane in [cube[..., [index]] for index in range(channels)] if planes else [cube]:
        for top in range(0, height, rows):
            strip = plane[top : top + rows].astype(cube.dtype.newbyteorder(order)).tobytes()
            strips.append(zlib.compress(strip) if deflate else strip)
    fields = {
        256: (LONG, [width]),
        257: (LONG, [height]),
        258: (SHORT, [cube.dtype.itemsize * 8] * channels),
        259: (SHORT, [8 if deflate else 1]),
        262: (SHORT, [photometric if photometric is not None else 2 if channels >= 3 else 1]),
        273: (LONG, [0] * len(strips)),
        277: (SHORT, [channels]),
        278: (LONG, [rows]),
        279: (LONG, [len(strip) for strip in strips]),
        284: (SHORT, [2 if planes else 1]),
        339: (SHORT, [{"u": 1, "i": 2, "f": 3}[cube.dtype.kind]] * channels),
    }
    fields.update({number: (kind, values) for number, kind, values in tags})
    start = 8 + 2 + 12 * len(fields) + 4
    long_values = sum(len(values) * 4 for _, values in fields.values())
    offsets = np.cumsum([start + long_values, *map(len, strips)])[:-1]
    fields[273] = LONG, offsets.tolist()
    entries, beyond = b"", b""
    for number, (kind, values) in sorted(fields.items()):
        content = struct.pack(f"{order}{len(values)}{'H' if kind == SHORT else 'I'}", *values)
        if len(content) > 4:
            beyond, content = beyond + content, struct.pack(f"{order}I", start + len(beyond))
        entries += struct.pack(f"{order}HHI", number, kind, len(values)) + content.ljust(4, b"\0")
    head = struct.pack(f"{order}2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(fields))
    return head + entries + b"\0" * 4 + beyond.ljust(long_values, b"\0") + b"".join(strips)


def png(pixels: np.ndarray, colour_type: int) -> bytes:
    """(H, W, C) uint16 as a 16-bit PNG, which PIL cannot write in colour."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(folder: Path, content: bytes, **options: object) -> np.ndarray:
    (folder / "x.bin").write_bytes(content)
    return np.asarray(decode(folder / "x.bin", **options))


def grey(levels: np.ndarray) -> np.ndarray:
    """(H, W) of 0..255 as the RGB image that is expected."""
    return np.repeat(np.rint(levels)[..., None], 3, axis=-1).astype(np.uint8)


def stretched(levels: np.ndarray, low: float, high: float) -> np.ndarray:
    share = (levels.astype(np.float64) - float(low)) / (float(high) - float(low))
    return np.rint(share.clip(0, 1) * 255).astype(np.uint8)


def every_format() -> dict[str, bytes]:
    """A picture in all the formats, codecs and modes that are read."""
    image = picture(40, 48)
    frames = {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    pixels = np.asarray(image)
    deep = np.asarray(image.convert("L")).astype(np.uint16) * 200
    files = {
        "jpeg": encode(image, "JPEG"),
        "jpeg progressive": encode(image, "JPEG", progressive=True),
        "jpeg cmyk": encode(image.convert("CMYK"), "JPEG"),
        "png": encode(image, "PNG"),
        "png palette": encode(image.quantize(16), "PNG", transparency=3),
        "png 16": png(pixels.astype(np.uint16) * 257, 2),
        "webp": encode(image, "WEBP"),
        "webp lossless": encode(image, "WEBP", lossless=True),
        "webp frames": encode(image, "WEBP", **frames),
        "bmp": encode(image, "BMP"),
        "bmp palette": encode(image.quantize(16), "BMP"),
        "gif": encode(image, "GIF"),
        "gif frames": encode(image, "GIF", **frames),
        "tiff frames": encode(image, "TIFF", **frames),
        "tiff ycbcr": encode(image.convert("YCbCr"), "TIFF", compression="tiff_lzw"),
        "tiff planes": tiff(pixels, planes=True),
        "tiff lab": tiff(pixels, photometric=8),
        "tiff 16": tiff(deep, order=">", deflate=True),
        "tiff float": tiff(deep.astype(np.float32), order=">"),
    }
    for codec in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        files[f"tiff {codec}"] = encode(image, "TIFF", compression=codec)
    for codec in ("group3", "group4"):
        files[f"tiff {codec}"] = encode(image.convert("1"), "TIFF", compression=codec)
    return files


EVERY = every_format()


@pytest.mark.parametrize("suffix", [suffix.decode() for suffix in SUFFIXES])
def test_every_suffix_is_found_and_read(tmp_path: Path, suffix: str) -> None:
    picture(40, 48).save(tmp_path / f"x{suffix.upper()}", quality=95)
    image = open_folder(tmp_path).read(0)
    assert (image.mode, image.size) == ("RGB", (48, 40))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(picture(40, 48))).mean() < 12


def test_content_decides_not_the_suffix(tmp_path: Path) -> None:
    for kind in ("TIFF", "WEBP", "GIF", "BMP"):
        (tmp_path / "x.jpg").write_bytes(encode(picture(20, 30), kind))
        assert decode(tmp_path / "x.jpg").size == (30, 20)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflate", [False, True])
def test_deep_grey_tiff_is_scaled_in_either_byte_order(tmp_path: Path, order: str, deflate: bool) -> None:
    storage = {"order": order, "deflate": deflate}
    unsigned = RNG.integers(0, 65536, (12, 10), dtype=np.uint16)
    signed = RNG.integers(-32768, 32768, (12, 10), dtype=np.int16)
    long = RNG.integers(-(2**31), 2**31, (12, 10), dtype=np.int32)
    small = RNG.integers(0, 200, (12, 10), dtype=np.int32)
    share = RNG.random((12, 10)).astype(np.float32)
    for pixels, expected in (
        (unsigned, unsigned / 257),
        (signed, (signed + 32768.0) / 257),
        (long, stretched(long, long.min(), long.max())),
        (small, small),
        (share, share * 255),
    ):
        np.testing.assert_array_equal(decoded(tmp_path, tiff(pixels, **storage)), grey(expected))
    inverted = decoded(tmp_path, tiff(share, photometric=0, **storage))
    np.testing.assert_array_equal(inverted, 255 - grey(share * 255))


def test_unsigned_32_bit_and_white_is_zero(tmp_path: Path) -> None:
    long = RNG.integers(0, 2**32, (12, 10), dtype=np.uint32)  # PIL reads half of them as negative
    np.testing.assert_array_equal(decoded(tmp_path, tiff(long)), grey(stretched(long, long.min(), long.max())))
    deep = RNG.integers(0, 65536, (12, 10), dtype=np.uint16)
    np.testing.assert_array_equal(decoded(tmp_path, tiff(deep, photometric=0)), 255 - grey(deep / 257))
    np.testing.assert_array_equal(
        decoded(tmp_path, tiff((deep >> 8).astype(np.uint8), photometric=0))[0, 0, 0], 255 - (deep[0, 0] >> 8)
    )


def test_12_bit_tiff_is_scaled_by_12_bits(tmp_path: Path) -> None:
    levels = np.tile(np.array([300, 3000, 2048, 1024], dtype=np.uint16), (8, 2))
    packed = [f"{level:012b}" for level in levels.ravel()]
    octets = np.frombuffer(int("".join(packed), 2).to_bytes(len(packed) * 12 // 8, "big"), dtype=np.uint8)
    content = tiff(octets.reshape(8, 12), rows=8, tags=[(256, LONG, [8]), (258, SHORT, [12])])
    np.testing.assert_array_equal(decoded(tmp_path, content), grey(levels / 4095 * 255))
    assert image_facts(tmp_path / "x.bin").bits == 12


def test_large_deep_images_are_scaled_to_the_last_row(tmp_path: Path) -> None:
    levels = RNG.integers(0, 65536, (700, 10), dtype=np.uint16)
    np.testing.assert_array_equal(decoded(tmp_path, tiff(levels, rows=700)), grey(levels / 257))


@pytest.mark.parametrize(
    ("low", "high", "black", "white"),
    [(0, 1, 0, 1), (0.2, 0.7, 0, 1), (0, 1.001, 0, 255), (3, 250, 0, 255), (-0.1, 1, -0.1, 1), (0, 4000, 0, 4000)],
)
def test_floats_are_scaled_by_the_range_they_lie_in(
    tmp_path: Path, low: float, high: float, black: float, white: float
) -> None:
    levels = np.linspace(low, high, 120, dtype=np.float32).reshape(12, 10)
    expected = grey(stretched(levels, np.float32(black), np.float32(white)))
    np.testing.assert_array_equal(decoded(tmp_path, tiff(levels)), expected)


@pytest.mark.parametrize("scale", ["range", "percentile"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pixels_that_are_no_numbers_are_bad(tmp_path: Path, value: float, scale: str) -> None:
    levels = np.ones((12, 10), dtype=np.float32)
    levels[3, 4] = value
    with pytest.raises(BadImage, match="NaN or infinite"):
        decoded(tmp_path, tiff(levels), scale=scale)


@pytest.mark.parametrize("scale", ["range", "percentile"])
@pytest.mark.parametrize("kind", [np.uint16, np.int16, np.int32, np.float32])
@pytest.mark.parametrize("value", [0, 700])
def test_constant_images_do_not_divide_by_zero(tmp_path: Path, value: int, kind: type, scale: str) -> None:
    pixels = decoded(tmp_path, tiff(np.full((12, 10), value, dtype=kind)), scale=scale)
    assert len(np.unique(pixels)) == 1
    colour = decoded(tmp_path, tiff(np.full((12, 10, 3), value, dtype=np.uint16)), scale=scale)
    assert len(np.unique(colour)) == 1


@pytest.mark.parametrize("order", "<>")
def test_percentile_stretches_12_bits_stored_in_16(tmp_path: Path, order: str) -> None:
    levels = RNG.integers(500, 4096, (40, 30), dtype=np.uint16)
    levels[0, 0] = 65535  # a dead pixel decides nothing
    low, high = np.sort(levels.ravel())[[12, 1187]]  # of 1,200
    for content in (tiff(levels, order=order), tiff(levels, order=order, deflate=True), png(levels[..., None], 0)):
        pixels = decoded(tmp_path, content, scale="percentile")
        np.testing.assert_array_equal(pixels, grey(stretched(levels, low, high)))
        assert decoded(tmp_path, content).max() == 255
        assert np.median(decoded(tmp_path, content)) < 16
    inverted = decoded(tmp_path, tiff(levels, photometric=0), scale="percentile")
    np.testing.assert_array_equal(inverted, 255 - grey(stretched(levels, low, high)))


def test_percentile_stretches_colour_jointly_and_with_all_16_bits(tmp_path: Path) -> None:
    colour = RNG.integers(0, 4096, (20, 30, 3), dtype=np.uint16)
    colour[..., 2] //= 4  # blue stays darker than the others
    low, high = np.percentile(colour, (1, 99), method="nearest")
    expected = stretched(colour, low, high)
    files = [tiff(colour, order=order, deflate=deflate) for order in "<>" for deflate in (False, True)]
    for content in (*files, png(colour, 2)):
        np.testing.assert_array_equal(decoded(tmp_path, content, scale="percentile"), expected)
        np.testing.assert_array_equal(decoded(tmp_path, content), colour >> 8)


def test_percentile_looks_at_what_is_not_transparent(tmp_path: Path) -> None:
    layer = RNG.integers(1000, 4096, (20, 30, 4), dtype=np.uint16)
    layer[..., 3] = 65535
    layer[:10] = 0
    low, high = np.percentile(layer[10:, :, :3], (1, 99), method="nearest")
    for content in (png(layer, 6), tiff(layer, tags=[(338, SHORT, [2])])):
        pixels = decoded(tmp_path, content, scale="percentile")
        np.testing.assert_array_equal(pixels[10:], stretched(layer[10:, :, :3], low, high))
        assert (pixels[:10] == 255).all()
    assert decoded(tmp_path, png(np.zeros((20, 30, 4), dtype=np.uint16), 6), scale="percentile").min() == 255


def test_percentile_keeps_a_few_bright_spots_on_black(tmp_path: Path) -> None:
    levels = np.zeros((40, 40), dtype=np.uint16)
    levels[5, 5:8] = 100, 200, 400
    pixels = decoded(tmp_path, tiff(levels), scale="percentile")
    assert pixels[5, 5:8, 0].tolist() == [64, 128, 255]


def test_percentile_leaves_8_bits_alone(tmp_path: Path) -> None:
    dull = Image.fromarray(np.asarray(picture(30, 40)) // 4 + 60)
    for kind in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"):
        content = encode(dull, kind)
        np.testing.assert_array_equal(decoded(tmp_path, content, scale="percentile"), decoded(tmp_path, content))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_transparency_is_laid_over_white(tmp_path: Path, kind: str) -> None:
    layer = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    layer.paste((200, 0, 0, 255), (0, 0, 8, 16))
    files = [encode(layer, kind, **({"lossless": True} if kind == "WEBP" else {}))]
    if kind in ("PNG", "TIFF"):
        files.append(encode(layer.convert("LA"), kind))
    for content in files:
        pixels = decoded(tmp_path, content)
        assert (pixels[:, 10:] == 255).all()
        assert pixels[8, 4].max() < 210


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_tiff_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    image = picture(24, 32).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    for codec in ("raw", "tiff_adobe_deflate")[mode == "YCbCr" :]:  # raw YCbCr: not before Pillow 13
        pixels = decoded(tmp_path, encode(image, "TIFF", compression=codec))
        assert np.abs(pixels.astype(int) - expected).max() <= 2  # libtiff converts YCbCr itself


@pytest.mark.parametrize("deflate", [False, True])
def test_lab_tiff_becomes_rgb(tmp_path: Path, deflate: bool) -> None:
    colours = [(100, 0, 0), (0, 0, 0), (53.59, 0, 0), (54.29, 80.80, 69.89), (87.82, -79.27, 80.99)]  # CIE, D50
    expected = [(255, 255, 255), (0, 0, 0), (128, 128, 128), (255, 0, 0), (0, 255, 0)]
    stored = [[round(light * 2.55), round(a) % 256, round(b) % 256] for light, a, b in colours]
    content = tiff(np.array([stored] * 8, dtype=np.uint8), photometric=8, deflate=deflate)
    difference = decoded(tmp_path, content, min_side=5).astype(int) - np.array(expected)
    assert np.abs(difference[:, :3]).max() <= 1
    assert np.abs(difference).max() <= 16  # at the rim of what sRGB can show


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("TIFF", "RGB", {}),
        ("TIFF", "L", {}),  # PIL scrambles these when it maps the file into memory
        ("TIFF", "I;16", {}),
        ("TIFF", "F", {}),
        ("TIFF", "L", {"compression": "tiff_lzw"}),
        ("TIFF", "I;16", {"compression": "tiff_lzw"}),
    ],
)
def test_orientation_is_applied_once(
    tmp_path: Path, kind: str, mode: str, options: dict[str, object], orientation: int
) -> None:
    image = picture(40, 60)
    levels = np.asarray(image.convert("L"))
    stored = {
        "RGB": image,
        "L": image.convert("L"),
        "I;16": Image.fromarray(levels.astype(np.uint16) * 257),
        "F": Image.fromarray(levels.astype(np.float32)),
    }[mode]
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = image if mode == "RGB" else image.convert("L").convert("RGB")
    expected.getexif()[0x0112] = orientation
    (tmp_path / "x").write_bytes(encode(stored, kind, exif=exif, **options))
    answer = decode(tmp_path / "x")
    np.testing.assert_array_equal(np.asarray(answer), np.asarray(ImageOps.exif_transpose(expected)))
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(answer)), np.asarray(answer))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG"])
def test_the_first_frame_counts(tmp_path: Path, kind: str) -> None:
    first, second = Image.new("RGB", (20, 30), (250, 0, 0)), Image.new("RGB", (20, 30), (0, 0, 250))
    pixels = decoded(tmp_path, encode(first, kind, save_all=True, append_images=[second, first]))
    assert pixels.shape == (30, 20, 3)
    assert pixels[..., 0].min() > 240
    assert image_facts(tmp_path / "x.bin").more_frames


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (encode(picture(40, 48), "JPEG"), ImageFacts(48, 40, "RGB", 8, "JPEG", False)),
        (encode(picture(2000, 1000), "JPEG"), ImageFacts(1000, 2000, "RGB", 8, "JPEG", False)),
        (encode(picture(40, 48).convert("1"), "PNG"), ImageFacts(48, 40, "1", 1, "PNG", False)),
        (encode(picture(40, 48).convert("P"), "GIF"), ImageFacts(48, 40, "P", 8, "GIF", False)),
        (encode(picture(40, 48), "WEBP"), ImageFacts(48, 40, "RGB", 8, "WEBP", False)),
        (encode(picture(40, 48), "BMP"), ImageFacts(48, 40, "RGB", 8, "BMP", False)),
        (encode(picture(3, 2), "TIFF"), ImageFacts(2, 3, "RGB", 8, "TIFF", False)),
        (png(np.zeros((9, 8, 3), np.uint16), 2), ImageFacts(8, 9, "RGB", 16, "PNG", False)),
        (png(np.zeros((9, 8, 1), np.uint16), 0), ImageFacts(8, 9, "I;16", 16, "PNG", False)),
        (tiff(np.zeros((9, 8), np.float32)), ImageFacts(8, 9, "F", 32, "TIFF", False)),
        (tiff(np.zeros((9, 8, 4), np.uint16), deflate=True), ImageFacts(8, 9, "RGBA", 16, "TIFF", False)),
    ],
)
def test_facts_come_from_the_header(tmp_path: Path, content: bytes, facts: ImageFacts) -> None:
    (tmp_path / "x").write_bytes(content)
    assert image_facts(tmp_path / "x") == facts


def test_a_preview_inside_a_jpeg_is_no_further_frame(tmp_path: Path) -> None:
    image = picture(1000, 950)
    (tmp_path / "x").write_bytes(encode(image, "MPO", save_all=True, append_images=[image.resize((95, 100))]))
    assert image_facts(tmp_path / "x") == ImageFacts(950, 1000, "RGB", 8, "JPEG", False)
    assert decode(tmp_path / "x").size == (475, 500)


def test_16_bits_a_pixel_are_not_16_bits_a_channel(tmp_path: Path) -> None:
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    header = struct.pack("<2sIHHI", b"BM", 66 + 8 * 16, 0, 0, 66)
    header += struct.pack("<IiiHHIIiiII", 40, 8, 8, 1, 16, 3, 0, 0, 0, 0, 0)
    assert (decoded(tmp_path, header + masks + b"\xff\xff" * 64, scale="percentile") == 255).all()
    assert image_facts(tmp_path / "x.bin").bits == 8


def test_facts_of_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    for name, reason in (("text.jpg", "not a readable image file"), ("gone.jpg", "No such file or directory")):
        with pytest.raises(BadImage) as caught:
            image_facts(tmp_path / name)
        assert (caught.value.path, caught.value.reason) == (str(tmp_path / name), reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(np.zeros((9, 8, 3), np.uint16), planes=True), "RGB in separate planes is not supported"),
        (tiff(np.zeros((9, 8, 3), np.uint8), planes=True, photometric=8), "LAB in separate planes"),
        (tiff(np.zeros((9, 8), np.int8)), "signed 8-bit pixels is not supported"),
        (tiff(np.zeros((9, 8), np.uint8), tags=[(259, SHORT, [32809])]), "compression tiff_thunderscan is not supp"),
        (tiff(np.zeros((9, 8, 3), np.uint8), tags=[(259, SHORT, [6])]), "compression tiff_jpeg is not supported"),
        (tiff(np.zeros((9, 8), np.float64)), "a TIFF that is damaged, or neither grey nor RGB"),
        (tiff(np.zeros((9, 8, 7), np.uint8)), "a TIFF that is damaged, or neither grey nor RGB"),
    ],
)
def test_tiffs_that_would_come_out_as_noise_are_refused(
    tmp_path: Path, content: bytes, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.tif").write_bytes(content)
    for read in (decode, image_facts):
        with pytest.raises(BadImage, match=reason):
            read(tmp_path / "x.tif")
    assert capfd.readouterr() == ("", "")


def test_remarks_of_pil_do_not_reach_the_terminal() -> None:
    handlers = logging.getLogger("PIL").handlers
    assert any(isinstance(handler, logging.NullHandler) for handler in handlers)  # without, Python prints them


def test_tags_of_maps_are_no_matter(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tags = [(33550, LONG, [1, 2, 3]), (34735, SHORT, [1, 1, 0, 1, 1024, 0, 1, 1]), (65000, LONG, [7] * 9)]
    levels = RNG.integers(0, 65536, (12, 10), dtype=np.uint16)
    np.testing.assert_array_equal(decoded(tmp_path, tiff(levels, deflate=True, tags=tags)), grey(levels / 257))
    assert capfd.readouterr() == ("", "")


def bombs() -> dict[str, bytes]:
    """Small files whose headers promise gigabytes."""
    side = 60_000
    small = picture(40, 48)
    gif, bmp = bytearray(encode(small, "GIF")), bytearray(encode(small, "BMP"))
    gif[6:10] = struct.pack("<HH", side, side)
    bmp[18:26] = struct.pack("<ii", side, side)
    png_bomb = bytearray(encode(small, "PNG"))
    png_bomb[16:24] = struct.pack(">II", side, side)
    png_bomb[29:33] = struct.pack(">I", zlib.crc32(png_bomb[12:29]))
    tile = np.zeros((40, 48), np.uint8)
    huge = [(256, LONG, [side]), (257, LONG, [side]), (278, LONG, [side])]
    tiles = [(322, LONG, [side]), (323, LONG, [side]), (324, LONG, [8]), (325, LONG, [99])]
    webp = b"VP8X" + struct.pack("<I", 10) + b"\2\0\0\0" + (16382).to_bytes(3, "little") * 2
    webp += b"ANIM" + struct.pack("<I", 6) + b"\0" * 6
    frame = encode(small, "WEBP")[12:]
    anmf = b"\0" * 6 + (47).to_bytes(3, "little") + (39).to_bytes(3, "little") + b"\0" * 4 + frame
    webp += b"ANMF" + struct.pack("<I", len(anmf)) + anmf
    return {
        "gif": bytes(gif),
        "bmp": bytes(bmp),
        "png": bytes(png_bomb),
        "tiff": tiff(tile, tags=huge),
        "tiff deflate": tiff(tile, deflate=True, tags=huge),
        "tiff tile": tiff(tile, deflate=True, tags=tiles),
        "webp": b"RIFF" + struct.pack("<I", len(webp) + 4) + b"WEBP" + webp,
    }


@pytest.mark.parametrize("pil_limit", [None, Image.MAX_IMAGE_PIXELS])
@pytest.mark.parametrize(("name", "content"), bombs().items())
def test_bombs_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, pil_limit: int | None
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pil_limit)
    (tmp_path / "x").write_bytes(content)
    for read in (decode, image_facts):
        with pytest.raises(BadImage, match=r"over the limit|decompression bomb"):
            read(tmp_path / "x")


@pytest.mark.parametrize("name", EVERY)
def test_a_truncated_file_is_bad_or_whole(tmp_path: Path, name: str) -> None:
    content = EVERY[name]
    whole = decoded(tmp_path, content)
    num_bad = 0
    cuts = [len(content) * share // 25 for share in range(25)] + [len(content) - end for end in (1, 2, 5, 12, 30)]
    for cut in cuts:
        try:
            np.testing.assert_array_equal(decoded(tmp_path, content[:cut]), whole)  # all but a trailer, a later frame
        except BadImage:
            num_bad += 1
    assert num_bad >= (8 if "frames" in name else 20)


@pytest.mark.parametrize("name", EVERY)
def test_random_damage_never_raises_anything_else(tmp_path: Path, name: str) -> None:
    content = EVERY[name]
    rng = np.random.default_rng(len(content))
    for attempt in range(30):
        damaged = bytearray(content)
        reach = len(content) if attempt % 2 else min(len(content), 250)  # the header, or anywhere
        for position in rng.integers(0, reach, rng.integers(1, 6)):
            damaged[position] = rng.integers(0, 256)
        try:
            for scale in ("range", "percentile"):
                assert decoded(tmp_path, bytes(damaged), scale=scale).dtype == np.uint8
        except BadImage as error:
            assert 0 < len(error.reason) <= 200  # noqa: PT017
            assert "\n" not in error.reason  # noqa: PT017
        try:
            image_facts(tmp_path / "x.bin")
        except BadImage as error:
            assert error.reason  # noqa: PT017
