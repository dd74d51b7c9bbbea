"""LightlyTrain's `dino` as a contestant. Runs in an environment that has lightly-train; nothing of adaptkit is needed.

python lightly_driver.py ARGUMENTS THREADS, with the keyword arguments of `lightly_train.pretrain` as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from typing import Any

os.environ["LIGHTLY_TRAIN_EVENTS_DISABLED"] = "1"

import lightly_train
import torch
from pytorch_lightning import Callback, Trainer
from turns import Turns  # beside this file


class Stepper(Callback):
    """Tells the referee of every step. Lightning fetches one batch ahead, in turn with the steps."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_batch_end(self, *args: Any) -> None:
        self.turns.step_done()


def main(arguments: dict[str, Any], threads: int) -> None:
    """Train until the referee ends the process."""
    turns = Turns()
    torch.set_num_threads(threads)
    fit = Trainer.fit

    def fit_in_turns(trainer: Trainer, *args: Any, **keywords: Any) -> None:
        trainer.callbacks.append(Stepper(turns))  # `pretrain` takes only callbacks that it knows
        fit(trainer, *args, **keywords)

    Trainer.fit = fit_in_turns
    with tempfile.TemporaryDirectory() as out:
        lightly_train.pretrain(
            out=f"{out}/run",
            model_args={"pretrained": False},
            devices=1,
            # `auto` leaves a CPU's bf16 switched off: Lightning asks CUDA's autocast for it
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            **arguments,
        )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), int(sys.argv[2]))
