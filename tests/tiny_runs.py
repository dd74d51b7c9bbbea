"""Whole runs on tiny real files, a second or two each: what the end-to-end tests share."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import adaptkit
from adaptkit.session import Silent

ROOT = Path(__file__).parent.parent

TINY = {
    "steps": 6,
    "batch_size": 8,
    "precision": "fp32",
    "workers": 0,
    "log_every": 2,
    "checkpoint_every": "2 steps",
    "objective.num_bits": 16,
    "objective.hidden_dim": 32,
    "views.num_local": 2,
    "head.warmup": "1 steps",
    "head.reset_every": "never",
    "probe.every": "2 steps",
    "select.alphas": [0.5],
}
NOT_REPRODUCIBLE = ("images_per_second", "data_wait_percent")


def tiny(**changes: Any) -> dict[str, Any]:
    """Settings for `adaptkit.adapt`: the tiny ones with changes (two underscores for a dot)."""
    settings = {key.replace(".", "__"): value for key, value in TINY.items()}
    return settings | changes


def adapt(backbone: Path, data: Path, output: Path, **changes: Any) -> adaptkit.AdaptResult:
    options = {key: changes.pop(key) for key in ("labels", "reporter", "overwrite", "recipe") if key in changes}
    return adaptkit.adapt(str(backbone), data, output=output, **options, **tiny(**changes))


def flags(changes: Mapping[str, Any] = {}) -> list[str]:
    """The tiny settings as `--set` arguments."""
    return [word for key, value in (TINY | dict(changes)).items() for word in ("--set", f"{key}={json.dumps(value)}")]


def environment(**extra: str) -> dict[str, str]:
    """For a subprocess: one thread, CPU, the checkout's package, and no launcher's variables."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = os.pathsep.join([str(ROOT), kept.get("PYTHONPATH", "")])
    return kept | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path} | extra


def command(*arguments: object, timeout: float = 300, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `adaptkit ARGUMENTS` in a process of its own."""
    words = [sys.executable, "-m", "adaptkit", *map(str, arguments)]
    return subprocess.run(words, env=environment(**extra), capture_output=True, text=True, timeout=timeout)


def read(run: Path, name: str) -> Any:
    return json.loads((run / name).read_text(encoding="utf-8"))


def log(run: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without what a clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in NOT_REPRODUCIBLE} for line in lines]


def assert_same_tensors(one: Path, two: Path) -> None:
    first, second = load_file(one), load_file(two)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"{one} and {two} differ in {different[:3]}"


def assert_same_run(one: Path, two: Path) -> None:
    """Export, head, last checkpoint, log and verdict are bit for bit the same."""
    assert log(one) == log(two)
    for name in ("checkpoints/last.safetensors", "backbone/model.safetensors", "head.safetensors"):
        assert_same_tensors(one / name, two / name)
    assert sorted(p.name for p in (one / "checkpoints").iterdir()) == sorted(
        p.name for p in (two / "checkpoints").iterdir()
    )
    first, second = read(one, "report.json"), read(two, "report.json")
    for key in ("verdict", "probes", "selected", "candidates", "guard"):
        assert first[key] == second[key], key


class Recorder(Silent):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.notes: list[str] = []
        self.steps: list[int] = []

    def phase(self, title: str) -> None:
        self.phases.append(title)

    def note(self, message: str) -> None:
        self.notes.append(message)

    def training(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)


class SignalAt(Recorder):
    """Sends this process a signal when the line of a step is logged, or when a phase of that name begins."""

    def __init__(self, step: int | None = None, phase: str | None = None, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.at_step, self.at_phase, self.number = step, phase, number

    def phase(self, title: str) -> None:
        super().phase(title)
        if self.at_phase is not None and self.at_phase in title:
            os.kill(os.getpid(), self.number)

    def training(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        super().training(step, total_steps, metrics)
        if step == self.at_step:
            os.kill(os.getpid(), self.number)
