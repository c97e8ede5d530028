"""Layers whose weights are joined, cut or indexed first: trained across the events."""

import dataclasses
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from cases import normal
from helpers import assert_close

import oialr_jax as oialr

WIDTH = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def linen(cell):
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.RNN(cell(WIDTH))(nn.Dense(WIDTH)(x))
            return nn.Dense(3)(y[:, -1])

    def build(x):
        network = Network()
        return network.init(jax.random.key(0), x), network.apply

    return build


def haiku(core):
    def network(x):
        cell = core(WIDTH)
        y = hk.Linear(WIDTH)(x)
        y, _ = hk.dynamic_unroll(cell, y, cell.initial_state(len(x)), time_major=False)
        return hk.Linear(3)(y[:, -1])

    def build(x):
        net = hk.without_apply_rng(hk.transform(network))
        return net.init(jax.random.key(0), x), net.apply

    return build


class EquinoxNetwork(eqx.Module):
    stem: eqx.nn.Linear
    cell: Any
    head: eqx.nn.Linear

    def __call__(self, x):
        x = jax.vmap(self.stem)(x)
        h = jnp.zeros(WIDTH)
        if isinstance(self.cell, eqx.nn.LSTMCell):
            h = (h, h)
        h, _ = jax.lax.scan(lambda h, x: (self.cell(x, h), None), h, x)
        return self.head(h[0] if isinstance(h, tuple) else h)


def equinox(cell):
    def build(x):
        keys = jax.random.split(jax.random.key(0), 3)
        network = EquinoxNetwork(
            eqx.nn.Linear(x.shape[-1], WIDTH, key=keys[0]),
            cell(WIDTH, WIDTH, key=keys[1]),
            eqx.nn.Linear(WIDTH, 3, key=keys[2]),
        )
        params, static = eqx.partition(network, eqx.is_array)
        return params, lambda p, x: jax.vmap(eqx.combine(p, static))(x)

    return build


class Experts(nn.Module):
    """A router, and of four experts the better two for each token."""

    ragged: bool

    @nn.compact
    def __call__(self, x):
        count, wide = 4, 2 * WIDTH
        x = nn.Dense(WIDTH)(x.reshape(-1, x.shape[-1]))
        gate = jax.nn.softmax(nn.Dense(count, name="router")(x))
        share, index = jax.lax.top_k(gate, 2)
        start = nn.initializers.lecun_normal(batch_axis=(0,))
        up = self.param("up", start, (count, WIDTH, wide))
        down = self.param("down", start, (count, wide, WIDTH))
        if self.ragged:
            order = jnp.argsort(index.reshape(-1))
            sizes = jnp.bincount(index.reshape(-1), length=count)
            rows = jnp.repeat(x, 2, axis=0)[order]
            y = jax.lax.ragged_dot(rows, up, sizes)
            y = jax.lax.ragged_dot(nn.relu(y), down, sizes)
            y = y[jnp.argsort(order)].reshape(*index.shape, WIDTH)
        else:
            y = nn.relu(jnp.einsum("td,tkdf->tkf", x, up[index]))
            y = jnp.einsum("tkf,tkfd->tkd", y, down[index])
        return nn.Dense(3)(x + jnp.sum(y * share[..., None], 1))


def experts(ragged):
    def build(x):
        network = Experts(ragged)
        return network.init(jax.random.key(0), x), network.apply

    return build


LAYERS = {
    "flax_lstm": (linen(nn.OptimizedLSTMCell), 1 + 8),
    "flax_lstm_gate_by_gate": (linen(nn.LSTMCell), 1 + 8),
    "flax_gru": (linen(nn.GRUCell), 1 + 6),
    "haiku_lstm": (haiku(hk.LSTM), 1 + 1),
    "haiku_gru": (haiku(hk.GRU), 1 + 2),
    "equinox_lstm": (equinox(eqx.nn.LSTMCell), 1 + 2),
    "equinox_gru": (equinox(eqx.nn.GRUCell), 1 + 2),
    "experts_by_index": (experts(ragged=False), 2 + 2),
    "experts_ragged": (experts(ragged=True), 2 + 2),
}
"""How each is built, and its matrices without the head."""

