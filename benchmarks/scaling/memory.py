"""What less memory costs: peak and time of a training step with micro-batches, checkpointed blocks, and both.

python benchmarks/scaling/memory.py                                      # vit_tiny on a CPU, a few minutes
python benchmarks/scaling/memory.py --device cuda --backbone vit_large_patch14_dinov2 --batch-size 64

Every line is measured in a process of its own. The peak is of the steps alone: on a CPU the growth of the process's
largest resident size over what it was before the first step, on a GPU the growth of what torch allocated. The time is
the median of the steps after the first: of this process's CPU, or of the clock beside a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import click

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "speed"))

from photos import write_photos  # noqa: E402  (these three lie there)
from setting import Setting  # noqa: E402

WAYS: dict[str, dict[str, Any]] = {  # settings of the recipe; micro_batch true: as the command line says
    "plain": {},
    "micro-batch": {"micro_batch": True},
    "checkpointing": {"grad_checkpointing": True},
    "both": {"micro_batch": True, "grad_checkpointing": True},
}
MIB = 1 << 20


@click.command()
@click.option("--backbone", default="vit_tiny_patch16_224", show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--micro-batch", default=4, show_default=True)
@click.option("--num-local", default=6, show_default=True, help="Local crops, beside two global ones.")
@click.option("--precision", "precisions", default="bf16,fp32", show_default=True)
@click.option("--steps", default=3, show_default=True, help="Timed steps, after one that is not.")
@click.option("--threads", default=1, show_default=True, help="Of torch.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "memory.json", show_default=False)
def main(micro_batch: int, precisions: str, steps: int, device: str, output: Path, **shape: Any) -> None:
    """Measure every way in every precision, print a table and write it as JSON."""
    rows: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder) / "photos", 2 * shape["batch_size"])
        for precision in precisions.split(","):
            setting = Setting(**shape, precision=precision, workers=0, folder=str(photos))
            for way, changes in WAYS.items():
                asked = changes | ({"micro_batch": micro_batch} if "micro_batch" in changes else {})
                found = in_a_process(setting, asked, steps, device)
                machine = found.pop("machine")
                rows.append({"precision": precision, "way": way, **asked, **found})
    results = {"schema": "adaptkit.memory/1", "machine": machine, "device": device, **shape, "steps": steps}
    output.write_text(json.dumps(results | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    click.echo(table(rows))


def in_a_process(setting: Setting, changes: dict[str, Any], steps: int, device: str) -> dict[str, Any]:
    """What `measure` says in a fresh process."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    environment = os.environ | {"OMP_NUM_THREADS": str(setting.threads), "MKL_NUM_THREADS": str(setting.threads)}
    words = [sys.executable, __file__, "--child", setting.to_text(), json.dumps(changes), str(steps)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment | hidden, check=False)
    if done.returncode:
        raise click.ClickException(f"{changes}: ...{done.stderr[-600:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def measure(setting: Setting, changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """Peak bytes and seconds of a step of the package's own loop, on a batch that is there already."""
    import torch
    from costs import clock, describe_machine
    from ours import resident_batch, train_on

    from adaptkit.backbones import load_backbone
    from adaptkit.estimate import peak_memory
    from adaptkit.schedules import Plan
    from adaptkit.session import open_accelerator, open_session
    from adaptkit.sources import open_folder

    torch.set_num_threads(setting.threads)
    recipe = setting.recipe().model_copy(update=changes)
    accelerator, source = open_accelerator(recipe.precision), open_folder(setting.folder)
    original = load_backbone(setting.backbone, pretrained=False)
    plan = Plan.make(recipe, len(source))
    session = open_session(accelerator, plan, source, original, original.clone(), 0, lambda failures: None)
    batch = resident_batch(session)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before, moments = peak_memory(accelerator.device), [clock()]

    def after_step(step: int) -> str | None:
        moments.append(clock())
        return "enough" if len(moments) == steps + 2 else None

    train_on(batch, session, after_step)
    seconds = [end - start for start, end in pairwise(moments)][1:]
    peak = peak_memory(accelerator.device) - before
    machine = describe_machine() | {"threads": setting.threads}
    return {"peak_bytes": peak, "step_seconds": median(seconds), "seconds": seconds, "machine": machine}


def table(rows: list[dict[str, Any]]) -> str:
    """Beside every figure its share of plain's in the same precision."""
    plain = {row["precision"]: row for row in rows if row["way"] == "plain"}
    lines = ["| precision | way | peak, MiB | of plain | step, s | of plain |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        base = plain[row["precision"]]
        peak, seconds = row["peak_bytes"] / MIB, row["step_seconds"]
        shares = row["peak_bytes"] / base["peak_bytes"], seconds / base["step_seconds"]
        words = (row["precision"], row["way"], f"{peak:.0f}", f"{shares[0]:.2f}", f"{seconds:.2f}", f"{shares[1]:.2f}")
        lines.append(f"| {' | '.join(words)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(measure(Setting.from_text(sys.argv[2]), json.loads(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
