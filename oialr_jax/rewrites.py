"""What changes the description of a weight and not its data: the rules per primitive.

Each function takes a lazy value or an array and gives another one, or None where the
result cannot be described; then the weight is materialised.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from oialr_jax.views import (
    LAZY,
    Atom,
    Handler,
    Joined,
    Squares,
    View,
    bind,
    is_same,
    whole_axis,
)


def cast(value: Any, dtype: Any) -> Any:
    """The value in another floating dtype."""
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    if isinstance(value, Joined):
        return _each_part(value, lambda x: cast(x, dtype))
    if isinstance(value, LAZY):
        return dataclasses.replace(value, dtype=jnp.dtype(dtype))
    return value.astype(dtype)


def transpose(value: Any, permutation: Sequence[int]) -> Any:
    """The value with its dimensions in another order."""
    if isinstance(value, View):
        return value.replace(dims=tuple(value.dims[d] for d in permutation))
    if isinstance(value, Squares):
        return _inside(value, lambda x: transpose(x, permutation))
    if isinstance(value, Joined):
        dim = tuple(permutation).index(value.dim)
        return _each_part(value, lambda x: transpose(x, permutation), dim)
    return jnp.transpose(value, permutation)


def reshape(value: Any, shape: Sequence[int]) -> Any:
    """The value in a new shape; None when a dimension would straddle an axis."""
    if isinstance(value, View):
        return _regroup(value, shape)
    if isinstance(value, Squares):
        return _inside(value, lambda x: reshape(x, shape))
    if not isinstance(value, Joined):
        return value.reshape(shape)
    before = math.prod(value.shape[: value.dim])
    for dim in range(len(shape)):  # the new dimension along which the parts follow
        rest = math.prod(shape[dim + 1 :])
        sizes = [math.prod(x.shape[value.dim :]) for x in value.parts]
        if math.prod(shape[:dim]) == before and all(x % rest == 0 for x in sizes):
            sized = [(*shape[:dim], x // rest, *shape[dim + 1 :]) for x in sizes]
            parts = [reshape(x, s) for x, s in zip(value.parts, sized, strict=True)]
            return _joined(parts, dim)
    return None


def _regroup(view: View, shape: Sequence[int]) -> View | None:
    queue = [atom for dim in view.dims for atom in dim]
    dims: list[tuple[Atom, ...]] = []
    for size in shape:
        dim: list[Atom] = []
        if size == 1 and queue and queue[0].size == 1:
            dim.append(queue.pop(0))
        while size > 1:
            if not queue:
                return None
            axis, stride, extent = queue.pop(0)
            if size % extent == 0:
                dim.append(Atom(axis, stride, extent))
                size //= extent
            elif extent % size == 0:
                rest = extent // size
                dim.append(Atom(axis, stride * rest, size))
                queue.insert(0, Atom(axis, stride, rest))
                size = 1
            else:
                return None
        dims.append(tuple(dim))
    return view.replace(dims=tuple(dims)) if all(a.size == 1 for a in queue) else None


def expand(value: Any, shape: Sequence[int], kept: Sequence[int]) -> Any:
    """The value with dimensions of size one put between its own, at `kept`."""
    if math.prod(shape) != math.prod(value.shape):
        return None
    if isinstance(value, Joined):
        dim = kept[value.dim]

        def sized(x: Any) -> Any:
            size = x.shape[value.dim]
            return expand(x, (*shape[:dim], size, *shape[dim + 1 :]), kept)

        return _each_part(value, sized, dim)
    if isinstance(value, Squares):
        return _inside(value, lambda x: expand(x, shape, kept))
    if not isinstance(value, View):
        return jax.lax.broadcast_in_dim(value, shape, kept)
    dims: list[tuple[Atom, ...]] = [()] * len(shape)
    for position, run in zip(kept, value.dims, strict=True):
        dims[position] = run
    return value.replace(dims=tuple(dims))


def squeeze(value: Any, gone: Sequence[int]) -> Any:
    """The value without some dimensions of size one."""
    if isinstance(value, View):
        dims = tuple(d for i, d in enumerate(value.dims) if i not in gone)
        return value.replace(dims=dims)
    return reshape(value, [n for d, n in enumerate(value.shape) if d not in gone])


def cut(
    value: Any, dim: int, start: Any, size: int, handler: Handler, step: int = 1
) -> Any:
    """`size` entries of one dimension, `step` apart; `start` may be traced."""
    fixed = isinstance(start, int)
    if isinstance(value, Squares):
        return _inside(value, lambda x: cut(x, dim, start, size, handler, step))
    if isinstance(value, Joined):
        if dim != value.dim:
            return _each_part(value, lambda x: cut(x, dim, start, size, handler, step))
        if not fixed or step != 1:
            return None
        parts, begin = [], 0
        for part in value.parts:
            end = begin + part.shape[dim]
            first, last = max(begin, start), min(end, start + size)
            if first < last:
                parts.append(cut(part, dim, first - begin, last - first, handler))
            begin = end
        return _joined(parts, dim)

    def of_axis(array: Array, axis: int) -> Array:
        if not fixed:
            return jax.lax.dynamic_slice_in_dim(array, start, size, axis)
        last = start + (size - 1) * step + 1
        return jax.lax.slice_in_dim(array, start, last, step, axis)

    if not isinstance(value, View):
        return of_axis(value, dim)
    if size == value.shape[dim]:
        return value
    real = [a for a in value.dims[dim] if a.size > 1]
    inner = math.prod(a.size for a in real[1:])
    if inner > 1:  # only whole runs of the faster atoms can be cut from the slowest
        if not fixed or step != 1 or start % inner or size % inner:
            return None
        start, size = start // inner, size // inner
    return _cut_atom(value, real[0], size, of_axis, handler)


def _cut_atom(
    view: View,
    atom: Atom,
    size: int,
    of_axis: Callable[[Array, int], Array],
    handler: Handler,
) -> View:
    """The view with one atom cut to `size` entries by `of_axis`."""
    axis, extent = atom.axis, view.leaf_shape[atom.axis]
    inner = (extent // (atom.stride * atom.size), atom.size, atom.stride)

    def change(array: Array, place: int) -> Array:
        shape = array.shape
        opened = array.reshape(*shape[:place], *inner, *shape[place + 1 :])
        new = of_axis(opened, place + 1)
        return new.reshape(*shape[:place], -1, *shape[place + 1 :])

    def changed(other: Atom) -> Atom:
        if other == atom:
            return Atom(axis, atom.stride, size)
        if other.axis != axis or other.stride <= atom.stride:
            return other
        return Atom(axis, other.stride // atom.size * size, other.size)

    shape = list(view.leaf_shape)
    shape[axis] = extent // atom.size * size
    return view.replace(
        data=handler.along(view, axis, change),
        leaf_shape=tuple(shape),
        dims=tuple(tuple(map(changed, dim)) for dim in view.dims),
        whole=view.whole and handler.stacks(view, axis),
    )


def take(value: Any, indices: Any, params: dict[str, Any], handler: Handler) -> Any:
    """Entries of a stack of matrices, by an array of indices, as `gather` does."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    if not isinstance(value, View) or len(value.dims) < 3:
        return None
    if numbers.operand_batching_dims or numbers.start_indices_batching_dims:
        return None
    along = [d for d, n in enumerate(value.shape) if sizes[d] != n]
    if len(along) != 1 or sizes[along[0]] != 1:
        return None
    (dim,) = along
    axis = whole_axis(value, dim)
    if axis is None or not handler.stacks(value, axis):
        return None
    mode, clips = params["mode"], jax.lax.GatherScatterMode
    if dim not in numbers.start_index_map or (
        len(numbers.start_index_map) > 1
        and mode not in (clips.CLIP, clips.PROMISE_IN_BOUNDS)
    ):
        return None  # where an index is out of bounds, other dimensions count too
    # of dimensions that are taken whole every start is the first, once it is clipped
    chosen = indices[..., numbers.start_index_map.index(dim)]

    def change(array: Array, place: int) -> Array:
        where = (*[slice(None)] * place, chosen.reshape(-1))
        return array.at[where].get(
            mode=mode, fill_value=params["fill_value"], wrap_negative_indices=False
        )

    view = value.replace(data=handler.along(value, axis, change))
    left = [
        () if d == dim else x
        for d, x in enumerate(value.dims)
        if d not in numbers.collapsed_slice_dims
    ]
    new = [
        (Atom(axis, math.prod(chosen.shape[i + 1 :]), n),)
        for i, n in enumerate(chosen.shape)
    ]
    dims = [
        left.pop(0) if d in numbers.offset_dims else new.pop(0)
        for d in range(len(left) + len(new))
    ]
    shape = list(value.leaf_shape)
    shape[axis] = chosen.size
    return view.replace(
        dims=tuple(dims), leaf_shape=tuple(shape), indexed=(*value.indexed, axis)
    )


