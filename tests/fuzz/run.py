"""Attack the readers of files with damaged ones, for minutes.

    python tests/fuzz/run.py [--target recipe|labels|images|weights|checkpoints|all] [--minutes 5] [--seed 0]

With atheris installed (`pip install atheris`) coverage guides the attacks, else chance alone. What does harm is
kept in --findings as a file, with its traceback beside it. Exit code 0 when nothing was found, 1 when something was.
"""

from __future__ import annotations

import argparse
import importlib.util
import mmap
import os
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from random import Random

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
HAS_ATHERIS = importlib.util.find_spec("atheris") is not None

if HAS_ATHERIS:
    import atheris

    with atheris.instrument_imports(include=["adaptkit", "yaml", "PIL"]):
        from fuzz.targets import Target, all_targets
else:
    from fuzz.targets import Target, all_targets

import torch  # noqa: E402
from fuzz.mutate import mutate  # noqa: E402
from fuzz.watch import attack  # noqa: E402

torch.set_num_threads(1)


class Campaign:
    """Attacks on one target, in a process of their own: one that crashes is a finding too."""

    def __init__(self, name: str, target: Target, seconds: float, seed: int, findings: Path) -> None:
        self.name, self.target, self.seed, self.findings = name, target, seed, findings
        self.ends = time.monotonic() + seconds
        self.base = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-"))
        self.count = mmap.mmap(-1, 8)  # shared with the process
        self.known: set[str] = set()
        findings.mkdir(parents=True, exist_ok=True)
        self.before = self._kept()

    def run(self) -> tuple[int, int]:
        """(attacks made, findings)."""
        while time.monotonic() < self.ends:
            child = os.fork()
            if not child:
                self._attack_on()
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) == 0:
                break
            self._keep((self.base / "last").read_bytes(), f"the process died with status {status}")
            self.seed += 1
        shutil.rmtree(self.base)
        return struct.unpack("Q", self.count[:])[0], len(self._kept() - self.before)

    def _kept(self) -> set[Path]:
        return {path for path in self.findings.glob(f"{self.name}-*") if path.suffix != ".txt"}

    def _attack_on(self) -> None:
        """In the child: never returns."""
        output = os.open(self.base / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        (_fuzz_with_atheris if HAS_ATHERIS else _fuzz_by_chance)(self)
        os._exit(0)

    def one(self, content: bytes) -> None:
        """One attack, counted; what it finds is kept, and the next can begin."""
        (self.base / "last").write_bytes(content)
        self.count[:] = struct.pack("Q", struct.unpack("Q", self.count[:])[0] + 1)
        folder = self.base / "attack"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.truncate(self.base / "output", 0)
        try:
            attack(self.target, content, folder)
            said = (self.base / "output").read_bytes()
            assert not said, f"printed {said[:300]!r}"
        except BaseException as error:  # what is no Exception too: a panic in Rust, an end of the process
            self._keep(content, "".join(traceback.format_exception(error)), error)

    def _keep(self, content: bytes, text: str, error: BaseException | None = None) -> None:
        frames = traceback.extract_tb(error.__traceback__) if error else []
        place = next((f"{f.filename}:{f.lineno}" for f in reversed(frames) if "/adaptkit/" in f.filename), "")
        sign = f"{type(error).__name__} {place}" if place else text[-200:]
        if sign not in self.known:
            self.known.add(sign)
            file = self.findings / f"{self.name}-{blake2b(sign.encode(), digest_size=6).hexdigest()}"
            file.write_bytes(content)
            file.with_suffix(".txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def _fuzz_by_chance(campaign: Campaign) -> None:
    random = Random(campaign.seed)
    while time.monotonic() < campaign.ends:
        campaign.one(mutate(random, campaign.target.originals, campaign.target.words))


def _fuzz_with_atheris(campaign: Campaign) -> None:
    corpus = campaign.base / "corpus"
    corpus.mkdir(exist_ok=True)
    for index, content in enumerate(campaign.target.originals):
        (corpus / str(index)).write_bytes(content)

    def damaged(content: bytes, max_size: int, seed: int) -> bytes:
        chosen = [content] if content.strip() else campaign.target.originals
        return mutate(Random(seed), chosen, campaign.target.words)[:max_size]

    seconds = max(1, round(campaign.ends - time.monotonic()))
    options = [
        f"-artifact_prefix={campaign.base}/",
        f"-max_total_time={seconds}",
        f"-seed={campaign.seed + 1}",
        "-max_len=65536",
        "-rss_limit_mb=0",
    ]
    one: Callable[[bytes], None] = campaign.one
    atheris.Setup([sys.argv[0], str(corpus), *options], one, custom_mutator=damaged)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    with tempfile.TemporaryDirectory() as folder:
        targets = all_targets(Path(folder))
    parser.add_argument("--target", choices=[*targets, "all"], default="all")
    parser.add_argument("--minutes", type=float, default=5.0, help="for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path(tempfile.gettempdir()) / "fuzz-findings")
    given = parser.parse_args()
    found = 0
    for name in targets if given.target == "all" else [given.target]:
        campaign = Campaign(name, targets[name], 60 * given.minutes, given.seed, given.findings)
        attacks, findings = campaign.run()
        found += findings
        print(f"{name}: {attacks} attacks, {findings} findings", flush=True)
    print(f"see {given.findings}" if found else "nothing found", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
