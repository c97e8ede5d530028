"""Finds the matrices: the walk with leaves that record how they are used."""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oialr_jax import interpret
from oialr_jax.lowrank import (
    Axes,
    PyTree,
    is_low_rank,
    named_leaves,
    path_name,
    unique_names,
)


class Matrix(NamedTuple):
    """One leaf that a function uses as a matrix.

    `rows` is the number of rows that one call of the function sends through (batch x
    tokens, or batch x output positions for a convolution, per matrix of a stack).
    `uses` counts contractions in the program; a scanned body counts once. `other` names
    what else the function does with the leaf, or why it cannot be held in low rank.
    """

    path: str
    axes: Axes
    rows: int
    kind: str
    uses: int = 1
    other: tuple[str, ...] = ()

    @property
    def m(self) -> int:
        """Rows of the matrix: the fan-in."""
        return self.axes.m

    @property
    def n(self) -> int:
        """Columns of the matrix: the fan-out."""
        return self.axes.n


class Skipped(NamedTuple):
    """One leaf of two or more axes that is no matrix.

    `reason` names the primitives that use it otherwise, as JAX does, or says that it is
    never used, has no entries or is no float.
    """

    path: str
    shape: tuple[int, ...]
    reason: str


class Matrices(tuple[Matrix, ...]):
    """What `find_matrices` gives: a tuple of `Matrix`, and the leaves it did not take.

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
    what it changes in place stays as it is. The order is that of execution (of first
    use). A matrix is a leaf of two or more axes that a dot product or a convolution
    contracts over some of its axes and keeps others; what else happens to it is in
    `Matrix.other`. Other leaves of two or more axes are in the result's `skipped`, each
    with what stopped it; leaves that are no arrays (functions, strings, None) are left
    alone.

    Args:     axis_env: names and sizes of mapped axes that the function speaks of, as
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
    with interpret.axis_names(axes):
        traced = interpret.trace(
            fn, (params, *args), kwargs, is_low_rank, axis_env=axes
        )
    unique_names(path[2:] for path, _ in traced.leaves if _in_params(path))
    probe = _Probe()

    def walk(*arrays: Array) -> list[Array]:
        values = [
            interpret.View.of((array,), path_name(path[2:]), array.shape, array.dtype)
            if _is_candidate(path, array)
            else array
            for (path, _), array in zip(traced.leaves, arrays, strict=True)
        ]
        outputs = interpret.evaluate(traced.jaxpr, values, probe)
        for output, leaf in traced.replaced.items():
            view = values[leaf]
            if not isinstance(view, interpret.View):
                continue
            if interpret.is_same(outputs[output], view):
                outputs[output] = arrays[leaf]
            else:
                probe.unknown(view, "replaced in place")
        return [
            probe.output(out) if isinstance(out, interpret.View) else out
            for out in outputs
        ]

    abstract = [_abstract(leaf) for _, leaf in traced.leaves]
    jax.make_jaxpr(walk, axis_env=axes)(*abstract)
    return probe.matrices(named_leaves(params))


def select(
    matrices: Sequence[Matrix],
    *,
    min_aspect: float = 0.1,
    keep_first: int = 0,
    keep_last: int = 1,
    keep_eligible: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> tuple[Matrix, ...]:
    """The matrices to hold in low rank, in execution order.

    A matrix is eligible when min(m, n) > min_aspect * max(m, n) and every use of it is
    a contraction of the same axes (so a tied embedding is not). The first `keep_first`
    and the last `keep_last` matrices that the network executes stay dense, eligible or
    not; with `keep_eligible` they are counted among the eligible ones alone, which is
    what the authors' code does and which often spares the layer before the head.

    Args:     include: regular expressions; exactly the matrices whose path matches one
              are taken, whatever their shape, place and other uses. exclude: regular
              expressions; a match is never taken.
    Raises:   ValueError: a pattern matches no matrix, or `include` asks for a grouped
              convolution, whose groups one factorisation would mix.
    Source:   OIALR's rule for linear layers, here for convolutions too, where the
              authors' code tests one side only by mistake.
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
    square = [
        x
        for x in matrices
        if min(x.m, x.n) > min_aspect * max(x.m, x.n) and x.path not in excluded
    ]
    eligible = [x for x in square if not x.other]
    kept = eligible if keep_eligible else matrices
    dense = {
        x.path for x in (*kept[:keep_first], *kept[max(0, len(kept) - keep_last) :])
    }
    grouped = [x for x in square if _groups(x) and x.path not in dense]
    if grouped:
        listed = ", ".join(f"{x.path} ({_groups(x)})" for x in grouped)
        warnings.warn(f"left dense: {listed}", stacklevel=2)
    return tuple(x for x in eligible if x.path not in dense)


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
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


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
    rows: int
    kind: str
    uses: int
    other: list[str]


