"""A function and its params as one StableHLO program over named arrays."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from oialr_jax import cost, tracing
from oialr_jax.compiling import dtype_of
from oialr_jax.factored import contracted
from oialr_jax.forms import Identity, TwoFactors, narrowed
from oialr_jax.lowrank import LowRank, PyTree, is_node, path_name, unique_names

BATCH = "b"
"""The name of the batch size in the shapes of inputs and outputs."""

FIELDS: Mapping[type, tuple[str, tuple[str, ...]]] = {
    LowRank: ("core", ("u", "s", "vt")),
    TwoFactors: ("factors", ("a", "b")),
    Identity: ("identity", ("c", "z", "order")),
}
"""What each node is called, and its arrays."""


class Leaf(NamedTuple):
    """One leaf of the params as it is stored.

    `names` are its arrays by field, "" for the array of a dense leaf; `order` are the
    axes of a dense leaf as they are stored, None for its own order.
    """

    path: tuple[Any, ...]
    node: Any  # the node or dense leaf, shapes alone
    names: Mapping[str, str]
    order: tuple[int, ...] | None = None

    def built(self, arrays: Mapping[str, Any]) -> Any:
        """The leaf in its own dtype, from all arrays by name."""
        given = {field: arrays[name] for field, name in self.names.items()}
        if is_node(self.node):
            return dataclasses.replace(self.node, **given)
        array = given[""]
        if self.order is not None:
            array = jnp.transpose(array, np.argsort(self.order).tolist())
        return array.astype(self.node.dtype)


class Packed(NamedTuple):
    """Params as arrays by name, and what makes params of these again."""

    arrays: dict[str, np.ndarray]
    leaves: tuple[Leaf, ...]
    build: Callable[[Mapping[str, Any]], PyTree]


Names = Mapping[str, str | tuple[str, Sequence[int]]]


def pack(params: PyTree, dtype: str | None, names: Names | None = None) -> Packed:
    """Host side: the arrays of merged params, by the names under which they are stored.

    Floats of dense leaves are stored in `dtype`, but for int8, and widened again when
    the program runs; those of nodes are as `merge` made them.

    Raises:   TypeError: a leaf that safetensors has no dtype for, as a key. ValueError:
              two arrays have one name; `names` has a path that is no leaf,
              an order that is none of its axes, or one for a factorised leaf; an entry
              is too large for `dtype`, or NaN.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_node)
    known = unique_names(path for path, _ in flat)
    names = {} if names is None else names
    for given in names:
        if given not in known:
            raise ValueError(f"`names` has {given}; there are: {', '.join(known)}")
    arrays: dict[str, np.ndarray] = {}
    leaves: dict[int, Leaf] = {}
    for i, ((path, leaf), name) in enumerate(zip(flat, known, strict=True)):
        if not is_node(leaf) and not hasattr(leaf, "dtype"):
            continue  # a function or a flag: part of the program
        if not is_node(leaf) and not _is_storable(leaf.dtype):
            raise TypeError(
                f"{name} is {leaf.dtype}, which safetensors has not: keep it beside "
                "the params, as an input or in the function"
            )
        wanted = names.get(name, name)
        order: Sequence[int] | None = None
        if not isinstance(wanted, str):
            wanted, order = wanted
        new = _node(path, leaf, wanted, order, dtype)
        for stored, array in new[1].items():
            if stored in arrays:
                raise ValueError(f"two arrays are called {stored}: rename one of them")
            arrays[stored] = array
        leaves[i] = new[0]

    def build(arrays: Mapping[str, Any]) -> PyTree:
        whole = [
            leaves[i].built(arrays) if i in leaves else leaf
            for i, (_, leaf) in enumerate(flat)
        ]
        return jax.tree.unflatten(treedef, whole)

    return Packed(arrays, tuple(leaves.values()), build)


