"""Do label-free measures find the good checkpoint? `python benchmarks/quality/selection.py [RESULTS]`, as Markdown.

Reads the lines that `run.py` wrote with `checkpoints`. The original is the checkpoint of step 0 of every run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

GOODNESS: dict[str, Callable[[float], float]] = {
    "higher": lambda value: value,
    "lower": lambda value: -value,
    "near 1": lambda value: -abs(value - 1),
}
MEASURES = {  # which values are better
    "selection_score": "higher",
    "view_retrieval_top1": "higher",
    "neighbour_overlap": "higher",
    "rankme": "higher",
    "d_eff": "higher",
    "r_eff": "higher",
    "alpha_req": "near 1",  # what its authors found good; the slope itself has no better side
    "lidar": "higher",
    "cosine_to_original": "higher",
    "weight_distance": "lower",
    "bit_entropy": "higher",
    "bit_information": "higher",
    "bce": "lower",
}
LABELS = {"knn_top1": "k-NN", "linear_top1": "linear probe"}
WEIGHTS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of neighbour overlap


@dataclass(frozen=True)
class Checkpoint:
    """A teacher of a run; `goodness` of every measure it has, higher is better."""

    step: int
    labels: dict[str, float]
    goodness: dict[str, float]


@dataclass(frozen=True)
class Run:
    """`target` is what is left out together; checkpoints of one `group` (source, target and split) are comparable."""

    target: str
    group: str
    checkpoints: tuple[Checkpoint, ...]


Chooser = Callable[[Run], Checkpoint | None]
"""A run -> the checkpoint it would hand over; None where the run has nothing to choose by."""


def runs_of(lines: Iterable[dict[str, Any]]) -> list[Run]:
    """The runs whose checkpoints were measured."""
    runs = []
    for line in lines:
        if "checkpoints" in line:
            group = f"{line['source']} on {line['target']}" + (" (inner)" if line.get("split") == "inner" else "")
            runs.append(Run(line["target"], group, tuple(map(_checkpoint, line["checkpoints"]))))
    return runs


def _checkpoint(state: dict[str, Any]) -> Checkpoint:
    values = state["label_free"]
    known = {name: GOODNESS[better](values[name]) for name, better in MEASURES.items() if values.get(name) is not None}
    return Checkpoint(state["step"], state["labels"], known)


def ranks(values: Sequence[float]) -> np.ndarray:
    """(N,) -> ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last: np.ndarray = counts.cumsum()
    return (last - (counts - 1) / 2)[inverse]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than three pairs, or where one side is constant."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(np.corrcoef(ranks(first), ranks(second))[0, 1])


def correlation(checkpoints: Iterable[Checkpoint], measure: str, label: str) -> float | None:
    """Over the checkpoints that have both."""
    both = [c for c in checkpoints if measure in c.goodness and label in c.labels]
    return spearman([c.goodness[measure] for c in both], [c.labels[label] for c in both])


def pooled(runs: Iterable[Run]) -> list[Checkpoint]:
    """The checkpoints of all runs; the original, which is the same in all runs of a group, once for each."""
    originals: set[str] = set()
    checkpoints = []
    for run in runs:
        for checkpoint in run.checkpoints:
            if checkpoint.step or run.group not in originals:
                checkpoints.append(checkpoint)
        originals.add(run.group)
    return checkpoints


def within(runs: Iterable[Run], measure: str, label: str) -> float | None:
    """The mean of the runs' own correlations."""
    each = [value for run in runs if (value := correlation(run.checkpoints, measure, label)) is not None]
    return mean(each) if each else None


def by_measure(name: str) -> Chooser:
    """The checkpoint with the highest goodness; of equals the earliest."""

    def choose(run: Run) -> Checkpoint | None:
        known = [checkpoint for checkpoint in run.checkpoints if name in checkpoint.goodness]
        return max(known, key=lambda checkpoint: checkpoint.goodness[name], default=None)

    return choose


def combined(weight: float) -> Chooser:
    """By view retrieval + weight * neighbour overlap, both in percent."""

    def choose(run: Run) -> Checkpoint:
        return max(
            run.checkpoints,
            key=lambda c: c.goodness["view_retrieval_top1"] + weight * c.goodness["neighbour_overlap"],
        )

    return choose


def best(run: Run) -> Checkpoint:
    return max(run.checkpoints, key=_knn)


def first(run: Run) -> Checkpoint:
    return run.checkpoints[0]


def last(run: Run) -> Checkpoint:
    return run.checkpoints[-1]


