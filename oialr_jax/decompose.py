"""The decompositions of an event: batched, divided over devices, or compiled ahead.

An event is written once, in `surgery.py`, against a `Run`: `NOW` calls its programs,
`AHEAD` compiles them and hands shapes on in the place of arrays.
"""

import functools
import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import (
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)
from jaxtyping import Array

from oialr_jax import weighted
from oialr_jax.linalg import (
    alone,
    gram_singular_values,
    gram_svd,
    singular_values,
    svd,
)
from oialr_jax.lowrank import Axes, is_low_rank

Weights = tuple[Any, Any]
"""C and D of a matrix, (*l, m, m), or (*l, m, 1) for a diagonal; None: the identity."""

Sides = tuple[list[Any] | None, ...]
"""The C of all matrices of a group, and their D; () for one without weights."""


class Run(NamedTuple):
    """How the parts of an event are called, brought to the host, and spread.

    `put` places what a program would move by itself where an array is, as an explicit
    transfer: `jax.transfer_guard` can forbid others.
    """

    call: Callable[..., Any]
    get: Callable[[Any], Any]
    put: Callable[[Any, Any], Any]
    split: Callable[[Any, NamedSharding], list[Any]]
    join: Callable[[list[Any], NamedSharding], Any]
    agree: Callable[[Any], None]


def _compiled(fn: Any, *args: Any, **static: Any) -> Any:
    """Instead of fn(*args): its program compiled, and the shapes of the result."""
    program = fn.lower(*args, **static).compile()
    shapes = fn.eval_shape(*args, **static)
    if not any(map(is_committed, jax.tree.leaves(args))):
        return shapes
    return jax.tree.map(_shape_in, shapes, program.output_shardings)


def is_committed(x: Any) -> bool:
    """Whether an array, or the array that a shape stands for, has a fixed place."""
    return getattr(x, "committed", getattr(x, "sharding", None) is not None)


def _shape_in(x: Any, where: Sharding | None) -> jax.ShapeDtypeStruct:
    weak = getattr(x, "weak_type", False)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where, weak_type=weak)


def _expected(shapes: Any) -> Any:
    """What an event without trouble brings to the host: True, and numbers of no use."""
    return jax.tree.map(lambda x: np.full(x.shape, x.dtype == bool, x.dtype), shapes)


def _put(x: Any, beside: Any) -> Any:
    """x, an integer or an uncommitted array, replicated over the mesh of `beside`."""
    x = np.int32(x) if isinstance(x, int) else x
    known, where = _whole(beside)
    return jax.device_put(x, where) if known else x


def _put_shape(x: Any, beside: Any) -> Any:
    x = jax.ShapeDtypeStruct((), np.int32) if isinstance(x, int) else x
    return _shape_in(x, _whole(beside)[1])


def _whole(beside: Any) -> tuple[bool, Sharding | None]:
    """Whether `_put` can place something without asking other processes, and where."""
    where = beside.sharding if is_committed(beside) else None
    if isinstance(where, NamedSharding):
        where = NamedSharding(where.mesh, PartitionSpec())
    elif not isinstance(where, SingleDeviceSharding | None):
        return False, None
    known = where is None or where.is_fully_addressable
    return known, where if known else None


def _split(array: Any, where: NamedSharding) -> list[Any]:
    """The parts of an array, divided along its first axis, that this process holds."""
    return [x.data for x in sorted(array.addressable_shards, key=_first_row)]


def _first_row(shard: Any) -> int:
    return shard.index[0].start or 0


def _split_shapes(shape: Any, where: NamedSharding) -> list[Any]:
    found = where.addressable_devices_indices_map(shape.shape)
    devices = sorted(found, key=lambda x: (found[x] or (slice(0),))[0].start or 0)
    part = jax.ShapeDtypeStruct(where.shard_shape(shape.shape), shape.dtype)
    return [_shape_in(part, SingleDeviceSharding(x)) for x in devices]


def _join(parts: list[Any], where: NamedSharding) -> Any:
    shape = (parts[0].shape[0] * where.mesh.size, *parts[0].shape[1:])
    return jax.make_array_from_single_device_arrays(shape, where, parts)


