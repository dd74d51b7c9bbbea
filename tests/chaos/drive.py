"""Attack real runs, resume them, and see that they end bit for bit where an undisturbed one ends.

    python tests/chaos/drive.py [--kills 20] [--seed 0] [--scenario kill|bursts|disk|images|all] [--workers 0,2]

A kill, a burst of signals, a full disk and damaged images come at moments drawn from the seed: after a delay, or just
before the n-th access to a file of the run. Exit code 0 when all held, 1 when not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

import torch  # noqa: E402
from bad_machine import fill, namespaces  # noqa: E402
from chaos.invariants import differences  # noqa: E402
from chaos.stage import STOP_SECONDS, Blow, Ended, Stage  # noqa: E402
from conftest import draw_image  # noqa: E402

import adaptkit.cli.console  # noqa: E402  (so that a forked process has nothing left to import)
import adaptkit.train  # noqa: E402, F401
from adaptkit.owner import this_process  # noqa: E402

torch.set_num_threads(1)
SCENARIOS = ("kill", "bursts", "disk", "images")
REAL_EVERY, REAL_BURST = 7, 4  # every so many kills and bursts hit a `python -m adaptkit`
IMPORT_SECONDS = 5.0  # of such a process
Strike = Callable[[int], None]


class Drive:
    """One stage, its undisturbed run, and attacks on its twins."""

    def __init__(self, base: Path, workers: int, seed: int, deadline: float) -> None:
        self.stage = Stage(base, workers).build()
        self.random, self.deadline = random.Random(seed), deadline
        self.num_runs = 0
        self.plain = base / "runs" / "undisturbed"
        self.first = self.stage.go(self.plain)
        if self.first.code:
            raise SystemExit(f"the undisturbed run failed: {self.first.errors}")

    def fresh(self, name: str, folder: Path | None = None) -> Path:
        self.num_runs += 1
        return (folder or self.stage.base / "runs") / f"{name}-{self.num_runs}"

    def in_time(self) -> bool:
        return time.monotonic() < self.deadline

    def moment(self, strike: Strike, name: str, share_of_events: float = 0.7, real: bool = False) -> Blow:
        """A blow at a random moment of the life of an undisturbed run."""
        if not real and self.random.random() < share_of_events:
            event = self.random.randint(1, self.first.events)
            return Blow(strike, event=event, name=f"{name} at access {event}")
        delay = self.random.uniform(0, self.first.seconds + (IMPORT_SECONDS if real else 0))
        return Blow(strike, delay=delay, name=f"{name} after {delay:.2f} s")

    def finish(self, run: Path, what: str, same: bool = True, outside: tuple[Path, ...] = ()) -> None:
        """Resume undisturbed; the end must be that of the undisturbed run."""
        ended = self.stage.go(run, outside=outside)
        if ended.code:
            self.stage.problems.append(f"{run.name}, {what}: resume ended with {ended.code}: {ended.errors[-400:]}")
        elif same:
            self.compare(run, what)
        shutil.rmtree(run, ignore_errors=True)

    def compare(self, run: Path, what: str) -> None:
        if found := differences(self.plain, run):
            self.stage.problems.append(f"{run.name}, {what}: not what an undisturbed run ends with: {found[:6]}")

    def kill(self, kills: int) -> int:
        """Kill runs again and again until they are done; the number of kills that fell."""
        fallen, run, last = 0, self.fresh("kill"), ""
        while fallen < kills and self.in_time():
            real = fallen % REAL_EVERY == REAL_EVERY - 1
            blow = self.moment(lambda pid: os.kill(pid, signal.SIGKILL), "SIGKILL", real=real)
            ended = self.stage.go(run, blow, real, killed_by=(signal.SIGKILL,))
            if ended.code == -signal.SIGKILL:
                fallen, last = fallen + 1, f"{last}; {blow.name}"
            elif ended.code == 0:
                self.compare(run, last)
                shutil.rmtree(run)
                run, last = self.fresh("kill"), ""
            else:
                self.stage.problems.append(f"{run.name}, {last}: ended with {ended.code}: {ended.errors[-400:]}")
                run, last = self.fresh("kill"), ""
        if run.exists():
            self.finish(run, last)
        return fallen

    def bursts(self, count: int) -> int:
        """Signals in several manners; exit code 75, the state saved, and the same end."""
        for number in range(count):
            if not self.in_time():
                return number
            manner = list(BURSTS)[number % len(BURSTS)]
            run, real = self.fresh("burst"), number % REAL_BURST == REAL_BURST - 1
            blow = self.moment(BURSTS[manner], manner, 0.5 if manner in INSIDE else 0, real)
            ended = self.stage.go(run, blow, real, killed_by=(TERM, INT, HUP))
            self._stopped(run, blow, ended)
            self.finish(run, blow.name)
        return count

    def _stopped(self, run: Path, blow: Blow, ended: Ended) -> None:
        """Dead by the signal itself only before there was a run; done only when the signal came too late."""
        late = ended.code == 0
        early = ended.code < 0 and not (run / "recipe.yaml").exists()
        if ended.struck and ended.code != 75 and not late and not early:
            self.stage.problems.append(f"{run.name}, {blow.name}: exit code {ended.code}: {ended.errors[-400:]}")
        if ended.after_blow > STOP_SECONDS:
            self.stage.problems.append(f"{run.name}, {blow.name}: {ended.after_blow:.0f} s to stop")

    def disk(self, count: int) -> int:
        """A full disk, or where none may be mounted files that may not grow; exit code 8, and the same end."""
        may_mount = "CHAOS_MAY_MOUNT" in os.environ
        largest = max(file.stat().st_size for file in self.plain.rglob("*") if file.is_file())
        for number in range(count):
            if not self.in_time():
                return number
            if may_mount and number % 2 == 0:
                self._fill_disk()
                continue
            run, limit = self.fresh("limit"), int(largest ** self.random.uniform(0.3, 1))
            ended = self.stage.go(run, limit_bytes=limit)
            self._is_machine_error(run, f"files of at most {limit} bytes", ended)
            self.finish(run, f"files of at most {limit} bytes")
        return count

    def _fill_disk(self) -> None:
        disk = self.stage.base / "disk"
        disk.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
        try:
            run = self.fresh("disk", disk)
            blow = self.moment(lambda pid: fill(disk) and None, "a full disk")
            ended = self.stage.go(run, blow, outside=(disk,))
            self._is_machine_error(run, blow.name, ended)
            (disk / "somebody-elses-file").unlink(missing_ok=True)
            self.finish(run, blow.name, outside=(disk,))
        finally:
            subprocess.run(["umount", disk], check=True)

    def _is_machine_error(self, run: Path, what: str, ended: Ended) -> None:
        if ended.code not in (0, 8):
            self.stage.problems.append(f"{run.name}, {what}: exit code {ended.code}: {ended.errors[-400:]}")

    def images(self, count: int) -> int:
        """Images change under a run, and between two of its lives."""
        for number in range(count):
            if not self.in_time():
                return number
            if number % 3 == 2:
                self._change_while_stopped()
            else:
                self._damage_while_running(3 if number % 3 == 0 else 60)
        return count

    def _damage_while_running(self, num_images: int) -> None:
        data, run = self.stage.base / "data", self.fresh("images")
        kept = shutil.copytree(data, self.stage.base / "kept")
        victims = self.random.sample(sorted(data.rglob("*.jpg")), num_images)
        seed = self.random.random()
        blow = self.moment(lambda pid: damage(victims, random.Random(seed)), f"{num_images} images damaged")
        ended = self.stage.go(run, blow, outside=(data,))
        if ended.code not in (0, 3):
            self.stage.problems.append(f"{run.name}, {blow.name}: exit code {ended.code}: {ended.errors[-400:]}")
        if ended.code == 0:
            listed = len((run / "bad_images.jsonl").read_text().splitlines())
            told = json.loads((run / "report.json").read_text())["data"]["bad_images"]
            if listed != told:
                self.stage.problems.append(f"{run.name}, {blow.name}: {listed} images listed, {told} reported")
        shutil.rmtree(data)
        kept.rename(data)
        self.finish(run, f"{blow.name}, mended", same=False)

    def _change_while_stopped(self) -> None:
        data, run = self.stage.base / "data", self.fresh("images")
        blow = self.moment(lambda pid: os.kill(pid, signal.SIGTERM), "SIGTERM")
        self.stage.go(run, blow, killed_by=(signal.SIGTERM,))
        victim = self.random.choice(sorted(data.rglob("*.jpg")))
        away = victim.rename(self.stage.base / "away.jpg")
        learnt, done = (run / "checkpoints" / "last.safetensors").exists(), (run / "report.json").exists()
        if learnt and not done:
            ended = self.stage.go(run)
            if ended.code != 3 or victim.name not in ended.errors:
                self.stage.problems.append(f"{run.name}: other images accepted: {ended.code} {ended.errors[-300:]}")
        away.rename(victim)
        self.finish(run, f"{blow.name}, an image away and back")


def send(*numbers: int, pause: float = 0.015, to_group: bool = False) -> Strike:
    """A strike that sends signals, one after the other."""

    def strike(pid: int) -> None:
        for position, number in enumerate(numbers):
            time.sleep(pause if position else 0)
            try:
                (os.killpg if to_group else os.kill)(pid, number)
            except ProcessLookupError:
                return

    return strike


TERM, INT, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
BURSTS: dict[str, Strike] = {
    "three SIGTERM in 50 ms": send(TERM, TERM, TERM),
    "SIGTERM to the group": send(TERM, to_group=True),
    "SIGHUP": send(HUP),
    "SIGTERM, SIGINT, SIGHUP in 50 ms": send(TERM, INT, HUP),
    "one SIGTERM": send(TERM),
    "SIGINT to the group, three times": send(INT, INT, INT, to_group=True),
    "SIGTERM, and SIGINT 3 s later": send(TERM, INT, pause=3.0),
}
INSIDE = ("three SIGTERM in 50 ms", "SIGHUP", "SIGTERM, SIGINT, SIGHUP in 50 ms", "one SIGTERM")


def damage(victims: list[Path], draw: random.Random) -> None:
    """Remove, cut, overwrite, or put a folder in the place of images; some are only renamed and come back."""
    for number, victim in enumerate(victims):
        manner = draw.randrange(5)
        if manner == 0:
            victim.unlink()
        elif manner == 1:
            os.truncate(victim, victim.stat().st_size // 2)
        elif manner == 2:
            victim.write_bytes(draw.randbytes(500))
        elif manner == 3:
            victim.unlink()
            victim.mkdir()
        else:
            away = victim.with_suffix(".away")
            victim.rename(away)
            draw_image(9, number).save(victim, quality=60)
            away.rename(victim)


def survivors(base: Path) -> list[int]:
    """Processes that still work in the folder: workers whose parent was killed."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve() == base / "cwd" and int(entry.name) != this_process()["pid"]:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def drive(arguments: argparse.Namespace, workers: int, deadline: float) -> dict[str, object]:
    """All scenarios with one number of workers."""
    started, counts = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        base = Path(folder).resolve()
        one = Drive(base, workers, arguments.seed, deadline)
        for name in scenarios(arguments):
            one.random.seed(f"{arguments.seed} {workers} {name}")  # whatever the scenarios before it drew
            counts[name] = getattr(one, name)(arguments.kills if name == "kill" else arguments.rounds)
        patience = time.monotonic() + 20  # a worker looks for its parent every 5 seconds
        while (left := survivors(base)) and time.monotonic() < patience:
            time.sleep(0.2)
        one.stage.problems += [f"process {pid} outlived its parent" for pid in left]
        accesses, seconds = one.first.events, one.first.seconds
    facts = {"workers": workers, "seed": arguments.seed, "undisturbed_seconds": round(seconds, 1), "accesses": accesses}
    return facts | {"done": counts, "seconds": round(time.monotonic() - started), "problems": one.stage.problems}


