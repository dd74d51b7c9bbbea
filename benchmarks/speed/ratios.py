"""From the turns of a race to figures: medians, quartiles, and how much longer others take than adaptkit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median, quantiles
from typing import Any

REFERENCE = "adaptkit"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": median(values), "q1": low, "q3": high}


def relative(values: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Cost relative to the reference's: the ratio of the medians, and the median of the rounds' ratios."""
    return {
        "of_medians": median(values) / median(reference),
        "median_of_rounds": median(mine / theirs for mine, theirs in zip(values, reference, strict=True)),
    }


def summarise(turns: Mapping[str, Mapping[str, Sequence[float]]], batch_size: int) -> dict[str, dict[str, Any]]:
    """Name -> images/s, seconds and CPU seconds of a step, both relative to adaptkit's, and peak memory."""
    reference = turns[REFERENCE]
    return {
        name: {
            "images_per_second": spread([batch_size / seconds for seconds in turn["seconds"]]),
            "seconds": spread(turn["seconds"]),
            "cpu_seconds": spread(turn["cpu_seconds"]),
            "relative_seconds": relative(turn["seconds"], reference["seconds"]),
            "relative_cpu_seconds": relative(turn["cpu_seconds"], reference["cpu_seconds"]),
            "peak_bytes": max(turn["peak_bytes"]),
        }
        for name, turn in turns.items()
    }


def use_of_peak(flops: float, seconds: float, peak_tflops: float | None) -> dict[str, float | None]:
    """TFLOP/s of a step, and its share of the device's peak."""
    rate = flops / seconds / 1e12
    return {"tflops_per_second": rate, "share_of_peak": rate / peak_tflops if peak_tflops else None}