def scale(value: Any, factor: Any, handler: Handler) -> Any:
    """The value times a scalar, or a factor that varies along some of its axes."""
    if isinstance(factor, LAZY) or value.shape == ():
        return None
    if isinstance(value, Squares):
        if factor.ndim:
            return None
        plus = value.plus * factor
        return dataclasses.replace(value, scale=value.scale * factor, plus=plus)
    pairs = zip(factor.shape, value.shape, strict=False)
    if factor.ndim and any(f not in (1, n) for f, n in pairs):
        return None
    if isinstance(value, Joined):
        dim = value.dim
        if factor.ndim == 0 or factor.shape[dim] == 1:
            return _each_part(value, lambda x: scale(x, factor, handler))
        ends = list(itertools.accumulate(x.shape[dim] for x in value.parts))
        factors = jnp.split(factor, ends[:-1], dim)
        return _joined(
            [scale(x, f, handler) for x, f in zip(value.parts, factors, strict=True)],
            dim,
        )
    if not isinstance(value, View):
        return value * factor
    varied = [
        a.axis
        for dim, size in zip(value.dims, factor.shape, strict=False)
        for a in dim
        if size > 1 and a.size > 1
    ]
    return handler.scale(value, factor, tuple(dict.fromkeys(varied)))


def square(value: Any) -> Any:
    """The squares of all entries."""
    if isinstance(value, Joined):
        return _each_part(value, square)
    if isinstance(value, View):
        one, zero = (jnp.asarray(x, value.dtype) for x in (1, 0))
        return Squares(value, one, zero, value.dtype)
    return None if isinstance(value, Squares) else jnp.square(value)


