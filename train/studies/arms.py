"""What the study of orthogonal gradients trains: kinds of runs, optimizers, data.

A run is a loop around one compiled step with the whole dataset on the device: no
augmentation, no checkpoints, no schedule of ranks.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import oialr_jax as oialr
from oialr_jax.matrices import Matrix
from train import names, optimizers, recipe, selfsup
from train.models.table import MODELS
from train.models.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is compiled once: a run without its rate and seed."""

    data: str
    model: str
    arm: str
    batch: int
    steps: int
    cosine: bool = False
    """Five per cent of warm-up and a fall to zero, instead of a constant rate."""
    named: bool = False
    """The arm is an optimizer of `train.optimizers`, with gradients clipped."""
    rank: float | None = None
    """Of the small side, in which matrices are held after a third of the run."""


class Part(NamedTuple):
    """Images of mean 0 and deviation 1, and their classes; or passages of characters
    and those that follow each."""

    image: Array
    label: Array


class Data(NamedTuple):
    """What to train on, to choose the rate by, and to report."""

    train: Part
    validation: Part
    test: Part


SIZES: Mapping[str, tuple[int, int]] = {"digits": (1149, 288), "fashion": (20000, 5000)}
"""Images to train on and to choose by, both of the publisher's training set."""


@functools.cache
def load(name: str, data_dir: pathlib.Path) -> Data:
    """Host side: the dataset, the same split in every run."""
    if name == "shakespeare":
        return _passages(data_dir)
    if name == "digits":
        from train.data import digits  # scikit-learn takes a second to import

        images = digits.load()
    else:
        from train.data import prepared  # needs tensorflow-datasets

        images = prepared.images(data_dir, "fashion_mnist")
    few, more = SIZES[name]
    order = np.random.default_rng(0).permutation(len(images.train_label))

    def part(image: np.ndarray, label: np.ndarray) -> Part:
        scaled = (image.astype(np.float32) - images.mean) / images.deviation
        return Part(jnp.asarray(scaled), jnp.asarray(label))

    first, second = order[:few], order[few : few + more]
    return Data(
        part(images.train_image[first], images.train_label[first]),
        part(images.train_image[second], images.train_label[second]),
        part(images.test_image, images.test_label),
    )


def _passages(data_dir: pathlib.Path) -> Data:
    from train.data import prepared, text

    parts = text.encode(prepared.text(data_dir)).parts
    found = []
    for name in ("train", "validation", "test"):
        passages = text.passages(parts[name], context=CONTEXT)
        found.append(Part(*map(jnp.asarray, passages.values())))
    return Data(*found)


CONTEXT = 64


TEXT = Transformer(tokens=65, context=CONTEXT, depth=2, heads=4, width=64)


Matrices = Sequence[Matrix]


Arm = Callable[[Any, Matrices], optax.GradientTransformation]


def _then_sgd(first: Callable[[Matrices], optax.GradientTransformation]) -> Arm:
    """The paper's order: a direction, coupled decay, momentum."""
    return lambda rate, matrices: optax.chain(
        first(matrices),
        optax.add_decayed_weights(5e-4),
        optax.sgd(rate, momentum=0.9),
    )


def _momentum_first(rate: Any, matrices: Matrices) -> optax.GradientTransformation:
    return optax.chain(
        optax.trace(0.9),
        oialr.orthogonal.orthogonalize(matrices=matrices),
        optax.add_decayed_weights(5e-4),
        optax.scale_by_learning_rate(rate),
    )


ARMS: Mapping[str, Arm] = {
    "sgd": _then_sgd(lambda _: optax.identity()),
    "normalize_tensor": _then_sgd(
        lambda x: oialr.orthogonal.normalize_tensor(matrices=x)
    ),
    "normalize_components": _then_sgd(
        lambda x: oialr.orthogonal.normalize_components(matrices=x)
    ),
    "orthogonal": _then_sgd(lambda x: oialr.orthogonal.orthogonalize(matrices=x)),
    "orthogonal, svd": _then_sgd(
        lambda x: oialr.orthogonal.orthogonalize("svd", matrices=x)
    ),
    "orthogonal, svd filled": _then_sgd(
        lambda x: oialr.orthogonal.orthogonalize("svd", fill=True, matrices=x)
    ),
    "orthogonal but the head": _then_sgd(
        lambda x: oialr.orthogonal.orthogonalize(matrices=x[:-1])
    ),
    "momentum, then orthogonal": _momentum_first,
    "swan": lambda rate, x: oialr.orthogonal.swan(rate, x[:-1], rms=optimizers.RMS),
    "muon": lambda rate, x: oialr.orthogonal.core_muon(
        rate, x[:-1], rms=optimizers.RMS
    ),
    "adam": lambda rate, _: optax.adam(rate),
}


