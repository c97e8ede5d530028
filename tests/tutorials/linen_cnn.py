"""A small CNN on handwritten digits, as in Flax Linen's guides."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import oialr_jax as oialr


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(features=32, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.Conv(features=64, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        x = nn.Dense(features=128)(x)
        x = nn.relu(x)
        return nn.Dense(features=10)(x)


images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32)
labels = jnp.asarray(labels)


def batch(t):
    rows = jax.random.randint(jax.random.key(t), (64,), 0, 1500)
    return images[rows], labels[rows]


def loss(params, x, y):
    logits = model.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


model = CNN()
params = model.init(jax.random.key(0), images[:1])
run = oialr.training(loss, optax.adam(2e-3), steps=300)
state = run.init(params, *batch(0))
for t in range(300):
    state, value = run.step(state, *batch(t))

params = oialr.materialize(state.params)
predicted = model.apply(params, images[1500:]).argmax(axis=-1)
print("accuracy", jnp.mean(predicted == labels[1500:]))
counts = oialr.counts(state.params)
print("stored", counts.stored / counts.dense)
