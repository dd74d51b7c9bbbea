"""Memory and speed of the probes that compare every query with every gallery image.

python benchmarks/probes/retrieval.py                          # 100,000 x 100,000 x 384, 500 queries timed; minutes
python benchmarks/probes/retrieval.py --timed 100000           # all of them; some hours on one core
python benchmarks/probes/retrieval.py --device cuda --timed 100000

Each probe runs in a process of its own with one torch thread. The peak is the largest resident size of that process;
all embeddings are held, and queries are taken in blocks, so it does not depend on how many are timed. Time is that of
the process's CPU (of the clock beside a GPU); the last column extrapolates to all queries.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

import click

PROBES = ("knn", "retrieval")


@click.command()
@click.option("--gallery", default=100_000, show_default=True)
@click.option("--queries", default=100_000, show_default=True)
@click.option("--dim", default=384, show_default=True)
@click.option("--classes", default=100, show_default=True)
@click.option("--timed", default=500, show_default=True, help="How many of the queries are scored.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--only", type=click.Choice(PROBES), hidden=True)
def main(gallery: int, queries: int, dim: int, classes: int, timed: int, device: str, only: str | None) -> None:
    """Print a line for each probe; with --only measure one, here, as a line of JSON."""
    if only:
        click.echo(json.dumps(measure(only, gallery, queries, dim, classes, min(timed, queries), device)))
        return
    click.echo(f"{gallery:,} gallery images, {queries:,} queries, {dim} dimensions, {classes} classes, {device}")
    click.echo("| probe | peak GB | queries/s | hours for all queries |\n| --- | --- | --- | --- |")
    for probe in PROBES:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", probe]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        speed = found["queries"] / found["seconds"]
        click.echo(f"| {probe} | {found['peak_bytes'] / 1e9:.2f} | {speed:.1f} | {queries / speed / 3600:.2f} |")


def measure(
    probe: str, gallery: int, queries: int, dim: int, classes: int, timed: int, device: str
) -> dict[str, float]:
    """Peak of this process, seconds, and how many queries they were for."""
    import torch

    from adaptkit.embedding import Embeddings
    from adaptkit.probes import PROBES as FUNCTIONS

    torch.set_num_threads(1)
    names = tuple(str(label) for label in range(classes))

    def draw(count: int, seed: int, kept: int) -> Embeddings:
        vectors = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)).to(device)
        labels = torch.arange(count, device=device) % classes
        return Embeddings(vectors[:kept], labels[:kept], names, ())  # a slice holds all of them

    clock = time.process_time if device == "cpu" else time.perf_counter
    sets = draw(gallery, 0, gallery), draw(queries, 1, timed)
    started = clock()
    FUNCTIONS[probe](*sets)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": peak, "seconds": clock() - started, "queries": timed}


if __name__ == "__main__":
    main()