def reduce_sum(value: Any, dims: Sequence[int], handler: Handler) -> Any:
    """The sum of squares over some dimensions, as an array."""
    if isinstance(value, Joined):
        sums = [reduce_sum(x, dims, handler) for x in value.parts]
        if any(x is None for x in sums):
            return None
        if value.dim in dims:
            return sum(sums[1:], start=sums[0])
        return jnp.concatenate(sums, value.dim - sum(d < value.dim for d in dims))
    if not isinstance(value, LAZY):
        return jnp.sum(value, tuple(dims))
    if not isinstance(value, Squares):
        return None
    total = handler.sum_squares(value.view, tuple(dims))
    if total is None:
        return None
    plus = jnp.broadcast_to(value.plus, value.shape)
    return (total * value.scale + jnp.sum(plus, tuple(dims))).astype(value.dtype)


def _inside(value: Squares, change: Callable[[Any], Any]) -> Any:
    """The squares of a changed view."""
    view = change(value.view)
    if view is None or jnp.ndim(value.plus):
        return None
    return dataclasses.replace(value, view=view)


def _each_part(
    value: Joined, change: Callable[[Any], Any], dim: int | None = None
) -> Any:
    return _joined([change(x) for x in value.parts], value.dim if dim is None else dim)


def _joined(parts: Sequence[Any], dim: int) -> Any:
    if any(x is None for x in parts):
        return None
    return parts[0] if len(parts) == 1 else Joined(tuple(parts), dim)


# The rules: a primitive's parameters in the words of the functions above


def _convert(eqn: Any, values: list[Any], handler: Handler) -> Any:
    return cast(values[0], eqn.params["new_dtype"])


def _transpose(eqn: Any, values: list[Any], handler: Handler) -> Any:
    return transpose(values[0], [int(d) for d in eqn.params["permutation"]])


def _reshape(eqn: Any, values: list[Any], handler: Handler) -> Any:
    if eqn.params["dimensions"] is not None or len(values) > 1:
        return None
    return reshape(values[0], eqn.params["new_sizes"])


def _squeeze(eqn: Any, values: list[Any], handler: Handler) -> Any:
    return squeeze(values[0], [int(d) for d in eqn.params["dimensions"]])


def _broadcast_in_dim(eqn: Any, values: list[Any], handler: Handler) -> Any:
    if len(values) > 1:
        return None
    kept = [int(d) for d in eqn.params["broadcast_dimensions"]]
    return expand(values[0], eqn.params["shape"], kept)


