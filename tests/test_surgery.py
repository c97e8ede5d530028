"""Events: function and training preserved, moments carried, nothing ever lost."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BY_NAME, KINDS, normal
from helpers import TOLERANCE, assert_close, in_low_rank, scalar_loss
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import oialr_jax as oialr
from oialr_jax import decompose, linalg, ranking, surgery
from oialr_jax.linalg import orthogonality_error
from oialr_jax.lowrank import Axes, is_low_rank, named_leaves
from oialr_jax.matrices import Matrix
from oialr_jax.projection import project_to_rank
from oialr_jax.transform import pending_ranks, with_pending, with_trainable

F32 = TOLERANCE[jnp.dtype(jnp.float32)]
KEEP_ALL = oialr.RankRule(cutoff=0.0)
CASES_WITH_ARRAYS = [c for c in KINDS if c.name != "equinox"]  # functions are no params


def muon_like():
    """Momentum, then exact orthogonalisation: equivariant under any change of basis."""

    def polar(g):
        if g.ndim != 2:
            return g
        u, _, vt = jnp.linalg.svd(g, full_matrices=False)
        return u @ vt

    return optax.chain(
        optax.trace(0.9),
        optax.stateless(lambda g, _: jax.tree.map(polar, g)),
        optax.scale(-0.02),
    )


GAUGE_INVARIANT = {
    "sgd_momentum": optax.sgd(0.1, momentum=0.9),
    "sgd_nesterov_decay": optax.chain(
        optax.add_decayed_weights(0.01), optax.sgd(0.1, momentum=0.9, nesterov=True)
    ),
    "normalized": optax.chain(optax.ema(0.9), optax.normalize_by_update_norm(0.1)),
    "muon_like": muon_like(),
    "optax_muon": optax.contrib.muon(0.02),
}


def regression(tx, *, square=True):
    """A two-layer regression in low rank with some steps of momentum gathered."""
    m, n = (12, 12) if square else (16, 10)
    params = {"a": {"w": normal(0, m, n), "b": jnp.zeros(n)}, "z": normal(2, n, 3)}
    x, y = normal(3, 40, m), normal(4, 40, 3) * 3

    def fn(params, x):
        h = jnp.tanh(x @ params["a"]["w"] + params["a"]["b"].reshape(1, -1))
        return h @ params["z"]

    matrices = oialr.select(oialr.find_matrices(fn, params, x))

    def loss(params, shift):
        return jnp.mean((oialr.factored(fn)(params, x) - y * shift) ** 2)

    @jax.jit
    def step(params, state, shift):
        _, grads = oialr.value_and_grad(loss)(params, shift)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return params, matrices, step


def trained(tx, steps=6, *, square=True, convert=True):
    params, matrices, step = regression(tx, square=square)
    state = tx.init(params)
    if convert:
        params, state, _ = oialr.factorize(params, state, matrices, tx=tx)
    for i in range(steps):
        params, state = step(params, state, 1.0 + 0.3 * i)
    return params, state, matrices, step


@pytest.mark.parametrize("name", GAUGE_INVARIANT)
def test_turning_the_bases_does_not_change_training(name):
    tx = oialr.freeze_bases(GAUGE_INVARIANT[name])
    params, state, _, step = trained(tx)
    turned, turned_state, report = oialr.truncate(params, state, KEEP_ALL, tx=tx)
    assert [(x.before, x.after) for x in report.layers] == [(12, 12)]
    assert_close(oialr.materialize(turned), oialr.materialize(params), F32)
    core = turned["a"]["w"].s
    np.testing.assert_allclose(core, jnp.diag(jnp.diag(core)), atol=1e-6)
    for i in range(10):
        params, state = step(params, state, 1.5 - 0.1 * i)
        turned, turned_state = step(turned, turned_state, 1.5 - 0.1 * i)
    assert_close(oialr.materialize(turned), oialr.materialize(params), 5 * F32)


def test_stale_momentum_fails_the_same_test_by_far():
    tx = oialr.freeze_bases(GAUGE_INVARIANT["sgd_momentum"])
    params, state, _, step = trained(tx)
    turned, _, _ = oialr.truncate(params, state, KEEP_ALL, tx=tx)
    after, _ = step(params, state, 1.0)
    stale, _ = step(turned, state, 1.0)
    moved = after["a"]["w"].materialize() - params["a"]["w"].materialize()
    error = stale["a"]["w"].materialize() - after["a"]["w"].materialize()
    assert np.linalg.norm(error) > 0.1 * np.linalg.norm(moved)


@pytest.mark.parametrize("rank", [None, 4])
def test_conversion_projects_the_next_step_of_momentum(rank):
    tx = oialr.freeze_bases(optax.sgd(0.1, momentum=0.9))
    params, state, matrices, step = trained(tx, square=False, convert=False)
    low, low_state, _ = oialr.factorize(params, state, matrices, tx=tx, rank=rank)
    if rank is None:
        assert_close(oialr.materialize(low), params, F32)
    # With a truncated start, compare with the dense step from the truncated weights.
    start = oialr.materialize(low)
    dense_after, _ = step(start, state, 1.0)
    low_after, _ = step(low, low_state, 1.0)
    u, vt = low["a"]["w"].u, low["a"]["w"].vt
    delta = dense_after["a"]["w"] - start["a"]["w"]
    expected = start["a"]["w"] + u @ u.T @ delta @ vt.T @ vt
    assert_close(low_after["a"]["w"].materialize(), expected, F32)
    assert_close(low_after["z"], dense_after["z"], F32)
    assert np.linalg.norm(u @ u.T @ delta @ vt.T @ vt - delta) > 1e-3  # it does project


@pytest.mark.parametrize("case", CASES_WITH_ARRAYS, ids=str)
@pytest.mark.filterwarnings("ignore:.*is materialised:UserWarning")
def test_events_preserve_the_function_of_every_kind_of_matrix(case):
    fn, params, x = case.build()
    matrices = oialr.find_matrices(fn, params, x)
    tx = oialr.freeze_bases(optax.adam(1e-3))
    low, state, report = oialr.factorize(params, tx.init(params), matrices, tx=tx)
    assert_close(oialr.materialize(low), params, F32)
    assert [layer.path for layer in report.layers] == [m.path for m in matrices]
    turned, state, report = oialr.truncate(low, state, KEEP_ALL, tx=tx)
    assert_close(oialr.materialize(turned), params, F32)
    assert all(layer.energy == 1 for layer in report.layers)
    cut, state, _ = oialr.truncate(
        turned, state, oialr.RankRule(cutoff=1.0, max_drop=0.5), tx=tx
    )
    for name, node in named_leaves(cut).items():
        if is_low_rank(node):
            whole = node.axes.to_matrix(named_leaves(turned)[name].materialize())
            best = np.linalg.svd(np.asarray(whole, np.float64), compute_uv=False)
            error = node.axes.to_matrix(node.materialize()) - whole
            tail = np.sqrt(np.sum(best[..., node.rank :] ** 2, -1))
            norms = np.linalg.norm(error, axis=(-2, -1))
            np.testing.assert_allclose(norms, tail, atol=1e-4)  # Eckart-Young
    back, back_state = oialr.densify(cut, state, tx=tx)
    assert jax.tree.map(jnp.shape, back_state) == jax.tree.map(
        jnp.shape, tx.init(params)
    )
    assert_close(back, oialr.materialize(cut), F32)
    alone, nothing = oialr.densify(cut, None)
    assert nothing is None
    assert_close(alone, oialr.materialize(cut), F32)


def test_against_a_slow_numpy_oialr():
    """Several events and momentum steps of one linear layer, written out in float64."""
    rng = np.random.default_rng(0)
    m, n, lr, beta = 24, 16, 0.02, 0.9
    left, right = rng.normal(size=(m, 6)), rng.normal(size=(6, n))
    w0 = left @ right / 6 + 0.02 * rng.normal(size=(m, n))
    x = rng.normal(size=(64, m))
    target = x @ (w0 + 0.3 * rng.normal(size=(m, n)) / 4)
    cutoff = 0.2

    u, sigma, vt = np.linalg.svd(w0, full_matrices=False)
    s, momentum = np.diag(sigma), np.zeros((n, n))
    ranks, losses = [], []
    for i in range(12):
        if i % 3 == 0:
            us, sigma, vst = np.linalg.svd(s)
            u, vt, s = u @ us, vst @ vt, np.diag(sigma)
            momentum = us.T @ momentum @ vst.T
            k, floor = len(sigma), int(0.01 * n)
            below = [j for j in range(k) if sigma[j] < cutoff * sigma[0]]
            r = below[0] if below else k
            if r < k / 2 and k / 2 > floor:
                r = int(k / 2)
            r = max(r, floor)
            u, vt, s, momentum = u[:, :r], vt[:r], s[:r, :r], momentum[:r, :r]
            ranks.append(r)
        residual = x @ u @ s @ vt - target
        losses.append(np.mean(residual**2))
        grad = 2 / residual.size * x.T @ residual
        momentum = beta * momentum + u.T @ grad @ vt.T
        s = s - lr * n * momentum

    tx = oialr.freeze_bases(optax.sgd(lr * n, momentum=beta))
    params = {"w": jnp.asarray(w0, jnp.float32)}
    state = tx.init(params)

    def loss(params, x, y):
        out = oialr.factored(lambda p, x: x @ p["w"])(params, x)
        return jnp.mean((out - y) ** 2)

    batch = jnp.asarray(x, jnp.float32), jnp.asarray(target, jnp.float32)
    matrices = oialr.find_matrices(lambda p, x: x @ p["w"], params, batch[0])
    actual_ranks, actual_losses = [], []
    for i in range(12):
        if i == 0:
            params, state, _ = oialr.factorize(params, state, matrices, tx=tx)
        if i % 3 == 0:
            rule = oialr.RankRule(cutoff=cutoff)
            params, state, report = oialr.truncate(params, state, rule, tx=tx)
            actual_ranks.append(report.layers[0].after)
        value, grads = oialr.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        actual_losses.append(value)
    assert actual_ranks == ranks
    assert len(set(ranks)) > 1
    np.testing.assert_allclose(actual_losses, losses, rtol=1e-4)
    np.testing.assert_allclose(params["w"].materialize(), u @ s @ vt, atol=1e-4)


def test_equal_shapes_are_one_batched_call(monkeypatch):
    fn, params, x = BY_NAME["attention"].build()
    matrices = oialr.find_matrices(fn, params, x)
    tx = oialr.freeze_bases(optax.sgd(0.1))
    batches = []

    def spy(matrices):
        batches.append(matrices.shape)
        return linalg.svd(matrices)

    monkeypatch.setattr(decompose, "svd", spy)
    jax.clear_caches()  # what is traced below must be traced anew
    low, state, _ = oialr.factorize(params, tx.init(params), matrices, tx=tx)
    oialr.truncate(low, state, KEEP_ALL, tx=tx)
    assert batches == [(4, 8, 8), (4, 8, 8)]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_on_a_mesh_the_devices_share_the_decompositions(count, monkeypatch):
    """Each takes its turn, and the result is that of one device."""
    params = {f"w{i}": normal(i, 12, 10) for i in range(5)}
    axes = Axes((12, 10), (), (0,), (1,))
    matrices = [Matrix(name, axes, rows=1, kind="dot") for name in params]
    tx = oialr.freeze_bases(optax.adam(0.1))

    def event(params):
        low, state, _ = oialr.factorize(params, tx.init(params), matrices, tx=tx)
        rule = oialr.RankRule(cutoff=0.5)
        chosen = ranking.choose(low, rule, matrices)
        return chosen, oialr.truncate(low, state, rule, tx=tx)[:2]

    expected = event(params)
    used = []
    real = decompose._solved_group

    def spy(arrays, sides, **static):
        if not isinstance(arrays[0], jax.core.Tracer):
            rows = len(arrays) if arrays[0].ndim == 2 else len(arrays[0])
            used.append((rows, *arrays[0].devices()))
        return real(arrays, sides, **static)

    monkeypatch.setattr(decompose, "_solved_group", spy)
    devices = jax.devices()[:count]
    mesh = jax.make_mesh((count,), ("x",), (AxisType.Auto,), devices=devices)
    everywhere = NamedSharding(mesh, PartitionSpec())
    chosen, actual = event(jax.device_put(params, everywhere))
    assert chosen == expected[0]
    assert_close(actual, expected[1], 1e-6)
    each = {1: 5, 3: 2, 8: 1}[count]
    assert used == 3 * [(each, x) for x in devices[: -(-5 // each)]]
    for leaf in jax.tree.leaves(actual[0]):
        assert leaf.sharding.is_equivalent_to(everywhere, leaf.ndim)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (2, 12, 40)])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_by_the_gram_matrix_what_is_kept_is_as_good_as_by_the_svd(shape, scale):
    """And squares neither overflow nor vanish."""
    matrix = normal(0, *shape)
    u, sigma, vt = map(np.asarray, linalg.gram_svd(scale * matrix, 5))
    true_u, true, true_vt = np.linalg.svd(np.asarray(matrix), full_matrices=False)
    assert u.shape == (*shape[:-1], 5)
    assert vt.shape == (*shape[:-2], 5, shape[-1])
    np.testing.assert_allclose(sigma / scale, true, rtol=2e-5)
    alone = np.asarray(linalg.gram_singular_values(scale * matrix))
    np.testing.assert_allclose(alone / scale, true, rtol=2e-5)
    kept = (u * (sigma / scale)[..., None, :5]) @ vt
    best = (true_u[..., :5] * true[..., None, :5]) @ true_vt[..., :5, :]
    np.testing.assert_allclose(kept, best, atol=2e-5)
    np.testing.assert_allclose(np.swapaxes(u, -1, -2) @ u, eyes(u), atol=1e-5)
    np.testing.assert_allclose(vt @ np.swapaxes(vt, -1, -2), eyes(u), atol=1e-5)


def eyes(u):
    return np.broadcast_to(np.eye(u.shape[-1]), (*u.shape[:-2], *2 * u.shape[-1:]))


@pytest.mark.parametrize("matrix", ["zeros", "one", "noise", "not finite"])
def test_the_gram_matrix_of_what_has_no_rank(matrix):
    """Bases are orthonormal even of zeros, values descend, and NaN marks the rest."""
    of = {
        "zeros": jnp.zeros((8, 20)),
        "one": jnp.outer(jnp.arange(8.0), jnp.ones(20)),
        "noise": long_one([1, *np.geomspace(1e-4, 1e-6, 7)]),
        "not finite": jnp.ones((8, 20)).at[3, 4].set(jnp.inf),
    }
    u, sigma, vt = map(np.asarray, linalg.gram_svd(of[matrix], 6))
    alone = np.asarray(linalg.gram_singular_values(of[matrix]))
    if matrix == "not finite":
        assert all(np.isnan(x).all() for x in (u, sigma, vt, alone))
        return
    np.testing.assert_allclose(u.T @ u, np.eye(6), atol=1e-6)
    np.testing.assert_allclose(vt @ vt.T, np.eye(6), atol=1e-6)
    assert (np.diff(sigma) <= 0).all()
    assert (sigma >= 0).all()
    atol = 2e-4 if matrix == "noise" else 1e-5
    np.testing.assert_allclose((u * sigma[:6]) @ vt, of[matrix], atol=atol)


@pytest.fixture
def how(monkeypatch):
    """What each decomposition was asked for: the side, vectors or not, and the rank."""
    asked = []
    real = decompose._solved_group

    def spy(arrays, sides, axes, vectors, rank):
        asked.append((arrays[0].shape, vectors, rank))
        return real(arrays, sides, axes=axes, vectors=vectors, rank=rank)

    monkeypatch.setattr(decompose, "_solved_group", spy)
    return asked


def long_one(sigma, m=8, n=20):
    u, _ = np.linalg.qr(np.asarray(normal(0, m, m)))
    v, _ = np.linalg.qr(np.asarray(normal(1, n, m)))
    return jnp.asarray((u * np.asarray(sigma)) @ v.T, jnp.float32)


def matrix_of(m, n, name="w"):
    return Matrix(name, Axes((m, n), (), (0,), (1,)), rows=1, kind="dot")


def test_long_matrices_that_are_cut_go_by_their_gram_matrix(how):
    sigma = np.geomspace(1, 0.05, 8)
    params = {"w": long_one(sigma), "short": long_one(sigma, 8, 11)}
    matrices = [matrix_of(8, 20), matrix_of(8, 11, "short")]
    tx = oialr.freeze_bases(optax.adam(0.1))
    state = tx.init(params)

    def asked(call, *args, **options):
        how.clear()
        call(*args, **options)
        return sorted(how, key=str)

    cut = {"w": 3, "short": 3}
    factorize = functools.partial(oialr.factorize, params, state, matrices, tx=tx)
    assert asked(factorize, rank=cut) == [((8, 11), True, None), ((8, 20), True, 3)]
    whole = [((8, 11), True, None), ((8, 20), True, None)]
    assert asked(factorize) == whole  # the function must not change

    low, _, report = factorize(rank=cut)
    u, values, vt = np.linalg.svd(np.asarray(params["w"]), full_matrices=False)
    best = (u[:, :3] * values[:3]) @ vt[:3]
    np.testing.assert_allclose(low["w"].materialize(), best, atol=1e-6)
    np.testing.assert_allclose(report.layers[0].sigma[0], sigma, rtol=1e-5)

    for rule, rank in [
        (oialr.RankRule(cutoff=0.1), 1),
        (oialr.RankRule(cutoff=1e-3), None),
        (oialr.RankRule(budget=200), None),
    ]:
        values = asked(ranking.choose, params, rule, matrices)
        assert values == [((8, 11), False, None), ((8, 20), False, rank)]


def test_long_matrices_of_a_shape_are_one_program_whatever_their_ranks(how):
    params = {name: long_one(np.geomspace(1, 0.05, 8)) for name in "vw"}
    matrices = [matrix_of(8, 20, name) for name in "vw"]
    tx = oialr.freeze_bases(optax.adam(0.1))
    ranks = {"v": 3, "w": 5}
    low, _, _ = oialr.factorize(params, tx.init(params), matrices, tx=tx, rank=ranks)
    assert how == [((8, 20), True, 5)]
    assert {name: node.rank for name, node in low.items()} == ranks


def test_directions_that_a_gram_matrix_does_not_show_come_from_the_svd(how):
    sigma = np.geomspace(1, 1e-6, 8)
    params = {"w": long_one(sigma), "clear": long_one(np.geomspace(1, 0.5, 8))}
    params["short"] = long_one(sigma, 8, 11)
    matrices = [matrix_of(8, 20), matrix_of(8, 20, "clear"), matrix_of(8, 11, "short")]
    tx = oialr.freeze_bases(optax.adam(0.1))
    low, _, _ = oialr.factorize(params, tx.init(params), matrices, tx=tx, rank=7)
    at_first = [((8, 20), True, 7), ((8, 11), True, None)]
    assert how == [*at_first, ((8, 20), True, None)]
    u, values, vt = np.linalg.svd(np.asarray(params["w"]), full_matrices=False)
    best = (u[:, :7] * values[:7]) @ vt[:7]
    np.testing.assert_allclose(low["w"].materialize(), best, atol=3e-7)
    assert low["w"].s[6, 6] == pytest.approx(sigma[6], rel=0.05)


def test_a_stack_shares_its_largest_rank():
    strong, weak = jnp.diag(jnp.arange(8.0, 0, -1)), jnp.diag(0.5 ** jnp.arange(8.0))
    params = {"w": jnp.stack([weak, strong])}
    axes = Axes((2, 8, 8), (0,), (1,), (2,))
    tx = oialr.freeze_bases(optax.sgd(0.1))
    matrices = [Matrix("w", axes, rows=1, kind="dot")]
    low, state, _ = oialr.factorize(params, tx.init(params), matrices, tx=tx)
    rule = oialr.RankRule(cutoff=0.3)
    cut, _, report = oialr.truncate(low, state, rule, tx=tx)
    assert report.layers[0].after == 6  # 8 6 .. 3 of the strong, 2 of the weak
    assert report.layers[0].sigma.shape == (2, 8)
    assert cut["w"].u.shape == (2, 8, 6)


def test_a_leaf_that_is_not_finite_stays_dense_and_the_others_convert():
    def fn(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    # infinity, not NaN: LAPACK may never return from it
    params = {"a": normal(0, 6, 6).at[0, 0].set(jnp.inf), "b": normal(1, 6, 6)}
    tx = oialr.freeze_bases(optax.adam(1e-3))
    matrices = oialr.find_matrices(fn, params, normal(2, 3, 6))
    low, state, report = oialr.factorize(params, tx.init(params), matrices, tx=tx)
    np.testing.assert_array_equal(low["a"], params["a"])
    assert is_low_rank(low["b"])
    assert [(x.finite, x.after) for x in report.layers] == [(False, None), (True, 6)]
    assert "not finite, left as it was" in str(report)
    assert jax.tree.structure(tx.init(low)) == jax.tree.structure(state)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("factor", ["u", "s", "vt"])
def test_a_core_or_base_that_is_not_finite_is_left_as_it_was(factor, value):
    params = in_low_rank(
        {"a": normal(0, 6, 6), "b": normal(1, 6, 6)},
        [Matrix(n, Axes((6, 6), (), (0,), (1,)), 1, "dot") for n in "ab"],
        fraction=1.0,
    )
    a = params["a"]
    bad = getattr(a, factor).at[2, 1].set(value)
    params["a"] = dataclasses.replace(a, **{factor: bad})
    tx = oialr.freeze_bases(optax.sgd(0.1, momentum=0.9))
    state = jax.tree.map(lambda x: x + 1, tx.init(params))
    rule = oialr.RankRule(cutoff=0.9)
    new, new_state, report = oialr.truncate(params, state, rule, tx=tx)
    jax.tree.map(np.testing.assert_array_equal, new["a"], params["a"])
    trace = new_state.inner_state[0].trace
    np.testing.assert_array_equal(trace["a"], np.ones((6, 6)))
    assert new["b"].rank < 6
    assert [x.finite for x in report.layers] == [False, True]


@pytest.mark.parametrize("value", [1.0, jnp.nan], ids=["cut", "left_as_it_was"])
def test_no_rank_waits_after_an_event(value):
    node = oialr.lowrank.factor(normal(0, 8, 6), Axes((8, 6), (), (0,), (1,)))
    core = node.s.at[0, 0].set(value)
    params = {"b": jnp.ones(3), "w": oialr.LowRank(node.u, core, node.vt, node.axes)}
    tx = oialr.freeze_bases(optax.adam(1e-3))
    state = with_pending(params, tx.init(params), {"w": 2})
    assert pending_ranks(params, state) == {"w": 2}
    new, new_state, _ = oialr.truncate(params, state, {"w": 2}, tx=tx)
    assert pending_ranks(new, new_state) == {}
    _, dense_state = oialr.densify(params, state, tx=tx)
    np.testing.assert_array_equal(dense_state.pending, [0, 0])


def test_drifted_bases_are_repaired_and_the_matrix_kept():
    node = oialr.lowrank.factor(normal(0, 10, 8), Axes((10, 8), (), (0,), (1,)))
    drifted = oialr.LowRank(
        node.u + 0.02 * normal(1, 10, 8), node.s, node.vt * 1.01, node.axes
    )
    assert orthogonality_error(drifted.u, drifted.vt) > 1e-2
    params = {"w": drifted}
    tx = oialr.freeze_bases(optax.sgd(0.1))
    new, _, report = oialr.truncate(params, tx.init(params), KEEP_ALL, tx=tx)
    assert orthogonality_error(new["w"].u, new["w"].vt) < 1e-5
    assert_close(new["w"].materialize(), drifted.materialize(), F32)
    assert report.layers[0].orthogonality_error > 1e-2


def test_dtypes_survive_events():
    axes = Axes((8, 6), (), (0,), (1,))
    node = oialr.lowrank.factor(normal(0, 8, 6), axes)
    params = {
        "half": oialr.LowRank(
            *(f.astype(jnp.bfloat16) for f in (node.u, node.s, node.vt)), axes
        ),
        "narrow": oialr.LowRank(
            node.u.astype(jnp.bfloat16), node.s, node.vt.astype(jnp.bfloat16), axes
        ),
    }
    tx = oialr.freeze_bases(optax.adam(1e-3))
    rule = oialr.RankRule(cutoff=0.5)
    new, state, _ = oialr.truncate(params, tx.init(params), rule, tx=tx)

    def dtypes(tree):
        return [x.dtype for x in jax.tree.leaves(tree)]

    assert dtypes(new) == dtypes(params)
    assert dtypes(state) == dtypes(tx.init(new))


def test_report_is_a_table_and_json():
    tx = oialr.freeze_bases(optax.sgd(0.1))
    params, state, matrices, _ = trained(tx, convert=False)
    _, _, report = oialr.factorize(params, state, matrices, tx=tx, rank=5)
    assert re.search(r"a/w +12x12 +dense -> 5 +\d\d\.\d%", str(report))
    (layer,) = json.loads(json.dumps(report.to_dict()))["layers"]
    assert layer["path"] == "a/w"
    assert layer["after"] == 5
    assert layer["before"] is None
    sigma = np.linalg.svd(params["a"]["w"], compute_uv=False)
    np.testing.assert_allclose(layer["sigma"], [sigma], rtol=1e-4)
    kept = float(np.sum(sigma[:5] ** 2) / np.sum(sigma**2))
    assert layer["energy"] == pytest.approx(kept, rel=1e-4)


# One event: what it does is a conversion and then a truncation, at half the work

SIDES = {
    "plain": {"tall": (16, 10), "wide": (10, 16), "square": (12, 12)},
    "stacked": {"stack": (3, 12, 10), "square": (12, 12)},
}
EVENTS = {
    "plain": ("plain", oialr.RankRule(cutoff=0.4)),
    "stacked": ("stacked", oialr.RankRule(cutoff=0.4)),
    "budget": ("plain", oialr.RankRule(budget=500)),
    "mapping": ("plain", {"tall": 4, "wide": 6, "square": 12}),
}


def gathered(tx, shapes, low=()):
    """Params, some of them in low rank, their matrices, and some steps of moments."""
    params = {x: normal(i, *shape) for i, (x, shape) in enumerate(shapes.items())}
    matrices = [
        Matrix(
            x,
            Axes(s, (0,) * (len(s) - 2), (len(s) - 2,), (len(s) - 1,)),
            1,
            "dot",
        )
        for x, s in shapes.items()
    ]
    params["bias"] = jnp.zeros(3)
    params |= {
        x.path: oialr.lowrank.factor(params[x.path], x.axes)
        for x in matrices
        if x.path in low
    }
    state = tx.init(params)
    grads = jax.tree.map(lambda p: normal(p.size, *p.shape), params)
    for scale in (1.0, -0.5, 2.0):
        scaled = jax.tree.map(functools.partial(jnp.multiply, scale), grads)
        _, state = tx.update(scaled, state, params)
    return params, state, matrices


def lifted(params, state):
    """Weights and first moments dense again, which no sign of a vector changes; and
    second moments, which none changes either."""
    adam = state.inner_state[0]
    dense = oialr.materialize(with_trainable(params, adam.mu))
    return oialr.materialize(params), dense, adam.nu


@pytest.mark.parametrize("low", [(), ("square",)], ids=["dense", "mixed"])
@pytest.mark.parametrize("name", EVENTS)
def test_one_event_is_a_conversion_and_then_a_truncation(name, low):
    sides, how = EVENTS[name]
    tx = oialr.freeze_bases(optax.adam(0.1))
    params, state, matrices = gathered(tx, SIDES[sides], low)
    if isinstance(how, dict):
        one = surgery.apply_ranks(params, state, matrices, how, tx=tx)
    else:
        one = surgery.apply_rule(params, state, matrices, how, matrices, tx=tx)
    first, second, conversion = oialr.factorize(params, state, matrices, tx=tx)
    paths = [x.path for x in matrices]
    *two, truncation = oialr.truncate(first, second, how, tx=tx, paths=paths)
    assert oialr.ranks(one[0]) == oialr.ranks(two[0])
    assert min(r for *_, r in oialr.ranks(one[0]).values()) < 10
    assert_close(lifted(*one[:2]), lifted(*two), 10 * F32)
    if not isinstance(how, dict):
        for found, wanted in zip(one[2], (conversion, truncation), strict=True):
            assert found.kind == wanted.kind
            for a, b in zip(found.layers, wanted.layers, strict=True):
                assert a[:5] == b[:5]
                assert a.energy == pytest.approx(b.energy, abs=1e-5)
                np.testing.assert_allclose(a.sigma, b.sigma, atol=1e-5)


def test_what_is_not_treated_is_converted_at_full_rank():
    tx = oialr.freeze_bases(optax.adam(0.1))
    params, state, matrices = gathered(tx, SIDES["plain"], ("square",))
    rule = oialr.RankRule(cutoff=0.9)
    new, _, reports = surgery.apply_rule(
        params, state, matrices, rule, matrices[:1], tx=tx
    )
    ranks = {x: r for x, (*_, r) in oialr.ranks(new).items()}
    assert ranks == {"tall": 5, "wide": 10, "square": 12}
    assert new["square"] is params["square"]
    rows = [(x.kind, y.path, y.before, y.after) for x in reports for y in x.layers]
    assert rows == [
        ("conversion", "tall", None, 10),
        ("conversion", "wide", None, 10),
        ("truncation", "tall", 10, 5),
    ]


@pytest.mark.parametrize("by", ["rule", "mapping"])
def test_an_event_decomposes_each_matrix_once(how, by):
    """Dense ones and cores, those of one shape by one program."""
    tx = oialr.freeze_bases(optax.adam(0.1))
    shapes = SIDES["plain"] | {"other": (12, 12), "tall2": (16, 10)}
    params, state, matrices = gathered(tx, shapes, ("square",))
    how.clear()
    if by == "rule":
        rule = oialr.RankRule(cutoff=0.5)
        surgery.apply_rule(params, state, matrices, rule, matrices, tx=tx)
        cut = None
    else:
        ranks = dict.fromkeys(shapes, 5)
        surgery.apply_ranks(params, state, matrices, ranks, tx=tx)
        cut = 5
    wanted = [((10, 16), True, cut), ((12, 12), True, None), ((16, 10), True, cut)]
    assert sorted(how, key=str) == wanted


def test_a_dense_matrix_that_is_not_finite_has_no_truncation():
    tx = oialr.freeze_bases(optax.adam(0.1))
    params, state, matrices = gathered(tx, SIDES["plain"])
    params["tall"] = params["tall"].at[1, 2].set(jnp.inf)
    rule = oialr.RankRule(budget=400)
    new, _, reports = surgery.apply_rule(params, state, matrices, rule, matrices, tx=tx)
    assert new["tall"] is params["tall"]
    found = [[(x.path, x.finite) for x in report.layers] for report in reports]
    good = [("wide", True), ("square", True)]
    assert found == [[("tall", False), *good], good]


# Bad input: the exact error, and nothing changed


@pytest.mark.parametrize(
    "verb",
    [
        lambda p, s, m, tx: oialr.factorize(p, s, m, tx=tx),
        lambda p, s, m, tx: ranking.choose(p, KEEP_ALL, m),
        lambda p, s, m, tx: project_to_rank(p, KEEP_ALL, m),
        lambda p, s, m, tx: surgery.apply_ranks(p, s, m, {"a/w": 3}, tx=tx),
        lambda p, s, m, tx: surgery.apply_rule(p, s, m, KEEP_ALL, m, tx=tx),
        lambda p, s, m, tx: surgery.compile_ahead(p, s, m, {"a/w": 3}, tx=tx),
        lambda p, s, m, tx: oialr.stability.compare(p, p, m),
        lambda p, s, m, tx: oialr.orthogonal.orthogonalize(matrices=m).init(p),
    ],
    ids=["factorize", "choose", "project", "ranks", "rule", "ahead", "stability", "tx"],
)
def test_a_leaf_that_is_not_there_is_told_in_one_way(verb):
    params, state, matrices, tx = _params()
    with pytest.raises(ValueError, match=r"^no leaf at a/w; there are: z$"):
        verb({"z": params["z"]}, state, matrices, tx)


def _params():
    tx = oialr.freeze_bases(optax.sgd(0.1, momentum=0.9))
    params, matrices, _ = regression(tx)
    return params, tx.init(params), matrices, tx


@pytest.mark.parametrize("rank", [0, 13, {"a/w": 80}])
def test_rank_outside_its_range(rank):
    params, state, matrices, tx = _params()
    value = rank["a/w"] if isinstance(rank, dict) else rank
    said = rf"`rank` must be in \[1, 12\] for a/w, got {value}"
    with pytest.raises(ValueError, match=said):
        oialr.factorize(params, state, matrices, tx=tx, rank=rank)


def test_matrix_without_its_leaf():
    params, state, matrices, tx = _params()
    with pytest.raises(ValueError, match="no leaf at a/w; there are: z"):
        oialr.factorize({"z": params["z"]}, state, matrices, tx=tx)


def test_matrix_of_another_shape():
    params, state, matrices, tx = _params()
    params["a"]["w"] = jnp.ones((3, 3))
    said = re.escape("a/w has shape (3, 3), the matrix has (12, 12)")
    with pytest.raises(ValueError, match=said):
        oialr.factorize(params, state, matrices, tx=tx)


def test_path_that_is_not_low_rank():
    params, state, matrices, tx = _params()
    params, state, _ = oialr.factorize(params, state, matrices, tx=tx)
    with pytest.raises(ValueError, match="no low-rank leaf at z; there are: a/w"):
        oialr.truncate(params, state, KEEP_ALL, tx=tx, paths=["z"])


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(1e-3),
        optax.sgd(0.1),
        optax.chain(oialr.freeze_bases(optax.sgd(0.1)), optax.trace(0.9)),
        optax.MultiSteps(
            oialr.freeze_bases(optax.sgd(0.1)), 2
        ).gradient_transformation(),
    ],
    ids=["adam", "stateless", "half_wrapped", "multi_steps_outside"],
)
def test_optimizer_that_was_not_wrapped(tx):
    params, _, matrices, _ = _params()
    with pytest.raises(ValueError, match=r"build it as oialr_jax\.freeze_bases\(tx\)"):
        oialr.factorize(params, tx.init(params), matrices, tx=tx)


def test_densify_needs_the_optimizer_of_a_state():
    params, state, _, _ = _params()
    with pytest.raises(ValueError, match="`opt_state` without `tx`"):
        oialr.densify(params, state)


def test_factorize_twice_changes_nothing():
    params, state, matrices, tx = _params()
    low, low_state, _ = oialr.factorize(params, state, matrices, tx=tx, rank=5)
    again, _, report = oialr.factorize(low, low_state, matrices, tx=tx)
    assert report.layers == ()
    jax.tree.map(np.testing.assert_array_equal, again, low)


def test_training_goes_on_after_a_cut():
    tx = oialr.freeze_bases(optax.adamw(1e-2))
    params, state, _, step = trained(tx)
    params, state, _ = oialr.truncate(params, state, oialr.RankRule(cutoff=0.3), tx=tx)
    fitted, fitted_state = params, state
    for _ in range(5):
        fitted, fitted_state = step(fitted, fitted_state, 1.0)
    assert np.all(np.isfinite(fitted["a"]["w"].s))
    assert np.any(fitted["a"]["w"].s != params["a"]["w"].s)
    np.testing.assert_array_equal(fitted["a"]["w"].u, params["a"]["w"].u)


def test_loss_of_a_low_rank_network_is_that_of_its_dense_twin():
    fn, params, x = BY_NAME["attention"].build()
    low = in_low_rank(params, oialr.find_matrices(fn, params, x))
    dense = scalar_loss(fn)(oialr.materialize(low), x)
    np.testing.assert_allclose(
        scalar_loss(oialr.factored(fn))(low, x), dense, rtol=1e-4
    )


# --------------------------------------------------------------------- projections


@pytest.mark.parametrize("case", CASES_WITH_ARRAYS, ids=lambda case: case.name)
def test_a_projection_is_the_nearest_matrix_of_the_rank_and_stays_dense(case):
    fn, params, x = case.build()
    matrices = oialr.find_matrices(fn, params, x)
    rule = oialr.RankRule(cutoff=0.99, max_drop=0.6)
    new = project_to_rank(params, rule, matrices)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    found, named = named_leaves(new), named_leaves(params)
    known = {matrix.path: matrix for matrix in matrices}
    for path, leaf in named.items():
        if path not in known:
            assert found[path] is leaf
            continue
        axes = known[path].axes
        before = np.asarray(axes.to_matrix(leaf), np.float64)
        u, sigma, vt = np.linalg.svd(before, full_matrices=False)
        flat = sigma.reshape(-1, sigma.shape[-1])
        r = rule.choose(flat, min(axes.m, axes.n))
        assert r < sigma.shape[-1] or r == 1
        wanted = (u[..., :r] * sigma[..., None, :r]) @ vt[..., :r, :]
        assert found[path].dtype == leaf.dtype
        assert_close(axes.to_matrix(found[path]), wanted, TOLERANCE[leaf.dtype])


def test_a_projection_leaves_alone_what_is_low_rank_or_not_finite():
    params, matrices, _ = regression(optax.sgd(0.1))
    params["a"]["w"] = params["a"]["w"].at[0, 0].set(jnp.nan)
    rule = oialr.RankRule(cutoff=0.99)
    new = project_to_rank(params, rule, matrices)
    assert new["a"]["w"] is params["a"]["w"]
    tx = oialr.freeze_bases(optax.sgd(0.1))
    params = {"a": {"w": normal(0, 12, 12), "b": jnp.zeros(12)}, "z": normal(2, 12, 3)}
    low, _, _ = oialr.factorize(params, tx.init(params), matrices, tx=tx)
    new = project_to_rank(low, rule, matrices)
    jax.tree.map(np.testing.assert_array_equal, new, low)


def test_a_projection_of_a_matrix_of_another_shape_is_refused():
    params, matrices, _ = regression(optax.sgd(0.1))
    params["a"]["w"] = jnp.zeros((12, 11))
    message = r"^a/w has shape \(12, 11\), the matrix has \(12, 12\)$"
    with pytest.raises(ValueError, match=message):
        project_to_rank(params, oialr.RankRule(), matrices)


def test_a_projection_keeps_to_a_budget_of_all_matrices():
    keys = ("wide", "tall")
    params = {"wide": normal(0, 8, 30), "tall": normal(1, 30, 8)}
    matrices = oialr.find_matrices(
        lambda p, x: x @ p["wide"] @ p["tall"], params, normal(2, 4, 8)
    )
    rule = oialr.RankRule(budget=2 * (38 + 2) + 3 * (38 + 3))
    new = project_to_rank(params, rule, matrices)
    ranks = [np.linalg.matrix_rank(np.asarray(new[k]), tol=1e-4) for k in keys]
    assert sorted(ranks) == [2, 3]


def test_a_projected_leaf_stays_where_it_lies():
    mesh = jax.make_mesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    where = NamedSharding(mesh, PartitionSpec("fsdp"))
    params = {"w": jax.device_put(normal(0, 16, 12), where), "v": normal(1, 12, 3)}
    matrices = oialr.find_matrices(
        lambda p, x: x @ p["w"] @ p["v"], params, normal(2, 4, 16)
    )[:1]
    rule = oialr.RankRule(cutoff=0.7)
    new = project_to_rank(params, rule, matrices)["w"]
    assert new.sharding == where
    alone = project_to_rank({"w": normal(0, 16, 12)}, rule, matrices)["w"]
    assert_close(new, alone, F32)
