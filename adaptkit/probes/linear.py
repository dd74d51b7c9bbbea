"""Linear probe: multinomial logistic regression on frozen embeddings, no augmentation, no schedule to tune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptkit.embedding import Embeddings
from adaptkit.probes.score import Score, labels_of, percent_score

STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""L2 strengths tried, strongest first: each fit starts from the one before."""
HELD_OUT = 0.2
SEARCH_STEPS, MAX_STEPS = 100, 300  # of L-BFGS: while strengths are compared, and of the fit that is scored
GRADIENT_TOLERANCE = 1e-5


def probe_linear(gallery: Embeddings, queries: Embeddings) -> dict[str, Score]:
    """`linear_top1`, percent: fitted on the gallery, scored on the queries."""
    labels, truth, num_classes = labels_of(gallery, queries)
    mean, std = gallery.vectors.mean(dim=0), gallery.vectors.std(dim=0, correction=0)
    scale = torch.where(std > 1e-6 * (1e-6 + mean.abs()), std, 1.0)  # a constant dimension stays, and says nothing
    inputs = (gallery.vectors - mean) / scale
    strength, start = choose_strength(inputs, labels, num_classes)
    weight = fit(inputs, labels, num_classes, strength, start=start)
    predicted = predict((queries.vectors - mean) / scale, weight).argmax(dim=1)
    return {"linear_top1": percent_score(predicted == truth)}


def choose_strength(
    inputs: Tensor, labels: Tensor, num_classes: int, held_out: Tensor | None = None
) -> tuple[float, Tensor | None]:
    """The L2 strength with the best accuracy on a held-out fifth of the gallery (ties: the lower loss there).

    With it the weights fitted to the other four fifths, a good start for the fit to all. `held_out` (N,) bool says
    which fifth it is, where it must not be drawn one by one.
    """
    held_out = stratified_mask(labels, HELD_OUT) if held_out is None else held_out
    if not bool(held_out.any()):  # one image per class: nothing to choose by
        return STRENGTHS[len(STRENGTHS) // 2], None
    problem = Problem.of(inputs[~held_out], labels[~held_out], num_classes)
    results, weight = [], None
    for strength in STRENGTHS:
        weight = problem.minimum(strength, weight, SEARCH_STEPS)
        logits, truth = predict(inputs[held_out], weight), labels[held_out]
        accuracy = float((logits.argmax(dim=1) == truth).float().mean())
        results.append((accuracy, -float(F.cross_entropy(logits, truth)), strength, weight))
    *_, strength, weight = max(results, key=lambda result: result[:2])
    return strength, weight


def stratified_mask(labels: Tensor, share: float) -> Tensor:
    """(N,) labels -> (N,) bool: `share` of each class, at least one of it unless it has only one (fixed seed)."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in sorted(set(labels.tolist())):
        members = (labels.cpu() == label).nonzero().flatten()
        count = min(max(1, round(share * len(members))), len(members) - 1)
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask.to(labels.device)


def fit(inputs: Tensor, labels: Tensor, num_classes: int, strength: float, *, start: Tensor | None = None) -> Tensor:
    """(N, D), (N,) -> (D + 1, classes): the minimum of `objective` by L-BFGS; the last row is the bias."""
    return Problem.of(inputs, labels, num_classes).minimum(strength, start)


@dataclass(frozen=True, eq=False)
class Problem:
    """One set of images, to be fitted at several strengths.

    Embeddings are strongly correlated, which slows L-BFGS down. It therefore sees inputs turned to their principal
    axes, where the Hessian is nearly diagonal, and weights in units of its inverse root. The minimum is the same.
    """

    turned: Tensor  # (N, D) inputs @ axes
    labels: Tensor  # (N,)
    axes: Tensor  # (D, D)
    variances: Tensor  # (D,) float64, of the inputs along the axes
    curvature: Tensor  # (classes,) float64, p (1 - p) of each class probability before anything is learnt

    @classmethod
    def of(cls, inputs: Tensor, labels: Tensor, num_classes: int) -> Problem:
        """(N, D), (N,) -> the problem, turned once for all strengths."""
        variances, axes = torch.linalg.eigh(inputs.double().T @ inputs.double() / len(inputs))
        share = torch.bincount(labels, minlength=num_classes).double() / len(labels)
        curvature = (share * (1 - share)).clamp(min=1 / len(labels))  # of a class without images: as if it had one
        axes = axes.to(inputs.dtype)
        return cls(inputs @ axes, labels, axes, variances.clamp(min=0), curvature)

    def minimum(self, strength: float, start: Tensor | None = None, max_steps: int = MAX_STEPS) -> Tensor:
        """(D + 1, classes), from `start` of the same shape, or from 0."""
        unit = (self.variances[:, None] * self.curvature + strength).rsqrt()
        unit = torch.cat([unit, self.curvature.rsqrt()[None]]).to(self.turned.dtype)  # (D + 1, classes)
        weight = torch.zeros_like(unit) if start is None else _turn(start, self.axes.T) / unit
        with torch.enable_grad():
            _minimise_(
                weight.requires_grad_(), lambda w: objective(self.turned, self.labels, w * unit, strength), max_steps
            )
        return _turn(weight.detach() * unit, self.axes)


def _turn(weight: Tensor, rotation: Tensor) -> Tensor:
    return torch.cat([rotation @ weight[:-1], weight[-1:]])  # the bias stays


def _minimise_(weight: Tensor, loss_of: Callable[[Tensor], Tensor], max_steps: int) -> None:
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=max_steps,
        history_size=20,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(weight)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]


def objective(inputs: Tensor, labels: Tensor, weight: Tensor, strength: float) -> Tensor:
    """Mean cross-entropy (nats) + strength / 2 * |weight without bias|^2; scikit-learn's with C = 1 / (strength N)."""
    return F.cross_entropy(predict(inputs, weight), labels) + strength / 2 * weight[:-1].square().sum()


def predict(inputs: Tensor, weight: Tensor) -> Tensor:
    """(N, D), (D + 1, classes) -> logits (N, classes)."""
    return torch.addmm(weight[-1], inputs, weight[:-1])
