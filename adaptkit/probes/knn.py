"""k-nearest-neighbour classification with weighted votes (Wu et al. 2018, as in DINO)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptkit.embedding import Embeddings
from adaptkit.probes.score import Score, labels_of, percent_score

SIMILARITIES_AT_ONCE = 1 << 22  # 16 MB of float32; a sort of them stays below 100 MB


def probe_knn(gallery: Embeddings, queries: Embeddings, *, k: int = 20, temperature: float = 0.07) -> dict[str, Score]:
    """`knn_top1`, percent: cosine, the k nearest of the gallery vote with weight exp(similarity / temperature)."""
    labels, truth, num_classes = labels_of(gallery, queries)
    hits = []
    for rows, similarity, index in nearest(queries.vectors, gallery.vectors, k):
        votes = torch.zeros(len(index), num_classes, device=index.device)
        votes.scatter_add_(1, labels[index], (similarity / temperature).exp())  # (b, classes)
        hits.append(votes.argmax(dim=1) == truth[rows])
    return {"knn_top1": percent_score(torch.cat(hits))}


def nearest(
    queries: Tensor, gallery: Tensor, k: int, *, exclude_self: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(Q, D), (N, D) -> blocks of query rows with cosine (b, k) and gallery index (b, k), nearest first.

    `exclude_self`: the two are the same images, and no image is its own neighbour. k is cut to what there is.
    """
    k = min(k, len(gallery) - exclude_self)
    for rows, similarity in cosine_blocks(queries, gallery):
        if exclude_self:
            similarity[:, rows].fill_diagonal_(-torch.inf)
        top = similarity.topk(k, dim=1)
        yield rows, top.values, top.indices


def cosine_blocks(queries: Tensor, gallery: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(Q, D), (N, D) -> (query rows, their cosine similarities (b, N)), never the whole Q x N matrix at once."""
    gallery = F.normalize(gallery.float(), dim=1)  # of the queries only those at hand: that spares a copy of all
    size = max(1, SIMILARITIES_AT_ONCE // len(gallery))
    for start in range(0, len(queries), size):
        rows = slice(start, min(start + size, len(queries)))
        yield rows, F.normalize(queries[rows].float(), dim=1) @ gallery.T
