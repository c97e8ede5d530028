"""The walk with slots in its views, whose gradients tell what directions are worth.

Where a weight meets an array, x is at hand; the gradient of the result comes by in the
backward pass. Both are summed there, as the gradient of arrays of zeros that go with
the weight through scans, branches and remat: what JAX adds up for a gradient, it adds
up for them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oialr_jax import contract, cost, interpret, tracing, views
from oialr_jax.lowrank import (
    Axes,
    PyTree,
    check_forms,
    is_low_rank,
    path_name,
    unique_names,
)
from oialr_jax.matrices import Matrix
from oialr_jax.rows import Meeting, sums
from oialr_jax.views import Use, View, as_array
from oialr_jax.weighted import Sides, Statistics

WIDEST = 4096
"""The longest side of which a covariance is held, 64 MiB; then its diagonal."""


def curvature(
    loss: Callable[..., Any],
    matrices: Sequence[Matrix],
    *,
    terms: int | Callable[..., Any] | None = None,
    has_aux: bool = False,
    independent_rows: bool = False,
    widest: int = WIDEST,
) -> Callable[..., Statistics]:
    """A function of (params, *batch) that gives the statistics of the matrices.

    It runs loss(params, *batch), on dense, low-rank or mixed params, and one backward
    pass in which no gradient of a weight is computed. It is pure: for jit, scan over
    batches and meshes. Those of several batches are added by `Statistics.add`.

    What a direction is worth comes out in units of this loss if the loss is a mean over
    N terms. Draw the labels from the model's own prediction for the true Fisher (with
    labels of the data it is the empirical one), and see `of_outputs` for functions
    without a loss. The rows of an example (its tokens, its positions) act together: an
    axis of the rows that is as long as the first axis of the first array in `batch` is
    that of examples; where no axis is, each row is an example. For a weight that is
    used several times the sums of its uses are added.

    A use of a part of a matrix, or of one whose rows or columns are scaled, is one of
    the whole whose other rows of x, or columns of the gradient, are zero.

    A matrix with a use that is not summed (a gather, a grouped or ragged product, one
    with another weight, or of a matrix that a mask multiplies) is in
    `Statistics.skipped`, with that use. Rows behind a `stop_gradient` have no gradient
    and are not counted.

    Args:     terms: N of a batch, or what computes it from `batch`: the number of
              tokens, say, for a mean over tokens; 1 for a sum. None: the length of the
              first axis of the first array in `batch`, the examples. has_aux: as in
              `jax.grad`. independent_rows: K-FAC's assumption, C = E[x xᵀ] and
              D = E[δ δᵀ]: what comes in and what goes out, each by itself. widest: of
              a longer side the diagonal is summed; above 2048 blocks of at most 1024.
    Raises:   ValueError: `params` has no leaf of a matrix's path, or one of another
              shape; no array in `batch` to count.
    Source:   the Fisher's nearest Kronecker product as GFWSVD has it (arXiv
              2505.17974), whose one step is the square of Shampoo's factors (Morwani et
              al. 2024). Independent rows: K-FAC (Martens and Grosse 2015), and KFC
              (Grosse and Martens 2016) without its division by positions, which the
              scale contains.

    >>> from oialr_jax.matrices import find_matrices
    >>> loss = lambda w, x: jnp.mean(jnp.sum(x @ w, axis=1))
    >>> w, x = jnp.ones((3, 2)), jnp.eye(4, 3)
    >>> found = curvature(loss, find_matrices(loss, w, x))(w, x)
    >>> inputs, outputs = found.covariances("")
    >>> inputs.shape, outputs.tolist()
    ((3, 3), [[0.75, 0.75], [0.75, 0.75]])
    """
    by_path = {x.path: x.axes for x in matrices}

    def run(params: PyTree, *batch: Any, **kwargs: Any) -> Statistics:
        check_forms(params, what="curvature takes")
        traced = tracing.trace(loss, (params, *batch), kwargs, is_low_rank)
        names = unique_names(path for path, _ in traced.leaves)
        of_params = [_in_params(path) for path, _ in traced.leaves]
        axes: dict[str, Axes] = {}
        slots: dict[str, Sides] = {}
        places: dict[str, str] = {}
        for name, mine, (path, leaf) in zip(
            names, of_params, traced.leaves, strict=True
        ):
            short = path_name(path[2:])
            chosen = by_path.get(short) if mine else None
            if chosen is not None:
                if tuple(leaf.shape) != chosen.shape:
                    raise ValueError(
                        f"{short} has shape {tuple(leaf.shape)}, the matrix was found "
                        f"with {chosen.shape}: find matrices in these params"
                    )
                slots[short], places[name] = _slots(leaf, chosen, widest), short
            if is_low_rank(leaf):
                axes[name] = leaf.axes
            elif chosen is not None:
                axes[name] = chosen
        for absent in by_path.keys() - slots.keys():
            raise ValueError(f"params have no leaf {absent}, which is in `matrices`")
        count = jnp.asarray(_terms(terms, batch, kwargs), jnp.float32)
        length = None if independent_rows else _examples(batch, kwargs) or 0
        handler = _Recorder(axes, count, length)

        def total(slots: dict[str, Sides]) -> Array:
            values = [
                _view(leaf, name, axes[name], slots.get(places.get(name, "")))
                if name in axes
                else leaf
                for name, (_, leaf) in zip(names, traced.leaves, strict=True)
            ]
            # What `fixed` marks is here the params: an array from them alone is none of
            # the data, and rows that it has are no examples.
            outputs = interpret.evaluate(traced.jaxpr, values, handler, of_params)
            outputs = [
                handler.materialize(x)
                if isinstance(x, View)
                else as_array(x, handler, "output")
                for x in outputs
            ]
            value = traced.rebuild(outputs)
            return value[0] if has_aux else value

        found = jax.grad(total)(slots)
        missed = {places[x]: why for x, why in handler.missed.items() if x in places}
        sides = {x: sides for x, sides in found.items() if x not in missed}
        skipped = tuple((x, ", ".join(dict.fromkeys(y))) for x, y in missed.items())
        return Statistics(sides, count, skipped, independent_rows)

    return run


def of_outputs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A loss with the curvature of the distance of outputs, for fn without a loss.

    loss(params, *args, key=key) is the mean of ⟨fn(params, *args), ξ⟩ with ξ standard
    normal. What its statistics predict is the rise of ½ |f(x) - f₀(x)|², a mean over
    the first axis of the outputs: for vectors of norm one, of 1 - cosine. With
    `counted=` a mask of that axis the others, as of a batch that was filled up, are
    left out: then `terms` is the number of those that count.

    Source:   the Gauss-Newton matrix E[JᵀJ] of a squared error, for JᵀJ = E[Jᵀξ ξᵀJ].
    """

    def loss(
        params: PyTree, *args: Any, key: Array, counted: Any = None, **kwargs: Any
    ) -> Array:
        total = jnp.zeros((), jnp.float32)
        for i, out in enumerate(jax.tree.leaves(fn(params, *args, **kwargs))):
            noise = jax.random.normal(jax.random.fold_in(key, i), out.shape)
            if counted is not None:
                noise = jnp.where(counted.reshape(-1, *[1] * (out.ndim - 1)), noise, 0)
            count = out.shape[0] if counted is None else jnp.sum(counted)
            total = total + jnp.sum(out.astype(jnp.float32) * noise) / count
        return total

    return loss


