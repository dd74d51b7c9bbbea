"""Checkpoints: one safetensors file each, its JSON state in the header, written whole or not at all.

`checkpoints/last.safetensors` holds everything that decides the future of a run; random numbers need no state,
as all of them are functions of (seed, step). Candidates hold the teacher alone.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adaptkit.errors import AdaptkitError, DataError
from adaptkit.run import atomic, machine_errors
from adaptkit.space import require_space

LAST = Path("checkpoints") / "last.safetensors"  # inside the run directory


def save_tensors(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors and a JSON state to one file, atomically.

    Raises `MachineError` when the disk has no room for it; what lies at `path` stays whole.
    """
    with machine_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with atomic(path) as part:
                os.truncate(part, 0)  # a killed process may have left it full
                require_space(path.parent, sum(tensor.nbytes for tensor in tensors.values()), path)
                on_cpu = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
                save_file(on_cpu, part, metadata={"adaptkit": json.dumps(state)})
        except SafetensorError as error:  # wraps the OSError of a full disk
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code) if number else str(error), str(path)) from None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote. Raises `DataError` if the file is damaged."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _state(file)  # noqa: SIM118


def load_state(path: Path) -> dict[str, Any]:
    """The JSON state of what `save_tensors` wrote, without its tensors. Raises `DataError` if the file is damaged."""
    with _opened(path) as file:
        return _state(file)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except AdaptkitError:  # from a signal handler, not from the file
        raise
    except Exception as error:  # a damaged header makes safetensors raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: damaged checkpoint ({reason}); start the run again with --overwrite") from None


def _state(file: Any) -> dict[str, Any]:
    state = json.loads((file.metadata() or {})["adaptkit"])
    if not isinstance(state, dict):
        raise ValueError("its state is no mapping")
    return state


def pack_training(student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Student, teacher and optimizer as one flat dict of tensors."""
    tensors = {f"student.{name}": tensor for name, tensor in student.state_dict().items()}
    tensors |= {f"teacher.{name}": tensor for name, tensor in teacher.state_dict().items()}
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def unpack_training_(
    tensors: dict[str, Tensor], student: nn.Module, teacher: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put what `pack_training` gave back in place. Raises `DataError` if it is of another network."""
    for network, prefix in ((student, "student."), (teacher, "teacher.")):
        _check_fit(with_prefix(tensors, prefix), network.state_dict())
        network.load_state_dict(with_prefix(tensors, prefix))
    keys = {name.split(".")[1] for name in tensors if name.startswith("optimizer.")}
    for name, parameter in student.named_parameters():
        values = {key: tensors[f"optimizer.{key}.{name}"] for key in keys if f"optimizer.{key}.{name}" in tensors}
        if not values:  # frozen so far
            continue
        fits = all(value.ndim == 0 or value.shape == parameter.shape for value in values.values())
        if values.keys() != keys or not fits:
            raise DataError(_misfit(f"the optimizer's state of {name}"))
        optimizer.state[parameter].update(values)  # `optimizer.place_state_` moves it


def _check_fit(given: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    for name in sorted(given.keys() | own.keys()):
        if name not in given or name not in own or given[name].shape != own[name].shape:
            raise DataError(_misfit(name))


def _misfit(name: str) -> str:
    return f"{LAST}: does not fit this network ({name[:80]} differs); start the run again with --overwrite"


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
