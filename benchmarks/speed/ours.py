"""adaptkit as a contestant: `python ours.py SETTING bare|adaptkit`. Both run the package's own loop."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import repeat
from typing import Any

import torch
from setting import Setting  # beside this file
from turns import Turns

from adaptkit import loop
from adaptkit.backbones import load_backbone
from adaptkit.loading import Batch, ViewDataset, collate
from adaptkit.schedules import Plan
from adaptkit.session import Session, open_accelerator, open_session
from adaptkit.sources import open_folder


def open_contest(setting: Setting) -> Session:
    """Networks with random weights, the objective and the optimizer, as a run would open them."""
    torch.set_num_threads(setting.threads)
    accelerator = open_accelerator(setting.precision)
    source = open_folder(setting.folder)
    original = load_backbone(setting.backbone, pretrained=False)
    original.module.to(accelerator.device)
    plan = Plan.make(setting.recipe(), len(source))
    return open_session(accelerator, plan, source, original, original.clone(), setting.workers, lambda failures: None)


def resident_batch(s: Session) -> Batch:
    """A batch of random pixels on the device, in the shapes the loader gives, with factors drawn as it draws them."""
    source = ViewDataset(s.source, s.multicrop, s.recipe.seed)
    batch = collate([source[0, index % len(s.source)] for index in range(s.recipe.batch_size)])
    if not isinstance(batch, Batch):
        raise batch.error()
    rng = torch.Generator().manual_seed(s.recipe.seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        pixels = torch.randint(0, 256, like.shape, generator=rng, dtype=torch.uint8)
        return pixels.to(s.accelerator.device)

    factors = batch.factors.to(s.accelerator.device)
    return Batch(noise(batch.global_crops), noise(batch.local_crops), factors, ())


def train_on(batch: Batch, s: Session, after_step: Callable[[int], str | None]) -> None:
    """The package's loop, with this batch in place of what its loader would bring."""
    view_loader = loop.view_loader
    endless: Any = lambda *arguments, **keywords: repeat(batch)  # noqa: E731  (stands in for a function)
    loop.view_loader = endless
    try:
        loop.train_steps(s, after_step)
    finally:
        loop.view_loader = view_loader


def main(setting: Setting, kind: str) -> None:
    """Train until the referee ends the process."""
    turns = Turns()
    session = open_contest(setting)

    def after_step(step: int) -> None:
        turns.step_done()

    if kind == "bare":
        train_on(resident_batch(session), session, after_step)
    else:
        loop.train_steps(session, after_step)


if __name__ == "__main__":
    main(Setting.from_text(sys.argv[1]), sys.argv[2])
