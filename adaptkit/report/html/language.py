"""`codes.json` and `codes_pictures.json` as what the page shows: the section "Binary language"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaptkit.report.html.charts import number, scatter
from adaptkit.report.html.examples import by_class, by_place
from adaptkit.report.numbers import change_text, score_text

SCHEMA = "adaptkit.codes/1"
LEVEL = 0.05
PERCENT = "retrieval_map"  # a metric that is written in percent
DIGITS = 1


def draw_language(found: Mapping[str, Any], pictures: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the template shows; None where `adaptkit codes` has not been run."""
    if found.get("schema") != SCHEMA:
        return None
    images = pictures.get("images") or []
    return {
        "images": images,
        "pool": pictures.get("pool"),
        "facts": _facts(found),
        "labelled": found["retrieval"] is not None,
        "k": found["neighbours"]["k"],
        "chance": f"{found['neighbours']['chance']:.1f} %",
        "sizes": _sizes(found),
        "retrieval": found["retrieval"],
        "histogram": _histogram(found["correlation"]),
        "families": [(name, _family(found, name)) for name in found["properties"]],
        "map": _map(pictures["map"]) if pictures.get("map") else None,
        "bits": [_bit(found, images, bit) for bit in pictures.get("bits") or ()],
        "num_bits": found["num_bits"],
        "chosen": _first(found, pictures.get("bits") or ()),
    }


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    data, entropy, blocks, twins = (found[key] for key in ("data", "entropy", "blocks", "duplicates"))
    r, dead = found["correlation"], entropy["dead"]
    drawn = (
        f" of {data['num_found']:,}, drawn by seed {found['seed']}" if data["num_found"] > data["num_images"] else ""
    )
    listed = f": {', '.join(map(str, dead[:20]))}{', ...' if len(dead) > 20 else ''}" if dead else ""
    facts = [
        ("images", f"{data['num_images']:,}{drawn}, below {', '.join(data['path'])}"),
        ("live bits", f"{found['live_bits']} of {found['num_bits']}: at least 1 % have the rarer value"),
        ("entropy of a bit", f"{entropy['mean']:.3f} of 1 on average, {entropy['min']:.3f} to {entropy['max']:.3f}"),
        ("dead bits", f"{len(dead)} below {entropy['threshold']} bits{listed}"),
        (
            "bits that repeat another",
            f"{twins['num_bits']}, by |r| > {twins['threshold']} ({twins['num_pairs']} pairs)",
        ),
    ]
    if blocks["num_blocks"]:
        text = f"{blocks['raw_mean']:.2f} of 8 on average, {blocks['corrected_mean']:.2f} corrected for its bias"
        text += f" (Miller-Madow); so many images show at most {blocks['maximum']:.2f}"
        facts.append(("joint entropy of 8 bits", text))
    if r["num_pairs"]:
        text = f"|r| {r['mean_abs']:.3f} on average over {r['num_pairs']:,} pairs, at most {r['max_abs']:.2f}"
        facts.append(("correlation of two bits", text))
    return facts


def _sizes(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for each number of bits."""
    ranked = (found["retrieval"] or {}).get("codes") or [None] * len(found["neighbours"]["codes"])
    rows = []
    for near, rank in zip(found["neighbours"]["codes"], ranked, strict=True):
        row = {"bits": str(near["bits"]), "recall": score_text(PERCENT, near, DIGITS), "spread": _spread(near)}
        if rank:
            row |= {"map": score_text(PERCENT, rank, DIGITS), "change": change_text(rank["delta"], DIGITS)}
            row["spread"] = _spread(rank)
        rows.append(row)
    return rows


def _spread(each: Mapping[str, Any]) -> str:
    subsets = each["subsets"]
    return f"{min(subsets):.1f} to {max(subsets):.1f}" if len(subsets) > 1 else ""


def _histogram(r: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """(from and to, pairs, percent of the longest bar)."""
    edges, counts = r["histogram"]["edges"], r["histogram"]["counts"]
    longest = max(*counts, 1)
    return [
        (f"{low:.1f} to {high:.1f}", f"{count:,}", round(100 * count / longest, 1))
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]


def _family(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Counts of a table of properties, and the bits that say most, in order."""
    facts: dict[str, Any] = dict(found["properties"][name])
    sure = [bit for bit in found["bits"] if bit[name] and bit[name]["p"] <= LEVEL]
    sure.sort(key=lambda bit: -bit[name]["gain"])
    best = [(str(bit["bit"]), _told(bit[name])) for bit in sure[:10]]
    return facts | {"best": best, "threshold": "" if facts["threshold"] is None else number(facts["threshold"])}


def _told(best: Mapping[str, Any]) -> str:
    """`class River: 0.212 bits; 1 for 93 % with it, 12 % without`."""
    shares = f"1 for {100 * best['ones_with']:.0f} % with it, {100 * best['ones_without']:.0f} % without"
    return f"{best['name']}: {best['gain']:.3f} bits; {shares}"


def _map(drawn: Mapping[str, Any]) -> dict[str, Any]:
    images = drawn["images"]
    labelled = bool(images) and images[0]["class"] is not None
    looks, legend, num_others = by_class(images) if labelled else (by_place(drawn["points"]), [], 0)
    named = [
        (style, shape, f"{image['class']}: {image['path']}" if labelled else image["path"])
        for (style, shape), image in zip(looks, images, strict=True)
    ]
    told = f"Map of the codes of {len(images)} images, by {drawn['method']}."
    svg = scatter(drawn["points"], named, told)
    about = {"method": drawn["method"], "reason": drawn["reason"], "num_images": len(images)}
    return about | {"svg": svg, "labelled": labelled, "legend": legend, "num_others": num_others}


def _bit(found: Mapping[str, Any], images: Sequence[Any], shown: Mapping[str, Any]) -> dict[str, Any]:
    """One bit's panel: its figures, what it tells most about, and its galleries."""
    facts = found["bits"][shown["bit"]]
    says = []
    for family in found["properties"]:
        if best := facts[family]:
            sure = best["p"] <= LEVEL
            says.append({"text": _told(best), "sure": sure, "p": f"{best['p']:.3f}"})
    within = shown["within"]
    return {
        "number": facts["bit"],
        "ones": f"{100 * facts['ones']:.0f} %",
        "entropy": f"{facts['entropy']:.2f}",
        "says": says,
        "sure": any(each["sure"] for each in says),
        "dead": facts["entropy"] < found["entropy"]["threshold"],
        "sides": _sides(images, shown),
        "within": within and {"class": within["class"], "sides": _sides(images, within)},
    }


def _sides(images: Sequence[Any], side: Mapping[str, Any]) -> list[tuple[int, list[tuple[int, Any]]]]:
    """(value, [(number of the image, the image)])."""
    return [(value, [(row, images[row]) for row in side[name]]) for value, name in ((0, "zero"), (1, "one"))]


def _first(found: Mapping[str, Any], shown: Sequence[Mapping[str, Any]]) -> int | None:
    """The bit that is open at first: of those beyond chance the one that says most, else the fullest."""

    def weight(bit: int) -> tuple[float, float]:
        facts = found["bits"][bit]
        gains = [facts[name]["gain"] for name in found["properties"] if facts[name] and facts[name]["p"] <= LEVEL]
        return max(gains, default=0.0), facts["entropy"]

    return max((each["bit"] for each in shown), key=weight, default=None)
