"""Finds the matrices: the walk with leaves that record how they are used."""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from oialr_jax import cost, interpret, readers, tracing, views
from oialr_jax.compiling import dtype_of
from oialr_jax.lowrank import (
    Axes,
    PyTree,
    is_node,
    named_leaves,
    path_name,
    unique_names,
)
from oialr_jax.renames import renamed
from oialr_jax.views import Use, View, as_array, is_same


class Matrix(NamedTuple):
    """One leaf that a function uses as a matrix.

    `rows` is the number of rows that one call of the function multiplies by it (batch
    size x tokens, or x output positions of a convolution, per matrix of a stack).
    `uses` counts contractions in the program; a scanned body counts once. `other` names
    what else the function does with the leaf, or why it cannot be held in low rank.
    `is_head` says that no other matrix reads its result. `loads` has what each
    use costs in a training step, at full rank, in entries of `itemsize` bytes.
    """

    path: str
    axes: Axes
    rows: int
    kind: str
    uses: int = 1
    other: tuple[str, ...] = ()
    is_head: bool = False
    loads: tuple[cost.Workload, ...] = ()
    itemsize: int = 4

    @property
    def m(self) -> int:
        """Rows of the matrix: the fan-in."""
        return self.axes.m

    @property
    def n(self) -> int:
        """Columns of the matrix: the fan-out."""
        return self.axes.n

    def weights(self, rank: int | None = None) -> int:
        """Weights that are stored, dense or at a rank: both bases and the core."""
        m, n, stack = self.m, self.n, math.prod(self.axes.l)
        return stack * (m * n if rank is None else rank * (m + n + rank))

    def seconds(self, rank: int | None = None, *, rates: cost.Rates) -> float:
        """Estimated time of a training step on a device, dense or at a rank."""
        loads = [dataclasses.replace(x, rank=rank or x.rank) for x in self.loads]
        size = self.itemsize
        orders = [
            cost.Order.DENSE if rank is None else cost.cheapest(x, rates, size)
            for x in loads
        ]
        return sum(
            cost.seconds(order, x, rates, size)
            for order, x in zip(orders, loads, strict=True)
        )

    def flops(self, rank: int | None = None, rates: cost.Rates | None = None) -> int:
        """FLOPs of a training step, dense or at a rank.

        Args:     rates: of the device, which decide on the order of each use; without
                  them it is the one of least FLOPs.
        Raises:   ValueError: a rank outside [1, min(m, n)].
        """
        if rank is None:
            return sum(cost.flops(cost.Order.DENSE, x).total for x in self.loads)
        full = min(self.m, self.n)
        if not 1 <= rank <= full:
            raise ValueError(
                f"`rank` must be in [1, {full}] for {self.path}, got {rank}"
            )
        loads = [dataclasses.replace(x, rank=rank) for x in self.loads]
        orders = [cost.cheapest(x, rates, self.itemsize) for x in loads]
        return sum(cost.flops(*use).total for use in zip(orders, loads, strict=True))


class Skipped(NamedTuple):
    """One leaf of two or more axes that is no matrix.

    `reason` names the primitives that use it otherwise, as JAX does, or says that it is
    never used, has no entries or is no float.
    """

    path: str
    shape: tuple[int, ...]
    reason: str


class Matrices(tuple[Matrix, ...]):
    """The result of `find_matrices`: a tuple of `Matrix`, and the other leaves.

    Every leaf of two or more axes is either in the tuple or in `skipped`. Prints as a
    table.
    """

    skipped: tuple[Skipped, ...]

    def __new__(
        cls, matrices: Iterable[Matrix] = (), skipped: Iterable[Skipped] = ()
    ) -> "Matrices":
        """The matrices in the order of their execution, and other leaves."""
        self = super().__new__(cls, matrices)
        self.skipped = tuple(skipped)
        return self

    def __str__(self) -> str:
        width = max([len(x.path) for x in self] + [6])
        lines = [f"{'matrix':<{width}}  kind     rows        shape  uses  other"]
        lines += [
            f"{x.path:<{width}}  {x.kind:<4} {x.rows:>8} {f'{x.m}x{x.n}':>12} "
            f"{x.uses:>5}  {', '.join(x.other)}".rstrip()
            for x in self
        ]
        return "\n".join([*lines, *skipped_lines(self.skipped)])


def skipped_lines(skipped: Sequence[Skipped]) -> list[str]:
    """The leaves that are no matrices as lines of a table."""
    width = max([len(x.path) for x in skipped] + [0])
    lines = [f"{x.path:<{width}}  {list(x.shape)}  {x.reason}" for x in skipped]
    return ["no matrices:", *lines] if lines else []


