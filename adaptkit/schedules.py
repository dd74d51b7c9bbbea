"""Everything that changes over a run, as pure functions of the step. They scale with the length of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from adaptkit.recipe import Recipe
from adaptkit.settings import DURATION

MIN_REFIT_STEPS = 50
COOLDOWN_SHARE, ANNEALING_SHARE = 0.3, 0.2  # of the run; the infinite schedule's in its authors' MAE scripts
# EMA momentum is 1 - span / total_steps: a short run needs a teacher that moves, and at the end one that has arrived;
# with a final momentum of 1 the student of a run of 160 steps was a k-NN point ahead of the teacher that is exported.
MOMENTUM_SPANS = (10, 3)  # at the start and at the end
MIN_MOMENTUM = 0.5


def to_steps(duration: str, total_steps: int, steps_per_epoch: int, batch_size: int) -> int:
    """A duration of a recipe in steps, at least 1; 0 for `never` or a zero."""
    if duration == "never":
        return 0
    match = DURATION.fullmatch(duration)
    if match is None:
        raise ValueError(f"{duration!r} is not a duration")
    value, unit = float(match[1]), match[2].rstrip("s")
    per_unit = {"%": total_steps / 100, "epoch": steps_per_epoch, "step": 1, "image": 1 / batch_size}[unit]
    return max(1, round(value * per_unit)) if value > 0 else 0


def cosine(step: int, total_steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at the last step."""
    progress = min(1.0, step / max(1, total_steps - 1))
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, final: float) -> float:
    """Linear warm-up to `peak`, then a cosine to `peak * final`. `step` counts from 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return cosine(step - warmup_steps, total_steps - warmup_steps, peak, peak * final)


def infinite_learning_rate(
    step: int, total_steps: int, warmup_steps: int, peak: float, constant: float, final: float
) -> float:
    """Linear warm-up to `peak`, cosine to `peak * constant`, constant, exponential decay to `peak * final` (above 0).

    The schedule of arXiv 2503.02844. Shares of the run are rounded to whole steps, so a run of 1 or 2 is not annealed.
    Where the warm-up leaves too few steps, the annealing comes first; without any cooldown it starts from the peak.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    remaining = total_steps - warmup_steps
    annealing = min(round(ANNEALING_SHARE * total_steps), remaining)
    cooldown = min(round(COOLDOWN_SHARE * total_steps), remaining - annealing)
    level = constant if cooldown else 1.0
    if step < warmup_steps + cooldown:
        return cosine(step - warmup_steps, cooldown + 1, peak, peak * level)
    left = max(0, total_steps - 1 - step)
    if left < annealing:
        return peak * (math.pow(level, left / annealing) * math.pow(final, 1 - left / annealing))
    return peak * level


def ema_momentum(step: int, total_steps: int, start: float | None, end: float | None) -> float:
    """Cosine from `start` to `end`; None: 1 - 10 / total_steps and 1 - 3 / total_steps, but at least 0.5."""
    start, end = (
        max(MIN_MOMENTUM, 1 - span / total_steps) if given is None else given
        for given, span in zip((start, end), MOMENTUM_SPANS, strict=True)
    )
    return cosine(step, total_steps, start, end)


def is_due(step: int, every: int, total_steps: int) -> bool:
    """Whether something done every `every` steps (0: never) is due after `step` steps; always after the last."""
    return step == total_steps or (every > 0 and step % every == 0)


def is_reset_step(step: int, every: int, total_steps: int, warmup_steps: int, min_steps: int = 1) -> bool:
    """Whether the head is drawn anew before `step`: at step 0 and every `every` steps, but not before `min_steps`.

    A reset so late that less than a warm-up and as long again, or less than `min_steps`, would remain is left out: it
    could not recover.
    """
    if step == 0:
        return True
    return every > 0 and step % max(every, min_steps) == 0 and total_steps - step >= max(2 * warmup_steps, min_steps)


@dataclass(frozen=True)
class Plan:
    """The recipe's durations in steps, for one number of training images. All schedules of a run are its methods."""

    recipe: Recipe
    batch_size: int
    steps_per_epoch: int
    total_steps: int
    lr_warmup: int
    head_warmup: int
    reset_every: int
    probe_every: int
    checkpoint_every: int

    @classmethod
    def make(cls, recipe: Recipe, num_images: int) -> Plan:
        """The plan for `num_images` training images, at least `recipe.batch_size` of them."""
        steps_per_epoch = num_images // recipe.batch_size
        total_steps = recipe.steps or max(1, round(recipe.epochs * steps_per_epoch))

        def steps(duration: str) -> int:
            return to_steps(duration, total_steps, steps_per_epoch, recipe.batch_size)

        return cls(
            recipe=recipe,
            batch_size=recipe.batch_size,
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
            lr_warmup=steps(recipe.optim.warmup),
            head_warmup=steps(recipe.head.warmup),
            reset_every=steps(recipe.head.reset_every),
            probe_every=steps(recipe.probe.every),
            checkpoint_every=steps(recipe.checkpoint_every),
        )

    def lr(self, step: int) -> float:
        """Learning rate of the backbone's last layer."""
        return self._learning_rate(step, self.lr_warmup, self.recipe.optim.lr)

    def head_lr(self, step: int) -> float:
        """Learning rate of the head: no linear warm-up, as it starts from nothing after every draw."""
        return self._learning_rate(step, 0, self.recipe.head.lr)

    def _learning_rate(self, step: int, warmup_steps: int, peak: float) -> float:
        optim = self.recipe.optim
        if optim.schedule == "infinite":
            constant, final = optim.constant_lr, optim.final_lr
            return infinite_learning_rate(step, self.total_steps, warmup_steps, peak, constant, final)
        return learning_rate(step, self.total_steps, warmup_steps, peak, optim.final_lr)

    def weight_decay(self, step: int) -> float:
        """AdamW weight decay."""
        return cosine(step, self.total_steps, self.recipe.optim.weight_decay, self.recipe.optim.final_weight_decay)

    def momentum(self, step: int) -> float:
        """EMA momentum of the teacher."""
        return ema_momentum(step, self.total_steps, self.recipe.teacher.momentum, self.recipe.teacher.final_momentum)

    @property
    def refit_steps(self) -> int:
        """Steps that train a fresh head on the exported, frozen backbone, where the last teacher's does not fit it."""
        return max(MIN_REFIT_STEPS, self.head_warmup)

    def is_reset(self, step: int) -> bool:
        """Whether the head is drawn anew before `step`."""
        least = self.recipe.head.min_steps
        return is_reset_step(step, self.reset_every, self.total_steps, self.head_warmup, least)

    def is_probe(self, step: int) -> bool:
        """Whether the teacher is probed after `step` steps."""
        return is_due(step, self.probe_every, self.total_steps)

    def is_checkpoint(self, step: int) -> bool:
        """Whether the state is saved after `step` steps."""
        return is_due(step, self.checkpoint_every, self.total_steps)
