"""Optax: a transformation that treats every matrix of a tree as a matrix.

Leaves, dense or cores, are identified by name and viewed through their axes; matrices
of one shape are stacked. See `transforms.py` for what is done to the stacks.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from oialr_jax.linalg import compute_dtype, token_of
from oialr_jax.lowrank import Axes, PyTree, is_low_rank, leaf_at, path_name
from oialr_jax.matrices import Matrix


def directions(
    direction: Callable[[Array], Array],
    matrices: Iterable[Matrix] | None,
    *,
    in_order: bool = False,
) -> optax.GradientTransformation:
    """The transformation that replaces stacks of matrices by `direction` of them.

    Args:     in_order: calls of `direction` must not run at the same time.
    """
    known = axes_by_name(matrices)

    def turned(updates: PyTree) -> PyTree:
        flat, treedef = jax.tree_util.tree_flatten_with_path(updates)
        leaves = [leaf for _, leaf in flat]
        shapes: dict[Any, dict[int, Axes]] = {}
        for i, (path, leaf) in enumerate(flat):
            axes = axes_of(path_name(path), leaf, known)
            if axes is not None:
                key = (axes.m, axes.n, compute_dtype(leaf.dtype))
                shapes.setdefault(key, {})[i] = axes
        before = None
        for (m, n, dtype), views in shapes.items():
            parts = [
                axes.to_matrix(leaves[i]).reshape(-1, m, n).astype(dtype)
                for i, axes in views.items()
            ]
            stack = jnp.concatenate(parts)
            result, before = guarded(direction, stack, before if in_order else None)
            ends = np.cumsum([len(part) for part in parts])
            split = jnp.split(result, ends[:-1])
            for (i, axes), part in zip(views.items(), split, strict=True):
                array = axes.to_array(part.reshape(*axes.l, m, n))
                leaves[i] = array.astype(leaves[i].dtype)
        return jax.tree.unflatten(treedef, leaves)

    return stateless(turned, known)


def guarded(
    direction: Callable[[Array], Array],
    x: Float[Array, "b m n"],
    before: Float[Array, ""] | None = None,
) -> tuple[Float[Array, "b m n"], Float[Array, ""]]:
    """The direction of each matrix, or the matrix if either is not finite.

    With a token of the direction; `before` is that of one which has to come first.
    """
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    finite = jnp.isfinite(largest)  # a maximum with NaN is NaN
    safe = jnp.where(finite, x / jnp.where(largest > 0, largest, 1), 0)
    if before is not None:
        safe = safe + before.astype(safe.dtype)
    result = direction(safe)
    finite &= jnp.all(jnp.isfinite(result), axis=(-2, -1), keepdims=True)
    return jnp.where(finite, result, x), token_of([result])


def stateless(
    turned: Callable[[PyTree], PyTree], known: Mapping[str, Axes] | None
) -> optax.GradientTransformation:
    """The transformation by `turned`, whose init refuses what does not fit `known`.

    Raises:   ValueError: at init; there is no leaf of a name, or it has another shape,
              or the params are in low rank and no `freeze_bases` is around.
    """

    def init(params: PyTree) -> optax.EmptyState:
        def is_leaf(x: Any) -> bool:
            return is_low_rank(x) or isinstance(x, optax.MaskedNode)

        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_leaf)
        names = {path_name(path): leaf for path, leaf in leaves}
        for name, leaf in names.items():
            if is_low_rank(leaf):
                raise ValueError(
                    f"{name} is in low rank: build the optimizer as "
                    "oialr_jax.freeze_bases(tx), with nothing outside it"
                )
        for name in (known or ()) if names else ():
            leaf_at(name, names)  # without names Optax asks with a placeholder for all
        named_map(lambda name, leaf: axes_of(name, leaf, known), params)
        return optax.EmptyState()

    def update(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        del params
        return turned(updates), state

    return optax.GradientTransformation(init, update)


def axes_by_name(matrices: Iterable[Matrix] | None) -> dict[str, Axes] | None:
    """Axes by path, without grouped convolutions, whose groups are matrices each."""
    if matrices is None:
        return None
    return {
        x.path: x.axes
        for x in matrices
        if not any(remark.startswith("grouped") for remark in x.other)
    }


def axes_of(name: str, leaf: Any, known: Mapping[str, Axes] | None) -> Axes | None:
    """The axes of a leaf that is a matrix or the core of one, None for any other.

    A core at full rank of a square matrix has the shape of the matrix; then the two
    differ by a transposition at most.

    Raises:   ValueError: it is one of the matrices and has neither shape.
    """
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    shape = leaf.shape
    if known is None:
        last = len(shape) - 1
        return Axes(shape, (), tuple(range(last)), (last,)) if last > 0 else None
    axes = known.get(name)
    if axes is None or shape == axes.shape:
        return axes
    r, stack = shape[-1], len(axes.l)
    if shape != (*axes.l, r, r) or r > min(axes.m, axes.n):
        raise ValueError(
            f"{name} has shape {shape}: neither {axes.shape} nor that of a core of it"
        )
    return Axes(shape, tuple(range(stack)), (stack,), (stack + 1,))


def named_map(fn: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """The tree with fn(name, leaf) for every leaf."""
    return jax.tree_util.tree_map_with_path(lambda p, x: fn(path_name(p), x), tree)
