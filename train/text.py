"""Train a character transformer in low rank: python -m train.text PRESET.

Command:   python -m train.text sonnets           (six of Shakespeare's, embedded)
           python -m train.text shakespeare --data-dir data       (train.data.prepare
           tiny_shakespeare first)

Both take --method dense and --optimizer NAME, see train/optimizers.py. The loss is in
nats per character. A run is recorded, saved and resumed as those of train.images.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

import oialr_jax as oialr
from train import command, loop, names, process, recipe
from train import settings as common
from train.data import text
from train.data.arrays import read_ahead
from train.evaluate import total
from train.models.transformer import Transformer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(common.Settings):
    """One run of a language model."""

    dataset: str
    """sonnets or tiny_shakespeare."""
    context: int = 64
    """Characters in a passage."""
    depth: int = 2
    """Blocks."""
    heads: int = 4
    """Of each attention."""
    width: int = 64
    """Of each place."""
    scale: float = 1.0
    """By this the width is multiplied: a small dense network."""
    dropout: float = 0.0
    """Part of the activations that is dropped in training."""


PRESETS: Mapping[str, tuple[str, Settings]] = {
    "sonnets": (
        "a small transformer on four kilobytes of text",
        Settings(
            dataset="sonnets",
            steps=200,
            batch=16,
            dropout=0.1,
            weight_decay=0.1,
            log_every=10,
            eval_every=50,
        ),
    ),
    "shakespeare": (
        "the same, wider, on a megabyte",
        Settings(
            dataset="tiny_shakespeare",
            steps=2000,
            batch=32,
            width=128,
            learning_rate=2e-3,
            weight_decay=0.1,
            log_every=50,
            eval_every=250,
        ),
    ),
}


def _prepared(data_dir: pathlib.Path) -> text.Text:
    from train.data import prepared  # needs tensorflow-datasets, the sonnets do not

    return text.encode(prepared.text(data_dir))


DATASETS: Mapping[str, Callable[[pathlib.Path], text.Text]] = {
    "sonnets": lambda _: text.embedded(),
    "tiny_shakespeare": _prepared,
}

SMALL: Mapping[str, Any] = {"context": 16, "depth": 1, "width": 16}
"""The small form of every preset; it reads the sonnets."""

EVALUATION_BATCH = 128
"""Passages in one piece of the test text."""


def task(settings: Settings) -> recipe.Task:
    """Host side: the language model that the settings describe.

    Raises:   ValueError: an unknown dataset, one shorter than a passage, or a scale
              that is not positive.
              FileNotFoundError: it is not prepared.
    """
    load = names.find("dataset", settings.dataset, DATASETS)
    data = text.embedded() if settings.smoke else load(settings.data_dir)
    if settings.smoke:
        settings = dataclasses.replace(settings, **SMALL)
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh(settings.mesh))
    model = Transformer(
        tokens=len(data.characters),
        context=settings.context,
        depth=settings.depth,
        heads=settings.heads,
        width=common.scaled(settings.width, settings.scale, settings.heads),
        dropout=settings.dropout,
    )

    def init(key: Array) -> Mapping[str, Any]:
        return model.init(key, jnp.zeros((1, settings.context), jnp.int32))

    def loss(params: Any, extra: Any, batch: Mapping[str, Array], key: Array) -> Any:
        logits = model.apply(
            {"params": params}, batch["token"], train=True, rngs={"dropout": key}
        )
        entropy, right = _each(logits, batch["target"])
        return jnp.mean(entropy), (extra, {"accuracy": jnp.mean(right)})

    def drawn(params: Any, extra: Any, batch: Mapping[str, Array], key: Array) -> Array:
        output = model.apply({"params": params}, batch["token"])
        token = jax.random.categorical(key, jax.lax.stop_gradient(output))
        return jnp.mean(_each(output, token)[0])

    def logits(params: Any, extra: Any, token: Array) -> Array:
        return model.apply({"params": params, **extra}, token)

    forward = jax.jit(oialr.factored(logits))
    passages = text.passages(data.parts["test"], context=settings.context)

    def evaluated(state: recipe.State) -> dict[str, float]:
        of_passage = functools.partial(forward, state.averaged, state.extra)
        return evaluate(of_passage, layout, passages)

    train = data.parts["train"]
    return recipe.Task(
        init=init,
        loss=loss,
        batch=read_ahead(
            text.batches(
                train,
                context=settings.context,
                batch=settings.batch,
                seed=settings.seed,
                part=layout.rows(settings.batch),
            )
        ),
        evaluate=evaluated,
        goal=loop.Goal("loss", "min"),
        epoch=(len(train) - settings.context) / settings.batch,
        layout=layout,
        forward=logits,
        inputs=(jax.ShapeDtypeStruct((1, settings.context), jnp.int32),),
        described={"dataset": settings.dataset},
        drawn=drawn,
        terms=lambda batch: batch["target"].size,
    )


def evaluate(
    forward: Callable[[Any], Array],
    layout: oialr.sharding.Layout,
    passages: text.Passages,
) -> dict[str, float]:
    """Mean loss and share of right guesses over all characters of these passages."""

    def rows(numbers: np.ndarray) -> Any:
        token, target = passages["token"], passages["target"]
        return {"token": token[numbers], "target": target[numbers]}

    def sums(piece: Mapping[str, Array], counted: Array) -> tuple[Array, Array]:
        return _sums(forward(piece["token"]), piece["target"], counted)

    count, context = passages["target"].shape
    found = total(sums, rows, count, EVALUATION_BATCH, layout)
    loss, right = found / (count * context)
    return {"loss": float(loss), "accuracy": float(right)}


@jax.jit
def _sums(
    logits: Array, target: Int[Array, "b t"], counted: Array
) -> tuple[Array, Array]:
    """Of some passages: the sum of their losses, and how many guesses are right."""
    entropy, right = _each(logits, target)
    return (
        jnp.sum(jnp.where(counted[:, None], entropy, 0)),
        jnp.sum(right & counted[:, None]),
    )


def _each(logits: Array, target: Int[Array, "b t"]) -> tuple[Array, Array]:
    """The loss at each place, and whether the guess there is right."""
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return entropy, jnp.argmax(logits, -1) == target


run = functools.partial(recipe.run, build=task)
"""Host side: (settings, name=) -> the summary that was written."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    command.main("python -m train.text", PRESETS, run, arguments)


if __name__ == "__main__":
    process.use_huge_pages()
    main()
