"""Evaluation of a frozen backbone: each probe is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from adaptkit.embedding import Embeddings
from adaptkit.probes.drift import neighbour_overlap
from adaptkit.probes.intervals import Interval, bootstrap, jackknife, paired_bootstrap, paired_jackknife
from adaptkit.probes.knn import probe_knn
from adaptkit.probes.lidar import lidar
from adaptkit.probes.linear import probe_linear
from adaptkit.probes.rank import alpha_req, d_eff, probe_rank, r_eff, rankme
from adaptkit.probes.retrieval import probe_retrieval
from adaptkit.probes.score import Score
from adaptkit.probes.views import view_retrieval

Probe = Callable[[Embeddings, Embeddings], dict[str, Score]]
"""(gallery, queries) -> metric name: score."""

PROBES: dict[str, Probe] = {
    "knn": probe_knn,  # knn_top1
    "linear": probe_linear,  # linear_top1
    "retrieval": probe_retrieval,  # retrieval_map
    "rank": probe_rank,  # rankme, d_eff, r_eff; needs no labels
}

__all__ = [
    "PROBES",
    "Interval",
    "Probe",
    "Score",
    "alpha_req",
    "bootstrap",
    "d_eff",
    "jackknife",
    "lidar",
    "neighbour_overlap",
    "paired_bootstrap",
    "paired_jackknife",
    "r_eff",
    "rankme",
    "view_retrieval",
]
