"""Weights & Biases: offline in `RUN/tracking/wandb`, unless the user's variables say otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from accelerate.tracking import WandBTracker

from adaptkit.tracking.tracker import DONE, INTERRUPTED, PROJECT, UPLOAD_SECONDS, Result, Scalar


class WandbRun:
    """Numbers are history, parameters config, the end the summary, files an artefact.

    Rows have their own `step`: W&B's counter only rises, and a run that goes back after a collapse does not.
    """

    def __init__(self, folder: Path, name: str) -> None:
        beside = folder / "wandb"
        self.environment: Mapping[str, str] = {
            "WANDB_MODE": "online" if os.environ.get("WANDB_API_KEY") else "offline",
            "WANDB_DIR": str(folder),
            "WANDB_CACHE_DIR": str(beside / "cache"),
            "WANDB_CONFIG_DIR": str(beside / "config"),
            "WANDB_DATA_DIR": str(beside / "data"),
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_PROJECT": PROJECT,
            "WANDB_NAME": name,
        }

    def start(self, known: str | None) -> str:
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, init_timeout=UPLOAD_SECONDS, finish_timeout=UPLOAD_SECONDS
        )
        self.tracker = WandBTracker(
            os.environ["WANDB_PROJECT"], id=known, resume="allow", reinit="create_new", settings=settings
        )
        self.tracker.start()
        self.tracker.tracker.define_metric("*", step_metric="step")
        return str(self.tracker.tracker.id)

    def parameters(self, values: Mapping[str, Scalar]) -> None:
        # Accelerate's `store_init_configuration` writes to whichever run is W&B's global one
        self.tracker.tracker.config.update(dict(values), allow_val_change=True)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log(dict(values) | {"step": step})

    def finish(self, result: Result) -> None:
        import wandb

        run = self.tracker.tracker
        if result.pictures:
            self.tracker.log_images({name: [picture] for name, picture in result.pictures.items()})
        if result.files:
            artefact = wandb.Artifact(f"report-{run.id}", type="report")
            for file in result.files:
                artefact.add_file(str(file))
            run.log_artifact(artefact)
        run.summary.update(dict(result.summary) | dict(result.numbers))
        if result.state == INTERRUPTED:
            run.mark_preempting()  # else the server calls it failed
        run.finish(exit_code=0 if result.state == DONE else result.exit_code)
