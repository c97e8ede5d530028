"""The pytree node: a matrix held as W = U S Vᵀ in place of an array leaf."""

import collections
import dataclasses
import math
import zlib
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oialr_jax.compiling import dtype_of
from oialr_jax.linalg import compute_dtype, diagonal, svd

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Axes:
    """Which axes of a dense array are stack, inputs (rows) and outputs (columns).

    Each group is in ascending order, and the three groups together are all axes. The
    matrix view has shape (*l, m, n): stack sizes, product of inputs, product of
    outputs, each flattened in row-major order.

    >>> axes = Axes(shape=(3, 3, 16, 32), stack=(), inputs=(0, 1, 2), outputs=(3,))
    >>> axes.m, axes.n
    (144, 32)
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def l(self) -> tuple[int, ...]:  # noqa: E743 -- the papers' word for the stack
        """Sizes of the stack axes."""
        return tuple(self.shape[a] for a in self.stack)

    @property
    def m(self) -> int:
        """Rows of one matrix: the fan-in."""
        return math.prod(self.shape[a] for a in self.inputs)

    @property
    def n(self) -> int:
        """Columns of one matrix: the fan-out."""
        return math.prod(self.shape[a] for a in self.outputs)

    @property
    def order(self) -> tuple[int, ...]:
        """The permutation of the dense axes that puts stack, inputs, outputs first."""
        return self.stack + self.inputs + self.outputs

    def to_matrix(self, array: Array) -> Array:
        """The matrix view (*l, m, n) of a dense array of shape `shape`."""
        return jnp.transpose(array, self.order).reshape(*self.l, self.m, self.n)

    def to_array(self, matrix: Array) -> Array:
        """The dense array of shape `shape` of a matrix view (*l, m, n)."""
        sizes = [self.shape[a] for a in self.order]
        inverse = [self.order.index(a) for a in range(len(self.order))]
        return jnp.transpose(matrix.reshape(sizes), inverse)


class _NotAnArray(TypeError, AttributeError):
    """An array's attribute that a node has not; `hasattr` says so."""


