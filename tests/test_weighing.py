"""Events weighed by curvature: cuts, ranks, moments, and when a run looks."""

import dataclasses
import functools
import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax.training.train_state import TrainState
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import oialr_jax as oialr
from oialr_jax import ranking, surgery
from oialr_jax.cost import Rates
from oialr_jax.linalg import orthogonality_error
from oialr_jax.lowrank import Axes, named_leaves
from oialr_jax.matrices import Matrix
from oialr_jax.projection import project_to_rank
from oialr_jax.weighted import Sides, Statistics

WIDTH = 16
SCHEDULE = oialr.Schedule(delay=6, every=5, lag=2, stop=7, projections=range(1, 6, 3))


def predict(params, x):
    for name in "abc":
        x = jnp.tanh(x @ params[name])
    return x @ params["head"]


def loss(params, x, y):
    return jnp.mean(jnp.sum((predict(params, x) - y) ** 2, axis=1))


def batch(t):
    x = np.asarray(normal(100 + t, 24, WIDTH)) * np.geomspace(2, 0.1, WIDTH)
    x = jnp.asarray(x, jnp.float32)
    return x, jnp.sin(3 * x[:, :4])


def weights():
    params = {name: normal(i, WIDTH, WIDTH) for i, name in enumerate("abc")}
    return params | {"head": normal(7, WIDTH, 4)}


def found():
    return oialr.select(oialr.find_matrices(loss, weights(), *batch(0)))


def sums_of(params, matrices, count=3):
    look = oialr.curvature(loss, matrices)
    sums = [look(params, *batch(t)) for t in range(count)]
    return functools.reduce(Statistics.add, sums)


def best(w, c, d, rank):
    """In float64: the best matrix of a rank, and the rise of the loss."""
    roots = []
    for side in (c, d):
        side = np.asarray(side, np.float64)
        side += 1e-3 * np.trace(side) / len(side) * np.eye(len(side))
        values, vectors = np.linalg.eigh(side)
        roots.append((vectors * np.sqrt(values)) @ vectors.T)
    a, b = roots
    p, sigma, qt = np.linalg.svd(a @ np.asarray(w, np.float64) @ b)
    cut = (p[:, :rank] * sigma[:rank]) @ qt[:rank]
    return np.linalg.solve(a, cut) @ np.linalg.inv(b), 0.5 * np.sum(sigma[rank:] ** 2)


def trained(matrices, rank=None):
    """Params, of full rank or dense, with an optimizer state that is not zero."""
    params, tx = weights(), oialr.freeze_bases(optax.adam(1e-2))
    state = tx.init(params)
    gradients = jax.grad(loss)(params, *batch(0))
    _, state = tx.update(gradients, state, params)
    if rank is not None:
        params, state, _ = oialr.factorize(params, state, matrices, tx=tx, rank=rank)
    return params, state, tx


def first_moment(state):
    return state.inner_state[0].mu


# One event


@pytest.mark.parametrize("rank", [None, 12], ids=["dense", "core"])
def test_a_cut_is_the_nearest_by_loss_and_the_moments_follow(rank):
    matrices = found()
    params, state, tx = trained(matrices, rank)
    sums = sums_of(params, matrices)
    wanted = {"a": 3, "b": 5, "c": 2}
    if rank is None:
        new, after, report = oialr.factorize(
            params, state, matrices, tx=tx, rank=wanted, statistics=sums
        )
    else:
        new, after, report = oialr.truncate(
            params, state, wanted, tx=tx, statistics=sums
        )
    for layer in report.layers:
        old, node = params[layer.path], new[layer.path]
        core = old if rank is None else old.s
        cut, rise = best(core, *sums.covariances(layer.path), wanted[layer.path])
        if rank is not None:
            cut = old.u @ cut @ old.vt
        np.testing.assert_allclose(node.materialize(), cut, atol=2e-4)
        assert layer.rise == pytest.approx(rise, rel=1e-3)
        assert node.rank == layer.after == wanted[layer.path]
        assert float(orthogonality_error(node.u, node.vt)) < 1e-5
        moment = first_moment(state)[layer.path]
        left, right = (node.u.T, node.vt.T)
        if rank is not None:
            left, right = left @ old.u, old.vt @ right
        moved = first_moment(after)[layer.path]
        assert_close(moved, left @ moment @ right, 1e-5)
    assert report.predicted == pytest.approx(sum(x.rise for x in report.layers))
    assert "as predicted" in str(report)
    assert report.to_dict()["predicted"] == report.predicted


