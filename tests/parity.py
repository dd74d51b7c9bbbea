"""One training, by one process or by several: what they compute, and how far apart it is.

`python tests/parity.py` prints the table of docs/scaling.md.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from several import together
from tiny_runs import tiny
from torch import Tensor

from adaptkit.backbones import load_backbone
from adaptkit.inputs import open_inputs
from adaptkit.loop import train_steps
from adaptkit.recipe import load_recipe, overrides_of
from adaptkit.schedules import Plan
from adaptkit.session import Session, open_accelerator, open_session

OBJECTIVES = ("bits", "simdino", "dino")
STEPS = 20
RESETS = (0, 7, 14)
RESET: dict[str, Any] = {"head__reset_every": "33%", "head__min_steps": 1}
OF: dict[str, dict[str, Any]] = {
    "bits": {"objective__num_bits": 16},
    "simdino": {"objective__output_dim": 16},
    "dino": {"objective__output_dim": 16, "objective__num_prototypes": 32},
}


@dataclass(frozen=True)
class Trained:
    """What a process holds: of the first step, and of a run of 20 steps with two head resets."""

    gradients: dict[str, Tensor]  # clipped, of the first step
    records: list[dict[str, float]]  # one for each step; the first is that of `gradients`
    resets: tuple[int, ...]
    start: dict[str, Tensor]  # backbone and objective's state
    end: dict[str, Tensor]


@dataclass(frozen=True)
class Apart:
    """Largest relative differences from one process."""

    loss: float  # of the first step
    gradient: float  # of the first step: length of the difference / length
    later_loss: float  # of any step
    weights: float  # after 20 steps: distance / distance moved
    state: float  # of the objective, after 20 steps


def train(backbone: Path, images: Path, names: tuple[str, ...] = OBJECTIVES) -> dict[str, Trained]:
    """Train with every objective in this process, or this process of several."""
    return {name: _train(backbone, images, name) for name in names}


def _train(backbone: Path, images: Path, name: str) -> Trained:
    gradients: dict[str, Tensor] = {}
    records: list[dict[str, float]] = []
    resets = []
    # the first step once with the whole backbone learning, which in the run is frozen while the head is fresh
    one = session(backbone, images, objective__name=name, steps=1, head__warmup="never", **OF[name])

    def keep(*_: Any) -> None:
        learning = [(n, p.grad) for n, p in one.student.named_parameters() if p.grad is not None]
        gradients.update({n: gradient.clone() for n, gradient in learning})

    one.optimizer.optimizer.register_step_pre_hook(keep)  # type: ignore[attr-defined]
    train_steps(one, lambda step: None)
    records.append(one.meter.read())
    s = session(backbone, images, objective__name=name, steps=STEPS, **RESET, **OF[name])
    start = _weights(s)

    def after(step: int) -> None:
        records.append(s.meter.read())
        if s.state.last_draw == step - 1:
            resets.append(step - 1)

    train_steps(s, after)
    return Trained(gradients, records, tuple(resets), start, _weights(s))


def session(backbone: Path, images: Path, **changes: Any) -> Session:
    """What a run would train, with the tiny settings and changes."""
    without = {"objective__num_bits": 256} | changes  # the default, which an objective without bits accepts
    recipe = load_recipe(overrides=overrides_of(tiny(data=str(images), **without)))
    original = load_backbone(str(backbone))
    inputs = open_inputs(recipe)
    plan = Plan.make(recipe, len(inputs.train))
    return open_session(open_accelerator("fp32"), plan, inputs.train, original, original.clone(), 0, _no_failures)


def _no_failures(failures: Any) -> None:
    assert not failures


def _weights(s: Session) -> dict[str, Tensor]:
    both = {"student": s.student.state_dict(), "teacher": s.teacher.state_dict(), "state": s.objective.state}
    return copy.deepcopy({f"{part}.{name}": value for part, each in both.items() for name, value in each.items()})


def apart(one: Trained, other: Trained) -> Apart:
    """How far the other is from the one."""
    losses = [abs(b["loss"] / a["loss"] - 1) for a, b in zip(one.records, other.records, strict=True)]
    names = [name for name in one.start if ".backbone." in name]
    states = [name for name in one.start if name.startswith("state.")]
    return Apart(
        losses[0],
        _distance(one.gradients, other.gradients, list(one.gradients)) / _distance(one.gradients, None),
        max(losses),
        _distance(one.end, other.end, names) / _distance(one.end, one.start, names),
        _distance(one.end, other.end, states) / max(_distance(one.end, None, states), 1e-30),
    )


def _distance(one: dict[str, Tensor], other: dict[str, Tensor] | None, names: list[str] | None = None) -> float:
    """Euclidean, over all tensors together."""
    zero = torch.zeros(())
    parts = [
        (one[name].double() - (other[name] if other else zero)).flatten() for name in (one if names is None else names)
    ]
    return float(torch.cat([*parts, zero[None].double()]).norm())


def main() -> None:
    """Measure and print the table."""
    from conftest import _save, write_folder

    heads = ["objective", "processes", "loss", "gradient", "loss of any step", "weights"]
    print("|", " | ".join(heads), "|")
    print("|", " | ".join(["---"] * len(heads)), "|")
    with tempfile.TemporaryDirectory() as folder:
        images = write_folder(Path(folder) / "images", classes=4, per_class=30)
        vit = _save("test_vit", Path(folder) / "vit")
        (one,) = together(1, train, vit, images)
        for count in (2, 4):
            several = together(count, train, vit, images)[0]
            for name in OBJECTIVES:
                a = apart(one[name], several[name])
                print(f"| {name} | {count} | {a.loss:.0e} | {a.gradient:.0e} | {a.later_loss:.0e} | {a.weights:.0e} |")


if __name__ == "__main__":
    main()
