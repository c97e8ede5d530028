"""Finds the matrices: the walk with leaves that record how they are used."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oialr_jax import interpret
from oialr_jax.lowrank import Axes, PyTree, is_low_rank, path_name, unique_names


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


def find_matrices(
    fn: Callable[..., Any], params: PyTree, *args: Any, **kwargs: Any
) -> tuple[Matrix, ...]:
    """The leaves of `params` that fn(params, *args, **kwargs) uses as matrices.

    The function is traced, never run, so arguments may be `jax.ShapeDtypeStruct`. The
    order is that of execution (of first use). A matrix is a leaf of two or more axes
    that a dot product or a convolution contracts over some of its axes and keeps
    others; what else happens to it is in `Matrix.other`.

    >>> w = jax.ShapeDtypeStruct((8, 2, 4), jnp.float32)
    >>> x = jax.ShapeDtypeStruct((32, 8), jnp.float32)
    >>> query = lambda p, x: jnp.einsum("bd,dhk->bhk", x, p["q"])
    >>> (q,) = find_matrices(query, {"q": w}, x)
    >>> q.path, q.m, q.n, q.rows
    ('q', 8, 8, 32)
    """
    traced = interpret.trace(fn, (params, *args), kwargs, is_low_rank)
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
        return [
            probe.materialize(out) if isinstance(out, interpret.View) else out
            for out in outputs
        ]

    jax.eval_shape(walk, *(_abstract(leaf) for _, leaf in traced.leaves))
    return probe.matrices()


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
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return _in_params(path) and leaf.ndim >= 2 and is_float


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

    def matrices(self) -> tuple[Matrix, ...]:
        return tuple(
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

    def materialize(self, view: interpret.View) -> Array:
        return interpret.arrange(view, view.data[0])

    def scale(self, view: interpret.View, factor: Any) -> interpret.View:
        return view

    def unstack(self, view: interpret.View, axis: int) -> tuple[Array, ...]:
        left = [a for a in range(len(view.leaf_shape)) if a not in view.taken]
        return (jnp.moveaxis(view.data[0], left.index(axis), 0),)

    def contract(
        self, view: interpret.View, x: Array, use: interpret.Use, eqn: Any
    ) -> Array | None:
        axes = _axes(view, use)
        if axes is None:
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
        self.other.setdefault(view.path, []).append(primitive)


def _axes(view: interpret.View, use: interpret.Use) -> Axes | None:
    """Stack, inputs and outputs of the leaf under one use, if whole axes go to each.

    Axes of size one that a squeeze or reshape dropped count as outputs.
    """

    def axes_of(dims: Sequence[int]) -> set[int]:
        return {atom.axis for d in dims for atom in view.dims[d]}

    stack = axes_of(use.batch).union(view.taken)
    inputs, outputs = axes_of(use.contracted), axes_of(use.free)
    if (
        not inputs
        or not outputs
        or stack & inputs
        or stack & outputs
        or inputs & outputs
    ):
        return None
    outputs |= set(range(len(view.leaf_shape))) - stack - inputs
    return Axes(view.leaf_shape, *(tuple(sorted(g)) for g in (stack, inputs, outputs)))


def _rows(x: Array, use: interpret.Use, eqn: Any) -> int:
    if use.kind == "conv":
        out, spec = eqn.outvars[0].aval, eqn.params["dimension_numbers"].out_spec
        return int(np.prod([out.shape[d] for d in (spec[0], *spec[2:])]))
    gone = (*use.x_contracted, *use.x_batch)
    return int(np.prod([s for d, s in enumerate(x.shape) if d not in gone]))
