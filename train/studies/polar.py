"""The suite orthogonal: polar factors by every method, and what they add to a step."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

import oialr_jax as oialr
from train.bench.problem import Problem, Program
from train.bench.settings import Row, Settings
from train.bench.timing import compared

SIDES = (32, 64, 128, 256, 512)


COUNTS = (1, 4)
"""Of matrices of a shape: a network has several, and they are one stack."""


POLAR: Mapping[str, Mapping[str, Any]] = {
    "svd": {"method": "svd"},
    "qdwh": {"method": "qdwh"},
    "polar_express, 7 steps": {"method": "polar_express"},
    "polar_express, 3 steps": {"method": "polar_express", "steps": 3},
    "newton_schulz, 5 steps": {"method": "newton_schulz"},
}


def orthogonal(settings: Settings) -> list[Row]:
    """Host side: a row for each method on each gradient, then for each step.

    Gradients are square matrices, one or four of a shape, and that of BasicCNN; steps
    are those of BasicCNN with momentum and coupled decay. `ratio` is the time over that
    of the SVD, or of the step of plain SGD, median over median.
    """
    rows = []
    problem = Problem("basic-cnn", settings.batch, settings.dtype)
    gradients: dict[str, Any] = {}
    for count, side in ((count, side) for count in COUNTS for side in SIDES):
        keys = jax.random.split(jax.random.key(side), count)
        name = f"{side}x{side}" if count == 1 else f"{count} of {side}x{side}"
        gradients[name] = [jax.random.normal(key, (side, side)) for key in keys]
    gradients["BasicCNN's gradient"] = problem.params
    for name, g in gradients.items():
        runs = {x: _polar_of({"w": g}, options) for x, options in POLAR.items()}
        rows += compared(name, runs, settings.repeats)
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(1e-2, momentum=0.9))
    optimizers = {"sgd": sgd} | {
        x: oialr.orthogonal.orthogonal_sgd(1e-2, weight_decay=5e-4, **options)
        for x, options in POLAR.items()
    }
    steps = {}
    for name, tx in optimizers.items():
        holder = {"state": problem.state(problem.params, tx)}
        step = problem.train_step(problem.forward)
        steps[name] = Program(step, holder, problem.image, problem.label).run
    return rows + compared(f"BasicCNN, batch {settings.batch}", steps, settings.repeats)


def _polar_of(g: Any, options: Mapping[str, Any]) -> Callable[[], Any]:
    tx = oialr.orthogonal.orthogonalize(**options)
    update = jax.jit(tx.update).lower(g, tx.init(g)).compile()
    return lambda: jax.block_until_ready(update(g, tx.init(g)))