def _is_storable(dtype: Any) -> bool:
    """Whether safetensors has a dtype: real numbers of whole bytes, no keys."""
    if not isinstance(dtype, np.dtype):
        return False  # a key
    return dtype.kind in "biuf" or str(dtype) == "bfloat16"


def _node(
    path: tuple[Any, ...],
    leaf: Any,
    name: str,
    order: Sequence[int] | None,
    dtype: str | None,
) -> tuple[Leaf, dict[str, np.ndarray]]:
    """A leaf as it is stored, and its arrays by name."""
    if is_node(leaf):
        if order is not None:
            raise ValueError(
                f"`names` has an order of axes for {path_name(path)}, which is stored "
                "in factors: say form='dense', or give a name alone"
            )
        _, fields = FIELDS[type(leaf)]
        held = {x: getattr(leaf, x) for x in fields}
        named = {x: f"{name}.{x}" for x in held}
        arrays = {named[x]: np.asarray(jax.device_get(y)) for x, y in held.items()}
        shapes = jax.tree.map(_shape, leaf)
        return Leaf(path, shapes, named), arrays
    array = jnp.asarray(leaf)
    if jnp.issubdtype(array.dtype, jnp.floating) and bool(jnp.any(jnp.isnan(array))):
        raise ValueError(f"{path_name(path)} has NaN: restore an older state")
    stored = array
    if dtype not in (None, "int8") and jnp.issubdtype(array.dtype, jnp.floating):
        stored, _ = narrowed(array, dtype, ())
    if order is not None:
        if sorted(order) != list(range(array.ndim)):
            raise ValueError(
                f"`names` orders the axes of {path_name(path)} as {tuple(order)}; its "
                f"shape is {array.shape}"
            )
        stored = jnp.transpose(stored, order)
    axes = None if order is None else tuple(order)
    host = np.ascontiguousarray(jax.device_get(stored)).reshape(stored.shape)
    return Leaf(path, _shape(array), {"": name}, axes), {name: host}


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype_of(x))


class Specs(NamedTuple):
    """The shapes of a program's inputs: one after the other, and as the example."""

    inputs: tuple[Any, ...]
    flat: list[tuple[str, Any]]


def specified(example: Sequence[Any], batch_axes: Any) -> Specs:
    """The shapes of the inputs, the batch size a symbol.

    Raises:   ValueError: the batch sizes of two arrays differ, or an array has not the
              axis. TypeError: an input is no array, or its container is none of Python.
    """
    axes = batch_axes if isinstance(batch_axes, tuple) else (batch_axes,) * len(example)
    if len(axes) != len(example):
        raise ValueError(
            f"`batch_axes` has {len(axes)} entries and the example {len(example)} "
            "arrays: give one for each, None for an input without a batch"
        )
    scope = jax_export.SymbolicScope()
    (symbol,) = jax_export.symbolic_shape(BATCH, scope=scope)
    sizes: dict[str, int] = {}

    def spec(path: Any, leaf: Any, axis: int | None) -> Any:
        name = f"input {path_name(path)}"
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(
                f"{name} must be an array, got {leaf!r}: close over what is none, "
                "export(folder, lambda params, x: fn(params, x, flag), ...)"
            )
        shape: list[Any] = list(leaf.shape)
        if axis is not None and shape:
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"{name} of shape {tuple(shape)} has no batch axis {axis}: give "
                    "batch_axes=, None for an input without a batch"
                )
            sizes[name] = shape[axis]
            shape[axis] = symbol
        return jax.ShapeDtypeStruct(shape, dtype_of(leaf))

    inputs = tuple(
        jax.tree_util.tree_map_with_path(
            lambda path, x, i=i, axis=axis: spec(
                (jax.tree_util.SequenceKey(i), *path), x, axis
            ),
            one,
        )
        for i, (one, axis) in enumerate(zip(example, axes, strict=True))
    )
    if len(set(sizes.values())) > 1:
        said = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(
            f"inputs differ in their batch size: {said}; give batch_axes=, None for an "
            "input without a batch"
        )
    check_containers("input", inputs)
    flat = jax.tree_util.tree_leaves_with_path(inputs)
    return Specs(inputs, [(path_name(path), x) for path, x in flat])


