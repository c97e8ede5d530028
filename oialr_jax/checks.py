"""Whether an optimizer fits low-rank params: bases stay, labels keep, nothing computed.

What fails here would be wrong without a word after the conversion: something outside
`freeze_bases` moves bases, or a mask takes a core, which has two axes, for another kind
of leaf than its dense matrix.
"""

from collections.abc import Iterable
from typing import Any

import jax

from oialr_jax.labels import check_labels
from oialr_jax.lowrank import (
    LowRank,
    PyTree,
    arrays_only,
    is_low_rank,
    path_name,
)
from oialr_jax.matrices import Matrix
from oialr_jax.transform import check_frozen, trainable


def check_optimizer(tx: Any, params: PyTree, matrices: Iterable[Matrix]) -> None:
    """Host side: whether `tx` can train these matrices in low rank, by shapes alone.

    What `check_frozen` and `check_labels` say of the params after their conversion, at
    full rank and at the other end, rank 1. Params may be abstract, dense or low-rank.

    Raises:   ValueError: bases would move, or a leaf would change its optimizer.
    """
    axes = {matrix.path: matrix.axes for matrix in matrices}
    params = arrays_only(params)

    def held(rank: int | None) -> PyTree:
        def node(path: Any, leaf: Any) -> Any:
            found = leaf.axes if is_low_rank(leaf) else axes.get(path_name(path))
            if found is None:
                return leaf
            r = min(found.m, found.n, rank or found.m)

            def shape(*side: int) -> Any:
                return jax.ShapeDtypeStruct((*found.l, *side), leaf.dtype)

            factors = shape(found.m, r), shape(r, r), shape(r, found.n)
            return LowRank(*factors, found)

        return jax.tree_util.tree_map_with_path(node, params, is_leaf=is_low_rank)

    dense = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        params,
        is_leaf=is_low_rank,
    )
    full = held(None)
    check_frozen(tx, full)
    for low in (full, held(1)):
        check_labels(tx, dense, trainable(low))