def _join_shapes(parts: list[Any], where: NamedSharding) -> Any:
    shape = (parts[0].shape[0] * where.mesh.size, *parts[0].shape[1:])
    return jax.ShapeDtypeStruct(shape, parts[0].dtype, sharding=where)


def _agree(plan: Any) -> None:
    """Hosts that decided differently would wait for each other for ever: say so.

    Raises:   RuntimeError: processes of one run have not chosen the same.
    """
    if jax.process_count() == 1:
        return
    mine = np.uint32(zlib.crc32(repr(plan).encode()))
    found = multihost_utils.process_allgather(mine)
    if len(set(found.tolist())) > 1:
        raise RuntimeError(
            f"the processes of this run do not agree on the event {plan}: they need "
            "the same schedule, rank rule and state"
        )


NOW = Run(
    lambda fn, *args, **static: fn(*args, **static),
    jax.device_get,
    _put,
    _split,
    _join,
    _agree,
)
AHEAD = Run(
    _compiled, _expected, _put_shape, _split_shapes, _join_shapes, lambda _: None
)


class Solved(NamedTuple):
    """Where one leaf's part of a batched decomposition lies.

    `batch` has the singular values (b, k) of all matrices of a shape, and for SVDs the
    left and right vectors (b, a, k), (b, k, c) around them.
    """

    batch: tuple[Array, ...]
    start: int
    stack: tuple[int, ...]


def by_gram(axes: Axes, kept: int) -> bool:
    """Whether a dense matrix that is cut to `kept` is decomposed by its Gram matrix.

    From one and a half times as long as wide it is the cheaper way (on a CPU by 2.4 to
    6, `train/results/README.md`). At full rank all of W has to stay, which needs `svd`.
    """
    short, long = sorted((axes.m, axes.n))
    return kept < short and 2 * long >= 3 * short


