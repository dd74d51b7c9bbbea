"""Seconds and memory until a run knows its images: millions of small ones in tar shards, or in folders.

python benchmarks/scaling/scan.py shards 1000000     # 100 shards
python benchmarks/scaling/scan.py folders 10000000   # 1,000 a folder
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tarfile
import tempfile
import time
from pathlib import Path

from adaptkit.sources import fingerprint, load_index, open_images, save_index, split

PER_FOLDER = 1_000
CONTENT = b"\xff\xd8small"
MB = 1_000_000


def make_shards(root: Path, count: int, num_shards: int) -> str:
    """`count` members of a few bytes, with a label each; the pattern of their shards."""
    per_shard = -(-count // num_shards)
    padding = bytes(-len(CONTENT) % 512)
    for shard in range(num_shards):
        with open(root / f"{shard:03d}.tar", "wb") as file:
            for number in range(shard * per_shard, min((shard + 1) * per_shard, count)):
                for suffix in ("jpg", "cls"):
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(CONTENT)
                    file.write(info.tobuf(tarfile.USTAR_FORMAT) + CONTENT + padding)
            file.write(bytes(1024))
    return f"{root}/{{000..{num_shards - 1:03d}}}.tar"


def make_folders(root: Path, count: int) -> str:
    """Names of one empty file a folder, as a disk has fewer files than names; a listing looks at names and sizes."""
    for first in range(0, count, PER_FOLDER):
        folder = root / f"folder_{first // PER_FOLDER:05d}"
        folder.mkdir()
        one = f"{folder}/image_{first:08d}.jpg"
        os.mknod(one)
        for number in range(first + 1, min(first + PER_FOLDER, count)):
            os.link(one, f"{folder}/image_{number:08d}.jpg")
    return str(root)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB


def measure(place: str, index: Path) -> dict[str, float]:
    """Wall and CPU seconds of the scan, of what follows from it, and of reading the index back; peak memory."""
    facts = {"peak_mb_before": peak_mb()}

    def timed(name: str, started: tuple[float, float]) -> None:
        facts[f"{name}_seconds"] = round(time.perf_counter() - started[0], 2)
        facts[f"{name}_cpu_seconds"] = round(time.process_time() - started[1], 2)

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    started = now()
    source = open_images([place])
    timed("scan", started)
    facts |= {"images": len(source), "peak_mb_of_scan": peak_mb()}
    started = now()
    split(source, "file")
    fingerprint(source)
    timed("split_and_fingerprint", started)
    save_index(index, source)
    started = now()
    if load_index(index, [place]) is None:
        raise SystemExit("the index does not give back what was scanned")
    timed("load_index", started)
    return facts | {"index_mb": index.stat().st_size / MB, "peak_mb": peak_mb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("shards", "folders"))
    parser.add_argument("count", type=int)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--folder", help="where to write the images; they are removed afterwards")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=words.folder) as temporary:
        root = Path(temporary) / "images"
        root.mkdir()
        make = (
            make_folders(root, words.count) if words.kind == "folders" else make_shards(root, words.count, words.shards)
        )
        print(json.dumps({"kind": words.kind, **measure(make, Path(temporary) / "images.index")}, indent=1))


if __name__ == "__main__":
    main()
