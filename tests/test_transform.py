"""freeze_bases: state for cores and dense leaves only, bases never move, any chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BY_NAME, normal
from helpers import in_low_rank, scalar_loss

import oialr_jax as oialr
from oialr_jax.lowrank import Axes, factor, is_low_rank, named_leaves

CHAINS = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "sgd": optax.sgd(1e-2),
    "sgd_momentum": optax.sgd(1e-2, momentum=0.9, nesterov=True),
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "rmsprop": optax.rmsprop(1e-3, momentum=0.9),
    "muon": optax.contrib.muon(1e-2),
    "orthogonal_sgd": oialr.orthogonal.orthogonal_sgd(1e-2, weight_decay=1e-3),
    "spectral_trust_region": oialr.orthogonal.spectral_trust_region(
        1e-2, weight_decay=0.1
    ),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)),
    "schedule": optax.adamw(optax.warmup_cosine_decay_schedule(0, 1e-2, 2, 10)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "multi_steps": optax.MultiSteps(optax.adamw(1e-2), every_k_schedule=2),
    "masked_decay": optax.chain(
        optax.scale_by_adam(),
        optax.add_decayed_weights(
            0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
        ),
        optax.scale(-1e-2),
    ),
}


def problem():
    """A small network of one low-rank and one dense matrix, with biases."""
    fn, params, x = BY_NAME["dense"].build()
    matrices = oialr.find_matrices(fn, params, x)
    return fn, in_low_rank(params, matrices[:1]), x


@pytest.mark.parametrize(
    "bases_in_gradient", [True, False], ids=["grad", "value_and_grad"]
)
@pytest.mark.parametrize("name", CHAINS)
def test_bases_never_move_and_everything_else_does(name, bases_in_gradient):
    fn, params, x = problem()
    tx = oialr.freeze_bases(CHAINS[name])
    loss = scalar_loss(oialr.factored(fn))

    @jax.jit
    def step(params, state, x):
        if bases_in_gradient:
            grads = jax.grad(loss)(params, x)
        else:
            _, grads = oialr.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    new, x = params, x
    for _ in range(4):
        new, state = step(new, state, x)
    for path, leaf in named_leaves(new).items():
        old = named_leaves(params)[path]
        if is_low_rank(leaf):
            np.testing.assert_array_equal(leaf.u, old.u)
            np.testing.assert_array_equal(leaf.vt, old.vt)
            assert np.any(leaf.s != old.s)
        else:
            assert np.any(leaf != old), path


@pytest.mark.parametrize("name", CHAINS)
def test_state_is_for_cores_and_dense_leaves_only(name):
    _, params, _ = problem()
    tx = oialr.freeze_bases(CHAINS[name])
    node = params["layers_0"]["kernel"]
    state = tx.init(params)
    assert state.pending.shape == (len(named_leaves(params)),)
    shapes = [leaf.shape for leaf in jax.tree.leaves(state.inner_state)]
    assert node.u.shape not in shapes
    assert node.vt.shape not in shapes
    trained = oialr.transform.trainable(params)
    assert jax.tree.structure(trained) == jax.tree.structure(oialr.materialize(params))
    bare = CHAINS[name]
    assert shapes == [leaf.shape for leaf in jax.tree.leaves(bare.init(trained))]


@pytest.mark.parametrize("name", CHAINS)
def test_dense_params_train_as_without_it(name):
    fn, params, x = problem()
    params = oialr.materialize(params)
    grads = jax.grad(scalar_loss(fn))(params, x)
    bare, wrapped = CHAINS[name], oialr.freeze_bases(CHAINS[name])
    expected, _ = jax.jit(bare.update)(grads, bare.init(params), params)
    actual, _ = jax.jit(wrapped.update)(grads, wrapped.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_clipping_sees_the_norm_of_the_trained_leaves_only():
    params = {"w": factor(normal(0, 6, 4), Axes((6, 4), (), (0,), (1,)))}
    node = params["w"]
    grads = {
        "w": oialr.LowRank(node.u * 1e6, jnp.ones((4, 4)), node.vt * 1e6, node.axes)
    }
    tx = oialr.freeze_bases(optax.clip_by_global_norm(1.0))
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"].s, np.ones((4, 4)) / 4, rtol=1e-6)


def test_biases_of_factorised_layers_stay_trained():
    fn, params, x = problem()
    tx = oialr.freeze_bases(optax.sgd(0.1))
    _, grads = oialr.value_and_grad(scalar_loss(oialr.factored(fn)))(params, x)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert np.any(updates["layers_0"]["bias"])


def test_state_is_abstract_and_params_shaped():
    """init runs on shapes; optax's own state tools see through the wrapper."""
    _, params, _ = problem()
    tx = oialr.freeze_bases(optax.adamw(1e-3))
    abstract = jax.eval_shape(tx.init, params)
    assert jax.tree.structure(abstract) == jax.tree.structure(tx.init(params))
    doubled = optax.tree.map_params(tx, lambda x: x + 2, tx.init(params))
    nu = optax.tree.get(doubled, "nu")
    assert all(np.all(leaf == 2) for leaf in jax.tree.leaves(nu))


def test_update_works_without_params_for_gradients_of_jax_grad():
    fn, params, x = problem()
    tx = oialr.freeze_bases(optax.sgd(0.1))
    grads = jax.grad(scalar_loss(oialr.factored(fn)))(params, x)
    updates, _ = tx.update(grads, tx.init(params))
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_value_and_grad_passes_aux_and_keywords_through():
    fn, params, x = problem()

    def loss(params, x, *, scale):
        return scale * scalar_loss(oialr.factored(fn))(params, x), "aux"

    (value, aux), grads = oialr.value_and_grad(loss, has_aux=True)(params, x, scale=2.0)
    assert aux == "aux"
    assert value == 2 * scalar_loss(oialr.factored(fn))(params, x)
    assert grads["layers_0"]["kernel"].shape == params["layers_0"]["kernel"].s.shape
