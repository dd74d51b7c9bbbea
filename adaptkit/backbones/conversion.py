"""Other projects' names and shapes for the same architecture, turned into timm's by timm's own conversion."""

from __future__ import annotations

import contextlib
import inspect
import io
import sys
from collections.abc import Callable, Mapping
from typing import cast

import torch
from timm.models import model_entrypoint
from torch import Tensor, nn

from adaptkit.backbones.layouts import State
from adaptkit.backbones.reading import line
from adaptkit.errors import BackboneError

Conversion = Callable[[State, nn.Module], Mapping[str, Tensor]]


def as_float32(state: State, source: str) -> State:
    """The same tensors with every float in 32 bits. Raises `BackboneError` for tensors that are not plain numbers."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and tensor.element_size() == 1:  # scales lie beside them, in each project's way
            raise BackboneError(f"{source}: {key} is float8, without its scales; convert the weights to float16 first")
        if not _is_plain(tensor):
            raise BackboneError(f"{source}: {key} is not a plain tensor of real numbers; save dense float weights")
    return {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
        return False
    # A few bytes expanded to terabytes would be written out by the conversion to float32.
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def to_timm(module: nn.Module, state: State, architecture: str, source: str) -> tuple[State, tuple[str, ...]]:
    """`state` under timm's names, and the position embeddings that were fitted to another grid.

    Raises `BackboneError` if the state cannot be of this architecture.
    """
    convert = _conversion(architecture)
    if convert is None:
        return state, ()
    if "storage_tokens" in state:
        state = _with_masked_bias(module, state, architecture, source)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # timm prints what a DINOv3 file has and its network lacks
            converted = dict(convert(dict(state), module))
    except Exception as error:  # the conversion indexes keys and shapes of a file nobody has checked yet
        raise BackboneError(f"{source}: does not fit {architecture} ({line(error)})") from None
    resampled = []
    for key in converted.keys() & state.keys():
        before, after = state[key], converted[key]
        if before.shape == after.shape and (before is after or torch.equal(before, after)):
            continue
        if "pos_embed" in key or "relative_position" in key:
            # With registers, DINOv2's class token takes over the first row; that is no resampling.
            if before.ndim < 2 or not torch.equal(before[:, 1:], after):
                resampled.append(key)
        elif before.numel() != after.numel():  # timm would also resample patch kernels: another architecture
            converted[key] = before
    return converted, tuple(sorted(resampled))


def _with_masked_bias(module: nn.Module, state: State, architecture: str, source: str) -> State:
    """DINOv3 multiplies its attention biases by a mask, which timm does not read; and most networks of timm have none.

    Raises `BackboneError` if a bias that is not zero would get lost.
    """
    masked = dict(state)
    has_bias = any(key.endswith((".q_bias", ".q_proj.bias")) for key in module.state_dict())
    for key in [key for key in state if key.endswith("qkv.bias")]:
        bias, mask = state[key], masked.pop(f"{key}_mask", None)
        if mask is not None and mask.shape == bias.shape:
            bias = masked[key] = bias * mask
        query_and_value = torch.cat((bias[: len(bias) // 3], bias[-(len(bias) // 3) :])) if bias.ndim else bias
        if not has_bias and bool((query_and_value != 0).any()):  # softmax cancels a bias of the keys
            raise BackboneError(
                f"{source}: has attention biases that {architecture} lacks; "
                f"name {architecture.replace('_dinov3', '_dinov3_qkvb')}"
            )
    return masked


def _conversion(architecture: str) -> Conversion | None:
    timm_file = sys.modules[model_entrypoint(architecture).__module__]
    for name in ("checkpoint_filter_fn", "_filter_fn"):
        convert = getattr(timm_file, name, None)
        if convert is not None and len(inspect.signature(convert).parameters) == 1:
            return lambda state, _module: convert(state)
        if convert is not None:
            return cast(Conversion, convert)
    return None
