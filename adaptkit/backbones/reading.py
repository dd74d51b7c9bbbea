"""Weight files, read without trusting them: no code of a file ever runs."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from zipfile import ZipFile

import torch
from safetensors.torch import load_file

from adaptkit.errors import BackboneError, MachineError

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
ZIP_MAGIC = b"PK\x03\x04"
# Files from before torch 1.6 do not say beforehand which classes they name; these are what training scripts kept.
OLD_GLOBALS = ("argparse.Namespace", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")


class Inert:
    """Stands in for every class and function a pickle names beside tensors: takes any argument, does nothing.

    Checkpoints hold options, schedulers and whole modules next to their weights (`argparse.Namespace`, numpy scalars,
    OmegaConf, Lightning's callbacks). None of it is needed, so none of it is imported or called.
    """

    def __new__(cls, *_: object, **__: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def read_weights(path: Path) -> tuple[Mapping[str, Any], str]:
    """The content of a `.safetensors` or pickled weights file, on the CPU, and the file's SHA-256.

    Tensors stay on the disk until they are used where the format allows it. Raises `BackboneError`.
    """
    if not os.path.isfile(path):
        raise BackboneError(f"{path}: no such weights file; check the path")
    if path.suffix != ".safetensors" and path.suffix not in PICKLES:
        raise BackboneError(f"{path}: not a weights file this can read; give .safetensors or .pth")
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        content = load_file(path, device="cpu") if path.suffix == ".safetensors" else _unpickle(path)
    except PermissionError as error:
        raise MachineError(f"{path}: cannot be read ({error.strerror}); check the permissions") from None
    except Exception as error:  # a hostile or truncated file may raise anything
        raise BackboneError(f"{path}: cannot be read as weights ({line(error)}); fetch or export it again") from None
    if not isinstance(content, Mapping):
        raise BackboneError(f"{path}: holds no weights (a mapping of names to tensors was expected)")
    return content, sha256


def _unpickle(path: Path) -> object:
    with open(path, "rb") as file:
        is_zip = file.read(4) == ZIP_MAGIC
    if is_zip:
        with ZipFile(path) as archive:  # torch compresses nothing: what unpacks to more than the file may be a bomb
            if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                raise UnpicklingError("its content is compressed, which torch does not do")
    named = {*OLD_GLOBALS, *(_unknown_globals(path) if is_zip else ())}
    inert = torch.serialization.safe_globals([(Inert, name) for name in named])
    try:
        with inert, warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UnpicklingError as error:  # torch puts the reason into advice to run the file's code
        reason = re.split(r"WeightsUnpickler error:|trusted source\.", line(error, 2000))[-1]
        raise UnpicklingError(reason.split("Check the documentation")[0]) from None


def _unknown_globals(path: Path) -> list[str]:
    """What the file names that torch does not know as harmless."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a checkpoint: reading it says why
        return []


def line(error: BaseException, length: int = 200) -> str:
    """The error's text on one line of bounded length, also when a terminal escapes what cannot be printed."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:length])[:length]
