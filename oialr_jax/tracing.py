"""A user's function as a jaxpr, with dense abstract values in the place of nodes."""

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from oialr_jax import effects


class Traced(NamedTuple):
    """A function as a closed jaxpr over its array arguments.

    `leaves` are the array arguments in order, LowRank-like nodes as they came, each
    with its path in (args, kwargs); `rebuild` gives the function's result from the
    jaxpr's outputs. Where the function changes its arguments in place, `arguments`
    gives (args, kwargs) as they are afterwards, from the same outputs; else it is None.
    `replaced` tells which of these outputs, by position, stand in the place of which
    leaf. Nothing is written into the arguments themselves.
    """

    jaxpr: Any
    leaves: tuple[tuple[tuple[Any, ...], Any], ...]
    rebuild: Callable[[Sequence[Any]], Any]
    arguments: Callable[[Sequence[Any]], Any] | None
    replaced: dict[int, int]


def trace(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    is_node: Callable[[Any], bool],
    *,
    share: bool = False,
    axis_env: Sequence[tuple[str, int]] = (),
) -> Traced:
    """The jaxpr of fn(*args, **kwargs) with dense abstract values in place of nodes.

    Arrays, tracers and `jax.ShapeDtypeStruct` are traced; every other argument (flags,
    strings, functions, None) is closed over, as a static argument of `jax.jit` is. With
    `share`, an object that is in the arguments twice is one object for the function.
    `axis_env` has mapped axes, names and sizes, beside those that are bound already.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(
        (args, kwargs), is_leaf=is_node
    )
    is_traced = [is_node(leaf) or _is_array(leaf) for _, leaf in flat]
    leaves = tuple(item for item, keep in zip(flat, is_traced, strict=True) if keep)
    traced: list[effects.Template] = []
    changed: list[tuple[Any, ...]] = []

    def on_arrays(*arrays: Any) -> list[Any]:
        remaining = iter(arrays)
        full = [
            next(remaining) if keep else leaf
            for (_, leaf), keep in zip(flat, is_traced, strict=True)
        ]
        copies = jax.tree.unflatten(treedef, full)
        if share:
            effects.share((args, kwargs), copies)
        before = jax.tree.structure(copies)
        out = fn(*copies[0], **copies[1])
        result, outputs = effects.Template.of(out, (*_ARRAYS, *_SCALARS))
        origin = {id(x): leaf for x, (_, leaf) in zip(full, flat, strict=True)}
        after, changes = effects.Template.of(copies, _ARRAYS, origin, len(outputs))
        now = jax.tree.leaves(copies)
        traced[:] = [result, after]
        if after.tree == before and all(map(operator.is_, now, full)):
            return outputs  # nothing was changed in place
        changed[:] = [path for path, _ in jax.tree_util.tree_leaves_with_path(copies)]
        return [*outputs, *changes]

    abstract = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_node(leaf) else leaf
        for _, leaf in leaves
    ]
    jaxpr = jax.make_jaxpr(on_arrays, axis_env=axis_env)(*abstract)
    result, after = traced
    places = {path: i for i, (path, _) in enumerate(leaves)}
    aligned = (changed, after.leaves, after.is_output) if changed else ((), (), ())
    replaced = {
        output: places[path]
        for path, output, keep in zip(*aligned, strict=True)
        if keep and path in places
    }
    return Traced(jaxpr, leaves, result.fill, after.fill if changed else None, replaced)


def shown(name: str) -> str:
    """The name of a leaf of (args, kwargs) without its place there.

    >>> shown("0/0/encoder/kernel")
    'encoder/kernel'
    """
    return "/".join(name.split("/")[2:])


@contextlib.contextmanager
def axis_names(axis_env: Sequence[tuple[str, int]]) -> Iterator[None]:
    """Names `axis_env` in the error of a function that uses an axis not in it."""
    try:
        yield
    except NameError as error:
        if "axis name" not in str(error):
            raise
        raise ValueError(
            f"the function uses a mapped axis that is not in axis_env={[*axis_env]}: "
            f'pass axis_env=[(name, size)], say axis_env=[("batch", 8)] ({error})'
        ) from error


_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
_SCALARS = (bool, int, float, complex, np.generic)


def _is_array(x: Any) -> bool:
    return isinstance(x, _ARRAYS)
