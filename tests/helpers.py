"""Small tools shared by the tests: low-rank trees, tolerances, comparison."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oialr_jax.lowrank import (
    factor,
    is_low_rank,
    named_leaves,
    path_name,
    without_identity,
)
from oialr_jax.matrices import Matrix

# Relative to the largest entry of the reference, for sums of up to a few hundred terms.
TOLERANCE = {jnp.dtype(jnp.float32): 2e-5, jnp.dtype(jnp.bfloat16): 4e-2}


def in_low_rank(params: Any, matrices: Sequence[Matrix], fraction: float = 0.5) -> Any:
    """The tree with each found matrix cut to a fraction of its full rank."""
    by_path = {x.path: x for x in matrices}

    def convert(path: Any, leaf: Any) -> Any:
        found = by_path.get(path_name(path))
        if found is None:
            return leaf
        rank = max(1, int(fraction * min(found.m, found.n)))
        return factor(leaf, found.axes, rank)

    return jax.tree_util.tree_map_with_path(convert, params)


def assert_close(actual: Any, desired: Any, tolerance: float) -> None:
    """Leaves equal to a tolerance relative to the largest entry of each.

    Which event made the bases of a node is not compared: rounding tells two apart.
    """
    actual, desired = map(without_identity, (actual, desired))
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(desired), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        scale = max(1.0, float(np.max(np.abs(b), initial=0)))
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


def scalar_loss(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A smooth scalar of all float outputs of fn."""

    def loss(params: Any, *args: Any, **kwargs: Any) -> Any:
        out = jax.tree.leaves(fn(params, *args, **kwargs))
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in out)

    return loss


def projected(dense_gradient: Any, params: Any) -> dict[str, Any]:
    """By path: UᵀGV in the place of the gradient G of each low-rank leaf."""
    gradients = named_leaves(dense_gradient)
    result = {}
    for name, leaf in named_leaves(params).items():
        g = gradients.get(name)
        if is_low_rank(leaf):
            g = leaf.axes.to_matrix(g)
            g = jnp.swapaxes(leaf.u, -1, -2) @ g @ jnp.swapaxes(leaf.vt, -1, -2)
        if g is not None:
            result[name] = g
    return result