class _Probe:
    """Handler whose views hold the dense leaf and which notes every use of it.

    Mutable, and filled while the walk is traced. A body may be traced more than once,
    so a contraction is known by its equation.
    """

    def __init__(self) -> None:
        self.records: dict[str, _Record] = {}
        self.seen: dict[tuple[str, int], Any] = {}
        self.other: dict[str, list[str]] = {}
        self.outputs: set[str] = set()
        self.detail = ""  # of the contraction that is about to be unknown

    def matrices(self, leaves: Mapping[str, Any]) -> Matrices:
        matrices = (
            Matrix(
                path=path,
                axes=record.axes,
                rows=record.rows,
                kind=record.kind,
                uses=record.uses,
                other=tuple(dict.fromkeys(record.other + self.other.get(path, []))),
            )
            for path, record in self.records.items()
        )
        skipped = (
            Skipped(path, tuple(leaf.shape), _unfit(leaf) or self.reason(path))
            for path, leaf in leaves.items()
            if len(getattr(leaf, "shape", ())) >= 2 and path not in self.records
        )
        return Matrices(matrices, skipped)

    def reason(self, path: str) -> str:
        """Why a leaf is no matrix."""
        found = [*self.other.get(path, ()), *["output"] * (path in self.outputs)]
        return ", ".join(dict.fromkeys(found)) or "never used"

    def output(self, view: interpret.View) -> Array:
        self.outputs.add(view.path)
        return self.materialize(view)

    def materialize(self, view: interpret.View) -> Array:
        return interpret.arrange(view, view.data[0])

    def scale(
        self, view: interpret.View, times: Callable[[Array], Array]
    ) -> interpret.View:
        return view.replace(data=(times(view.data[0]),))

    def unstack(self, view: interpret.View, axis: int) -> tuple[Array, ...]:
        left = [a for a in range(len(view.leaf_shape)) if a not in view.taken]
        return (jnp.moveaxis(view.data[0], left.index(axis), 0),)

    def contract(
        self, view: interpret.View, x: Array, use: interpret.Use, eqn: Any
    ) -> Array | None:
        axes = _axes(view, use)
        if isinstance(axes, str):
            self.detail = axes
            return None
        if (view.path, id(eqn)) not in self.seen:
            self.seen[view.path, id(eqn)] = eqn  # held, so that its id stays its own
            self.note(view.path, axes, use, _rows(x, use, eqn))
        operands = [x, x]
        operands[use.position] = self.materialize(view)
        return interpret.bind(eqn, operands)[0]

    def note(self, path: str, axes: Axes, use: interpret.Use, rows: int) -> None:
        record = self.records.setdefault(path, _Record(axes, rows, use.kind, 0, []))
        record.uses += 1
        record.rows = max(record.rows, rows)
        if use.groups > 1:
            record.other.append(f"grouped convolution, {use.groups} groups")
        turned = dataclasses.replace(axes, inputs=axes.outputs, outputs=axes.inputs)
        if record.axes not in (axes, turned):
            record.other.append(f"{use.kind} over other axes")

    def unknown(self, view: interpret.View, primitive: str) -> None:
        said = f"{primitive} {self.detail}".rstrip()
        self.detail = ""
        self.other.setdefault(view.path, []).append(said)


def _axes(view: interpret.View, use: interpret.Use) -> Axes | str:
    """Stack, inputs and outputs of the leaf under one use, or why it has none.

    Axes of size one that a squeeze or reshape dropped count as outputs.
    """

    def axes_of(dims: Sequence[int]) -> set[int]:
        return {atom.axis for d in dims for atom in view.dims[d]}

    stack = axes_of(use.batch).union(view.taken)
    inputs, outputs = axes_of(use.contracted), axes_of(use.free)
    if not inputs:
        return "over no axis"
    if not outputs:
        return "over every axis"
    if stack & inputs or stack & outputs or inputs & outputs:
        return "over part of an axis"
    outputs |= set(range(len(view.leaf_shape))) - stack - inputs
    return Axes(view.leaf_shape, *(tuple(sorted(g)) for g in (stack, inputs, outputs)))


def _rows(x: Array, use: interpret.Use, eqn: Any) -> int:
    if use.kind == "conv":
        out, spec = eqn.outvars[0].aval, eqn.params["dimension_numbers"].out_spec
        return int(np.prod([out.shape[d] for d in (spec[0], *spec[2:])]))
    gone = (*use.x_contracted, *use.x_batch)
    return int(np.prod([s for d, s in enumerate(x.shape) if d not in gone]))
