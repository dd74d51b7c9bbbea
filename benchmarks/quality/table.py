"""The results file as Markdown tables: `python benchmarks/quality/table.py [RESULTS]`."""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

METRICS = {"knn_top1": "k-NN", "linear_top1": "linear", "retrieval_map": "mAP"}
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t by the number of seeds


def render(lines: Sequence[dict[str, Any]]) -> str:
    """One table for every source, target and split: frozen, then each method's last teacher, as means over seeds."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[line["source"], line["target"], line.get("split", "test")].append(line)
    return "\n\n".join(_table(*key, group) for key, group in groups.items())


def _table(source: str, target: str, split: str, lines: Sequence[dict[str, Any]]) -> str:
    frozen = lines[0]["frozen"]
    title = ", ".join(f"{label} {frozen[name]:.1f}" for name, label in METRICS.items())
    inner = "" if split == "test" else ", inside the train part"
    rows = [
        f"**{source} on {target}**{inner}, frozen: {title}",
        "",
        "| method | seeds | " + " | ".join(METRICS.values()) + " | better / worse (k-NN) | verdicts |",
        "| --- | --- |" + " --- |" * (len(METRICS) + 2),
    ]
    methods: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        methods[line["variant"], line["images"]].append(line)
    for (variant, images), runs in methods.items():
        cells = " | ".join(_change([run["delta"][name][0] for run in runs]) for name in METRICS)
        better = sum(run["delta"]["knn_top1"][1] > 0 for run in runs)
        worse = sum(run["delta"]["knn_top1"][2] < 0 for run in runs)
        verdicts = ", ".join(sorted(run["verdict"] for run in runs))
        rows.append(f"| {variant}, {images:,} images | {len(runs)} | {cells} | {better} / {worse} | {verdicts} |")
    return "\n".join(rows)


def _change(values: Sequence[float]) -> str:
    """Mean over seeds, with its 95 % interval over seeds when there are two or more."""
    text = f"{mean(values):+.1f}"
    if len(values) not in T_975:
        return text
    half = T_975[len(values)] * stdev(values) / math.sqrt(len(values))
    return f"{text} ± {half:.1f}"


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results.jsonl"
    print(render([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]))
