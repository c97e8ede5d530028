"""Rows of a matrix: x and the gradient of a use of a view, in the leaf's own layout."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oialr_jax import contract
from oialr_jax.lowrank import Axes
from oialr_jax.views import Use, View, atoms, split
from oialr_jax.weighted import BLOCK, WIDE, Sides


class Meeting(NamedTuple):
    """How a view meets an array: a use, and whether it contracts the outputs.

    `examples` is the length of the axis of examples among the rows, where one is; None
    for independent rows.
    """

    view: View
    axes: Axes
    use: Use
    eqn: Any
    is_turned: bool
    examples: int | None


def sums(
    operands: Any, gradient: Array, meeting: Meeting, full: Sequence[bool]
) -> Sides:
    """The sums of one use, in the leaf's own layout."""
    x, scales, count, bases = operands
    is_conv = meeting.use.kind == "conv"
    if is_conv:
        seen, gradient = _rows_of_conv(x, gradient, meeting, bases)
    else:
        seen, gradient = _rows_of_dot(x, gradient, meeting)
    seen, gradient = seen.astype(jnp.float32), gradient.astype(jnp.float32)
    gradient = gradient * count  # of one term, where the loss has the mean
    counted = jnp.any(gradient != 0, axis=-1)
    found = jnp.sum(counted, axis=(-2, -1), dtype=jnp.float32)
    if bases is not None:
        u, vt = (side.astype(jnp.float32)[..., None, :, :] for side in bases)
        first, last = (vt.mT, u) if meeting.is_turned else (u, vt.mT)
        gradient = gradient @ last
        seen = seen if is_conv else seen @ first
    inputs, outputs = (gradient, seen) if meeting.is_turned else (seen, gradient)
    of_rows, of_columns = (side[..., None, None, :] for side in scales)
    inputs, outputs = inputs * of_rows, outputs * of_columns
    if meeting.examples is None:
        inputs, outputs = (
            jnp.where(counted[..., None], side, 0) for side in (inputs, outputs)
        )
        pairs = [(inputs, inputs), (outputs, outputs)]
    else:
        pairs = _of_examples(inputs, outputs)
    (a, b), (c, d) = pairs
    return Sides(_summed(a, b, full[0]), _summed(c, d, full[1]), found)


def _of_examples(inputs: Array, outputs: Array) -> list[tuple[Array, Array]]:
    """Arrays A and B for each side, with Σ AᵀB = Σ G Gᵀ and Σ Gᵀ G over examples.

    G Gᵀ = Xᵀ (Δ Δᵀ) X needs no G: where t rows of an example are few, their products
    Δ Δᵀ, (t, t), are the smaller array, and else G is smaller than its rows.
    """
    t, m, n = inputs.shape[-2], inputs.shape[-1], outputs.shape[-1]
    if t * (m + n) > m * n:
        g = inputs.mT @ outputs
        return [(g.mT, g.mT), (g, g)]
    return [
        (inputs, (outputs @ outputs.mT) @ inputs),
        (outputs, (inputs @ inputs.mT) @ outputs),
    ]


