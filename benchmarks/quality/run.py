"""Adapt sources to targets with several methods and seeds, and append what the last teacher is worth to a file.

python benchmarks/quality/run.py --source nano --target eurosat=DATA/eurosat --variant bits-reset,dino --seeds 0,1,2
python benchmarks/quality/run.py --quick        # a minute on the sample images, to see that it works

A target is a folder with train/CLASS and test/CLASS: trained on train without its labels, probed with train as gallery
and all of test as queries. A cell (source, target, variant, seed, images, split) that the results file has is not run
again. To choose settings without opening the test part:

python benchmarks/quality/run.py --target eurosat=DATA/eurosat --split inner --results trials.jsonl \\
    --variant bits-reset --set optim.lr=1e-4 --name lr-1e-4
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import click
import yaml
from measures import METRICS, forgetting, measure_teachers, target_images  # beside this file
from table import render

import adaptkit
from adaptkit.cli.command_demo import SAMPLES
from adaptkit.errors import AdaptkitError, Collapsed
from adaptkit.sources import open_folder
from adaptkit.sources.source import hash_order
from adaptkit.yaml_text import parse_yaml

HERE = Path(__file__).parent
STUDY = yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8"))
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
@click.option("--split", type=click.Choice(["test", "inner"]), default="test", show_default=True, help="See above.")
@click.option("--kept", metavar="NAME=FOLDER", help="Labelled images, as the source's own: is their k-NN forgotten?")
@click.option(
    "--checkpoints/--no-checkpoints", default=None, help="Measure all probed teachers.  [default: no --quick]"
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change the variant; repeatable.")
@click.option("--name", help="What the variant changed by --set is called.")
@click.option("--results", type=click.Path(path_type=Path), default=HERE / "results.jsonl", show_default=False)
@click.option("--quick", is_flag=True, help="A minute on the sample images; the figures mean nothing.")
def main(
    sources: tuple[str, ...],
    targets: tuple[str, ...],
    variant: str,
    seeds: str,
    images: int,
    split: str,
    kept: str | None,
    checkpoints: bool | None,
    assignments: tuple[str, ...],
    name: str | None,
    results: Path,
    quick: bool,
) -> None:
    """Run every cell that the results file lacks, then print the table.

    --split inner trains on two thirds of the train part, with the same as gallery, and queries with the rest of it: the
    test part stays closed while settings are chosen.
    """
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        if quick:
            targets, seeds, results = (f"samples={SAMPLES['labels']}",), "0", folder / "results.jsonl"
            sources, images, variant = ("nano",), QUICK_STEPS * 16, "bits-reset,simdino,dino"
        checkpoints = not quick if checkpoints is None else checkpoints
        variants = named_variants(variant.split(","), assignments, name)
        places = {name: Path(path) for name, _, path in (target.partition("=") for target in targets)}
        if split == "inner":
            places = {name: inner_split(path, folder / "inner" / name) for name, path in places.items()}
        done = {cell_key(line): line for line in read(results)}
        numbers = [int(seed) for seed in seeds.split(",")]  # outermost: an early stop leaves whole comparisons
        for seed, target, source, method in product(numbers, places, sources, variants):
            cell = {"source": source, "target": target, "variant": method, "seed": seed, "images": images}
            cell["split"] = split
            if cell_key(cell) in done:
                check_same(done[cell_key(cell)], variants[method] if name else {}, results)
                continue
            settings = STUDY["common"] | variants[method] | (QUICK if quick else {})
            line = cell | run_cell(cell, settings, places[target], folder / "run", kept, checkpoints, quick)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            click.echo(f"{source} {target} {method} {seed}: {line['verdict']}, {line['seconds']:.0f} s", err=True)
        click.echo(render([line for line in read(results) if cell_key(line)[-1] == split]))


def named_variants(names: Sequence[str], assignments: Sequence[str], name: str | None) -> dict[str, dict[str, Any]]:
    """Name -> settings: those of study.yaml, or one of them changed by KEY=VALUE texts under a name of its own."""
    variants = STUDY["variants"]
    if unknown := [each for each in names if each not in variants]:
        raise click.UsageError(f"unknown variant {unknown[0]!r}; study.yaml has {', '.join(variants)}")
    if bool(assignments) != bool(name):
        raise click.UsageError("--set and --name belong together: the results need a name for what was changed")
    if not name:
        return {each: variants[each] for each in names}
    if len(names) != 1 or name in variants:
        raise click.UsageError("--set changes one --variant; name one, and give it a --name that study.yaml has not")
    changes = dict(parse_assignment(text) for text in assignments)
    if taken := changes.keys() & {"steps", "seed"}:
        raise click.UsageError(f"--set {taken.pop()}: use --images and --seeds")
    return {name: variants[names[0]] | changes}


def parse_assignment(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--set {text}: write KEY=VALUE")
    return key, parse_yaml(value, f"--set {key}")


def check_same(line: dict[str, Any], changes: dict[str, Any], results: Path) -> None:
    """A trial that the results file has is not run again, but it must be the same trial."""
    for key, value in changes.items():
        if line["settings"].get(key) != value:
            raise click.UsageError(f"{results}: {line['variant']} was run with another {key}; choose another --name")


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []


def cell_key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """Lines from before there was a split are of the test part."""
    keys = ("source", "target", "variant", "seed", "images")
    return (*(cell[key] for key in keys), cell.get("split", "test"))


def inner_split(target: Path, folder: Path) -> Path:
    """A target made of links to `target`'s train part: of every class two thirds by hash of path as train, the rest as
    test."""
    source = open_folder(target / "train")
    paths = [source.path(index) for index in range(len(source))]
    classes: dict[str, list[int]] = {}
    for index in hash_order(paths, "inner").tolist():
        classes.setdefault(paths[index].partition("/")[0], []).append(index)
    for members in classes.values():
        for rank, index in enumerate(members):
            link = folder / ("train" if rank < len(members) * 2 / 3 else "test") / paths[index]
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(source.file(index).absolute())
    return folder


def run_cell(
    cell: dict[str, Any],
    settings: dict[str, Any],
    target: Path,
    run: Path,
    kept: str | None,
    checkpoints: bool,
    quick: bool,
) -> dict[str, Any]:
    """One adaptation; its last teacher, and if asked its checkpoints, against the frozen source on all test images."""
    settings = dict(settings)
    recipe = settings.pop("recipe")
    settings |= {"steps": cell["images"] // int(settings["batch_size"]), "seed": cell["seed"]}
    started = time.perf_counter()
    report = adapt(cell["source"], target, run, recipe, settings)
    images = target_images(cell["source"], target, QUICK_SHARE if quick else 1)
    measured = measure_teachers(run, images, cell["source"], target, checkpoints)
    frozen, adapted = images.frozen, measured[-1]["scores"]
    line = {
        "verdict": report["verdict"],
        "selected": report["selected"],
        "exported": {name: report["probes"]["delta"].get(name) for name in METRICS},
        "frozen": frozen.values(),
        "adapted": adapted.values(),
        "delta": adapted.deltas(frozen),
        "balanced_knn": {"frozen": frozen.balanced_knn, "adapted": adapted.balanced_knn},
        "training": report["training"],
        "settings": settings | {"recipe": recipe},
    }
    if checkpoints:
        keys = ("step", "label_free")
        line["checkpoints"] = [{"labels": each["scores"].values()} | {k: each[k] for k in keys} for each in measured]
    if kept:
        line["forgetting"] = forgetting(cell["source"], kept, measured[-1]["backbone"])
    return line | {"seconds": time.perf_counter() - started}


def adapt(source: str, target: Path, run: Path, recipe: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The report of a run, also of one that collapsed."""
    shutil.rmtree(run, ignore_errors=True)
    keywords = {key.replace(".", "__"): value for key, value in settings.items()}
    try:
        return adaptkit.adapt(source, target / "train", labels=target, output=run, recipe=recipe, **keywords).report
    except Collapsed:
        return json.loads((run / "report.json").read_text())
    except AdaptkitError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
