"""The end of a run: choose, check the choice on images that chose nothing, export it, write the report."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from adaptkit.backbones import Backbone
from adaptkit.collapse import advice
from adaptkit.distill import interpolate
from adaptkit.embedding import Embedder
from adaptkit.inputs import Inputs
from adaptkit.probes import Interval
from adaptkit.probes.measure import Measurement, compare
from adaptkit.report.document import SCHEMA, deltas_to_json, interval_to_json, scores_to_json, sentence
from adaptkit.requirement import Requirement
from adaptkit.run import Run
from adaptkit.select import Candidate, Judge, best, choose, verdict
from adaptkit.session import Session
from adaptkit.sources import FolderSource
from adaptkit.supervise import Supervisor

NUM_REESTIMATED = 2048  # training images from which BatchNorm statistics are estimated anew


@dataclass(frozen=True, eq=False)
class Outcome:
    """What was decided: the backbone to hand over, why, and its measurement on the report split."""

    verdict: str
    guard_fired: bool
    guard_delta: Interval | None
    selected: Candidate | None  # None: the original
    candidates: tuple[Candidate, ...]
    backbone: Backbone
    after: Measurement
    deltas: dict[str, Interval | None]
    collapse: str | None


def conclude(original: Backbone, supervisor: Supervisor, judge: Judge, collapse: str | None) -> Outcome:
    """Candidates -> interpolated candidates -> choice on `selection` -> verdict and guard on `report`."""
    candidates = supervisor.candidates()
    top = best(candidates)
    networks = {}
    if top is not None:
        weights = supervisor.candidate_weights(top.step)
        for alpha in (*judge.alphas, 1.0):
            networks[top.step, alpha] = between(original, weights, alpha, judge.embedder, judge.inputs.train)
            if alpha < 1:
                candidates.append(judge.consider(networks[top.step, alpha], top.step, alpha))
    selected = choose(candidates)
    backbone, after = original, judge.original_report
    if selected is not None:
        key = (selected.step, selected.alpha)
        backbone = networks.get(key) or between(
            original, supervisor.candidate_weights(selected.step), 1.0, judge.embedder, judge.inputs.train
        )
        after = judge.measure_selected(backbone)
    deltas = compare(judge.original_report, after)
    delta = deltas.get(judge.primary) if selected is not None else None
    word, fired = broadcast_object_list([*verdict(selected, delta, collapse is not None)])
    if fired:  # worse beyond doubt on images that chose nothing: the original is handed over
        selected, backbone, after = None, original, judge.original_report
        deltas = compare(judge.original_report, after)
    return Outcome(word, fired, delta, selected, tuple(candidates), backbone, after, deltas, collapse)


def between(
    original: Backbone, weights: dict[str, torch.Tensor], alpha: float, embedder: Embedder, images: FolderSource
) -> Backbone:
    """The backbone at alpha between the original and the adapted weights; BatchNorm statistics estimated anew."""
    module = copy.deepcopy(original.module)
    start = {name: tensor.cpu() for name, tensor in original.module.state_dict().items()}
    module.load_state_dict(interpolate(start, weights, alpha))
    backbone = replace(original, module=module)
    if alpha < 1:
        still = {name for name, tensor in weights.items() if torch.equal(tensor.cpu(), start[name])}
        reestimate_batchnorm_(backbone, images, embedder, still)
    return backbone


def reestimate_batchnorm_(
    backbone: Backbone, images: FolderSource, embedder: Embedder, still: Collection[str] = ()
) -> None:
    """Statistics of interpolated weights are not the interpolated statistics: average them over training images.

    Those named in `still`, which training left as they were, are those of frozen layers and stay.
    """
    named = [(name, m) for name, m in backbone.module.named_modules() if isinstance(m, _BatchNorm)]
    norms = [m for name, m in named if m.track_running_stats and f"{name}.running_mean" not in still]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    hooks = [norm.register_forward_pre_hook(_collect_statistics) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over batches
    rng = np.random.default_rng(0)
    alone = replace(embedder, shared=False)  # each process needs the statistics of all batches
    alone(backbone, images.subset(np.sort(rng.permutation(len(images))[:NUM_REESTIMATED])))
    for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
        hook.remove()
        norm.momentum = momentum
        norm.eval()


def _collect_statistics(norm: nn.Module, inputs: Any) -> None:
    norm.train()  # embedding puts everything into eval mode; only the statistics are wanted from this pass


def compose_report(
    run: Run,
    s: Session,
    inputs: Inputs,
    judge: Judge,
    outcome: Outcome,
    requirement: Requirement | None,
    num_bad: int,
    timings: dict[str, float],
) -> dict[str, Any]:
    """`report.json` as a dict; the keys are the contract of `adaptkit.report/1`."""
    original, load, state = s.backbone, s.backbone.load_report, s.state
    chosen, has_labels = outcome.selected, inputs.scored is not None
    asked = outcome.deltas.get(requirement.metric) if requirement else None
    required = requirement.judge(asked.lo if asked else None) if requirement else None
    delta = outcome.guard_delta if outcome.guard_fired else outcome.deltas.get(judge.primary)
    message = sentence(outcome.verdict, judge.primary, delta, outcome.guard_fired, outcome.collapse, has_labels)
    if outcome.collapse:
        message += f" {advice(outcome.collapse, run.recipe)}"
    if required and not required["met"]:
        reached = "no interval" if required["lower"] is None else f"lower end {required['lower']:+.2f}"
        message += f" The required gain {required['metric']} >= {required['points']:g} is not met ({reached})."
    return {
        "schema": SCHEMA,
        "verdict": outcome.verdict,
        "evidence": "labels" if has_labels else "label_free",
        "primary_metric": judge.primary,
        "message": message,
        "probes": {
            "before": scores_to_json(judge.original_report.scores),
            "after": scores_to_json(outcome.after.scores),
            "delta": deltas_to_json(outcome.deltas),
        },
        "selected": {"step": chosen.step if chosen else 0, "alpha": chosen.alpha if chosen else 0.0},
        "guard": {"fired": outcome.guard_fired, "delta": interval_to_json(outcome.guard_delta)},
        "selection_metric": judge.metric,
        "candidates": [candidate.to_json() for candidate in outcome.candidates],
        "training": {
            "steps": state.step,
            "epochs": state.step / s.plan.steps_per_epoch,
            "stopped": outcome.collapse,
            "head_redraws_after_collapse": state.channel.redraws,
            "last": {name: value if math.isfinite(value) else None for name, value in state.last_record.items()},
        },
        "backbone": {
            "name": original.name,
            "architecture": original.architecture,
            "readout": original.readout,
            "embed_dim": original.embed_dim,
            "image_px": original.image_px,
            "sha256": load.sha256 if load else None,
            "source": load.source if load else None,
        },
        "data": inputs.facts | {"bad_images": num_bad},
        "recipe": run.recipe.model_dump(mode="json"),
        "throughput": {
            "images_per_second": state.images / state.seconds if state.seconds else None,
            "data_wait_percent": 100 * state.wait / state.seconds if state.seconds else None,
            "compile_seconds": s.compile_seconds,
            "device": str(s.accelerator.device),
            "precision": run.recipe.precision,
            "num_processes": s.accelerator.num_processes,
        },
        "files": {
            "backbone": "backbone",
            "head": "head.safetensors",
            "metrics": "metrics.jsonl",
            "manifest": "manifest.json",
            "recipe": "recipe.yaml",
            "html": "report.html",
        },
        "timings": timings | {"total": round(sum(timings.values()), 3)},
        "require_gain": required,
    }
