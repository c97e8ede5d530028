"""Meshes, and a sharding for every dense and low-rank leaf."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar, final

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from oialr_jax.lowrank import LowRank, PyTree, is_low_rank, path_name

__all__ = ["Layout", "make_mesh"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

Rules = tuple[tuple[str, PartitionSpec], ...]

BATCH_AXES = ("data", "fsdp")
"""Axes of a mesh over which batches are divided, where the mesh has them."""

FSDP = "fsdp"
"""The axis of a mesh over which large leaves are divided by themselves."""


def make_mesh(spec: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh from "data=4,model=2"; one size may be -1, for the remaining devices.

    Batches are sharded over `data` and `fsdp`, large leaves over `fsdp`; any other axis
    is for rules. Axis types are Auto: the compiler chooses the sharding of arrays that
    have none. A single process may use fewer devices than it has, the first ones.

    Raises:   ValueError: not of this form, an axis twice, a size below 1, or a number
              of devices that there is not.

    >>> dict(make_mesh("data=-1,model=1", jax.devices()[:1]).shape)
    {'data': 1, 'model': 1}
    """
    sizes: dict[str, int] = {}
    for part in spec.split(","):
        match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*=\s*(-?\d+)\s*", part)
        if match is None:
            raise ValueError(
                f"a mesh is written like data=4,model=2; got {spec!r}, of which "
                f"{part!r} is no axis"
            )
        name, size = match[1], int(match[2])
        if name in sizes:
            raise ValueError(f"mesh {spec!r} has the axis {name} twice")
        if size < 1 and size != -1:
            raise ValueError(f"mesh {spec!r}: size of {name} must be at least 1 or -1")
        sizes[name] = size
    found = list(jax.devices() if devices is None else devices)
    rest = [name for name, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"mesh {spec!r} has more than one -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    for name in rest:
        sizes[name] = len(found) // known
    count = math.prod(sizes.values())
    whole = count == len(found)
    if not whole and (rest or count > len(found) or jax.process_count() > 1):
        raise ValueError(f"mesh {spec!r} does not fit {len(found)} devices")
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        (AxisType.Auto,) * len(sizes),
        devices=found[:count],
    )


