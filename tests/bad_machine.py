"""Full disks, missing permissions, no network: real ones, in namespaces of their own, where no mount can leak.

`run_cases` starts this file as a script inside them; it prints what every case ended with as one JSON document.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_runs import environment, flags

Ended = dict[str, Any]
NAMESPACES = ["unshare", "--mount", "--net"]
AS_ROOT_INSIDE = ["--user", "--map-root-user"]
OBEY_PERMISSIONS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


def namespaces() -> list[str]:
    """The command in front of another that may then mount, has no network and obeys permissions. Empty: forbidden."""
    words = [*NAMESPACES, *([] if os.geteuid() == 0 else AS_ROOT_INSIDE), *OBEY_PERMISSIONS]
    try:
        subprocess.run([*words, "mount", "-t", "tmpfs", "tmpfs", "/tmp"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return words


def run_cases(inside: list[str], backbone: Path, images: Path, folder: Path) -> dict[str, Ended]:
    """Every case of `CASES`, run in one process inside the namespaces."""
    words = [*inside, sys.executable, __file__, str(backbone), str(images), str(folder)]
    cache = environment(HF_HOME=str(folder / "cache"))
    done = subprocess.run(words, env=cache, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    cases: dict[str, Ended] = json.loads(done.stdout)
    return cases


class Machine:
    """What the cases share: a backbone, images, and a folder for each case."""

    def __init__(self, backbone: str, images: str, folder: str) -> None:
        self.backbone, self.images, self.folder = backbone, images, Path(folder)

    def invoke(self, *words: object) -> Ended:
        """`adaptkit WORDS --json`."""
        from click.testing import CliRunner

        from adaptkit.cli import main

        started = time.monotonic()
        result = CliRunner().invoke(main, [*map(str, words), "--json"], prog_name="adaptkit")
        ended = {"exit_code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}
        return ended | {"seconds": time.monotonic() - started}

    def adapt(self, output: Path, **changes: str) -> Ended:
        """A tiny run; `changes` replace the backbone or the images."""
        given = {"backbone": self.backbone, "data": self.images, "output": output} | changes
        return self.invoke("adapt", *(word for key, value in given.items() for word in (f"--{key}", value)), *flags())

    def make(self, name: str) -> Path:
        """An empty folder."""
        folder = self.folder / name
        folder.mkdir(parents=True)
        return folder

    def disk(self, name: str, options: str) -> Path:
        """A small file system of its own."""
        folder = self.make(name)
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
        return folder


def fill(disk: Path) -> Path:
    """A file that takes all the space there is."""
    stuffing = disk / "somebody-elses-file"
    try:
        with open(stuffing, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        pass
    return stuffing


def damage(folder: Path) -> list[str]:
    """Files that are not whole, or that should not be there."""
    from safetensors import safe_open

    found = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    file.keys()
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            elif path.suffix == ".part":
                found.append(path.name)
        except Exception:
            found.append(path.name)
    return found


def full_at_the_start(machine: Machine) -> Ended:
    """Nothing can be written at all."""
    disk = machine.disk("start", "size=64k")
    fill(disk)
    ended = machine.adapt(disk / "run")
    return ended | {"damage": damage(disk)}


def full_from(machine: Machine, event: str, where: Callable[..., bool]) -> Ended:
    """The disk fills up when the reporter hears of `event` with arguments that `where` accepts.

    Afterwards space is freed and the run resumed.
    """
    from adaptkit.cli.console import RichReporter

    disk = machine.disk(f"full-{len(list(machine.folder.iterdir()))}", "size=64m")
    original = getattr(RichReporter, event)

    def fill_and_go_on(reporter: RichReporter, *arguments: Any) -> None:
        if where(*arguments):
            fill(disk)
        original(reporter, *arguments)

    setattr(RichReporter, event, fill_and_go_on)
    try:
        ended = machine.adapt(disk / "run")
    finally:
        setattr(RichReporter, event, original)
    ended |= {"damage": damage(disk / "run"), "status": json.loads((disk / "run" / "status.json").read_text())}
    ended["checkpoint"] = (disk / "run" / "checkpoints" / "last.safetensors").is_file()
    (disk / "somebody-elses-file").unlink()
    return ended | {"resumed": machine.invoke("resume", disk / "run")["exit_code"]}


def parent_is_read_only(machine: Machine) -> Ended:
    """A file system that is mounted read-only."""
    return machine.adapt(machine.disk("read-only", "size=64k,ro") / "run")


def parent_is_somebody_elses(machine: Machine) -> Ended:
    """A folder that may be read and not written."""
    parent = machine.make("locked")
    parent.chmod(0o555)
    return machine.adapt(parent / "run")


def images_are_somebody_elses(machine: Machine) -> Ended:
    """A folder of images that may not be listed."""
    images = machine.make("private")
    images.chmod(0o000)
    try:
        return machine.adapt(machine.folder / "private-run", data=str(images))
    finally:
        images.chmod(0o700)  # so that it can be removed


def no_network(machine: Machine) -> Ended:
    """A backbone of the hub that is not in the cache."""
    return machine.adapt(machine.folder / "offline", backbone="vit_small_patch16_224.dino")


CASES: dict[str, Callable[[Machine], Ended]] = {
    "full at the start": full_at_the_start,
    "full before the first checkpoint": lambda m: full_from(m, "phase", lambda title: title.startswith("adapting")),
    "full in the middle": lambda m: full_from(m, "training", lambda step, *_: step == 4),
    "full at the export": lambda m: full_from(m, "phase", lambda title: title.startswith("exporting")),
    "read-only": parent_is_read_only,
    "no permission": parent_is_somebody_elses,
    "private images": images_are_somebody_elses,
    "no network": no_network,
}

if __name__ == "__main__":
    from adaptkit import schedules

    schedules.MIN_REFIT_STEPS = 2  # instead of fifty, for the head of an export that is not the last teacher
    this = Machine(*sys.argv[1:])
    print(json.dumps({name: case(this) for name, case in CASES.items()}))
