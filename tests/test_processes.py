"""Two processes share a batch as if they were one; the launcher is torchrun, as users start it."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import adapt, environment, flags, log, read

from adaptkit.errors import DataError, UsageError
from adaptkit.inputs import fit_batch_size
from adaptkit.recipe import Recipe

SETTINGS: dict[str, Any] = {"steps": 4, "optim.lr": 1e-3, "head.reset_every": "50%"}


def words_of(*arguments: object, program: tuple[str, ...] = ("-m", "adaptkit")) -> list[str]:
    """`adaptkit ARGUMENTS`, or another program, in two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = ["--master_addr", "127.0.0.1", "--master_port", str(probe.getsockname()[1])]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", *address]
    return [*words, *program, *map(str, arguments)]


def launch(
    *arguments: object, program: tuple[str, ...] = ("-m", "adaptkit"), **extra: str
) -> subprocess.CompletedProcess[str]:
    words = words_of(*arguments, program=program)
    return subprocess.run(words, env=environment(**extra), capture_output=True, text=True, timeout=200)


@pytest.mark.slow
def test_two_processes_train_as_one(vit: Path, images: Path, tmp_path: Path) -> None:
    options = ["--backbone", vit, "--data", images, "--output", tmp_path / "two", *flags(SETTINGS), "--quiet"]
    done = launch("adapt", *options)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "two"
    assert read(run, "manifest.json")["num_processes"] == 2
    assert read(run, "status.json")["state"] == "done"
    assert not list(run.rglob("*.part"))
    one = adapt(vit, images, tmp_path / "one", **{key.replace(".", "__"): value for key, value in SETTINGS.items()}).run
    for mine, theirs in zip(log(one), log(run), strict=True):
        assert (mine["step"], mine["kind"]) == (theirs["step"], theirs["kind"])
        for key in ("loss", "bce", "coding_rate", "bit_agreement", "bit_information"):
            if key in mine:
                assert theirs[key] == pytest.approx(mine[key], rel=1e-4, abs=1e-6), key
    original = load_file(vit / "model.safetensors")
    first, second = (load_file(path / "checkpoints" / "last.safetensors") for path in (one, run))
    names = [f"student.backbone.{name}" for name in original]
    moved = length([first[f"student.backbone.{name}"] - value for name, value in original.items()])
    apart = length([first[name] - second[name] for name in names])
    # not entry by entry: where a gradient is nearly 0, Adam turns a difference of rounding into one of its direction
    assert apart < 1e-3 * moved, f"weights moved by {moved:.1e} and are {apart:.1e} apart"
    resumed = launch("resume", run, "--quiet")
    assert resumed.returncode == 0, resumed.stderr


def length(changes: list[torch.Tensor]) -> float:
    """Euclidean, over all tensors together."""
    return float(torch.cat([change.flatten().double() for change in changes]).norm())


@pytest.mark.slow
def test_resuming_with_two_processes(vit: Path, images: Path, tmp_path: Path) -> None:
    """Both read the checkpoint, one writes: the log is rewound once, the status written once."""
    options = ["--backbone", vit, "--data", images, "--output", tmp_path / "run", *flags(SETTINGS), "--quiet"]
    assert launch("adapt", *options).returncode == 0
    undisturbed = log(tmp_path / "run")
    for name in ("report.json", "report.md"):
        (tmp_path / "run" / name).unlink()
    for _ in range(2):
        done = launch("resume", tmp_path / "run", "--quiet")
        assert done.returncode == 0, done.stderr
        assert log(tmp_path / "run") == undisturbed
        (tmp_path / "run" / "report.json").unlink()


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_main_process_writes_the_status(rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaptkit.run import Run

    run = Run.create(Recipe(), tmp_path / "run")
    monkeypatch.setenv("RANK", rank)
    run.status("done", 0, "finished")
    assert read(run.path, "status.json")["state"] == ("done" if rank == "0" else "running")
    run.status("failed", 7, "out of memory")  # may strike any process alone
    assert read(run.path, "status.json")["state"] == "failed"


def test_batch_size_and_processes() -> None:
    explicit = Recipe(data="images", batch_size=10)
    assert fit_batch_size(explicit, 100, 2) == 10
    with pytest.raises(UsageError, match="does not divide by 4 processes; try 8"):
        fit_batch_size(explicit, 100, 4)
    with pytest.raises(DataError, match="9 training images, but batch_size is 10"):
        fit_batch_size(explicit, 9, 1)
    default = Recipe(data="images")
    assert fit_batch_size(default, 10_000, 3) == 63
    assert fit_batch_size(default, 84, 2) == 16
    assert fit_batch_size(default, 6, 1) == 6
    with pytest.raises(DataError, match="too few for 16 processes"):
        fit_batch_size(default, 20, 16)
