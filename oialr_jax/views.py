"""A weight as the traced function sees it, before it meets an array.

Casts, transposes, reshapes, cuts, joins and scales change the description of a lazy
value and compute nothing of the size of the weight. `interpret.py` walks a program with
these values; a `Handler` says what their data is and what a contraction does.
"""

import contextlib
import dataclasses
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
    def of(cls, data: tuple[Any, ...], path: str, shape: Any, dtype: Any) -> "View":
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
    ) -> tuple[Any, ...]:
        """`data` with change(array, place of the axis in it) where the axis is."""
        ...

    def stacks(self, view: View, axis: int) -> bool:
        """Whether an axis of the leaf may be a stack of matrices."""
        ...

    def is_stack(self, view: View, axis: int) -> bool:
        """Whether it is one, as far as this is known."""
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


def scan_sizes(params: Any) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many its carry."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry = params["ft_in"].unpack()[:2]  # from jax 0.12 on, one flat tree
    return len(consts), len(carry)


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
