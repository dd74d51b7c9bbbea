"""The results as a Markdown table and a plot: `python benchmarks/speed/table.py [RESULTS]` writes both into docs/."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plot import draw  # beside this file

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
START, END = "<!-- results -->", "<!-- /results -->"
PLOT = "![Images per second](performance.svg)"
HEADER = """\
| contestant | images/s | quartiles | s a step | time (rounds) | CPU time (rounds) | peak GB |
| --- | --- | --- | --- | --- | --- | --- |"""


def render(results: Mapping[str, Any]) -> str:
    """The plot, the machine, then one table per cell."""
    return "\n\n".join([PLOT, _machine(results["machine"]), *(_cell(cell) for cell in results["cells"])])


def _machine(machine: Mapping[str, Any]) -> str:
    device = machine["gpu"] or machine["cpu"] or "a CPU"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "torchvision", "timm"))
    return f"{device}, {machine['cores']} cores, {_many(machine['threads'], 'torch thread')} a contestant;\n{versions}."


def _many(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _cell(cell: Mapping[str, Any]) -> str:
    views = f"2 x {cell['costs']['global_px']} + {cell['num_local']} x {cell['costs']['local_px']} px"
    title = f"**{cell['backbone']}, {cell['precision']}**, batch {cell['batch_size']}, {views}, "
    rounds = f"{_many(cell['rounds'], 'round')} of {_many(cell['steps_per_round'], 'step')}"
    counts = f"{_many(cell['workers'], 'worker')}, {rounds}, {cell['data']} files"
    rows = [_row(name, figures) for name, figures in cell["contestants"].items()]
    return "\n".join([title + counts, "", HEADER, *rows, "", _costs(cell)])


def _row(name: str, figures: Mapping[str, Any]) -> str:
    rate = figures["images_per_second"]
    cells = [
        name,
        f"{rate['median']:.2f}",
        f"{rate['q1']:.2f} to {rate['q3']:.2f}",
        f"{figures['seconds']['median']:.3f}",
        _relative(figures["relative_seconds"]),
        _relative(figures["relative_cpu_seconds"]),
        f"{figures['peak_bytes'] / 1e9:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _relative(ratio: Mapping[str, float]) -> str:
    return f"{ratio['of_medians']:.2f} ({ratio['median_of_rounds']:.2f})"


def _costs(cell: Mapping[str, Any]) -> str:
    costs, best = cell["costs"], cell["contestants"]["bare"]
    text = f"A step is {costs['flops'] / 1e12:.2f} TFLOP; bare does {best['tflops_per_second']:.3f} TFLOP/s"
    if best["share_of_peak"] is not None:
        text += f", {100 * best['share_of_peak']:.0f} % of the peak"
    shares = (
        f"photometrics {100 * costs['photometric_share']:.1f} %, coding rate {100 * costs['coding_rate_share']:.1f} %"
    )
    return f"{text}.\nOf its time: {shares}."


def put_between_markers(page: str, text: str) -> str:
    """The page with its generated block replaced."""
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"the page lacks {START} or {END}")
    return f"{before}{START}\n{text}\n{END}{after}"


def main(arguments: Sequence[str]) -> None:
    """Write docs/performance.svg and the generated block of docs/performance.md."""
    file = Path(arguments[0]) if arguments else HERE / "results.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    (DOCS / "performance.svg").write_text(draw(results["cells"]), encoding="utf-8")
    page = DOCS / "performance.md"
    block = put_between_markers(page.read_text(encoding="utf-8"), render(results))
    page.write_text(block, encoding="utf-8")
    print(render(results))


if __name__ == "__main__":
    main(sys.argv[1:])
