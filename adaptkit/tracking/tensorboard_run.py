"""TensorBoard: event files in `RUN/tracking/tensorboard/NAME`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import TensorBoardTracker

from adaptkit.tracking.tracker import DONE, Result, Scalar


class TensorBoardRun:
    """Numbers are scalars, parameters a session of the HPARAMS plugin, pictures images, the rest text."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder / "tensorboard", name
        self.environment: Mapping[str, str] = {}

    def start(self, known: str | None) -> str:
        name, number = known or self.name, 1
        while known is None and (self.folder / name).exists():  # events of a run that nothing is known of any more
            number += 1
            name = f"{self.name}-{number}"
        self.tracker = TensorBoardTracker(name, self.folder)
        self.tracker.start()
        return name

    def parameters(self, values: Mapping[str, Scalar]) -> None:
        # Accelerate's `store_init_configuration` makes a second run for this, named by the clock
        start, _ = _session(values)
        self.tracker.tracker.file_writer.add_summary(start)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log(dict(values), step=step)

    def finish(self, result: Result) -> None:
        rows = "\n".join(f"| {key} | {value} |" for key, value in result.summary.items())
        texts = {"summary": f"| | |\n| --- | --- |\n{rows}"}
        texts |= {file.stem: file.read_text(encoding="utf-8") for file in result.files if file.suffix == ".md"}
        self.tracker.log(texts | dict(result.numbers), step=result.step)
        pictures = {name: np.asarray(picture)[None] for name, picture in result.pictures.items()}  # (1, H, W, 3)
        self.tracker.log_images(pictures, step=result.step, dataformats="NHWC")
        if result.state == DONE:  # the first end that is written counts, and any other run may be resumed
            _, end = _session({})
            self.tracker.tracker.file_writer.add_summary(end)
        self.tracker.finish()


def _session(values: Mapping[str, Scalar]) -> tuple[Any, Any]:
    """What the HPARAMS plugin reads: the start of a session with its parameters, and its successful end."""
    from torch.utils.tensorboard import summary

    make: Callable[..., tuple[Any, Any, Any]] = summary.hparams
    _, start, end = make(dict(values), {})
    return start, end