def scenarios(arguments: argparse.Namespace) -> list[str]:
    """The scenarios that were asked for. Raises `SystemExit` for an unknown one."""
    names = list(SCENARIOS) if arguments.scenario == "all" else arguments.scenario.split(",")
    if unknown := set(names) - set(SCENARIOS):
        raise SystemExit(f"no such scenario: {', '.join(sorted(unknown))}; there are {', '.join(SCENARIOS)}, all")
    return names


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=6, help="attacks in each of the other scenarios")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no attack after so long")
    parser.add_argument("--scenario", default="all", help="all, or some of kill,bursts,disk,images")
    parser.add_argument("--workers", default="0,2")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    wants_disk = "disk" in scenarios(arguments) and "CHAOS_MAY_MOUNT" not in os.environ
    if wants_disk and (inside := namespaces()[:-2]):  # mounts live and die with them; without the last two: as root
        words = [*inside, sys.executable, __file__, *sys.argv[1:]]
        os.execvpe(words[0], words, os.environ | {"CHAOS_MAY_MOUNT": "1"})
    deadline = time.monotonic() + 60 * arguments.minutes
    results = [drive(arguments, int(workers), deadline) for workers in arguments.workers.split(",")]
    if arguments.json:
        print(json.dumps(results, indent=2))
    else:
        for result in results:
            print(", ".join(f"{key} {value}" for key, value in result.items() if key != "problems"))
            print("".join(f"  {problem}\n" for problem in result["problems"]) or "  no problem\n", end="")  # type: ignore[attr-defined]
    return int(any(result["problems"] for result in results))


if __name__ == "__main__":
    sys.exit(main())
