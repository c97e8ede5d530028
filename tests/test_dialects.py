"""training() and wrap() in the words of every library that JAX's users write.

Each dialect trains a few dense steps, converts and goes on; its mistakes are one
sentence that names the line to change. Flax NNX in place is in `test_nnx`, a TrainState
with batch statistics in `test_training`.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import nnx
from flax.training.train_state import TrainState

import oialr_jax as oialr

WIDTH, CLASSES, DELAY, STEPS = 32, 4, 3, 6


def batch(t):
    x = normal(100 + t, 16, WIDTH)
    return x, jnp.sin(3 * x[:, :CLASSES])


def squared(out, y):
    return jnp.mean((out - y) ** 2)


def trained(run, state, given=batch):
    """The state after STEPS, half of them in low rank, and the values of all."""
    values = []
    for t in range(STEPS):
        state, value = run.step(state, *given(t))
        values.append(value)
    assert np.all(np.isfinite(values))
    assert oialr.ranks(state.params) != {}
    return state, np.array(values)


def training(loss, **options):
    options = {"delay": DELAY, "budget": 0.6} | options
    return oialr.training(loss, optax.adamw(1e-2), **options)


# Equinox


def mlp():
    return eqx.nn.MLP(WIDTH, CLASSES, WIDTH, 2, key=jax.random.key(0))


def eqx_loss(model, x, y):
    return squared(jax.vmap(model)(x), y)


def test_equinox_whole_module():
    run = training(eqx_loss, jit=eqx.filter_jit)
    state, values = trained(run, run.init(mlp(), *batch(0)))
    assert isinstance(state.params, eqx.nn.MLP)
    assert state.params.activation is mlp().activation
    dense = oialr.materialize(state.params)
    assert jax.vmap(dense)(batch(0)[0]).shape == (16, CLASSES)

    @eqx.filter_jit
    def make_step(model, opt_state, x, y):  # as in Equinox's guides, without us
        value, grads = eqx.filter_value_and_grad(eqx_loss)(model, x, y)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, is_array))
        return eqx.apply_updates(model, updates), opt_state, value

    tx, is_array, model = optax.adamw(1e-2), eqx.is_inexact_array, mlp()
    opt_state = tx.init(eqx.filter(model, is_array))
    for t in range(DELAY):
        model, opt_state, value = make_step(model, opt_state, *batch(t))
        np.testing.assert_allclose(values[t], value, rtol=1e-5)


class Normalised(eqx.Module):
    """With a state of its own, as eqx.nn.BatchNorm has it."""

    linear1: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    linear2: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        a, b, c = jax.random.split(key, 3)
        self.linear1 = eqx.nn.Linear(WIDTH, WIDTH, key=a)
        self.norm = eqx.nn.BatchNorm(WIDTH, "batch", mode="batch")
        self.linear2 = eqx.nn.Linear(WIDTH, WIDTH, key=b)
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=c)

    def __call__(self, x, state):
        x, state = self.norm(self.linear1(x), state)
        return self.head(jax.nn.relu(self.linear2(jax.nn.relu(x)))), state


def test_equinox_with_a_state():
    model, model_state = eqx.nn.make_with_state(Normalised)(jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, model_state, x, y):
        model = eqx.combine(params, static)
        forward = jax.vmap(
            model, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )
        out, model_state = forward(x, model_state)
        return squared(out, y), model_state

    run = training(loss)
    state = run.init(params, *batch(0), extra=model_state)
    before = jax.tree.map(np.array, state.extra)
    state, _ = trained(run, state)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, state.extra)
    assert any(jax.tree.leaves(moved))


# Haiku


def test_haiku_with_state_and_a_key():
    def forward(x, is_training):
        x = hk.BatchNorm(True, True, 0.9)(hk.Linear(WIDTH)(x), is_training)
        x = hk.dropout(hk.next_rng_key(), 0.1, jax.nn.relu(x))
        return hk.Linear(CLASSES)(jax.nn.relu(hk.Linear(WIDTH)(x)))

    net = hk.transform_with_state(forward)
    params, extra = net.init(jax.random.key(0), batch(0)[0], is_training=True)

    def loss(params, extra, x, y, key):
        out, extra = net.apply(params, extra, key, x, is_training=True)
        return squared(out, y), extra

    run = training(loss)
    state = run.init(params, *batch(0), extra=extra, key=jax.random.key(1))
    state, _ = trained(run, state)
    assert [x.path for x in run.matrices] == ["linear/w", "linear_2/w"]
    assert int(state.extra["batch_norm/~/mean_ema"]["counter"]) == STEPS


# Keras


@pytest.fixture(scope="module")
def keras_model():
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Dense(WIDTH, activation="relu", name="first"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dense(WIDTH, activation="relu", name="second"),
            keras.layers.Dense(CLASSES, name="head"),
        ],
        name="mlp",
    )
    model.build((None, WIDTH))
    return model


def keras_loss(model):
    """Of params and other Variables by their paths."""

    def loss(params, extra, x, y):
        with jax.numpy_rank_promotion("allow"):  # Keras adds biases so
            paths = [v.path for v in model.non_trainable_variables]
            out, extra = model.stateless_call(
                [params[v.path] for v in model.trainable_variables],
                [extra[path] for path in paths],
                x,
                training=True,
            )
            return squared(out, y), dict(zip(paths, extra, strict=True))

    return loss


def by_path(variables):
    return {v.path: v.value for v in variables}


def test_keras_by_readable_paths(keras_model):
    model = keras_model
    run = training(keras_loss(model))
    state = run.init(
        by_path(model.trainable_variables),
        *batch(0),
        extra=by_path(model.non_trainable_variables),
    )
    state, _ = trained(run, state)
    assert [x.path for x in run.matrices] == ["mlp/first/kernel", "mlp/second/kernel"]
    assert np.any(state.extra["mlp/norm/moving_mean"] != 0)
    dense = oialr.materialize(state.params) | state.extra
    for variable in model.variables:  # back into the model, which predicts as ever
        if variable.path in dense:
            variable.assign(dense[variable.path])
    with jax.numpy_rank_promotion("allow"):
        assert model(batch(0)[0]).shape == (16, CLASSES)


# A scan of updates, and seeds side by side


def predict(params, x):
    for name in "ab":
        x = jnp.tanh(x @ params[name])
    return x @ params["head"]


def weights(seed=0):
    shapes = {"a": (WIDTH, WIDTH), "b": (WIDTH, WIDTH), "head": (WIDTH, CLASSES)}
    return {
        name: normal(10 * seed + i, *shape) * WIDTH**-0.5
        for i, (name, shape) in enumerate(shapes.items())
    }


def test_a_scan_of_updates():
    """As in PureJaxRL: one call makes many updates on the device."""

    def update_epoch(train_state, batches):
        def update_minibatch(train_state, batch):
            def loss_fn(params):
                return squared(train_state.apply_fn(params, batch[0]), batch[1])

            loss, grads = jax.value_and_grad(loss_fn)(train_state.params)
            return train_state.apply_gradients(grads=grads), loss

        return jax.lax.scan(update_minibatch, train_state, batches)

    batches = jax.tree.map(lambda *x: jnp.stack(x), *[batch(t) for t in range(3)])
    begin = TrainState.create(
        apply_fn=predict,
        params=weights(),
        tx=optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-2, eps=1e-5)),
    )
    state, step = oialr.wrap(
        begin, update_epoch, batches, delay=6, budget=0.6, steps_per_call=3
    )
    losses = []
    for _ in range(4):
        state, loss = step(state, batches)
        losses.append(loss)
    assert int(state.step) == 12
    assert step.compilations == 2
    assert sorted(oialr.ranks(state.params)) == ["a", "b"]
    losses = np.concatenate(losses)
    assert losses[5] < losses[0]
    assert losses[11] < losses[6]


def test_seeds_side_by_side():
    """One run of three: params and batches with a leading axis, a stack of matrices."""

    def batches(t):
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (3, *x.shape)), batch(t))

    seeds = [weights(seed) for seed in range(3)]
    params = jax.tree.map(lambda *x: jnp.stack(x), *seeds)

    def loss(params, x, y):
        each = jax.vmap(lambda p, x, y: squared(predict(p, x), y))(params, x, y)
        return jnp.sum(each), each

    run = training(loss, has_aux=True)
    state = run.init(params, *batches(0))
    for t in range(STEPS):
        state, (_, each) = run.step(state, *batches(t))
        if t == DELAY - 1:
            dense = each
    assert [x.axes.stack for x in run.matrices] == [(0,), (0,)]
    assert state.params["a"].u.shape[0] == 3
    assert np.all(np.isfinite(each))
    shared = oialr.factored(jax.vmap(predict, in_axes=(0, None)))  # no warning
    low, whole = (
        shared(params, batch(0)[0])
        for params in (state.params, oialr.materialize(state.params))
    )
    np.testing.assert_allclose(low, whole, atol=1e-5)
    one = training(lambda p, x, y: squared(predict(p, x), y))
    alone = one.init(seeds[1], *batch(0))
    for t in range(DELAY):
        alone, value = one.step(alone, *batch(t))
    np.testing.assert_allclose(dense[1], value, rtol=1e-5)


# A TrainState around a split NNX model, as in Flax's lm1b and gemma examples


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


class GraphState(TrainState):
    graphdef: Any = None


def graph_state():
    graphdef, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    return GraphState.create(
        apply_fn=graphdef.apply, params=params, tx=optax.adamw(1e-2), graphdef=graphdef
    )


def graph_step(mark):
    """The step of the example; `mark` is the one line that low rank asks for."""

    def train_step(state, x, y):
        @mark
        def loss_fn(params):
            module = nnx.merge(state.graphdef, params)
            return squared(module(x), y)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    return train_step


def identity(fn):
    return fn


def test_a_train_state_around_a_split_nnx_model():
    begin = graph_state()
    state, step = oialr.wrap(
        begin, graph_step(oialr.factored), *batch(0), delay=DELAY, budget=0.6
    )
    for t in range(STEPS):
        state, loss = step(state, *batch(t))
        if t < DELAY:
            begin, desired = graph_step(identity)(begin, *batch(t))
            np.testing.assert_allclose(loss, desired, rtol=1e-5)
    assert len(oialr.ranks(state.params)) == 2
    forward = oialr.factored(lambda p, x: nnx.merge(state.graphdef, p)(x))
    low, dense = (
        forward(params, jnp.asarray(batch(0)[0]))
        for params in (state.params, oialr.materialize(state.params))
    )
    np.testing.assert_allclose(low, dense, atol=1e-5)


# What is wrong, in each of them


def wrap_seeds():
    params = jax.tree.map(lambda *x: jnp.stack(x), *[weights(s) for s in range(3)])

    def train_step(state, x, y):
        def loss_fn(params):
            each = oialr.factored(lambda p: squared(predict(p, x), y))
            return jnp.sum(jax.vmap(each)(params))

        return state.apply_gradients(grads=jax.grad(loss_fn)(state.params))

    state = TrainState.create(apply_fn=None, params=params, tx=optax.sgd(0.1))
    return oialr.wrap(state, train_step, *batch(0), delay=2)


def keras_variables(model):
    params = {v.path: v for v in model.trainable_variables}
    extra = by_path(model.non_trainable_variables)
    return training(keras_loss(model)).init(params, *batch(0), extra=extra)


def linen_variables():
    variables = {"params": weights(), "batch_stats": {"mean": jnp.zeros(3)}}
    loss = lambda v, x, y: squared(predict(v["params"], x), y)  # noqa: E731
    return training(loss).init(variables, *batch(0))


def keras_optimizer(model):
    import keras

    return oialr.training(keras_loss(model), keras.optimizers.Adam(1e-3), delay=2)


MISTAKES = {
    "equinox_functions": (
        lambda _: training(eqx_loss).init(mlp(), *batch(0)),
        ValueError,
        r"no array but .*eqx\.partition\(model, eqx\.is_inexact_array\)",
    ),
    "equinox_donation": (
        lambda _: training(eqx_loss, jit=eqx.filter_jit, donate_argnums=0).init(
            mlp(), *batch(0)
        ),
        ValueError,
        'donates by donate="all"',
    ),
    "haiku_without_transform": (
        lambda _: training(lambda p, x, y: squared(hk.Linear(CLASSES)(x), y)).init(
            weights(), *batch(0)
        ),
        ValueError,
        r"loss\(params, .*fails.*hk\.transform",
    ),
    "keras_variables": (
        keras_variables,
        ValueError,
        r"mlp/first/bias of the params is no array but .*`\.value`",
    ),
    "keras_optimizer": (keras_optimizer, TypeError, "has to be an optimizer of Optax"),
    "linen_variables": (
        lambda _: linen_variables(),
        ValueError,
        r"run\.init\(variables\['params'\], .*extra=\{'batch_stats'",
    ),
    "seeds_outside": (
        lambda _: wrap_seeds(),
        ValueError,
        r"a part of a, .*oialr_jax\.factored\(jax\.vmap\(loss\)\)",
    ),
    "steps_of_a_scan": (
        lambda _: scan_of_three(),
        ValueError,
        "one call took `state.step` from 0 to 3; `steps_per_call` is 1",
    ),
    "graph_state_not_factored": (
        lambda _: oialr.wrap(
            graph_state(), graph_step(lambda f: f), *batch(0), delay=2
        ),
        ValueError,
        r"oialr_jax\.factored\(loss\)",
    ),
    "nnx_model_in_wrap": (
        lambda _: oialr.wrap(Model(nnx.Rngs(0)), graph_step(identity), delay=2),
        TypeError,
        r"it is a Model, .*oialr_jax\.nnx\.wrap",
    ),
}


def scan_of_three():
    def three(state, x, y):
        grad = jax.grad(lambda p: squared(state.apply_fn(p, x), y))
        for _ in range(3):
            state = state.apply_gradients(grads=grad(state.params))
        return state

    begin = TrainState.create(apply_fn=predict, params=weights(), tx=optax.sgd(0.1))
    state, step = oialr.wrap(begin, three, *batch(0), delay=2)
    return step(state, *batch(0))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_that_says_what_to_change(mistake, keras_model):
    make, kind, match = MISTAKES[mistake]
    with pytest.raises(kind, match=match) as error:
        make(keras_model)
    assert len(str(error.value).splitlines()) == 1
