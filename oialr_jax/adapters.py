"""Fine-tuning on a frozen base: W = W0 + U S Vᵀ, of which the cores S train.

The cores are an ordinary low-rank params tree, so that optimizers, events, averages and
checkpoints treat it as any other; the base stands beside it and is only read.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
from jaxtyping import Array

from oialr_jax import weighted
from oialr_jax.factored import factored
from oialr_jax.forms import Adapted, Frozen, check_stored, frozen
from oialr_jax.linalg import alone, compute_dtype, svd
from oialr_jax.lowrank import (
    Axes,
    Basis,
    LowRank,
    PyTree,
    check_forms,
    is_low_rank,
    is_node,
    leaf_at,
    leaves_by_path,
    named_leaves,
    path_name,
)
from oialr_jax.matrices import Matrix
from oialr_jax.weighted import Statistics


@final
@dataclasses.dataclass(frozen=True)
class FrozenBase:
    """How `training(base=...)` and `adapters` hold a model that was trained before.

    Args:     rank: of every core, at most its matrix's; or by path.
              train: regular expressions; leaves whose path matches one train whole, as
              a new head or biases do. All others are frozen.
              dtype: in which frozen leaves are stored, float32, bfloat16, float16 or
              int8 with a scale for each column of a matrix; by default their own.
              of: what U and V are the first singular vectors of. None: of W0, as in
              LoRA-XS. A tree like the params: of its matrices, as of gradients summed
              over a few batches. `Statistics` of `curvature`: of W0 weighed by C and D,
              the directions that the loss feels most, made orthonormal.
    Raises:   ValueError: a rank below 1, or another dtype.
    """

    rank: int | Mapping[str, int] = 8
    train: str | Iterable[str] = ()
    dtype: str | None = None
    of: PyTree | Statistics | None = None

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.dtype is not None:
            check_stored(self.dtype)
        given = self.rank if isinstance(self.rank, Mapping) else {"": self.rank}
        for name, rank in given.items():
            if rank < 1:
                where = f" for {name}" if name else ""
                raise ValueError(f"`rank` must be at least 1{where}, got {rank}")


class Adapters(NamedTuple):
    """A model as what trains and what is frozen.

    `cores` is like the params, with LowRank nodes in the place of adapted matrices,
    whose cores are zeros, arrays where a leaf trains whole, and None elsewhere. `base`
    has the rest: `forms.Frozen` arrays, and what is no array; None where a leaf trains
    whole.
    """

    cores: PyTree
    base: PyTree


def adapters(
    params: PyTree,
    matrices: Sequence[Matrix],
    rank: int | Mapping[str, int] = 8,
    *,
    train: str | Iterable[str] = (),
    dtype: str | None = None,
    of: PyTree | Statistics | None = None,
) -> Adapters:
    """Host side: dense params as a frozen base and cores that change nothing yet.

        cores, base = adapters(params, matrices, rank=8, train="head")
        forward = on_base(forward)  # forward(cores, base, *args)
        params = materialize(attached(cores, base))  # merged back

    W = W0 + U S Vᵀ with S = 0: r² numbers of a matrix train, and have state. What takes
    params in low rank takes `cores`: `freeze_bases`, `value_and_grad`, `adaptive`,
    `Checkpoints`.

    Args:     as in `FrozenBase`.
    Raises:   ValueError: a matrix names no leaf, or one in low rank; a rank outside
              [1, min(m, n)]; a pattern of `train` matches no leaf, or an adapted one;
              statistics or gradients without a matrix, or that are not finite.
    Source:   LoRA-XS (arXiv 2405.17604) for S between frozen factors of W0, which here
              are orthonormal; PiSSA and LoRA-GA for the two other origins.
    """
    check_forms(params, what="adapters take")
    settings = FrozenBase(rank, train, dtype, of)
    leaves = named_leaves(params)
    known = {x.path: x.axes for x in matrices}
    whole = _trained(settings.train, leaves, known)
    nodes = _nodes(settings, leaves, known)

    def core(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        if name in nodes:
            return nodes[name]
        return leaf if name in whole else None

    def base(path: Any, leaf: Any) -> Any:
        name = path_name(path)
        if name in whole:
            return None
        is_array = hasattr(leaf, "dtype")
        return frozen(leaf, settings.dtype, known.get(name)) if is_array else leaf

    each = functools.partial(jax.tree_util.tree_map_with_path, is_leaf=is_low_rank)
    return Adapters(each(core, params), each(base, params))


def _trained(
    patterns: str | Iterable[str], leaves: Mapping[str, Any], known: Mapping[str, Axes]
) -> set[str]:
    """The names of leaves that train whole."""
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {x for x in leaves if re.search(pattern, x)}
        if not hits:
            raise ValueError(
                f"`train` {pattern!r} matches none of: {', '.join(leaves)}"
            )
        both = hits & known.keys()
        if both:
            raise ValueError(
                f"`train` {pattern!r} matches {', '.join(sorted(both))}, which is to "
                "have a core: leave it out of the matrices"
            )
        found |= hits
    return found


def _nodes(
    settings: FrozenBase, leaves: Mapping[str, Any], known: Mapping[str, Axes]
) -> dict[str, LowRank]:
    """U, V and a core of zeros for each matrix."""
    given = settings.rank
    if isinstance(given, Mapping):
        for name in given:
            leaf_at(name, known, what="`rank` names")
    origins = _origins(settings.of, known)
    nodes = {}
    for name, axes in known.items():
        leaf = leaf_at(name, leaves, axes.shape)
        if is_low_rank(leaf):
            raise ValueError(
                f"{name} is in low rank already: begin with materialize(params)"
            )
        rank = given.get(name, 0) if isinstance(given, Mapping) else given
        rank = min(rank, axes.m, axes.n) if isinstance(given, int) else rank
        if not 1 <= rank <= min(axes.m, axes.n):
            raise ValueError(
                f"`rank` must be in [1, {min(axes.m, axes.n)}] for {name}, got {rank}"
            )
        nodes[name] = _node(leaf, axes, rank, origins.get(name), name)
    return nodes


def _origins(of: Any, known: Mapping[str, Axes]) -> dict[str, Any]:
    """By name, what the bases of each matrix come from; nothing for W0."""
    if of is None:
        return {}
    if isinstance(of, Statistics):
        for name in known:
            leaf_at(name, of.sides, what="no statistics of")
        return {x: of.covariances(x) for x in known}
    trees = named_leaves(of)
    return {x: leaf_at(x, trees, axes.shape) for x, axes in known.items()}


def _node(leaf: Any, axes: Axes, rank: int, origin: Any, name: str) -> LowRank:
    """Bases of a matrix, with a core of zeros."""
    if isinstance(origin, tuple):
        found = _weighted(axes.to_matrix(leaf), *origin, rank=rank)
    else:
        found = _plain(axes.to_matrix(leaf if origin is None else origin), rank=rank)
    u, sigma, vt = alone(found)
    if not bool(jnp.all(jnp.isfinite(sigma))):
        raise ValueError(f"{name}, or what its directions come from, is not finite")
    dtype = leaf.dtype
    s = jnp.zeros((*axes.l, rank, rank), compute_dtype(dtype))
    basis = Basis(0).after(jax.device_get(sigma), rank)
    return LowRank(u.astype(dtype), s, vt.astype(dtype), axes, basis)


@functools.partial(jax.jit, static_argnames="rank")
def _plain(matrix: Array, *, rank: int) -> tuple[Array, Array, Array]:
    u, sigma, vt = svd(matrix)
    return u[..., :rank], sigma, vt[..., :rank, :]


@functools.partial(jax.jit, static_argnames="rank")
def _weighted(
    matrix: Array, inputs: Any, outputs: Any, *, rank: int
) -> tuple[Array, Array, Array]:
    found = weighted.directions(matrix, inputs, outputs)
    u, _, vt = weighted.cut(found, rank)
    return u, found.sigma, vt


def attached(cores: PyTree, base: PyTree) -> PyTree:
    """The params that cores and base are: for `materialize`, `merge`, `export`.

    `factored` runs them; the base gets no gradient.

    Raises:   ValueError: a leaf is in neither or, unless it has a core, in both.
    """
    left = leaves_by_path(cores)

    def one(path: Any, held: Any) -> Any:
        core: Any = left.get(path)
        if is_low_rank(core) and isinstance(held, Frozen):
            if held.shape != core.shape:
                raise ValueError(
                    f"{path_name(path)} has shape {core.shape} in the cores and "
                    f"{held.shape} in the base"
                )
            return Adapted(held, core)
        if (core is None) == (held is None):
            where = "neither" if core is None else "both"
            raise ValueError(f"{path_name(path)} is in {where} of cores and base")
        return held if core is None else core

    lost = left.keys() - _places(base)
    if lost:
        names = ", ".join(sorted(map(path_name, lost)))
        raise ValueError(f"the base has no place for {names}: it is of other params")
    return jax.tree_util.tree_map_with_path(
        one, base, is_leaf=lambda x: x is None or is_node(x)
    )


def _places(base: PyTree) -> set[Any]:
    """The paths of all leaves, None being one."""
    flat = jax.tree_util.tree_leaves_with_path(
        base, is_leaf=lambda x: x is None or is_node(x)
    )
    return {path for path, _ in flat}


def on_base(fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn(params, *args) as a function of (cores, base, *args), by `factored`.

    The product with W0 and the product with U S Vᵀ are computed beside each other; on
    the way back S gets (x U)ᵀ (g V), and nothing of the shape of W is formed.
    """
    run = factored(fn)

    def based(cores: PyTree, base: PyTree, *args: Any, **kwargs: Any) -> Any:
        return run(attached(cores, base), *args, **kwargs)

    return based
