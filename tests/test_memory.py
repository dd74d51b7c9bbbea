"""Memory: a million paths, workers that share them, and a run that does not grow.

python tests/test_memory.py scan 1000000    # seconds, peak, bytes of the index, what a worker copies
python tests/test_memory.py train 5000      # the memory curve of a tiny run
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from adaptkit.errors import MachineError
from adaptkit.sources import FolderSource, fingerprint, load_index, open_folder, save_index, split
from adaptkit.sources.folder import from_files

PER_FOLDER = 1_000
MB = 1_000_000

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# --- what is measured, in a process of its own


def make_files(root: Path, count: int) -> None:
    """Empty files; a listing looks at names and sizes only."""
    for first in range(0, count, PER_FOLDER):
        folder = root / f"folder_{first // PER_FOLDER:05d}"
        folder.mkdir(parents=True)
        for number in range(first, min(first + PER_FOLDER, count)):
            os.mknod(f"{folder}/image_{number:08d}.jpg")


def scan(root: Path, index: Path) -> dict[str, float]:
    """Seconds and peak of a scan and of the splits made from it; bytes of the index; what a worker copies."""
    before, started = peak_mb(), time.perf_counter()
    source = open_folder(root)
    scanned, scan_peak = time.perf_counter() - started, peak_mb()
    split(source, "file")
    fingerprint(source)
    save_index(index, source)
    again = load_index(index, [root])
    if again is None or len(again) != len(source):
        raise MachineError("the index does not give back what was scanned")
    arrays = (source.names, source.offsets, source.file_sizes, source.rows)
    return {
        "paths": len(source),
        "seconds": scanned,
        "peak_mb_before": before,
        "peak_mb_of_scan": scan_peak,
        "peak_mb": peak_mb(),
        "bytes_per_path": sum(array.nbytes for array in arrays) / len(source),
        "file_bytes_per_path": index.stat().st_size / len(source),
        **shared(source),
    }


def shared(source: FolderSource) -> dict[str, float]:
    """Private memory that reading every path adds to a forked worker, MB; and with a list of texts instead."""
    texts = [source.path(index) for index in range(len(source))]
    return {
        "worker_copies_mb": copied_by_worker(source.path, len(source)),
        "worker_copies_of_a_list_mb": copied_by_worker(texts.__getitem__, len(source)),
    }


def copied_by_worker(read: Callable[[int], str], count: int) -> float:
    reading, writing = os.pipe()
    if os.fork() == 0:
        read(0)
        before = private_mb()
        for index in range(count):
            read(index)
        os.write(writing, json.dumps(private_mb() - before).encode())
        os._exit(0)
    os.wait()
    return float(json.loads(os.read(reading, 100)))


def private_mb() -> float:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024 / MB


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MB


def train(folder: Path, steps: int) -> dict[int, float]:
    """The memory curve of a run of the smallest network: 16 px, batches of 4, no probes on the way."""
    import torch
    from conftest import write_folder
    from tiny_runs import adapt

    from adaptkit.backbones import load_backbone, save_backbone
    from adaptkit.session import Silent

    curve: dict[int, float] = {}

    class Weigher(Silent):
        def training(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
            curve[step] = resident_mb()

    torch.set_num_threads(1)
    images = write_folder(folder / "images", classes=2, per_class=20, px=24)
    save_backbone(load_backbone("test_vit", pretrained=False, image_px=16), folder / "vit")
    settings = {"log_every": 20, "checkpoint_every": "10%", "probe__every": "never", "head__warmup": "20 steps"}
    settings |= {"batch_size": 4, "views__num_local": 0, "select__alphas": [], "optim__lr": 1e-5}
    adapt(folder / "vit", images, folder / "run", reporter=Weigher(), steps=steps, **settings)
    return curve


# --- tests


def measured(*words: object) -> Any:
    from tiny_runs import environment  # not at the top: what a run imports would hide what a scan takes

    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def assert_compact(facts: Mapping[str, float]) -> None:
    name = len("folder_00000/image_00000000.jpg")
    assert facts["bytes_per_path"] <= name + 25
    assert facts["file_bytes_per_path"] <= name + 18
    assert facts["worker_copies_mb"] < 2
    assert facts["worker_copies_of_a_list_mb"] > facts["paths"] * 50 / MB  # what the arrays avoid can be seen


@pytest.mark.long
def test_twenty_thousand_paths_are_compact_and_shared() -> None:
    facts = measured("scan", 20_000)
    assert facts["paths"] == 20_000
    assert_compact(facts)
    assert facts["peak_mb"] - facts["peak_mb_before"] < 40


@pytest.mark.slow
def test_a_million_paths_take_less_than_a_minute_and_a_gigabyte() -> None:
    facts = measured("scan", 1_000_000)
    print(facts)
    assert facts["paths"] == 1_000_000
    assert facts["seconds"] < 60
    assert facts["peak_mb"] < 1_000
    assert facts["peak_mb"] - facts["peak_mb_before"] < 250  # of which the arrays are 55
    assert_compact(facts)


def growth(curve: Mapping[str, float], settled: int) -> float:
    """Of the highest line of the last half over the highest between `settled` and there, as a share."""
    after = {int(step): value for step, value in curve.items() if int(step) > settled}
    middle = (settled + max(after)) / 2
    first = max(value for step, value in after.items() if step <= middle)
    return max(value for step, value in after.items() if step > middle) / first - 1


@pytest.mark.slow
def test_three_hundred_steps_do_not_grow() -> None:
    """At most 2 %: a leak of 100 kB a step would show as 2 to 3 % of some 500 MB."""
    assert growth(measured("train", 300), settled=100) < 0.02


@pytest.mark.slow
def test_five_thousand_steps_stay_within_one_percent() -> None:
    curve = measured("train", 5_000)
    print(curve)
    assert growth(curve, settled=500) < 0.01


def test_a_growing_curve_is_seen() -> None:
    assert growth({str(step): 500 + step / 10 for step in range(0, 320, 20)}, settled=100) > 0.015
    assert growth({str(step): 500 for step in range(0, 320, 20)}, settled=100) == 0


def test_paths_of_any_length_are_kept_end_to_end(tmp_path: Path) -> None:
    names = [b"a.jpg", b"b/\xff.png", b"c" * 200 + b".png"]
    source = from_files(tmp_path, [(name, 1) for name in names])
    assert [os.fsencode(source.path(index)) for index in range(3)] == names
    assert source.names.nbytes == sum(map(len, names))


def main(words: Sequence[str]) -> None:
    kind, size = words[0], int(words[1])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if kind == "scan":
            make_files(folder / "images", size)
            print(json.dumps(scan(folder / "images", folder / "images.index")))
        else:
            curve = train(folder, size)
            for step in list(curve)[:: max(1, len(curve) // 25)]:
                print(f"{step:6d} steps {curve[step]:8.1f} MB")
            print(json.dumps(curve))


if __name__ == "__main__":
    main(sys.argv[1:])