# The walk


def _in_params(path: tuple[Any, ...]) -> bool:
    return path[0].idx == 0 and getattr(path[1], "idx", None) == 0


def _terms(
    terms: int | Callable[..., Any] | None, batch: tuple[Any, ...], kwargs: Any
) -> Any:
    if callable(terms):
        return terms(*batch, **kwargs)
    if terms is not None:
        return terms
    examples = _examples(batch, kwargs)
    if examples is None:
        raise ValueError("the batch has no array of one or more axes: pass `terms`")
    return examples


def _examples(batch: tuple[Any, ...], kwargs: Any) -> int | None:
    """The length of the first axis of the first array that has one."""
    shapes = (np.shape(x) for x in jax.tree.leaves((batch, kwargs)))
    return next((shape[0] for shape in shapes if shape), None)


def _slots(leaf: Any, axes: Axes, widest: int) -> Sides:
    """Zeros for the sums of one leaf."""

    def zeros(side: int) -> Array:
        both = (side, side) if side <= widest else (side,)
        return jnp.zeros((*axes.l, *both), jnp.float32)

    m, n = _sides(leaf, axes)
    return Sides(zeros(m), zeros(n), jnp.zeros(axes.l, jnp.float32))


def _sides(leaf: Any, axes: Axes) -> tuple[int, int]:
    return (leaf.rank, leaf.rank) if is_low_rank(leaf) else (axes.m, axes.n)


