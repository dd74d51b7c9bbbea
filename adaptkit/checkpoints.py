"""Checkpoints: one safetensors file each, its JSON state in the header, written whole or not at all.

`checkpoints/last.safetensors` holds everything that decides the future of a run; random numbers need no state,
as all of them are functions of (seed, step). Candidates hold the teacher alone. A digest in the header tells when the
disk gives back other bytes than were written.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adaptkit.backbones.reading import line
from adaptkit.errors import AdaptkitError, DataError, MachineError
from adaptkit.run import atomic, machine_errors
from adaptkit.space import require_space

LAST = Path("checkpoints") / "last.safetensors"  # inside the run directory
PREVIOUS = LAST.with_name("previous.safetensors")  # while no line of the log has shown `last` to be good
BLOCK = 4096  # bytes of which the digest takes one sum
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows neither bf16 nor float8


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
                on_cpu, text = _on_cpu(tensors), json.dumps(state)
                save_file(on_cpu, part, metadata={"adaptkit": text, "digest": _digest(text, on_cpu)})
        except SafetensorError as error:  # wraps the OSError of a full disk
            number = re.search(r"os error (\d+)", str(error))
            code = int(number[1]) if number else errno.EIO
            raise OSError(code, os.strerror(code) if number else str(error), str(path)) from None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote. Raises `DataError` if the file is damaged."""
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, _state(file, tensors)


def load_state(path: Path) -> dict[str, Any]:
    """The JSON state of what `save_tensors` wrote, its tensors checked too. Raises `DataError` if it is damaged."""
    return load_tensors(path)[1]  # they lie in the file, not in the memory


def candidate_file(folder: Path, step: int) -> Path:
    """Where the teacher of that step lies."""
    return folder / f"candidate-{step:08d}.safetensors"


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values; a copy only of what shares its memory with another, which safetensors refuses."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        own = tensor.detach().to("cpu").contiguous()
        place = own.untyped_storage().data_ptr()
        found[name] = own.clone() if place in seen else own
        seen.add(place)
    return found


def _digest(state: str, tensors: Mapping[str, Tensor]) -> str:
    """Of names, shapes, state and the sum of every 512 words of 8 bytes, modulo 2^64.

    No change inside one word goes unseen, nor blocks that changed places. A cryptographic hash of all bytes, or a
    CRC, takes as long as a good disk needs to write them; nobody is kept out by either, as anyone can make a new one.
    """
    digest = blake2b(state.encode(), digest_size=16)
    names = sorted(tensors)
    digest.update(json.dumps([[name, str(tensors[name].dtype), tensors[name].shape] for name in names]).encode())
    for name in names:
        data = tensors[name].view(INTEGERS[tensors[name].element_size()]).numpy()
        if data.nbytes >= BLOCK:
            data = data.reshape(-1).view(np.uint8)
            whole = data.size // BLOCK * BLOCK
            digest.update(np.add.reduce(data[:whole].view(np.uint64).reshape(-1, BLOCK // 8), axis=1).data)
            data = data[whole:]
        digest.update(data.data)
    return digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:  # safetensors says that a file is missing when it may only not be read
        os.close(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except AdaptkitError:  # from a signal handler, not from the file
        raise
    except PermissionError as error:  # it may be sound
        raise MachineError(f"{path}: cannot be read ({error.strerror}); check the permissions") from None
    except Exception as error:  # a damaged header makes safetensors raise nearly anything
        raise DataError(f"{path}: damaged checkpoint ({line(error)}); start the run again with --overwrite") from None


def _state(file: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    header = file.metadata() or {}
    if not {"adaptkit"} <= header.keys() <= {"adaptkit", "digest"}:
        raise ValueError("its header is not a checkpoint's")
    if "digest" in header and header["digest"] != _digest(header["adaptkit"], tensors):  # older ones have none
        raise ValueError("its bytes are not those that were written")
    state = json.loads(header["adaptkit"])
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
