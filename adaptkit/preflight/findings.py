"""What a scan says about a run to come: findings with a number, an example and what to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptkit.preflight.likeness import exact_copies, near_copies, nearly_seen
from adaptkit.preflight.scan import Look, Scan

MAX_PATHS = 10  # named in a finding
FEW_LEVELS = 64  # a quarter of the 8-bit levels: an image that uses fewer looks nearly flat
FEW_IMAGES = 200  # fewer to train on, or to ask, and hardly any gain could be shown
UNEVEN = 10  # times as many images in the largest class as in the smallest
NEARLY_FULL = 0.9  # of the GPU's memory

TRAIN, HELD_OUT = 1, 2  # parts of the target images


@dataclass(frozen=True)
class Finding:
    """A warning: what was found, where, and what to do."""

    kind: str
    message: str
    paths: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """With at most ten paths."""
        return asdict(self) | {"paths": list(self.paths[:MAX_PATHS])}


def in_images(scan: Scan, parts: NDArray[np.int8], image_px: int, patch_px: int) -> list[Finding]:
    """Everything about the target images."""
    seen = [*frames(scan), *flat(scan), *tiny(scan, image_px, patch_px)]
    return [*unusable(scan, "images"), *seen, *copies(scan, parts)]


def in_labels(
    target: Scan, parts: NDArray[np.int8], gallery: Scan, queries: Scan, counts: Mapping[str, int]
) -> list[Finding]:
    """Everything about the labelled images; `counts` is how many each class has."""
    broken = [*unusable(gallery, "labelled gallery images"), *unusable(queries, "labelled queries")]
    return [*broken, *leaks(target, parts, queries), *uneven(counts)]


def unusable(scan: Scan, what: str) -> list[Finding]:
    """Files that are left out: no image at all, too small, or with damaged pixels behind a sound header."""
    found = []
    for kind, how, looks in (
        ("unreadable", "cannot be read", [look for look in scan.unusable if look.facts is None]),
        ("too_small", "are too small to use", [look for look in scan.unusable if look.facts and _is_too_small(look)]),
        (
            "damaged",
            "are truncated or damaged",
            [look for look in scan.unusable if look.facts and not _is_too_small(look)],
        ),
    ):
        if looks:
            message = f"{_share(looks, scan, what)} {how}, as {looks[0].path} ({looks[0].reason}); "
            found.append(_finding(kind, message + "they are left out; mend or remove them", looks))
    return found


def tiny(scan: Scan, image_px: int, patch_px: int) -> list[Finding]:
    """Images with a short side under half of a global crop's: each crop is then enlarged more than twice.

    Half is about the side of a local crop too (96 of 224), which stands for a twentieth of the image or more.
    """
    looks = [look for look in scan.usable if 2 * look.short_side < image_px]
    if not looks:
        return []
    sides = [look.short_side for look in scan.usable]
    fitting = int(np.median(sides)) // patch_px * patch_px
    most = 2 * len(looks) > len(sides) and 2 * patch_px <= fitting
    advice = f", or adapt at their size, which is faster: --set image_px={fitting}" if most else ""
    message = (
        f"{_share(looks, scan)} have a short side under {image_px // 2} px, half of the backbone's {image_px}: their "
        f"crops are enlarged more than twice and show little; leave them out if they are thumbnails{advice}"
    )
    return [_finding("tiny", message, looks)]


def flat(scan: Scan) -> list[Finding]:
    """Images of more than 8 bits that use so little of their range that they look nearly flat."""
    deep = [look for look in scan.usable if look.facts and look.facts.bits > 8]
    looks = [look for look in deep if look.levels < FEW_LEVELS]
    if not looks:
        return []
    message = (
        f"{len(looks):,} of {len(deep):,} images with more than 8 bits use less than a quarter of their range and look "
        "nearly flat; use what they use: --set data.scale=percentile"
    )
    return [_finding("flat", message, looks)]


def frames(scan: Scan) -> list[Finding]:
    """Files with more than one frame or page."""
    looks = [look for look in scan.usable if look.facts and look.facts.more_frames]
    message = f"{_share(looks, scan)} have several frames or pages, and only the first is used; save them one by one"
    return [_finding("frames", message, looks)] if looks else []


def copies(scan: Scan, parts: NDArray[np.int8]) -> list[Finding]:
    """Exact copies and near-duplicates among the target images; `parts` says where each of the N positions went."""
    found = []
    exact = exact_copies(scan.usable)
    if exact:
        surplus = [look for group in exact for look in group[1:]]
        message = f"{_share(surplus, scan)} are exact copies of another, as {_pair(exact[0])}{_across(exact, parts)}"
        found.append(_finding("duplicates", f"{message}; remove the copies", surplus))
    copied = {look.position for group in exact for look in group[1:]}
    near = near_copies([look for look in scan.usable if look.position not in copied])
    if near:
        surplus = [look for group in near for look in group[1:]]
        message = f"{_share(surplus, scan)} look nearly the same as another, as {_pair(near[0])}{_across(near, parts)}"
        advice = "keep one of each, or hold out whole folders if they are scenes: --set data.split_by=folder"
        found.append(_finding("near_duplicates", f"{message}; {advice}", surplus))
    return found


def leaks(target: Scan, parts: NDArray[np.int8], queries: Scan) -> list[Finding]:
    """Labelled queries that look nearly the same as an image that is trained on."""
    leaked = nearly_seen([look for look in target.usable if parts[look.position] == TRAIN], queries.usable)
    if not leaked:
        return []
    image, query = leaked[0]
    message = (
        f"{_share(leaked, queries, 'labelled queries')} look nearly the same as an image that is trained on, as "
        f"{query.path} and {image.path}, which flatters their scores; remove one of each pair (exact copies are left "
        "out of training by themselves)"
    )
    return [_finding("label_leak", message, [query for _, query in leaked])]


def uneven(counts: Mapping[str, int]) -> list[Finding]:
    """Classes of very different sizes."""
    least, most = min(counts, key=lambda name: counts[name]), max(counts, key=lambda name: counts[name])
    if counts[most] < UNEVEN * counts[least]:
        return []
    message = (
        f"class {most} has {counts[most]:,} labelled images and {least} has {counts[least]:,}: scores are means over "
        "images, so large classes decide them; label more of the small ones, or thin the large ones"
    )
    return [Finding("uneven_classes", message)]


def few(train: int, queries: int, labelled: bool) -> list[Finding]:
    """Too few images to learn from, or to show a gain on."""
    found = []
    if train < FEW_IMAGES:
        found.append(Finding("few_images", f"only {train:,} images to train on: expect little, and collect more"))
    if queries < FEW_IMAGES:
        what = "labelled queries" if labelled else "held-out images"
        message = f"only {queries:,} {what} to report on: only a large gain can be shown; add more"
        found.append(Finding("few_queries", message))
    return found


def memory(peak_bytes: int, device_bytes: int | None, advice: str) -> list[Finding]:
    """A step that nearly fills the GPU; `advice` names what takes less."""
    if device_bytes is None or peak_bytes < NEARLY_FULL * device_bytes:
        return []
    share = f"{100 * peak_bytes / device_bytes:.0f} % of the GPU's memory"
    return [Finding("memory", f"a step takes {share}; to be safe use {advice}")]


def _is_too_small(look: Look) -> bool:
    return "too small" in look.reason


def _finding(kind: str, message: str, looks: Sequence[Look]) -> Finding:
    return Finding(kind, message, tuple(look.path for look in looks))


def _share(looks: Sequence[object], scan: Scan, what: str = "images") -> str:
    """`3 of 120 images`, or of those looked at."""
    sampled = " looked at" if scan.is_sample else ""
    return f"{len(looks):,} of {len(scan.looks):,} {what}{sampled}"


def _pair(group: Sequence[Look]) -> str:
    return f"{group[0].path} and {group[1].path}"


def _across(groups: Sequence[Sequence[Look]], parts: NDArray[np.int8]) -> str:
    """How many groups have images on both sides of the split."""
    count = sum({TRAIN, HELD_OUT} <= {int(parts[look.position]) for look in group} for group in groups)
    return f"; {count:,} of {len(groups):,} groups are both trained on and held out, which flatters" if count else ""
