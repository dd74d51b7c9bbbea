"""Linear probe: multinomial logistic regression on frozen embeddings, no augmentation, no schedule to tune."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptkit.embedding import Embeddings
from adaptkit.probes.score import Score, labels_of, percent_score

STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""L2 strengths tried, strongest first: each fit starts from the one before."""
HELD_OUT = 0.2
MAX_STEPS = 200
GRADIENT_TOLERANCE = 1e-5
CURVATURE = 0.1  # typical p (1 - p) of a class probability, in the Hessian that whitening approximates


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


def choose_strength(inputs: Tensor, labels: Tensor, num_classes: int) -> tuple[float, Tensor | None]:
    """The L2 strength with the best accuracy on a held-out fifth of the gallery (ties: the lower loss there).

    With it the weights fitted to the other four fifths, a good start for the fit to all.
    """
    held_out = stratified_mask(labels, HELD_OUT)
    if not bool(held_out.any()):  # one image per class: nothing to choose by
        return STRENGTHS[len(STRENGTHS) // 2], None
    results, weight = [], None
    for strength in STRENGTHS:
        weight = fit(inputs[~held_out], labels[~held_out], num_classes, strength, start=weight)
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
        members = (labels == label).nonzero().flatten()
        count = min(max(1, round(share * len(members))), len(members) - 1)
        mask[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return mask


def fit(inputs: Tensor, labels: Tensor, num_classes: int, strength: float, *, start: Tensor | None = None) -> Tensor:
    """(N, D), (N,) -> (D + 1, classes): the minimum of `objective` by L-BFGS; the last row is the bias.

    Embeddings are strongly correlated, which slows L-BFGS down. It therefore sees whitened inputs: weight = `basis`
    @ whitened weight, where basis @ basis.T approximates the inverse of the Hessian. The minimum is the same.
    """
    covariance = inputs.double().T @ inputs.double() / len(inputs)
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    scale = (CURVATURE * eigenvalues.clamp(min=0) + strength).rsqrt().to(inputs.dtype)[:, None]
    vectors = vectors.to(inputs.dtype)
    basis = vectors * scale.T
    whitened = inputs @ basis
    weight = inputs.new_zeros(inputs.shape[1] + 1, num_classes)
    if start is not None:
        weight = torch.cat([vectors.T @ start[:-1] / scale, start[-1:]])
    with torch.enable_grad():
        _minimise_(weight.requires_grad_(), lambda w: _loss(whitened, labels, w, strength, scale))
    weight = weight.detach()
    return torch.cat([basis @ weight[:-1], weight[-1:]])


def _minimise_(weight: Tensor, loss_of: Callable[[Tensor], Tensor]) -> None:
    optimizer = torch.optim.LBFGS(
        [weight],
        max_iter=MAX_STEPS,
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
    return _loss(inputs, labels, weight, strength, inputs.new_ones(1))


def _loss(inputs: Tensor, labels: Tensor, weight: Tensor, strength: float, scale: Tensor) -> Tensor:
    penalty = (scale * weight[:-1]).square().sum()
    return F.cross_entropy(predict(inputs, weight), labels) + strength / 2 * penalty


def predict(inputs: Tensor, weight: Tensor) -> Tensor:
    """(N, D), (D + 1, classes) -> logits (N, classes)."""
    return torch.addmm(weight[-1], inputs, weight[:-1])
