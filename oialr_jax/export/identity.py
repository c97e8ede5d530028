"""Columns of a matrix that the others are made of: a strong rank-revealing QR."""

import numpy as np
import scipy.linalg
from jaxtyping import Float, Int

BOUND = 2.0
"""No entry of Z is larger, so that nothing is lost to cancellation in C [I Z]."""


def chosen_columns(
    right: Float[np.ndarray, "r n"], bound: float = BOUND
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "r k"]]:
    """Host side: an order of the columns, and Z: the first r times Z are the others.

    A pivoted QR picks r columns; then, as long as an entry of Z is larger than the
    bound, its column takes the place of its row's, which makes the volume of the
    columns greater by that entry. The rows have to be independent, as those of an
    orthonormal basis are; k = n - r.

    Source:   Gu and Eisenstat 1996, algorithm 4, for as many columns as rows, where
              their ρ is the largest entry of Z.

    >>> order, z = chosen_columns(np.array([[1.0, 4.0, 2.0]]))
    >>> order.tolist(), z.tolist()
    ([1, 0, 2], [[0.25, 0.5]])
    """
    r, n = right.shape
    _, triangle, order = scipy.linalg.qr(right, mode="economic", pivoting=True)
    z = scipy.linalg.solve_triangular(triangle[:, :r], triangle[:, r:])
    while r < n:
        i, j = np.unravel_index(np.argmax(np.abs(z)), z.shape)
        pivot = z[i, j]
        if abs(pivot) <= bound:
            break
        row, column = z[i] / pivot, z[:, j].copy()
        z -= np.outer(column, row)  # what column j was made of is now made of it
        z[:, j] = -column / pivot
        z[i] = row
        z[i, j] = 1 / pivot
        order[i], order[r + j] = order[r + j], order[i]
    if r < n:  # once more, as updates add up their rounding
        z = np.linalg.solve(right[:, order[:r]], right[:, order[r:]])
    return order, z
