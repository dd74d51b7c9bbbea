"""Evaluation of a frozen backbone: each probe is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable

from adaptkit.embedding import Embeddings
from adaptkit.probes.clustering import probe_clustering
from adaptkit.probes.drift import linear_cka, neighbour_overlap
from adaptkit.probes.few_shot import probe_few_shot
from adaptkit.probes.intervals import Interval, bootstrap, jackknife, paired_bootstrap, paired_jackknife
from adaptkit.probes.knn import probe_knn
from adaptkit.probes.lidar import lidar
from adaptkit.probes.linear import probe_linear
from adaptkit.probes.rank import alpha_req, d_eff, probe_alpha_req, probe_rank, r_eff, rankme
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
    "few-shot": probe_few_shot,  # few_shot_1 ... few_shot_20
    "clustering": probe_clustering,  # cluster_accuracy, nmi, ari
    "alpha-req": probe_alpha_req,  # alpha_req; needs no labels
}
DEFAULT_PROBES = ("knn", "linear", "retrieval", "rank")
SOURCE_PROBES = ("lidar", "drift")  # need more than the two sets of embeddings: the images themselves, another backbone
LABEL_FREE = ("rank", "alpha-req", *SOURCE_PROBES)

__all__ = [
    "DEFAULT_PROBES",
    "LABEL_FREE",
    "PROBES",
    "SOURCE_PROBES",
    "Interval",
    "Probe",
    "Score",
    "alpha_req",
    "bootstrap",
    "d_eff",
    "jackknife",
    "lidar",
    "linear_cka",
    "neighbour_overlap",
    "paired_bootstrap",
    "paired_jackknife",
    "r_eff",
    "rankme",
    "view_retrieval",
]