class _ContainerError(TypeError):
    """An input or output is in a container that needs code."""


def check_containers(what: str, tree: PyTree) -> None:
    """Raise where a tree has containers that a program can only have with their code.

    Raises:   TypeError: a container that is no tuple, list or dict.
    """
    if type(tree) in (tuple, list):
        for x in tree:
            check_containers(what, x)
    elif type(tree) is dict:
        for x in tree.values():
            check_containers(what, x)
    elif tree is not None and not jax.tree_util.all_leaves([tree]):
        raise _ContainerError(
            f"an {what} is a {type(tree).__name__}, which needs the code of its class: "
            "use tuples, lists and dicts"
        )


def lowered(
    fn: Callable[..., Any],
    packed: Packed,
    example: Sequence[Any],
    batch_axes: Any,
    platforms: Sequence[str],
) -> tuple[jax_export.Exported, Specs, list[tuple[str, Any]]]:
    """Host side: fn(params, *inputs) as a program over (arrays by name, *inputs).

    In which order cores are contracted is decided by the batch of the example. Gives
    the shapes of inputs and outputs as well.

    Raises:   ValueError: fn cannot be traced with a symbolic batch size. TypeError: as
              `specified`, or of the outputs.
    """
    weights = {name: _shape(x) for name, x in packed.arrays.items()}
    specs = specified(example, batch_axes)
    shapes = jax.tree.map(_shape, tuple(example))
    seen: list[int] = []

    def noted(rows: int) -> int:
        seen.append(rows)
        return rows

    jax.eval_shape(functools.partial(_run, fn, packed, noted), weights, *shapes)

    def run(weights: Mapping[str, Any], *inputs: Any) -> Any:
        left = iter(seen)  # the walk is the same, whatever the batch size
        out = _run(fn, packed, lambda rows: next(left), weights, *inputs)
        check_containers("output", out)
        return out

    make = jax_export.export(jax.jit(run), platforms=tuple(platforms))
    larger = jax.tree.map(_one_more, shapes, specs.inputs)
    try:
        jax.eval_shape(run, weights, *larger)
        program = make(weights, *specs.inputs)
    except (TypeError, ValueError) as error:  # as JAX's own of shapes are
        if larger == shapes or isinstance(error, _ContainerError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            "fn cannot be traced with a symbolic batch size: write it without the "
            "number, x.reshape(x.shape[0], -1), or give batch_axes=None, and the "
            f"program is for the example's batch alone ({reason})"
        ) from error
    out = jax.tree.unflatten(program.out_tree, program.out_avals)
    flat = jax.tree_util.tree_leaves_with_path(out)
    return program, specs, [(path_name(path), x) for path, x in flat]


def _run(
    fn: Callable[..., Any],
    packed: Packed,
    rows: Callable[[Any], int],
    weights: Mapping[str, Any],
    *inputs: Any,
) -> Any:
    """fn on the params that the weights are, contracted as is best for `rows`."""
    rates = cost.RATES.get(jax.default_backend())

    def pick(load: cost.Workload, itemsize: int) -> cost.Order:
        load = dataclasses.replace(load, training=False)
        return cost.cheapest(load, rates, itemsize)

    args = (packed.build(weights), *inputs)
    traced = tracing.trace(fn, args, {}, is_node)
    leaves = [leaf for _, leaf in traced.leaves]
    return traced.rebuild(contracted(traced, leaves, pick, set(), rows=rows))


def _one_more(shape: Any, spec: Any) -> jax.ShapeDtypeStruct:
    """The shape with one more in its batch, which some programs take as no symbol."""
    each = zip(shape.shape, spec.shape, strict=True)
    sizes = [size if isinstance(d, int) else size + 1 for size, d in each]
    return jax.ShapeDtypeStruct(sizes, shape.dtype)
