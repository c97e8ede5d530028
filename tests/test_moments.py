"""Second moments and whole states across a change of basis, against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from test_transform import CHAINS

import oialr_jax as oialr
from oialr_jax.lowrank import Axes
from oialr_jax.matrices import Matrix
from oialr_jax.moments import MomentRule

AXES = Axes((10, 8), (), (0,), (1,))
MATRIX = Matrix("w", AXES, rows=1, kind="dot")
B1, B2 = 0.9, 0.999


def adam_state(steps=5):
    """A dense matrix and its AdamW state after some random gradients."""
    tx = oialr.freeze_bases(optax.adamw(1e-3, b1=B1, b2=B2))
    params = {"w": normal(0, 10, 8), "b": normal(1, 8)}
    state = tx.init(params)
    for i in range(steps):
        grads = {"w": normal(10 + i, 10, 8) + 0.5, "b": normal(20 + i, 8)}
        _, state = tx.update(grads, state, params)
    return tx, params, state


def adam(state):
    return state.inner_state[0]


def expected_second(rule, v, m, left, right, count):
    """The rules of the docstring, in float64, on an (a, b) second moment."""
    c1, c2 = 1 - B1**count, 1 - B2**count
    left2, right2 = left**2, right**2
    squared = left2 @ v @ right2.T
    if rule == "squared":
        return squared
    if rule == "scalar":
        return np.full_like(squared, squared.mean())
    if rule == "keep":
        return v[: left.shape[0], : right.shape[0]]
    mean = m / c1
    variance = np.maximum(v / c2 - mean**2, 0)
    return c2 * (left2 @ variance @ right2.T + (left @ mean @ right.T) ** 2)


@pytest.mark.parametrize("rule", ["variance", "squared", "scalar", "keep"])
def test_adam_crosses_conversion_and_truncation_by_the_stated_rule(rule):
    tx, params, state = adam_state()
    moment_rule = MomentRule(rule)
    low, low_state, _ = oialr.factorize(
        params, state, [MATRIX], tx=tx, moment_rule=moment_rule
    )
    before, after = adam(state), adam(low_state)
    u, vt = (np.asarray(f, np.float64) for f in (low["w"].u, low["w"].vt))
    m, v = (np.asarray(f["w"], np.float64) for f in (before.mu, before.nu))
    np.testing.assert_allclose(after.mu["w"], u.T @ m @ vt.T, atol=1e-5)
    at_conversion = "squared" if rule == "keep" else rule  # no core to keep it in yet
    second = expected_second(at_conversion, v, m, u.T, vt, 5)
    np.testing.assert_allclose(after.nu["w"], second, rtol=1e-3, atol=1e-7)
    assert after.count == before.count == 5
    np.testing.assert_array_equal(after.mu["b"], before.mu["b"])
    np.testing.assert_array_equal(after.nu["b"], before.nu["b"])

    # a core that is not diagonal, so that its SVD turns the bases
    core = low["w"].s + 0.3 * normal(5, 8, 8)
    low = {**low, "w": oialr.LowRank(low["w"].u, core, low["w"].vt, AXES)}
    cut, cut_state, _ = oialr.truncate(
        low, low_state, oialr.RankRule(cutoff=0.5), tx=tx, moment_rule=moment_rule
    )
    rank = cut["w"].rank
    assert rank < 8
    left = np.asarray(cut["w"].u.T @ low["w"].u, np.float64)
    right = np.asarray(cut["w"].vt @ low["w"].vt.T, np.float64)
    m, v = (np.asarray(f["w"], np.float64) for f in (after.mu, after.nu))
    np.testing.assert_allclose(adam(cut_state).mu["w"], left @ m @ right.T, atol=1e-5)
    second = expected_second(rule, v, m, left, right, 5)
    np.testing.assert_allclose(adam(cut_state).nu["w"], second, rtol=1e-3, atol=1e-6)
    assert adam(cut_state).count == 5


def test_a_second_moment_never_falls_below_the_square_of_the_first():
    """Where v < m², as with unequal betas, v - m² is no variance."""
    tx, params, state = adam_state()
    adam_part, *rest = state.inner_state
    tiny = jax.tree.map(lambda v: 1e-6 * v, adam_part.nu)
    state = state._replace(inner_state=(adam_part._replace(nu=tiny), *rest))
    _, low_state, _ = oialr.factorize(params, state, [MATRIX], tx=tx)
    mean = np.asarray(adam(low_state).mu["w"]) / (1 - B1**5)
    second = np.asarray(adam(low_state).nu["w"]) / (1 - B2**5)
    assert np.all(second >= mean**2 * (1 - 1e-4) - 1e-9)


def test_no_step_of_adam_after_an_event_exceeds_the_learning_rate_by_much():
    """The authors' zeroed moments with a kept count give steps of three."""
    tx, params, state = adam_state(steps=300)
    low, low_state, _ = oialr.factorize(params, state, [MATRIX], tx=tx)
    grads = {
        "w": low["w"].u.T @ (normal(50, 10, 8) + 0.5) @ low["w"].vt.T,
        "b": params["b"],
    }
    updates, _ = tx.update(grads, low_state, low)
    assert np.max(np.abs(updates["w"].s)) < 1.5e-3


def test_before_the_first_step_nothing_is_divided_by_zero():
    tx, params, state = adam_state(steps=0)
    _, low_state, _ = oialr.factorize(params, state, [MATRIX], tx=tx)
    for leaf in jax.tree.leaves(low_state):
        assert np.all(np.asarray(leaf) == 0)


