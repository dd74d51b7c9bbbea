"""Objectives by name. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from adaptkit.objectives.bits import Bits
from adaptkit.objectives.dino import Dino
from adaptkit.objectives.objective import Health, Losses, Objective
from adaptkit.objectives.simdino import SimDino
from adaptkit.schedules import Plan
from adaptkit.settings import ObjectiveSettings

OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Plan], Objective]] = {
    "bits": Bits,
    "simdino": SimDino,
    "dino": Dino,
}

__all__ = ["OBJECTIVES", "Health", "Losses", "Objective"]