@final
@dataclasses.dataclass(frozen=True)
class Layout:
    """The sharding of every leaf: of params, or of a whole training state.

    A rule, say ("mlp_in/kernel$", PartitionSpec(None, "model")), gives the
    PartitionSpec of a *dense* leaf, over its dense axes; the first one whose pattern is
    found in the leaf's path wins. For a LowRank leaf the mesh axes of
    input axes shard `u` along m, those of output axes shard `vt` along n, and those of
    stack axes shard all three. A leaf without a rule is replicated; or, if the mesh has
    an axis `fsdp` and the array at least `min_size` entries, sharded over it along the
    largest axis that `fsdp` divides (never a stack axis). Cores are always sharded in
    this automatic way, as no rule over dense axes says anything about r.

    An array of the optimizer state is sharded like the core or dense leaf that it
    belongs to, if it has the same shape.

    Hashable, so that it can be a static argument of `jax.jit`.

    Raises:   ValueError: the mesh has an Explicit axis `fsdp`; on call, a rule matches
              no leaf of the params first; a spec has more entries than the leaf has
              axes, names an axis that the mesh has not, or does not divide the leaf.
    """

    mesh: Mesh
    rules: Rules = ()
    min_size: int = 2**12

    def __post_init__(self) -> None:
        """Refuse what would be divided behind the back of its types."""
        _check_fsdp(self.mesh)

    def __call__(self, tree: PyTree) -> PyTree:
        """NamedShardings in the shape of `tree`: params, or a state with `.params`."""
        params = getattr(tree, "params", tree)
        owners = self._params(params)

        def place(path: tuple[Any, ...], leaf: Any) -> Any:
            for start in range(len(path) + 1):  # the longest suffix first
                owner = owners.get(path[start:])
                if owner is not None and owner.fits(leaf):
                    if is_low_rank(leaf):
                        return dataclasses.replace(owner.node, basis=leaf.basis)
                    return owner.trained
            if is_low_rank(leaf):
                return self._node(leaf, PartitionSpec())
            return self._named(self._auto(np.shape(leaf)))

        return jax.tree_util.tree_map_with_path(place, tree, is_leaf=is_low_rank)

    def of_optimizer(self, params: PyTree, opt_state: PyTree) -> PyTree:
        """NamedShardings in the shape of an optimizer state of these params."""
        return self(_Pair(params, opt_state)).opt_state

    def constrain(self, tree: PyTree) -> PyTree:
        """Traceable: `tree` with sharding constraints on its arrays.

        Over Explicit axes by `jax.sharding.reshard`, as their names are in the types.
        """
        places = self(tree)
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
            return jax.device_put(tree, places)
        if AxisType.Explicit not in self.mesh.axis_types:
            return jax.lax.with_sharding_constraint(tree, places)
        return jax.tree.map(lambda x, where: _resharded(x, where=where), tree, places)

    def initialize(self, create: Callable[..., Any], *args: Any) -> Any:
        """Host side: create(*args), computed in place: no device holds the whole."""
        where = self(jax.eval_shape(create, *args))
        everywhere = self._named(PartitionSpec())
        if everywhere.is_fully_addressable:  # else the processes would compare them
            args = jax.tree.map(
                lambda x: (
                    x
                    if getattr(x, "committed", False)
                    else jax.device_put(x, everywhere)
                ),
                args,
            )
        return jax.jit(create, out_shardings=where)(*args)

    @property
    def batch(self) -> NamedSharding:
        """The sharding of a batch: its first axis over `data` and `fsdp`."""
        names = tuple(a for a in BATCH_AXES if a in self.mesh.shape)
        return self._named(PartitionSpec(names) if names else PartitionSpec())

    @property
    def shards(self) -> int:
        """The number of parts into which a batch is sharded."""
        return math.prod(self.mesh.shape.get(a, 1) for a in BATCH_AXES)

    def rows(self, size: int) -> slice:
        """Host side: the rows that this process provides to a batch of `size`.

        Raises:   ValueError: `size` is no multiple of `shards`.
        """
        if size % self.shards:
            raise ValueError(
                f"a batch of {size} cannot be divided over {self.shards} devices "
                f"(mesh {dict(self.mesh.shape)})"
            )
        places = self.batch.addressable_devices_indices_map((size,))
        parts = [(x or (slice(None),))[0].indices(size)[:2] for x in places.values()]
        return slice(min(a for a, _ in parts), max(b for _, b in parts))

    def put_batch(self, local: PyTree, size: int) -> PyTree:
        """Host side: a global batch of `size` from the rows of this process."""

        def put(rows: Any) -> jax.Array:
            return jax.make_array_from_process_local_data(
                self.batch, np.asarray(rows), (size, *np.shape(rows)[1:])
            )

        return jax.tree.map(put, local)

    def _params(self, params: PyTree) -> "dict[tuple[Any, ...], _Owner]":
        """Every leaf of the params, by its path: shapes and places."""
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_low_rank)
        used: set[int] = set()
        owners = {}
        for path, leaf in leaves:
            name = path_name(path)
            spec = None
            for i, (pattern, wanted) in enumerate(self.rules):
                if re.search(pattern, name):
                    used.add(i)
                    spec = self._checked(name, np.shape(leaf), wanted)
                    break
            if is_low_rank(leaf):
                node = self._node(leaf, PartitionSpec() if spec is None else spec)
                owners[path] = _Owner(leaf, node, node.s)
            else:
                where = self._named(
                    self._auto(np.shape(leaf)) if spec is None else spec
                )
                owners[path] = _Owner(leaf, where, where)
        for i, (pattern, _) in enumerate(self.rules):
            if i not in used:
                raise ValueError(
                    f"the rule {pattern!r} is the first to match no leaf; there are: "
                    f"{', '.join(path_name(path) for path, _ in leaves)}"
                )
        return owners

    def _checked(
        self, name: str, shape: tuple[int, ...], spec: PartitionSpec
    ) -> PartitionSpec:
        if len(spec) > len(shape):
            raise ValueError(f"{spec} has more entries than {name} of shape {shape}")
        for size, entry in zip(shape, spec, strict=False):
            names = _names(entry)
            for axis in names:
                if axis not in self.mesh.shape:
                    raise ValueError(
                        f"{spec} for {name} names {axis!r}, which the mesh "
                        f"{dict(self.mesh.shape)} has not"
                    )
            if size % self._size(names):
                raise ValueError(f"{spec} does not divide {name} of shape {shape}")
        return spec

    def _node(self, node: LowRank, spec: PartitionSpec) -> LowRank:
        """The places of u, s and vt, from the spec of the dense leaf."""
        entries = [*spec, *[None] * (len(node.shape) - len(spec))]

        def over(axes: Iterable[int]) -> tuple[str, ...]:
            return tuple(name for a in axes for name in _names(entries[a]))

        stack = [entries[a] for a in node.axes.stack]
        left, right = over(node.axes.inputs), over(node.axes.outputs)
        u = PartitionSpec(*stack, left or None, None)
        vt = PartitionSpec(*stack, None, right or None)
        s = self._auto(np.shape(node.s), len(stack))
        if any(stack):
            s = PartitionSpec(*stack, None, None)
        if not any(entries):
            u = self._auto(np.shape(node.u), len(stack))
            vt = self._auto(np.shape(node.vt), len(stack))
        return dataclasses.replace(
            node, u=self._named(u), s=self._named(s), vt=self._named(vt)
        )

    def _auto(self, shape: tuple[int, ...], stack: int = 0) -> PartitionSpec:
        """The largest axis over `fsdp`, if that divides it and is worth it."""
        parts = self.mesh.shape.get(FSDP, 1)
        axes = [a for a in range(stack, len(shape)) if shape[a] % parts == 0]
        if parts == 1 or not axes or math.prod(shape) < self.min_size:
            return PartitionSpec()
        largest = max(axes, key=lambda a: shape[a])
        return PartitionSpec(
            *[FSDP if a == largest else None for a in range(len(shape))]
        )

    def _size(self, names: tuple[str, ...]) -> int:
        return math.prod(self.mesh.shape[name] for name in names)

    def _named(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Pair:
    """As much of a state as the places of an optimizer state depend on."""

    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class _Owner:
    """A leaf of the params, its places, and that of what is trained of it."""

    leaf: Any
    node: Any
    trained: NamedSharding

    def fits(self, other: Any) -> bool:
        """Whether an array or node elsewhere in the state has this leaf's shape."""
        if is_low_rank(other):
            return is_low_rank(self.leaf) and other.axes == self.leaf.axes
        trained = self.leaf.s if is_low_rank(self.leaf) else self.leaf
        return np.shape(other) == np.shape(trained)


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


@functools.partial(jax.jit, static_argnames="where")
def _resharded(x: jax.Array, where: NamedSharding) -> jax.Array:
    """x in its place on a mesh with Explicit axes, and perhaps Auto ones."""
    kinds = dict(zip(where.mesh.axis_names, where.mesh.axis_types, strict=True))

    def over(kind: AxisType) -> NamedSharding:
        names = [[a for a in _names(e) if kinds[a] == kind] for e in where.spec]
        return NamedSharding(where.mesh, PartitionSpec(*[tuple(x) for x in names]))

    x = jax.sharding.reshard(x, over(AxisType.Explicit))
    if AxisType.Auto not in kinds.values():
        return x
    return jax.lax.with_sharding_constraint(x, over(AxisType.Auto))


def on_auto_axes(fn: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Host side: fn, on meshes with Explicit axes as if they were Auto.

    An event multiplies, stacks and divides matrices, and the types of Explicit axes
    would have to say where each result lies. So its arrays, shapes and Layouts come to
    a mesh of the same devices with Auto axes and go back after it: no data moves.
    """

    @functools.wraps(fn)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        leaves = jax.tree.leaves((args, kwargs))
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return fn(*args, **kwargs)
        context = jax.sharding.get_mesh()
        twins = {
            mesh: Mesh(
                mesh.devices,
                mesh.axis_names,
                axis_types=(AxisType.Auto,) * len(mesh.axis_names),
            )
            for mesh in {context, *map(_mesh_of, leaves)}
            if mesh is not None and set(mesh.axis_types) - {AxisType.Auto}
        }
        if not twins:
            return fn(*args, **kwargs)
        for mesh in twins:
            _check_fsdp(mesh)
        back = {twin: mesh for mesh, twin in twins.items()}
        args, kwargs = jax.tree.map(lambda x: _moved(x, twins), (args, kwargs))
        inside = twins.get(context)
        with contextlib.nullcontext() if inside is None else jax.set_mesh(inside):
            result = fn(*args, **kwargs)
        return jax.tree.map(lambda x: _moved(x, back), result)

    return run


def _check_fsdp(mesh: Mesh) -> None:
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if kinds.get(FSDP, AxisType.Auto) != AxisType.Auto:
        raise ValueError(
            f"the axis {FSDP!r} of {mesh} is {kinds[FSDP]}: large leaves are divided "
            "over it by themselves, which is the compiler's work; make the mesh by "
            "oialr_jax.sharding.make_mesh, or with AxisType.Auto for this axis"
        )


def _mesh_of(x: Any) -> Mesh | None:
    """The mesh that an array, a shape or a Layout is on, if it is on one."""
    mesh = getattr(x if isinstance(x, Layout) else _sharding(x), "mesh", None)
    return mesh if isinstance(mesh, Mesh) else None


def _sharding(x: Any) -> Any:
    return getattr(x, "sharding", None)


def _moved(x: Any, meshes: Mapping[Mesh, Mesh]) -> Any:
    """x with another mesh in the place of its own; anything else as it is."""
    mesh = _mesh_of(x)
    if mesh is None or mesh not in meshes:
        return x
    if isinstance(x, Layout):
        return dataclasses.replace(x, mesh=meshes[mesh])
    where = NamedSharding(
        meshes[mesh], x.sharding.spec, memory_kind=x.sharding.memory_kind
    )
    return (
        x.update(sharding=where)
        if isinstance(x, jax.ShapeDtypeStruct)
        else jax.device_put(x, where)
    )
