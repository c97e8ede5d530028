"""A small MLP on handwritten digits, as in Equinox's first examples."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import oialr_jax as oialr

images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images / 16, jnp.float32)
labels = jnp.asarray(labels)


def batch(t):
    rows = jax.random.randint(jax.random.key(t), (64,), 0, 1500)
    return images[rows], labels[rows]


def loss(params, x, y):
    model = eqx.combine(params, static)
    logits = jax.vmap(model)(x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


model = eqx.nn.MLP(64, 10, 128, 2, key=jax.random.key(0))
params, static = eqx.partition(model, eqx.is_inexact_array)
run = oialr.training(loss, optax.adam(2e-3), steps=500)
state = run.init(params, *batch(0))
for t in range(500):
    state, value = run.step(state, *batch(t))

params = oialr.materialize(state.params)
model = eqx.combine(params, static)
predicted = jax.vmap(model)(images[1500:]).argmax(axis=-1)
print("accuracy", jnp.mean(predicted == labels[1500:]))
counts = oialr.counts(state.params)
print("stored", counts.stored / counts.dense)
