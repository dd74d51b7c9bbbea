"""Limits on what a `config.json` may ask for, found out without the memory it would take."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode

from adaptkit.errors import BackboneError
from adaptkit.settings import MAX_PX

MAX_NUMBERS = 10_000_000_000  # parameters and buffers; the largest network of timm has 7 billion
MAX_VALUES = 2**30  # of one tensor, when two images pass through
RESAMPLED = 100_000_000  # by which position embeddings may outgrow those of the weights' file
MAX_PARTS = 10_000  # modules and parameters; the most in timm are 4,300
MAX_INTEGER = 100_000
MAX_RATIO = 10_000.0  # some are multiplied with depths, before there is anything to count
MAX_ITEMS = 256  # in all lists of one argument
MAX_LETTERS = 200
IMAGE_SIZES = ("img_size", "input_size")


def check_arguments(model_args: Mapping[str, Any], where: str) -> None:
    """Raise `BackboneError` unless all are numbers, words or short lists of them, within what a network may have."""
    for key, value in model_args.items():
        most = MAX_PX if key in IMAGE_SIZES else MAX_INTEGER
        leaves = list(_leaves(value))
        if len(leaves) > MAX_ITEMS or not all(_is_plain(leaf, most) for leaf in leaves):
            shown = str(value)[:40] if isinstance(value, int | float | str) else f"a {type(value).__name__}"
            raise BackboneError(
                f"{where}: config.json: {key[:40]!r} is {shown}; "
                f"only words, whole numbers up to {most}, others up to {MAX_RATIO:g}, and short lists are taken"
            )


def _leaves(value: Any, depth: int = 0) -> Iterator[Any]:
    """What lists and mappings hold; what is nested deeper than any argument counts as a leaf."""
    if isinstance(value, list | tuple | dict) and depth < 4:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item, depth + 1)
    else:
        yield value


def _is_plain(leaf: Any, most: int) -> bool:
    if isinstance(leaf, int):
        return -most <= leaf <= most
    if isinstance(leaf, float):
        return -MAX_RATIO <= leaf <= MAX_RATIO
    return leaf is None or (isinstance(leaf, str) and len(leaf) <= MAX_LETTERS)


class TooLarge(Exception):
    """The network has more parts or parameters than it may have."""


def build_within(most: int, make: Callable[[], nn.Module], look: Callable[[nn.Module], Tensor]) -> nn.Module:
    """`make()`, which was rehearsed without memory before, with the images of `look` passed through.

    Raises `TooLarge` at the first parameter beyond `most`, part or value beyond the limits.
    """
    try:
        with torch.device("meta"), _limited(most), warnings.catch_warnings(action="ignore"):  # of parts without size
            module = make().eval()
            with torch.no_grad(), _Bounded():  # type: ignore[no-untyped-call]
                module(look(module))
    except TooLarge:
        raise
    except Exception:  # older timm cannot build all its networks so: then the real parts are counted as they come
        pass
    with _limited(most), warnings.catch_warnings(action="ignore"):
        return make()


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """No operation inside makes a tensor of more than `MAX_VALUES`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.numel() > MAX_VALUES:
                raise TooLarge(f"an image would take more than {MAX_VALUES:,} values")
        return result


@contextmanager
def _limited(most: int) -> Iterator[None]:
    """Count parameters, buffers and modules as they are put into modules."""
    numbers = parts = 0
    here = threading.get_ident()  # torch calls these hooks for the modules of all threads

    def count(module: nn.Module, name: str, part: nn.Module | Tensor | None) -> None:
        nonlocal numbers, parts
        if threading.get_ident() != here or part is None:
            return
        parts += 1
        numbers += part.numel() if isinstance(part, Tensor) else 0
        if numbers > most:
            raise TooLarge(f"it would have more than {most:,} parameters")
        if parts > MAX_PARTS:
            raise TooLarge(f"it would have more than {MAX_PARTS:,} parts")

    registered = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
        hooks.register_module_module_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()
