"""`adaptkit check`: everything a run looks at before its first step, and more carefully."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from adaptkit.backbones import Backbone, module_name
from adaptkit.embedding import Embedder
from adaptkit.errors import AdaptkitError, DataError
from adaptkit.estimate import forecast
from adaptkit.inputs import Inputs, open_inputs
from adaptkit.microbatch import advice
from adaptkit.preflight.facts import (
    backbone_facts,
    data_facts,
    label_facts,
    labelled_sides,
    parts_of,
    patch_px,
)
from adaptkit.preflight.findings import Finding, few, in_images, in_labels, memory
from adaptkit.preflight.scan import MAX_IMAGES, Scan, scan
from adaptkit.preflight.worth import weigh
from adaptkit.prepare import load_original, loader_workers, settle
from adaptkit.recipe import Recipe, load_recipe, overrides_of
from adaptkit.requirement import check_wishes
from adaptkit.session import Reporter, Silent, open_accelerator
from adaptkit.shortage import shortage
from adaptkit.sources import BadImages
from adaptkit.sources.source import shown

SCHEMA = "adaptkit.check/1"
Warn = Callable[[list[Finding]], None]


@dataclass(frozen=True)
class CheckResult:
    """`document` is `adaptkit.check/1`; `error` what a run would end with, or None when it can start."""

    document: dict[str, Any]
    error: AdaptkitError | None


def check(
    backbone: str | nn.Module | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    labels: str | Path | None = None,
    recipe: str | Path = "bits-reset",
    reporter: Reporter | None = None,
    **settings: Any,
) -> CheckResult:
    """Look at everything `adapt` with the same arguments would begin with; the same as `adaptkit check`.

    Raises `UsageError` for a wrong recipe; whatever else a run would stop at is in the result.
    """
    module = backbone if isinstance(backbone, nn.Module) else None
    name = backbone if module is None else module_name(module)
    given = {"backbone": name, "data": data, "labels": labels, **settings}
    resolved = load_recipe(recipe, overrides_of(given)).with_absolute_paths()
    return check_recipe(resolved, reporter or Silent(), module=module)


def check_recipe(
    recipe: Recipe, reporter: Reporter, num_processes: int | None = None, module: nn.Module | None = None
) -> CheckResult:
    """The preflight of a resolved recipe. Stops where a run would, with what was found so far.

    `num_processes`: of the run; None for as many as there are now.

    Raises `UsageError` for a wish that this recipe can never fulfil.
    """
    check_wishes(recipe)
    document: dict[str, Any] = {"schema": SCHEMA, "ok": False, "warnings": []}
    document |= dict.fromkeys(("backbone", "data", "labels", "plan", "worth"))
    error: AdaptkitError | None = None
    try:
        _fill_(document, recipe, reporter, num_processes, module)
        document["ok"] = True
    except AdaptkitError as stopped:
        error = stopped
    except Exception as stopped:
        if (error := shortage(stopped)) is None:
            raise
    if error is not None:
        document["error"] = {"exit_code": error.exit_code, "message": str(error)}
    return CheckResult(document, error)


def _fill_(
    document: dict[str, Any], recipe: Recipe, reporter: Reporter, num_processes: int | None, module: nn.Module | None
) -> None:
    """The story: backbone, images, plan, and whether it is worth it. Raises what a run would raise."""

    def warn(found: list[Finding]) -> None:
        document["warnings"] += [finding.to_json() for finding in found]

    reporter.phase("loading the backbone")
    accelerator = open_accelerator(recipe.precision)
    original = load_original(recipe, module)
    document["backbone"] = backbone_facts(original)

    reporter.phase("listing the images")
    inputs = open_inputs(recipe)
    look_at_images(document, inputs, original, reporter, warn, recipe.data.max_bad)

    settled = settle(recipe, inputs, accelerator, reporter, num_processes)
    reporter.phase("timing a few steps")
    workers = loader_workers(recipe.workers, accelerator.device)
    original.module.to(accelerator.device)
    expected = forecast(accelerator, settled, inputs, original, workers, num_processes)
    document["plan"] = plan = expected.to_json(accelerator.device)
    warn(memory(plan["peak_bytes"], plan["device_bytes"], advice(settled, original.module, plan["images_at_once"])))

    reporter.phase("probing the original backbone")
    embedder = Embedder(settled.probe.batch_size, workers, device=accelerator.device)
    document["worth"] = worth = weigh(original, inputs, recipe, embedder, expected)
    warn(few(len(inputs.train), worth["queries"], inputs.scored is not None))


def look_at_images(
    document: dict[str, Any], inputs: Inputs, original: Backbone, reporter: Reporter, warn: Warn, max_bad: str
) -> None:
    """The sections `data` and `labels`. Raises `DataError` when too many images cannot be used."""
    parts = parts_of(inputs)
    reporter.phase(f"looking at {min(len(inputs.everything), MAX_IMAGES):,} of {len(inputs.everything):,} images")
    target = scan(inputs.everything)
    document["data"] = data_facts(inputs, target)
    warn(in_images(target, parts, original.image_px, patch_px(original)))
    scans = [target]
    if inputs.scored is not None:
        reporter.phase("looking at the labelled images")
        gallery, queries = (scan(side) for side in labelled_sides(inputs.scored))
        document["labels"] = label_facts(inputs, [gallery, queries])
        warn(in_labels(target, parts, gallery, queries, document["labels"]["classes"]))
        scans += [gallery, queries]
    refuse_too_many(scans, max_bad)


def refuse_too_many(scans: Sequence[Scan], max_bad: str) -> None:
    """Raises the `DataError` that a run would end with. Of the target images, those not looked at count as well."""
    target = scans[0]
    found = {look.path: look.reason for scan in scans for look in scan.unusable}  # labels may lie in the same folder
    expected = len(found) + target.expected_unusable - len(target.unusable)
    counted = BadImages(None, target.num_images, max_bad)
    try:
        counted.add_all((str(number), "") for number in range(expected))
    except DataError:
        path, reason = next(iter(found.items()))
        raise DataError(
            f"{'about ' if target.is_sample else ''}{expected:,} images cannot be used, more than max_bad {max_bad} of "
            f"{target.num_images:,} accepts; first: {shown(path)} ({reason}); mend or remove them, or raise --max-bad"
        ) from None