class NoArray:
    """What stands for an array and is none: every use as one says so."""

    def _no_array(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(_no_array(self))

    def __bool__(self) -> bool:  # that of an object, though it has a length
        return True

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_") or not hasattr(jax.Array, name):
            kind = type(self).__name__
            raise AttributeError(f"{kind!r} object has no attribute {name!r}")
        raise _NotAnArray(f"`.{name}`: {_no_array(self)}")

    __array__ = __array_ufunc__ = __jax_array__ = _no_array
    __len__ = __getitem__ = _no_array
    __float__ = __int__ = __complex__ = __neg__ = __abs__ = _no_array
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _no_array
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _no_array
    __mod__ = __rmod__ = _no_array
    __pow__ = __rpow__ = __lt__ = __le__ = __gt__ = __ge__ = _no_array
    __matmul__ = __rmatmul__ = _no_array


def _no_array(node: object) -> str:
    kind = "LowRank" if isinstance(node, Marked) else type(node).__name__
    return (
        f"a {kind} node is no array: call the function as `factored(fn)`, or take the "
        "dense array, `node.materialize()`"
    )


class Basis(int):
    """The identity of a node's bases: a number that every event changes, 0 if unknown.

    It is part of the tree structure, so that JAX refuses to combine nodes of different
    bases, whose cores cannot be compared; its text in that error says what to do.
    """

    def __repr__(self) -> str:
        if not self:
            return "0"
        return (
            f"bases {int(self):08x}; trees whose bases differ: bring one into the "
            "other's by oialr_jax.following.rebase(tree, params)"
        )

    def after(self, sigma: Any, rank: int) -> "Basis":
        """The bases after an event that found these singular values.

        The same in every process of a run, and in a run that was resumed.
        """
        values = np.ascontiguousarray(sigma)
        return Basis(zlib.crc32(values.tobytes(), zlib.crc32(b"%d %d" % (self, rank))))


class Parts(NamedTuple):
    """The arrays of a node, of whatever form: W = base + u . core . right.

    Without a core `s` that is the identity. With an `order` the right factor is [I vt],
    its columns permuted: column j of W is column `order[j]` of u [I vt]. `base` is a
    `forms.Frozen`, or None.

    Shapes:   u: (*l, m, r); s: (*l, r, r); vt: (*l, r, n), or (*l, r, n - r) with an
              order of shape (*l, n).
    """

    u: Any
    s: Any
    vt: Any
    order: Any = None
    base: Any = None

    def right(self) -> Array:
        """The right factor, its columns where they belong."""
        if self.order is None:
            return self.vt
        r = self.vt.shape[-2]
        eye = jnp.eye(r, dtype=self.vt.dtype)
        eye = jnp.broadcast_to(eye, (*self.vt.shape[:-2], r, r))
        joined = jnp.concatenate([eye, self.vt], axis=-1)
        return jnp.take_along_axis(joined, self.order[..., None, :], axis=-1)

    def product(self, axes: Axes, dtype: Any) -> Array:
        """The dense array without its base in this dtype, in full precision."""
        u, vt = self.u.astype(dtype), self.right().astype(dtype)
        with jax.default_matmul_precision("highest"):
            if self.s is None:
                matrix = u @ vt
            elif axes.m < axes.n:  # the core meets the smaller basis first
                matrix = (u @ self.s.astype(dtype)) @ vt
            else:
                matrix = u @ (self.s.astype(dtype) @ vt)
        return axes.to_array(matrix)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LowRank(NoArray):
    """A matrix W = U S Vᵀ that stands where its dense array stood in a params tree.

    `u` and `vt` are frozen and have orthonormal columns and rows; the core `s` is
    trained. The node runs no checks, as JAX also builds it from tracers, shapes or
    None.

    `basis` tells nodes of different bases apart (`Basis`); a node that is built from
    another one keeps it: `dataclasses.replace(node, s=core)`.

    Shapes:   u: (*l, m, r); s: (*l, r, r); vt: (*l, r, n).
    Source:   OIALR (Coquelin et al., ECAI 2024), section 1; the authors keep the tall
              orientation, here U always spans the inputs.
    """

    u: Any
    s: Any
    vt: Any
    axes: Axes = dataclasses.field(metadata={"static": True})
    basis: int = dataclasses.field(
        default=Basis(0), metadata={"static": True}, repr=False
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array that this node stands for."""
        return self.axes.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the dense array that this node stands for."""
        return len(self.axes.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the core, and so of the dense array; bases may be narrower."""
        return self.s.dtype

    @property
    def rank(self) -> int:
        """Rank r, shared by all matrices of a stack."""
        return self.s.shape[-1]

    @property
    def size(self) -> int:
        """Number of entries of the dense array; `counts` has those that are stored."""
        return math.prod(self.axes.shape)

    def materialize(self) -> Array:
        """The dense array of shape `shape` and dtype `dtype`, in full precision."""
        return Parts(self.u, self.s, self.vt).product(self.axes, self.dtype)

    def parts(self) -> Parts:
        """The arrays; bases get no gradient, the core does."""
        u, vt = jax.lax.stop_gradient((self.u, self.vt))
        return Parts(u, self.s, vt)


class Calls(list[Any]):
    """Calls of functions, (fn, args, kwargs); one list is equal to itself alone."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # a list has none
    __eq__ = object.__eq__


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Marked(NoArray):
    """A dense leaf that has `factored` note the calls in which it is an argument.

    A step that is traced on it tells which of its functions run on low-rank params.
    """

    array: Any
    path: str = dataclasses.field(metadata={"static": True})
    calls: Calls = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.array.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the array."""
        return len(self.array.shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the array."""
        return self.array.dtype


def is_marked(x: object) -> bool:
    """Whether x is a Marked leaf."""
    return isinstance(x, Marked)


def is_low_rank(x: object) -> bool:
    """Whether x is a LowRank node; the `is_leaf` of every tree function here."""
    return isinstance(x, LowRank)


def is_node(x: object) -> bool:
    """Whether x stands for a dense array in any form: LowRank, or those of forms.py."""
    return hasattr(type(x), "parts")


def check_forms(tree: PyTree, *, what: str) -> None:
    """Raise where a tree has a node of another form than LowRank.

    Args:     what: is asked of the tree, as "rank events take".
    Raises:   ValueError: it has one; its path, and what to call.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_node):
        if is_node(leaf) and not is_low_rank(leaf):
            raise ValueError(
                f"{path_name(path) or 'the tree'} is held as {type(leaf).__name__}, "
                f"and {what} dense arrays and LowRank nodes alone: give the params "
                "from before `merge` or `attached`, or oialr_jax.materialize(params)"
            )


def map_low_rank(fn: Callable[[LowRank], Any], tree: PyTree) -> PyTree:
    """The tree with every LowRank node replaced by fn(node), other leaves untouched."""
    return jax.tree.map(
        lambda x: fn(x) if is_low_rank(x) else x, tree, is_leaf=is_low_rank
    )


def materialize(tree: PyTree) -> PyTree:
    """The tree with every node replaced by its dense array, whatever its form.

    The norm of what is trained needs no dense array: see `global_norm`.
    """
    return jax.tree.map(
        lambda x: x.materialize() if is_node(x) else x, tree, is_leaf=is_node
    )


def without_identity(tree: PyTree) -> PyTree:
    """The tree with nodes that have no identity of their bases (`LowRank.basis`).

    For programs that take a single params tree, such as an evaluation: an event that
    turns bases but keeps all ranks then causes no recompilation.
    """
    return map_low_rank(lambda x: dataclasses.replace(x, basis=Basis(0)), tree)


def arrays_only(tree: PyTree) -> PyTree:
    """The tree with None in the place of leaves that are no arrays.

    Optimizers are initialised with it where params are a whole module with functions.
    """
    return jax.tree.map(lambda x: x if hasattr(x, "dtype") else None, tree)


def path_name(path: tuple[Any, ...]) -> str:
    """The name of a leaf in matrices, rules, errors and reports.

    >>> path_name(jax.tree_util.tree_flatten_with_path({"a": {"b": 1}})[0][0][0])
    'a/b'
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def unique_names(paths: Iterable[tuple[Any, ...]]) -> list[str]:
    """The names of some leaves.

    Raises:   ValueError: two leaves share a name, as {"a/b": x, "a": {"b": y}} have it.
    """
    names = [path_name(path) for path in paths]
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise ValueError(f"two leaves are called {name}: rename one of them")
    return names


def named_leaves(
    tree: PyTree, is_leaf: Callable[[Any], bool] = is_low_rank
) -> dict[str, Any]:
    """Leaves by name, a LowRank node being one leaf, in tree order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    names = unique_names(path for path, _ in leaves)
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def leaves_by_path(tree: PyTree) -> dict[Any, Any]:
    """Leaves by their path, a LowRank node being one leaf."""
    return dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_low_rank))


def leaf_at(
    name: str,
    leaves: Mapping[str, Any],
    shape: tuple[int, ...] | None = None,
    *,
    what: str = "no leaf at",
) -> Any:
    """The leaf of this name, which has this shape where one is given.

    Raises:   ValueError: there is none, or it has another shape.
    """
    if name not in leaves:
        raise ValueError(f"{what} {name}; there are: {', '.join(leaves)}")
    leaf = leaves[name]
    if shape is not None and np.shape(leaf) != shape:
        raise ValueError(f"{name} has shape {np.shape(leaf)}, the matrix has {shape}")
    return leaf


def with_leaves(tree: PyTree, new: Mapping[str, Any]) -> PyTree:
    """The tree with other leaves of some names, a LowRank node being one leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(path_name(path), leaf), tree, is_leaf=is_low_rank
    )


def owner_of(path: tuple[Any, ...], owners: Container[Any]) -> Any:
    """The longest path among `owners` that `path` ends with, or None.

    It is the parameter to which a leaf of an optimizer's state belongs.
    """
    for start in range(len(path) + 1):
        if path[start:] in owners:
            return path[start:]
    return None


def abstract_node(axes: Axes, rank: int, dtype: Any) -> LowRank:
    """The shapes of a matrix held at a rank."""
    sides = ((axes.m, rank), (rank, rank), (rank, axes.n))
    u, s, vt = (jax.ShapeDtypeStruct((*axes.l, *side), dtype) for side in sides)
    return LowRank(u, s, vt, axes)


def abstract_low_rank(
    params: PyTree, axes: Mapping[str, Axes], rank: int | None = None
) -> PyTree:
    """The params with the leaves that `axes` names as nodes of shapes, at full rank.

    With a `rank` all nodes have at most that one, those that were there before too;
    without it these stay as they are. Other leaves stay.
    """

    def held(path: tuple[Any, ...], leaf: Any) -> Any:
        found = leaf.axes if is_low_rank(leaf) else axes.get(path_name(path))
        if found is None or (is_low_rank(leaf) and rank is None):
            return leaf
        r = leaf.rank if is_low_rank(leaf) else min(found.m, found.n)
        r = r if rank is None else min(r, rank)
        return abstract_node(found, r, dtype_of(leaf))

    return jax.tree_util.tree_map_with_path(held, params, is_leaf=is_low_rank)


def factor(array: Array, axes: Axes, rank: int | None = None) -> LowRank:
    """The best rank-r LowRank of one dense array; full rank min(m, n) by default.

    Traceable. Factors have the array's dtype, the computation is float32 or wider. The
    node knows its bases (`LowRank.basis`) where values are known, outside of `jax.jit`.

    Raises:   ValueError: when the rank is outside [1, min(m, n)].
    Source:   Eckart-Young; OIALR's conversion without truncation.
    """
    k = min(axes.m, axes.n)
    rank = k if rank is None else rank
    if not 1 <= rank <= k:
        raise ValueError(f"`rank` must be in [1, {k}] for shape {axes.shape}: {rank}")
    u, sigma, vt = svd(axes.to_matrix(array))
    s = diagonal(sigma[..., :rank])
    u, s, vt = (f.astype(array.dtype) for f in (u[..., :rank], s, vt[..., :rank, :]))
    basis = Basis(0)
    if not isinstance(sigma, jax.core.Tracer) and sigma.is_fully_addressable:
        basis = basis.after(jax.device_get(sigma), rank)
    return LowRank(u, s, vt, axes, basis)


class Counts(NamedTuple):
    """Numbers of weights of a params tree.

    `dense`: of the model with every matrix dense. `stored`: both bases, cores and every
    other weight. `trainable`: cores and every other weight, which flatters the method
    if it is reported alone.
    """

    dense: int
    stored: int
    trainable: int


def counts(params: PyTree) -> Counts:
    """Numbers of dense, stored and trainable weights; the leaves may be shapes."""
    dense = stored = trainable = 0
    for leaf in jax.tree.leaves(params, is_leaf=is_node):
        if is_low_rank(leaf):
            dense += math.prod(leaf.shape)
            stored += sum(math.prod(f.shape) for f in (leaf.u, leaf.s, leaf.vt))
            trainable += math.prod(leaf.s.shape)
        elif is_node(leaf):
            dense += math.prod(leaf.shape)
            stored += leaf.stored
            trainable += leaf.trainable
        elif hasattr(leaf, "shape"):
            dense += math.prod(leaf.shape)
            stored += math.prod(leaf.shape)
            trainable += math.prod(leaf.shape)
    return Counts(dense, stored, trainable)


def global_norm(tree: PyTree) -> Float[Array, ""]:
    """The global norm of params or gradients, in which a LowRank leaf counts as its W.

    sqrt(Σ‖W‖²), computed from cores and dense leaves in float32 or wider, as
    ‖U S Vᵀ‖ = ‖S‖ for orthonormal bases. It is the same for nodes and for
    `trainable(params)`, whereas `optax.global_norm` counts the bases too. Leaves that
    are no floats do not count.

    >>> w = factor(2 * jnp.eye(4, 3), Axes((4, 3), (), (0,), (1,)))
    >>> round(float(global_norm({"w": w, "b": jnp.ones(4)})), 4)
    4.0
    """
    total = jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(tree, is_leaf=is_low_rank):
        array = leaf.s if is_low_rank(leaf) else leaf
        if jnp.issubdtype(getattr(array, "dtype", type(array)), jnp.inexact):
            magnitude = jnp.abs(jnp.asarray(array))
            magnitude = magnitude.astype(compute_dtype(magnitude.dtype))
            total = total + jnp.sum(jnp.square(magnitude))
    return jnp.sqrt(total)


def ranks(params: PyTree) -> dict[str, tuple[int, int, int]]:
    """(m, n, rank) of every leaf that is held by factors, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_node)
    return {
        path_name(path): (leaf.axes.m, leaf.axes.n, leaf.rank)
        for path, leaf in leaves
        if hasattr(leaf, "rank")
    }
