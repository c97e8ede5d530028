"""The only place where shapes change: factorize, truncate, widen, densify; host side.

There is one event, `_event`: it decomposes the leaves concerned (one batched, jitted
call for all matrices of a shape), brings the singular values to the host once, chooses
ranks there, and builds new params and a new optimizer state. Every verb here says which
leaves and which ranks. Nothing is changed in place: on an error the caller's trees are
as they were.
"""

import dataclasses
import functools
from collections.abc import Container, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from oialr_jax import moments
from oialr_jax.averages import averages
from oialr_jax.bases import (
    are_finite,
    bound,
    drift_of,
    of_matrices,
    rebased,
    repaired,
    widened,
)
from oialr_jax.decompose import (
    AHEAD,
    NOW,
    Run,
    Solved,
    Weights,
    by_gram,
    decomposed,
    is_committed,
    mesh_of,
    on_host,
)
from oialr_jax.labels import check_labels
from oialr_jax.linalg import (
    RESOLVED,
    alone,
    compute_dtype,
)
from oialr_jax.lowrank import (
    Axes,
    Basis,
    LowRank,
    PyTree,
    abstract_node,
    arrays_only,
    check_forms,
    is_low_rank,
    leaf_at,
    leaves_by_path,
    named_leaves,
    path_name,
    with_leaves,
    without_identity,
)
from oialr_jax.matrices import Matrix
from oialr_jax.moments import MomentRule, Move
from oialr_jax.ranking import ranks_by, unused, weights_of
from oialr_jax.reports import LayerReport, Report, layer_report
from oialr_jax.schedule import RankRule
from oialr_jax.sharding import Layout, on_auto_axes
from oialr_jax.transform import (
    UNWRAPPED,
    check_frozen,
    is_frozen,
    trainable,
    with_pending,
)
from oialr_jax.weighted import Statistics

NOTHING: Mapping[str, Any] = MappingProxyType({})
RAISED = "a rank goes up, and no direction was shown for"


class Setup(NamedTuple):
    """What the events of a run have in common.

    The optimizer or None, how its second moments cross an event, and where the result
    lies.
    """

    tx: Any
    moment_rule: MomentRule = MomentRule()
    layout: Layout | None = None


