"""How fast is a training step, and what does it cost elsewhere? One run, all contestants turn by turn.

python benchmarks/speed/run.py --backbone vit_tiny_patch16_224 --precision bf16,fp32 --lightly LIGHTLY_ENV/bin/python
python benchmarks/speed/run.py --quick        # less than a minute, to see that it works; its figures mean nothing

bare       adaptkit's own step on a batch that is there already: the ceiling of any pipeline
adaptkit   the same with the real loader on real files
classical  the usual loop on torchvision's PIL transforms: same networks, views, objective and precision
lightly    LightlyTrain's `dino` on the same files, with an environment's python that has lightly-train
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import click
from photos import repeat_by_links, write_photos  # beside this file
from ratios import summarise, use_of_peak
from referee import Contestant, race
from setting import Setting, lightly_arguments

HERE = Path(__file__).parent
NUM_PHOTOS = 256
EPOCH_IMAGES = 10_000  # LightlyTrain starts its workers anew at the end of an epoch
QUICK = {
    "backbones": ("nano",),
    "precisions": ("fp32",),
    "batch_size": 8,
    "num_local": 2,
    "rounds": 2,
    "workers": 0,
    "threads": 1,
}


@click.command()
@click.option("--backbone", "backbones", multiple=True, default=["vit_tiny_patch16_224"], show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--num-local", default=6, show_default=True, help="Local crops, beside two global ones.")
@click.option("--precision", "precisions", default="bf16,fp32", show_default=True)
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Images.  [default: 256 made ones, 500x375]")
@click.option("--workers", default=0, show_default=True, help="Loader processes of every contestant.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--steps-per-round", default=1, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Of torch, in every contestant.")
@click.option("--lightly", metavar="PYTHON", help="Of an environment with lightly-train; timm's backbones only.")
@click.option("--peak-tflops", type=float, help="The device's, for the share of it that is used.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results.json", show_default=False)
@click.option("--quick", is_flag=True, help="Less than a minute; the figures mean nothing.")
def main(**options: Any) -> None:
    """Measure every backbone in every precision, and write one results file; table.py renders it."""
    options["precisions"] = options["precisions"].split(",")
    if unknown := set(options["precisions"]) - {"bf16", "fp32"}:
        raise click.UsageError(f"unknown precision {unknown.pop()!r}; use bf16, fp32 or both")
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        if options["quick"]:
            options |= QUICK | {"data": None, "lightly": None}
            options["output"] = folder / "results.json"
        photos = options["data"] or write_photos(folder / "photos", 32 if options["quick"] else NUM_PHOTOS)
        cells, machine = [], {}
        for backbone, precision in product(options["backbones"], options["precisions"]):
            setting = Setting(
                backbone=backbone,
                precision=precision,
                batch_size=options["batch_size"],
                num_local=options["num_local"],
                workers=options["workers"],
                threads=options["threads"],
                folder=str(photos.absolute()),
            )
            click.echo(f"{backbone} {precision}", err=True)
            cell, machine = measure_cell(setting, options, folder)
            cells.append(cell | {"data": "given" if options["data"] else "made"})
        results = {"schema": "adaptkit.speed/1", "machine": machine, "cells": cells}
        options["output"].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        click.echo(json.dumps({cell["backbone"]: brief(cell) for cell in cells}))


def measure_cell(setting: Setting, options: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """One backbone in one precision: what its step costs, then the race. Also the machine, as a child saw it."""
    known = costs(setting)
    has_gpu = known["machine"]["gpu"] is not None
    commands = contest(setting, has_gpu)
    if options["lightly"]:
        sides = known["costs"]["global_px"], known["costs"]["local_px"]
        commands["lightly"] = lightly_command(setting, options["lightly"], folder, *sides)
    with ExitStack() as stack:
        contestants = {}
        for name, command in commands.items():
            contestant = Contestant(name, command, setting.threads, folder / f"{name}.log")
            contestants[name] = stack.enter_context(contestant)
            contestant.warm_up()  # one after the other: they share the machine
            click.echo(f"  {name} is ready", err=True)
        turns = race(contestants, options["rounds"], options["steps_per_round"])
    figures = summarise(turns, setting.batch_size)
    for name in figures.keys() - {"lightly"}:  # whose head and objective differ
        figures[name] |= use_of_peak(
            known["costs"]["flops"], figures[name]["seconds"]["median"], options["peak_tflops"]
        )
    shape = {key: value for key, value in asdict(setting).items() if key != "folder"}
    counts = {"rounds": options["rounds"], "steps_per_round": options["steps_per_round"]}
    cell = shape | counts | {"costs": known["costs"], "contestants": figures, "turns": turns}
    return cell, known["machine"]


def contest(setting: Setting, has_gpu: bool) -> dict[str, list[str]]:
    """Name -> command. On a GPU adaptkit's blocks are compiled, and `bare-eager` shows what that brings."""
    compiled = replace(setting, compile="on" if has_gpu else "off")
    commands = {
        "bare": child("ours.py", compiled, "bare"),
        "adaptkit": child("ours.py", compiled, "adaptkit"),
        "classical": child("classical.py", setting),
    }
    if has_gpu:
        commands["bare-eager"] = child("ours.py", setting, "bare")
    return commands


def child(script: str, setting: Setting, *more: str) -> list[str]:
    return [sys.executable, str(HERE / script), setting.to_text(), *more]


def lightly_command(setting: Setting, python: str, folder: Path, global_px: int, local_px: int) -> list[str]:
    """The driver, on as many names of the files as make a long epoch."""
    links = folder / "links"
    if not links.exists():
        count = sum(path.is_file() for path in Path(setting.folder).rglob("*"))
        repeat_by_links(Path(setting.folder), links, -(-EPOCH_IMAGES // count))
    arguments = lightly_arguments(replace(setting, folder=str(links)), global_px, local_px)
    return [python, str(HERE / "lightly_driver.py"), json.dumps(arguments), str(setting.threads)]


def costs(setting: Setting) -> dict[str, Any]:
    """What costs.py says, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": str(setting.threads), "MKL_NUM_THREADS": str(setting.threads)}
    done = subprocess.run(child("costs.py", setting), capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise click.ClickException(f"costs.py failed: ...{done.stderr[-600:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def brief(cell: dict[str, Any]) -> dict[str, float]:
    """Contestant -> images per second."""
    return {name: round(each["images_per_second"]["median"], 2) for name, each in cell["contestants"].items()}


if __name__ == "__main__":
    main()
