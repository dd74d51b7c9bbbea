"""Objectives by name. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from adaptkit.objectives.bits import Bits
from adaptkit.objectives.objective import Losses, Objective
from adaptkit.recipe import ObjectiveSettings

OBJECTIVES: dict[str, Callable[[ObjectiveSettings], Objective]] = {"bits": Bits}

__all__ = ["OBJECTIVES", "Losses", "Objective"]
