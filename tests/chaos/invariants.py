"""What must hold after every attack, and what two runs that ended the same have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from adaptkit.checkpoints import load_state, load_tensors
from adaptkit.errors import DataError

STATES = ("running", "done", "failed", "interrupted")
EXIT_CODES = (0, 2, 3, 4, 5, 6, 7, 8, 75)  # 1 is a bug
# `images` counts those whose time was measured: a resumed run leaves out the window it was stopped in
CLOCKED = (
    "images_per_second",
    "data_wait_percent",
    "seconds",
    "wait",
    "timings",
    "throughput",
    "compile_seconds",
    "images",
)

Snapshot = dict[str, tuple[int, int]]


def snapshot(base: Path, *without: Path) -> Snapshot:
    """Size and time of every file below `base`, but for those below the folders `without`."""
    files = (path for path in base.rglob("*") if not any(path.is_relative_to(folder) for folder in without))
    return {str(path.relative_to(base)): _stamp(path) for path in files if path.is_file()}


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def violations(
    run: Path, code: int, errors: str, killed_by: tuple[int, ...], before: Snapshot, now: Snapshot
) -> list[str]:
    """What a process left that it should not have; `killed_by` are the signals that may have ended it."""
    found = list(_whole(run))
    if code not in EXIT_CODES and -code not in killed_by:
        found.append(f"exit code {code}: {errors[-300:]}")
    if "Traceback" in errors:
        found.append(f"a traceback: {errors[-600:]}")
    if code > 0 and errors.count("error: ") != 1:
        found.append(f"exit code {code} without its one line: {errors[-300:]}")
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if changed:
        found.append(f"written outside the run: {changed[:3]}")
    return found + list(_consistent(run, code))


def _whole(run: Path) -> Iterator[str]:
    for file in (run / "checkpoints").glob("*.safetensors"):
        try:
            load_tensors(file)
        except DataError as error:
            yield str(error)
    for name in ("status.json", "manifest.json", "report.json", "backbone/config.json"):
        if (run / name).exists():
            try:
                json.loads((run / name).read_text(encoding="utf-8"))
            except ValueError as error:
                yield f"{name}: {error}"


def _consistent(run: Path, code: int) -> Iterator[str]:
    status = _status(run)
    state = status.get("state")
    if status and state not in STATES:
        yield f"status.json: unknown state {state!r}"
    if code == 0:
        if state != "done" or not (run / "report.json").exists():
            yield f"exit code 0, but the state is {state!r}"
        yield from (f"left behind: {part.relative_to(run)}" for part in run.rglob("*.part"))
    if code == 75 and (run / "recipe.yaml").exists() and state not in ("interrupted", "done"):
        yield f"exit code 75, but the state is {state!r}"


def _status(run: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads((run / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not there yet; a damaged one is told by `_whole`
        return {}
    return document


def differences(one: Path, two: Path) -> list[str]:
    """What is not bit for bit the same in two finished runs, but for what a clock decides."""
    found = []
    names = [sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()) for run in (one, two)]
    if names[0] != names[1]:
        found.append(f"files: {sorted(set(names[0]) ^ set(names[1]))}")
    for name in set(names[0]) & set(names[1]):
        if name.endswith(".safetensors"):
            found += [f"{name}: {what}" for what in _tensor_differences(one / name, two / name)]
    for name in ("metrics.jsonl", "bad_images.jsonl"):
        if _lines(one / name) != _lines(two / name):
            found.append(name)
    for name in ("report.json", "status.json"):
        first, second = (_timeless(json.loads((run / name).read_text(encoding="utf-8"))) for run in (one, two))
        found += [f"{name}: {what}" for what in _unlike(first, second)]
    return sorted(found)


def _tensor_differences(one: Path, two: Path) -> Iterator[str]:
    first, second = load_file(one), load_file(two)
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second or _bits(first[name]) != _bits(second[name]):
            yield name
    if one.parent.name == "checkpoints":
        yield from (f"state: {what}" for what in _unlike(_timeless(load_state(one)), _timeless(load_state(two))))


def _unlike(one: Any, two: Any, where: str = "") -> Iterator[str]:
    """Where two JSON documents differ."""
    if isinstance(one, dict) and isinstance(two, dict):
        for key in sorted(one.keys() | two.keys()):
            yield from _unlike(one.get(key), two.get(key), f"{where}.{key}".lstrip("."))
    elif one != two:
        yield f"{where} {one} and {two}"


def _bits(tensor: Any) -> tuple[str, tuple[int, ...], bytes]:
    return str(tensor.dtype), tuple(tensor.shape), tensor.numpy().tobytes()


def _lines(file: Path) -> list[Any]:
    return [_timeless(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def _timeless(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _timeless(part) for key, part in value.items() if key not in CLOCKED}
    return [_timeless(part) for part in value] if isinstance(value, list) else value
