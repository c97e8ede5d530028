"""The only place where shapes change: factorize, truncate and densify, host side.

An event computes on the devices (one batched, jitted call for all matrices of a shape),
brings the singular values to the host once, chooses ranks there, and builds new params
and a new optimizer state. Nothing is changed in place: on an error the caller's trees
are as they were.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from oialr_jax import moments
from oialr_jax.lowrank import (
    LowRank,
    PyTree,
    compute_dtype,
    diagonal,
    is_low_rank,
    orthogonality_error,
    path_name,
    svd,
)
from oialr_jax.matrices import Matrix
from oialr_jax.moments import MomentRule, Move
from oialr_jax.schedule import RankRule
from oialr_jax.transform import FreezeBasesState


class LayerReport(NamedTuple):
    """What one event did to one leaf.

    `before` is None where the leaf was dense. `energy` is the kept fraction of the sum
    of squared singular values. `sigma` holds all singular values before the cut, one
    row per matrix of the stack. A leaf that is not `finite` was left as it was.
    """

    path: str
    m: int
    n: int
    before: int | None
    after: int | None
    energy: float
    finite: bool
    orthogonality_error: float
    sigma: np.ndarray


@dataclasses.dataclass(frozen=True)
class Report:
    """What one event did: prints as a table, `to_dict` is ready for JSON."""

    layers: tuple[LayerReport, ...]
    kind: str
    step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; singular values to six digits."""
        layers = []
        for layer in self.layers:
            sigma = [[float(f"{x:.6g}") for x in row] for row in layer.sigma.tolist()]
            layers.append({**layer._asdict(), "sigma": sigma})
        return {"step": self.step, "kind": self.kind, "layers": layers}

    def __str__(self) -> str:
        when = "" if self.step is None else f" at step {self.step}"
        width = max([len(layer.path) for layer in self.layers] + [5])
        lines = [
            f"{self.kind}{when}",
            f"{'layer':<{width}}  {'shape':>11}  {'rank':>12}  {'energy':>7}  UᵀU-I",
        ]
        for x in self.layers:
            before = "dense" if x.before is None else str(x.before)
            after = "dense" if x.after is None else str(x.after)
            note = "" if x.finite else "  not finite, left as it was"
            lines.append(
                f"{x.path:<{width}}  {f'{x.m}x{x.n}':>11}  {before:>5} -> {after:<5}"
                f" {x.energy:>7.1%}  {x.orthogonality_error:.0e}{note}"
            )
        return "\n".join(lines)


