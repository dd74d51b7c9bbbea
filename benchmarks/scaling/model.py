"""What a step costs as batch, crops, backbone and bits grow, and from it what several GPUs would give.

python benchmarks/scaling/model.py steps     # images/s and memory, each line in a process of its own, a few minutes
python benchmarks/scaling/model.py rate      # the coding rate and the balance: batch x bits
python benchmarks/scaling/model.py paper     # the model on paper, for GPUs that nobody had here
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from memory import MIB, Setting, in_a_process, write_photos

from adaptkit.objectives.coding_rate import coding_rate

SWEEP = (  # backbone, images, local crops beside two global ones
    ("vit_tiny_patch16_224", 4, 6),
    ("vit_tiny_patch16_224", 8, 6),
    ("vit_tiny_patch16_224", 16, 6),
    ("vit_tiny_patch16_224", 32, 6),
    ("vit_tiny_patch16_224", 16, 0),
    ("vit_tiny_patch16_224", 16, 10),
    ("vit_small_patch16_224", 8, 6),
    ("vit_base_patch16_224", 4, 6),
)


@click.group()
def main() -> None:
    """The model's three parts."""


@main.command()
@click.option("--steps", default=2, show_default=True, help="Timed steps, after one that is not.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def steps(steps: int, device: str) -> None:
    """Images per second and memory of one process, bf16."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder) / "photos", 64)
        for backbone, batch_size, num_local in SWEEP:
            setting = Setting(
                backbone=backbone,
                batch_size=batch_size,
                num_local=num_local,
                precision="bf16",
                workers=0,
                folder=str(photos),
                threads=1,
            )
            found = in_a_process(setting, {}, steps, device)
            seconds, peak = found["step_seconds"], found["peak_bytes"]
            shown = [f"{seconds:.2f}", f"{batch_size / seconds:.2f}", f"{peak / MIB:.0f}"]
            rows.append([backbone, batch_size, f"2 + {num_local}", *shown, f"{peak / MIB / batch_size:.0f}"])
    header = ["backbone", "batch", "crops", "s a step", "images/s", "peak MiB", "MiB an image"]
    click.echo(table_of(header, rows))


@main.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--rounds", default=7, show_default=True)
def rate(device: str, rounds: int) -> None:
    """Milliseconds of what grows with batch and bits alone: two coding rates with gradients, and the balance."""
    torch.set_num_threads(1)
    rows = []
    for num_bits in (32, 128, 256, 512):
        for num_images in (64, 256, 1024, 4096):
            times = [_rate_seconds(num_images, num_bits, device) for _ in range(rounds)]
            shown = [f"{1000 * median(part):.2f}" for part in zip(*times, strict=True)]
            message = 2 * 2 * 4 * (num_bits + 1) * num_bits / 2**20  # two views, forward and backward, float32
            gathered = 2 * num_images * num_bits * 4 / 2**20
            rows.append([num_bits, num_images, *shown, f"{message:.2f}", f"{gathered:.2f}"])
    header = ["bits", "batch", "rate ms", "of it Cholesky ms", "balance ms", "all-reduce MiB", "gather MiB"]
    click.echo(table_of(header, rows))


def _rate_seconds(num_images: int, num_bits: int, device: str) -> tuple[float, float, float]:
    """Seconds of both rates and their gradients, of the two Cholesky factors, and of the medians of the batch."""
    logits = torch.randn(2, num_images, num_bits, device=device, requires_grad=True)

    def timed(work: Any) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    both = timed(lambda: torch.stack([coding_rate(view) for view in logits]).mean().backward())
    matrix = torch.eye(num_bits, device=device) * 2
    factors = timed(lambda: [torch.linalg.cholesky_ex(matrix) for _ in logits])
    medians = timed(lambda: logits.detach().flatten(0, 1).median(0))
    return both, factors, medians


@dataclass(frozen=True)
class Gpu:
    """What the model on paper assumes; all of it can be given on the command line."""

    tflops: float  # reached in a step, not the peak
    within: float  # GB/s that a GPU gets in an all-reduce inside its machine
    between: float  # GB/s between machines


@main.command()
@click.option("--parameters", default=21.7, show_default=True, help="Of the backbone, millions (ViT-S/16).")
@click.option("--gflop", default=115.0, show_default=True, help="Of a step, per image: ViT-S/16, 2 x 224 + 8 x 96.")
@click.option("--images", default=64, show_default=True, help="Per GPU and step.")
@click.option("--bits", default=256, show_default=True)
@click.option("--tflops", default=276.0, show_default=True, help="Reached: 35 % of 790.")
@click.option("--within", default=200.0, show_default=True, help="GB/s of an all-reduce inside a machine of 8.")
@click.option("--between", default=40.0, show_default=True, help="GB/s between machines.")
@click.option(
    "--decoded", default=400.0, show_default=True, help="Images a second that one CPU core decodes and crops."
)
def paper(parameters: float, gflop: float, images: int, bits: int, decoded: float, **speeds: float) -> None:
    """Computation, messages and decoding of a step for 1, 8 and 64 GPUs, none of it overlapped."""
    gpu, rows = Gpu(**speeds), []
    head = 0.384 * 2.048 + 2.048**2 + 2.048 * bits / 1000  # millions
    for count in (1, 8, 64):
        compute = gflop * images / gpu.tflops / 1000
        speed = gpu.within if count <= 8 else gpu.between
        ring = 0.0 if count == 1 else 2 * (count - 1) / count / speed
        gradients = 4 * (parameters + head) / 1000 * ring
        moments = 2 * 2 * 4 * (bits + 1) * bits / 1e9 * ring
        balance = 0.0 if count == 1 else 2 * images * count * bits * 4 / 1e9 / speed
        step = compute + gradients + moments + balance
        milliseconds = [f"{1000 * part:.2f}" for part in (compute, gradients, moments, balance)]
        cores = images / step / decoded
        rows.append([count, images * count, *milliseconds, f"{images * count / step:,.0f}"])
        rows[-1] += [f"{100 * compute / step:.0f} %", f"{cores:.0f}"]
    header = [
        "GPUs",
        "batch",
        "compute ms",
        "gradients ms",
        "rate ms",
        "balance ms",
        "images/s",
        "of ideal",
        "cores a GPU",
    ]
    click.echo(table_of(header, rows))


def table_of(header: list[str], rows: list[list[Any]]) -> str:
    """As Markdown."""
    lines = [header, ["---"] * len(header), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
