"""Public idioms across a conversion and a truncation, each in its authors' own words.

Kernels are square and the optimizer linear, so that at full rank low-rank training is
dense training: losses must be equal. Cut to half, a run goes on and its loss falls.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import nnx

import oialr_jax as oialr

STEPS, CONVERSION, TRUNCATION = 9, 3, 6
WIDTH = 8
X = normal(0, 16, WIDTH)
Y = jnp.tanh(normal(1, 16, WIDTH) * 2)


def dense(fn, params, *args):
    """No event ever."""
    return lambda t, params, opt_state, tx: (params, opt_state)


def low_rank(rank):
    """Events of a run whose matrices are found in fn(params, *args)."""

    def events(fn, params, *args):
        matrices = oialr.find_matrices(fn, params, *args)
        assert matrices

        def event(t, params, opt_state, tx):
            if t == CONVERSION:
                return oialr.factorize(params, opt_state, matrices, tx=tx)[:2]
            if t == TRUNCATION:
                ranks = dict.fromkeys(oialr.ranks(params), rank)
                return oialr.truncate(params, opt_state, ranks, tx=tx)[:2]
            return params, opt_state

        return event

    return events


def momentum():
    return oialr.freeze_bases(optax.sgd(0.1, momentum=0.5))


def squared(prediction, y):
    return jnp.mean((prediction - y) ** 2)


def equinox_partitioned(events):
    model = eqx.nn.MLP(WIDTH, WIDTH, WIDTH, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)

    @oialr.factored
    def loss(params, x, y):
        return squared(jax.vmap(eqx.combine(params, static))(x), y)

    tx = momentum()
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        value, grads = jax.value_and_grad(loss)(params, X, Y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    event = events(loss, params, X, Y)
    for t in range(STEPS):
        params, opt_state = event(t, params, opt_state, tx)
        params, opt_state, value = step(params, opt_state)
        yield value


def equinox_whole(events):
    model = eqx.nn.MLP(WIDTH, WIDTH, WIDTH, 2, key=jax.random.key(0))

    @oialr.factored
    def loss(model, x, y):
        return squared(jax.vmap(model)(x), y)

    tx = momentum()
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, opt_state):
        value, grads = eqx.filter_value_and_grad(loss)(model, X, Y)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state, value

    event = events(loss, model, X, Y)
    for t in range(STEPS):
        model, opt_state = event(t, model, opt_state, tx)
        model, opt_state, value = step(model, opt_state)
        yield value


def trained(loss, params, events, tx=None, *, extra=lambda loss: {}):
    """The plain loop of Optax: a jitted step, params and optimizer state."""
    tx = momentum() if tx is None else tx
    run = oialr.factored(loss)
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state):
        value, grads = jax.value_and_grad(run)(params, X, Y)
        options = {
            name: made(value, grads) if name != "value_fn" else made
            for name, made in extra(lambda params: run(params, X, Y)).items()
        }
        updates, opt_state = tx.update(grads, opt_state, params, **options)
        return optax.apply_updates(params, updates), opt_state, value

    event = events(loss, params, X, Y)
    for t in range(STEPS):
        params, opt_state = event(t, params, opt_state, tx)
        params, opt_state, value = step(params, opt_state)
        yield value


def haiku(events):
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([WIDTH] * 3)(x)))
    params = net.init(jax.random.key(0), X)
    return trained(lambda p, x, y: squared(net.apply(p, x), y), params, events)


def boxed_flax(events):
    def dense():
        start = nn.initializers.lecun_normal()
        return nn.Dense(WIDTH, kernel_init=nn.with_partitioning(start, (None, "model")))

    module = nn.Sequential([dense(), nn.tanh, dense()])
    params = module.init(jax.random.key(0), X)["params"]
    return trained(
        lambda p, x, y: squared(module.apply({"params": p}, x), y), params, events
    )


def batch_statistics_under_a_named_axis(events):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(WIDTH)(x)
            x = nn.BatchNorm(use_running_average=False, axis_name="devices")(x)
            return nn.Dense(WIDTH)(nn.tanh(x))

    module = Model()
    variables = jax.vmap(
        lambda x: module.init(jax.random.key(0), x),
        axis_name="devices",
        out_axes=None,
    )(X.reshape(4, 4, WIDTH))

    def loss(params, x, y):
        def part(x, y):
            out, _ = module.apply(
                {**variables, "params": params}, x, mutable=["batch_stats"]
            )
            return squared(out, y)

        parts = (a.reshape(4, 4, WIDTH) for a in (x, y))
        return jnp.mean(jax.vmap(part, axis_name="devices")(*parts))

    return trained(loss, variables["params"], events)


def line_search(events):
    params = {"a": normal(2, WIDTH, WIDTH), "b": normal(3, WIDTH, WIDTH)}
    return trained(
        lambda p, x, y: squared(jnp.tanh(x @ p["a"]) @ p["b"], y),
        params,
        events,
        oialr.freeze_bases(optax.lbfgs()),
        extra=lambda loss: {
            "value": lambda value, grads: value,
            "grad": lambda value, grads: grads,
            "value_fn": loss,
        },
    )


def scan_of_updates(events):
    """Params in the carry, as whole training loops on a device have them."""
    params = {"a": normal(2, WIDTH, WIDTH), "b": normal(3, WIDTH, WIDTH)}

    def loss(p, x, y):
        return squared(jnp.tanh(x @ p["a"]) @ p["b"], y)

    tx, run = momentum(), oialr.factored(loss)
    opt_state = tx.init(params)

    def update(carry, _):
        params, opt_state = carry
        value, grads = jax.value_and_grad(run)(params, X, Y)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    @jax.jit
    def epoch(carry):
        return jax.lax.scan(update, carry, length=3)

    event = events(loss, params, X, Y)
    for t in range(0, STEPS, 3):
        params, opt_state = event(t, params, opt_state, tx)
        (params, opt_state), values = epoch((params, opt_state))
        yield from values


class Module(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.b = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


def nnx_split(events):
    graph, params = nnx.split(Module(nnx.Rngs(0)))
    return trained(lambda p, x, y: squared(nnx.merge(graph, p)(x), y), params, events)


class Noisy(nnx.Module):
    """Batch statistics and a random counter change in every call."""

    def __init__(self, rngs):
        self.a = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.b = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        return self.b(self.dropout(jnp.tanh(self.norm(self.a(x)))))


def nnx_in_place(events):
    model, tx = Noisy(nnx.Rngs(0)), momentum()

    def loss(model, x, y):
        return squared(model(x), y)

    @nnx.jit
    def step(model, opt_state):
        value, grads = nnx.value_and_grad(oialr.factored(loss))(model, X, Y)
        params = nnx.state(model, nnx.Param)
        updates, opt_state = tx.update(grads, opt_state, params)
        nnx.update(model, optax.apply_updates(params, updates))
        return opt_state, value

    graph, params, rest = nnx.split(model, nnx.Param, ...)
    event = events(
        lambda p, x, y: loss(nnx.merge(graph, p, rest, copy=True), x, y), params, X, Y
    )
    opt_state = tx.init(params)
    for t in range(STEPS):
        params = nnx.state(model, nnx.Param)
        params, opt_state = event(t, params, opt_state, tx)
        nnx.update(model, params)
        opt_state, value = step(model, opt_state)
        yield value
    yield jnp.sum(model.norm.mean[...] ** 2)
    yield jnp.asarray(model.dropout.rngs.count[...], jnp.float32)


def average_and_target(events):
    """An average that the loss compares with, and a target copied now and then."""
    params = {"a": normal(2, WIDTH, WIDTH), "b": normal(3, WIDTH, WIDTH)}

    def predict(p, x):
        return jnp.tanh(x @ p["a"]) @ p["b"]

    def loss(p, mean, target, x, y):
        run = oialr.factored(predict)
        teacher = jax.lax.stop_gradient(run(target, x))
        apart = oialr.transform.trainable(jax.tree.map(jnp.subtract, p, mean))
        pull = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(apart))
        return squared(run(p, x), y + 0.1 * teacher) + 1e-3 * pull

    tx = momentum()
    opt_state, mean, target = tx.init(params), params, params

    @jax.jit
    def step(params, opt_state, mean, target):
        value, grads = jax.value_and_grad(loss)(params, mean, target, X, Y)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        mean = optax.incremental_update(params, mean, 0.1)
        return params, opt_state, mean, value

    event = events(lambda p, x, y: squared(predict(p, x), y), params, X, Y)
    for t in range(STEPS):
        params, opt_state = event(t, params, opt_state, tx)
        mean, target = oialr.following.rebase((mean, target), params)
        params, opt_state, mean, value = step(params, opt_state, mean, target)
        if t % 4 == 0:
            target = params
        yield value


def keras_stateless(events):
    keras = pytest.importorskip("keras")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.layers.Dense(WIDTH, activation="tanh"), keras.layers.Dense(WIDTH)]
    )
    model.build((None, WIDTH))
    params = [v.value for v in model.trainable_variables]

    def loss(params, x, y):
        with jax.numpy_rank_promotion("allow"):  # Keras adds biases so
            return squared(model.stateless_call(params, [], x)[0], y)

    return trained(loss, params, events)


IDIOMS = (
    equinox_partitioned,
    equinox_whole,
    haiku,
    boxed_flax,
    batch_statistics_under_a_named_axis,
    line_search,
    scan_of_updates,
    nnx_split,
    nnx_in_place,
    average_and_target,
    keras_stateless,
)


@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda idiom: idiom.__name__)
def test_at_full_rank_it_is_dense_training(idiom):
    desired = np.array(list(idiom(dense)))
    actual = np.array(list(idiom(low_rank(WIDTH))))
    assert np.all(np.isfinite(desired))
    if idiom is not line_search:  # its history starts anew with the conversion
        np.testing.assert_allclose(actual, desired, rtol=1e-4)
    np.testing.assert_allclose(actual[:CONVERSION], desired[:CONVERSION], rtol=1e-6)


@pytest.mark.parametrize("idiom", IDIOMS, ids=lambda idiom: idiom.__name__)
def test_cut_to_half_it_goes_on(idiom):
    losses = np.array(list(idiom(low_rank(WIDTH // 2))))
    assert np.all(np.isfinite(losses))
    assert losses[TRUNCATION - 1] < losses[0]
    assert losses[STEPS - 1] < losses[TRUNCATION]
