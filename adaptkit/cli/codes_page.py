"""What `adaptkit codes` found, as a page of 80 columns."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptkit.cli.console import StreamConsole
from adaptkit.cli.listing import line, table
from adaptkit.page import CODES, NAME
from adaptkit.report.numbers import change_text, score_text

NUMBERS_SHOWN = 8
BITS_SHOWN = 5
TIES = "Images at equal Hamming distance count as in random order, on average. Fewer bits are 5 random subsets: range."
FAMILY = (
    "p is over all bits and properties together (largest gain of {:,} shuffles), so 5 % of such tables would show a "
    "single one by chance; near-duplicate images make it too small."
)


def print_codes(document: Mapping[str, Any], run: Path) -> None:
    """The code itself, retrieval by it, and the bits that say most about a property."""
    console = StreamConsole(sys.stdout)
    line(console, "")
    table(console, ("", ""), _facts(document))
    rows = search_rows(document)
    table(console, rows[0], rows[1:])
    line(console, TIES, "dim", wrap=True)
    line(console, "")
    for family, facts in document["properties"].items():
        table(console, ("bit", "says most about", "gain", "p"), _best(document["bits"], family))
        line(console, _family_text(document["num_bits"], family, facts), "dim", wrap=True)
        line(console, "")
    if not document["properties"]:
        line(console, "No labels and no attributes: nothing is said about what a bit means.", wrap=True)
        line(console, "")
    for name in (CODES, NAME):
        line(console, f"{name:<12} {run / name}")


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    data, entropy, blocks, twins = (found[key] for key in ("data", "entropy", "blocks", "duplicates"))
    r, dead = found["correlation"], entropy["dead"]
    some = f" of {data['num_found']:,}, drawn by seed {found['seed']}" if data["num_found"] > data["num_images"] else ""
    bad = f"; {data['num_bad']:,} could not be read" if data["num_bad"] else ""
    rows = [
        ("images", f"{data['num_images']:,}{some}{bad}"),
        ("bits", f"{found['num_bits']}, {found['live_bits']} of them live (rarer value at least 1 %)"),
        ("entropy", f"{entropy['mean']:.3f} of 1 bit on average, from {entropy['min']:.3f} to {entropy['max']:.3f}"),
        ("dead bits", f"{len(dead)} below {entropy['threshold']} bits{_numbers(dead)}"),
        (
            "duplicates",
            f"{twins['num_bits']} bits repeat another (|r| > {twins['threshold']}), {twins['num_pairs']} pairs",
        ),
    ]
    if blocks["num_blocks"]:
        text = f"{blocks['raw_mean']:.2f} of 8 bits joint entropy, {blocks['corrected_mean']:.2f} corrected for bias"
        rows.append(("8-bit blocks", f"{text}, at most {blocks['maximum']:.2f} here"))
    if r["num_pairs"]:
        rows.append(
            ("correlation", f"|r| {r['mean_abs']:.3f} on average over pairs of bits, at most {r['max_abs']:.2f}")
        )
    return rows


def _numbers(bits: Sequence[int]) -> str:
    if not bits:
        return ""
    more = ", ..." if len(bits) > NUMBERS_SHOWN else ""
    return f": {', '.join(map(str, bits[:NUMBERS_SHOWN]))}{more}"


def search_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Header and a row for each number of bits; without labels only the neighbours that stay."""
    near, ranked = found["neighbours"], found["retrieval"]
    header: tuple[str, ...] = ("bits", f"recall@{near['k']}")
    if ranked is None:
        return [header, *((str(each["bits"]), _ranged("neighbour_overlap", each)) for each in near["codes"])]
    rows: list[tuple[str, ...]] = [(*header, "retrieval_map", "against the embedding")]
    rows.append(("embedding", "", score_text("retrieval_map", ranked["embedding"]), ""))
    for each, other in zip(ranked["codes"], near["codes"], strict=True):
        recall = f"{other['value']:.1f}%"
        rows.append((str(each["bits"]), recall, _ranged("retrieval_map", each), change_text(each["delta"])))
    return rows


def _ranged(metric: str, each: Mapping[str, Any]) -> str:
    """The score with its interval, and behind it how far apart the subsets are."""
    spread = f" ({min(each['subsets']):.1f}-{max(each['subsets']):.1f})" if len(each["subsets"]) > 1 else ""
    return score_text(metric, each) + spread


def _best(bits: Sequence[Mapping[str, Any]], family: str) -> list[tuple[str, ...]]:
    """The bits with the largest gains that are significant."""
    sure = [each for each in bits if each[family] and each[family]["p"] <= 0.05]
    sure.sort(key=lambda each: -each[family]["gain"])
    rows: list[tuple[str, ...]] = [
        (str(each["bit"]), each[family]["name"], f"{each[family]['gain']:.3f} bits", f"{each[family]['p']:.3f}")
        for each in sure[:BITS_SHOWN]
    ]
    return rows or [("none", "", "", "")]


def _family_text(num_bits: int, family: str, facts: Mapping[str, Any]) -> str:
    count = f"{facts['num_significant']} of {num_bits} bits tell of a{'n' * (family[0] == 'a')} {family} beyond chance"
    some = f"; {facts['unmatched']:,} images of the table were not described" if facts["unmatched"] else ""
    return f"{count} ({facts['num_images']:,} images{some}). {FAMILY.format(facts['shuffles'])}"