def factorize(
    params: PyTree,
    opt_state: PyTree,
    matrices: Sequence[Matrix],
    *,
    tx: optax.GradientTransformation,
    rank: int | Mapping[str, int] | None = None,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
) -> tuple[PyTree, PyTree, Report]:
    """Host side: (params, opt_state, report) with `matrices` held as LowRank nodes.

    At full rank (the default) the function that the network computes does not change.
    First moments become UᵀMV, so the next step of a linear optimizer is the dense step
    projected on the bases. A leaf that is not finite stays dense and the report says
    so. Leaves that are LowRank already are left alone.

    Args:     rank: one for all, or by path; None keeps min(m, n).
    Raises:   ValueError: a matrix names no leaf of `params`, or one of another shape; a
              rank is outside [1, min(m, n)]; `tx` was not wrapped by `freeze_bases`.
    Source:   OIALR, conversion; the authors' code zeroes the moments and keeps the step
              count, which makes Adam's next steps about three learning rates long.
    """
    leaves = _leaves(params)
    by_name = {path_name(path): path for path in leaves}
    jobs = {}
    for matrix in matrices:
        path = _named(matrix.path, by_name)
        leaf = leaves[path]
        if leaf.shape != matrix.axes.shape:
            raise ValueError(
                f"{matrix.path} has shape {leaf.shape}, the matrix has "
                f"{matrix.axes.shape}"
            )
        wanted = rank.get(matrix.path) if isinstance(rank, Mapping) else rank
        full = min(matrix.m, matrix.n)
        wanted = full if wanted is None else wanted
        if not 1 <= wanted <= full:
            raise ValueError(
                f"`rank` must be in [1, {full}] for {matrix.path}, got {wanted}"
            )
        if not is_low_rank(leaf):
            jobs[path] = (matrix, wanted)
    if isinstance(rank, Mapping):
        for name in rank:
            _named(name, {matrix.path: () for matrix in matrices}, "`rank` names")

    groups: dict[Any, list[tuple[Any, ...]]] = defaultdict(list)
    for path, (matrix, _) in jobs.items():
        axes = matrix.axes
        groups[axes.m, axes.n, leaves[path].dtype].append(path)
    factors: dict[tuple[Any, ...], tuple[Array, Array, Array]] = {}
    for group in groups.values():
        stacks = [jobs[path][0].axes.to_matrix(leaves[path]) for path in group]
        factors |= zip(group, _batched(_factor_stacks, stacks), strict=True)
    checks = [(f[1], _finite(*f)) for f in factors.values()]
    host = dict(zip(factors, jax.device_get(checks), strict=True))

    nodes: dict[tuple[Any, ...], LowRank] = {}
    moves: dict[tuple[Any, ...], Move] = {}
    layers = []
    for path, (matrix, r) in jobs.items():
        u, sigma, vt = factors[path]
        host_sigma, finite = host[path]
        error = 0.0
        if finite:
            u, vt = u[..., :r], vt[..., :r, :]
            s = diagonal(sigma[..., :r])
            dtype = leaves[path].dtype
            moves[path] = Move(
                jnp.swapaxes(u, -1, -2), vt, before=matrix.axes, after=None
            )
            u, s, vt = (f.astype(dtype) for f in (u, s, vt))
            nodes[path] = node = LowRank(u, s, vt, matrix.axes)
            error = float(_error(node.u, node.vt))
        after = r if finite else None
        layers.append(_layer(matrix.path, matrix.axes, None, after, host_sigma, error))
    new_params, new_state = _rebuilt(params, opt_state, tx, nodes, moves, moment_rule)
    return new_params, new_state, Report(tuple(layers), "conversion")


def truncate(
    params: PyTree,
    opt_state: PyTree,
    rule: RankRule,
    *,
    tx: optax.GradientTransformation,
    paths: Iterable[str] | None = None,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
) -> tuple[PyTree, PyTree, Report]:
    """Host side: (params, opt_state, report) with cores diagonal and ranks chosen anew.

    For each LowRank leaf named by `paths` (all by default), S = Us Σ Vsᵀ gives
    U <- U Us, Vᵀ <- Vsᵀ Vᵀ, S <- Σ, cut to the rank that `rule` chooses; a stack takes
    the largest rank of its matrices. Moments turn by the same Us and Vs. Bases that
    have drifted from orthonormal past `ORTHOGONALITY_BOUND` are repaired by a QR whose
    triangular part goes into the core, so W does not change. A leaf that is not finite
    stays as it was.

    Raises:   ValueError: a path names no LowRank leaf; `tx` was not wrapped.
    Source:   OIALR, update step; the authors' code turns bases and core but only slices
              the moments, which leaves them in axes that no longer exist.
    """
    leaves = _leaves(params)
    nodes_by_name = {
        path_name(path): path for path, leaf in leaves.items() if is_low_rank(leaf)
    }
    if paths is None:
        chosen = list(nodes_by_name.values())
    else:
        chosen = [_named(n, nodes_by_name, "no low-rank leaf at") for n in paths]

    groups: dict[Any, list[tuple[Any, ...]]] = defaultdict(list)
    for path in chosen:
        node = leaves[path]
        shapes = (node.axes.m, node.axes.n, node.rank)
        groups[(*shapes, node.u.dtype, node.s.dtype)].append(path)
    turned: dict[tuple[Any, ...], _Turned] = {}
    for group in groups.values():
        stacks = [(leaves[p].u, leaves[p].s, leaves[p].vt) for p in group]
        turned |= zip(group, _batched(_turn_stacks, stacks), strict=True)
    checks = [(t.sigma, t.finite, t.error) for t in turned.values()]
    host = dict(zip(turned, jax.device_get(checks), strict=True))

    nodes: dict[tuple[Any, ...], LowRank] = {}
    moves: dict[tuple[Any, ...], Move] = {}
    layers = []
    for path in chosen:
        node, new = leaves[path], turned[path]
        sigma, finite, error = host[path]
        r = node.rank
        if np.all(finite):
            flat = sigma.reshape(-1, node.rank)
            r = rule.choose(flat, min(node.axes.m, node.axes.n))
            nodes[path] = LowRank(
                new.u[..., :r], new.s[..., :r, :r], new.vt[..., :r, :], node.axes
            )
            moves[path] = Move(new.left[..., :r, :], new.right[..., :r, :])
        layers.append(
            _layer(
                path_name(path), node.axes, node.rank, r, sigma, float(np.max(error))
            )
        )
    new_params, new_state = _rebuilt(params, opt_state, tx, nodes, moves, moment_rule)
    return new_params, new_state, Report(tuple(layers), "truncation")


