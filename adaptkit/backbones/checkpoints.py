"""Weight files: read without trusting them, and fit them strictly into a backbone."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from timm.models import model_entrypoint
from torch import Tensor, nn

from adaptkit.backbones.backbone import LoadReport
from adaptkit.errors import BackboneError

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
WRAPPERS = ("teacher", "ema_teacher", "state_dict", "model", "student")  # the teacher is what DINO's authors evaluate
PREFIXES = ("teacher.", "module.", "_orig_mod.", "student.", "backbone.")  # a teacher comes before all else
CLASSIFIERS = ("head.", "fc.", "classifier.", "head_dist.")
SHOWN = 3

State = dict[str, Tensor]


def read_weights(path: Path) -> tuple[State, str]:
    """The tensors of a `.safetensors` or pickled weights file, as stored, and the file's SHA-256.

    Pickles are read with `weights_only=True`, which runs no code of the file. A checkpoint that keeps its weights
    under `teacher`, `state_dict`, ... is unwrapped. Raises `BackboneError`.
    """
    if not os.path.isfile(path):
        raise BackboneError(f"{path}: no such weights file")
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if path.suffix == ".safetensors":
            content: Any = load_file(path, device="cpu")
        elif path.suffix in PICKLES:
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise BackboneError(f"{path}: not a weights file this can read; give .safetensors or .pth")
    except BackboneError:
        raise
    except Exception as error:  # a hostile or truncated file may raise anything
        raise BackboneError(f"{path}: cannot be read as weights ({_line(error)}); fetch or export it again") from None
    state = _unwrap(content)
    if not state:
        raise BackboneError(f"{path}: holds no weights (a mapping of names to tensors was expected)")
    return state, sha256


def strip_prefixes(state: State) -> State:
    """Remove `module.`, `teacher.`, `backbone.`, ... in front of the keys.

    Where only some keys carry a prefix the others belong to something else (a projection head, the student) and are
    left out.
    """
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            inner = {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}
            if inner:
                state, stripped = inner, True
                break
    return state


def fit_(
    module: nn.Module,
    state: State,
    *,
    architecture: str,
    source: str,
    sha256: str | None,
    allow_missing: tuple[str, ...] = (),
) -> LoadReport:
    """Copy `state` into `module`, in float32, and report every key.

    Raises `BackboneError` if a parameter or BatchNorm statistic of the backbone is missing, of another shape or not
    finite, unless a glob in `allow_missing` names it.
    """
    converted, resampled = _convert(module, state, architecture, source)
    own = module.state_dict()
    missing, misshapen, picked = [], [], {}
    for key, target in own.items():
        tensor = converted.get(key)
        if tensor is not None and tensor.shape == target.shape:
            picked[key] = tensor.to(target.dtype)
        elif any(fnmatchcase(key, glob) for glob in allow_missing):
            missing.append(key)
        elif tensor is not None:
            misshapen.append(f"{key} is {tuple(tensor.shape)} in the file, {tuple(target.shape)} here")
        elif not key.endswith("num_batches_tracked"):  # a counter that old files lack and evaluation ignores
            missing.append(key)
    refused = [key for key in missing if not any(fnmatchcase(key, glob) for glob in allow_missing)]
    if refused or misshapen:
        raise BackboneError(_refusal(source, architecture, len(picked), refused, misshapen))
    for key, tensor in picked.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BackboneError(f"{source}: {key} has values that are not finite; fetch or export the weights again")
    if not picked:
        raise BackboneError(f"{source}: not one key fits {architecture}; name the backbone these weights belong to")
    module.load_state_dict(picked, strict=False)  # every difference has been accounted for above
    unexpected = [key for key in converted if key not in own and not key.startswith(CLASSIFIERS)]
    return LoadReport(tuple(picked), tuple(missing), tuple(unexpected), resampled, sha256, source)


def _unwrap(content: object) -> State:
    for _ in range(4):  # a pickle may contain itself
        if not isinstance(content, Mapping):
            break
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        return {}
    return {k: v.detach() for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _convert(module: nn.Module, state: State, architecture: str, source: str) -> tuple[State, tuple[str, ...]]:
    """Other key layouts of the same architecture to timm's own, by timm's own conversion, in float32."""
    usable = {}
    for key, tensor in state.items():
        if not _is_plain(tensor):
            raise BackboneError(f"{source}: {key} is not a plain tensor of real numbers; save dense float weights")
        usable[key] = tensor.float() if tensor.is_floating_point() else tensor
    convert = _conversion(architecture)
    if convert is None:
        return usable, ()
    try:
        converted = dict(convert(dict(usable), module))
    except Exception as error:  # the conversion indexes keys and shapes of a file nobody has checked yet
        raise BackboneError(f"{source}: does not fit {architecture} ({_line(error)})") from None
    resampled = []
    for key in converted.keys() & usable.keys():
        before, after = usable[key], converted[key]
        if before.shape == after.shape and (before is after or torch.equal(before, after)):
            continue
        if "pos_embed" in key or "relative_position" in key:
            resampled.append(key)
        elif before.numel() != after.numel():  # timm would also resample patch kernels: another architecture
            converted[key] = before
    return converted, tuple(sorted(resampled))


def _is_plain(tensor: Tensor) -> bool:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.device.type != "cpu":
        return False
    # A few bytes expanded to terabytes would be written out by the conversion to float32.
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _conversion(architecture: str) -> Callable[[State, nn.Module], Mapping[str, Tensor]] | None:
    timm_file = sys.modules[model_entrypoint(architecture).__module__]
    for name in ("checkpoint_filter_fn", "_filter_fn"):
        convert = getattr(timm_file, name, None)
        if convert is not None and len(inspect.signature(convert).parameters) == 1:
            return lambda state, _module: convert(state)
        if convert is not None:
            return cast(Callable[[State, nn.Module], Mapping[str, Tensor]], convert)
    return None


def _refusal(source: str, architecture: str, fitting: int, missing: list[str], misshapen: list[str]) -> str:
    parts = []
    for word, keys in (("missing", missing), ("of another shape", misshapen)):
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            parts.append(f"{len(keys)} {word} ({', '.join(keys[:SHOWN])}{more})")
    return (
        f"{source}: does not fit {architecture}: {fitting} parameters fit, {'; '.join(parts)}; "
        "name the backbone these weights belong to, or accept gaps with --allow-missing GLOB"
    )


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
