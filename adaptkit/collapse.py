"""Detectors that act: a diverged or collapsed run goes back, gets a new head and a lower learning rate, then stops.

What a collapse of the outputs is, the objective says (`Objective.health`); that of the embeddings, and when to act,
is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaptkit.objectives import Health
from adaptkit.recipe import Recipe

MAX_REDRAWS = 2
LR_CUT = 0.5
PATIENCE = 3  # windows of the log in a row
RECOVERED = 0.5  # share of the best information that counts as "back" after a redraw
MIN_VIEWS = 16  # of fewer the rank says more about the images of the batch than about the backbone
LINE = 0.1  # directions beside the first: below it one holds 95 % of the variance, and the images lie on a line
LINE_SHARE = 0.05  # unless the backbone began like that: a collapse leaves less than this share of those at the start
RESIDUE = 1e-5  # share of the power: embeddings that vary less have only bf16's rounding left
RANK = "teacher_d_eff"  # in the log


@dataclass
class Channel:
    """The health of what student and teacher exchange, from the log's windows."""

    best_information: float = 0.0
    information: float = 0.0
    bad_windows: int = 0
    redraws: int = 0
    first_rank: float | None = None  # of the original, or of a backbone that learnt for one window

    def update(self, record: Mapping[str, float], health: Health, resting: bool) -> str | None:
        """Take in a window of the log; the reason to act, or None. While `resting` (a fresh head), only divergence."""
        if not math.isfinite(record["loss"]):  # fp16's scaler skips steps of infinite gradients by itself
            return "the loss is not finite"
        rank = record.get(RANK)
        if rank is not None and not math.isfinite(rank):
            return "the teacher's embeddings are not finite"
        self.first_rank = rank if self.first_rank is None else self.first_rank
        self.information = health.information
        if resting:
            self.bad_windows = 0
            return None
        self.best_information = max(self.best_information, self.information)
        collapse = health.collapse or self._rank_collapse(rank)
        self.bad_windows = self.bad_windows + 1 if collapse else 0
        return collapse if self.bad_windows >= PATIENCE else None

    def _rank_collapse(self, rank: float | None) -> str | None:
        if rank is None or not self.first_rank:  # 0: there never was a direction to lose
            return None
        if rank - 1 >= min(LINE, LINE_SHARE * (self.first_rank - 1)):
            return None
        return f"the embeddings collapsed: {rank:.2f} effective directions, {self.first_rank:.2f} at the start"

    @property
    def transmits(self) -> bool:
        """Whether the information is back after the last draw: only then may a candidate be taken."""
        return self.information > 0 and self.information >= RECOVERED * self.best_information


class LastInput:
    """Keeps what a network was given last, on its device. A head gets its backbone's embeddings, all parts together."""

    def __init__(self, network: nn.Module) -> None:
        self.rows: Tensor | None = None

        def keep(module: nn.Module, inputs: tuple[Tensor]) -> None:  # no method: a copied network copies those
            self.rows = inputs[0]

        network.register_forward_pre_hook(keep)


@torch.no_grad()
def effective_directions(embeddings: Tensor) -> Tensor:
    """(N, D) -> scalar (sum l)^2 / sum l^2, l = eigenvalues of the covariance (`d_eff`); 0 if they do not vary.

    It needs no eigenvalues, as both sums are entries of a Gram matrix, (N, N) or (D, D), and does not wait for the
    device.
    """
    rows = embeddings.float()
    rows = rows / rows.abs().max().clamp_min(torch.finfo(rows.dtype).tiny)  # squares and their squares stay finite
    centred = rows - rows.mean(0)
    power, variation = rows.square().sum(), centred.square().sum()
    gram = centred @ centred.T if len(rows) <= rows.shape[1] else centred.T @ centred
    directions = variation.square() / gram.square().sum()
    return torch.where(variation <= RESIDUE * power, 0.0, directions)  # NaN compares as false and stays


def advice(collapse: str, recipe: Recipe) -> str:
    """What to try after a run that collapsed for this reason, in one sentence."""
    usual = type(recipe.optim).model_fields["lr"].default
    lower = f"--lr {min(recipe.optim.lr / 10, usual):g}"
    if "not finite" in collapse:
        return f"Try {lower}{'' if recipe.precision == 'fp32' else ', or --precision fp32'}."
    return f"Try {lower} or a larger --batch-size, and look with `adaptkit check` whether the images differ at all."