def find_matrices(
    fn: Callable[..., Any],
    params: PyTree,
    *args: Any,
    axis_env: Iterable[tuple[str, int]] = (),
    **kwargs: Any,
) -> Matrices:
    """The leaves of `params` that fn(params, *args, **kwargs) uses as matrices.

    The function is traced, never run, so arguments may be `jax.ShapeDtypeStruct`, and
    nothing is changed in place. Matrices are in the order of execution (of their first
    use). A matrix is a leaf of two or more axes, of which a dot product or convolution
    contracts some and keeps others; `Matrix.other` names its other uses. Other leaves
    of two or more axes are in the result's `skipped`, each with the reason; leaves that
    are no arrays (functions, strings, None) are ignored.

    Args:     axis_env: names and sizes of mapped axes that the function uses, as
              `nn.BatchNorm(axis_name="batch")` does: [("batch", 8)].
    Raises:   ValueError: the function uses an axis that `axis_env` does not name.

    >>> w = jax.ShapeDtypeStruct((8, 2, 4), jnp.float32)
    >>> x = jax.ShapeDtypeStruct((32, 8), jnp.float32)
    >>> query = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["q"])
    >>> (q,) = find_matrices(query, {"q": w}, x)
    >>> q.path, q.m, q.n, q.rows
    ('q', 8, 8, 32)
    """
    axes = tuple(dict(axis_env).items())
    with tracing.axis_names(axes):
        traced = tracing.trace(fn, (params, *args), kwargs, is_node, axis_env=axes)
    unique_names(path[2:] for path, _ in traced.leaves if _in_params(path))
    probe = _Probe()

    def walk(*arrays: Array) -> list[Any]:
        values = [
            View.of((array,), path_name(path[2:]), array.shape, array.dtype)
            if _is_candidate(path, array)
            else array
            for (path, _), array in zip(traced.leaves, arrays, strict=True)
        ]
        probe.shapes = {x.path: x.leaf_shape for x in values if isinstance(x, View)}
        fixed = [not _in_params(path) for path, _ in traced.leaves]
        outputs = interpret.evaluate(traced.jaxpr, values, probe, fixed)
        for output, leaf in traced.replaced.items():
            view = values[leaf]
            if not isinstance(view, View):
                continue
            if is_same(outputs[output], view):
                outputs[output] = arrays[leaf]
            else:
                probe.unknown(view, "replaced in place")
        probe.outputs = {x.path for x in outputs if isinstance(x, View)}
        return [
            probe.materialize(x)
            if isinstance(x, View)
            else as_array(x, probe, "output")
            for x in outputs
        ]

    abstract = [_abstract(leaf) for _, leaf in traced.leaves]
    walked = jax.make_jaxpr(walk, axis_env=axes)(*abstract)
    return probe.matrices(named_leaves(params, is_node), readers.read_by_others(walked))