def test_a_projection_is_the_nearest_by_loss():
    matrices, params = found(), weights()
    sums = sums_of(params, matrices)
    rule = oialr.RankRule(budget=3 * 4 * (2 * WIDTH + 4))
    ranks = ranking.choose(params, rule, matrices, sums)
    new = project_to_rank(params, rule, matrices, sums)
    for name in "abc":
        cut, _ = best(params[name], *sums.covariances(name), ranks[name])
        np.testing.assert_allclose(new[name], cut, atol=2e-4)
    assert new["head"] is params["head"]


@pytest.mark.parametrize("count", [3, 8])
def test_on_a_mesh_an_event_is_the_same(count):
    matrices = found()
    params, state, tx = trained(matrices)
    sums = sums_of(params, matrices)
    sums.sides["b"] = sums.sides["b"]._replace(inputs=jnp.ones(WIDTH))  # a diagonal
    rule = oialr.RankRule(by="loss", budget=500)

    def event(params, state, sums):
        new, state, reports = surgery.apply_rule(
            params, state, matrices, rule, matrices, tx=tx, statistics=sums
        )
        return oialr.materialize(new), oialr.ranks(new), reports[-1].predicted

    dense, ranks, rise = event(params, state, sums)
    mesh = jax.make_mesh(
        (count,), ("x",), (AxisType.Auto,), devices=jax.devices()[:count]
    )
    placed = jax.device_put((params, state, sums), NamedSharding(mesh, P()))
    on_mesh, same_ranks, same_rise = event(*placed)
    assert same_ranks == ranks
    assert same_rise == pytest.approx(rise, rel=1e-4)
    assert_close(on_mesh, dense, 1e-4)


def test_a_leaf_whose_statistics_are_not_finite_is_left_as_it_was():
    matrices = found()
    params, state, tx = trained(matrices)
    sums = sums_of(params, matrices)
    outputs = sums.sides["b"].outputs.at[0, 1].set(jnp.nan)  # beside the diagonal
    sums.sides["b"] = sums.sides["b"]._replace(outputs=outputs)
    new, _, report = oialr.factorize(
        params, state, matrices, tx=tx, rank=3, statistics=sums
    )
    assert [x.path for x in report.layers if not x.finite] == ["b"]
    assert new["b"] is params["b"]
    assert new["a"].rank == new["c"].rank == 3


def test_without_statistics_a_rule_is_as_ever():
    matrices = found()
    params, state, tx = trained(matrices)
    nothing = Statistics({}, jnp.ones(()))
    for rule in (oialr.RankRule(cutoff=0.3), oialr.RankRule(budget=500)):
        plain, weighed = (
            surgery.apply_rule(
                params, state, matrices, rule, matrices, tx=tx, statistics=sums
            )
            for sums in (None, nothing)
        )
        jax.tree.map(np.testing.assert_array_equal, plain[:2], weighed[:2])
        assert plain[2][-1].predicted is None


# Ranks by loss


def flat(worth, size=WIDTH):
    """Sums of a matrix whose every direction is worth the same."""
    return Sides(worth * jnp.eye(size), jnp.eye(size), jnp.ones(()))


def rotations():
    params = {x: jnp.linalg.qr(normal(i, WIDTH, WIDTH))[0] for i, x in enumerate("ab")}
    matrices = [Matrix(x, Axes((WIDTH,) * 2, (), (0,), (1,)), 1, "dot") for x in "ab"]
    return params, matrices


def apply(params, matrices, rule, sums):
    new, _, reports = surgery.apply_rule(
        params, None, matrices, rule, matrices, tx=None, statistics=sums
    )
    return new, reports


def test_what_is_worth_more_dense_stays_dense():
    params, matrices = rotations()
    # covariances are of mean 1, so the outputs say what a matrix is worth
    sides = {"a": flat(1.0)._replace(outputs=100 * jnp.eye(WIDTH)), "b": flat(1.0)}
    sums = Statistics(sides, jnp.ones(()))
    rule = oialr.RankRule(by="loss", budget=WIDTH**2 + 2 * (2 * WIDTH + 2))
    new, reports = apply(params, matrices, rule, sums)
    assert new["a"] is params["a"]
    assert oialr.ranks(new) == {"b": (WIDTH, WIDTH, 2)}
    layers = {x.path: x for x in reports[0].layers}
    assert layers["a"].finite
    assert (layers["a"].after, layers["a"].rise) == (None, 0.0)
    assert "dense -> dense" in str(reports[0])


