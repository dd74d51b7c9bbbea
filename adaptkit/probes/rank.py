"""How many directions the embeddings use. No labels needed; a higher rank alone is not a better backbone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptkit.embedding import Embeddings
from adaptkit.probes.score import Score, check_finite, jackknifed_scores

RANKME_EPS = 1e-7
FIRST_RANK = 11  # of the fit of alpha_req, where there are enough
MIN_EIGENVALUE = 1e-12  # of the largest: below it there is only rounding


def probe_rank(gallery: Embeddings, queries: Embeddings) -> dict[str, Score]:
    """`rankme`, `d_eff`, `r_eff` of the gallery's embeddings, with block jackknife intervals.

    The gallery, because it is the larger set: the measures grow with the number of images until that is many times D.
    """
    return rank_scores(gallery)


def probe_alpha_req(gallery: Embeddings, queries: Embeddings) -> dict[str, Score]:
    """`alpha_req` of the gallery's embeddings, with a block jackknife interval."""
    check_finite(gallery)
    return jackknifed_scores(lambda vectors: {"alpha_req": alpha_req(vectors)}, gallery.vectors)


def rank_scores(embeddings: Embeddings) -> dict[str, Score]:
    """Each measure with its interval, from one eigendecomposition for all three, 21 in all.

    Raises DataError when there is nothing to measure, NotFinite when a vector is not finite.
    """
    check_finite(embeddings)
    return jackknifed_scores(rank_measures, embeddings.vectors)


def rankme(vectors: Tensor) -> float:
    """(N, D) -> exp of the entropy of the centred embeddings' normalised singular values (Garrido et al. 2023)."""
    return rank_measures(vectors)["rankme"]


def d_eff(vectors: Tensor) -> float:
    """(N, D) -> (sum l)^2 / sum l^2, l = eigenvalues of the covariance (arXiv 2602.09764)."""
    return rank_measures(vectors)["d_eff"]


def r_eff(vectors: Tensor) -> float:
    """(N, D) -> exp of the entropy of l / sum l, l = eigenvalues of the covariance (arXiv 2602.09764)."""
    return rank_measures(vectors)["r_eff"]


def alpha_req(vectors: Tensor) -> float:
    """(N, D) -> how fast the covariance's spectrum decays: the alpha of l_i ~ i^-alpha (Agrawal et al. 2022).

    Minus the least-squares slope of log eigenvalue against log rank, over ranks 11 to M / 2 of M = min(N - 1, D): the
    first eigenvalues follow the largest groups of images, not the law (Stringer et al. 2019 begin at 11 too), and the
    lower half falls off because images and dimensions are finite. From rank 1 where M < 24. Infinite for embeddings
    that do not vary in so many directions: no law decays so fast.
    """
    count = min(len(vectors) - 1, vectors.shape[1])
    first = FIRST_RANK if count >= 2 * (FIRST_RANK + 1) else 1
    last = max(count // 2, 2)
    eigenvalues = spectrum(vectors).flip(0)  # largest first
    if count < last or bool(eigenvalues[last - 1] <= MIN_EIGENVALUE * eigenvalues[0]):
        return math.inf
    x = torch.arange(first, last + 1, dtype=torch.float64, device=eigenvalues.device).log()
    y = eigenvalues[first - 1 : last].log()
    x = x - x.mean()
    return -float((x * y).sum() / x.square().sum())


def rank_measures(vectors: Tensor) -> dict[str, float]:
    """(N, D) -> all three. Embeddings that do not vary have the measures' minimum, 1."""
    eigenvalues = spectrum(vectors)
    if not bool(eigenvalues.any()):
        return {"rankme": 1.0, "d_eff": 1.0, "r_eff": 1.0}
    share = eigenvalues / eigenvalues.sum()
    singular = eigenvalues.sqrt()
    spread = singular / singular.sum() + RANKME_EPS
    return {
        "rankme": float(torch.exp(-(spread * spread.log()).sum())),
        "d_eff": float(1 / share.square().sum()),
        "r_eff": float(torch.exp(-torch.xlogy(share, share).sum())),
    }


def spectrum(vectors: Tensor) -> Tensor:
    """(N, D) -> (min(N, D),) float64 eigenvalues >= 0 of the centred Gram matrix: N times the covariance's."""
    centred = vectors.double()
    power = centred.square().sum()
    centred = centred - centred.mean(dim=0)
    if bool(centred.square().sum() <= 1e-12 * power):  # only float32 rounding differs between the images
        return centred.new_zeros(min(centred.shape))
    gram = centred.T @ centred if len(centred) >= centred.shape[1] else centred @ centred.T
    eigenvalues: Tensor = torch.linalg.eigvalsh(gram)
    return eigenvalues.clamp(min=0)
