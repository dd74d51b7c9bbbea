"""Clustering: whether k-means, which sees no label, finds the classes.

k-means on embeddings scaled to length 1, k = number of classes among the queries; the best of 10 starts drawn by
k-means++ (Arthur and Vassilvitskii 2007). Scores: mutual information of clusters and classes over the mean of their
entropies; the adjusted Rand index (Hubert and Arabie 1985, eq. 5); accuracy with each cluster named after one class, as
the best one-to-one assignment has it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptkit.embedding import Embeddings
from adaptkit.probes.assignment import assign
from adaptkit.probes.intervals import leave_out
from adaptkit.probes.score import BLOCKS, Score, jackknifed_score, labels_of, percent_score

STARTS, MAX_ROUNDS = 10, 100
DISTANCES_AT_ONCE = 1 << 24  # 64 MB of float32


def probe_clustering(gallery: Embeddings, queries: Embeddings) -> dict[str, Score]:
    """`nmi`, `ari` (1: the clusters are the classes) and `cluster_accuracy` (percent) of the queries; no gallery.

    The intervals hold clusters and assignment fixed, as those of other probes do what they have fitted.
    """
    _, truth, _ = labels_of(gallery, queries)
    truth = truth.cpu()
    classes = truth.bincount().nonzero().flatten()
    truth = torch.searchsorted(classes, truth)  # 0 ... K - 1
    found = k_means(F.normalize(queries.vectors.float(), dim=1), len(classes)).cpu()
    table = contingency(found, truth, len(classes))
    class_of = torch.from_numpy(assign(-table.double().numpy()))
    scores = {"cluster_accuracy": percent_score(class_of[found] == truth)}
    groups = leave_out(len(truth), BLOCKS) if len(truth) >= 4 else []
    sizes = [len(truth) - len(kept) for kept in groups]
    tables = (contingency(found[kept], truth[kept], len(classes)) for kept in groups)  # one at a time: they are K x K
    parts = [(nmi(part), ari(part)) for part in tables]
    for number, (name, value) in enumerate((("nmi", nmi(table)), ("ari", ari(table)))):
        scores[name] = jackknifed_score(value, [part[number] for part in parts], sizes)
    return scores


def contingency(found: Tensor, truth: Tensor, count: int) -> Tensor:
    """(N,) clusters and (N,) classes below `count` -> (count, count) how many images lie in both."""
    return (found * count + truth).bincount(minlength=count * count).view(count, count)


def nmi(table: Tensor) -> float:
    """Mutual information of rows and columns over the mean of their entropies; 1 when neither has any."""
    share = table.double() / table.sum()
    rows, columns = share.sum(dim=1), share.sum(dim=0)
    entropies = -torch.xlogy(rows, rows).sum() - torch.xlogy(columns, columns).sum()
    together = -torch.xlogy(share, share).sum()
    return float(2 * (entropies - together) / entropies) if entropies > 0 else 1.0


def ari(table: Tensor) -> float:
    """Adjusted Rand index: of pairs of images, with what chance would agree on subtracted; 1 at most."""
    both, rows, columns = (
        float((counts * (counts - 1) / 2).sum())
        for counts in (table.double(), table.double().sum(1), table.double().sum(0))
    )
    count = float(table.sum())
    pairs = count * (count - 1) / 2
    chance = rows * columns / pairs if pairs else 0.0
    most = (rows + columns) / 2
    return (both - chance) / (most - chance) if most > chance else 1.0


def k_means(vectors: Tensor, count: int) -> Tensor:
    """(N, D) -> (N,) cluster of each, below `count`: the least sum of squared distances of 10 seeded starts."""
    best, least = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device), torch.inf
    for start in range(STARTS):
        clusters, error = lloyd(vectors, first_centres(vectors, count, start))
        if error < least:
            best, least = clusters, error
    return best


def first_centres(vectors: Tensor, count: int, seed: int) -> Tensor:
    """(count, D) of the vectors, each drawn with probability proportional to its squared distance to those before."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    chosen = [int(draws[0] * len(vectors))]
    nearest = torch.full((len(vectors),), torch.inf, device=vectors.device)
    for draw in draws[1:]:
        nearest = torch.minimum(nearest, (vectors - vectors[chosen[-1]]).square().sum(dim=1))
        upto = nearest.double().cumsum(0)
        place = int(torch.searchsorted(upto, upto[-1:] * draw, right=True))
        chosen.append(min(place, len(vectors) - 1))
    return vectors[chosen]


def lloyd(vectors: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """(N, D), (K, D) -> (N,) clusters when no image changes its own any more, and the sum of squared distances."""
    clusters, distances = assign_nearest(vectors, centres)
    for _ in range(MAX_ROUNDS):
        sizes = clusters.bincount(minlength=len(centres))
        centres = torch.zeros_like(centres).index_add_(0, clusters, vectors) / sizes.clamp(min=1)[:, None]
        empty = (sizes == 0).nonzero().flatten()
        centres[empty] = vectors[distances.topk(len(empty)).indices]  # those worst served get a centre of their own
        before = clusters
        clusters, distances = assign_nearest(vectors, centres)
        if torch.equal(clusters, before):
            break
    return clusters, float(distances.double().sum())


def assign_nearest(vectors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D), (K, D) -> (N,) nearest centre and (N,) squared distance to it."""
    lengths, clusters, distances = centres.square().sum(dim=1), [], []
    for block in torch.split(vectors, max(1, DISTANCES_AT_ONCE // len(centres))):
        least = (lengths - 2 * block @ centres.T).min(dim=1)
        clusters.append(least.indices)
        distances.append((least.values + block.square().sum(dim=1)).clamp(min=0))
    return torch.cat(clusters), torch.cat(distances)
