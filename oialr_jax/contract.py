"""Contracts views of nodes with arrays, in the order that cost.py picked.

The data of such a view are the fields of `lowrank.Parts`, the last ones left out where
they are None.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from oialr_jax import cost, views
from oialr_jax.linalg import compute_dtype
from oialr_jax.lowrank import Axes, Parts


class Factors(NamedTuple):
    """A view's matrix as first . core . last, turned the way that it is used.

    Shapes:   first: (*batch, *dims contracted, r); core: (*batch, r, r), or None for
              the identity; last: (*batch, r, *dims kept).
    """

    first: Array
    core: Array | None
    last: Array


def view_of(leaf: Any, path: str) -> views.View:
    """The view of a node. Its bases get no gradient; its core does.

    It is not `whole` where the factors are not orthonormal: of no core, or of integers.
    """
    parts = leaf.parts()
    whole = parts.s is not None and parts.base is None
    whole = whole and bool(jnp.issubdtype(parts.u.dtype, jnp.floating))
    data = tuple(parts) if any(x is not None for x in parts[3:]) else parts[:3]
    view = views.View.of(data, path, leaf.shape, leaf.dtype)
    return view if whole else view.replace(whole=False)


def materialize(view: views.View, axes: Axes) -> Array:
    """The dense array of a node's view in its present layout and dtype."""
    left = view.present
    present = Axes(
        shape=tuple(view.leaf_shape[a] for a in left),
        stack=tuple(left.index(a) for a in axes.stack if a in left),
        inputs=tuple(left.index(a) for a in axes.inputs),
        outputs=tuple(left.index(a) for a in axes.outputs),
    )
    parts = Parts(*view.data)
    wide = compute_dtype(view.dtype) if parts.s is None else parts.s.dtype
    array = parts.product(present, wide)
    if parts.base is not None:
        array = array + parts.base.materialize().astype(wide)
    return views.arrange(view, array)


def along(
    view: views.View, axes: Axes, axis: int, change: Callable[[Array, int], Array]
) -> tuple[Any, ...]:
    """The data, change(array, place) of those that have an axis of the leaf.

    An axis of the rows is one of u, and one of the columns of vt; a stack is all of
    them. The base has every axis.
    """
    parts = Parts(*view.data)
    stack = [a for a in axes.stack if a in view.present]
    if parts.base is not None:
        held = parts.base
        if axis not in stack and held.scale is not None:
            held = dataclasses.replace(held, array=held.materialize(), scale=None)
        place = view.present.index(axis)
        held = jax.tree.map(lambda x: change(x, place), held)
        parts = parts._replace(base=held)
    if axis in stack:
        place = stack.index(axis)
        u, s, vt, order = (None if x is None else change(x, place) for x in parts[:4])
        return _data(view, Parts(u, s, vt, order, parts.base))

    def side(array: Array, group: Sequence[int]) -> Array:
        """change on (*stack, side, r)."""
        sizes = [view.leaf_shape[a] for a in group]
        before, rank = array.shape[:-2], array.shape[-1]
        opened = array.reshape(*before, *sizes, rank)
        new = change(opened, len(before) + group.index(axis))
        return new.reshape(*before, -1, rank)

    if axis in axes.inputs:
        return _data(view, parts._replace(u=side(parts.u, axes.inputs)))
    v = jnp.swapaxes(parts.right(), -1, -2)
    vt = jnp.swapaxes(side(v, axes.outputs), -1, -2)
    return _data(view, parts._replace(vt=vt, order=None))


def _data(view: views.View, parts: Parts) -> tuple[Any, ...]:
    """The parts as the data of a view that has as many."""
    return tuple(parts)[: len(view.data)]