@renamed(
    keep_first="dense_first", keep_last="dense_last", keep_eligible="among_eligible"
)
def select(
    matrices: Sequence[Matrix],
    *,
    min_aspect: float | None = None,
    dense_first: int = 0,
    dense_last: int = 1,
    among_eligible: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> tuple[Matrix, ...]:
    """The matrices to hold in low rank, in execution order.

    A matrix is eligible when every use of it is a contraction of the same axes (so a
    tied embedding is not), a quarter of its rank pays, in stored weights and in FLOPs,
    and there are ranks to choose from: it has at least `SHORT` rows and columns, or is
    about square, min(m, n) > 0.1 max(m, n). With `min_aspect` that takes the place of
    0.1, and decides alone.

    The first `dense_first` and the last `dense_last` matrices that the network executes
    stay dense, eligible or not; and if any of the last do, so does every head, a matrix
    whose result no other matrix reads. With `among_eligible` only eligible matrices are
    counted, as in the authors' code, which often spares the layer before the head.

    Args:     include: regular expressions; exactly the matrices whose path matches one
              are taken, whatever their shape, place and other uses. exclude: regular
              expressions; a match is never taken.
    Raises:   ValueError: a pattern matches no matrix, or `include` asks for a grouped
              convolution, whose groups one factorisation would mix.
    Source:   OIALR's rule for linear layers is min_aspect=0.1, among_eligible=True,
              here for convolutions too, where the authors' code tests one side only by
              mistake.
    """
    matrices = tuple(matrices)
    included = _matching(matrices, include, "include")
    excluded = _matching(matrices, exclude, "exclude") or set()
    if included is not None:
        chosen = [x for x in matrices if x.path in included - excluded]
        for x in chosen:
            if _groups(x):
                raise ValueError(f"`include` asks for {x.path}, a {_groups(x)}")
        return tuple(chosen)
    fitting = [x for x in matrices if _fits(x, min_aspect) and x.path not in excluded]
    eligible = [x for x in fitting if not x.other]
    counted = eligible if among_eligible else matrices
    heads = [x for x in matrices if x.is_head and dense_last and not among_eligible]
    last = counted[max(0, len(counted) - dense_last) :]
    dense = {x.path for x in (*counted[:dense_first], *last, *heads)}
    grouped = [x for x in fitting if _groups(x) and x.path not in dense]
    if grouped:
        listed = ", ".join(f"{x.path} ({_groups(x)})" for x in grouped)
        warnings.warn(f"left dense: {listed}", stacklevel=3)  # 2 is `renamed`
    return tuple(x for x in eligible if x.path not in dense)


SHORT = 32
"""Rows or columns of a long matrix from which on low rank has ranks to choose from."""


def _fits(matrix: Matrix, min_aspect: float | None) -> bool:
    """Whether a matrix is one that low rank serves, by its shape and cost."""
    short, long = sorted((matrix.m, matrix.n))
    if min_aspect is not None:
        return short > min_aspect * long
    rank = max(1, short // 4)
    weights = rank * (matrix.m + matrix.n + rank)
    pays = weights <= matrix.m * matrix.n and matrix.flops(rank) <= matrix.flops()
    return pays and (short >= SHORT or short > 0.1 * long)


def _matching(
    matrices: Sequence[Matrix], patterns: str | Iterable[str] | None, name: str
) -> set[str] | None:
    if patterns is None:
        return None
    matched = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {x.path for x in matrices if re.search(pattern, x.path)}
        if not hits:
            known = ", ".join(x.path for x in matrices)
            raise ValueError(f"`{name}` {pattern!r} matches none of: {known}")
        matched |= hits
    return matched


def _groups(matrix: Matrix) -> str:
    return next((o for o in matrix.other if o.startswith("grouped")), "")


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, dtype_of(leaf))


def _in_params(path: tuple[Any, ...]) -> bool:
    """Whether a leaf is of the first argument: its path is (args, 0, ...)."""
    return path[0].idx == 0 and getattr(path[1], "idx", None) == 0


def _is_candidate(path: tuple[Any, ...], leaf: Any) -> bool:
    return _in_params(path) and leaf.ndim >= 2 and not _unfit(leaf)


def _unfit(leaf: Any) -> str:
    """Why a leaf cannot be a matrix, whatever is done with it."""
    if isinstance(leaf, jax.Ref):
        return "held in a jax.Ref"
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return f"{leaf.dtype}, no float"
    return "" if math.prod(leaf.shape) else "no entries"


@dataclasses.dataclass
class _Record:
    axes: Axes
    single: frozenset[int]  # axes that are of size one in every use so far
    rows: int
    kind: str
    loads: list[cost.Workload]
    itemsize: int
    other: list[str]


class _Probe:
    """Handler whose views hold the dense leaf and which notes every use of it.

    Mutable, and filled while the walk is traced. A body may be traced more than once,
    so a contraction is known by its equation.
    """

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.records: dict[str, _Record] = {}
        self.seen: dict[tuple[str, tuple[int, ...]], Any] = {}
        self.other: dict[str, list[str]] = {}
        self.sides: dict[str, dict[frozenset[int], str]] = {}
        self.outputs: set[str] = set()
        self.detail = ""  # of the contraction that is about to be unknown

    def matrices(self, leaves: Mapping[str, Any], read: Collection[str]) -> Matrices:
        """What was found; `read` are the matrices whose result another one reads."""
        matrices = (
            Matrix(
                path=path,
                axes=record.axes,
                rows=record.rows,
                kind=record.kind,
                uses=len(record.loads),
                other=tuple(dict.fromkeys(self.others(path, record))),
                is_head=path not in read,
                loads=tuple(record.loads),
                itemsize=record.itemsize,
            )
            for path, record in self.records.items()
        )
        skipped = (
            Skipped(path, tuple(leaf.shape), _unfit(leaf) or self.reason(path))
            for path, leaf in leaves.items()
            if len(getattr(leaf, "shape", ())) >= 2 and path not in self.records
        )
        return Matrices(matrices, skipped)

    def others(self, path: str, record: _Record) -> list[str]:
        """What is done with a matrix besides contractions of the same axes."""
        found = record.other + self.other.get(path, [])
        rows, columns = {*record.axes.inputs}, {*record.axes.outputs}
        for axes, primitive in self.sides.get(path, {}).items():
            both = axes & rows and axes & columns
            part = any(0 < len(axes & side) < len(side) for side in (rows, columns))
            if (primitive == "mul" and both) or (primitive == "reduce_sum" and part):
                found.append(primitive)
        return found

    def reason(self, path: str) -> str:
        """Why a leaf is no matrix."""
        known = [*self.other.get(path, ()), *self.sides.get(path, {}).values()]
        known += ["output"] * (path in self.outputs)
        return ", ".join(dict.fromkeys(known)) or "never used"

    def materialize(self, view: View) -> Array:
        return views.arrange(view, view.data[0])

    def along(
        self, view: View, axis: int, change: Callable[[Array, int], Array]
    ) -> tuple[Array, ...]:
        return (change(view.data[0], view.present.index(axis)),)

    def stacks(self, view: View, axis: int) -> bool:
        return True

    def is_stack(self, view: View, axis: int) -> bool:
        return False

    def scale(self, view: View, factor: Array, axes: tuple[int, ...]) -> View | None:
        if len(view.present) == len(axes) > 1:
            return None  # along rows and columns, whichever are which
        if axes:
            self.sides.setdefault(view.path, {})[frozenset(axes)] = "mul"
        over = views.over_axes(view, factor, view.present).astype(view.data[0].dtype)
        return view.replace(data=(view.data[0] * over,))

    def sum_squares(self, view: View, dims: tuple[int, ...]) -> Array | None:
        left = [d for d in range(len(view.dims)) if d not in dims]
        axes, rest = (
            frozenset(atom.axis for atom in views.atoms(view, x)) for x in (dims, left)
        )
        if axes & rest:
            return None  # over part of an axis
        self.sides.setdefault(view.path, {})[axes] = "reduce_sum"
        return jnp.sum(jnp.square(self.materialize(view)), dims)

    def contract(
        self, view: View, x: Array, use: Use, eqn: Any, rest: Sequence[Any] = ()
    ) -> Array | None:
        axes = _axes(view, use, self.shapes[view.path])
        if isinstance(axes, str):
            self.detail = axes
            return None
        if (view.path, use.place) not in self.seen:
            self.seen[view.path, use.place] = eqn
            self.note(view, axes, use, x)
        operands = [readers.reads(view.path, x)] * 2
        operands[use.position] = self.materialize(view)
        (out,) = views.bind(eqn, [*operands, *rest])
        return readers.gives(view.path, out)

    def note(self, view: View, axes: Axes, use: Use, x: Array) -> None:
        m, n, stack = (
            math.prod(view.shape[d] for d in dims)
            for dims in (use.contracted, use.free, use.batch)
        )
        load = cost.Workload(
            rows=use.rows,
            m=m,
            n=n,
            rank=min(m, n),
            window=m // x.shape[use.x_contracted[0]] if use.kind == "conv" else 0,
            stack=stack,
            input_gradient=not use.x_fixed,
        )
        itemsize = jnp.promote_types(x.dtype, view.dtype).itemsize
        single = frozenset(a for a, n in enumerate(view.leaf_shape) if n == 1)
        record = self.records.setdefault(
            view.path, _Record(axes, single, use.rows, use.kind, [], itemsize, [])
        )
        record.loads.append(load)
        record.rows = max(record.rows, use.rows)
        if use.groups > 1:
            record.other.append(f"grouped convolution, {use.groups} groups")
        if not _agree(record.axes, axes, record.single | single):
            record.other.append(f"{use.kind} over other axes")
        elif single < record.single:  # this use tells what the axis is
            record.axes, record.single = axes, single

    def unknown(self, view: View, primitive: str) -> None:
        said = f"{primitive} {self.detail}".rstrip()
        self.detail = ""
        self.other.setdefault(view.path, []).append(said)


def _agree(one: Axes, other: Axes, single: frozenset[int]) -> bool:
    """Whether two uses contract the same axes, or one of them the transposed matrix.

    Axes of which a use sees one entry alone may be anything in it.
    """

    def groups(axes: Axes) -> list[set[int]]:
        return [{*x} - single for x in (axes.stack, axes.inputs, axes.outputs)]

    (stack, inputs, outputs), theirs = groups(one), groups(other)
    return theirs in ([stack, inputs, outputs], [stack, outputs, inputs])


def _axes(view: View, use: Use, shape: tuple[int, ...]) -> Axes | str:
    """Stack, inputs and outputs of the leaf under one use, or why it has none.

    An axis of which one entry was taken is a stack. Other axes of size one that a
    squeeze or reshape dropped count as outputs.
    """

    def axes_of(dims: Sequence[int]) -> set[int]:
        return {atom.axis for d in dims for atom in view.dims[d]}

    shown = axes_of(range(len(view.dims)))
    single = {a for a, n in enumerate(shape) if view.leaf_shape[a] == 1 < n}
    stack = axes_of(use.batch).union(view.taken, single - shown)
    inputs, outputs = axes_of(use.contracted), axes_of(use.free)
    if not inputs:
        return "over no axis"
    if not outputs:
        return "over every axis"
    if stack & inputs or stack & outputs or inputs & outputs:
        return "over part of an axis"
    if {*view.indexed} & (inputs | outputs):
        return "over an axis that is indexed"
    outputs |= set(range(len(shape))) - stack - inputs
    return Axes(shape, *(tuple(sorted(g)) for g in (stack, inputs, outputs)))
