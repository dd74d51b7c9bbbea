"""The figures of `codes.json`: what the code itself says, and how well it ranks images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adaptkit.language.attributes import Properties, best_properties
from adaptkit.language.images import Coded
from adaptkit.probes import Score, paired_bootstrap
from adaptkit.probes.codes import (
    DEAD_ENTROPY,
    Codes,
    bit_correlation,
    bit_entropy,
    block_entropies,
    correlation_summary,
    duplicate_bits,
    is_live,
)
from adaptkit.probes.hamming import bit_subsets, code_average_precision, code_neighbours, nearest_images, subset_sizes
from adaptkit.probes.retrieval import probe_retrieval
from adaptkit.probes.score import percent_score

NUM_NEIGHBOURS = 10


def measure_code(codes: Codes) -> dict[str, Any]:
    """Entropy, dead and live bits, duplicates, blocks and correlations of (N, B) codes; no labels."""
    entropy, correlation = bit_entropy(codes), bit_correlation(codes)
    return {
        "entropy": {
            "mean": float(entropy.mean()),
            "min": float(entropy.min()),
            "max": float(entropy.max()),
            "threshold": DEAD_ENTROPY,
            "dead": np.flatnonzero(entropy < DEAD_ENTROPY).tolist(),
        },
        "live_bits": int(is_live(codes).sum()),
        "duplicates": duplicate_bits(codes, correlation),
        "blocks": block_entropies(codes),
        "correlation": correlation_summary(correlation),
    }


def describe_bits(codes: Codes, families: Sequence[tuple[str, Properties]], seed: int) -> dict[str, Any]:
    """{properties: facts by family, bits: [{bit, ones, entropy, and by family the property it tells most about}]}.

    `codes` are the target's; the properties are known of other images, perhaps.
    """
    found = {name: best_properties(each, len(families), seed) for name, each in families}
    ones, entropy = codes.mean(axis=0), bit_entropy(codes)
    bits = [
        {"bit": bit, "ones": float(ones[bit]), "entropy": float(entropy[bit])}
        | {name: best[bit] for name, (_, best) in found.items()}
        for bit in range(codes.shape[1])
    ]
    return {"properties": {name: facts for name, (facts, _) in found.items()}, "bits": bits}


def measure_neighbours(target: Coded, seed: int) -> dict[str, Any]:
    """How many of an image's 10 nearest by embedding are among its 10 nearest by code; no labels, percent.

    {k, num_images, chance, codes: [...]}, see `_by_size`.
    """
    index = nearest_images(target.embeddings.vectors, NUM_NEIGHBOURS)
    scores = _by_size(target.bits.shape[1], seed, lambda bits: code_neighbours(target.bits[:, bits], index))
    count = len(target)
    return {
        "k": index.shape[1],
        "num_images": count,
        "chance": 100 * index.shape[1] / (count - 1),
        "codes": [_sized(*each) for each in scores],
    }


def measure_retrieval(gallery: Coded, queries: Coded, seed: int) -> dict[str, Any]:
    """`retrieval_map` by the embedding and by the code, percent, with the paired difference. Raises `DataError`.

    {num_gallery, num_queries, num_classes, embedding: {value, ci95}, codes: [... delta]}, see `_by_size`.
    """
    continuous = probe_retrieval(gallery.embeddings, queries.embeddings)["retrieval_map"]
    labels, truth = gallery.embeddings.labels, queries.embeddings.labels
    if labels is None or truth is None or continuous.per_query is None:
        raise ValueError("retrieval needs labels")
    answerable = torch.isin(truth, labels)
    asked = queries.bits[answerable]

    def precision(bits: Tensor) -> Tensor:
        return code_average_precision(asked[:, bits], gallery.bits[:, bits], truth[answerable], labels)

    found = []
    for size, subsets, score in _by_size(gallery.bits.shape[1], seed, precision):
        found.append(_sized(size, subsets, score) | {"delta": _delta(continuous, score)})
    return {
        "num_gallery": len(gallery),
        "num_queries": len(asked),
        "num_classes": len(set(labels.tolist())),
        "embedding": _score(continuous),
        "codes": found,
    }


def _by_size(num_bits: int, seed: int, measure: Callable[[Tensor], Tensor]) -> list[tuple[int, list[float], Score]]:
    """(bits, percent of each subset, score of their mean for each query) for all bits and fewer."""
    found = []
    for size in subset_sizes(num_bits):
        values = torch.stack([measure(bits).double() for bits in bit_subsets(num_bits, size, seed)])  # (subsets, Q)
        found.append((size, (100 * values.mean(1)).tolist(), percent_score(values.mean(0))))
    return found


def _sized(size: int, subsets: list[float], score: Score) -> dict[str, Any]:
    """{bits, value, ci95, subsets: the value of each}: the interval covers images, the list the choice of bits."""
    return {"bits": size} | _score(score) | {"subsets": subsets}


def _score(score: Score) -> dict[str, Any]:
    return {"value": score.value, "ci95": list(score.ci95) if score.ci95 else None}


def _delta(before: Score, after: Score) -> dict[str, Any] | None:
    """after - before, of the same queries; None for a single one."""
    if before.per_query is None or after.per_query is None or len(before.per_query) < 2:
        return None
    change = paired_bootstrap(before.per_query, after.per_query)
    return {"value": change.value, "ci95": [change.lo, change.hi]}
