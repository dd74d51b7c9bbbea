"""Retrieval: how well the full ranking by cosine puts images of the same class first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from adaptkit.embedding import Embeddings
from adaptkit.errors import DataError
from adaptkit.probes.knn import cosine_blocks
from adaptkit.probes.score import Score, labels_of, percent_score


def probe_retrieval(gallery: Embeddings, queries: Embeddings) -> dict[str, Score]:
    """`retrieval_map`, percent: mean average precision over the queries with at least one relevant image.

    `per_query` holds those queries only. Raises DataError when there are none.
    """
    labels, truth, _ = labels_of(gallery, queries)
    # the gallery is listed class by class, so equal similarities would otherwise rank by class
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
    labels = labels[order]
    answerable = torch.isin(truth, labels)
    if not bool(answerable.any()):
        raise DataError("no query has an image of its class in the gallery; check that both have the same classes")
    asked = queries.vectors if bool(answerable.all()) else queries.vectors[answerable]  # no copy where none is needed
    truth = truth[answerable]
    precision = [
        average_precision(best_first(similarity, labels == truth[rows, None]))
        for rows, similarity in cosine_blocks(asked, gallery.vectors[order])
    ]
    return {"retrieval_map": percent_score(torch.cat(precision))}


def best_first(similarity: Tensor, relevant: Tensor) -> Tensor:
    """(Q, N) float32, (Q, N) bool -> `relevant` by falling similarity; of equal ones, the first in the gallery first.

    Sorts one integer for each image, made of similarity, place and relevance: numpy sorts plain integers three times
    as fast as torch sorts indices. A GPU sorts the similarities themselves.
    """
    if similarity.device.type != "cpu":
        return relevant.gather(1, similarity.argsort(dim=1, descending=True, stable=True))
    bits = (similarity + 0.0).numpy().view(np.int32)  # + 0.0: of -0 as well, which equals 0
    keys = np.where(bits < 0, bits & 0x7FFFFFFF, -bits).astype(np.int64)  # rises where the float falls
    keys <<= 32
    keys |= relevant.numpy() | np.arange(0, 2 * bits.shape[1], 2, dtype=np.int32)
    keys.sort(axis=1)
    return torch.from_numpy((keys & 1).astype(bool))


def average_precision(relevant: Tensor) -> Tensor:
    """(Q, N) bool, best match first, at least one True per row -> (Q,) mean over relevant ranks r of precision at r."""
    row, rank = relevant.nonzero(as_tuple=True)  # row by row, so the ranks of a row are ascending
    count = relevant.sum(dim=1)
    first = count.cumsum(0) - count
    found = (
        torch.arange(1, len(row) + 1, device=row.device) - first[row]
    )  # relevant images up to and including this one
    total = torch.zeros(len(relevant), dtype=torch.float64, device=row.device).index_add_(
        0, row, found.double() / (rank + 1)
    )
    return total / count
