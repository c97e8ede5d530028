"""What is timed: a model with random inputs, and a compiled step of it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from jaxtyping import Array

import oialr_jax as oialr
from train import names
from train.models.table import MODELS

CASES: Mapping[str, tuple[nn.Module, tuple[int, ...]]] = {
    name: (MODELS[name][0], shape)
    for name, shape in {
        "mini-vit": (32, 32, 3),
        "vit-b16": (224, 224, 3),
        "resnet18": (32, 32, 3),
        "mlp": (28, 28, 1),
    }.items()
}
"""Models, and the shapes of their images."""


class State(TrainState):
    """What a step passes on: params, optimizer state and batch statistics."""

    rest: Any = None


class Problem:
    """Model, batch and optimizer of one case; everything but the order of products."""

    def __init__(self, name: str, batch: int, dtype: str) -> None:
        """The case called `name`, with random inputs."""
        network, shape = names.find("model", name, CASES)
        model: Any = network.clone(dtype=jnp.dtype(dtype))
        key = jax.random.key(0)
        self.name = name
        self.model = model
        self.image = jax.random.normal(key, (batch, *shape))
        self.label = jnp.arange(batch) % model.classes
        variables = dict(jax.jit(model.init)(key, self.image[:1]))
        self.params = variables.pop("params")
        self.rest = variables
        options: dict[str, Any] = {}
        if variables:
            options = {"train": True, "mutable": list(variables)}

        def forward(params: Any, rest: Any, image: Array) -> tuple[Array, Any]:
            out = model.apply({"params": params, **rest}, image, **options)
            return out if options else (out, rest)

        self.forward = forward
        abstract = jax.ShapeDtypeStruct(self.image.shape, self.image.dtype)
        self.matrices = oialr.select(
            oialr.find_matrices(forward, self.params, self.rest, abstract)
        )
        self.optimizer = optax.adamw(3e-4)

    def ranks(self, fraction: float) -> dict[str, int]:
        """Of every selected matrix, at least 1."""
        return {x.path: max(1, int(fraction * min(x.m, x.n))) for x in self.matrices}

    def low_rank(self, fraction: float) -> Any:
        """Params with random bases: only their shapes matter here."""
        bases: dict[tuple[int, int], Array] = {}

        def base(side: int, rank: int) -> Array:
            if (side, rank) not in bases:
                random = jax.random.normal(jax.random.key(side), (side, rank))
                bases[side, rank] = jnp.linalg.qr(random)[0]
            return jnp.array(bases[side, rank])

        params = self.params
        found = {x.path: x.axes for x in self.matrices}
        ranks = self.ranks(fraction)

        def convert(path: Any, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name not in found:
                return leaf
            axes, r = found[name], ranks[name]
            core = jnp.eye(r) * 0.5
            return oialr.LowRank(base(axes.m, r), core, base(axes.n, r).T, axes)

        return jax.tree_util.tree_map_with_path(convert, params)

    def state(self, params: Any, tx: optax.GradientTransformation) -> State:
        """A state of its own: steps use up what they are given."""
        params, rest = jax.tree.map(jnp.array, (params, self.rest))
        return State.create(apply_fn=None, params=params, tx=tx, rest=rest)

    def train_step(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A step on cores and dense leaves, the same for dense params."""

        def loss(params: Any, rest: Any, image: Array, label: Array) -> Any:
            logits, rest = forward(params, rest, image)
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return jnp.mean(entropy), rest

        def step(state: State, image: Array, label: Array) -> tuple[State, Any]:
            grad = oialr.value_and_grad(loss, has_aux=True)
            (value, rest), grads = grad(state.params, state.rest, image, label)
            return state.apply_gradients(grads=grads, rest=rest), {"loss": value}

        return step


class Program:
    """One compiled step with the state that it moves on; rows of equal shapes share."""

    def __init__(
        self, step: Callable[..., Any], holder: dict[str, Any], *batch: Array
    ) -> None:
        """Compile `step` for holder["state"]; the state is donated."""
        jitted = jax.jit(step, donate_argnums=0)
        self.compiled = jitted.lower(holder["state"], *batch).compile()
        self.holder = holder
        self.batch = batch

    def run(self) -> None:
        """Host side: one step, waited for."""
        state, metrics = self.compiled(self.holder["state"], *self.batch)
        self.holder["state"] = jax.block_until_ready(state)
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the loss is {metrics['loss']} in a benchmark")

    @property
    def temp_bytes(self) -> int:
        """Memory of the program beside its arguments and results."""
        analysis: Any = self.compiled.memory_analysis()
        return int(analysis.temp_size_in_bytes)

    @property
    def state_bytes(self) -> int:
        """Memory of the optimizer's state."""
        leaves = jax.tree.leaves(self.holder["state"].opt_state)
        return sum(leaf.nbytes for leaf in leaves)
