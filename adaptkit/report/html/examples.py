"""`pictures.json` as what the page shows: neighbours, maps, views, bits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from adaptkit.report.html.charts import key, scatter

NUM_COLOURS = 10  # of the style sheet: c0 to c9, and `other`
NUM_TONES = 7  # r0 to r6, along the first component
SHAPES = 4


def draw_examples(pictures: Mapping[str, Any]) -> dict[str, Any]:
    """{num_images, labelled, neighbours, maps, bits, views, missing}; a part that is not there is None."""
    images = pictures.get("images") or []
    neighbours, maps, bits = (pictures.get(name) for name in ("neighbours", "maps", "bits"))
    return {
        "num_images": len(images),
        "labelled": bool(images) and images[0]["class"] is not None,
        "neighbours": _neighbours(images, neighbours) if neighbours else None,
        "maps": _maps(images, maps) if maps else None,
        "bits": _bits(images, bits) if bits else None,
        "views": pictures.get("views") or None,
        "missing": pictures.get("missing") or {},
    }


def _neighbours(images: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per query: the image, and on each side its neighbours with whether they are of its class (None: no classes)."""
    rows = []
    for number, query in enumerate(found["queries"]):
        row: dict[str, Any] = {"query": images[query], "sides": []}
        wanted = images[query]["class"]
        for side in ("before", "after"):
            if side in found:
                near = [images[index] for index in found[side][number]]
                same = [None if wanted is None else image["class"] == wanted for image in near]
                count = None if wanted is None else f"{sum(map(bool, same))} of {len(near)} of its class"
                row["sides"].append({"name": side, "images": list(zip(near, same, strict=True)), "count": count})
        if len(row["sides"]) == 2:
            stayed = len({*found["before"][number]} & {*found["after"][number]})
            row["stayed"] = f"{stayed} of {len(found['before'][number])} stayed"
        rows.append(row)
    return rows


def _maps(images: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> dict[str, Any]:
    """{sides: [{name, percent, svg}], legend: [(key, name)], num_others}; coloured by class, else by place."""
    labelled = images[0]["class"] is not None
    looks, legend, num_others = by_class(images) if labelled else (by_place(found["before"]["points"]), [], 0)
    named = [
        (style, shape, f"{image['class']}: {image['path']}" if labelled else image["path"])
        for (style, shape), image in zip(looks, images, strict=True)
    ]
    sides = []
    for side in ("before", "after"):
        if side in found:
            told = f"Map of {len(images)} images by the embeddings {side} adaptation, in two principal components."
            svg = scatter(found[side]["points"], named, told)
            sides.append({"name": side, "percent": f"{found[side]['percent']:.0f} %", "svg": svg})
    return {"sides": sides, "legend": legend, "num_others": num_others}


def by_class(images: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, int]], list[tuple[Any, str]], int]:
    """Looks of every image, the legend, and how many classes share the last look: there are ten colours."""
    counts = Counter(image["class"] for image in images)
    names = sorted(counts)
    if len(names) > NUM_COLOURS:
        names = sorted(sorted(names, key=lambda name: -counts[name])[:NUM_COLOURS])
    look_of = {name: (f"c{number}", number % SHAPES) for number, name in enumerate(names)}
    legend = [(key(*look), name) for name, look in look_of.items()]
    looks = [look_of.get(image["class"], ("other", 0)) for image in images]
    return looks, legend, len(counts) - len(names)


def by_place(points: Sequence[Sequence[float]]) -> list[tuple[str, int]]:
    """Seven tones of equally many images, along the first component of the original."""
    order = sorted(range(len(points)), key=lambda index: (points[index][0], index))
    place = {index: rank * NUM_TONES // len(points) for rank, index in enumerate(order)}
    return [(f"r{place[index]}", 0) for index in range(len(points))]


def _bits(images: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> dict[str, Any]:
    shown = [
        {
            "number": bit["bit"],
            "ones": f"{100 * bit['ones']:.0f} %",
            "sides": [(value, [images[index] for index in bit[side]]) for value, side in ((0, "zero"), (1, "one"))],
        }
        for bit in found["bits"]
    ]
    return {"num_bits": found["num_bits"], "num_usable": found["num_usable"], "shown": shown}
