"""Contracts LowRank views with arrays, in the order that cost.py picked."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from oialr_jax import cost, interpret
from oialr_jax.lowrank import Axes, LowRank


class Factors(NamedTuple):
    """A view's matrix as first . core . last, turned the way that it is used.

    Shapes:   first: (*batch, *dims contracted, r); core: (*batch, r, r);
              last: (*batch, r, *dims kept).
    """

    first: Array
    core: Array
    last: Array


def view_of(leaf: LowRank, path: str) -> interpret.View:
    """The view of a LowRank leaf. Its bases get no gradient; its core does."""
    data = (jax.lax.stop_gradient(leaf.u), leaf.s, jax.lax.stop_gradient(leaf.vt))
    return interpret.View.of(data, path, leaf.shape, leaf.dtype)


def materialize(view: interpret.View, axes: Axes) -> Array:
    """The dense array of a LowRank view in its present layout and dtype."""
    left = [a for a in range(len(axes.shape)) if a not in view.taken]
    present = Axes(
        shape=tuple(axes.shape[a] for a in left),
        stack=tuple(left.index(a) for a in axes.stack if a not in view.taken),
        inputs=tuple(left.index(a) for a in axes.inputs),
        outputs=tuple(left.index(a) for a in axes.outputs),
    )
    u, s, vt = view.data
    return interpret.arrange(view, LowRank(u, s, vt, present).materialize())


def unstack(view: interpret.View, axes: Axes, axis: int) -> tuple[Array, ...] | None:
    """The three factors with one stack axis at the front, None for another axis."""
    left = [a for a in axes.stack if a not in view.taken]
    if axis not in left:
        return None
    return tuple(jnp.moveaxis(array, left.index(axis), 0) for array in view.data)


def turned(view: interpret.View, axes: Axes, use: interpret.Use) -> Factors | None:
    """The factors for one use of a view, or None when the use does not fit its axes."""
    stack = [a for a in axes.stack if a not in view.taken]
    contracted = set(interpret.atoms(view, use.contracted))
    inputs, outputs = (
        interpret.split(view, group) for group in (axes.inputs, axes.outputs)
    )
    batch = set(interpret.atoms(view, use.batch))
    if batch != set(interpret.split(view, stack)) or use.groups > 1:
        return None
    u, s, vt = (array.astype(view.dtype) for array in view.data)
    v, ut = jnp.swapaxes(vt, -1, -2), jnp.swapaxes(u, -1, -2)
    if contracted == set(inputs):
        first, core, last = u, s, vt
    elif contracted == set(outputs):
        first, core, last = v, jnp.swapaxes(s, -1, -2), ut
        inputs, outputs = outputs, inputs
    else:
        return None
    stacked = interpret.split(view, stack)
    rank = s.shape[-1]

    def laid_out(
        array: Array, have: list[interpret.Atom], want: Sequence[int]
    ) -> Array:
        """(*stack, side, r) with the side split into the dimensions `want`."""
        have = [*stacked, *have]
        wanted = interpret.atoms(view, [*use.batch, *want])
        array = array.reshape([*(a.size for a in have), rank])
        order = [*(have.index(a) for a in wanted), len(have)]
        sizes = [view.shape[d] for d in (*use.batch, *want)]
        return jnp.transpose(array, order).reshape(*sizes, rank)

    first = laid_out(first, inputs, use.contracted)
    last = laid_out(jnp.swapaxes(last, -1, -2), outputs, use.free)
    last = jnp.moveaxis(last, -1, len(use.batch))
    batch_shape = [view.shape[d] for d in use.batch]
    if len(use.batch) > 1:
        order = [stacked.index(a) for a in interpret.atoms(view, use.batch)]
        core = core.reshape([a.size for a in stacked] + [rank, rank])
        core = jnp.transpose(core, [*order, len(stacked), len(stacked) + 1])
    return Factors(first, core.reshape(*batch_shape, rank, rank), last)


def workload(x: Array, factors: Factors, use: interpret.Use, out: Any) -> cost.Workload:
    """What a use costs is a function of this; `out` is its result's abstract value."""
    first, core, last = factors
    b = len(use.batch)
    m, n = math.prod(first.shape[b:-1]), math.prod(last.shape[b + 1 :])
    stack = math.prod(core.shape[:-2])
    return cost.Workload(
        rows=math.prod(out.shape) // (stack * n),
        m=m,
        n=n,
        rank=core.shape[-1],
        window=m // x.shape[use.x_contracted[0]] if use.kind == "conv" else 0,
        stack=stack,
        input_gradient=not use.x_fixed,
    )


def dot(
    x: Array,
    factors: Factors,
    use: interpret.Use,
    params: dict[str, Any],
    order: cost.Order,
) -> Array:
    """What `dot_general` of x and the view gives."""
    b = len(use.batch)
    dtype = jnp.promote_types(x.dtype, factors.first.dtype)
    x, *arrays = (a.astype(dtype) for a in (x, *factors))
    precision, out_dtype = params["precision"], params["preferred_element_type"]
    first, rest = _folded(order, Factors(*arrays), b, precision)
    stack, inner = tuple(range(b)), tuple(range(b, b + len(use.contracted)))
    out = jax.lax.dot_general(
        x,
        first,
        ((use.x_contracted, inner), (use.x_batch, stack)),
        precision=precision,
        preferred_element_type=None if rest else out_dtype,
    )
    for i, factor in enumerate(rest, start=1):
        out = jax.lax.dot_general(
            out,
            factor,
            (((out.ndim - 1,), (b,)), (stack, stack)),
            precision=precision,
            preferred_element_type=out_dtype if i == len(rest) else None,
        )
    if use.position == 0:  # the view's own dimensions come before those of x
        ours = range(out.ndim - len(use.free), out.ndim)
        out = jnp.moveaxis(out, list(ours), range(b, b + len(use.free)))
    return out


def conv(
    x: Array,
    factors: Factors,
    use: interpret.Use,
    params: dict[str, Any],
    order: cost.Order,
) -> Array:
    """What `conv_general_dilated` gives: the same convolution to r channels, then 1x1.

    The first factor carries window, stride, padding and dilation; core and last factor
    act on channels alone.
    """
    numbers = params["dimension_numbers"]
    channel = numbers.out_spec[1]
    precision, out_dtype = params["precision"], params["preferred_element_type"]
    first, rest = _folded(order, factors, 0, precision)
    y = jax.lax.conv_general_dilated(
        x,
        jnp.moveaxis(first, -1, use.free[0]),
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=numbers,
        precision=precision,
        preferred_element_type=None if rest else out_dtype,
    )
    if not rest:
        return y
    y = jnp.moveaxis(y, channel, -1)
    for i, factor in enumerate(rest, start=1):
        y = jax.lax.dot_general(
            y,
            factor,
            (((y.ndim - 1,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=out_dtype if i == len(rest) else None,
        )
    return jnp.moveaxis(y, -1, channel)


def _folded(
    order: cost.Order, factors: Factors, b: int, precision: Any
) -> tuple[Array, list[Array]]:
    """What x meets first, and then what its result meets, in the given order.

    The smaller base takes the core, the last of equals.
    """
    first, core, last = factors
    stack = tuple(range(b))

    def product(left: Array, right: Array) -> Array:
        numbers = (((left.ndim - 1,), (b,)), (stack, stack))
        return jax.lax.dot_general(left, right, numbers, precision=precision)

    if order == cost.Order.CHAIN:
        return first, [core, last]
    if last.size <= first.size:
        last = product(core, last)
    else:
        first = product(first, core)
    return (first, [last]) if order == cost.Order.MERGED else (product(first, last), [])
