"""Ranking images by the Hamming distance of their codes: average precision and neighbours, ties counted exactly.

A code of B bits has only B + 1 distances, so ties are the rule. Every score here is its expectation over all orders of
equally distant images, which no order of files can change.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from adaptkit.probes.knn import SIMILARITIES_AT_ONCE, nearest

NUM_SUBSETS = 5
SIZES = (256, 128, 64, 32)  # of the paper's table


def hamming_blocks(queries: Tensor, gallery: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(Q, B), (N, B) bool -> (query rows, their distances (b, N) int64), never the whole Q x N matrix at once."""
    signs = gallery.float() * 2 - 1
    size = max(1, SIMILARITIES_AT_ONCE // len(gallery))
    for start in range(0, len(queries), size):
        rows = slice(start, min(start + size, len(queries)))
        agreement = (queries[rows].float() * 2 - 1) @ signs.T  # exact: sums of B ones
        yield rows, (gallery.shape[1] - agreement).long() // 2


def code_average_precision(queries: Tensor, gallery: Tensor, truth: Tensor, labels: Tensor) -> Tensor:
    """(Q, B), (N, B) bool, (Q,), (N,) -> (Q,) float64 expected average precision; every query needs an answer.

    The expectation is over random orders of ties (McSherry and Najork 2008, section 3).
    """
    levels = gallery.shape[1] + 1
    harmonic = torch.cat([torch.zeros(1), torch.arange(1, len(gallery) + 1)]).double()
    harmonic[1:] = harmonic[1:].reciprocal().cumsum(0)
    parts = []
    for rows, distance in hamming_blocks(queries, gallery):
        places = distance + levels * torch.arange(len(distance))[:, None]
        relevant = labels == truth[rows, None]
        total = len(distance) * levels
        size = torch.bincount(places.flatten(), minlength=total).view(-1, levels)
        hits = torch.bincount(places[relevant], minlength=total).view(-1, levels)
        parts.append(_expected_precision(size, hits, harmonic))
    return torch.cat(parts)


def _expected_precision(size: Tensor, hits: Tensor, harmonic: Tensor) -> Tensor:
    """(b, L) images and relevant images at each distance, (N + 1,) harmonic numbers -> (b,) expected AP.

    At place i of a group of n with r relevant ones, after t images with R relevant ones, an image is relevant with
    probability r / n, and then R + 1 + (i - 1)(r - 1) / (n - 1) of the first t + i are on average. Summed over i,
    1 / (t + i) gives h = H(t + n) - H(t), and (i - 1) / (t + i) gives n - (t + 1) h.
    """
    before, found = size.cumsum(1) - size, (hits.cumsum(1) - hits).double()
    h = harmonic[before + size] - harmonic[before]
    n, r = size.double(), hits.double()
    slope = torch.where(size > 1, (r - 1) / (n - 1).clamp_min(1), 0)
    group = r / n.clamp_min(1) * ((found + 1) * h + slope * (n - (before + 1) * h))
    return group.sum(1) / r.sum(1)


def nearest_images(vectors: Tensor, k: int) -> Tensor:
    """(N, D) -> (N, k) the k nearest other images by cosine; k is cut to what there is."""
    return torch.cat([index for _, _, index in nearest(vectors, vectors, k, exclude_self=True)])


def code_neighbours(codes: Tensor, index: Tensor) -> Tensor:
    """(N, B) bool, (N, k) of `nearest_images` -> (N,) float32 expected share of these among the k nearest by code.

    An image is not its own neighbour. Of the images at the distance where the k are full, each is among them with the
    same probability.
    """
    k, parts = index.shape[1], []
    for rows, distance in hamming_blocks(codes, codes):
        here = torch.arange(len(distance))
        distance[here, here + rows.start] = codes.shape[1] + 1
        last = distance.kthvalue(k, dim=1, keepdim=True).values
        closer, tied = (distance < last).sum(1, keepdim=True), (distance == last).sum(1, keepdim=True)
        there = distance.gather(1, index[rows])
        share = torch.where(there < last, 1.0, torch.where(there == last, (k - closer) / tied, 0.0))
        parts.append(share.mean(1))
    return torch.cat(parts)


def bit_subsets(num_bits: int, size: int, seed: int) -> list[Tensor]:
    """Five random subsets of `size` bits, sorted, by the seed; all bits once where there are no more."""
    if size >= num_bits:
        return [torch.arange(num_bits)]
    rng = np.random.default_rng([seed, size])
    return [torch.from_numpy(np.sort(rng.choice(num_bits, size, replace=False))) for _ in range(NUM_SUBSETS)]


def subset_sizes(num_bits: int) -> list[int]:
    """All bits, then those of 256, 128, 64 and 32 that are fewer."""
    return [num_bits, *(size for size in SIZES if size < num_bits)]