DECAYS: Mapping[str, float] = {
    "adamw": 1.0,
    "adam": 0.0,
    "sgd": 5e-4,
    "orthogonal_sgd": 5e-4,
    "muon": 1.0,
    "swan": 1.0,
    "spectral_trust_region": 0.1,
}
"""Of each optimizer by name, on digits; there is none on characters."""


class Program:
    """Everything of one kind that is compiled, for any rate and seed."""

    def __init__(self, kind: Kind, data: Data) -> None:
        """Find the matrices; compile when first run."""
        self.kind, self.data = kind, data
        self.model = TEXT
        if kind.data != "shakespeare":
            self.model, _ = names.find("model", kind.model, MODELS)
        variables = jax.eval_shape(
            self.model.init, jax.random.key(0), data.train.image[:1]
        )
        params, rest = _split(variables)
        found = oialr.find_matrices(
            self.forward, params, rest, data.train.image[: kind.batch]
        )
        self.matrices = tuple(found)
        if kind.named:
            self.matrices = oialr.select(found)
        self.initial = jax.jit(self.created)
        self.stepped = jax.jit(self.step, donate_argnums=0)
        self.compiled: dict[Any, Any] = {}
        self.predicted = jax.jit(
            lambda params, rest, image: oialr.factored(self.forward)(
                params, rest, image, False
            )[0]
        )

    def forward(
        self, params: Any, rest: Any, image: Array, train: bool = True
    ) -> tuple[Array, Any]:
        """Logits and batch statistics."""
        variables = {"params": params, **rest}
        if not (train and rest):
            return self.model.apply(variables, image), rest
        return self.model.apply(variables, image, train=True, mutable=list(rest))

    def optimizer(self, rate: Any) -> optax.GradientTransformation:
        """The arm at this rate, which may be traced."""
        kind = self.kind
        scheduled = rate
        if kind.cosine:
            shape = optax.warmup_cosine_decay_schedule(
                0.0, 1.0, kind.steps // 20, decay_steps=kind.steps
            )
            scheduled = lambda count: rate * shape(count)  # noqa: E731
        if kind.named:
            decay = DECAYS[kind.arm] if kind.data == "digits" else 0.0
            inner = optimizers.build(kind.arm, scheduled, decay, self.matrices)
        else:
            inner = names.find("arm", kind.arm, ARMS)(scheduled, self.matrices)
        return oialr.freeze_bases(inner)

    def created(self, key: Array) -> Any:
        """Params, statistics and optimizer state of a new run."""
        params, rest = _split(self.model.init(key, self.data.train.image[:1]))
        return params, rest, self.optimizer(0.0).init(params)

    def step(self, carry: Any, rate: Array, rows: Array, train: Part) -> Any:
        """The same after one batch, the images with these numbers."""
        tx = self.optimizer(rate)
        forward = oialr.factored(self.forward)

        def loss(params: Any, rest: Any) -> Any:
            logits, rest = forward(params, rest, train.image[rows])
            entropy = optax.softmax_cross_entropy_with_integer_labels(
                logits, train.label[rows]
            )
            return jnp.mean(entropy), rest

        params, rest, state = carry
        (_, rest), grads = oialr.value_and_grad(loss, has_aux=True)(params, rest)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state

    def phase(self, carry: Any, rate: float, order: np.ndarray) -> tuple[Any, float]:
        """Host side: all steps in `order`, and their seconds, compiling apart."""
        shapes = jax.tree.structure(carry), str(jax.tree.map(jnp.shape, carry))
        traced, train = jnp.float32(rate), self.data.train
        if shapes not in self.compiled:
            lowered = self.stepped.lower(carry, traced, order[0], train)
            self.compiled[shapes] = lowered.compile()
        step = self.compiled[shapes]
        start = time.perf_counter()
        for rows in order:
            carry = step(carry, traced, rows, train)
        carry = jax.block_until_ready(carry)
        return carry, time.perf_counter() - start

    def run(self, rate: float, seed: int) -> dict[str, Any]:
        """Host side: train, in two phases if there is a rank, and evaluate."""
        kind = self.kind
        carry = self.initial(jax.random.key(seed))
        order = batches(seed, len(self.data.train.label), kind.batch, kind.steps)
        seconds = 0.0
        if kind.rank is not None:
            dense = kind.steps // 3
            carry, seconds = self.phase(carry, rate, order[:dense])
            carry, order = self.converted(carry, kind.rank), order[dense:]
        (params, rest, _), more = self.phase(carry, rate, order)
        accuracy, loss = self.evaluated(params, rest, self.data.test)
        return {
            "validation": self.evaluated(params, rest, self.data.validation)[0],
            "accuracy": accuracy,
            "loss": loss,
            "seconds": seconds + more,
            "ms_per_step": 1e3 * more / len(order),
        }

    def converted(self, carry: Any, rank: float) -> Any:
        """Host side: the same with every matrix at this part of its full rank."""
        params, rest, state = carry
        ranks = {x.path: max(1, round(rank * min(x.m, x.n))) for x in self.matrices}
        params, state, _ = oialr.factorize(
            params, state, self.matrices, tx=self.optimizer(0.0), rank=ranks
        )
        return params, rest, state

    def evaluated(self, params: Any, rest: Any, part: Part) -> tuple[float, float]:
        """Host side: accuracy and mean loss; the loss of what diverged is infinite."""
        starts = range(0, len(part.label), 1000)
        pieces = [
            self.predicted(params, rest, part.image[i : i + 1000]) for i in starts
        ]
        logits = np.concatenate(pieces)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, part.label)
        loss = float(jnp.mean(entropy))
        accuracy = float(np.mean(np.argmax(logits, -1) == np.asarray(part.label)))
        finite = bool(np.isfinite(loss))
        return (accuracy, loss) if finite else (0.0, float("inf"))


