"""Every probe against a slow twin written from its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from adaptkit.embedding import Embeddings
from adaptkit.errors import BackboneError, DataError
from adaptkit.probes import DEFAULT_PROBES, LABEL_FREE, PROBES, d_eff, neighbour_overlap, r_eff, rankme, view_retrieval
from adaptkit.probes.knn import probe_knn
from adaptkit.probes.linear import choose_strength, fit, objective, predict, probe_linear, stratified_mask
from adaptkit.probes.rank import probe_rank
from adaptkit.probes.retrieval import average_precision, best_first, probe_retrieval

CLASSES = ("a", "b", "c", "d")


def embeddings(vectors: Tensor, labels: Tensor | None, names: tuple[str, ...] | None = CLASSES) -> Embeddings:
    return Embeddings(vectors, labels, names, tuple(str(i) for i in range(len(vectors))))


def clusters(count: int, seed: int, dim: int = 12, noise: float = 1.5) -> Embeddings:
    """Four overlapping clusters with correlated, badly scaled dimensions and an offset."""
    rng = np.random.default_rng(seed)
    centres, mix = np.random.default_rng(0).normal(0, 1, (4, dim)), np.random.default_rng(1).normal(0, 1, (dim, dim))
    labels = rng.integers(0, 4, count)
    vectors = (centres[labels] + rng.normal(0, noise, (count, dim))) @ mix * np.geomspace(0.01, 10, dim) + 3
    return embeddings(torch.from_numpy(vectors).float(), torch.from_numpy(labels))


@pytest.fixture(scope="module")
def gallery() -> Embeddings:
    return clusters(150, seed=2)


@pytest.fixture(scope="module")
def queries() -> Embeddings:
    return clusters(70, seed=3)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many blocks":
        monkeypatch.setattr("adaptkit.probes.knn.SIMILARITIES_AT_ONCE", 150 * 8)


def cosine(a: Tensor, b: Tensor) -> float:
    x, y = a.double().numpy(), b.double().numpy()
    return float(x @ y / math.sqrt(x @ x) / math.sqrt(y @ y))


def labels_of(data: Embeddings) -> list[int]:
    assert data.labels is not None
    return [int(label) for label in data.labels]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("k", [1, 5, 20, 1000])
def test_knn_against_a_double_loop(gallery: Embeddings, queries: Embeddings, k: int) -> None:
    hits = []
    for vector, truth in zip(queries.vectors, labels_of(queries), strict=True):
        ranked = [(cosine(vector, v), y) for v, y in zip(gallery.vectors, labels_of(gallery), strict=True)]
        votes = dict.fromkeys(range(4), 0.0)
        for similarity, label in sorted(ranked, reverse=True)[:k]:
            votes[label] += math.exp(similarity / 0.07)
        hits.append(100.0 * (max(votes, key=lambda label: votes[label]) == truth))
    score = probe_knn(gallery, queries, k=k)["knn_top1"]
    assert score.per_query is not None
    assert score.per_query.tolist() == hits
    assert score.value == pytest.approx(sum(hits) / len(hits))
    assert score.ci95 is not None
    assert score.ci95[0] < score.value < score.ci95[1]


@pytest.mark.usefixtures("blocks")
def test_retrieval_against_a_double_loop(gallery: Embeddings, queries: Embeddings) -> None:
    expected = []
    for vector, truth in zip(queries.vectors, labels_of(queries), strict=True):
        ranked = [(cosine(vector, v), y) for v, y in zip(gallery.vectors, labels_of(gallery), strict=True)]
        found, precisions = 0, []
        for rank, (_, label) in enumerate(sorted(ranked, reverse=True), start=1):
            if label == truth:
                found += 1
                precisions.append(found / rank)
        expected.append(100 * sum(precisions) / len(precisions))
    score = probe_retrieval(gallery, queries)["retrieval_map"]
    assert score.per_query is not None
    assert score.per_query.tolist() == pytest.approx(expected, rel=1e-5)
    assert score.value == pytest.approx(sum(expected) / len(expected), rel=1e-6)


def test_best_first_is_a_stable_sort_of_the_similarities() -> None:
    generator = torch.Generator().manual_seed(3)
    similarity = torch.randn(50, 400, generator=generator).mul(4).round() / 4  # many ties, of both signs
    similarity[:, ::7] *= -0.0
    similarity[:, 1::7] *= 1e-38
    relevant = torch.rand(50, 400, generator=generator) < 0.3
    order = similarity.argsort(dim=1, descending=True, stable=True)
    assert torch.equal(best_first(similarity, relevant), relevant.gather(1, order))


def test_average_precision_by_hand() -> None:
    relevant = torch.tensor([[True, False, True], [False, True, False], [True, True, True]])
    assert average_precision(relevant).tolist() == pytest.approx([(1 + 2 / 3) / 2, 1 / 2, 1])


def test_retrieval_leaves_out_queries_without_a_relevant_image() -> None:
    vectors = torch.eye(4)
    some = embeddings(vectors[:2], torch.tensor([0, 1]))
    score = probe_retrieval(some, embeddings(vectors[:3], torch.tensor([0, 1, 2])))["retrieval_map"]
    assert score.per_query is not None
    assert score.per_query.tolist() == [100, 100]
    with pytest.raises(DataError, match="no query has an image of its class"):
        probe_retrieval(some, embeddings(vectors[2:], torch.tensor([2, 3])))


def test_equal_similarities_do_not_rank_by_class() -> None:
    """A collapsed backbone must score like chance for every class, whatever the order of the folders."""
    labels = torch.arange(4).repeat_interleave(1000)
    score = probe_retrieval(embeddings(torch.ones(4000, 3), labels), embeddings(torch.ones(4, 3), torch.arange(4)))
    assert score["retrieval_map"].per_query is not None
    assert score["retrieval_map"].per_query.tolist() == pytest.approx([25] * 4, abs=3)


@pytest.mark.parametrize("strength", [1.0, 1e-2, 1e-4, 1e-5])
def test_linear_against_scikit_learn(strength: float) -> None:
    train, test = clusters(800, seed=4, dim=24), clusters(2000, seed=5, dim=24)
    mean, std = train.vectors.mean(dim=0), train.vectors.std(dim=0, correction=0)
    inputs, held_out = (train.vectors - mean) / std, (test.vectors - mean) / std
    assert train.labels is not None
    assert test.labels is not None
    weight = fit(inputs, train.labels, 4, strength)
    oracle = LogisticRegression(C=1 / (strength * 800), max_iter=10_000, tol=1e-8)
    oracle.fit(inputs.double().numpy(), train.labels.numpy())
    best = torch.cat([torch.from_numpy(oracle.coef_.T), torch.from_numpy(oracle.intercept_)[None]])
    optimum = float(objective(inputs.double(), train.labels, best, strength))
    assert float(objective(inputs, train.labels, weight, strength)) == pytest.approx(optimum, abs=1e-3)
    ours = float((predict(held_out, weight).argmax(dim=1) == test.labels).float().mean())
    assert 100 * ours == pytest.approx(100 * oracle.score(held_out.numpy(), test.labels.numpy()), abs=0.5)


def test_rare_classes_are_fitted_as_well_as_frequent_ones() -> None:
    """40 classes of 1 to 50 images: accuracy and loss on new images are those of the converged solution."""
    generator = torch.Generator().manual_seed(6)
    centres = torch.randn(40, 32, generator=generator)
    labels = torch.cat([torch.full((1 + 5 * (c % 11),), c) for c in range(40)])
    inputs = centres[labels] + torch.randn(len(labels), 32, generator=generator)
    held_out = centres[labels] + torch.randn(len(labels), 32, generator=generator)
    for strength in (1e-1, 1e-2, 1e-3):
        exact = fit(inputs.double(), labels, 40, strength, start=fit(inputs.double(), labels, 40, strength))
        ours = fit(inputs, labels, 40, strength)
        loss, best = (float(objective(inputs.double(), labels, w.double(), strength)) for w in (ours, exact))
        assert loss == pytest.approx(best, abs=1e-4)
        found, expected = ((predict(held_out, w.float()).argmax(1) == labels).float().mean() for w in (ours, exact))
        assert float(found) == pytest.approx(float(expected), abs=1e-3)


def test_fit_starts_where_it_is_told_and_ends_at_the_same_minimum(gallery: Embeddings) -> None:
    assert gallery.labels is not None
    inputs = (gallery.vectors - gallery.vectors.mean(dim=0)) / gallery.vectors.std(dim=0)
    cold = fit(inputs, gallery.labels, 4, 1e-2)
    warm = fit(inputs, gallery.labels, 4, 1e-2, start=fit(inputs, gallery.labels, 4, 1.0))
    torch.testing.assert_close(cold, warm, atol=5e-3, rtol=5e-3)


def test_linear_ignores_scale_offset_and_constant_dimensions(gallery: Embeddings, queries: Embeddings) -> None:
    def stretched(data: Embeddings) -> Embeddings:
        return embeddings(torch.cat([100 * data.vectors - 7, torch.full((len(data.vectors), 1), 0.1)], 1), data.labels)

    plain = probe_linear(gallery, queries)["linear_top1"].value
    assert plain > 60
    assert probe_linear(stretched(gallery), stretched(queries))["linear_top1"].value == pytest.approx(plain, abs=1.5)


def test_strength_is_chosen_by_held_out_accuracy() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    noise = torch.randn(60, 200, generator=rng)
    noise[:, 0] += 1.5 * (2 * labels - 1)  # one useful dimension among 200: weak regularisation overfits
    strength, start = choose_strength(noise, labels, 2)
    assert strength >= 1e-2
    assert start is not None
    strength, start = choose_strength(torch.eye(2), torch.arange(2), 2)  # one image per class
    assert 1e-5 <= strength <= 1
    assert start is None


def test_linear_works_where_gradients_are_off(gallery: Embeddings, queries: Embeddings) -> None:
    expected = probe_linear(gallery, queries)["linear_top1"].value
    with torch.no_grad():
        assert probe_linear(gallery, queries)["linear_top1"].value == expected


def test_stratified_mask_takes_its_share_of_every_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [4])
    mask = stratified_mask(labels, 0.2)
    assert [int(mask[labels == label].sum()) for label in (0, 1, 2, 4)] == [10, 2, 1, 0]
    assert torch.equal(mask, stratified_mask(labels, 0.2))


@pytest.mark.parametrize("count", [300, 20])  # more and fewer images than dimensions
def test_rank_measures_against_numpy(count: int) -> None:
    vectors = np.random.default_rng(7).normal(0, 1, (count, 32)) * np.geomspace(1e-3, 2, 32) + 5
    given = torch.from_numpy(vectors)
    singular = np.linalg.svd(vectors - vectors.mean(axis=0), compute_uv=False)
    p = singular / singular.sum() + 1e-7
    assert rankme(given) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-5)
    eigenvalues = np.linalg.eigvalsh(np.cov(vectors.T)).clip(1e-15)
    assert d_eff(given) == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-6)
    share = eigenvalues / eigenvalues.sum()
    assert r_eff(given) == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)


def test_rank_of_an_isotropic_cloud_is_its_dimension_and_of_a_collapsed_one_is_one() -> None:
    cube = torch.cat([torch.eye(8), -torch.eye(8)])
    for measure in (rankme, d_eff, r_eff):
        assert measure(cube) == pytest.approx(8, rel=1e-4)
        assert measure(torch.full((16, 8), 0.3) + 1e-8 * torch.randn(16, 8)) == 1
        line = torch.arange(10.0)[:, None] * torch.ones(1, 8)
        assert measure(line) == pytest.approx(1, abs=1e-3)


def test_rank_probe_scores_the_gallery(gallery: Embeddings, queries: Embeddings) -> None:
    unlabelled = embeddings(gallery.vectors, None, None)
    scores = probe_rank(unlabelled, queries)
    assert scores["rankme"].value == rankme(gallery.vectors)
    assert scores["d_eff"].value == d_eff(gallery.vectors)
    assert scores["r_eff"].value == r_eff(gallery.vectors)
    for score in scores.values():
        assert score.per_query is None
        assert score.ci95 is not None
        assert score.ci95[0] < score.value < score.ci95[1]
    assert probe_rank(embeddings(gallery.vectors[:3], None), queries)["rankme"].ci95 is None


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("k", [1, 10, 500])
def test_neighbour_overlap_against_a_double_loop(gallery: Embeddings, k: int) -> None:
    original = gallery.vectors[:60]
    adapted = original + 2 * torch.randn(original.shape, generator=torch.Generator().manual_seed(0))
    expected = []
    for i in range(60):
        kept = []
        for vectors in (original, adapted):
            ranked = sorted(((cosine(vectors[i], vectors[j]), j) for j in range(60) if j != i), reverse=True)
            kept.append({j for _, j in ranked[:k]})
        expected.append(len(kept[0] & kept[1]) / min(k, 59))
    assert neighbour_overlap(original, adapted, k).tolist() == pytest.approx(expected)
    assert neighbour_overlap(original, 3 * original, k).min() == 1


@pytest.mark.usefixtures("blocks")
def test_view_retrieval_against_a_double_loop(gallery: Embeddings) -> None:
    view_a = gallery.vectors
    view_b = view_a + 6 * torch.randn(view_a.shape, generator=torch.Generator().manual_seed(0))
    expected = [
        float(max(range(150), key=lambda j, i=i: cosine(view_b[i], view_a[j])) == i)  # type: ignore[misc]
        for i in range(150)
    ]
    assert 0 < sum(expected) < 150
    assert view_retrieval(view_a, view_b).tolist() == expected
    assert view_retrieval(view_a, view_a).mean() == 1


def test_measures_of_images_need_two_of_the_same() -> None:
    one, two, three = torch.ones(1, 2), torch.ones(2, 2), torch.ones(3, 2)
    for function in (neighbour_overlap, view_retrieval):
        with pytest.raises(DataError, match="at least 2"):
            function(one, one)
        with pytest.raises(ValueError, match="same images"):
            function(two, three)


def test_every_probe_refuses_what_it_cannot_score(gallery: Embeddings, queries: Embeddings) -> None:
    damaged = embeddings(queries.vectors.clone(), queries.labels)
    damaged.vectors[3, 2] = math.nan
    for name, probe in PROBES.items():
        with pytest.raises(BackboneError, match="NaN or infinity"):
            probe(damaged, damaged)
        empty = embeddings(torch.ones(0, 12), torch.ones(0, dtype=torch.int64))
        with pytest.raises(DataError, match="no image"):
            probe(empty, empty)
        if name in LABEL_FREE:
            continue
        with pytest.raises(DataError, match="needs labels"):
            probe(gallery, embeddings(queries.vectors, None))
        with pytest.raises(DataError, match="different classes"):
            probe(gallery, embeddings(queries.vectors, queries.labels, ("a", "b", "d", "c")))


def test_metric_names(gallery: Embeddings, queries: Embeddings) -> None:
    names = {name: set(probe(gallery, queries)) for name, probe in PROBES.items()}
    assert set().union(*(names[name] for name in DEFAULT_PROBES)) == {
        *("knn_top1", "linear_top1", "retrieval_map"),
        *("rankme", "d_eff", "r_eff"),
    }
    assert names["few-shot"] == {f"few_shot_{size}" for size in (1, 2, 5, 10, 20)}
    assert names["clustering"] == {"cluster_accuracy", "nmi", "ari"}
    assert names["alpha-req"] == {"alpha_req"}


def test_a_single_query_has_a_score_but_no_interval(gallery: Embeddings, queries: Embeddings) -> None:
    assert queries.labels is not None
    one = embeddings(queries.vectors[:1], queries.labels[:1])
    for name, probe in PROBES.items():
        if name not in LABEL_FREE:  # they score the gallery
            assert all(score.ci95 is None for score in probe(gallery, one).values())