PUSHED = ("flax_lstm", "equinox_gru", "experts_ragged")
"""The others in full; the table of cases has what they do with their weights."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=() if x in PUSHED else pytest.mark.long) for x in LAYERS],
)
def test_trains_across_a_conversion_and_a_truncation(name):
    build, count = LAYERS[name]
    x = normal(1, 8, 5, 6)
    y = normal(2, 40 if name.startswith("experts") else 8, 3)
    params, forward = build(x)
    matrices = oialr.select(oialr.find_matrices(forward, params, x))
    assert len(matrices) == count
    tx = oialr.freeze_bases(optax.adam(1e-2))
    low_forward = oialr.factored(forward)

    def train_step(state, x, y):
        def loss(params):
            return jnp.mean((low_forward(params, x) - y) ** 2)

        value, grads = oialr.value_and_grad(loss)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        new = optax.apply_updates(state.params, updates)
        return State(state.step + 1, new, opt_state), value

    schedule = oialr.Schedule(delay=8, every=8, layer_step=1.0)
    rule = oialr.RankRule(cutoff=0.3)
    step = oialr.adaptive(train_step, tx, matrices, schedule, rule)
    state, losses = State(jnp.asarray(0), params, tx.init(params)), []
    for _ in range(32):
        state, value = step(state, x, y)
        losses.append(float(value))
    ranks = oialr.ranks(state.params)
    assert set(ranks) == {matrix.path for matrix in matrices}
    assert any(r < min(m, n) for m, n, r in ranks.values())
    assert losses[-1] < 0.7 * losses[7]
    dense = forward(oialr.materialize(state.params), x)
    assert_close(low_forward(state.params, x), dense, 5e-5)


# What the default selection takes


class Gated(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        value, gate = jnp.split(nn.Conv(2 * self.width, (3, 3))(x), 2, axis=-1)
        return value * jax.nn.sigmoid(gate)


class UNet(nn.Module):
    """Gated convolutions down to an eighth of the size and up, with skips."""

    @nn.compact
    def __call__(self, x):
        x = Gated(32)(x)
        skips = []
        for width in (64, 128, 256):
            skips.append(x)
            x = Gated(width)(nn.avg_pool(x, (2, 2), (2, 2)))
        for width in (128, 64, 32):
            x = jax.image.resize(x, skips[-1].shape[:3] + x.shape[3:], "nearest")
            x = Gated(width)(jnp.concatenate([x, skips.pop()], axis=-1))
        return nn.Conv(3, (1, 1), name="head")(x)


class Atari(nn.Module):
    """The network of Mnih et al. 2015, with a policy and a value head."""

    @nn.compact
    def __call__(self, x):
        for width, window, stride in ((32, 8, 4), (64, 4, 2), (64, 3, 1)):
            x = nn.relu(nn.Conv(width, (window, window), (stride, stride))(x))
        x = nn.relu(nn.Dense(512, name="hidden")(x.reshape(len(x), -1)))
        return nn.Dense(18, name="policy")(x), nn.Dense(1, name="value")(x)


def share(module, *shape):
    """The matrices left dense by default, and the share of weights that is taken."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
    found = oialr.find_matrices(lambda p, x: module.apply({"params": p}, x), params, x)
    taken = {matrix.path for matrix in oialr.select(found)}
    weights = sum(matrix.m * matrix.n for matrix in found if matrix.path in taken)
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return [
        matrix.path for matrix in found if matrix.path not in taken
    ], weights / total


def test_of_a_unet_all_but_the_head_is_taken():
    dense, taken = share(UNet(), 2, 32, 32, 3)
    assert dense == ["head/kernel"]
    assert taken > 0.99


def test_of_an_atari_policy_all_but_its_two_heads_is_taken():
    """The hidden layer, 7744x512, has 98 % of the weights."""
    dense, taken = share(Atari(), 2, 84, 84, 4)
    assert dense == ["policy/kernel", "value/kernel"]
    assert taken > 0.99