class Unlabelled:
    """A program for a task of `train.selfsup`."""

    def __init__(self, kind: Kind, data_dir: pathlib.Path) -> None:
        """Find the convolutions; compile when first run."""
        preset = selfsup.PRESETS[kind.data][1]
        self.kind = kind
        self.settings = dataclasses.replace(
            preset, batch=kind.batch, steps=kind.steps, data_dir=data_dir, mesh="data=1"
        )
        self.task = selfsup.task(self.settings)
        key = jax.random.key(0)
        extra = dict(jax.eval_shape(self.task.init, key))
        params = extra.pop("params")
        found = oialr.find_matrices(
            self.task.loss, params, extra, self.task.batch(0), key
        )
        self.matrices = oialr.select(found, dense_last=preset.dense_last)
        self.initial = jax.jit(self.created)
        self.stepped = jax.jit(self.step, donate_argnums=0)

    def created(self, key: Array) -> Any:
        """Params, statistics and optimizer state of a new run."""
        params, rest = _split(self.task.init(key))
        return params, rest, self.optimizer(0.0).init(params)

    def optimizer(self, rate: Any) -> optax.GradientTransformation:
        """The arm at this rate, which may be traced."""
        return names.find("arm", self.kind.arm, ARMS)(rate, self.matrices)

    def step(self, carry: Any, rate: Array, batch: Any, key: Array) -> Any:
        """The same after one batch, and its loss."""
        params, rest, state = carry
        grad = jax.value_and_grad(self.task.loss, has_aux=True)
        (value, (rest, _)), grads = grad(params, rest, batch, key)
        updates, state = self.optimizer(rate).update(grads, state, params)
        return (optax.apply_updates(params, updates), rest, state), value

    def run(self, rate: float, seed: int) -> dict[str, Any]:
        """Host side: train and evaluate."""
        key = jax.random.key(seed)
        batch = selfsup.task(dataclasses.replace(self.settings, seed=seed)).batch
        carry, losses = self.initial(key), []
        start = time.perf_counter()
        for t in range(self.kind.steps):
            noise = jax.random.fold_in(key, t)
            carry, value = self.stepped(carry, jnp.float32(rate), batch(t), noise)
            losses.append(float(value))
        seconds = time.perf_counter() - start
        late = float(np.mean(losses[-max(1, self.kind.steps // 10) :]))
        params, rest, _ = carry
        tx = self.optimizer(0.0)
        state = recipe.State.create(apply_fn=None, params=params, tx=tx, extra=rest)
        diverged = not np.isfinite(late)
        return {
            "validation": -np.inf if diverged else -late,
            "accuracy": 0.0 if diverged else self.task.evaluate(state)["accuracy"],
            "loss": late,
            "seconds": seconds,
            "ms_per_step": 1e3 * seconds / self.kind.steps,
        }


def _split(variables: Mapping[str, Any]) -> tuple[Any, Any]:
    rest = dict(variables)
    return rest.pop("params"), rest


def batches(seed: int, count: int, batch: int, steps: int) -> np.ndarray:
    """Rows of each step: every epoch a new order, without what is left at its end."""
    if not 1 <= batch <= count:
        raise ValueError(f"`batch` must be in [1, {count}], got {batch}")
    random, whole = np.random.default_rng(seed), count // batch
    orders = [random.permutation(count) for _ in range(-(-steps // whole))]
    rows = [order[: whole * batch].reshape(-1, batch) for order in orders]
    return np.concatenate(rows)[:steps]
