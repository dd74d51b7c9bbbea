"""The best one-to-one assignment of rows to columns, exactly. scipy, which has one too, is no core dependency."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def assign(cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """(R, C) costs, R <= C -> (R,) the column of each row, no column twice, with the least sum of costs.

    The Hungarian method (Kuhn 1955) by shortest augmenting paths (Jonker and Volgenant 1987): the rows join one by one,
    and each takes the cheapest way to a free column, on which other rows may have to move. O(R^2 C).
    """
    num_rows, num_columns = cost.shape
    if num_rows > num_columns:
        raise ValueError(f"each row needs a column of its own, got {num_rows} rows and {num_columns} columns")
    row_price, column_price = np.zeros(num_rows), np.zeros(num_columns)
    row_of, column_of = np.full(num_columns, -1), np.full(num_rows, -1)
    for row in range(num_rows):
        free, distance, parent, seen = _cheapest_way(row, cost, row_price, column_price, row_of)
        # prices under which the way costs nothing and no other becomes cheaper
        row_price[row] += distance[free]
        inner = np.array([column for column in seen if column != free], dtype=np.int64)
        row_price[row_of[inner]] += distance[free] - distance[inner]
        column_price[inner] -= distance[free] - distance[inner]
        column = free
        while column >= 0:  # each row of the way moves on by one column
            mover = parent[column]
            row_of[column], column_of[mover], column = mover, column, column_of[mover]
    return column_of


def _cheapest_way(
    row: int,
    cost: NDArray[np.float64],
    row_price: NDArray[np.float64],
    column_price: NDArray[np.float64],
    row_of: NDArray[np.int64],
) -> tuple[int, NDArray[np.float64], NDArray[np.int64], list[int]]:
    """Dijkstra from `row` to a free column -> it, (C,) distances, (C,) the row before each column, columns seen."""
    distance, parent = np.full(len(row_of), np.inf), np.full(len(row_of), -1)
    is_open, seen, reached = np.ones(len(row_of), dtype=bool), [], 0.0
    while True:
        through = reached + cost[row] - row_price[row] - column_price
        closer = is_open & (through < distance)
        distance[closer], parent[closer] = through[closer], row
        column = int(np.where(is_open, distance, np.inf).argmin())
        reached, is_open[column] = distance[column], False
        seen.append(column)
        row = int(row_of[column])
        if row < 0:
            return column, distance, parent, seen
