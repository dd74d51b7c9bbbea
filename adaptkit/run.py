"""The run directory: made before torch is imported, so that even a failed start leaves a record.

runs/NAME/  recipe.yaml  status.json  manifest.json  metrics.jsonl  bad_images.jsonl  images.index
            checkpoints/  cache/  backbone/  head.safetensors  report.json  report.md  report.html  pictures.json
            codes.json  codes_pictures.json  (by `adaptkit codes`)
            tracking/
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaptkit.errors import FailedElsewhere, MachineError, UsageError, is_local
from adaptkit.owner import alone, is_alive_elsewhere, this_process
from adaptkit.places import short_name
from adaptkit.recipe import Recipe, dump_recipe, load_recipe

INDEX = "images.index"  # what a scan of the target found
OURS = (
    "recipe.yaml",
    "status.json",
    "manifest.json",
    "metrics.jsonl",
    "bad_images.jsonl",
    INDEX,
    "checkpoints",
    "cache",
    "backbone",
    "head.safetensors",
    "report.json",
    "report.md",
    "report.html",
    "pictures.json",
    "codes.json",
    "codes_pictures.json",
    "tracking",
)
RUNNING = "running"  # the state of a run that has not ended, or was killed
PART = re.compile(r"(\.\d+)?\.part$")
MACHINE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EMFILE}


@dataclass(frozen=True)
class Run:
    """One execution's directory and its resolved recipe."""

    path: Path
    recipe: Recipe

    @classmethod
    def create(cls, recipe: Recipe, output: Path | None = None, overwrite: bool = False) -> Run:
        """Make the directory with `recipe.yaml` and `status.json`.

        Without `output` the name is made from data and backbone and never taken twice. `overwrite` removes the
        files of an earlier run, and only those. Raises `UsageError` if the folder is not empty, `MachineError` if
        it cannot be written. In a launch of several processes all but the first only wait for the directory.
        """
        path = Path(os.path.abspath(output)) if output else _fresh_name(recipe)
        if _rank() > 0:
            return cls(path, recipe)
        run = cls(path, recipe)
        with machine_errors(path):
            if not path.is_dir():
                check_output(path, overwrite)
                path.mkdir(parents=True, exist_ok=True)
            with alone(path):  # another process may be about to begin there
                if check_output(path, overwrite):
                    run.refuse_living()
                    _clear(path)
                write_text(path / "recipe.yaml", _as_asked(recipe))
                run.status(RUNNING, None, "started")
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """An existing run. Raises `UsageError` if the folder is none."""
        folder = Path(os.path.abspath(path))
        if not (folder / "recipe.yaml").is_file():
            raise UsageError(f"{path}: no run here (no recipe.yaml); give the folder that `adaptkit adapt` made")
        return cls(folder, load_recipe(folder / "recipe.yaml"))

    def replace_recipe(self, recipe: Recipe) -> Run:
        """The same run with a recipe in which more is resolved; `recipe.yaml` is rewritten."""
        self.write("recipe.yaml", dump_recipe(recipe))
        return Run(self.path, recipe)

    def claim(self) -> None:
        """Make this process the one that writes the run, and remove what a killed one left half written.

        Raises `UsageError` while another process of this machine is at it.
        """
        if _rank() > 0:
            return
        with machine_errors(self.path), alone(self.path):
            self.refuse_living()
            for folder in (self.path, self.path / "checkpoints", self.path / "backbone"):
                for part in folder.glob("*.part"):
                    part.unlink(missing_ok=True)
            self.status(RUNNING, None, "started")

    def refuse_living(self) -> None:
        """Raise `UsageError` while another process of this machine writes the run."""
        status = read_status(self.path)
        if status.get("state") == RUNNING and is_alive_elsewhere(status):
            raise UsageError(f"{self.path}: still running as process {status['pid']} on this machine; stop it first")

    def status(self, state: str, exit_code: int | None, message: str, error: BaseException | None = None) -> None:
        """Write `status.json`: launchers hide exit codes, so the code is also here.

        While it runs also says which process it is: a kill leaves `running`, and the process is gone then. Of several
        processes the main one speaks for all, except that each may fail alone, by an `error` of its own.
        """
        if not isinstance(error, FailedElsewhere) and (_rank() == 0 or is_local(error, exit_code)):
            document = {"state": state, "exit_code": exit_code, "message": message}
            self.write_json("status.json", document | (this_process() if state == RUNNING else {}))

    def failed_elsewhere(self, error: Exception) -> FailedElsewhere | None:
        """A process that fails closes its connections; the others then fail at what they next do together."""
        status = read_status(self.path)
        if isinstance(error, RuntimeError) and "RANK" in os.environ and status.get("state") == "failed":
            return FailedElsewhere(status["message"], status["exit_code"])
        return None

    def write(self, name: str, text: str) -> None:
        """Write a text file of the run, whole or not at all."""
        with machine_errors(self.path / name):
            write_text(self.path / name, text)

    def write_json(self, name: str, document: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, whole or not at all."""
        self.write(name, json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file of the run; None when it is not there. Raises `UsageError` when it is damaged."""
        file = self.path / name
        if not file.is_file():
            return None
        try:
            document = json.loads(file.read_text(encoding="utf-8", errors="surrogateescape"))
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise damaged(file)
        return document

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`. Numbers that are not finite become null: JSON knows none."""
        finite = {key: None if isinstance(v, float) and v - v != 0 else v for key, v in record.items()}
        with machine_errors(self.path), open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def rewind_log(self, step: int) -> None:
        """Drop the lines after `step`: they are written again by the resumed run."""
        file = self.path / "metrics.jsonl"
        if _rank() == 0 and file.is_file():
            try:
                kept = [line for line in _whole_lines(file) if json.loads(line)["step"] <= step]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UsageError(f"{file}: damaged; remove it to go on without the log so far") from None
            self.write("metrics.jsonl", "".join(line + "\n" for line in kept))


def damaged(file: Path) -> UsageError:
    """What is said of a JSON file of a run that no run has written so."""
    return UsageError(f"{file}: damaged; restore it, or run again with `adaptkit adapt --overwrite`")


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, flush to the disk, rename: whole or not at all."""
    with atomic(path) as part, open(part, "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(text)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` if the block succeeds, removed if not."""
    part = path.with_name(path.name + (f".{_rank()}.part" if _rank() else ".part"))  # processes may fail together
    try:
        part.touch()
        mode = part.stat().st_mode
        yield part
        os.chmod(part, mode)  # safetensors makes files that only their owner can read
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def machine_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing permission into a `MachineError` of one line."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UsageError(f"{path.name[:40]}...: the name is too long for this disk; choose another") from None
        if error.errno == errno.EISDIR:
            raise UsageError(f"{error.filename2 or error.filename}: is a folder, and a file is wanted there") from None
        if error.errno not in MACHINE_ERRNOS:
            raise
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another --output"
        raise MachineError(f"{error.filename or path}: {error.strerror}; {advice}") from None


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _as_asked(recipe: Recipe) -> str:
    """The recipe as YAML; a batch size nobody asked for stays open until the images are counted.

    Written down it would count as asked for, and a run stopped before that could not shrink it when resumed.
    """
    text = dump_recipe(recipe)
    return text if "batch_size" in recipe.model_fields_set else re.sub(r"(?m)^batch_size: .*\n", "", text)


def _fresh_name(recipe: Recipe) -> Path:
    words = [short_name(recipe.data.path[0] if recipe.data.path else "run"), Path(recipe.backbone or "backbone").name]
    name = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", word).strip("._") or "run" for word in words)
    path, number = Path(os.path.abspath("runs")) / name, 1
    while path.exists():
        number += 1
        path = path.with_name(f"{name}-{number}")
    return path


def check_output(path: Path, overwrite: bool) -> bool:
    """Whether an earlier run lies there, to be replaced. Raises `UsageError` for anything else that is in the way."""
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir():
        raise UsageError(f"{nearest}: is a file; give --output a folder")
    if not path.is_dir() or not any(path.iterdir()):
        return False
    if all(entry.name.endswith(".part") and PART.sub("", entry.name) in OURS for entry in path.iterdir()):
        return True  # killed before the first file was whole: no run to go on with, nothing to lose
    if not overwrite and not _learnt_nothing(path):
        raise UsageError(
            f"{path}: not empty; add --overwrite to start again there, or go on with `adaptkit resume {path}`"
        )
    strangers = sorted(entry.name for entry in path.iterdir() if PART.sub("", entry.name) not in OURS)
    if strangers or not all((path / name).is_file() for name in ("recipe.yaml", "status.json")):
        what = f"holds {strangers[0]}, which no run made" if strangers else "is not a run"
        raise UsageError(f"{path}: --overwrite replaces runs only, and this folder {what}; choose another --output")
    return True


def _learnt_nothing(path: Path) -> bool:
    """Whether a start failed there before its first checkpoint: the corrected command may take its place."""
    state = read_status(path).get("state")
    return state == "failed" and not any((path / name).exists() for name in ("checkpoints", "backbone", "report.json"))


def read_status(path: Path) -> dict[str, Any]:
    """`status.json` of a run; empty if it is missing or damaged."""
    try:
        document = json.loads((path / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _clear(path: Path) -> None:
    """Remove a run's files, but for the two that make it one: killed in between it can still be overwritten."""
    for entry in path.iterdir():
        if entry.name not in ("recipe.yaml", "status.json"):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _whole_lines(file: Path) -> list[str]:
    """Lines that end in a newline; a kill in the middle of a line leaves a piece that counts for nothing."""
    return file.read_text(encoding="utf-8").split("\n")[:-1]
