"""Rows of a matrix: x and the gradient of a use of a view, in the leaf's own layout."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oialr_jax import interpret
from oialr_jax.lowrank import Axes


class Sides(NamedTuple):
    """Sums over the rows of one matrix: what came in, and gradients of what went out.

    A row whose gradient is zero, as of a padded token, does not count. Of a LowRank
    leaf the rows are those of its core, Uᵀx and Vᵀδ. `None` in the place of a sum
    stands for the identity in `compress`.

    Shapes:   inputs: Σ x xᵀ, (*l, m, m), or its diagonal (*l, m); outputs: Σ δ δᵀ,
              (*l, n, n) or (*l, n); rows: (*l). Of a core m and n are its rank.
    """

    inputs: Array | None
    outputs: Array | None
    rows: Array


class Meeting(NamedTuple):
    """How a view meets an array: a use, and whether it contracts the outputs."""

    view: interpret.View
    axes: Axes
    use: interpret.Use
    eqn: Any
    is_turned: bool


def sums(
    operands: Any, gradient: Array, meeting: Meeting, full: Sequence[bool]
) -> Sides:
    """Σ x xᵀ, Σ δ δᵀ and the number of rows of one use, in the leaf's own layout."""
    x, scale, count, bases = operands
    meet = _rows_of_conv if meeting.use.kind == "conv" else _rows_of_dot
    sides = list(meet(x, gradient, meeting))
    counted = jnp.any(sides[1] != 0, axis=-1)
    factors = [scale**2, jnp.broadcast_to(count**2, scale.shape)]
    if meeting.is_turned:
        sides, factors = sides[::-1], factors[::-1]
    if bases is not None:
        u, vt = bases
        sides = [sides[0] @ u.astype(x.dtype), sides[1] @ vt.mT.astype(x.dtype)]
    inputs, outputs = (
        _squared(jnp.where(counted[..., None], side, 0), factor, is_full)
        for side, factor, is_full in zip(sides, factors, full, strict=True)
    )
    return Sides(inputs, outputs, jnp.sum(counted, axis=-1, dtype=jnp.float32))


def _squared(rows: Array, factor: Array, full: bool) -> Array:
    """Σ y yᵀ over rows y, or its diagonal, times a factor for each matrix."""
    if not full:
        total = jnp.sum(jnp.square(rows.astype(jnp.float32)), axis=-2)
        return total * factor[..., None]
    stack = tuple(range(rows.ndim - 2))
    over = (rows.ndim - 2,)
    total = jax.lax.dot_general(
        rows, rows, ((over, over), (stack, stack)), preferred_element_type=jnp.float32
    )
    return total * factor[..., None, None]


def _rows_of_dot(x: Array, gradient: Array, meeting: Meeting) -> tuple[Array, Array]:
    """Rows of x and of the gradient of a dot product, (*l, T, side) each."""
    use = meeting.use
    b, free = len(use.batch), len(use.free)
    begin = gradient.ndim - free if use.position == 1 else b
    batch, columns = range(b), range(begin, begin + free)
    return (
        _laid_out(x, use.x_batch, use.x_contracted, use.contracted, meeting),
        _laid_out(gradient, batch, columns, use.free, meeting),
    )


def _rows_of_conv(x: Array, gradient: Array, meeting: Meeting) -> tuple[Array, Array]:
    """Rows of patches and of the gradient of a convolution, one for each position."""
    use, params = meeting.use, meeting.eqn.params
    out = params["dimension_numbers"].out_spec
    patches = _patches(x, meeting.view.shape, params)
    window = range(patches.ndim - len(use.contracted), patches.ndim)
    positions = jnp.transpose(gradient, (out[0], *out[2:], out[1]))
    return (
        _laid_out(patches, (), window, use.contracted, meeting),
        _laid_out(positions, (), (positions.ndim - 1,), use.free, meeting),
    )


def _laid_out(
    array: Array,
    batch: Sequence[int],
    columns: Sequence[int],
    dims: Sequence[int],
    meeting: Meeting,
) -> Array:
    """(*l, rows, side): the side in the order of the leaf's axes.

    Args:     batch, columns: dimensions of the array, the partners of those of the
              view in `use.batch` and in `dims`.
    """
    view, axes = meeting.view, meeting.axes
    rows = [d for d in range(array.ndim) if d not in {*batch, *columns}]
    count = math.prod(array.shape[d] for d in rows)
    stacked, inner = (interpret.atoms(view, x) for x in (meeting.use.batch, dims))
    array = jnp.transpose(array, (*batch, *rows, *columns))
    array = array.reshape(
        *(atom.size for atom in stacked), count, *(atom.size for atom in inner)
    )
    stack = [a for a in axes.stack if a not in view.taken]
    present = {atom.axis for atom in inner}
    side = [a for group in (axes.inputs, axes.outputs) for a in group if a in present]
    order = [
        *(stacked.index(atom) for atom in interpret.split(view, stack)),
        len(stacked),
        *(len(stacked) + 1 + inner.index(atom) for atom in interpret.split(view, side)),
    ]
    sizes = [view.leaf_shape[a] for a in stack]
    width = math.prod(atom.size for atom in inner)
    return jnp.transpose(array, order).reshape(*sizes, count, width)


def _patches(x: Array, kernel: Sequence[int], params: Mapping[str, Any]) -> Array:
    """What each output position of a convolution sees: (b, *positions, *window).

    The window has the dimensions of the kernel but that of the channels out, in their
    order. One strided slice for each tap: a convolution with one-hot kernels, as
    `jax.lax.conv_general_dilated_patches` is, takes CPUs many times as long.
    """
    numbers = params["dimension_numbers"]
    _, channels, *spatial = numbers.rhs_spec
    lhs, batch = numbers.lhs_spec, numbers.lhs_spec[0]
    x = jnp.transpose(x, (batch, *lhs[2:], lhs[1]))
    sides = list(zip(params["padding"], params["lhs_dilation"], strict=True))
    pads = [(low, high, dilation - 1) for (low, high), dilation in sides]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    taps = [kernel[d] for d in spatial]
    dilation, stride = params["rhs_dilation"], params["window_strides"]
    reach = [(k - 1) * d for k, d in zip(taps, dilation, strict=True)]
    last = [size - r for size, r in zip(x.shape[1:-1], reach, strict=True)]

    def seen(tap: tuple[int, ...]) -> Array:
        start = [t * d for t, d in zip(tap, dilation, strict=True)]
        stop = [s + size for s, size in zip(start, last, strict=True)]
        places = [slice(*z) for z in zip(start, stop, stride, strict=True)]
        return x[:, *places]

    stacked = jnp.stack([seen(tap) for tap in np.ndindex(*taps)], axis=-2)
    stacked = stacked.reshape(*stacked.shape[:-2], *taps, x.shape[-1])
    first = len(lhs) - 1
    order = np.argsort([*spatial, channels])
    return jnp.transpose(stacked, (*range(first), *(first + int(i) for i in order)))