def _knn(checkpoint: Checkpoint) -> float:
    return checkpoint.labels["knn_top1"]


@dataclass(frozen=True)
class Choice:
    """What a chooser did with a run: k-NN points below the run's best checkpoint, and below the original."""

    group: str
    regret: float
    harm: float


def choices(runs: Iterable[Run], choose: Chooser) -> list[Choice]:
    """For the runs in which there was something to choose by."""
    made = []
    for run in runs:
        chosen = choose(run)
        if chosen is not None:
            made.append(Choice(run.group, _knn(best(run)) - _knn(chosen), _knn(first(run)) - _knn(chosen)))
    return made


def fitted_weight(runs: Sequence[Run]) -> float:
    """The weight with the lowest mean regret, targets counting the same; of equally good ones the middle."""
    targets = {run.target for run in runs}

    def cost(weight: float) -> float:
        return mean(
            mean(c.regret for c in choices([r for r in runs if r.target == t], combined(weight))) for t in targets
        )

    costs = [cost(weight) for weight in WEIGHTS]
    equal = [weight for weight, value in zip(WEIGHTS, costs, strict=True) if value <= min(costs) + 1e-9]
    return equal[len(equal) // 2]


def leave_one_out(runs: Sequence[Run]) -> dict[str, tuple[float, list[Choice]]]:
    """Target left out -> the weight fitted to the other targets, and what it chose there. Empty for one target."""
    targets = list(dict.fromkeys(run.target for run in runs))
    if len(targets) < 2:
        return {}
    result = {}
    for target in targets:
        weight = fitted_weight([run for run in runs if run.target != target])
        result[target] = weight, choices([run for run in runs if run.target == target], combined(weight))
    return result


def render(lines: Iterable[dict[str, Any]]) -> str:
    """Correlations with each label metric, then the regret of every way to choose."""
    runs = runs_of(lines)
    if not runs:
        return "No line has checkpoints; run benchmarks/quality/run.py with --checkpoints."
    left_out = leave_one_out(runs)
    parts = [*(_correlations(runs, label) for label in LABELS), _regrets(runs, left_out)]
    return "\n\n".join(parts + ([_weights(left_out)] if left_out else []))


def _correlations(runs: Sequence[Run], label: str) -> str:
    groups = list(dict.fromkeys(run.group for run in runs))
    num_checkpoints = sum(label in checkpoint.labels for checkpoint in pooled(runs))
    title = f"**Spearman correlation with {LABELS[label]}**, {num_checkpoints} checkpoints of {len(runs)} runs"
    rows = [["measure", "better", *groups, "all pooled", "within runs"]]
    for measure, better in MEASURES.items():
        values = [correlation(pooled(r for r in runs if r.group == group), measure, label) for group in groups]
        values += [correlation(pooled(runs), measure, label), within(runs, measure, label)]
        rows.append([measure, better, *map(_signed, values)])
    return f"{title}\n\n{_table(rows)}"


def _regrets(runs: Sequence[Run], left_out: dict[str, tuple[float, list[Choice]]]) -> str:
    groups = list(dict.fromkeys(run.group for run in runs))
    ways: dict[str, Chooser] = {"oracle": best, "always original": first, "always last": last}
    made = {name: choices(runs, choose) for name, choose in ways.items()}
    made |= {name: choices(runs, by_measure(name)) for name in MEASURES}
    if left_out:
        made["view retrieval + w * overlap"] = [choice for _, some in left_out.values() for choice in some]
    rows = [["chosen by", "runs", *groups, "all", "worst", "original was better"]]
    for name, some in made.items():
        if some:
            regrets = [_mean(c.regret for c in some if c.group == group) for group in groups]
            harmed = f"{sum(c.harm > 0 for c in some)} of {len(some)}"
            worst = f"{max(c.regret for c in some):.1f}"
            rows.append([name, str(len(some)), *regrets, _mean(c.regret for c in some), worst, harmed])
    return f"**Mean regret**, k-NN points below the best checkpoint of the run\n\n{_table(rows)}"


def _weights(left_out: dict[str, tuple[float, list[Choice]]]) -> str:
    rows = [["target left out", "w fitted to the others", "mean regret"]]
    rows += [[target, f"{weight:g}", _mean(c.regret for c in some)] for target, (weight, some) in left_out.items()]
    return f"**View retrieval + w * neighbour overlap**, w fitted without the target\n\n{_table(rows)}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _mean(values: Iterable[float]) -> str:
    some = list(values)
    return f"{mean(some):.2f}" if some else "-"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results.jsonl"
    print(render([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]))