def _summed(a: Array, b: Array, full: bool) -> Array:
    """Σ AᵀB over all but the stack, which is symmetric, or its diagonal.

    Of a side above `WIDE` only blocks along the diagonal are computed, the rest is
    zero: whole, the sums of wide layers cost more than a step of training.

    Shapes:   a, b: (*l, e, t, side).
    """
    if not full:
        return jnp.sum(a * b, axis=(-3, -2))
    stack, over = tuple(range(a.ndim - 3)), (a.ndim - 3, a.ndim - 2)

    def block(a: Array, b: Array) -> Array:
        return jax.lax.dot_general(a, b, ((over, over), (stack, stack)))

    side = a.shape[-1]
    if side <= WIDE:
        return block(a, b)
    total = jnp.zeros((*a.shape[: a.ndim - 3], side, side), a.dtype)
    width = -(-side // -(-side // BLOCK))
    for begin in range(0, side, width):
        part = slice(begin, begin + width)
        total = total.at[..., part, part].set(block(a[..., part], b[..., part]))
    return total


def _rows_of_dot(x: Array, gradient: Array, meeting: Meeting) -> tuple[Array, Array]:
    """Rows of x and of the gradient of a dot product, (*l, e, t, side) each."""
    use = meeting.use
    b, free = len(use.batch), len(use.free)
    begin = gradient.ndim - free if use.position == 1 else b
    batch, columns = range(b), range(begin, begin + free)
    rows = _others(x, use.x_batch, use.x_contracted)
    of_gradient = _others(gradient, batch, columns)
    sizes = [x.shape[d] for d in rows]
    if meeting.examples in sizes:
        first = sizes.index(meeting.examples)
        for dims in (rows, of_gradient):
            dims.insert(0, dims.pop(first))
    return (
        _laid_out(x, use.x_batch, rows, use.x_contracted, use.contracted, meeting),
        _laid_out(gradient, batch, of_gradient, columns, use.free, meeting),
    )


def _rows_of_conv(
    x: Array, gradient: Array, meeting: Meeting, bases: Any
) -> tuple[Array, Array]:
    """Rows of patches and of the gradient of a convolution, one for each position.

    With bases the patches are in the coordinates of a core, (*l, e, t, r): what the
    convolution of x with the base gives, and no patch is cut out.
    """
    use, params = meeting.use, meeting.eqn.params
    out = params["dimension_numbers"].out_spec
    positions = jnp.transpose(gradient, (out[0], *out[2:], out[1]))
    rows = range(positions.ndim - 1)
    of_gradient = _laid_out(positions, (), rows, (len(rows),), use.free, meeting)
    if bases is None:
        patches = _patches(x, meeting.view.shape, params)
        window = range(len(rows), patches.ndim)
        seen = _laid_out(patches, (), rows, window, use.contracted, meeting)
        return seen, of_gradient
    u, vt = (base.astype(jnp.float32) for base in bases)
    view = meeting.view.replace(data=(u, None, vt), dtype=u.dtype)
    factors = contract.turned(view, meeting.axes, use)
    assert factors is not None  # else the use would not have been contracted
    z = contract.conv_to_rank(x.astype(u.dtype), factors.first, use, params)
    z = jnp.transpose(z, (out[0], *out[2:], out[1]))
    return z.reshape(*of_gradient.shape[:-1], u.shape[-1]), of_gradient


def _others(array: Array, *groups: Sequence[int]) -> list[int]:
    return [d for d in range(array.ndim) if not any(d in group for group in groups)]


def _laid_out(
    array: Array,
    batch: Sequence[int],
    rows: Sequence[int],
    columns: Sequence[int],
    dims: Sequence[int],
    meeting: Meeting,
) -> Array:
    """(*l, e, t, side): t rows of e examples, the side in the order of the leaf's axes.

    Without an axis of examples each row is one, of independent rows all are.

    Args:     batch, rows, columns: dimensions of the array; the first and the last are
              the partners of those of the view in `use.batch` and in `dims`.
    """
    view, axes = meeting.view, meeting.axes
    examples = array.shape[rows[0]] if rows else 1
    count = math.prod(array.shape[d] for d in rows)
    stacked, inner = (atoms(view, x) for x in (meeting.use.batch, dims))
    array = jnp.transpose(array, (*batch, *rows, *columns))
    array = array.reshape(
        *(atom.size for atom in stacked), count, *(atom.size for atom in inner)
    )
    stack = [a for a in axes.stack if a in view.present]
    present = {atom.axis for atom in inner}
    side = [a for group in (axes.inputs, axes.outputs) for a in group if a in present]
    order = [
        *(stacked.index(atom) for atom in split(view, stack)),
        len(stacked),
        *(len(stacked) + 1 + inner.index(atom) for atom in split(view, side)),
    ]
    sizes = [view.leaf_shape[a] for a in stack]
    width = math.prod(atom.size for atom in inner)
    if meeting.examples is None:
        parts = (1, count)
    elif examples == meeting.examples:
        parts = (examples, count // max(1, examples))
    else:
        parts = (count, 1)
    return jnp.transpose(array, order).reshape(*sizes, *parts, width)


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