def scaled(
    view: views.View, axes: Axes, factor: Array, varied: Sequence[int]
) -> views.View | None:
    """The view times a factor over rows, over columns or over neither, else None."""
    parts = Parts(*view.data)
    u, s, vt = parts.u, parts.s, parts.right()
    dtype = compute_dtype(view.dtype) if s is None else s.dtype
    stack = tuple(a for a in axes.stack if a in view.present)
    sides = [{*varied} & {*group} for group in (axes.inputs, axes.outputs)]
    if all(sides):
        return None
    group = axes.inputs if sides[0] else axes.outputs if sides[1] else ()
    over = views.over_axes(view, factor, (*stack, *group))
    sizes = [view.leaf_shape[a] for a in stack]
    base = parts.base
    if base is not None:
        each = views.over_axes(view, factor, view.present).astype(base.dtype)
        base = dataclasses.replace(base, array=base.materialize() * each, scale=None)
    if not group:
        over = over if over.ndim == 0 else over[..., None, None]
        if s is None:
            u = u.astype(dtype) * over.astype(dtype)
        else:
            s = s * over.astype(dtype)
        return view.replace(data=_data(view, Parts(u, s, vt, None, base)))
    over = over.reshape(*sizes, -1)
    if sides[0]:
        u = u.astype(dtype) * over[..., :, None].astype(dtype)
    else:
        vt = vt.astype(dtype) * over[..., None, :].astype(dtype)
    return view.replace(data=_data(view, Parts(u, s, vt, None, base)), whole=False)


def sum_squares(view: views.View, axes: Axes, dims: Sequence[int]) -> Array | None:
    """The sum of W∘W over rows, columns, or both; None over part of a side.

    Over columns it is, for each row, that of (U S)(VᵀV) ∘ (U S); orthonormal bases drop
    out, and over both sides the core is left.
    """
    gone = {*views.atoms(view, dims)}
    rest = {*views.atoms(view, range(len(view.dims)))} - gone
    inputs, outputs = ({*views.split(view, x)} for x in (axes.inputs, axes.outputs))
    if any(group & gone and group & rest for group in (inputs, outputs)):
        return None
    parts = Parts(*view.data)
    if parts.base is not None:
        return None
    core = jnp.eye(parts.u.shape[-1]) if parts.s is None else parts.s
    u, s, vt = (x.astype(view.dtype) for x in (parts.u, core, parts.right()))
    v, ut = jnp.swapaxes(vt, -1, -2), jnp.swapaxes(u, -1, -2)

    def gram(wide: Array, tall: Array, core: Array) -> Array:
        """core (wide tall), of which orthonormal bases leave the core."""
        return core if view.whole else core @ (wide @ tall)

    if not inputs & rest and not outputs & rest:
        left_core = s if view.whole else (ut @ u) @ s
        total = jnp.sum(left_core * gram(vt, v, s), (-1, -2))
        sides: tuple[int, ...] = ()
    elif not outputs & rest:
        rows = u @ s
        total = jnp.sum(gram(vt, v, rows) * rows, -1)
        sides = axes.inputs
    elif not inputs & rest:
        columns = v @ jnp.swapaxes(s, -1, -2)
        total = jnp.sum(gram(ut, u, columns) * columns, -1)
        sides = axes.outputs
    else:
        return None
    known = (*(a for a in view.present if a in axes.stack), *sides)
    order = sorted(known)
    total = total.reshape([view.leaf_shape[a] for a in known])
    total = jnp.transpose(total, [known.index(a) for a in order])
    seen = view.replace(
        dims=tuple(tuple(a for a in dim if a.axis in order) for dim in view.dims),
        taken=tuple(a for a in range(len(view.leaf_shape)) if a not in order),
    )
    return jnp.sum(views.arrange(seen, total), tuple(dims))


