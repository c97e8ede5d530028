"""A weight as the traced function sees it, before it meets an array.

Casts, transposes, reshapes, cuts, joins and scales change the description of a lazy
value and compute nothing of the size of the weight. `interpret.py` walks a program with
these values; a `Handler` says what their data is and what a contraction does.
"""

import contextlib
import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array


class Atom(NamedTuple):
    """A factor of one axis of the leaf: `size` entries, `stride` apart along it."""

    axis: int
    stride: int
    size: int


Dims = tuple[tuple[Atom, ...], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A leaf after casts, transposes, reshapes, cuts and scales.

    `data` holds the leaf's arrays in the leaf's own layout, without the axes in
    `taken`; `leaf_shape` is the shape of the leaf as far as it is cut. `dims` names,
    for each dimension of the present value, the atoms of the leaf's axes that it runs
    over, slowest first; a dimension of size one may be empty. `indexed` are axes of
    which an array of indices took entries. `whole` says that nothing was cut from the
    rows and columns of the matrix, nor scaled.
    """

    data: Any  # arrays, or what JAX puts in their place when it rebuilds the node
    path: str = dataclasses.field(metadata={"static": True})
    leaf_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dims: Dims = dataclasses.field(metadata={"static": True})
    taken: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    indexed: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    whole: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def of(cls, data: tuple[Array, ...], path: str, shape: Any, dtype: Any) -> "View":
        """The view of a whole leaf."""
        dims = tuple((Atom(axis, 1, size),) for axis, size in enumerate(shape))
        return cls(data, path, tuple(shape), dims, (), jnp.dtype(dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the present value."""
        return tuple(math.prod(atom.size for atom in dim) for dim in self.dims)

    @property
    def present(self) -> tuple[int, ...]:
        """The axes of the leaf that `data` has."""
        return tuple(a for a in range(len(self.leaf_shape)) if a not in self.taken)

    def replace(self, **changes: Any) -> "View":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """Views and arrays one after the other along a dimension, not yet concatenated."""

    parts: tuple[Any, ...]
    dim: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the concatenated value."""
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(x.shape[self.dim] for x in self.parts)
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        """Dtype of all parts."""
        return self.parts[0].dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Squares:
    """The squares of a view's entries times a scalar, plus an array; not yet summed."""

    view: View
    scale: Any
    plus: Any
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the present value."""
        return self.view.shape


LAZY = (View, Joined, Squares)


class Use(NamedTuple):
    """How a contraction uses a view: its dimensions, and those of the array it meets.

    `contracted`, `batch` and `free` are dimensions of the view, `x_contracted` and
    `x_batch` the partners of the first two in the array. `position` is the operand
    that the view is. `rows` pass through each matrix. `groups` is above one for a
    grouped convolution. `x_fixed` says that the array comes from data alone, so that no
    gradient goes to it. `place` tells contractions apart: the equation, and which one
    of the views that are joined for it.
    """

    kind: str
    position: int
    contracted: tuple[int, ...]
    batch: tuple[int, ...]
    free: tuple[int, ...]
    x_contracted: tuple[int, ...]
    x_batch: tuple[int, ...]
    rows: int = 0
    groups: int = 1
    x_fixed: bool = False
    place: tuple[int, ...] = ()


@runtime_checkable
class Handler(Protocol):
    """What a walk does with views; `data` is the handler's own."""

    def materialize(self, view: View) -> Array:
        """The present value as an array."""
        ...

    def along(
        self, view: View, axis: int, change: Callable[[Array, int], Array]
    ) -> tuple[Array, ...]:
        """`data` with change(array, place of the axis in it) where the axis is."""
        ...

    def stacks(self, view: View, axis: int) -> bool:
        """Whether an axis of the leaf may be a stack of matrices."""
        ...

    def scale(self, view: View, factor: Array, axes: tuple[int, ...]) -> View | None:
        """The view times `factor`, which varies along these axes of the leaf alone.

        `factor` is a scalar or has the view's dimensions, of size one or full.
        """
        ...

    def sum_squares(self, view: View, dims: tuple[int, ...]) -> Array | None:
        """The sum of the squares of the entries over some dimensions."""
        ...

    def contract(
        self, view: View, x: Array, use: Use, eqn: Any, rest: Sequence[Any] = ()
    ) -> Array | None:
        """The result of a contraction, or None to have the view materialised.

        `rest` are the operands beside weight and x: the group sizes of a ragged one.
        """
        ...

    def unknown(self, view: View, primitive: str) -> None:
        """A view is about to be materialised for a primitive that has no rule."""
        ...


def as_array(value: Any, handler: Handler, primitive: str) -> Any:
    """The value itself, or a lazy one materialised and reported under `primitive`."""
    if isinstance(value, Joined):
        parts = [as_array(part, handler, primitive) for part in value.parts]
        return jnp.concatenate(parts, value.dim)
    if isinstance(value, Squares):
        handler.unknown(value.view, primitive)
        squares = jnp.square(handler.materialize(value.view)) * value.scale
        return (squares + value.plus).astype(value.dtype)
    if isinstance(value, View):
        handler.unknown(value, primitive)
        return handler.materialize(value)
    return value


def is_same(value: Any, view: Any) -> bool:
    """Whether a value is a view that was not changed."""
    if not isinstance(value, View) or not isinstance(view, View):
        return False
    return (
        (value.path, value.dims, value.dtype) == (view.path, view.dims, view.dtype)
        and (value.taken, value.leaf_shape) == (view.taken, view.leaf_shape)
        and all(map(operator.is_, value.data, view.data))
    )


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of one equation on arrays."""
    params = eqn.primitive.get_bind_params(eqn.params)
    with context(eqn):
        out = eqn.primitive.bind(*values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def context(eqn: Any) -> Iterator[None]:
    """The settings under which an equation was traced, and its name for profilers."""
    name = str(eqn.source_info.name_stack)
    scope = jax.named_scope(name) if name else contextlib.nullcontext()
    with eqn.ctx.manager, scope:
        yield


# The atoms of a view


def atoms(view: View, dims: Sequence[int]) -> tuple[Atom, ...]:
    """Atoms of some dimensions, in order, without those of size one."""
    return tuple(a for d in dims for a in view.dims[d] if a.size > 1)


def split(view: View, axes: Sequence[int]) -> list[Atom]:
    """All atoms of some axes of the leaf, axis by axis, slowest first."""
    present = {atom for dim in view.dims for atom in dim if atom.size > 1}
    return [
        atom
        for axis in axes
        for atom in sorted(
            (a for a in present if a.axis == axis), key=lambda a: -a.stride
        )
    ]


def arrange(view: View, array: Array) -> Array:
    """The present value, from the dense leaf in its own layout without taken axes."""
    order = split(view, view.present)
    wanted = atoms(view, range(len(view.dims)))
    array = array.reshape([atom.size for atom in order])
    array = jnp.transpose(array, [order.index(atom) for atom in wanted])
    return array.reshape(view.shape).astype(view.dtype)


def over_axes(view: View, factor: Array, axes: Sequence[int]) -> Array:
    """A factor that varies along some axes of the leaf alone, as an array over these.

    It has the view's dimensions, of size one where it does not vary, or none.
    """
    if factor.ndim == 0:
        return factor
    known, sizes = [], []
    for dim, size in zip(view.dims, factor.shape, strict=True):
        mine = [a for a in dim if a.size > 1]
        known += mine
        sizes += [a.size if size > 1 else 1 for a in mine]
    order = split(view, axes)
    others = [a for a in known if a not in order]
    array = jnp.transpose(
        factor.reshape(sizes), [known.index(a) for a in (*order, *others)]
    )
    array = array.reshape(array.shape[: len(order)])
    array = jnp.broadcast_to(array, [a.size for a in order])
    return array.reshape([view.leaf_shape[a] for a in axes])


def whole_axis(view: View, dim: int) -> int | None:
    """The axis of the leaf that a dimension is, when it is exactly one whole axis."""
    if len(view.dims[dim]) != 1:
        return None
    axis, _, size = view.dims[dim][0]
    return axis if size == view.leaf_shape[axis] else None


# What changes the description of a lazy value. None: it cannot be described.


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
            return value.replace(data=tuple(map(of, value.data)))
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
