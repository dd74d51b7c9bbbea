"""Clustering and its measures against scikit-learn and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from adaptkit.embedding import Embeddings
from adaptkit.probes.assignment import assign
from adaptkit.probes.clustering import ari, assign_nearest, contingency, k_means, lloyd, nmi, probe_clustering


def draw(count: int, seed: int, spread: float, classes: int = 5, dim: int = 8) -> Embeddings:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    centres = np.random.default_rng(0).normal(0, 1, (classes, dim))
    vectors = torch.from_numpy(centres[labels] + rng.normal(0, spread, (count, dim))).float()
    return Embeddings(vectors, torch.from_numpy(labels), tuple(map(str, range(classes))), tuple(map(str, range(count))))


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (7, 7), (5, 9), (40, 40)])
def test_assignment_costs_as_little_as_scipys(shape: tuple[int, int]) -> None:
    for seed in range(8):
        rng = np.random.default_rng(seed)
        cost = (
            rng.normal(0, 1, shape) if seed % 2 else -rng.integers(0, 4, shape).astype(float)
        )  # the latter full of ties
        found = assign(cost)
        assert len(set(found.tolist())) == shape[0]
        rows, columns = linear_sum_assignment(cost)
        assert cost[np.arange(shape[0]), found].sum() == pytest.approx(cost[rows, columns].sum())
    with pytest.raises(ValueError, match="2 rows and 1 columns"):
        assign(np.zeros((2, 1)))


@pytest.mark.parametrize("count", [1, 2, 30, 500])
def test_nmi_and_ari_against_scikit_learn(count: int) -> None:
    rng = np.random.default_rng(count)
    truth = rng.integers(0, 6, count)
    found = np.where(rng.random(count) < 0.6, (truth + 2) % 6, rng.integers(0, 6, count))
    table = contingency(torch.from_numpy(found), torch.from_numpy(truth), 6)
    assert nmi(table) == pytest.approx(normalized_mutual_info_score(truth, found), abs=1e-9)
    assert ari(table) == pytest.approx(adjusted_rand_score(truth, found), abs=1e-9)


def test_k_means_is_as_good_as_scikit_learns() -> None:
    vectors = draw(300, 1, spread=0.8).vectors
    oracle = KMeans(5, n_init=10, random_state=0).fit(vectors.numpy())
    clusters = k_means(vectors, 5)
    error = sum(float((vectors[clusters == c] - vectors[clusters == c].mean(dim=0)).square().sum()) for c in range(5))
    assert error <= 1.005 * oracle.inertia_


def test_nearest_centres_against_a_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaptkit.probes.clustering.DISTANCES_AT_ONCE", 21)
    vectors, centres = draw(40, 2, 1.0).vectors, draw(3, 3, 1.0).vectors
    clusters, distances = assign_nearest(vectors, centres)
    for vector, cluster, distance in zip(vectors, clusters.tolist(), distances.tolist(), strict=True):
        each = [float(((vector - centre) ** 2).sum()) for centre in centres]
        assert cluster == int(np.argmin(each))
        assert distance == pytest.approx(min(each), abs=1e-4)


def test_a_centre_without_images_moves_to_where_it_is_needed() -> None:
    vectors = torch.tensor([[0.0], [0.1], [5.0], [5.1]])
    clusters, error = lloyd(vectors, torch.tensor([[2.0], [99.0]]))
    assert error == pytest.approx(0.01, abs=1e-5)
    assert clusters[0] == clusters[1] != clusters[2] == clusters[3]
    assert set(k_means(torch.ones(6, 2), 3).tolist()) <= {0, 1, 2}, "fewer different images than clusters"


def test_probe_scores_the_queries_with_intervals() -> None:
    easy, hard = draw(200, 4, spread=0.05), draw(200, 5, spread=1.0)
    perfect = probe_clustering(hard, easy)
    assert [perfect[name].value for name in ("cluster_accuracy", "nmi", "ari")] == pytest.approx([100, 1, 1])
    scores = probe_clustering(easy, hard)
    assert hard.labels is not None
    unit = torch.nn.functional.normalize(hard.vectors, dim=1)
    found = k_means(unit, 5).numpy()
    table = contingency(torch.from_numpy(found), hard.labels, 5).numpy()
    rows, columns = linear_sum_assignment(-table)
    assert scores["cluster_accuracy"].value == pytest.approx(100 * table[rows, columns].sum() / 200)
    assert scores["nmi"].value == pytest.approx(normalized_mutual_info_score(hard.labels, found))
    for score in scores.values():
        assert score.ci95 is not None
        assert score.ci95[0] < score.value < score.ci95[1]
        assert math.isfinite(score.ci95[0])


def test_intervals_hold_their_value_with_many_small_classes() -> None:
    """Drawing images with repetition would push mutual information up, and the interval off its value."""
    scores = probe_clustering(draw(9, 0, 1.0, classes=60), draw(240, 6, spread=1.0, classes=60))
    for name in ("nmi", "ari"):
        interval = scores[name].ci95
        assert interval is not None
        assert interval[0] < scores[name].value < interval[1]