def densify(
    params: PyTree,
    opt_state: PyTree | None = None,
    *,
    tx: optax.GradientTransformation | None = None,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
) -> Any:
    """Host side: params with every LowRank leaf dense again.

    With an optimizer state and its `tx` the result is (params, opt_state), first
    moments lifted as U M Vᵀ.
    """
    leaves = _leaves(params)
    nodes = {path: leaf for path, leaf in leaves.items() if is_low_rank(leaf)}
    arrays = {path: node.materialize() for path, node in nodes.items()}
    if opt_state is None:
        return _replaced(params, arrays)
    if tx is None:
        raise ValueError("`densify` needs `tx` to carry the optimizer state")
    moves = {
        path: Move(
            node.u.astype(compute_dtype(node.dtype)),
            jnp.swapaxes(node.vt, -1, -2).astype(compute_dtype(node.dtype)),
            before=None,
            after=node.axes,
        )
        for path, node in nodes.items()
    }
    return _rebuilt(params, opt_state, tx, arrays, moves, moment_rule)


ORTHOGONALITY_BOUND = 1e-3
"""Entry of |UᵀU - I| past which float32 bases are repaired; bfloat16 rounding alone
gives 4e-3, so narrower bases are repaired past ten times their machine epsilon."""


class _Turned(NamedTuple):
    """Bases and core after the SVD of the core, overlaps with the old, and checks."""

    u: Array
    s: Array
    vt: Array
    left: Array
    right: Array
    sigma: Array
    finite: Array
    error: Array


@jax.jit
def _factor_stacks(matrix: Array) -> tuple[Array, Array, Array]:
    return svd(matrix)


@jax.jit
def _turn_stacks(factors: tuple[Array, Array, Array]) -> _Turned:
    """The event's mathematics on stacks (b, m, r), (b, r, r), (b, r, n)."""
    stored = factors
    wide = compute_dtype(factors[1].dtype)
    u, s, vt = (f.astype(wide) for f in factors)
    v = jnp.swapaxes(vt, -1, -2)
    bound = max(ORTHOGONALITY_BOUND, 10 * float(jnp.finfo(stored[0].dtype).eps))
    error = jax.vmap(orthogonality_error)(u, vt)
    drifted = error > bound
    u, s, v = jax.lax.cond(
        jnp.any(drifted), _repaired, lambda *f: f[:3], u, s, v, drifted
    )
    with jax.default_matmul_precision("highest"):
        us, sigma, vst = svd(s)
        # A repair moves the bases by no more than the drift: overlaps are Us and Vs.
        left, right = jnp.swapaxes(us, -1, -2), vst
        new_u, new_vt = u @ us, vst @ jnp.swapaxes(v, -1, -2)
    new = (new_u, diagonal(sigma), new_vt)
    u, s, vt = (f.astype(old.dtype) for f, old in zip(new, stored, strict=True))
    finite = jax.vmap(lambda *f: jnp.all(jnp.stack([_finite(x) for x in f])))(
        new_u, sigma, new_vt
    )
    return _Turned(u, s, vt, left, right, sigma, finite, error)


