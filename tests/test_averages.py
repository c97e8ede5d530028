"""How an optimizer's averages decay: read from its jaxpr, and seen in a real update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal

import oialr_jax as oialr
from oialr_jax.averages import averages
from oialr_jax.lowrank import Axes
from oialr_jax.matrices import Matrix
from oialr_jax.moments import MomentRule
from oialr_jax.transform import trainable

MATRIX = Matrix("w", Axes((12, 8), (), (0,), (1,)), rows=1, kind="dot")
PARAMS = {"w": normal(0, 12, 8), "b": jnp.ones(8)}
B1, B2 = 0.8, 0.95
ADAM = optax.adam(0.1, b1=B1, b2=B2)

KNOWN = {
    "adam": ADAM,
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), ADAM),
    "decayed": optax.chain(optax.add_decayed_weights(0.1), ADAM),
    "noisy": optax.chain(optax.add_noise(0.1, 0.1, 0), ADAM),
    "narrow": optax.adam(0.1, b1=B1, b2=B2, mu_dtype=jnp.bfloat16),
    "amsgrad": optax.amsgrad(0.1, b1=B1, b2=B2),
    "nadamw": optax.nadamw(0.1, b1=B1, b2=B2),
    "lamb": optax.lamb(0.1, b1=B1, b2=B2),
    "ademamix": optax.contrib.ademamix(0.1, b1=B1, b2=B2),
    "prodigy": optax.contrib.prodigy(0.1, betas=(B1, B2)),
    "injected": optax.inject_hyperparams(optax.adamw)(0.1, b1=B1, b2=B2),
    "gathered": optax.MultiSteps(ADAM, 2).gradient_transformation(),
    "if_finite": optax.apply_if_finite(ADAM, 3),
    "masked": optax.masked(ADAM, {"w": True, "b": False}),
    "by_label": optax.partition({"a": ADAM, "b": optax.sgd(0.1)}, {"w": "a", "b": "b"}),
    "orthogonal_first": optax.chain(oialr.orthogonal.orthogonalize(), ADAM),
}


def field_of_w(path):
    """The name of the field that a leaf of w is in, or None."""
    of_w = path[-1:] == (jax.tree_util.DictKey("w"),)
    return getattr(path[-2], "name", None) if of_w and path[1:] else None


def leaf_at(tree, path):
    return dict(jax.tree_util.tree_leaves_with_path(tree))[path]


def seen(tx, mean, square):
    """The decays that an update without gradient shows, moments being one before."""

    def ones(path, x):
        return jnp.ones_like(x) if field_of_w(path) in (mean, square) else x

    state = jax.tree_util.tree_map_with_path(ones, tx.init(PARAMS))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    for _ in range(2):  # `MultiSteps` acts at every second one
        _, state = tx.update(zeros, state, PARAMS)
        now = {
            field_of_w(path): float(jnp.mean(x))
            for path, x in jax.tree_util.tree_leaves_with_path(state)
        }
        if now[square] != 1:
            return now[mean], now[square]
    raise AssertionError("nothing decays")


@pytest.mark.parametrize("name", KNOWN)
def test_decays_are_read_as_an_update_shows_them(name):
    tx = KNOWN[name]
    ((_, found),) = averages(tx, PARAMS).items()
    state = tx.init(PARAMS)
    read = [
        float(leaf_at(state, x)) if isinstance(x, tuple) else x
        for x in (found.mean, found.square)
    ]
    np.testing.assert_allclose(read, [B1, B2], rtol=1e-6)
    fields = {"ademamix": ("m1", "nu"), "prodigy": ("exp_avg", "exp_avg_sq")}
    if name not in ("noisy", "decayed"):  # whose gradients are not zero
        shown = seen(tx, *fields.get(name, ("mu", "nu")))
        rounding = 4e-3 if name == "narrow" else 1e-6
        np.testing.assert_allclose(shown, [B1, B2], rtol=rounding)


def test_parts_of_the_params_have_decays_of_their_own():
    slow = optax.adam(0.1, b1=0.95, b2=0.99)
    tx = oialr.freeze_bases(
        optax.partition({"a": ADAM, "b": slow}, {"w": "a", "b": "b"})
    )
    found = sorted((x.mean, x.square) for x in averages(tx, PARAMS).values())
    np.testing.assert_allclose(found, [(B1, B2), (0.95, 0.99)], rtol=1e-6)


def test_narrow_params_do_not_round_a_decay_to_one():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    ((_, found),) = averages(optax.adam(0.1), narrow).items()
    np.testing.assert_allclose((found.mean, found.square), (0.9, 0.999), rtol=1e-6)


def trained(tx, steps=5):
    """An optimizer around `tx`, params and a state with moments of some gradients."""
    tx = oialr.freeze_bases(tx)
    state = tx.init(PARAMS)
    for t in range(steps):
        grads = {"w": normal(t, 12, 8) + 0.5, "b": normal(t, 8)}
        _, state = tx.update(grads, state, PARAMS)
    return tx, state


def converted(tx, state, rule=MomentRule()):  # noqa: B008 -- frozen
    """Params and moments of w after its conversion, as float64."""
    low, new, _ = oialr.factorize(
        PARAMS, state, [MATRIX], tx=tx, rank=4, moment_rule=rule
    )
    return low["w"], moments(new, low)


def moments(state, params=PARAMS):
    found = {
        field_of_w(path): np.asarray(x, np.float64)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    assert found["nu"].shape == trainable(params)["w"].shape
    return found["mu"], found["nu"]


def by_hand(node, mean, square, b1, b2, count):
    """The variance rule in float64."""
    left, right = np.asarray(node.u, np.float64).T, np.asarray(node.vt, np.float64)
    c1, c2 = 1 - b1**count, 1 - b2**count
    spread = np.maximum(square / c2 - (mean / c1) ** 2, 0)
    turned = left @ (mean / c1) @ right.T
    return c2 * (left**2 @ spread @ (right**2).T + turned**2)


@pytest.mark.parametrize("name", ["adam", "injected", "gathered"])
def test_the_correction_of_moments_takes_the_decays_of_the_optimizer(name):
    tx, state = trained(KNOWN[name], steps=10 if name == "gathered" else 5)
    node, (_, actual) = converted(tx, state)
    expected = by_hand(node, *moments(state), B1, B2, 5)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    usual = by_hand(node, *moments(state), 0.9, 0.999, 5)
    assert np.max(np.abs(usual / expected - 1)) > 0.05  # it does matter


SCHEDULED = optax.inject_hyperparams(optax.adam)(
    0.1, b1=optax.linear_schedule(0.5, B1, 3), b2=B2
)


def test_a_decay_that_changes_is_asked_for():
    tx, state = trained(SCHEDULED)
    with pytest.warns(UserWarning, match=r"inner_state/.*b1=0.9, .* MomentRule\(b1="):
        node, (_, actual) = converted(tx, state)
    expected = by_hand(node, *moments(state), 0.9, B2, 5)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_a_decay_that_is_given_is_taken_where_none_is_read():
    tx, state = trained(SCHEDULED)
    node, (_, actual) = converted(tx, state, MomentRule(b1=B1))
    expected = by_hand(node, *moments(state), B1, B2, 5)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


def test_a_decay_that_is_not_the_optimizers_is_said():
    tx, state = trained(ADAM)
    with pytest.warns(UserWarning, match=r"\(b2=0.99\) is not that of .* 0.95, which"):
        node, (_, actual) = converted(tx, state, MomentRule(b1=B1, b2=0.99))
    expected = by_hand(node, *moments(state), B1, B2, 5)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)


@pytest.mark.parametrize("name", ["b1", "b2"])
def test_a_decay_out_of_range_is_refused(name):
    with pytest.raises(ValueError, match=rf"^`{name}` must be in \[0, 1\), got 1.0$"):
        MomentRule(**{name: 1.0})
