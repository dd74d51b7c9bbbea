"""The commands that the documentation shows: found, and made cheap enough to be run.

`NOT_RUN` is the whole list of those that are only parsed, with the reason. Everything else is executed as a process of
its own, after these changes: names whose weights would be fetched become `nano`, images become a few of the samples,
and runs get `CHEAP` settings unless the command has its own.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_runs import ROOT, environment

from adaptkit.cli.command_demo import ASSETS

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
NOT_RUN = {  # pattern: why it is only parsed
    r"^pip ": "installs; tests/test_packaging.py and the gate do",
    r"^pytest": "these tests",
    r"^adaptkit demo$": "takes minutes; tests/test_demo.py runs it",
    r"--gpus": "needs GPUs; tests/test_launch.py starts several processes on the CPU",
    r"^tensorboard ": "a server that stays",
    r"^(torchrun|accelerate launch) ": "several processes; tests/test_launch.py has them",
    r"^python (tests|benchmarks)/": "measures for minutes to hours; their own tests run them small",
}
BLOCK = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
COMMANDS = ("adaptkit", "python", "pip", "pytest", "torchrun", "accelerate")
FOLDERS = {  # what stands in the documents: what it becomes here
    "D": "target",
    "eurosat/train": "target",
    "eurosat/test": "labelled/test",
    "eurosat": "labelled",
}
CHEAP = {  # flag or key: value
    "--steps": "4",
    "--batch-size": "16",
    "views.num_local": "0",
    "objective.hidden_dim": "32",
    "checkpoint_every": "100%",
    "probe.every": "100%",
}
CHEAP_IN_PYTHON = "steps=4, batch_size=16, views__num_local=0, objective__hidden_dim=32"
HANGS_S = 1200  # far more than anything takes on a busy machine
HAS_RUN = ("resume", "report", "export", "embed", "codes", "probe")  # commands whose run must be there before


@dataclass(frozen=True)
class Shown:
    """A command as a document shows it."""

    document: str
    text: str
    words: tuple[str, ...]

    @property
    def arguments(self) -> tuple[str, ...] | None:
        """What follows `adaptkit` or `-m adaptkit`; None for other commands."""
        return self.words[self.words.index("adaptkit") + 1 :] if "adaptkit" in self.words else None

    @property
    def reason(self) -> str | None:
        """Why it is not run, if it is not."""
        return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, self.text)), None)


def blocks(document: Path, *languages: str) -> list[str]:
    """The text of the fenced blocks in these languages."""
    found = BLOCK.finditer(document.read_text(encoding="utf-8"))
    return [match["text"] for match in found if match["language"] in languages]


def shown_commands(document: Path) -> list[Shown]:
    """In fenced blocks of bash and console, after `$ ` in others, and in indented blocks; in their order."""
    text = document.read_text(encoding="utf-8")
    scripts = [(match.start(), match["language"], match["text"]) for match in BLOCK.finditer(text)]
    without = BLOCK.sub(lambda match: "\n" * len(match[0]), text)  # as long, so that positions stay
    scripts += [(match.start(), "indented", match[0]) for match in INDENTED.finditer(without)]
    return [
        Shown(document.name, line, words)
        for _, language, script in sorted(scripts)
        for line, words in _lines(script, language)
    ]


def _lines(script: str, language: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for line in re.sub(r"\\\n\s*", "", script).splitlines():
        prompted = line.startswith("$ ")
        line = line.strip().removeprefix("$ ")
        is_command = language == "bash" or prompted or (language == "indented" and line.split(" ")[0] in COMMANDS)
        for part in line.split(" && ") if is_command else ():
            words = tuple(shlex.split(part.partition(" > ")[0], comments=True))
            if words:
                yield shlex.join(words), words


def prepare(folder: Path) -> Path:
    """A folder with what the commands of the documents take: images, labelled images, a recipe, weights."""
    for index, image in enumerate(sorted((ASSETS / "eurosat").glob("*.jpg"))[:60]):
        (folder / "target").mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / "target" / f"{index:03d}.jpg")
    for part in ("train", "test"):
        for kind in sorted((ASSETS / "eurosat_labelled" / part).iterdir())[:4]:
            (folder / "labelled" / part / kind.name).mkdir(parents=True)
            for image in sorted(kind.glob("*.jpg"))[:6]:
                shutil.copy(image, folder / "labelled" / part / kind.name)
    (folder / "mine.yaml").write_text("views:\n  vflip: 0.5\n")
    state = {f"backbone.{name}": tensor for name, tensor in load_file(ASSETS / "nano" / "model.safetensors").items()}
    torch.save({"teacher": state, "epoch": 1}, folder / "checkpoint.pth")  # as DINO's script saves
    return folder


def finished_run(folder: Path) -> Path:
    """A run of a few steps on the images of `prepare`, to be copied to where a command expects one."""
    words = ["adapt", "--backbone", "nano", "--data", "target", "--output", "finished"]
    done = adaptkit_in(folder, [*words, *cheap(()), "--quiet"])
    assert done.returncode == 0, done.stderr
    return folder / "finished"


def cheap(arguments: tuple[str, ...]) -> list[str]:
    """The settings of `CHEAP` that the arguments do not have themselves."""
    given = {word.partition("=")[0] for word in arguments}
    return [
        word
        for key, value in CHEAP.items()
        if key not in given
        for word in ((key, value) if key.startswith("--") else ("--set", f"{key}={value}"))
    ]


def runnable(arguments: tuple[str, ...]) -> list[str]:
    """The arguments of adaptkit with names, images and settings that can be had here."""
    words = [*arguments]
    for at, flag in enumerate(arguments[:-1]):
        value = arguments[at + 1]
        if flag in ("--data", "--labels", "--queries"):
            words[at + 1] = FOLDERS.get(value, value)
        if flag == "--steps":
            words[at + 1] = CHEAP["--steps"]
        if flag == "--batch-size" and words[0] == "adapt":
            words[at + 1] = str(min(int(value), 32))
        if flag == "--backbone" and not value.startswith("runs/"):
            words[at + 1] = "nano"
    return [*words, *cheap(arguments)] if words[0] in ("adapt", "check") else words


def adaptkit_in(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run adaptkit in a folder, in a process of its own."""
    whole = [sys.executable, "-m", "adaptkit", *words]
    return subprocess.run(whole, cwd=folder, env=environment(), capture_output=True, text=True, timeout=HANGS_S)


def run_document(shown: list[Shown], folder: Path, run: Path) -> list[str]:
    """Run the commands in `folder`, one after the other; returns what went wrong, a line each."""
    failures = []
    for each in shown:
        if each.arguments is None or each.reason is not None:
            continue
        if each.arguments[0] in HAS_RUN:
            for word in re.findall(r"\bruns/\w+", " ".join(each.arguments)):
                if not (folder / word).exists():
                    shutil.copytree(run, folder / word)
        words = runnable(each.arguments)
        done = adaptkit_in(folder, words)
        if done.returncode != 0:
            failures.append(f"{each.text}\n  as {shlex.join(words)}\n  {done.returncode}: {done.stderr[-500:]}")
        elif "--json" in words:
            json.loads(done.stdout)
    return failures
