"""Adapt sources to targets with several methods and seeds, and append what the last teacher is worth to a file.

python benchmarks/quality/run.py --source nano --target eurosat=DATA/eurosat --variant bits-reset,dino --seeds 0,1,2
python benchmarks/quality/run.py --quick        # a minute on the sample images, to see that it works

A target is a folder with train/CLASS and test/CLASS: trained on train without its labels, probed with train as gallery
and all of test as queries. A cell (source, target, variant, seed) that the results file has is not run again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml

import adaptkit
from adaptkit.backbones import Backbone, load_backbone
from adaptkit.checkpoints import load_tensors, with_prefix
from adaptkit.cli.command_demo import SAMPLES
from adaptkit.embedding import Embedder
from adaptkit.errors import AdaptkitError
from adaptkit.probes import paired_bootstrap
from adaptkit.probes.measure import Measurement, measure_labelled
from adaptkit.sources import FolderSource, open_labelled

HERE = Path(__file__).parent
STUDY = yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8"))
METRICS = {"knn_top1": "knn", "linear_top1": "linear", "retrieval_map": "retrieval"}
QUICK = {
    "batch_size": 16,
    "objective.hidden_dim": 64,
    "views.num_local": 1,
    "head.warmup": "1 steps",
    "probe.every": "never",
    "probe.max_gallery": 100,
    "probe.max_queries": 100,
}
QUICK_STEPS = 6
QUICK_SHARE = 10  # every tenth labelled image


@click.command()
@click.option("--source", "sources", multiple=True, default=["nano"], show_default=True, help="Backbone; repeatable.")
@click.option("--target", "targets", multiple=True, metavar="NAME=FOLDER", help="Labelled images; repeatable.")
@click.option("--variant", default="bits-reset,bits-fixed,simdino,dino", show_default=True, help="Of study.yaml.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--images", default=20_000, show_default=True, help="Images every run trains on, repeats included.")
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results.jsonl", show_default=False)
@click.option("--quick", is_flag=True, help="A minute on the sample images; the figures mean nothing.")
def main(
    sources: tuple[str, ...],
    targets: tuple[str, ...],
    variant: str,
    seeds: str,
    images: int,
    results: Path,
    quick: bool,
) -> None:
    """Run every cell that the results file lacks, then print the table."""
    from table import render  # beside this file

    with tempfile.TemporaryDirectory() as folder:
        if quick:
            targets, seeds, results = (f"samples={SAMPLES['labels']}",), "0", Path(folder) / "results.jsonl"
            sources, images, variant = ("nano",), QUICK_STEPS * 16, "bits-reset,simdino,dino"
        done = {cell_key(line) for line in read(results)}
        for seed in map(int, seeds.split(",")):  # outermost: an early stop leaves whole comparisons
            for name, _, path in (target.partition("=") for target in targets):
                for source in sources:
                    for method in variant.split(","):
                        cell = {"source": source, "target": name, "variant": method, "seed": seed, "images": images}
                        if cell_key(cell) in done:
                            continue
                        line = cell | run_cell(cell, Path(path), Path(folder) / "run", quick)
                        with results.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(line) + "\n")
                        click.echo(
                            f"{source} {name} {method} {seed}: {line['verdict']}, {line['seconds']:.0f} s", err=True
                        )
        click.echo(render(read(results)))


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def cell_key(cell: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(cell[key] for key in ("source", "target", "variant", "seed", "images"))


def run_cell(cell: dict[str, Any], target: Path, run: Path, quick: bool) -> dict[str, Any]:
    """One adaptation; its last teacher against the frozen source on all test images."""
    settings = STUDY["common"] | STUDY["variants"][cell["variant"]] | (QUICK if quick else {})
    recipe = settings.pop("recipe")
    settings |= {"steps": cell["images"] // settings["batch_size"], "seed": cell["seed"]}
    shutil.rmtree(run, ignore_errors=True)
    started = time.perf_counter()
    keywords = {key.replace(".", "__"): value for key, value in settings.items()}
    try:
        report = adaptkit.adapt(
            cell["source"], target / "train", labels=target, output=run, recipe=recipe, **keywords
        ).report
    except AdaptkitError:  # collapsed: the report says so
        report = json.loads((run / "report.json").read_text())
    share = QUICK_SHARE if quick else 1
    frozen = measured(cell["source"], target, share)
    adapted = measure(last_teacher(cell["source"], run), target, share)
    return {
        "verdict": report["verdict"],
        "selected": report["selected"],
        "exported": {name: report["probes"]["delta"].get(name) for name in METRICS},
        "frozen": {name: frozen.scores[name].value for name in METRICS},
        "adapted": {name: adapted.scores[name].value for name in METRICS},
        "delta": {name: paired(frozen, adapted, name) for name in METRICS},
        "balanced_knn": {"frozen": balanced(frozen, target, share), "adapted": balanced(adapted, target, share)},
        "training": report["training"],
        "settings": settings | {"recipe": recipe},
        "seconds": time.perf_counter() - started,
    }


def last_teacher(source: str, run: Path) -> Backbone:
    """The teacher of the last step, whatever was selected."""
    original = load_backbone(source)
    tensors, _ = load_tensors(run / "checkpoints" / "last.safetensors")
    original.module.load_state_dict(with_prefix(tensors, "teacher.backbone."))
    return original


@cache
def measured(source: str, target: Path, share: int) -> Measurement:
    return measure(load_backbone(source), target, share)


def measure(backbone: Backbone, target: Path, share: int) -> Measurement:
    """k-NN, linear probe and retrieval with train as gallery and test as queries."""
    embedder = Embedder(device=device())
    gallery, queries = (embedder(backbone, side) for side in sides(target, share))
    return measure_labelled(gallery, queries, [*METRICS.values()])


def sides(target: Path, share: int) -> tuple[FolderSource, FolderSource]:
    """Gallery and queries; of each, one image in `share`."""
    labelled = open_labelled(target)
    gallery, queries = (side.subset(np.arange(0, len(side), share)) for side in (labelled.gallery, labelled.queries))
    return gallery, queries


def paired(frozen: Measurement, adapted: Measurement, name: str) -> list[float]:
    before, after = frozen.scores[name].per_query, adapted.scores[name].per_query
    interval = paired_bootstrap(before, after)
    return [interval.value, interval.lo, interval.hi]


def balanced(measurement: Measurement, target: Path, share: int) -> float:
    """k-NN accuracy as the mean over classes, percent: for targets whose classes differ in size."""
    labels, right = torch.tensor(sides(target, share)[1].labels), measurement.scores["knn_top1"].per_query
    return float(torch.stack([right[labels == label].mean() for label in labels.unique()]).mean())


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    main()