def turned(view: views.View, axes: Axes, use: views.Use) -> Factors | None:
    """The factors for one use of a view, or None when the use does not fit its axes."""
    stack = [a for a in axes.stack if a in view.present]
    contracted = set(views.atoms(view, use.contracted))
    inputs, outputs = (
        views.split(view, group) for group in (axes.inputs, axes.outputs)
    )
    batch = set(views.atoms(view, use.batch))
    if batch != set(views.split(view, stack)) or use.groups > 1:
        return None
    parts = Parts(*view.data)
    u, vt = (array.astype(view.dtype) for array in (parts.u, parts.right()))
    s = None if parts.s is None else parts.s.astype(view.dtype)
    v, ut = jnp.swapaxes(vt, -1, -2), jnp.swapaxes(u, -1, -2)
    if contracted == set(inputs):
        first, core, last = u, s, vt
    elif contracted == set(outputs):
        first, last = v, ut
        core = None if s is None else jnp.swapaxes(s, -1, -2)
        inputs, outputs = outputs, inputs
    else:
        return None
    stacked = views.split(view, stack)
    rank = u.shape[-1]

    def laid_out(array: Array, have: list[views.Atom], want: Sequence[int]) -> Array:
        """(*stack, side, r) with the side split into the dimensions `want`."""
        have = [*stacked, *have]
        wanted = views.atoms(view, [*use.batch, *want])
        array = array.reshape([*(a.size for a in have), rank])
        order = [*(have.index(a) for a in wanted), len(have)]
        sizes = [view.shape[d] for d in (*use.batch, *want)]
        return jnp.transpose(array, order).reshape(*sizes, rank)

    first = laid_out(first, inputs, use.contracted)
    last = laid_out(jnp.swapaxes(last, -1, -2), outputs, use.free)
    last = jnp.moveaxis(last, -1, len(use.batch))
    if core is None:
        return Factors(first, None, last)
    batch_shape = [view.shape[d] for d in use.batch]
    if len(use.batch) > 1:
        order = [stacked.index(a) for a in views.atoms(view, use.batch)]
        core = core.reshape([a.size for a in stacked] + [rank, rank])
        core = jnp.transpose(core, [*order, len(stacked), len(stacked) + 1])
    return Factors(first, core.reshape(*batch_shape, rank, rank), last)


def workload(x: Array, factors: Factors, use: views.Use) -> cost.Workload:
    """What a use costs is a function of this."""
    first, _, last = factors
    b = len(use.batch)
    m, n = math.prod(first.shape[b:-1]), math.prod(last.shape[b + 1 :])
    return cost.Workload(
        rows=use.rows,
        m=m,
        n=n,
        rank=first.shape[-1],
        window=m // x.shape[use.x_contracted[0]] if use.kind == "conv" else 0,
        stack=math.prod(first.shape[:b]),
        input_gradient=not use.x_fixed,
    )


def dot(
    x: Array,
    factors: Factors,
    use: views.Use,
    params: dict[str, Any],
    order: cost.Order,
) -> Array:
    """What `dot_general` of x and the view gives."""
    b = len(use.batch)
    dtype = jnp.promote_types(x.dtype, factors.first.dtype)
    x, factors = jax.tree.map(lambda a: a.astype(dtype), (x, factors))
    precision, out_dtype = params["precision"], params["preferred_element_type"]
    first, rest = _folded(order, factors, b, precision)
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


def ragged(
    x: Array,
    factors: Factors,
    use: views.Use,
    params: dict[str, Any],
    order: cost.Order,
    group_sizes: Any,
) -> Array:
    """What `ragged_dot_general` gives: each group of rows meets its own matrix."""
    dtype = jnp.promote_types(x.dtype, factors.first.dtype)
    out, factors = jax.tree.map(lambda a: a.astype(dtype), (x, factors))
    first, rest = _folded(order, factors, 1, params["precision"])
    (place,) = params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions
    inner = tuple(range(1, 1 + len(use.contracted)))
    contracted = use.x_contracted
    for factor in (first, *rest):
        out = jax.lax.ragged_dot_general(
            out,
            factor,
            group_sizes,
            jax.lax.RaggedDotDimensionNumbers(
                ((contracted, inner), ((), ())), (place,), (0,)
            ),
            precision=params["precision"],
        )
        place -= sum(d < place for d in contracted)
        contracted, inner = (out.ndim - 1,), (1,)
    return out.astype(params["preferred_element_type"] or dtype)


