"""What two backbones' scores come to: a verdict on one metric."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from adaptkit.report.numbers import REFERENCE

NEITHER_BETTER = frozenset({"rankme", "d_eff", "r_eff", "alpha_req", "lidar"})  # more of them alone is not better


class Ends(Protocol):
    """An interval of a difference."""

    @property
    def lo(self) -> float: ...
    @property
    def hi(self) -> float: ...


def compare_backbones(name: str, metrics: Iterable[str], deltas: Mapping[str, Ends | None]) -> tuple[str | None, str]:
    """(metric, verdict on `name`): the first metric of which more is better, else the first, else none.

    A metric on the reference is of the same kind as without its prefix.
    """
    known = list(metrics)
    primary = next((metric for metric in known if not _is_neither(metric)), next(iter(known), None))
    if primary is None:
        return None, f"{name}: drift says how far it is from the first, not whether it is better"
    words = ("higher", "lower") if _is_neither(primary) else ("better", "worse")
    return primary, f"{name}: {_word(deltas.get(primary), *words)} in {primary}"


def _is_neither(metric: str) -> bool:
    return metric.removeprefix(REFERENCE) in NEITHER_BETTER


def _word(delta: Ends | None, above: str, below: str) -> str:
    if delta is None:  # too few images for an interval
        return "cannot tell"
    return above if delta.lo > 0 else below if delta.hi < 0 else "no difference beyond doubt"