def _repaired(
    u: Array, s: Array, v: Array, drifted: Array
) -> tuple[Array, Array, Array]:
    """Orthonormal bases where they drifted; U S Vᵀ is the same matrix as before."""
    (qu, ru), (qv, rv) = _signed_qr(u), _signed_qr(v)
    with jax.default_matmul_precision("highest"):
        core = ru @ s @ jnp.swapaxes(rv, -1, -2)
    where = drifted[:, None, None]
    return jnp.where(where, qu, u), jnp.where(where, core, s), jnp.where(where, qv, v)


def _signed_qr(basis: Array) -> tuple[Array, Array]:
    """QR with a positive diagonal: Q is the basis itself where it has no drift."""
    q, r = jnp.linalg.qr(basis)
    sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(q.dtype)
    return q * sign[..., None, :], sign[..., :, None] * r


@jax.jit
def _finite(*arrays: Array) -> Array:
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(a)) for a in arrays])


_error = jax.jit(orthogonality_error)


def _batched(fn: Any, items: Sequence[Any]) -> list[Any]:
    """fn on all items at once: stack axes flattened, concatenated, split again."""
    stack = [jax.tree.leaves(item)[0].shape[:-2] for item in items]
    sizes = [int(np.prod(shape)) for shape in stack]
    flat = [
        jax.tree.map(lambda a: a.reshape(-1, *a.shape[-2:]), item) for item in items
    ]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *flat)
    result = fn(joined)
    edges = np.cumsum([0, *sizes])
    return [
        jax.tree.map(
            lambda a, lo=lo, hi=hi, shape=shape: a[lo:hi].reshape(*shape, *a.shape[1:]),
            result,
        )
        for lo, hi, shape in zip(edges[:-1], edges[1:], stack, strict=True)
    ]


def _layer(
    path: str,
    axes: Any,
    before: int | None,
    after: int | None,
    sigma: np.ndarray,
    error: float,
) -> LayerReport:
    flat = np.asarray(sigma, np.float64).reshape(-1, sigma.shape[-1])
    finite = bool(np.all(np.isfinite(flat)))
    energy = 1.0
    if finite and after is not None and np.sum(flat**2) > 0:
        energy = float(np.sum(flat[:, :after] ** 2) / np.sum(flat**2))
    return LayerReport(path, axes.m, axes.n, before, after, energy, finite, error, flat)


def _leaves(params: PyTree) -> dict[tuple[Any, ...], Any]:
    return dict(jax.tree_util.tree_leaves_with_path(params, is_leaf=is_low_rank))


def _named(name: str, known: Mapping[str, Any], what: str = "no leaf at") -> Any:
    if name not in known:
        raise ValueError(f"{what} {name}; there are: {', '.join(known)}")
    return known[name]


def _replaced(params: PyTree, new: Mapping[tuple[Any, ...], Any]) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(path, leaf), params, is_leaf=is_low_rank
    )


def _rebuilt(
    params: PyTree,
    opt_state: PyTree,
    tx: optax.GradientTransformation,
    new: Mapping[tuple[Any, ...], Any],
    moves: dict[tuple[Any, ...], Move],
    rule: MomentRule,
) -> tuple[PyTree, PyTree]:
    new_params = _replaced(params, new)
    fresh = tx.init(new_params)
    wrapped = any(
        isinstance(x, FreezeBasesState)
        for x in jax.tree.leaves(
            opt_state, is_leaf=lambda x: isinstance(x, FreezeBasesState)
        )
    )
    if not wrapped or moments.holds_bases(fresh):
        raise ValueError(
            "the optimizer would move frozen bases: build it as "
            "oialr_jax.freeze_bases(tx), with nothing outside it, and train with that"
        )
    return new_params, moments.carry(opt_state, fresh, moves, rule)
