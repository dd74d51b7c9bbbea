"""Fit the weights of a file strictly into a backbone, and account for every key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from adaptkit.backbones.backbone import LoadReport
from adaptkit.backbones.conversion import as_float32, to_timm
from adaptkit.backbones.layouts import Network, State, networks
from adaptkit.errors import BackboneError

CLASSIFIERS = ("head.", "fc.", "classifier.", "head_dist.")
SHOWN = 3


@dataclass
class _Fit:
    """What became of the keys of one network of a file."""

    network: Network
    picked: State = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    misshapen: dict[str, str] = field(default_factory=dict)  # key -> both shapes
    unexpected: tuple[str, ...] = ()
    resampled: tuple[str, ...] = ()
    problem: BackboneError | None = None

    @property
    def mostly(self) -> bool:
        """Whether this is the wanted network, complete or not: more of its parameters fit than do not."""
        return len(self.picked) > len(self.missing) + len(self.misshapen)


def fit_(
    module: nn.Module,
    content: Mapping[str, Any],
    *,
    architecture: str,
    source: str,
    sha256: str | None,
    allow_missing: tuple[str, ...] = (),
) -> LoadReport:
    """Copy the weights of a file into `module`, in float32, and report every key.

    Of several networks in the file the first that is `module` (most of its parameters fit) is taken, an average of
    the training before the student, and held to it strictly. Raises `BackboneError` if a parameter or BatchNorm
    statistic of the backbone is missing, of another shape or not finite, unless a glob in `allow_missing` names it.
    """
    fit = _best_fit(module, content, architecture, source)
    if fit.problem is not None:
        raise fit.problem
    refused = [key for key in fit.missing if not _named(key, allow_missing)]
    misshapen = [f"{key} {shapes}" for key, shapes in fit.misshapen.items() if not _named(key, allow_missing)]
    if refused or misshapen:
        raise BackboneError(_refusal(source, architecture, fit, refused, misshapen))
    if not fit.picked:
        raise BackboneError(f"{source}: not one key fits {architecture}; name the backbone these weights belong to")
    for key, tensor in fit.picked.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BackboneError(f"{source}: {key} has values that are not finite; fetch or export the weights again")
    module.load_state_dict(fit.picked, strict=False)  # every difference has been accounted for above
    return LoadReport(
        matched=tuple(fit.picked),
        missing=(*fit.missing, *fit.misshapen),
        unexpected=fit.unexpected,
        resampled=fit.resampled,
        sha256=sha256,
        source=source,
        layout=fit.network.layout,
    )


def _best_fit(module: nn.Module, content: Mapping[str, Any], architecture: str, source: str) -> _Fit:
    """The first network of the file that is mostly this one, else the one that fits best."""
    best = None
    for network in networks(content, module):
        fit = _compare(module, network, architecture, source)
        if best is None or len(fit.picked) > len(best.picked):
            best = fit
        if fit.mostly:
            return fit
    if best is None:
        raise BackboneError(f"{source}: holds no weights (a mapping of names to tensors was expected)")
    return best


def _compare(module: nn.Module, network: Network, architecture: str, source: str) -> _Fit:
    state = as_float32(network.state, source)
    try:
        converted, resampled = to_timm(module, state, architecture, source)
    except BackboneError as problem:
        return _Fit(network, problem=problem)
    own = module.state_dict()
    unexpected = tuple(key for key in converted if key not in own and not key.startswith(CLASSIFIERS))
    fit = _Fit(network, unexpected=unexpected, resampled=resampled)
    for key, target in own.items():
        tensor = converted.get(key)
        if tensor is not None and tensor.shape == target.shape:
            fit.picked[key] = tensor.to(target.dtype)
            if target.is_floating_point() and not tensor.is_floating_point() and fit.problem is None:
                kind = str(tensor.dtype).removeprefix("torch.")
                fit.problem = BackboneError(f"{source}: {key} is {kind}; quantised weights cannot be read, give floats")
        elif tensor is not None:
            fit.misshapen[key] = f"is {tuple(tensor.shape)} in the file, {tuple(target.shape)} here"
        elif not key.endswith("num_batches_tracked"):  # a counter that old files lack and evaluation ignores
            fit.missing.append(key)
    return fit


def _named(key: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(key, glob) for glob in globs)


def _refusal(source: str, architecture: str, fit: _Fit, missing: list[str], misshapen: list[str]) -> str:
    parts = [f"{len(fit.picked)} parameters fit"]
    for word, keys in (("missing", missing), ("of another shape", misshapen)):
        if keys:
            parts.append(f"{len(keys)} {word} ({_some(keys)})")
    advice = "name the backbone these weights belong to"
    if fit.mostly:
        advice += ", or accept gaps with --allow-missing GLOB"
    else:
        parts.append(f"the file has {', '.join(key[:60] for key in list(fit.network.state)[:2])}, ...")
    return f"{source}: does not fit {architecture}: {'; '.join(parts)}; {advice}"


def _some(keys: Iterable[str]) -> str:
    every = list(keys)
    more = f" and {len(every) - SHOWN} more" if len(every) > SHOWN else ""
    return ", ".join(key[:80] for key in every[:SHOWN]) + more
