"""Checkpoints give back every bit that decides the future of a run, or say that they are damaged."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from adaptkit.checkpoints import (
    BLOCK,
    load_state,
    load_tensors,
    pack_training,
    save_tensors,
    unpack_training_,
    with_prefix,
)
from adaptkit.errors import DataError, MachineError
from adaptkit.recipe import Recipe


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def train(student: nn.Module, optimizer: torch.optim.Optimizer, steps: int, frozen: bool = False) -> None:
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        optimizer.zero_grad()
        parts = list(student)  # type: ignore[call-overload]
        h = torch.randn(8, 3, generator=generator)
        with torch.set_grad_enabled(not frozen):
            h = parts[1](parts[0](h))
        parts[2](h).square().mean().backward()
        optimizer.step()


def adamw(student: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(student.parameters(), lr=0.1)


@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "head only"])
def test_training_goes_on_bit_for_bit(frozen: bool, tmp_path: Path) -> None:
    student, teacher = network(0), network(1)
    optimizer = adamw(student)
    train(student, optimizer, 3, frozen)
    save_tensors(tmp_path / "last.safetensors", pack_training(student, teacher, optimizer), {"step": 3})

    tensors, state = load_tensors(tmp_path / "last.safetensors")
    other_student, other_teacher = network(2), network(3)
    other_optimizer = adamw(other_student)
    unpack_training_(tensors, other_student, other_teacher, other_optimizer)
    assert state == {"step": 3}
    for a, b in ((student, other_student), (teacher, other_teacher)):
        assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    train(student, optimizer, 4)
    train(other_student, other_optimizer, 4)
    for x, y in zip(student.parameters(), other_student.parameters(), strict=True):
        assert torch.equal(x, y)
        assert optimizer.state[x].keys() == other_optimizer.state[y].keys()
        assert all(torch.equal(optimizer.state[x][key], other_optimizer.state[y][key]) for key in optimizer.state[x])


def test_every_kind_of_tensor_and_state_comes_back(tmp_path: Path) -> None:
    tensors = {
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "double": torch.tensor([1e-300], dtype=torch.float64),
        "integer": torch.tensor(2**40),
        "bfloat": torch.randn(3).bfloat16(),
        "transposed": torch.arange(6.0).view(2, 3).T,
    }
    state = {"step": 7, "names": ["ä", "b"], "loss": 0.1 + 0.2, "channel": {"redraws": 1}}
    save_tensors(tmp_path / "new folder" / "file", tensors, state)
    back, again = load_tensors(tmp_path / "new folder" / "file")
    assert again == state
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].nan_to_num(), tensor.nan_to_num())
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["file"]


def test_shared_tensors_are_saved_as_copies(tmp_path: Path) -> None:
    weight = torch.ones(2)
    save_tensors(tmp_path / "file", {"a": weight, "b": weight}, {})
    assert load_tensors(tmp_path / "file")[0].keys() == {"a", "b"}


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "header", "stranger"])
def test_a_damaged_file_is_named(damage: str, tmp_path: Path) -> None:
    file = tmp_path / "last.safetensors"
    save_tensors(file, {"a": torch.ones(100)}, {"step": 1})
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "stranger":
        save_file({"a": torch.ones(1)}, file)
    else:
        file.write_bytes({"empty": b"", "cut": content[:-9], "header": b"\xff" * 8 + content[8:]}[damage])
    with pytest.raises(DataError, match=r"last\.safetensors: damaged checkpoint"):
        load_tensors(file)


MASKS = (1, 0x80, 0xFF)


def flipped(file: Path, at: int, mask: int) -> None:
    with open(file, "rb+") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ mask]))


def test_one_changed_byte_anywhere_is_seen(tmp_path: Path) -> None:
    """In the data of small tensors and of such that the digest takes sums of, in names, shapes, types and state."""
    file = tmp_path / "last.safetensors"
    tensors = {
        "large": torch.randn(3, 1111),  # three blocks and a rest
        "block": torch.zeros(512, dtype=torch.int64),
        "bfloat": torch.randn(2100).bfloat16(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "flag": torch.tensor(True),
        "nothing": torch.empty(0, 4),
        "number": torch.tensor(3.0, dtype=torch.float64),
    }
    state = {"train": {"step": 12, "loss": 0.25}, "scaler": None}
    save_tensors(file, tensors, state)
    size, header = file.stat().st_size, int.from_bytes(file.read_bytes()[:8], "little") + 8
    offsets = sorted({*range(header), *range(header, size, 37), *range(size - 64, size)})
    for number, at in enumerate(offsets):
        mask = MASKS[number % len(MASKS)]
        flipped(file, at, mask)
        with pytest.raises(DataError, match="damaged checkpoint"):
            load_tensors(file)
        if at % 10 == 0:
            with pytest.raises(DataError, match="damaged checkpoint"):
                load_state(file)
        flipped(file, at, mask)
    assert load_tensors(file)[1] == load_state(file) == state


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    """The one before would take its place."""
    file = tmp_path / "last.safetensors"
    save_tensors(file, {"a": torch.ones(3)}, {})
    file.chmod(0)
    me = os.geteuid()
    if me == 0:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(MachineError, match=r"cannot be read .*; check the permissions"):
            load_tensors(file)
    finally:
        os.seteuid(me)


def test_blocks_that_changed_places_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "last.safetensors"
    save_tensors(file, {"a": torch.randn(4, BLOCK // 4)}, {})
    content = file.read_bytes()
    start = len(content) - 4 * BLOCK
    one, two = content[start : start + BLOCK], content[start + BLOCK : start + 2 * BLOCK]
    file.write_bytes(content[:start] + two + one + content[start + 2 * BLOCK :])
    with pytest.raises(DataError, match="its bytes are not those that were written"):
        load_tensors(file)


def test_a_checkpoint_from_before_there_were_digests_is_read(tmp_path: Path) -> None:
    tensor = torch.randn(3000)
    save_file({"a": tensor}, tmp_path / "old", metadata={"adaptkit": '{"step": 3}'})
    tensors, state = load_tensors(tmp_path / "old")
    assert torch.equal(tensors["a"], tensor)
    assert state == load_state(tmp_path / "old") == {"step": 3}


def test_a_digest_does_not_depend_on_order_or_on_what_shares_memory(tmp_path: Path) -> None:
    both, views = torch.randn(2, 700), torch.randn(2, 700)
    views.copy_(both)
    save_tensors(tmp_path / "one", {"a": both[0], "b": both[1], "c": both}, {"x": 1})
    save_tensors(tmp_path / "two", {"c": views, "b": views[1].clone(), "a": views[0].clone()}, {"x": 1})
    digests = []
    for name in ("one", "two"):
        with safe_open(tmp_path / name, framework="pt") as file:
            digests.append(file.metadata()["digest"])
    assert digests[0] == digests[1]
    assert torch.equal(load_tensors(tmp_path / "one")[0]["b"], both[1])


def test_a_session_gives_back_meter_and_state(tmp_path: Path) -> None:
    from accelerate import Accelerator

    from adaptkit.meter import Meter
    from adaptkit.objectives import OBJECTIVES
    from adaptkit.session import Session, TrainState
    from adaptkit.settings import ObjectiveSettings

    def session(seed: int) -> Session:
        accelerator = Accelerator(cpu=True)
        meter = Meter(accelerator, OBJECTIVES["bits"](ObjectiveSettings()))
        student = network(seed)
        parts = dict.fromkeys(Session.__dataclass_fields__)
        parts |= {
            "accelerator": accelerator,
            "student": student,
            "teacher": copy.deepcopy(student),
            "meter": meter,
            "objective": meter.objective,
            "plan": SimpleNamespace(recipe=Recipe()),
        }
        return Session(**parts | {"optimizer": adamw(student), "state": TrainState()})  # type: ignore[arg-type]

    first, second = session(0), session(1)
    first.state.step, first.state.channel.redraws, first.state.redraw_now = 5, 1, True
    first.state.candidates = [{"step": 4, "alpha": 1.0, "value": 0.5, "delta": {"value": 0.1, "ci95": None}}]
    first.state.last_record = {"loss": float("nan")}
    first.meter.add({"loss": torch.tensor(1.5), "ones": torch.arange(3, dtype=torch.float64)}, 8)
    first.meter.add({"loss": torch.tensor(0.25), "ones": torch.ones(3, dtype=torch.float64)}, 8)
    first.save(tmp_path / "last")
    second.meter.add({"loss": torch.tensor(9.0)}, 8)
    second.restore(tmp_path / "last")
    assert json.dumps(vars(second.state), default=vars) == json.dumps(vars(first.state), default=vars)
    assert second.meter.num_steps == 2
    assert second.meter.sums.keys() == first.meter.sums.keys()
    assert all(torch.equal(first.meter.sums[name], second.meter.sums[name]) for name in first.meter.sums)


def test_prefixes() -> None:
    tensors = {"a.x": torch.zeros(1), "ab.x": torch.ones(1)}
    assert with_prefix(tensors, "a.") == {"x": tensors["a.x"]}
