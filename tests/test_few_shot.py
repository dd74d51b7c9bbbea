"""Few-shot classification against a slow version, and what it does with small classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaptkit.embedding import Embeddings
from adaptkit.probes.few_shot import DRAWS, draw_images, probe_few_shot, size_note

CLASSES = ("a", "b", "c", "never seen")


def draw(count: int, seed: int, dim: int = 6) -> Embeddings:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    vectors = np.random.default_rng(0).normal(0, 1, (3, dim))[labels] + rng.normal(0, 1.2, (count, dim)) + 1
    paths = tuple(map(str, range(count)))
    return Embeddings(torch.from_numpy(vectors).float(), torch.from_numpy(labels), CLASSES, paths)


def slow_hits(gallery: Embeddings, queries: Embeddings, size: int, draw: int) -> list[bool]:
    assert gallery.labels is not None
    assert queries.labels is not None
    order, place = draw_images(gallery.labels, draw)
    means = []
    for label in range(3):
        few = [
            i for i, p in zip(order.tolist(), place.tolist(), strict=True) if p < size and gallery.labels[i] == label
        ]
        assert len(few) == size
        vectors = gallery.vectors[few].double().numpy()
        means.append((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(axis=0))
    hits = []
    for vector, truth in zip(queries.vectors.double().numpy(), queries.labels.tolist(), strict=True):
        cosines = [vector @ mean / np.linalg.norm(vector) / np.linalg.norm(mean) for mean in means]
        hits.append(int(np.argmax(cosines)) == truth)
    return hits


def test_few_shot_against_a_slow_version() -> None:
    gallery, queries = draw(63, 1), draw(40, 2)
    scores = probe_few_shot(gallery, queries)
    assert list(scores) == [f"few_shot_{size}" for size in (1, 2, 5, 10, 20)]
    for size in (1, 5, 20):
        expected = 100 * np.mean([slow_hits(gallery, queries, size, draw) for draw in range(DRAWS)], axis=0)
        score = scores[f"few_shot_{size}"]
        assert score.per_query is not None
        assert score.per_query.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        assert score.value == pytest.approx(expected.mean(), abs=1e-4)
    assert scores["few_shot_20"].value > scores["few_shot_1"].value + 5


def test_draws_are_of_each_class_and_differ() -> None:
    labels = torch.tensor([0, 1, 1, 3, 3, 3, 0, 1])
    for seed in range(5):
        order, place = draw_images(labels, seed)
        assert sorted(order.tolist()) == list(range(8))
        for label in (0, 1, 3):
            assert place[labels[order] == label].tolist() == list(range(int((labels == label).sum())))
    many = torch.zeros(50, dtype=torch.int64)
    assert not torch.equal(draw_images(many, 0)[0], draw_images(many, 1)[0])


def test_sizes_that_a_class_lacks_are_left_out_and_named() -> None:
    gallery = draw(17, 3)  # 6, 6 and 5 images
    assert list(probe_few_shot(gallery, draw(9, 4))) == ["few_shot_1", "few_shot_2", "few_shot_5"]
    assert size_note(gallery) == "left out: few_shot_10, few_shot_20 (a class has only 5 gallery images)"
    assert size_note(draw(60, 3)) is None