@pytest.mark.parametrize("reached", [None, 0.0], ids=["no sums", "no rows"])
def test_a_matrix_without_statistics_gets_its_share_of_the_budget(reached):
    params, matrices = rotations()
    sides = {"a": flat(1.0)}
    if reached is not None:
        sides["b"] = flat(0.0)._replace(rows=jnp.asarray(reached))
    sums = Statistics(sides, jnp.ones(()), (("b", "gather"),))
    rule = oialr.RankRule(by="loss", budget=2 * 3 * (2 * WIDTH + 3))
    new, reports = apply(params, matrices, rule, sums)
    assert oialr.ranks(new) == {x: (WIDTH, WIDTH, 3) for x in "ab"}
    assert {x.path: x.rise is None for x in reports[-1].layers} == {
        "a": False,
        "b": True,
    }


def test_a_price_in_flops_or_seconds_is_kept_to():
    matrices, params = found(), weights()
    sums = sums_of(params, matrices)
    rates = Rates(1e9, 1e9, 1e9, 1e9, 1e9, 1e9)
    seconds = functools.partial(Matrix.seconds, rates=rates)
    for price in (Matrix.flops, seconds):
        budget = 0.6 * sum(price(x, None) for x in matrices)
        rule = oialr.RankRule(by="loss", budget=budget, price=price)
        new, _ = apply(params, matrices, rule, sums)
        leaves = named_leaves(new)
        spent = sum(price(x, getattr(leaves[x.path], "rank", None)) for x in matrices)
        assert 0.4 * budget < spent <= budget
        assert oialr.ranks(new)


def test_mistakes_of_a_rule_by_loss_are_told():
    params, matrices = rotations()
    sums = Statistics({"a": flat(1.0), "b": flat(1.0)}, jnp.ones(()))
    rule = oialr.RankRule(by="loss", budget=200)
    with pytest.raises(ValueError, match="by='loss' divides a budget"):
        oialr.RankRule(by="loss")
    with pytest.raises(ValueError, match="`by` must be 'value' or 'loss', got 'rank'"):
        oialr.RankRule(by="rank", budget=1)
    with pytest.raises(ValueError, match="a `price` counts a budget"):
        oialr.RankRule(budget=1, price=Matrix.flops)
    with pytest.raises(ValueError, match="no matrix has any: give statistics="):
        apply(params, matrices, rule, None)
    by_flops = dataclasses.replace(rule, price=Matrix.flops)
    with pytest.raises(ValueError, match="a costs nothing by the rule's `price`"):
        apply(params, matrices, by_flops, sums)
    tx = oialr.freeze_bases(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"give adaptive\(\.\.\., weighing=Weighing"):
        oialr.adaptive(lambda s: s, tx, matrices, SCHEDULE, rule)
    with pytest.raises(ValueError, match="`batches` must be at least 1, got 0"):
        oialr.Weighing(loss, batches=0)


# A run


def begin(weighing=None, **options):
    weighing = oialr.Weighing(value, batches=2) if weighing is None else weighing
    options = {"schedule": SCHEDULE} | options
    run = oialr.training(loss, optax.adamw(1e-2), weighing=weighing, **options)
    return run, run.init(weights(), *batch(0))


def value(state, x, y):
    return loss(state.params, x, y)


def advance(run, state, end):
    values = []
    while int(state.step) < end:
        state, out = run.step(state, *batch(int(state.step)))
        values.append(float(out))
    return state, values


def test_a_run_looks_at_a_few_batches_before_each_cut():
    run, state = begin()
    waiting = []
    for t in range(12):
        state, _ = advance(run, state, t + 1)
        waiting.append(state.curvature is not None)
    looked = [x.step for x in run.timings if x.looking]
    # projections at 1 and 4, ranks chosen at 6 and applied at 8
    assert looked == [0, 1, 3, 4, 5, 6]
    assert [t for t, x in enumerate(waiting) if x] == [0, 3, 5, 6, 7]
    (conversion,) = run.reports
    assert conversion.step == 8
    assert run.compilations == 2


def test_predicted_and_actual_rise_are_in_the_report():
    run, state = begin(schedule=oialr.Schedule(delay=6, every=5, stop=7), budget=0.8)
    look = oialr.curvature(loss, run.matrices)
    state, _ = advance(run, state, 5)
    sums = look(state.params, *batch(5))
    state, _ = advance(run, state, 6)
    dense = jax.tree.map(jnp.copy, state.params)
    sums = sums.add(look(dense, *batch(6)))
    low, _, expected = surgery.apply_rule(
        dense, None, run.matrices, run.rule, run.matrices, tx=None, statistics=sums
    )
    state, _ = advance(run, state, 7)
    report = run.reports[-1]
    assert report.kind == "truncation"
    assert report.predicted == pytest.approx(expected[-1].predicted, rel=1e-3)
    actual = oialr.factored(loss)(low, *batch(6)) - loss(dense, *batch(6))
    assert report.actual == pytest.approx(float(actual), rel=1e-2)
    assert state.curvature is None
    assert f"rose by {report.actual:.3g}" in str(report)
    assert report.to_dict()["actual"] == report.actual
    assert [x.actual for x in run.reports[:-1]] == [None]


