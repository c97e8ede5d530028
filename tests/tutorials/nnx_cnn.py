"""A CNN on handwritten digits, in place, as in Flax NNX's first tutorial."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import load_digits

import oialr_jax as oialr


class CNN(nnx.Module):
    def __init__(self, *, rngs):
        self.conv1 = nnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(32, rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), rngs=rngs)
        self.dropout = nnx.Dropout(rate=0.1, rngs=rngs)
        self.linear1 = nnx.Linear(1024, 128, rngs=rngs)
        self.linear2 = nnx.Linear(128, 10, rngs=rngs)

    @oialr.factored
    def __call__(self, x):
        x = nnx.relu(self.batch_norm1(self.conv1(x)))
        x = nnx.avg_pool(nnx.relu(self.conv2(x)), (2, 2), strides=(2, 2))
        x = self.dropout(x.reshape(x.shape[0], -1))
        return self.linear2(nnx.relu(self.linear1(x)))


images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32)
labels = jnp.asarray(labels)


def batch(t):
    rows = jax.random.randint(jax.random.key(t), (64,), 0, 1500)
    return {"image": images[rows], "label": labels[rows]}


def loss_fn(model, batch):
    logits = model(batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return loss.mean(), logits


@nnx.jit
def train_step(model, optimizer, metrics, batch):
    grad_fn = nnx.value_and_grad(loss_fn, has_aux=True)
    (loss, logits), grads = grad_fn(model, batch)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])
    optimizer.update(model, grads)


@nnx.jit
def eval_step(model, metrics, batch):
    loss, logits = loss_fn(model, batch)
    metrics.update(loss=loss, logits=logits, labels=batch["label"])


model = CNN(rngs=nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(2e-3, 0.9), wrt=nnx.Param)
metrics = nnx.MultiMetric(
    accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss")
)
given = model, optimizer, metrics, batch(0)
train_step = oialr.nnx.wrap(train_step, *given, steps=240, budget=0.25)
for t in range(240):
    train_step(model, optimizer, metrics, batch(t))

metrics.reset()
model.eval()
eval_step(model, metrics, {"image": images[1500:], "label": labels[1500:]})
print("accuracy", metrics.compute()["accuracy"])
counts = oialr.counts(nnx.state(model, nnx.Param))
print("stored", counts.stored / counts.dense)
