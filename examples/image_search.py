"""Image search with continuous embeddings and with binary codes: how much smaller, and how much is found again?

adaptkit embed --backbone RUN --data ./images --codes --output images.parquet
python examples/image_search.py images.parquet

Needs `pip install pyarrow faiss-cpu`. Of every 50th image it looks for the nearest ten others; with class folders it
also says how many of those are of its class.
"""

from __future__ import annotations

import sys

import faiss
import numpy as np
import pyarrow.parquet as pq

NEAREST = 10
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

    queries = np.arange(0, len(vectors), 50)
    exact = others(continuous.search(vectors[queries], NEAREST + 1)[1], queries, NEAREST)
    by_code = others(binary.search(codes[queries], NEAREST + 1)[1], queries, NEAREST)
    fetched = others(binary.search(codes[queries], RERANKED * NEAREST + 1)[1], queries, RERANKED * NEAREST)
    similarity = np.einsum("qd,qkd->qk", vectors[queries], vectors[fetched])
    reranked = np.take_along_axis(fetched, np.argsort(-similarity, axis=1)[:, :NEAREST], axis=1)

    print(f"{len(vectors):,} images, {len(queries):,} queries, the nearest {NEAREST}")
    rows = (
        ("vectors, float32", vectors.shape[1] * 4, exact),
        (f"codes, {8 * codes.shape[1]} bits", codes.shape[1], by_code),
        ("codes, then vectors", codes.shape[1], reranked),  # the vectors may stay on the disk
    )
    for name, size, found in rows:
        recall = np.mean([len(set(one) & set(other)) / NEAREST for one, other in zip(found, exact, strict=True)])
        same = "" if labels is None else f", {100 * np.mean(labels[found] == labels[queries, None]):.1f} % of its class"
        print(f"{name:20} {size:5} bytes an image, recall {100 * recall:5.1f} %{same}")


def others(found: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """(Q, count): what was found, without the query itself."""
    kept = [[row for row in rows if row != query][:count] for rows, query in zip(found, queries, strict=True)]
    return np.array(kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
