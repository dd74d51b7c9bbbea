"""Detectors that act: a diverged or collapsed channel is redrawn with a lower learning rate, then stopped.

What collapse means is the objective's to say (`Objective.health`); when to act is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from adaptkit.objectives import Health

MAX_REDRAWS = 2
LR_CUT = 0.5
PATIENCE = 3  # windows of the log in a row
RECOVERED = 0.5  # share of the best information that counts as "back" after a redraw


@dataclass
class Channel:
    """The health of what student and teacher exchange, from the log's windows."""

    best_information: float = 0.0
    information: float = 0.0
    bad_windows: int = 0
    redraws: int = 0

    def update(self, record: Mapping[str, float], health: Health, resting: bool) -> str | None:
        """Take in a window of the log; the reason to act, or None. While `resting` (a fresh head), only divergence."""
        if not math.isfinite(record["loss"]):  # fp16's scaler skips steps of infinite gradients by itself
            return "the loss is not finite"
        self.information = health.information
        if resting:
            self.bad_windows = 0
            return None
        self.best_information = max(self.best_information, self.information)
        self.bad_windows = self.bad_windows + 1 if health.collapse else 0
        return health.collapse if self.bad_windows >= PATIENCE else None

    @property
    def transmits(self) -> bool:
        """Whether the information is back after the last draw: only then may a candidate be taken."""
        return self.information > 0 and self.information >= RECOVERED * self.best_information
