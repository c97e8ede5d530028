"""A small MLP with dropout on handwritten digits, in Flax NNX's functional form."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits


class MLP(nnx.Module):
    def __init__(self, din, dmid, dout, *, rngs):
        self.linear1 = nnx.Linear(din, dmid, rngs=rngs)
        self.norm = nnx.BatchNorm(dmid, rngs=rngs)
        self.linear2 = nnx.Linear(dmid, dmid, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.linear3 = nnx.Linear(dmid, dout, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.linear1(x)))
        x = nnx.relu(self.dropout(self.linear2(x)))
        return self.linear3(x)


images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images / 16, jnp.float32)
labels = jnp.asarray(labels)


def batch(t):
    rows = jax.random.randint(jax.random.key(t), (64,), 0, 1500)
    return images[rows], labels[rows]


def loss(params, rest, x, y):
    model = nnx.merge(graph, params, rest, copy=True)
    logits = model(x)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
    return value, nnx.split(model, nnx.Param, ...)[2]


@jax.jit
def step(params, rest, opt_state, x, y):
    grad = jax.value_and_grad(loss, has_aux=True)
    (value, rest), grads = grad(params, rest, x, y)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, rest, opt_state, value


model = MLP(64, 128, 10, rngs=nnx.Rngs(0))
graph, params, rest = nnx.split(model, nnx.Param, ...)
tx = optax.adam(2e-3)
opt_state = tx.init(params)
for t in range(500):
    params, rest, opt_state, value = step(params, rest, opt_state, *batch(t))

model = nnx.merge(graph, params, rest, copy=True)
model.eval()
predicted = model(images[1500:]).argmax(axis=-1)
print("accuracy", jnp.mean(predicted == labels[1500:]))
