"""Arrays of NumPy as they come: int64 labels, float64 params, without a warning."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import oialr_jax as oialr

RNG = np.random.default_rng(0)
PARAMS = {
    "a": RNG.normal(size=(32, 48)) / 6,
    "b": RNG.normal(size=(48, 48)) / 7,
    "head": RNG.normal(size=(48, 4)),
}
X, Y = RNG.normal(size=(16, 32)), np.arange(16) % 4


def predict(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["head"]


def loss(params, x, y):
    logits = predict(params, x)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.mean(losses)


def by_training():
    run = oialr.training(loss, optax.adam(1e-2), delay=2, budget=0.5)
    state = run.init(PARAMS, X, Y)
    for _ in range(4):
        state, value = run.step(state, X, Y)
    return state.params, value


def by_wrap():
    def train_step(state, x, y):
        value, grads = oialr.value_and_grad(
            lambda params, x, y: jnp.mean(
                optax.softmax_cross_entropy_with_integer_labels(
                    state.apply_fn(params, x), y
                )
            )
        )(state.params, x, y)
        return state.apply_gradients(grads=grads), value

    state = TrainState.create(apply_fn=predict, params=PARAMS, tx=optax.adam(1e-2))
    state, step = oialr.wrap(state, train_step, X, Y, delay=2, budget=0.5)
    for _ in range(4):
        state, value = step(state, X, Y)
    return state.params, value


def by_hand():
    matrices = oialr.select(oialr.find_matrices(loss, PARAMS, X, Y))
    assert oialr.explain(loss, PARAMS, X, Y)
    params, _, _ = oialr.factorize(PARAMS, None, matrices, rank=8)
    statistics = oialr.curvature(loss, matrices)(params, X, Y)
    assert set(statistics.sides) == {"a", "b"}
    return params, oialr.factored(loss)(params, X, Y)


@pytest.mark.parametrize(
    "train", [pytest.param(by_training, marks=pytest.mark.long), by_wrap, by_hand]
)
def test_float64_params_and_int64_labels_are_what_jit_makes_of_them(train):
    params, value = train()
    assert set(oialr.ranks(params)) == {"a", "b"}
    assert np.isfinite(value)
    assert value.dtype == jnp.float32