def permutes(view: views.View, axes: Axes, use: views.Use) -> bool:
    """Whether `permuted` can contract a use of this view."""
    order = Parts(*view.data).order
    inputs, outputs = (views.split(view, x) for x in (axes.inputs, axes.outputs))
    return (
        order is not None
        and order.ndim == 1
        and use.kind == "dot"
        and {*views.atoms(view, use.contracted)} == {*inputs}
        and [*views.atoms(view, use.free)] == outputs
    )


def permuted(
    x: Array, factors: Factors, view: views.View, use: views.Use, params: dict[str, Any]
) -> Array:
    """x C [I Z] Π, the permutation on the result and not in a factor."""
    _, _, z, order, _ = view.data
    dtype = jnp.promote_types(x.dtype, view.dtype)
    x, first, z = (a.astype(dtype) for a in (x, factors.first, z))
    inner = tuple(range(len(use.contracted)))
    options = {k: params[k] for k in ("precision", "preferred_element_type")}
    y = jax.lax.dot_general(x, first, ((use.x_contracted, inner), ((), ())), **options)
    numbers = (((y.ndim - 1,), (0,)), ((), ()))
    rest = jax.lax.dot_general(y, z.astype(y.dtype), numbers, **options)
    out = jnp.take(jnp.concatenate([y, rest], axis=-1), order, axis=-1)
    free = [view.shape[d] for d in use.free]
    out = out.reshape(*out.shape[:-1], *free)
    if use.position == 0:
        ours = range(out.ndim - len(free), out.ndim)
        out = jnp.moveaxis(out, list(ours), range(len(free)))
    return out


def base_of(view: views.View) -> Any:
    """The frozen base of a view, or None."""
    return Parts(*view.data).base


def on_base(
    x: Array, view: views.View, base: Any, use: views.Use, eqn: Any, rest: Sequence[Any]
) -> Array:
    """What the equation gives of x and the base alone.

    A base in a narrow dtype is widened anew on the way back, so that nothing of the
    size of W is kept for it.
    """

    def product(x: Array, base: Any) -> Array:
        operands = [x, x]
        operands[use.position] = views.arrange(view, base.materialize())
        (out,) = views.bind(eqn, [*operands, *rest])
        return out

    narrow = base.scale is not None or base.array.dtype != view.dtype
    return (jax.checkpoint(product) if narrow else product)(x, base)


def conv(
    x: Array,
    factors: Factors,
    use: views.Use,
    params: dict[str, Any],
    order: cost.Order,
) -> Array:
    """What `conv_general_dilated` gives: the same convolution to r channels, then 1x1.

    The first factor carries window, stride, padding and dilation; core and last factor
    act on channels alone.
    """
    channel = params["dimension_numbers"].out_spec[1]
    precision, out_dtype = params["precision"], params["preferred_element_type"]
    first, rest = _folded(order, factors, 0, precision)
    y = conv_to_rank(x, first, use, params, None if rest else out_dtype)
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


def conv_to_rank(
    x: Array, first: Array, use: views.Use, params: dict[str, Any], dtype: Any = None
) -> Array:
    """The convolution of x with the columns of `first`, r channels, in `dtype`."""
    return jax.lax.conv_general_dilated(
        x,
        jnp.moveaxis(first, -1, use.free[0]),
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=params["dimension_numbers"],
        precision=params["precision"],
        preferred_element_type=dtype,
    )


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

    if core is None:
        rebuilt = order == cost.Order.REBUILT
        return (product(first, last), []) if rebuilt else (first, [last])
    if order == cost.Order.CHAIN:
        return first, [core, last]
    if last.size <= first.size:
        last = product(core, last)
    else:
        first = product(first, core)
    return (first, [last]) if order == cost.Order.MERGED else (product(first, last), [])