def _view(leaf: Any, name: str, axes: Axes, slots: Sides | None) -> View:
    """The view of a leaf: its array or factors, and if it has slots scales and these.

    Scales are of the rows and of the columns. All but the array of a dense leaf have
    the stack axes in front.
    """
    arrays = (leaf.u, leaf.s, leaf.vt) if is_low_rank(leaf) else (leaf,)
    if slots is not None:
        stack = slots.rows.shape
        scales = (jnp.ones((*stack, side)) for side in _sides(leaf, axes))
        arrays = (*arrays, *scales, *slots)
    return View.of(arrays, name, leaf.shape, leaf.dtype)


class _Parts(NamedTuple):
    """What the data of a view are."""

    leaf: View  # with the arrays of the leaf alone
    is_node: bool
    scales: tuple[Array, ...]  # of rows and columns; none without slots
    slots: Sides | None


def _parts(view: View) -> _Parts:
    is_node = len(view.data) in (3, 8)
    arrays, rest = view.data[: 3 if is_node else 1], view.data[3 if is_node else 1 :]
    slots = Sides(*rest[2:]) if rest else None
    return _Parts(view.replace(data=arrays), is_node, rest[:2], slots)


def _cut_side(
    array: Array,
    sizes: Sequence[int],
    place: int,
    change: Callable[[Array, int], Array],
    times: int,
) -> Array:
    """change on one axis of a side that is the last dimension, or the last two."""
    before = array.shape[: array.ndim - times]
    array = array.reshape(*before, *(*sizes,) * times)
    for copy in reversed(range(times)):  # the last first, as places before it stay
        array = change(array, len(before) + copy * len(sizes) + place)
    new = math.isqrt(array.size // math.prod(before)) if times == 2 else -1
    return array.reshape(*before, *(new,) * times)


class _Recorder:
    """Handler whose views hold a leaf and slots, of which sums are the gradients.

    `count` is the number of terms of the loss, `examples` that of the examples, None
    for independent rows; `missed` has the uses that are not summed, by leaf.
    """

    def __init__(
        self, axes: Mapping[str, Axes], count: Array, examples: int | None
    ) -> None:
        self.axes = axes
        self.count = count
        self.examples = examples
        self.missed: dict[str, list[str]] = {}
        self.detail = ""  # of the contraction that is about to be unknown

    def materialize(self, view: View) -> Array:
        leaf, is_node, *_ = _parts(view)
        if is_node:
            return contract.materialize(leaf, self.axes[view.path])
        return views.arrange(leaf, leaf.data[0])

    def along(
        self, view: View, axis: int, change: Callable[[Array, int], Array]
    ) -> tuple[Array, ...]:
        leaf, is_node, *_ = _parts(view)
        axes = self.axes[view.path]
        rest = view.data[len(leaf.data) :]
        arrays: tuple[Array, ...]
        if is_node:
            arrays = contract.along(leaf, axes, axis, change)
        else:
            arrays = (change(leaf.data[0], view.present.index(axis)),)
        stack = [a for a in axes.stack if a in view.present]
        if axis in stack:
            rest = tuple(change(x, stack.index(axis)) for x in rest)
        elif rest and not is_node:  # those of a core are in its coordinates
            which = 0 if axis in axes.inputs else 1
            group = [a for a in (axes.inputs, axes.outputs)[which] if a in view.present]
            sizes = [view.leaf_shape[a] for a in group]
            new = list(rest)
            for i in (which, 2 + which):
                times = rest[i].ndim - len(stack)
                new[i] = _cut_side(rest[i], sizes, group.index(axis), change, times)
            rest = tuple(new)
        return (*arrays, *rest)

    def stacks(self, view: View, axis: int) -> bool:
        return axis in self.axes[view.path].stack

    is_stack = stacks

    def scale(self, view: View, factor: Array, axes: tuple[int, ...]) -> View | None:
        leaf, is_node, scales, slots = _parts(view)
        mine = self.axes[view.path]
        sides = [{*axes} & {*group} for group in (mine.inputs, mine.outputs)]
        if all(sides):
            self.detail = "of rows and columns"
            return None
        arrays: tuple[Array, ...]
        if is_node:
            new = contract.scaled(leaf, mine, factor, axes)
            if new is None:
                return None
            arrays = new.data
        else:
            over = views.over_axes(view, factor, view.present)
            arrays = (leaf.data[0] * over.astype(leaf.data[0].dtype),)
        if slots is not None and not (is_node and any(sides)):  # else u or vt has it
            which = 1 if sides[1] else 0
            group = (mine.inputs, mine.outputs)[which] if any(sides) else ()
            present = [a for a in (*mine.stack, *group) if a in view.present]
            over = views.over_axes(view, factor, present).astype(jnp.float32)
            if over.ndim:
                over = over.reshape(*slots.rows.shape, -1)
            new_scales = list(scales)
            new_scales[which] = scales[which] * over
            scales = tuple(new_scales)
        rest = () if slots is None else (*scales, *slots)
        return view.replace(data=(*arrays, *rest))

    def sum_squares(self, view: View, dims: tuple[int, ...]) -> Array:
        return jnp.sum(jnp.square(self.materialize(view)), dims)

    def contract(
        self, view: View, x: Array, use: Use, eqn: Any, rest: Sequence[Any] = ()
    ) -> Array | None:
        leaf, is_node, scales, slots = _parts(view)
        axes = self.axes[view.path]
        side = _side(view, axes, use)
        if side is None or use.kind not in ("dot", "conv"):
            self.detail = "of a grouped convolution" if use.groups > 1 else ""
            return None
        if is_node:
            out = _contracted(leaf, axes, x, use, eqn)
        else:
            operands = [x, x]
            operands[use.position] = views.arrange(leaf, leaf.data[0])
            (out,) = views.bind(eqn, operands)
        if out is None or slots is None:
            return out
        name = eqn.primitive.name
        if use.x_fixed:
            self.note(view.path, f"{name} with no data")
            return out
        bases = (leaf.data[0], leaf.data[2]) if is_node else None
        layout, is_turned = view.replace(data=()), side == "outputs"
        meeting = Meeting(layout, axes, use, eqn, is_turned, self.examples)
        return _recorded(out, (x, scales, self.count, bases), slots, meeting)

    def unknown(self, view: View, primitive: str) -> None:
        self.note(view.path, f"{primitive} {self.detail}".rstrip())
        self.detail = ""

    def note(self, path: str, use: str) -> None:
        self.missed.setdefault(path, []).append(use)


def _side(view: View, axes: Axes, use: Use) -> str | None:
    """Which side of its matrix a use contracts, or None when it is not whole."""
    stack = [a for a in axes.stack if a in view.present]
    batch, contracted, free = (
        set(views.atoms(view, dims)) for dims in (use.batch, use.contracted, use.free)
    )
    inputs, outputs = (
        set(views.split(view, group)) for group in (axes.inputs, axes.outputs)
    )
    if batch != set(views.split(view, stack)) or use.groups > 1:
        return None
    if (contracted, free) == (inputs, outputs):
        return "inputs"
    return "outputs" if (contracted, free) == (outputs, inputs) else None


def _contracted(view: View, axes: Axes, x: Array, use: Use, eqn: Any) -> Array | None:
    """What a LowRank view and x give, in the order of fewest FLOPs."""
    factors = contract.turned(view, axes, use)
    if factors is None:
        return None
    order = cost.cheapest(contract.workload(x, factors, use))
    contraction = contract.conv if use.kind == "conv" else contract.dot
    with views.context(eqn):
        return contraction(x, factors, use, eqn.params, order)


def _recorded(out: Array, operands: Any, slots: Sides, meeting: Meeting) -> Array:
    """`out` as it is; in the backward pass the slots get the sums of this use."""
    stack = slots.rows.ndim
    full = tuple(
        x is not None and x.ndim == stack + 2 for x in (slots.inputs, slots.outputs)
    )

    @jax.custom_vjp
    def identity(out: Array, operands: Any, slots: Sides) -> Array:
        return out

    def forward(out: Array, operands: Any, slots: Sides) -> tuple[Array, Any]:
        return out, operands

    def backward(operands: Any, gradient: Array) -> tuple[Array, None, Sides]:
        return gradient, None, sums(operands, gradient, meeting, full)

    identity.defvjp(forward, backward)
    # Under shard_map the sums of a device are its own: slots that vary as `out` does
    # have gradients that are added up over the devices.
    nothing = jnp.where(False, jnp.sum(out.astype(jnp.float32)), 0)
    nothing = jax.lax.stop_gradient(nothing)
    return identity(out, operands, jax.tree.map(lambda x: x + nothing, slots))