@pytest.mark.parametrize(
    "middle", [4, 7, *(pytest.param(x, marks=pytest.mark.long) for x in (1, 6, 9))]
)
def test_a_run_stopped_between_looks_goes_on_bit_for_bit(middle, tmp_path):
    run, state = begin()
    state, _ = advance(run, state, middle)
    with oialr.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        whole, values = advance(run, state, 11)
        fresh, template = begin()
        state = checkpoints.restore(template, fresh.tx).state
    resumed, again = advance(fresh, state, 11)
    assert again == values
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.opt_state, whole.opt_state)
    assert oialr.ranks(whole.params)
    gc.collect()  # asyncio of Orbax


def test_nothing_is_compiled_at_a_weighed_event_or_the_looks_after_it():
    schedule = oialr.Schedule(delay=4, every=5, lag=3)
    main, compiled = threading.get_ident(), []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.append(threading.get_ident() == main)

    jax.clear_caches()
    run, state = begin(schedule=schedule, rule=oialr.RankRule(cutoff=0.3))
    counts = {}
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for t in range(13):
            compiled.clear()
            state, _ = advance(run, state, t + 1)
            jax.block_until_ready(state)
            counts[t] = sum(compiled)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert counts[0] > 0  # the listener hears
    # the event at 7, the looks at 8 and 9, the decision at 9, the event at 12
    assert [counts[t] for t in (7, 8, 9, 12)] == [0] * 4
    assert [x.step for x in run.reports] == [7, 12]


def test_a_cut_weighed_by_loss_raises_it_less():
    options = {"schedule": oialr.Schedule(delay=30, every=2, stop=31), "budget": 0.45}
    rises = {}
    for weighing in (False, oialr.Weighing(value, batches=8)):
        run, state = begin(weighing, **options)
        state, _ = advance(run, state, 30)
        test = batch(1000)
        was = float(loss(state.params, *test))
        state, _ = advance(run, state, 31)
        # the step after the cut is part of it, the same for both
        rises[bool(weighing)] = float(oialr.factored(loss)(state.params, *test)) - was
    assert rises[True] < 0.7 * rises[False]


def test_a_users_own_state_needs_a_field():
    matrices, tx = found(), oialr.freeze_bases(optax.adamw(1e-2))
    forward = oialr.factored(loss)

    def step(state, x, y):
        value, grads = oialr.value_and_grad(forward)(state.params, x, y)
        return state.apply_gradients(grads=grads), value

    weighing = oialr.Weighing(value)
    rule = oialr.RankRule(by="loss", budget=500)
    run = oialr.adaptive(step, tx, matrices, SCHEDULE, rule, weighing=weighing)
    plain = TrainState.create(apply_fn=None, params=weights(), tx=tx)
    with pytest.raises(TypeError, match="add `curvature: Any = None` to it"):
        run(plain, *batch(0))

    class Own(TrainState):
        curvature: object = None

    state = Own.create(apply_fn=None, params=weights(), tx=tx)
    for t in range(10):
        state, _ = run(state, *batch(t))
    assert run.reports[-1].predicted is not None
    with pytest.raises(ValueError, match=r"`weighing` needs jit=jax\.jit"):
        oialr.adaptive(
            step, tx, matrices, SCHEDULE, rule, weighing=weighing, jit=jax.pmap
        )


def test_a_loss_with_a_key_an_extra_and_an_average():
    def noisy(params, extra, x, y, *, key, ema):
        x = x + 0.01 * jax.random.normal(key, x.shape)
        near = jnp.mean((predict(params, x) - predict(ema, x)) ** 2)
        return loss(params, x, y) + 0.1 * near, {"count": extra["count"] + 1}

    run = oialr.training(
        noisy,
        optax.adamw(1e-2),
        schedule=SCHEDULE,
        weighing=True,
        follow={"ema": functools.partial(optax.incremental_update, step_size=0.1)},
    )
    state = run.init(
        weights(), *batch(0), extra={"count": jnp.zeros(())}, key=jax.random.key(0)
    )
    state, values = advance(run, state, 12)
    assert np.isfinite(values).all()
    assert run.reports[-1].predicted > 0
    assert float(state.extra["count"]) == 12
