"""What is attacked: readers of files that others made, and what they may do with them.

A reader gives a result of its type, or raises its own family of errors with one line. Everything else is a finding.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from hostile import assert_one_line
from PIL import Image
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from adaptkit.backbones.checkpoints import fit_
from adaptkit.backbones.config import preprocessing, read_config
from adaptkit.backbones.reading import read_weights
from adaptkit.checkpoints import load_state, load_tensors, pack_training, save_tensors, unpack_training_
from adaptkit.errors import AdaptkitError, BackboneError, DataError, UsageError
from adaptkit.preflight.scan import look_at
from adaptkit.recipe import Recipe, dump_recipe, load_recipe, recipes_folder
from adaptkit.run import Run
from adaptkit.sources import (
    BadImage,
    BadImages,
    decode,
    has_class_folders,
    image_facts,
    load_index,
    open_folder,
    open_images,
    open_labelled,
    save_index,
)
from adaptkit.sources.cache import DIGEST_BYTES, MAGIC, DecodeCache, _digest, _origin


@dataclass(frozen=True)
class Target:
    """One kind of file: sound examples, words of its format, and what reads it from an empty folder."""

    originals: list[bytes]
    attack: Callable[[bytes, Path], None]
    words: tuple[bytes, ...] = field(default=())


def told(kind: type[AdaptkitError], read: Callable[[], object]) -> object:
    """What `read` gives, or None when it raises this kind of error in one line."""
    try:
        return read()
    except kind as error:
        assert_one_line(error)
        return None


# --- recipes

YAML_WORDS = (
    b"&a ", b"*a", b"<<: ", b"!!python/object/apply:os.mkdir [ran]", b"!x ", b"---\n", b"...\n", b"? ", b": ", b"- ",
    b"{", b"}", b"[", b"]", b"|\n", b">-\n", b"'", b'"', b'"\\ud800"', b'"\\U0001F600"', b"%YAML 1.1\n", b"\t", b"\r",
    b".nan", b"-.inf", b"1e400", b"9" * 400, b"-1", b"0x10", b"1:30", b"null", b"~", b"\xc2\x85", b"\xe2\x80\xa8",
    b"optim:\n  lr: ", b"views:\n  blur: ", b"data: ", b"budget: ", b"select:\n  alphas: ", b"9" * 400 + b"%",
)  # fmt: skip


def attack_recipe(content: bytes, folder: Path) -> None:
    file = folder / "mine.yaml"
    file.write_bytes(content)
    recipe = told(UsageError, lambda: load_recipe(file))
    lines = content.decode("utf-8", "surrogateescape").replace("\0", "").splitlines()[:3]
    told(UsageError, lambda: load_recipe(assignments=[line.replace(": ", "=") for line in lines]))
    if recipe is None:
        return
    assert isinstance(recipe, Recipe)
    (folder / "again.yaml").write_text(dump_recipe(recipe), encoding="utf-8", errors="surrogateescape")
    again = told(UsageError, lambda: load_recipe(folder / "again.yaml"))  # bytes that are not UTF-8 are refused
    assert again in (None, recipe)


# --- labels

LABELS = [
    b"path,label\n0.jpg,a\n1.jpg,a\n2.jpg,b\n3.jpg,b\n",
    b'\xef\xbb\xbf"label","path"\r\n"a","0.jpg"\r\n"a","1.jpg"\r\n"b","2.jpg"\r\n"b","3.jpg"\r\n',
    b"path\n0.jpg\n../mine/1.jpg\n",
    b"# mine\n0.jpg\n\n1.jpg\n",
]
LABEL_WORDS = (
    b",", b'"', b'""', b"\n", b"\r", b"\r\n", b";", b"\t", b"\0", b"../", b"/dev/zero", b"/dev/stdin", b"path,label\n",
    b"0.jpg", b"\xff\xfe", b"\xe9", b"\x1b[31m", b"\xe2\x80\xae", b"=cmd()", b"a" * 300, b"//", b"./", b"~", b".",
)  # fmt: skip


def attack_labels(content: bytes, folder: Path) -> None:
    for index in range(4):
        (folder / f"{index}.jpg").touch()
    for name in ("labels.csv", "list.csv", "list.txt"):
        file = folder / name
        file.write_bytes(content)
        assert isinstance(has_class_folders(file), bool)
        told(DataError, lambda file=file: open_images([file]))
        told(DataError, lambda file=file: open_labelled(file))
        told(DataError, lambda file=file: open_labelled(file, file))
    _attack_class_folders(content, folder / "classes")


def _attack_class_folders(content: bytes, folder: Path) -> None:
    """Every line is the name of a folder with two images."""
    folder.mkdir()
    for line in content.replace(b"\0", b"").replace(b"/", b"").splitlines()[:5]:
        if 0 < len(line) <= 255 and line not in (b".", b".."):
            place = os.path.join(os.fsencode(folder), line)
            os.makedirs(place, exist_ok=True)
            for name in (b"0.jpg", b"1.jpg"):
                Path(os.fsdecode(os.path.join(place, name))).touch()
    labelled = told(DataError, lambda: open_labelled(folder))
    assert labelled is None or has_class_folders(folder)


# --- images

NOISE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
IMAGE_WORDS = (
    b"IDAT", b"IEND", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"iCCP", b"zTXt", b"eXIf", b"VP8X", b"ANMF", b"ALPH",
    b"\xff\xc0", b"\xff\xc2", b"\xff\xd8", b"\xff\xd9", b"\xff\xda", b"\xff\xe1\x00\x10Exif\0\0", b"\xff\xe2MPF\0",
    b"NETSCAPE2.0", b"\x21\xf9\x04", b"II*\0", b"MM\0*", b"GIF89a", b"RIFF", b"BM",
)  # fmt: skip


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def images() -> list[bytes]:
    colour = Image.fromarray(NOISE)
    grey, deep = colour.convert("L"), Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
    frames = {"save_all": True, "append_images": [colour.rotate(90)]}
    exif = Image.Exif()
    exif[0x0112] = 6
    return [
        *(encoded(colour, kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")),
        *(encoded(colour, kind, **frames) for kind in ("PNG", "WEBP", "GIF", "TIFF")),
        *(encoded(colour, kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")),
        *(encoded(deep, kind) for kind in ("PNG", "TIFF")),
        *(encoded(colour.convert("CMYK"), kind) for kind in ("JPEG", "TIFF")),
        *(encoded(colour, "TIFF", compression=name) for name in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")),
        encoded(Image.fromarray(NOISE[..., 0].astype(np.float32)), "TIFF"),
        encoded(colour.convert("1"), "TIFF", compression="group4"),
        encoded(colour.convert("RGBA"), "PNG"),
        encoded(colour.quantize(16), "PNG", transparency=3),
        encoded(colour, "WEBP", lossless=True),
        encoded(colour, "JPEG", progressive=True),
        encoded(grey, "JPEG"),
        encoded(grey, "BMP"),
    ]


def attack_images(content: bytes, folder: Path) -> None:
    file = folder / "x.jpg"
    file.write_bytes(content)
    for read in (decode, lambda path: decode(path, scale="percentile"), image_facts, _read_cached):
        try:
            result = read(file)
        except BadImage as bad:
            assert 0 < len(bad.reason) <= 200  # noqa: PT017
            assert str(bad).isprintable()  # noqa: PT017
        else:
            assert not isinstance(result, Image.Image) or (result.mode == "RGB" and not result.info)
    assert look_at(open_folder(folder), 0, has_twin=False).path == "x.jpg"


def _read_cached(file: Path) -> object:
    return DecodeCache.make(file.parent / "cache").read(file, "range")


# --- weights


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=1, num_classes=0)


VIT = small_vit()
CONFIG = (Path(read_config.__code__.co_filename).parents[1] / "assets" / "nano" / "config.json").read_bytes()


def packed(content: object, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def weights() -> list[bytes]:
    state = {name: tensor.detach() for name, tensor in VIT.state_dict().items()}
    two = {"a": torch.ones(2), "b.weight": torch.zeros(3, dtype=torch.int8)}
    return [
        save(state),
        save(two),
        save({f"backbone.{name}": tensor for name, tensor in state.items()}),
        packed({"teacher": state, "student": state, "epoch": 3}),
        packed(OrderedDict(state), zipped=False),
        packed({"a": torch.ones(2).to_sparse(), "b": torch.ones(4)[::2], "c": nn.Parameter(torch.ones(1))}),
        pickle.dumps({"a": [1, "x", None, b"y", 2.5], "b": {"c": (1, 2)}}),
        CONFIG,
    ]


WEIGHT_WORDS = (
    b'"F32"', b'"F64"', b'"I8"', b'"BOOL"', b'"F8_E4M3"', b'"C64"', b"__metadata__", b"data_offsets", b"-1", b"9" * 30,
    b"null", b"[[[[", b"1e999", b"\\ud800", b"\\u0000", b"cbuiltins\nexec\n", b"cos\nmkdir\n", b"\x80\x04", b"R.",
    b"c__main__\nX\n", b"\x8a\xff", b"ctorch._utils\n_rebuild_tensor_v2\n", b"(S'ran'\ntR.", b"\x94\x93R",
)  # fmt: skip


def attack_weights(content: bytes, folder: Path) -> None:
    for suffix in ("safetensors", "pth"):
        file = folder / f"mine.{suffix}"
        file.write_bytes(content)
        found = told(BackboneError, lambda file=file: read_weights(file))
        if isinstance(found, tuple):
            told(BackboneError, lambda file=file, state=found[0]: _fit(state, file))
    (folder / "config.json").write_bytes(content)
    config = told(BackboneError, lambda: read_config(folder / "config.json", "mine"))
    if isinstance(config, tuple):
        told(BackboneError, lambda: preprocessing(config[2], "mine"))


def _fit(state: object, file: Path) -> object:
    return fit_(VIT, state, architecture="test_vit", source=str(file), sha256=None)  # type: ignore[arg-type]


# --- files of a run


def trained() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(student.parameters())
    student(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return student, teacher, optimizer


def checkpoints(folder: Path) -> list[bytes]:
    save_tensors(folder / "last", pack_training(*trained()), {"train": {"step": 1}, "window_steps": 0})
    (folder / "0.jpg").write_bytes(encoded(Image.fromarray(NOISE), "JPEG"))
    save_index(folder / "index", open_folder(folder))
    report = {"schema": "adaptkit.report/1", "verdict": "improved", "probes": {"before": {"knn_top1": {"value": 1.5}}}}
    return [
        (folder / "last").read_bytes(),
        (folder / "index").read_bytes(),
        (folder / "0.jpg").read_bytes(),
        json.dumps(report, indent=2).encode(),
        json.dumps({"state": "running", "exit_code": None, "message": "started", "pid": 1}).encode(),
        b'{"path": "a.jpg", "reason": "damaged"}\n' * 3,
    ]


CHECKPOINT_WORDS = (
    *WEIGHT_WORDS[:15], b"student.weight", b"optimizer.step.weight", b'"adaptkit":"{}"', b'"adaptkit":"[]"',
    b"[" * 2000, b"NaN", b"Infinity", b"-0", b"\xff", b'"asked"', b'"digest"', b"true", b"{}", MAGIC,
)  # fmt: skip


def attack_checkpoints(content: bytes, folder: Path) -> None:
    last = folder / "last.safetensors"
    last.write_bytes(content)
    found = told(DataError, lambda: load_tensors(last))
    assert (found is None) == (told(DataError, lambda: load_state(last)) is None)
    if isinstance(found, tuple):
        told(DataError, lambda: unpack_training_(found[0], *trained()))
    (folder / "0.jpg").write_bytes(encoded(Image.fromarray(NOISE), "JPEG"))
    (folder / "index").write_bytes(content)
    load_index(folder / "index", [folder])
    (folder / "bad.jsonl").write_bytes(content)
    told(DataError, lambda: BadImages(folder / "bad.jsonl", 10, "1%"))
    for name in ("report.json", "status.json", "manifest.json"):
        (folder / name).write_bytes(content)
        document = told(UsageError, lambda name=name: Run(folder, Recipe()).read_json(name))
        assert document is None or isinstance(document, dict)
    _attack_cache(content, folder)


def _attack_cache(content: bytes, folder: Path) -> None:
    """The entry as it is, and with a digest that says it is sound."""
    image, cache = folder / "0.jpg", DecodeCache.make(folder / "cache")
    entry, origin = cache._entry(image), _origin(image, "range")
    assert origin is not None
    entry.parent.mkdir(exist_ok=True)
    for stored in (content, MAGIC + _digest(origin, content) + content):
        entry.write_bytes(stored)
        assert cache.read(image, "range").size[1] in (20, 512)
    assert len(MAGIC) + DIGEST_BYTES == struct.calcsize("24s")


def all_targets(folder: Path) -> dict[str, Target]:
    """By name; `folder` is for making the examples."""
    recipes = [(recipes_folder() / f"{name}.yaml").read_bytes() for name in ("bits-reset", "quick", "dino")]
    return {
        "recipe": Target([*recipes, dump_recipe(Recipe()).encode(), b"seed: 1\n"], attack_recipe, YAML_WORDS),
        "labels": Target(LABELS, attack_labels, LABEL_WORDS),
        "images": Target(images(), attack_images, IMAGE_WORDS),
        "weights": Target(weights(), attack_weights, WEIGHT_WORDS),
        "checkpoints": Target(checkpoints(folder), attack_checkpoints, CHECKPOINT_WORDS),
    }