def test_densify_lifts_what_factorize_projects():
    tx, params, state = adam_state()
    low, low_state, _ = oialr.factorize(params, state, [MATRIX], tx=tx)
    dense, dense_state = oialr.densify(low, low_state, tx=tx)
    u, v = np.asarray(low["w"].u), np.asarray(low["w"].vt.T)
    projected = u @ u.T @ np.asarray(adam(state).mu["w"]) @ v @ v.T
    np.testing.assert_allclose(adam(dense_state).mu["w"], projected, atol=1e-6)
    assert adam(dense_state).nu["w"].shape == dense["w"].shape


@pytest.mark.parametrize("name", CHAINS)
def test_every_chain_crosses_events_without_losing_state(name):
    """No leaf starts fresh (a warning would fail), counts stay, training goes on."""
    tx = oialr.freeze_bases(CHAINS[name])
    params = {"w": normal(0, 10, 8), "b": normal(1, 8)}
    state = tx.init(params)

    def step(params, state, seed):
        shapes = oialr.transform.trainable(params)
        grads = {k: normal(seed, *x.shape) for k, x in shapes.items()}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(3):
        params, state = step(params, state, i)
    low, low_state, _ = oialr.factorize(params, state, [MATRIX], tx=tx)
    cut, cut_state, _ = oialr.truncate(
        low, low_state, oialr.RankRule(cutoff=0.5), tx=tx
    )
    assert cut["w"].rank < 8
    shapes = jax.tree.map(jnp.shape, cut_state)
    assert shapes == jax.tree.map(jnp.shape, tx.init(cut))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if leaf.ndim == 0:  # counts, schedules, flags
            found = dict(jax.tree_util.tree_leaves_with_path(cut_state))[path]
            np.testing.assert_array_equal(found, leaf)
    cut, _ = step(cut, cut_state, 7)
    assert np.all(np.isfinite(cut["w"].s))


def test_adafactor_carries_its_row_and_column_means():
    tx = oialr.freeze_bases(optax.adafactor(1e-2, min_dim_size_to_factor=4))
    params = {"w": normal(0, 10, 8)}
    state = tx.init(params)
    for i in range(4):
        _, state = tx.update({"w": normal(i, 10, 8)}, state, params)
    low, low_state, _ = oialr.factorize(params, state, [MATRIX], tx=tx)
    old, new = state.inner_state[0], low_state.inner_state[0]
    row, col = old.v_col["w"], old.v_row["w"]  # optax: v_row drops the largest axis
    assert (row.shape, col.shape) == ((10,), (8,))
    full = np.outer(row, col) / np.mean(np.asarray(col))
    u, vt = np.asarray(low["w"].u), np.asarray(low["w"].vt)
    second = (u**2).T @ full @ (vt**2).T
    np.testing.assert_allclose(new.v_row["w"], second.mean(1), rtol=1e-4)
    np.testing.assert_allclose(new.v_col["w"], second.mean(0), rtol=1e-4)


def test_state_that_no_rule_knows_starts_fresh_and_is_named():
    def init(params):
        return {"odd": jax.tree.map(jnp.zeros_like, params)}

    def update(updates, state, params=None):
        return updates, {"odd": jax.tree.map(lambda s, g: s + g, state["odd"], updates)}

    tx = oialr.freeze_bases(optax.GradientTransformation(init, update))
    params = {"w": normal(0, 10, 8), "b": normal(1, 8)}
    _, state = tx.update(params, tx.init(params), params)
    with pytest.warns(UserWarning, match="starts fresh: inner_state/odd/w"):
        _, low_state, _ = oialr.factorize(params, state, [MATRIX], tx=tx)
    assert not np.any(low_state.inner_state["odd"]["w"])
    np.testing.assert_array_equal(low_state.inner_state["odd"]["b"], params["b"])


def test_a_leaf_belongs_to_the_parameter_with_the_longest_matching_path():
    params = {"w": normal(0, 6, 6), "outer": {"w": normal(1, 6, 6)}}
    tx = oialr.freeze_bases(optax.sgd(0.1, momentum=0.9))
    _, state = tx.update(params, tx.init(params), params)
    axes = Axes((6, 6), (), (0,), (1,))
    matrices = [Matrix(path, axes, 1, "dot") for path in ("w", "outer/w")]
    low, low_state, _ = oialr.factorize(params, state, matrices, tx=tx)
    trace = low_state.inner_state[0].trace
    for get in (lambda t: t["w"], lambda t: t["outer"]["w"]):
        node = get(low)
        expected = node.u.T @ get(params) @ node.vt.T
        np.testing.assert_allclose(get(trace), expected, atol=1e-5)


def test_unknown_rule():
    with pytest.raises(ValueError, match=r"`second` must be .*, got 'reset'"):
        MomentRule("reset")


def test_adafactor_below_its_size_has_the_shapes_that_a_checkpoint_is_read_into():
    """Optax factors nothing whose sides are below 128: the state changes its form."""
    params = {"w": jax.random.normal(jax.random.key(0), (140, 130))}
    tx = oialr.freeze_bases(optax.adafactor(1e-2))
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = jax.jit(tx.update)(grads, state, params)
    matrices = oialr.find_matrices(lambda p, x: x @ p["w"], params, jnp.ones((3, 140)))
    params, state, _ = oialr.factorize(params, state, matrices, tx=tx)
    for rank in (129, 8):
        params, state, _ = oialr.truncate(params, state, {"w": rank}, tx=tx)
        shapes = jax.tree.map(jnp.shape, state)
        assert shapes == jax.tree.map(jnp.shape, tx.init(params))
    whole = [x for x in jax.tree.leaves(state) if x.shape == (8, 8)]
    assert whole
    assert all(bool(jnp.all(x >= 0)) and bool(jnp.any(x > 0)) for x in whole)
