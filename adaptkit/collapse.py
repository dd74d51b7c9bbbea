"""Detectors that act: a diverged or collapsed channel is redrawn with a lower learning rate, then stopped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

MAX_REDRAWS = 2
LR_CUT = 0.5
MIN_BIT_ENTROPY = 0.05  # bits per bit; a healthy channel has 0.6 to 1
MIN_LIVE_SHARE = 0.05  # of the bits
MIN_INFORMATION = 0.005  # bits per bit between student and teacher; at 0 the code is noise
PATIENCE = 3  # windows of the log in a row
RECOVERED = 0.5  # share of the best bit_information that counts as "back" after a redraw


@dataclass
class Channel:
    """The health of the binary channel, from the log's windows."""

    best_information: float = 0.0
    information: float = 0.0
    bad_windows: int = 0
    redraws: int = 0

    def update(self, record: Mapping[str, float], num_bits: int, resting: bool) -> str | None:
        """Take in a window of the log; the reason to act, or None. While `resting` (a fresh head), only divergence."""
        if not math.isfinite(record["loss"]):  # fp16's scaler skips steps of infinite gradients by itself
            return "the loss is not finite"
        self.information = record["bit_information"]
        if resting:
            self.bad_windows = 0
            return None
        self.best_information = max(self.best_information, self.information)
        dead = (
            record["bit_entropy"] < MIN_BIT_ENTROPY
            or record["live_bits"] < MIN_LIVE_SHARE * num_bits
            or self.information < MIN_INFORMATION
        )
        self.bad_windows = self.bad_windows + 1 if dead else 0
        if self.bad_windows < PATIENCE:
            return None
        measures = f"entropy {record['bit_entropy']:.3f}, {record['live_bits']:.0f} live bits"
        return f"the code collapsed: information {self.information:.3f}, {measures}"

    @property
    def transmits(self) -> bool:
        """Whether bit_information is back after the last draw: only then may a candidate be taken."""
        return self.information > 0 and self.information >= RECOVERED * self.best_information
