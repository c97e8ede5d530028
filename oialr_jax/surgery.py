"""The only place where shapes change: factorize, truncate and densify, host side.

An event computes on the devices (one batched, jitted call for all matrices of a shape),
brings the singular values to the host once, chooses ranks there, and builds new params
and a new optimizer state. Nothing is changed in place: on an error the caller's trees
are as they were.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jaxtyping import Array

from oialr_jax import moments
from oialr_jax.decompose import (
    AHEAD,
    NOW,
    Run,
    Solved,
    by_gram,
    decomposed,
    is_committed,
    mesh_of,
    on_host,
)
from oialr_jax.labels import check_labels
from oialr_jax.lowrank import (
    RESOLVED,
    Axes,
    Basis,
    LowRank,
    PyTree,
    abstract_node,
    arrays_only,
    compute_dtype,
    diagonal,
    is_low_rank,
    leaves_by_path,
    named_leaves,
    orthogonality_error,
    path_name,
    signed_qr,
    unique_names,
    without_identity,
)
from oialr_jax.matrices import Matrix
from oialr_jax.moments import MomentRule, Move
from oialr_jax.schedule import RankRule
from oialr_jax.sharding import Layout, on_auto_axes
from oialr_jax.transform import (
    UNWRAPPED,
    adam_states,
    check_frozen,
    is_frozen,
    trainable,
    with_pending,
)


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


@on_auto_axes
def factorize(
    params: PyTree,
    opt_state: PyTree,
    matrices: Sequence[Matrix],
    *,
    tx: optax.GradientTransformation | None = None,
    rank: int | Mapping[str, int] | None = None,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
    layout: Layout | None = None,
) -> tuple[PyTree, PyTree, Report]:
    """Host side: (params, opt_state, report) with `matrices` held as LowRank nodes.

    At full rank (the default) the function that the network computes does not change.
    First moments become UᵀMV, so the next step of a linear optimizer is the dense step
    projected on the bases. A leaf that is not finite stays dense and the report says
    so. Leaves that are LowRank already are left alone. Trees beside the params do not
    follow: `rebase(tree, params)` brings them into the new bases, with those outside
    of the span dropped.

    Args:     opt_state, tx: both, or None for params without an optimizer.
              rank: one for all, or by path; None keeps min(m, n).
              layout: where the result lies; by default `Layout(mesh)` of the params'
              mesh, if they lie on one.
    Raises:   ValueError: a matrix names no leaf of `params`, or one of another shape; a
              rank is outside [1, min(m, n)]; `tx` moves bases (see `freeze_bases`), or
              its masks or labels depend on the shape that a leaf has.
    Source:   OIALR, conversion; the authors' code zeroes the moments and keeps the step
              count, which makes Adam's next steps about three learning rates long.
    """
    return _factorized(params, opt_state, matrices, rank, tx, moment_rule, layout, NOW)


@on_auto_axes
def truncate(
    params: PyTree,
    opt_state: PyTree,
    rule: RankRule | Mapping[str, int],
    *,
    tx: optax.GradientTransformation | None = None,
    paths: Iterable[str] | None = None,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
    layout: Layout | None = None,
) -> tuple[PyTree, PyTree, Report]:
    """Host side: (params, opt_state, report) with cores diagonal and ranks chosen anew.

    For each LowRank leaf named by `paths` (all by default), S = Us Σ Vsᵀ gives
    U <- U Us, Vᵀ <- Vsᵀ Vᵀ, S <- Σ, cut to the rank that `rule` chooses (or names, by
    path); a stack takes the largest rank of its matrices. Moments turn by the same Us
    and Vs. Bases that have drifted from orthonormal past `ORTHOGONALITY_BOUND` are
    repaired by a QR whose triangular part goes into the core, so W does not change. A
    leaf that is not finite stays as it was. Trees beside the params do not follow:
    `rebase(tree, params)` brings them into the new bases.

    Args:     opt_state, tx: both, or None for params without an optimizer.
              layout: where the result lies; by default `Layout(mesh)` of the params'
              mesh, if they lie on one.
    Raises:   ValueError: a path names no LowRank leaf; a named rank is outside [1, the
              present one]; `tx` as in `factorize`.
    Source:   OIALR, update step; the authors' code turns bases and core but only slices
              the moments, which leaves them in axes that no longer exist.
    """
    if paths is None and isinstance(rule, Mapping):
        paths = rule
    return _truncated(params, opt_state, rule, paths, tx, moment_rule, layout, NOW)


@on_auto_axes
def choose(
    params: PyTree, rule: RankRule, matrices: Sequence[Matrix]
) -> dict[str, int]:
    """Host side: the rank that `rule` gives each matrix, dense or low-rank, by path.

    Only singular values are computed, a batch for each shape, and brought to the host
    in one transfer; those of long dense matrices by their Gram matrix, if the rule does
    not ask for values that those do not resolve. A matrix that is not finite has no
    rank.

    Raises:   ValueError: a matrix names no leaf of `params`; a budget is too small.
    """
    leaves = named_leaves(params)
    items = [_named(matrix.path, leaves) for matrix in matrices]
    axes = [x.axes for x in matrices]
    kept = _kept_of(rule, axes)
    found = decomposed(items, axes, NOW, vectors=False, kept=kept)
    ranks = _ranks(rule, on_host(found, NOW), axes)
    return {x.path: r for x, r in zip(matrices, ranks, strict=True) if r}


def _kept_of(rule: RankRule, axes: Sequence[Axes]) -> list[int] | None:
    """The `kept` of values to choose by: None where small ones count, or the least."""
    exact = rule.budget is not None or rule.cutoff < RESOLVED
    return None if exact else [1] * len(axes)


def _ranks(
    rule: RankRule, spectra: Sequence[np.ndarray], axes: Sequence[Axes]
) -> list[int | None]:
    """The rank of each matrix, None where it is not finite."""
    good = [i for i, sigma in enumerate(spectra) if np.isfinite(sigma).all()]
    chosen = rule.choose_all(
        [spectra[i].reshape(-1, spectra[i].shape[-1]) for i in good],
        [(axes[i].m, axes[i].n) for i in good],
    )
    ranks: list[int | None] = [None] * len(spectra)
    for i, r in zip(good, chosen, strict=True):
        ranks[i] = r
    return ranks


@on_auto_axes
def project(params: PyTree, rule: RankRule, matrices: Sequence[Matrix]) -> PyTree:
    """Host side: params with the nearest matrices of the ranks that `rule` chooses.

    They stay dense, and those that are LowRank, or not finite, are left alone. Of a
    stack all have the same rank. The optimizer state needs no change.

    Raises:   ValueError: a matrix names no leaf of `params`, or one of another shape; a
              budget is too small.
    Source:   Jain, Meka and Dhillon 2010 (singular value projection).

    >>> axes = Axes(shape=(2, 2), stack=(), inputs=(0,), outputs=(1,))
    >>> params = {"w": jnp.array([[2.0, 0.0], [0.0, 0.1]])}
    >>> project(params, RankRule(), [Matrix("w", axes, rows=1, kind="dot")])
    {'w': Array([[2., 0.],
           [0., 0.]], dtype=float32)}
    """
    leaves = leaves_by_path(params)
    by_name = dict(zip(unique_names(leaves), leaves, strict=True))
    paths = [_path_of(matrix, by_name, leaves) for matrix in matrices]
    dense = {
        path: matrix.axes
        for path, matrix in zip(paths, matrices, strict=True)
        if not is_low_rank(leaves[path])
    }
    axes = list(dense.values())
    solved = decomposed([leaves[path] for path in dense], axes, NOW, vectors=True)
    ranks = _ranks(rule, on_host(solved, NOW), axes)
    NOW.agree(ranks)
    new = {
        path: _recomposed(
            leaves[path],
            x.batch,
            NOW.put(x.start, x.batch[0]),
            NOW.put(r, x.batch[0]),
            stack=x.stack,
            axes=dense[path],
            where=_place(leaves[path]),
        )
        for path, x, r in zip(dense, solved, ranks, strict=True)
        if r
    }
    return _replaced(params, new)


def _place(leaf: Any) -> NamedSharding | None:
    """Where on a mesh a leaf lies, if it lies on one."""
    where = getattr(leaf, "sharding", None)
    return where if isinstance(where, NamedSharding) else None


@functools.partial(jax.jit, static_argnames=("stack", "axes", "where"))
def _recomposed(
    leaf: Array,
    batch: tuple[Array, Array, Array],
    start: Any,
    rank: Any,
    *,
    stack: tuple[int, ...],
    axes: Axes,
    where: NamedSharding | None,
) -> Array:
    """One dense leaf again, of its first `rank` singular vectors."""
    left, sigma, right = _part(batch, start, stack)
    kept = jnp.where(jnp.arange(sigma.shape[-1]) < rank, sigma, 0)
    with jax.default_matmul_precision("highest"):
        matrix = (left * kept[..., None, :]) @ right
    new = axes.to_array(matrix).astype(leaf.dtype)
    return new if where is None else jax.lax.with_sharding_constraint(new, where)


def _part(
    batch: tuple[Array, Array, Array], start: Any, stack: tuple[int, ...]
) -> list[Array]:
    """Of a batched decomposition that of one leaf."""
    count = math.prod(stack)
    return [
        jax.lax.dynamic_slice_in_dim(x, start, count).reshape(*stack, *x.shape[1:])
        for x in batch
    ]


@on_auto_axes
def compile_ahead(
    params: PyTree,
    opt_state: PyTree,
    matrices: Sequence[Matrix],
    ranks: Mapping[str, int],
    then: Sequence[Matrix],
    *,
    tx: optax.GradientTransformation | None,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
    layout: Layout | None = None,
) -> tuple[PyTree, PyTree]:
    """Host side: compile what an event with these ranks runs; the shapes it will give.

    The event is `apply_ranks` of the same arguments; nothing is computed. It is
    expected to find every matrix finite and no basis drifted: otherwise it compiles
    something else when it comes. `choose` for the matrices `then` is compiled as well.

    Args:     params, opt_state: arrays, or `jax.ShapeDtypeStruct` with the sharding of
              those that are committed to one.
    """
    params, opt_state, _ = _ranks_applied(
        params, opt_state, matrices, ranks, tx, moment_rule, layout, AHEAD
    )
    leaves = named_leaves(params)
    items = [leaves[matrix.path] for matrix in then]
    decomposed(items, [x.axes for x in then], AHEAD, vectors=False)
    return params, opt_state


@on_auto_axes
def apply_ranks(
    params: PyTree,
    opt_state: PyTree,
    matrices: Sequence[Matrix],
    ranks: Mapping[str, int],
    *,
    tx: optax.GradientTransformation | None,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
    layout: Layout | None = None,
) -> tuple[PyTree, PyTree, list[Report]]:
    """Host side: the `matrices` named by `ranks` at these ranks, dense or not before.

    Raises:   ValueError: what `factorize` and `truncate` raise.
    """
    return _ranks_applied(
        params, opt_state, matrices, ranks, tx, moment_rule, layout, NOW
    )


def _ranks_applied(
    params: PyTree,
    opt_state: PyTree,
    matrices: Sequence[Matrix],
    ranks: Mapping[str, int],
    tx: optax.GradientTransformation | None,
    moment_rule: MomentRule,
    layout: Layout | None,
    run: "Run",
) -> tuple[PyTree, PyTree, list[Report]]:
    leaves = named_leaves(params)
    chosen = [x for x in matrices if x.path in ranks]  # in one order: one program
    low = {x.path: ranks[x.path] for x in chosen if is_low_rank(leaves.get(x.path))}
    dense = [x for x in chosen if x.path not in low]
    reports = []
    if dense:
        wanted = {x.path: ranks[x.path] for x in dense}
        params, opt_state, report = _factorized(
            params, opt_state, dense, wanted, tx, moment_rule, layout, run
        )
        reports.append(report)
    if low:
        params, opt_state, report = _truncated(
            params, opt_state, low, low, tx, moment_rule, layout, run
        )
        reports.append(report)
    return params, opt_state, reports


@on_auto_axes
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
    leaves = leaves_by_path(params)
    nodes = {path: leaf for path, leaf in leaves.items() if is_low_rank(leaf)}
    dense = _replaced(params, {p: node.materialize() for p, node in nodes.items()})
    if opt_state is None:
        return dense
    if tx is None:
        raise ValueError("`densify` needs `tx` to carry the optimizer state")
    moves = [
        Move(
            node.u.astype(compute_dtype(node.dtype)),
            jnp.swapaxes(node.vt, -1, -2).astype(compute_dtype(node.dtype)),
            after=node.axes,
        )
        for node in nodes.values()
    ]
    _check_wrapped(opt_state, tx)
    return dense, _carried(
        dense,
        opt_state,
        moves,
        paths=tuple(nodes),
        tx=tx,
        rule=moment_rule,
        layout=None,
    )


def _factorized(
    params: PyTree,
    opt_state: PyTree,
    matrices: Sequence[Matrix],
    rank: int | Mapping[str, int] | None,
    tx: optax.GradientTransformation | None,
    moment_rule: MomentRule,
    layout: Layout | None,
    run: "Run",
) -> tuple[PyTree, PyTree, Report]:
    leaves = leaves_by_path(params)
    by_name = dict(zip(unique_names(leaves), leaves, strict=True))
    jobs = {}
    for matrix in matrices:
        path = _path_of(matrix, by_name, leaves)
        wanted = rank.get(matrix.path) if isinstance(rank, Mapping) else rank
        full = min(matrix.m, matrix.n)
        wanted = full if wanted is None else wanted
        _check_rank(wanted, full, matrix.path)
        if not is_low_rank(leaves[path]):
            jobs[path] = (matrix, wanted)
    if isinstance(rank, Mapping):
        for name in rank:
            _named(name, {matrix.path: () for matrix in matrices}, "`rank` names")

    chosen = [matrix for matrix, _ in jobs.values()]
    items, axes = [leaves[path] for path in jobs], [x.axes for x in chosen]
    kept = [r for _, r in jobs.values()]
    solved = decomposed(items, axes, run, vectors=True, kept=kept)
    spectra = on_host(solved, run)
    faint = [
        i
        for i, (sigma, r) in enumerate(zip(spectra, kept, strict=True))
        if by_gram(axes[i], r) and np.any(sigma[..., r - 1] < RESOLVED * sigma[..., 0])
    ]
    if faint:
        again = decomposed(
            [items[i] for i in faint], [axes[i] for i in faint], run, vectors=True
        )
        for i, x, sigma in zip(faint, again, on_host(again, run), strict=True):
            solved[i], spectra[i] = x, sigma
    plan = [
        _Cut(
            path,
            r if np.isfinite(sigma).all() else None,
            matrix.axes,
            Basis(0).after(sigma, r),
        )
        for (path, (matrix, r)), sigma in zip(jobs.items(), spectra, strict=True)
    ]
    new_params, new_state = _after(
        params, opt_state, solved, plan, tx, moment_rule, layout, run
    )
    new = leaves_by_path(new_params)
    nodes = [new[cut.path] for cut in plan if cut.rank]
    errors = iter(run.get(run.call(_errors, [(x.u, x.vt) for x in nodes])))
    layers = [
        _layer(x.path, x.axes, None, cut.rank, sigma, next(errors) if cut.rank else 0)
        for x, cut, sigma in zip(chosen, plan, spectra, strict=True)
    ]
    return new_params, new_state, Report(tuple(layers), "conversion")


def _truncated(
    params: PyTree,
    opt_state: PyTree,
    rule: RankRule | Mapping[str, int],
    paths: Iterable[str] | None,
    tx: optax.GradientTransformation | None,
    moment_rule: MomentRule,
    layout: Layout | None,
    run: "Run",
) -> tuple[PyTree, PyTree, Report]:
    leaves = leaves_by_path(params)
    nodes_by_name = {
        path_name(path): path for path, leaf in leaves.items() if is_low_rank(leaf)
    }
    if paths is None:
        chosen = list(nodes_by_name.values())
    else:
        chosen = [_named(n, nodes_by_name, "no low-rank leaf at") for n in paths]

    nodes = [leaves[path] for path in chosen]
    if isinstance(rule, Mapping):
        for path, node in zip(chosen, nodes, strict=True):
            name = path_name(path)
            _named(name, rule, "`rule` has no rank for")
            _check_rank(rule[name], node.rank, name)
    solved, spectra, errors = _facts(nodes, run)
    drifted = [
        i for i, e in enumerate(errors) if np.isfinite(e) and e > _bound(nodes[i])
    ]
    if drifted:  # a repair moves bases by no more than the drift: overlaps stay Us, Vs
        repaired = [
            dataclasses.replace(
                _repaired(without_identity(nodes[i])), basis=nodes[i].basis
            )
            for i in drifted
        ]
        again, sigmas, _ = _facts(repaired, run)
        for i, node, x, sigma in zip(drifted, repaired, again, sigmas, strict=True):
            nodes[i], solved[i], spectra[i] = node, x, sigma
    sound = [
        sigma if np.isfinite(error) else np.full_like(sigma, np.nan)
        for sigma, error in zip(spectra, errors, strict=True)
    ]
    if isinstance(rule, RankRule):
        ranks = _ranks(rule, sound, [x.axes for x in nodes])
    else:
        ranks = [
            rule[path_name(path)] if np.isfinite(sigma).all() else None
            for path, sigma in zip(chosen, sound, strict=True)
        ]
    plan = [
        _Cut(path, r, node.axes, Basis(node.basis).after(sigma, r or 0))
        for path, r, node, sigma in zip(chosen, ranks, nodes, spectra, strict=True)
    ]
    layers = [
        _layer(path_name(path), node.axes, node.rank, r, sigma, error)
        for path, node, r, sigma, error in zip(
            chosen, nodes, ranks, spectra, errors, strict=True
        )
    ]
    repairs = _replaced(params, dict(zip(chosen, nodes, strict=True)))
    new_params, new_state = _after(
        repairs if drifted else params,
        opt_state,
        solved,
        plan,
        tx,
        moment_rule,
        layout,
        run,
    )
    return new_params, new_state, Report(tuple(layers), "truncation")


ORTHOGONALITY_BOUND = 1e-3
"""Entry of |UᵀU - I| past which float32 bases are repaired; bfloat16 rounding alone
gives 4e-3, so narrower bases are repaired past ten times their machine epsilon."""


class _Cut(NamedTuple):
    """What becomes of one leaf: its new rank (None: left as it was), axes and bases."""

    path: tuple[Any, ...]
    rank: int | None
    axes: Axes
    basis: Basis


def _facts(
    nodes: Sequence[LowRank], run: Run
) -> tuple[list[Solved], list[np.ndarray], list[Any]]:
    """The cores' SVDs; on the host their singular values and the bases' errors."""
    solved = decomposed(nodes, [x.axes for x in nodes], run, vectors=True)
    errors = run.call(_errors, [(x.u, x.vt) for x in nodes])
    return solved, on_host(solved, run), run.get(errors)


@jax.jit
def _errors(bases: list[tuple[Array, Array]]) -> list[Array]:
    """How far each pair of bases is from orthonormal: not finite where they are not."""
    return [orthogonality_error(u, vt) for u, vt in bases]


@functools.partial(jax.jit, static_argnames=("stack", "rank", "axes", "where"))
def _rebased(
    leaf: Any,
    batch: tuple[Array, Array, Array],
    start: Any,
    *,
    stack: tuple[int, ...],
    rank: int,
    axes: Axes,
    where: tuple[Any, ...] | None,
) -> tuple[LowRank, Move]:
    """One leaf on the first `rank` singular vectors, and the move of its moments.

    Of a dense leaf W = U Σ Vᵀ gradients become UᵀGV; of a core S = Us Σ Vsᵀ the bases
    become U Us and Vsᵀ Vᵀ and moments turn by Us and Vs.
    """
    left, sigma, right = _part(batch, start, stack)
    left, sigma, right = left[..., :rank], sigma[..., :rank], right[..., :rank, :]
    u, vt, core, old = left, right, diagonal(sigma), (leaf, leaf, leaf)
    if is_low_rank(leaf):
        with jax.default_matmul_precision("highest"):
            u = leaf.u.astype(sigma.dtype) @ left
            vt = right @ leaf.vt.astype(sigma.dtype)
        old = (leaf.u, leaf.s, leaf.vt)
    u, core, vt = (x.astype(o.dtype) for x, o in zip((u, core, vt), old, strict=True))
    if where is not None:
        u, core, vt = jax.lax.with_sharding_constraint((u, core, vt), where)
    before = None if is_low_rank(leaf) else axes
    return LowRank(u, core, vt, axes), Move(
        jnp.swapaxes(left, -1, -2), right, before=before
    )


@jax.jit
def _repaired(node: LowRank) -> LowRank:
    """Orthonormal bases, the triangular parts in the core: U S Vᵀ does not change."""
    wide = compute_dtype(node.dtype)
    u, s, vt = (f.astype(wide) for f in (node.u, node.s, node.vt))
    (qu, ru), (qv, rv) = signed_qr(u), signed_qr(jnp.swapaxes(vt, -1, -2))
    with jax.default_matmul_precision("highest"):
        core = ru @ s @ jnp.swapaxes(rv, -1, -2)
    new = (qu, core, jnp.swapaxes(qv, -1, -2))
    old = (node.u, node.s, node.vt)
    u, s, vt = (f.astype(o.dtype) for f, o in zip(new, old, strict=True))
    return dataclasses.replace(node, u=u, s=s, vt=vt)


def _bound(node: LowRank) -> float:
    return max(ORTHOGONALITY_BOUND, 10 * float(jnp.finfo(node.u.dtype).eps))


def _layer(
    path: str,
    axes: Axes,
    before: int | None,
    after: int | None,
    sigma: np.ndarray,
    error: Any,
) -> LayerReport:
    """`after` is None for a leaf that is not finite and was left as it was."""
    flat = np.asarray(sigma, np.float64).reshape(-1, sigma.shape[-1])
    energy, finite = 1.0, after is not None
    if finite and np.sum(flat**2) > 0:
        energy = float(np.sum(flat[:, :after] ** 2) / np.sum(flat**2))
    return LayerReport(
        path,
        axes.m,
        axes.n,
        before,
        after if finite else before,
        energy,
        finite,
        float(error),
        flat,
    )


def _named(name: str, known: Mapping[str, Any], what: str = "no leaf at") -> Any:
    if name not in known:
        raise ValueError(f"{what} {name}; there are: {', '.join(known)}")
    return known[name]


def _path_of(
    matrix: Matrix, by_name: Mapping[str, Any], leaves: Mapping[Any, Any]
) -> Any:
    """The path of the leaf that a matrix names.

    Raises:   ValueError: there is none, or it has another shape.
    """
    path = _named(matrix.path, by_name)
    shape = leaves[path].shape
    if shape != matrix.axes.shape:
        raise ValueError(
            f"{matrix.path} has shape {shape}, the matrix has {matrix.axes.shape}"
        )
    return path


def _check_rank(rank: int, full: int, path: str) -> None:
    if not 1 <= rank <= full:
        raise ValueError(f"`rank` must be in [1, {full}] for {path}, got {rank}")


def _replaced(params: PyTree, new: Mapping[tuple[Any, ...], Any]) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: new.get(path, leaf), params, is_leaf=is_low_rank
    )


def _check_wrapped(opt_state: PyTree, tx: optax.GradientTransformation | None) -> None:
    if (opt_state is None) != (tx is None):
        have, need = ("tx", "opt_state") if opt_state is None else ("opt_state", "tx")
        raise ValueError(f"`{have}` without `{need}`: give both, or None for both")
    if tx is not None and not any(
        map(is_frozen, jax.tree.leaves(opt_state, is_leaf=is_frozen))
    ):
        raise ValueError(f"the optimizer would move frozen bases: {UNWRAPPED}")


def _after(
    params: PyTree,
    opt_state: PyTree,
    solved: Sequence[Solved],
    plan: Sequence[_Cut],
    tx: optax.GradientTransformation | None,
    rule: MomentRule,
    layout: Layout | None,
    run: Run,
) -> tuple[PyTree, PyTree]:
    """Params and state after an event."""
    _check_wrapped(opt_state, tx)
    run.agree([(path_name(cut.path), cut.rank, int(cut.basis)) for cut in plan])
    leaves = leaves_by_path(params)
    mesh = mesh_of(jax.tree.leaves(params))
    if layout is None and mesh is not None:
        layout = Layout(mesh)
    beside = next((x for x in jax.tree.leaves(params) if mesh_of([x])), None)
    opt_state = jax.tree.map(
        lambda x: x if beside is None or is_committed(x) else run.put(x, beside),
        opt_state,
    )
    places = _places(params, plan, layout)
    moved = {
        cut.path: run.call(
            _rebased,
            without_identity(leaves[cut.path]),
            x.batch,
            run.put(x.start, x.batch[0]),
            stack=x.stack,
            rank=cut.rank,
            axes=cut.axes,
            where=places.get(cut.path),
        )
        for x, cut in zip(solved, plan, strict=True)
        if cut.rank
    }
    if not moved and tx is not None:
        return params, with_pending(params, opt_state, {})
    moves = [move for _, move in moved.values()]
    bases = {cut.path: cut.basis for cut in plan}  # of the host: no program's business
    nodes = {
        path: dataclasses.replace(node, basis=bases[path])
        for path, (node, _) in moved.items()
    }
    new_params = _replaced(params, nodes)
    if tx is None:
        return new_params, None
    state = run.call(
        _carried,
        arrays_only(without_identity(new_params)),
        opt_state,
        moves,
        paths=tuple(moved),
        tx=tx,
        rule=rule,
        layout=layout,
    )
    return new_params, state


def _places(
    params: PyTree, plan: Sequence[_Cut], layout: Layout | None
) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """Where the layout wants u, s and vt of each leaf that moves."""
    if layout is None:
        return {}

    nodes = {x.path: abstract_node(x.axes, x.rank, jnp.float32) for x in plan if x.rank}
    places = leaves_by_path(layout(_replaced(params, nodes)))
    return {path: (places[path].u, places[path].s, places[path].vt) for path in nodes}


@functools.partial(jax.jit, static_argnames=("paths", "tx", "rule", "layout"))
def _carried(
    new_params: PyTree,
    opt_state: PyTree,
    moves: list[Move],
    *,
    paths: tuple[tuple[Any, ...], ...],
    tx: optax.GradientTransformation,
    rule: MomentRule,
    layout: Layout | None,
) -> PyTree:
    moved, trained = dict(zip(paths, moves, strict=True)), trainable(new_params)
    check_frozen(tx, new_params)
    check_labels(tx, moments.shapes_before(trained, moved), trained)
    new = moments.carry(
        opt_state,
        tx.init(new_params),
        moved,
        rule,
        params=trained,
        adam=adam_states(tx, trained),
    )
    new = jax.tree.map(
        lambda x: x._replace(pending=jnp.zeros_like(x.pending)) if is_frozen(x) else x,
        new,
        is_leaf=is_frozen,
    )
    if layout is None:
        return new
    return jax.lax.with_sharding_constraint(new, layout.of_optimizer(new_params, new))
