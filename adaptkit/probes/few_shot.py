"""Few-shot classification: how far 1, 2, 5, 10 and 20 labelled images of each class get.

Each class is the mean of its few embeddings, scaled to length 1, and a query belongs to the class whose mean is nearest
(prototypes: Snell, Swersky and Zemel 2017, eq. 1 and 2; on frozen embeddings: Wang et al. 2019, "SimpleShot"), here by
cosine like the other probes. Not logistic regression: with one image of a class nothing is left to choose its strength
by, and the score would be that of the guess.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from adaptkit.embedding import Embeddings
from adaptkit.probes.knn import cosine_blocks
from adaptkit.probes.score import Score, labels_of, percent_score

SIZES = (1, 2, 5, 10, 20)  # labelled images of each class
DRAWS = 10


def probe_few_shot(gallery: Embeddings, queries: Embeddings) -> dict[str, Score]:
    """`few_shot_1` to `few_shot_20`, percent: mean over 10 draws of the gallery's images, the same for any backbone.

    `per_query` is the mean over draws. The images of a size are among those of the next. Sizes that some class of the
    gallery lacks are left out, see `size_note`.
    """
    labels, truth, _ = labels_of(gallery, queries)
    classes = labels.bincount().nonzero().flatten()
    dense = torch.searchsorted(classes, labels)  # 0 ... C - 1
    unit = F.normalize(gallery.vectors.float(), dim=1)
    sizes = [size for size in SIZES if size <= int(dense.bincount().min())]
    hits = {size: torch.zeros(len(truth), device=truth.device) for size in sizes}
    for draw in range(DRAWS):
        order, place = draw_images(dense.cpu(), draw)
        for size in sizes:
            chosen = order[place < size].to(dense.device)
            means = unit.new_zeros(len(classes), unit.shape[1]).index_add_(0, dense[chosen], unit[chosen])
            for rows, similarity in cosine_blocks(queries.vectors, means):
                hits[size][rows] += classes[similarity.argmax(dim=1)] == truth[rows]
    return {f"few_shot_{size}": percent_score(hits[size] / DRAWS) for size in sizes}


def draw_images(labels: Tensor, draw: int) -> tuple[Tensor, Tensor]:
    """(N,) labels -> (N,) images in random order, class by class, and (N,) the place of each in its class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(draw))
    order = order[labels[order].argsort(stable=True)]
    count = labels.bincount()
    first = count.cumsum(0) - count
    return order, torch.arange(len(labels)) - first[labels[order]]


def size_note(gallery: Embeddings) -> str | None:
    """Which sizes are left out, and why."""
    if gallery.labels is None:
        return None
    count = gallery.labels.bincount()
    least = int(count[count > 0].min())
    lacking = [f"few_shot_{size}" for size in SIZES if size > least]
    plural = "s" * (least > 1)
    return f"left out: {', '.join(lacking)} (a class has only {least} gallery image{plural})" if lacking else None