def _slice(eqn: Any, values: list[Any], handler: Handler) -> Any:
    value, *starts = values
    shape = value.shape
    if eqn.primitive.name == "slice":
        starts = [int(x) for x in eqn.params["start_indices"]]
        steps = eqn.params["strides"] or [1] * len(shape)
        limits = eqn.params["limit_indices"]
        sizes = [
            -(-(int(b) - a) // s) for a, b, s in zip(starts, limits, steps, strict=True)
        ]
    else:
        sizes, steps = eqn.params["slice_sizes"], [1] * len(shape)
    for dim, (start, size, step) in enumerate(zip(starts, sizes, steps, strict=True)):
        if size != shape[dim] and value is not None:
            if not isinstance(start, int | jax.Array):  # a literal
                start = int(start)
            value = cut(value, dim, start, size, handler, int(step))
    return value


def _split(eqn: Any, values: list[Any], handler: Handler) -> Any:
    parts, start = [], 0
    for size in map(int, eqn.params["sizes"]):
        parts.append(cut(values[0], eqn.params["axis"], start, size, handler))
        start += size
    return None if any(x is None for x in parts) else parts


def _unstack(eqn: Any, values: list[Any], handler: Handler) -> Any:
    axis = eqn.params["axis"]
    parts = [cut(values[0], axis, i, 1, handler) for i in range(values[0].shape[axis])]
    return (
        None if any(x is None for x in parts) else [squeeze(x, [axis]) for x in parts]
    )


def _concatenate(eqn: Any, values: list[Any], handler: Handler) -> Any:
    return _joined(values, eqn.params["dimension"])


def _stack(eqn: Any, values: list[Any], handler: Handler) -> Any:
    axis, shape = eqn.params["axis"], list(values[0].shape)
    kept = [d for d in range(len(shape) + 1) if d != axis]
    shape.insert(axis, 1)
    return _joined([expand(x, shape, kept) for x in values], axis)


def _gather(eqn: Any, values: list[Any], handler: Handler) -> Any:
    if isinstance(values[1], LAZY):
        return None
    return take(values[0], values[1], eqn.params, handler)


def _mul(eqn: Any, values: list[Any], handler: Handler) -> Any:
    first, second = values
    if first is second or is_same(first, second):
        return square(first)
    if isinstance(first, LAZY) and isinstance(second, LAZY):
        return None
    if isinstance(first, LAZY):
        return scale(first, jnp.asarray(second), handler)
    return scale(second, jnp.asarray(first), handler)


def _div(eqn: Any, values: list[Any], handler: Handler) -> Any:
    first, second = values
    if isinstance(second, LAZY):
        return None
    return scale(first, 1 / jnp.asarray(second), handler)


def _neg(eqn: Any, values: list[Any], handler: Handler) -> Any:
    return scale(values[0], jnp.asarray(-1, values[0].dtype), handler)


def _square(eqn: Any, values: list[Any], handler: Handler) -> Any:
    return square(values[0]) if eqn.params.get("y", 2) == 2 else None


def _add(eqn: Any, values: list[Any], handler: Handler) -> Any:
    squares = [x for x in values if isinstance(x, Squares)]
    others = [x for x in values if not isinstance(x, LAZY)]
    if len(squares) != 1 or len(others) != 1:
        return None
    plus = jnp.broadcast_to(squares[0].plus + others[0], squares[0].shape)
    return dataclasses.replace(squares[0], plus=plus)


def _reduce_sum(eqn: Any, values: list[Any], handler: Handler) -> Any:
    return reduce_sum(values[0], eqn.params["axes"], handler)


def _same(eqn: Any, values: list[Any], handler: Handler) -> Any:
    return values[0]


def _each(eqn: Any, values: list[Any], handler: Handler) -> Any:
    """A primitive that does the same to every array it is given."""

    def of(value: Any) -> Any:
        if isinstance(value, View):
            return value.replace(data=jax.tree.map(of, value.data))
        if isinstance(value, Joined):
            return _each_part(value, of)
        return None if isinstance(value, Squares) else bind(eqn, [value])[0]

    new = [of(value) for value in values]
    return None if any(x is None for x in new) else new


RULES: dict[str, Callable[[Any, list[Any], Handler], Any]] = {
    "convert_element_type": _convert,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "slice": _slice,
    "dynamic_slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "concatenate": _concatenate,
    "stack": _stack,
    "gather": _gather,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "square": _square,
    "integer_pow": _square,
    "add": _add,
    "reduce_sum": _reduce_sum,
    "copy": _same,
    "name": _same,
    "sharding_constraint": _same,  # speaks of the dense array, which does not exist
    "stop_gradient": _each,
    "optimization_barrier": _each,
    "pvary": _each,
}
"""By primitive: the lazy value, or list of values, of an equation; None has none."""
