"""What a step is made of, `python costs.py SETTING`: its FLOPs, the shares of its parts, and the machine it ran on."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from statistics import median
from typing import Any

import timm
import torch
import torchvision
from ours import open_contest, resident_batch, train_on  # beside this file
from setting import Setting
from torch.utils.flop_counter import FlopCounterMode

from adaptkit.loading import Batch
from adaptkit.loop import to_device
from adaptkit.objectives.coding_rate import coding_rate
from adaptkit.session import Session, plain_attention_

REPEATS = 3
COUNTED_IMAGES = 2  # FLOPs are proportional to the images


def step_costs(setting: Setting) -> dict[str, Any]:
    """FLOPs of a step, the shares of photometrics and coding rate in its seconds, and the sides of its views."""
    compiled = replace(setting, compile="on" if torch.cuda.is_available() else "off")  # as `bare` and `adaptkit` run
    s = open_contest(compiled)
    batch = resident_batch(s)
    moments: list[float] = []

    def after_step(step: int) -> str | None:
        moments.append(clock())
        return "enough" if len(moments) == REPEATS + 1 else None

    train_on(batch, s, after_step)  # the first step allocates
    step = median(after - before for before, after in pairwise(moments))
    return {
        "global_px": s.multicrop.global_px,
        "local_px": s.multicrop.local_px,
        "flops": count_flops(open_contest(setting), batch),
        "photometric_share": measure(lambda: to_device(s, batch)) / step,
        "coding_rate_share": measure(lambda: rate_and_gradient(s)) / step,
    }


def clock() -> float:
    """Seconds: of this process's CPU, or of the clock where a GPU does the work."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(part: Callable[[], object]) -> float:
    """Median seconds of a part that has run once before."""
    part()
    seconds = []
    for _ in range(REPEATS):
        started = clock()
        part()
        seconds.append(clock() - started)
    return median(seconds)


def rate_and_gradient(s: Session) -> None:
    """The coding rate of all global views with its gradient: Gram matrix, Cholesky factor, and back."""
    settings = s.recipe.objective
    shape = (s.recipe.views.num_global, s.recipe.batch_size, settings.num_bits)
    logits = torch.randn(shape, device=s.accelerator.device, requires_grad=True)
    torch.stack([coding_rate(view, settings.eps, settings.centre) for view in logits]).mean().backward()


def count_flops(s: Session, batch: Batch) -> float:
    """Floating-point operations of the matrix products and convolutions of one step, forward and backward."""
    for branch in (s.student, s.teacher):
        plain_attention_(branch)  # so that attention is matrix products, which the counter knows on every device
    n = min(COUNTED_IMAGES, len(batch.factors))
    crops = (batch.global_crops[:n], batch.local_crops[:n], batch.factors[:n])
    few = replace(batch, global_crops=crops[0], local_crops=crops[1], factors=crops[2])
    with FlopCounterMode(display=False) as counter:
        train_on(few, s, lambda step: "enough")
    return counter.get_total_flops() * len(batch.factors) / n


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def cpu_model() -> str:
    """As the kernel names it; empty where it does not say."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        return ""
    return names[0] if names else ""


if __name__ == "__main__":
    given = Setting.from_text(sys.argv[1])
    print(json.dumps({"costs": step_costs(given), "machine": describe_machine() | {"threads": given.threads}}))
