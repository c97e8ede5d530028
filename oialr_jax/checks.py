"""Whether an optimizer fits low-rank params: bases stay, labels keep, nothing computed.

What fails here would be wrong without a word after the conversion: something outside
`freeze_bases` moves bases, or a mask takes a core, which has two axes, for another kind
of leaf than its dense matrix.
"""

from collections.abc import Iterable
from typing import Any

import jax

from oialr_jax.labels import check_labels
from oialr_jax.lowrank import PyTree, abstract_low_rank, arrays_only, is_low_rank
from oialr_jax.matrices import Matrix
from oialr_jax.transform import check_frozen, trainable


def check_optimizer(tx: Any, params: PyTree, matrices: Iterable[Matrix]) -> None:
    """Host side: whether `tx` can train these matrices in low rank, by shapes alone.

    What `check_frozen` and `check_labels` say of the params after their conversion, at
    full rank (nodes that are there: at their own) and at the other end, rank 1. Params
    may be abstract, dense or low-rank.

    Raises:   ValueError: bases would move, or a leaf would change its optimizer.
    """
    axes = {matrix.path: matrix.axes for matrix in matrices}
    params = arrays_only(params)

    dense = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        params,
        is_leaf=is_low_rank,
    )
    most, least = (abstract_low_rank(params, axes, rank) for rank in (None, 1))
    check_frozen(tx, most)
    for low in (most, least):
        check_labels(tx, dense, trainable(low))
