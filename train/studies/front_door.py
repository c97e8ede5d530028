"""What the front door costs beside the same parts put together by hand.

Each pair is two programs that do the same: a step of `training`, `wrap` or `nnx.wrap`,
and one put together from the layers below. Both go through the conversion and are timed
in low rank, in one process, in turn, a block of steps each. The ratio of a round is
that of two neighbouring blocks, whose order alternates; the median of all rounds is
reported, with the middle half of them.

Command:   python -m train.studies.front_door [--json FILE]
Hardware:  two CPU cores, float32, no data
Results:   train/results/README.md
"""

import dataclasses
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training.train_state import TrainState

import oialr_jax as oialr
from oialr_jax.lowrank import without_identity
from train import markdown
from train.bench.settings import Row
from train.bench.timing import command


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    width: int = 512
    """Of three hidden layers."""
    batch: int = 128
    """Inputs in a batch."""
    rounds: int = 60
    """Pairs of blocks."""
    block: int = 20
    """Steps in a block."""
    json: pathlib.Path | None = None
    """Where the rows go, with device, versions and date."""


Step = Callable[[], Any]
DELAY, BUDGET = 20, 0.25


def predict(params: Any, x: Any) -> Any:
    """Three hidden layers and a head."""
    for name in ("a", "b", "c"):
        x = jax.nn.relu(x @ params[name])
    return x @ params["head"]


def loss(params: Any, x: Any, y: Any) -> Any:
    """The mean squared error."""
    return jnp.mean((predict(params, x) - y) ** 2)


def problem(settings: Settings) -> tuple[Any, Any]:
    """The params, and one batch."""
    rng, width = np.random.default_rng(0), settings.width
    sides = {"a": width, "b": width, "c": width, "head": 10}
    params = {
        name: jnp.asarray(rng.normal(size=(width, n)) * width**-0.5, jnp.float32)
        for name, n in sides.items()
    }
    x = jnp.asarray(rng.normal(size=(settings.batch, width)), jnp.float32)
    return params, (x, jnp.sin(x[:, :10]))


def repeated(step: Callable[..., Any], state: Any, batch: Any) -> Step:
    """The step over and over, on the state that it returned."""

    def run() -> Any:
        nonlocal state
        state, value = step(state, *batch)
        return value

    return run


def by_hand(state: Any, batch: Any, rule: Any, schedule: Any) -> Step:
    """The composition of README's second block."""
    matrices = oialr.select(oialr.find_matrices(loss, state.params, *batch))
    forward = oialr.factored(loss)

    def train_step(state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        value, grads = oialr.value_and_grad(forward)(state.params, x, y)
        return state.apply_gradients(grads=grads), value

    step = oialr.adaptive(train_step, state.tx, matrices, schedule, rule)
    return repeated(step, state, batch)


def functions(settings: Settings) -> Iterator[tuple[str, Step, Step]]:
    """`training` and `wrap`, each beside the composition by hand."""
    params, batch = problem(settings)
    tx = optax.adamw(1e-4)

    def begin(tx: Any) -> Any:
        copy = jax.tree.map(jnp.copy, params)
        state = TrainState.create(apply_fn=predict, params=copy, tx=tx)
        return state.replace(step=jnp.zeros((), jnp.int32))

    run = oialr.training(loss, tx, delay=DELAY, budget=BUDGET)
    ours = repeated(run.step, run.init(params, *batch), batch)
    hand = begin(oialr.freeze_bases(tx))
    yield "training", ours, by_hand(hand, batch, run.rule, run.schedule)

    def train_step(state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        def of_params(params: Any) -> Any:
            return jnp.mean((state.apply_fn(params, x) - y) ** 2)

        value, grads = jax.value_and_grad(of_params)(state.params)
        return state.apply_gradients(grads=grads), value

    state, step = oialr.wrap(begin(tx), train_step, *batch, delay=DELAY, budget=BUDGET)
    hand = begin(oialr.freeze_bases(tx)).replace(apply_fn=oialr.factored(predict))
    rule: Any = run.rule  # known since `init`
    plain = oialr.adaptive(train_step, hand.tx, run.matrices, run.schedule, rule)
    yield "wrap", repeated(step, state, batch), repeated(plain, hand, batch)


class Model(nnx.Module):
    """The same network in Flax NNX."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        """Three hidden layers and a head."""
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(width, 10, rngs=rngs)

    @oialr.factored
    def __call__(self, x: Any) -> Any:
        """The output of the head."""
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


def modules(settings: Settings) -> Iterator[tuple[str, Step, Step]]:
    """`nnx.wrap` beside the user's own step on a model that is in low rank already."""
    _, batch = problem(settings)

    @nnx.jit
    def train_step(model: Any, optimizer: Any, x: Any, y: Any) -> Any:
        def of_model(model: Any) -> Any:
            return jnp.mean((model(x) - y) ** 2)

        value, grads = nnx.value_and_grad(of_model)(model)
        optimizer.update(model, grads)
        return value

    model = Model(settings.width, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.Param)
    given = model, optimizer, *batch
    step = oialr.nnx.wrap(train_step, *given, delay=DELAY, budget=BUDGET)
    for _ in range(DELAY + 1):
        step(*given)
    hand = nnx.clone(given)
    for variable in jax.tree.leaves(hand[0], is_leaf=lambda x: hasattr(x, "set_value")):
        variable.set_value(without_identity(variable.get_value()))
    yield "nnx.wrap", lambda: step(*given), lambda: train_step(*hand)


def timed(step: Step, count: int) -> float:
    """Seconds that a step took on average."""
    started = time.perf_counter()
    for _ in range(count):
        value = step()
    jax.block_until_ready(value)
    return (time.perf_counter() - started) / count


def measured(settings: Settings, pair: tuple[str, Step, Step]) -> Row:
    """One front door: milliseconds of both, quartiles of their ratio."""
    name, *both = pair
    for step in both:
        timed(step, 2 * DELAY)  # over the conversion
    rounds = []
    for i in range(settings.rounds):
        order = (0, 1) if i % 2 else (1, 0)
        seconds = dict((k, timed(both[k], settings.block)) for k in order)
        rounds.append((seconds[0], seconds[1]))
    ours, hand = (1e3 * statistics.median(x) for x in zip(*rounds, strict=True))
    low, ratio, high = statistics.quantiles([a / b for a, b in rounds], n=4)
    times = {"ms": ours, "by_hand_ms": hand}
    return {"what": name, **times, "ratio": ratio, "low": low, "high": high}


def rows(settings: Settings) -> list[Row]:
    """Host side: a row for each front door."""
    pairs = itertools.chain(functions(settings), modules(settings))
    return [measured(settings, pair) for pair in pairs]


def table(rows: Sequence[Row]) -> str:
    """Markdown of the rows."""
    head = ["front door", "ms a step", "by hand", "ratio", "middle half"]
    lines = [
        [
            *(x["what"], f"{x['ms']:.3f}", f"{x['by_hand_ms']:.3f}"),
            *(f"{x['ratio']:.4f}", f"{x['low']:.3f} to {x['high']:.3f}"),
        ]
        for x in rows
    ]
    return markdown.table(head, lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    command("train.studies.front_door", Settings, rows, table, arguments)


if __name__ == "__main__":
    main()
