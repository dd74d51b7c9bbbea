"""Experiment trackers: what `metrics.jsonl` and the report say is sent to TensorBoard, Weights & Biases or MLflow.

Each is Accelerate's tracker with what that leaves open: a run that is resumed, its end, files. Nothing of a tracker is
imported before a run asks for it.
"""

from __future__ import annotations

from adaptkit.tracking.tracked import Tracked

__all__ = ["Tracked"]
