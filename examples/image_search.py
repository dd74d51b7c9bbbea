"""Image search with continuous embeddings and with binary codes: how much smaller, and how much is found again?

adaptkit embed --backbone RUN --data ./images --codes --output images.parquet
python examples/image_search.py images.parquet

Needs `pip install pyarrow faiss-cpu`. Of up to 1,000 images, evenly spaced, it finds the ten nearest others. Recall
is how many of the nearest by vector are found, with a 95 % bootstrap interval over the queries; with class folders it
also says how many are of the query's class. Queries/s are of one thread that gets all queries in one batch.
"""

from __future__ import annotations

import sys
import time

import faiss
import numpy as np
import pyarrow.parquet as pq

NEAREST = 10
MAX_QUERIES = 1_000
RESAMPLES = 2_000
RERANKED = 10  # times as many are fetched by code when the vectors then decide


def main(file: str) -> None:
    table = pq.read_table(file)
    vectors = np.stack(table["vector"].to_numpy())  # (N, D) float32
    codes = np.stack([np.frombuffer(code, np.uint8) for code in table["code"].to_pylist()])  # (N, B / 8)
    labels = np.array(table["label"].to_pylist()) if "label" in table.column_names else None
    faiss.normalize_L2(vectors)  # inner product is then cosine similarity

    continuous = faiss.IndexFlatIP(vectors.shape[1])
    continuous.add(vectors)
    binary = faiss.IndexBinaryFlat(8 * codes.shape[1])
    binary.add(codes)
    directions = np.random.default_rng(0).standard_normal((vectors.shape[1], 8 * codes.shape[1]))
    signs = np.packbits(vectors @ directions > 0, axis=1)  # what codes must beat: nothing was learnt for these
    unlearnt = faiss.IndexBinaryFlat(8 * codes.shape[1])
    unlearnt.add(signs)

    queries = np.arange(0, len(vectors), -(-len(vectors) // MAX_QUERIES))
    faiss.omp_set_num_threads(1)

    def by_vector() -> np.ndarray:
        return others(continuous.search(vectors[queries], NEAREST + 1)[1], queries, NEAREST)

    def by_code(count: int = NEAREST) -> np.ndarray:
        return others(binary.search(codes[queries], count + 1)[1], queries, count)

    def by_both() -> np.ndarray:
        fetched = by_code(RERANKED * NEAREST)
        similarity = np.einsum("qd,qkd->qk", vectors[queries], vectors[fetched])
        return np.take_along_axis(fetched, np.argsort(-similarity, axis=1)[:, :NEAREST], axis=1)

    def by_signs() -> np.ndarray:
        return others(unlearnt.search(signs[queries], NEAREST + 1)[1], queries, NEAREST)

    print(f"{len(vectors):,} images, {len(queries):,} queries, the nearest {NEAREST}")
    exact = by_vector()
    rows = (
        ("vectors, float32", vectors.shape[1] * 4, by_vector),
        (f"codes, {8 * codes.shape[1]} bits", codes.shape[1], by_code),
        ("codes, then vectors", codes.shape[1], by_both),  # the vectors may stay on the disk
        ("random signs", codes.shape[1], by_signs),
    )
    for name, size, search in rows:
        started = time.perf_counter()
        found = search()
        rate = len(queries) / (time.perf_counter() - started)
        shares = [len(set(one) & set(other)) / NEAREST for one, other in zip(found, exact, strict=True)]
        same = "" if labels is None else f", {100 * np.mean(labels[found] == labels[queries, None]):.1f} % of its class"
        print(f"{name:20} {size:5} bytes an image, {rate:7,.0f} queries/s, recall {interval(np.array(shares))}{same}")


def others(found: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """(Q, count): what was found, without the query itself."""
    kept = [[row for row in rows if row != query][:count] for rows, query in zip(found, queries, strict=True)]
    return np.array(kept)


def interval(shares: np.ndarray) -> str:
    """The mean of (Q,) shares in percent, with the interval that drawing the queries again gives."""
    drawn = np.random.default_rng(0).integers(0, len(shares), (RESAMPLES, len(shares)))
    low, high = np.percentile(shares[drawn].mean(axis=1), [2.5, 97.5])
    return f"{100 * shares.mean():5.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    main(*sys.argv[1:])