def decomposed(
    leaves: Sequence[Any],
    axes: Sequence[Axes],
    run: Run,
    *,
    vectors: bool,
    kept: Sequence[int] | None = None,
    weights: Sequence[Weights | None] | None = None,
) -> list[Solved]:
    """Host side: the SVD, or singular values, of every core and every dense matrix.

    With `kept`, the ranks that the matrices are to be cut to, dense ones for which
    `by_gram` says so are not decomposed whole: there are only so many vectors, and
    small values are not accurate (`gram_svd`).

    A matrix that has weights is decomposed into `weighted.directions` instead.

    One program for all matrices of a shape. On a mesh each device has a program of its
    own for its share of them, so that every matrix is decomposed once and every process
    gets the same numbers. On a CPU one after the other (`alone`): they use all threads.

    Raises:   TypeError: a leaf is traced.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(list(leaves))):
        raise TypeError(
            "the params are traced, and matrices are decomposed on the host, by value: "
            "call factorize, truncate, choose and project between the steps, outside "
            "of jax.jit, jax.grad, jax.vmap and jax.shard_map"
        )
    weighing = [None] * len(leaves) if weights is None else weights
    groups: dict[Any, list[int]] = defaultdict(list)
    middle = [x.s if is_low_rank(x) else x for x in leaves]
    views = [None if is_low_rank(x) else a for x, a in zip(leaves, axes, strict=True)]
    for i, (array, view) in enumerate(zip(middle, views, strict=True)):
        side = array.shape[-2:] if view is None else (view.m, view.n)
        form = _form(weighing[i])
        cut = view is not None and kept is not None and by_gram(view, kept[i])
        cut = cut and form is None  # gram_svd has no weights
        groups[side, array.dtype, cut, form].append(i)
    mesh = mesh_of(middle)
    load = [0] * (1 if mesh is None else mesh.size)
    results: dict[int, Solved] = {}
    for (side, _, cut, form), group in sorted(
        groups.items(), key=lambda x: -math.prod(x[0][0]) * min(x[0][0])
    ):
        arrays = [middle[i] for i in group]
        shapes = tuple(views[i] for i in group)
        sides = _columns([weighing[i] for i in group], form)
        rank = max(kept[i] for i in group) if cut and kept else None
        how = {"vectors": vectors, "rank": rank}
        start = 0
        if mesh is None:
            batch = alone(run.call(_solved_group, arrays, sides, axes=shapes, **how))
        else:
            count = sum(math.prod(axes[i].l) for i in group)
            share = _share(count, math.prod(side) * min(side), load)
            start = share.first * share.each
            batch = _solved_on_mesh(arrays, sides, shapes, share, mesh, run, how)
        for i in group:
            results[i] = Solved(batch, start, axes[i].l)
            start += math.prod(axes[i].l)
    return [results[i] for i in range(len(leaves))]


def _form(weights: Weights | None) -> tuple[int | None, ...] | None:
    """Of weights that can be stacked: the axes of each side, None for the identity."""
    if weights is None:
        return None
    return tuple(None if x is None else x.shape[-1] for x in weights)


def _columns(
    weights: Sequence[Weights | None], form: tuple[int | None, ...] | None
) -> Sides:
    """The weights of a group, side by side, without what all of them lack."""
    if form is None:
        return ()
    return tuple(
        None if size is None else [x[i] for x in weights if x is not None]
        for i, size in enumerate(form)
    )


def mesh_of(arrays: Sequence[Any]) -> Any:
    """The mesh that holds the params, if it has more than one device, or None."""
    for array in arrays:
        sharding = getattr(array, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


class _Share(NamedTuple):
    """Which devices of a mesh decompose a batch: `used` from `first`, `each` apiece."""

    first: int
    used: int
    each: int


def _share(count: int, cost: int, load: list[int]) -> _Share:
    """The share of a batch of `count`, where the devices have least to do; adds to it.

    >>> load = [0, 0, 0, 0]
    >>> _share(6, 1, load), load
    (_Share(first=0, used=3, each=2), [2, 2, 2, 0])
    >>> _share(1, 1, load).first
    3
    """
    each = -(-count // len(load))
    used = -(-count // each)
    first = min(range(len(load) - used + 1), key=lambda k: (max(load[k : k + used]), k))
    for k in range(first, first + used):
        load[k] += each * cost
    return _Share(first, used, each)


def _solved_on_mesh(
    arrays: list[Any],
    sides: Sides,
    axes: tuple[Axes | None, ...],
    share: _Share,
    mesh: Mesh,
    run: Run,
    how: dict[str, Any],
) -> tuple[Any, ...]:
    """The batch of `_solved_group`, with `share.each` rows for every device.

    Vectors of dense matrices stay divided over the devices, along their long axis: no
    device ever holds all of them. What cores give is small and goes to every device.
    """
    devices = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def split(arrays: list[Any], axes: tuple[Axes | None, ...]) -> list[Any]:
        spread = run.call(_spread, arrays, axes=axes, share=share, where=devices)
        return run.split(spread, devices)

    here = _positions(devices)
    local = split(arrays, axes)
    others = [
        [None] * len(here) if x is None else split(x, (None,) * len(x)) for x in sides
    ]
    solved = []
    for i, k in enumerate(here):
        own = tuple(None if x[i] is None else [x[i]] for x in others)
        # in the caller's `jax.set_mesh` no program may run on one device alone
        with jax.set_mesh(_NO_MESH):
            busy = share.first <= k < share.first + share.used
            program = _solved_group if busy else _unsolved_group
            found = run.call(program, [local[i]], own, axes=(None,), **how)
            solved.append(alone(found))
    joined = tuple(run.join(list(x), devices) for x in zip(*solved, strict=True))
    dense = any(view is not None for view in axes)
    return run.call(_returned, joined, where=_return_places(joined, mesh, dense))


def _positions(where: NamedSharding) -> list[int]:
    """The places in the mesh, flattened, of the devices of this process."""
    flat = list(where.mesh.devices.flat)
    return [k for k, x in enumerate(flat) if x in where.addressable_devices]


_NO_MESH = Mesh(np.empty((), dtype=object), ())


def _return_places(
    batch: tuple[Any, ...], mesh: Mesh, dense: bool
) -> tuple[NamedSharding, ...]:
    """Vectors of dense matrices along a or c, where it can be divided; else whole."""

    def place(shape: tuple[int, ...], axis: int) -> NamedSharding:
        spec: list[Any] = [None] * len(shape)
        if dense and len(shape) == 3 and shape[axis] % mesh.size == 0:
            spec[axis] = mesh.axis_names
        return NamedSharding(mesh, PartitionSpec(*spec))

    last = len(batch) - 1
    return tuple(place(x.shape, 2 if i == last else 1) for i, x in enumerate(batch))


@functools.partial(jax.jit, static_argnames=("axes", "share", "where"))
def _spread(
    arrays: list[Array],
    axes: tuple[Axes | None, ...],
    share: _Share,
    where: NamedSharding,
) -> Array:
    """All matrices, those of a device together; idle ones get zeros."""
    batch = _stacked(arrays, axes)
    before = share.first * share.each
    after = where.mesh.size * share.each - before - len(batch)
    padded = jnp.pad(batch, ((before, after), (0, 0), (0, 0)))
    return jax.lax.with_sharding_constraint(padded, where)


@functools.partial(jax.jit, static_argnames="where")
def _returned(
    batch: tuple[Array, ...], where: tuple[NamedSharding, ...]
) -> tuple[Array, ...]:
    return jax.lax.with_sharding_constraint(batch, where)


@functools.partial(jax.jit, static_argnames=("axes", "vectors", "rank"))
def _solved_group(
    arrays: list[Array],
    sides: Sides,
    axes: tuple[Axes | None, ...],
    vectors: bool,
    rank: int | None,
) -> tuple[Array, ...]:
    batch = _stacked(arrays, axes)
    if sides:
        c, d = (None if x is None else _joined(x) for x in sides)
        if vectors:
            return tuple(weighted.directions(batch, c, d))
        return (weighted.directions(batch, c, d).sigma,)
    if rank is None:
        return svd(batch) if vectors else (singular_values(batch),)
    return gram_svd(batch, rank) if vectors else (gram_singular_values(batch),)


@functools.partial(
    jax.jit, static_argnames=("axes", "vectors", "rank"), keep_unused=True
)
def _unsolved_group(
    arrays: list[Array],
    sides: Sides,
    axes: tuple[Axes | None, ...],
    vectors: bool,
    rank: int | None,
) -> tuple[Array, ...]:
    """Zeros in the shapes of `_solved_group`, on the device of the arrays."""
    shapes = jax.eval_shape(
        functools.partial(_solved_group, axes=axes, vectors=vectors, rank=rank),
        arrays,
        sides,
    )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _stacked(arrays: list[Array], axes: tuple[Axes | None, ...]) -> Array:
    """All matrices of some leaves, (b, a, c)."""
    matrices = [
        array if view is None else view.to_matrix(array)
        for view, array in zip(axes, arrays, strict=True)
    ]
    return jnp.concatenate([x.reshape(-1, *x.shape[-2:]) for x in matrices])


def _joined(sides: list[Array]) -> Array:
    """Covariances of a group, (b, m, m), or (b, m) for diagonals."""
    joined = _stacked(sides, (None,) * len(sides))
    return joined[..., 0] if joined.shape[-1] == 1 else joined


def on_host(solved: Sequence[Solved], run: Run) -> list[np.ndarray]:
    """Singular values of each leaf, (*stack, k), in one transfer for all."""
    found = run.get([x.batch[len(x.batch) // 2] for x in solved])
    return [
        sigma[x.start : x.start + math.prod(x.stack)].reshape(*x.stack, -1)
        for x, sigma in zip(solved, found, strict=True)
    ]


def part(batch: tuple[Array, ...], start: Any, stack: tuple[int, ...]) -> list[Array]:
    """Traceable: of a batched decomposition that of one leaf; see `Solved`."""
    count = math.prod(stack)
    return [
        jax.lax.dynamic_slice_in_dim(x, start, count).reshape(*stack, *x.shape[1:])
        for x in batch
    ]