@on_auto_axes
def factorize(
    params: PyTree,
    opt_state: PyTree,
    matrices: Sequence[Matrix],
    *,
    tx: optax.GradientTransformation | None = None,
    rank: int | Mapping[str, int] | None = None,
    statistics: Statistics | None = None,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
    layout: Layout | None = None,
) -> tuple[PyTree, PyTree, Report]:
    """Host side: (params, opt_state, report) with `matrices` held as LowRank nodes.

    At full rank (the default) the function that the network computes does not change.
    First moments become UᵀMV, so the next step of a linear optimizer is the dense step
    projected on the bases. A leaf that is not finite stays dense and the report says
    so. Leaves that are LowRank already are unchanged. Trees beside the params do not
    follow: `rebase(tree, params)` projects them on the new bases.

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
    check_forms(params, what="rank events take")
    leaves = named_leaves(params)
    known = {x.path: x.axes for x in matrices}
    given = rank if isinstance(rank, Mapping) else {}
    for name in given:
        leaf_at(name, known, what="`rank` names")
    ranks = {}
    for name, axes in known.items():
        full = min(axes.m, axes.n)
        wanted = given.get(name) if isinstance(rank, Mapping) else rank
        wanted = full if wanted is None else wanted
        _check_rank(wanted, full, name)
        if not is_low_rank(leaf_at(name, leaves, axes.shape)):
            ranks[name] = wanted
    dense = {name: known[name] for name in ranks}
    setup = Setup(tx, moment_rule, layout)
    params, opt_state, (report, _) = _event(
        params, opt_state, dense, ranks, setup, statistics=statistics
    )
    return params, opt_state, report


@on_auto_axes
def truncate(
    params: PyTree,
    opt_state: PyTree,
    rule: RankRule | Mapping[str, int],
    *,
    tx: optax.GradientTransformation | None = None,
    paths: Iterable[str] | None = None,
    statistics: Statistics | None = None,
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
    nodes = {x: leaf for x, leaf in named_leaves(params).items() if is_low_rank(leaf)}
    if paths is None:
        paths = rule if isinstance(rule, Mapping) else nodes
    axes = {x: leaf_at(x, nodes, what="no low-rank leaf at").axes for x in paths}
    setup, ranks = Setup(tx, moment_rule, layout), {}
    if isinstance(rule, Mapping):
        ranks = {x: leaf_at(x, rule, what="`rule` has no rank for") for x in axes}
    params, opt_state, (_, report) = _event(
        params,
        opt_state,
        axes,
        ranks,
        setup,
        rule=rule if isinstance(rule, RankRule) else None,
        statistics=statistics,
    )
    return params, opt_state, report


@on_auto_axes
def widen(
    params: PyTree,
    opt_state: PyTree,
    ranks: Mapping[str, int],
    directions: PyTree,
    *,
    tx: optax.GradientTransformation | None = None,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
    layout: Layout | None = None,
) -> tuple[PyTree, PyTree, Report]:
    """Host side: (params, opt_state, report) with ranks raised; W stays what it is.

    A core becomes diagonal, as in `truncate`, and gets zeros; its bases get the first
    singular vectors of what `directions` has outside of them (`bases.widened`). A leaf
    stays as it was where it, or its array in `directions`, is not finite.

    Args:     ranks: by path, each in [the present one, min(m, n)].
              directions: a tree like the dense params: a gradient of them, say.
    Raises:   ValueError: a path names no LowRank leaf, or nothing in `directions`; a
              rank out of range; `opt_state` without `tx`, and `tx` as in `factorize`.
    """
    nodes = {x: leaf for x, leaf in named_leaves(params).items() if is_low_rank(leaf)}
    axes = {x: leaf_at(x, nodes, what="no low-rank leaf at").axes for x in ranks}
    for name, rank in ranks.items():
        full = min(axes[name].m, axes[name].n)
        _check_rank(rank, full, name, least=nodes[name].rank)
    shown = of_matrices(directions, axes, axes)
    setup = Setup(tx, moment_rule, layout)
    params, opt_state, (_, report) = _event(
        params, opt_state, axes, ranks, setup, directions=shown
    )
    return params, opt_state, report


@on_auto_axes
def compile_ahead(
    params: PyTree,
    opt_state: PyTree,
    matrices: Sequence[Matrix],
    ranks: Mapping[str, int],
    *,
    tx: optax.GradientTransformation | None,
    statistics: Statistics | None = None,
    directions: Mapping[str, Any] = NOTHING,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
    layout: Layout | None = None,
) -> tuple[PyTree, PyTree]:
    """Host side: compile what an event with these ranks runs; the shapes it will give.

    The event is `apply_ranks` of the same arguments; nothing is computed. It is
    expected to find every matrix finite and no basis drifted: otherwise it compiles
    something else when it comes.

    Args:     params, opt_state: arrays, or `jax.ShapeDtypeStruct` with the sharding of
              those that are committed to one.
    """
    setup = Setup(tx, moment_rule, layout)
    params, opt_state, _ = _event(
        params,
        opt_state,
        _axes_in(ranks, matrices),
        ranks,
        setup,
        statistics=statistics,
        directions=directions,
        run=AHEAD,
    )
    return params, opt_state


@on_auto_axes
def apply_ranks(
    params: PyTree,
    opt_state: PyTree,
    matrices: Sequence[Matrix],
    ranks: Mapping[str, int],
    *,
    tx: optax.GradientTransformation | None,
    statistics: Statistics | None = None,
    directions: Mapping[str, Any] = NOTHING,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
    layout: Layout | None = None,
) -> tuple[PyTree, PyTree, list[Report]]:
    """Host side: the `matrices` named by `ranks` at these ranks, dense or not before.

    Args:     directions: dense arrays by path, for ranks that go up; see `widen`.
    Raises:   ValueError: what `factorize` and `truncate` raise.
    """
    setup = Setup(tx, moment_rule, layout)
    params, opt_state, reports = _event(
        params,
        opt_state,
        _axes_in(ranks, matrices),
        ranks,
        setup,
        statistics=statistics,
        directions=directions,
    )
    return params, opt_state, [x for x in reports if x.layers]


def _axes_in(names: Container[str], matrices: Iterable[Matrix]) -> dict[str, Axes]:
    """The axes of the matrices of these names, in one order: one program."""
    return {x.path: x.axes for x in matrices if x.path in names}


@on_auto_axes
def apply_rule(
    params: PyTree,
    opt_state: PyTree,
    matrices: Sequence[Matrix],
    rule: RankRule,
    treated: Sequence[Matrix],
    *,
    tx: optax.GradientTransformation | None,
    statistics: Statistics | None = None,
    directions: Mapping[str, Any] = NOTHING,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
    layout: Layout | None = None,
) -> tuple[PyTree, PyTree, list[Report]]:
    """Host side: the `matrices` in low rank, the `treated` at the ranks of the rule.

    Those of `matrices` that are dense and not treated are converted at full rank. What
    `factorize` and then `truncate` of the treated do, by one decomposition of each
    matrix; and reported as theirs: a dense matrix that is treated has a line of its
    conversion at full rank, and one of its truncation.

    Raises:   ValueError: what `factorize` and `truncate` raise; a budget is too small.
    """
    leaves = named_leaves(params)
    chosen = {x.path for x in treated}
    ranks = {
        x.path: min(x.m, x.n)
        for x in matrices
        if x.path not in chosen and not is_low_rank(leaves.get(x.path))
    }
    axes = _axes_in({*chosen, *ranks}, matrices)
    setup = Setup(tx, moment_rule, layout)
    params, opt_state, reports = _event(
        params,
        opt_state,
        axes,
        ranks,
        setup,
        rule=rule,
        matrices={x.path: x for x in matrices},
        statistics=statistics,
        directions=directions,
    )
    return params, opt_state, [x for x in reports if x.layers]


@on_auto_axes
def densify(
    params: PyTree,
    opt_state: PyTree,
    *,
    tx: optax.GradientTransformation | None = None,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
) -> tuple[PyTree, PyTree]:
    """Host side: (params, opt_state) with every LowRank leaf dense again.

    First moments are lifted as U M Vᵀ. For params alone there is `materialize`.

    Args:     opt_state, tx: both, or None for params without an optimizer.
    Raises:   ValueError: `opt_state` without `tx` or the reverse; `tx` as in
              `factorize`.
    """
    check_forms(params, what="rank events take")
    nodes = {x: leaf for x, leaf in named_leaves(params).items() if is_low_rank(leaf)}
    dense = with_leaves(params, {x: node.materialize() for x, node in nodes.items()})
    _check_wrapped(opt_state, tx)
    if tx is None:
        return dense, None
    moves = {
        name: Move(
            node.u.astype(compute_dtype(node.dtype)),
            jnp.swapaxes(node.vt, -1, -2).astype(compute_dtype(node.dtype)),
            after=node.axes,
        )
        for name, node in nodes.items()
    }
    return dense, _carried(dense, opt_state, moves, setup=Setup(tx, moment_rule))


def _event(
    params: PyTree,
    opt_state: PyTree,
    axes: Mapping[str, Axes],
    ranks: Mapping[str, int],
    setup: Setup,
    *,
    rule: RankRule | None = None,
    matrices: Mapping[str, Matrix] = NOTHING,
    statistics: Statistics | None = None,
    directions: Mapping[str, Any] = NOTHING,
    run: Run = NOW,
) -> tuple[PyTree, PyTree, tuple[Report, Report]]:
    """The one event: decomposes the leaves of `axes`, chooses ranks, and applies them.

    Dense leaves are converted and LowRank ones truncated, or widened, in one pass. The
    reports are of the conversion and of the truncation; they have no layers where there
    was none.

    Args:     ranks: by name; a leaf that is not in it gets its rank from the rule.
              matrices: by name, for a rule with a price.
              directions: dense arrays by name; a rank goes up where there is one.
    """
    check_forms(params, what="rank events take")
    _check_wrapped(opt_state, setup.tx)
    leaves = named_leaves(params)
    old = {x: leaf_at(x, leaves, a.shape) for x, a in axes.items()}
    axes = {x: leaf.axes if is_low_rank(leaf) else axes[x] for x, leaf in old.items()}
    full = {
        x: leaf.rank if is_low_rank(leaf) else min(axes[x].m, axes[x].n)
        for x, leaf in old.items()
    }
    for name, a in axes.items():
        most = min(a.m, a.n) if name in directions else full[name]
        _check_rank(ranks.get(name, 1), most, name)
    weights = weights_of(statistics, axes, run)
    wanted = {x: ranks.get(x, k) for x, k in full.items()}
    facts = _facts(old, axes, wanted, weights, run)

    finite = [x for x, fact in facts.items() if fact.is_finite()]
    new = {x: ranks[x] for x in finite if x in ranks}
    free = [x for x in finite if x not in ranks]
    if rule is not None:
        spectra = [facts[x].sigma for x in free]
        named = [matrices.get(x) or unused(x, axes[x]) for x in free]
        chosen = ranks_by(rule, spectra, named, [old[x] for x in free], weights)
        new |= {x: r for x, r in zip(free, chosen, strict=True) if r}
    more = {x: leaf_at(x, directions, what=RAISED) for x in new if new[x] > full[x]}
    good = run.get(run.call(are_finite, more)) if more else {}
    blind = {x for x in more if not good[x]}
    new = {x: r for x, r in new.items() if x not in blind}
    params, opt_state, nodes = _after(params, opt_state, facts, new, more, setup, run)

    fresh = [x for x in nodes if not is_low_rank(old[x])]
    drift = dict(zip(fresh, drift_of([nodes[x] for x in fresh], run), strict=True))
    reports: dict[str, list[LayerReport]] = {"conversion": [], "truncation": []}
    for name, fact in facts.items():
        before, after = full[name], new.get(name)
        rows = [("truncation", before, after)]
        if not is_low_rank(old[name]) and (name in ranks or after is None):
            rows = [("conversion", None, after)]
        elif not is_low_rank(old[name]):
            rows.insert(0, ("conversion", None, before))
        error = drift.get(name, fact.error)
        for kind, was, now in rows:
            row = layer_report(
                name,
                fact.axes,
                was,
                now,
                fact.sigma,
                error,
                finite=fact.is_finite() and name not in blind,
                weighted=fact.is_weighted,
            )
            reports[kind].append(row)
    first, second = (Report(tuple(rows), kind) for kind, rows in reports.items())
    return params, opt_state, (first, second)


class _Fact(NamedTuple):
    """A leaf of an event, its bases repaired where that was due, and its decomposition.

    On the host are its singular values, weighted or not, and how far its bases were
    from orthonormal.
    """

    leaf: Any
    axes: Axes
    solved: Solved
    sigma: np.ndarray
    error: Any
    is_weighted: bool

    def is_finite(self) -> bool:
        return bool(np.isfinite(self.sigma).all() and np.isfinite(self.error))


def _facts(
    leaves: Mapping[str, Any],
    axes: Mapping[str, Axes],
    ranks: Mapping[str, int],
    weights: Mapping[str, Weights],
    run: Run,
) -> dict[str, _Fact]:
    """All leaves, by one decomposition for the ranks that they are to have at most.

    And by a second one those cores whose bases were repaired, and dense leaves that are
    to keep what their Gram matrix does not show.
    """

    def solved(leaves: Mapping[str, Any], kept: list[int] | None) -> dict[str, _Fact]:
        items = list(leaves.values())
        found = decomposed(
            items,
            [axes[x] for x in leaves],
            run,
            vectors=True,
            kept=kept,
            weights=[weights.get(x) for x in leaves],
        )
        errors = iter(drift_of([x for x in items if is_low_rank(x)], run))
        return {
            x: _Fact(
                leaf,
                axes[x],
                y,
                sigma,
                next(errors) if is_low_rank(leaf) else 0,
                x in weights,
            )
            for (x, leaf), y, sigma in zip(
                leaves.items(), found, on_host(found, run), strict=True
            )
        }

    facts = solved(leaves, [ranks[x] for x in leaves])
    again = {}
    for name, (leaf, view, _, sigma, error, is_weighted) in facts.items():
        if is_low_rank(leaf):
            if np.isfinite(error) and error > bound(leaf):
                # moves bases by no more than the drift: overlaps stay Us, Vs
                new = alone(repaired(without_identity(leaf)))
                again[name] = dataclasses.replace(new, basis=leaf.basis)
        elif (
            not is_weighted
            and by_gram(view, ranks[name])
            and np.any(sigma[..., ranks[name] - 1] < RESOLVED * sigma[..., 0])
        ):
            again[name] = leaf
    for name, fact in solved(again, None).items():
        facts[name] = fact._replace(error=facts[name].error)
    return facts


def _after(
    params: PyTree,
    opt_state: PyTree,
    facts: Mapping[str, _Fact],
    ranks: Mapping[str, int],
    directions: Mapping[str, Any],
    setup: Setup,
    run: Run,
) -> tuple[PyTree, PyTree, dict[str, LowRank]]:
    """Params and state with leaves at new ranks, and these nodes by name."""
    bases = {
        x: Basis(getattr(facts[x].leaf, "basis", 0)).after(facts[x].sigma, r)
        for x, r in ranks.items()
    }
    run.agree([(x, ranks.get(x), int(bases.get(x, 0))) for x in facts])
    beside = next((x for x in jax.tree.leaves(params) if mesh_of([x])), None)
    if beside is not None:
        if setup.layout is None:
            setup = setup._replace(layout=Layout(beside.sharding.mesh))
        opt_state = jax.tree.map(
            lambda x: x if is_committed(x) else run.put(x, beside), opt_state
        )
    if not ranks:
        known = None if setup.tx is None else with_pending(params, opt_state, {})
        return params, known, {}
    places = {}
    if setup.layout is not None:  # where it wants u, s and vt
        shapes = {
            x: abstract_node(facts[x].axes, r, jnp.float32) for x, r in ranks.items()
        }
        found = named_leaves(setup.layout(with_leaves(params, shapes)))
        places = {x: (found[x].u, found[x].s, found[x].vt) for x in ranks}
    nodes, moves = {}, {}
    for name, rank in ranks.items():
        leaf, axes, (batch, start, stack), *_, is_weighted = facts[name]
        goes_up, where = is_low_rank(leaf) and rank > leaf.rank, places.get(name)
        node, move = run.call(
            rebased,
            without_identity(leaf),
            batch,
            run.put(start, batch[0]),
            stack=stack,
            rank=leaf.rank if goes_up else rank,
            axes=axes,
            where=None if goes_up else where,
            is_weighted=is_weighted,
        )
        if goes_up:
            array = directions[name]
            wide = run.call(widened, node, move, array, rank=rank, where=where)
            node, move = alone(wide)
        moves[name] = move
        nodes[name] = dataclasses.replace(node, basis=bases[name])
    params = with_leaves(params, nodes)
    if setup.tx is None:
        return params, None, nodes
    bare = arrays_only(without_identity(params))
    return params, run.call(_carried, bare, opt_state, moves, setup=setup), nodes


@functools.partial(jax.jit, static_argnames="setup")
def _carried(
    new_params: PyTree, opt_state: PyTree, moves: dict[str, Move], *, setup: Setup
) -> PyTree:
    tx, rule, layout = setup
    paths = {path_name(path): path for path in leaves_by_path(new_params)}
    moved = {paths[name]: move for name, move in moves.items()}
    trained = trainable(new_params)
    check_frozen(tx, new_params)
    check_labels(tx, moments.shapes_before(trained, moved), trained)
    new = moments.carry(
        opt_state,
        tx.init(new_params),
        moved,
        rule,
        params=trained,
        averages=averages(tx, trained),
    )
    new = jax.tree.map(
        lambda x: x._replace(pending=jnp.zeros_like(x.pending)) if is_frozen(x) else x,
        new,
        is_leaf=is_frozen,
    )
    if layout is None:
        return new
    return jax.lax.with_sharding_constraint(new, layout.of_optimizer(new_params, new))


def _check_rank(rank: int, full: int, path: str, least: int = 1) -> None:
    if not least <= rank <= full:
        raise ValueError(f"`rank` must be in [{least}, {full}] for {path}, got {rank}")


def _check_wrapped(opt_state: PyTree, tx: optax.GradientTransformation | None) -> None:
    if (opt_state is None) != (tx is None):
        have, need = ("tx", "opt_state") if opt_state is None else ("opt_state", "tx")
        raise ValueError(f"`{have}` without `{need}`: give both, or None for both")
    if tx is not None and not any(
        map(is_frozen, jax.tree.leaves(opt_state, is_leaf=is_frozen))
    ):
        raise ValueError(f"the optimizer would move frozen bases: {UNWRAPPED}")
