"""Train a forecaster in low rank: python -m train.forecast PRESET.

Command:   python -m train.forecast ettm2-192 --data-dir data
           (train.data.prepare first; --method dense for the same, dense)
Result:    errors on the standardised scale, over all windows of the test months

Presets are ett{h1,h2,m1,m2}-{96,192,336,720}: an Autoformer forecasts that many rows
from the 96 before. A run is ten epochs, each followed by an evaluation, and ends when
the validation error has not fallen for three of them; `best` in summary.json has the
test error where the validation error was least. What a run writes: see train.images.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

import oialr_jax as oialr
from train import command, loop, names, process, recipe
from train import settings as common
from train.data.arrays import read_ahead
from train.data.series import MONTH, MONTHS, Windows, batches, drawn, splits
from train.evaluate import total
from train.models.autoformer import Autoformer

DATASETS: Mapping[str, int] = {"etth1": 24, "etth2": 24, "ettm1": 96, "ettm2": 96}
"""Rows in a day."""
HORIZONS = (96, 192, 336, 720)
HISTORY, BATCH, EPOCHS = 96, 32, 10
EVALUATION_BATCH = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(common.Settings):
    """One run of a forecaster."""

    dataset: str
    """etth1, etth2, ettm1 or ettm2."""
    horizon: int
    """Rows to forecast."""
    history: int = HISTORY
    """Rows to forecast them from; the decoder begins with the last half of them."""
    width: int = 512
    """Channels of the model."""
    hidden: int = 2048
    """Channels inside its perceptrons."""
    scale: float = 1.0
    """By this both widths are multiplied: a small dense network."""
    encoder_layers: int = 2
    """Of the model, which has one decoder layer."""
    factor: float = 1.0
    """Of the number of delays of an auto-correlation."""
    dropout: float = 0.05
    """Part of the channels that is left out in training."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the products; weights and forecasts are float32."""
    remat: bool = False
    """Compute layers again in the backward pass: less memory, more time."""
    windows: int | None = None
    """Use only the first so many windows of each part; by default all."""


SMALL: Mapping[str, Any] = {
    "horizon": 8,
    "history": 16,
    "width": 16,
    "hidden": 32,
    "encoder_layers": 1,
    "windows": 40,
}
"""The small form of every preset."""


def _preset(dataset: str, horizon: int) -> tuple[str, Settings]:
    """As the authors of Autoformer train it, and those of OIALR hold it in low rank."""
    months = MONTHS[0] * MONTH * DATASETS[dataset]
    epoch = (months - HISTORY - horizon + 1) // BATCH
    settings = Settings(
        dataset=dataset,
        horizon=horizon,
        steps=EPOCHS * epoch,
        batch=BATCH,
        optimizer="adam",
        learning_rate=1e-4,
        rate="halving",
        warmup=0.0,
        weight_decay=0.0,
        clip=None,
        factor=1.0 if dataset.startswith("ettm") else 3.0,
        # Dense runs are at their best after one epoch: cores have to be small by then.
        delay=0.5 / EPOCHS,
        every=0.5 / EPOCHS,
        layer_step=0.2,
        dense_first=1,  # with the next two, 21 of the 22 square enough matrices, as
        dense_last=0,  # the trainable weights that the authors report say
        among_eligible=True,
        log_every=50,
        eval_every=epoch,
        save_every=epoch,
        patience=3,
    )
    return f"Autoformer on {dataset}, {horizon} rows ahead", settings


PRESETS: Mapping[str, tuple[str, Settings]] = {
    f"{dataset}-{horizon}": _preset(dataset, horizon)
    for dataset in DATASETS
    for horizon in HORIZONS
} | {
    "etth2-192-short": (
        "a narrow Autoformer on etth2, 192 rows ahead, two thirds of a pass: for CPUs",
        dataclasses.replace(
            _preset("etth2", 192)[1],
            width=128,
            hidden=512,
            steps=174,
            learning_rate=2e-4,
            delay=0.4,
            budget=0.2995,
            projections=(0.0, 0.03),
            multiple=1,
            log_every=29,
            eval_every=174,  # half a minute or more of a core
            save_every=174,
            patience=None,
        ),
    ),
}


def task(settings: Settings) -> recipe.Task:
    """Host side: the forecaster that the settings name.

    Raises:   ValueError: an unknown dataset, windows that do not fit it, or a scale
              that is not positive.
              FileNotFoundError: the dataset is not prepared.
    """
    if settings.smoke:
        settings = dataclasses.replace(settings, **SMALL)
    windows = load(settings)
    mesh = oialr.sharding.make_mesh(settings.mesh)
    if "model" in mesh.shape:
        raise ValueError(
            "an axis `model` is of no use for the Autoformer: use data or fsdp"
        )
    layout = oialr.sharding.Layout(mesh)
    model = Autoformer(
        horizon=settings.horizon,
        label=settings.history // 2,
        width=common.scaled(settings.width, settings.scale),
        hidden=common.scaled(settings.hidden, settings.scale),
        encoder_layers=settings.encoder_layers,
        factor=settings.factor,
        dropout=settings.dropout,
        dtype=jnp.dtype(settings.dtype),
        remat=settings.remat,
    )
    first = windows["train"].take(np.zeros(1, np.int64))

    def init(key: Array) -> Mapping[str, Any]:
        return model.init(key, jnp.asarray(first["value"]), jnp.asarray(first["mark"]))

    def loss(params: Any, extra: Any, batch: Mapping[str, Array], key: Array) -> Any:
        rngs = {"dropout": key}
        forecast = model.apply(
            {"params": params}, batch["value"], batch["mark"], train=True, rngs=rngs
        )
        error = forecast - batch["target"]
        mse = jnp.mean(error**2)
        return mse, (extra, {"mse": mse, "mae": jnp.mean(jnp.abs(error))})

    def forecast(params: Any, extra: Any, value: Array, mark: Array) -> Array:
        return model.apply({"params": params, **extra}, value, mark)

    forward = jax.jit(oialr.factored(forecast))

    def evaluated(state: recipe.State) -> dict[str, float]:
        of_window = functools.partial(forward, state.averaged, state.extra)
        test = evaluate(of_window, layout, windows["test"])
        validation = evaluate(of_window, layout, windows["validation"])
        return {**test, "validation_mse": validation["mse"]}

    return recipe.Task(
        init=init,
        loss=loss,
        batch=read_ahead(
            batches(
                windows["train"],
                batch=settings.batch,
                seed=settings.seed,
                part=layout.rows(settings.batch),
            )
        ),
        evaluate=evaluated,
        goal=loop.Goal("validation_mse", "min"),
        epoch=len(windows["train"]) / settings.batch,
        layout=layout,
        forward=forecast,
        inputs=tuple(
            jax.ShapeDtypeStruct(first[x].shape, first[x].dtype)
            for x in ("value", "mark")
        ),
        described={
            "dataset": settings.dataset,
            "model": "autoformer",
            "horizon": settings.horizon,
        },
    )


def load(settings: Settings) -> dict[str, Windows]:
    """Host side: windows of the series that the settings name, by split.

    Raises:   as `task`.
    """
    rows = names.find("dataset", settings.dataset, DATASETS)
    if settings.smoke:
        series = drawn(rows)
    else:
        from train.data import prepared  # tensorflow-datasets takes seconds to import

        series = prepared.series(settings.data_dir, settings.dataset)
    windows = splits(series, history=settings.history, horizon=settings.horizon)
    if settings.windows is not None:
        windows = {name: x.first(settings.windows) for name, x in windows.items()}
    return windows


def evaluate(
    forecast: Callable[[Any, Any], Array],
    layout: oialr.sharding.Layout,
    windows: Windows,
) -> dict[str, float]:
    """Mean squared and absolute error over all windows, their rows and series."""

    def sums(piece: Mapping[str, Array], counted: Array) -> tuple[Array, Array]:
        found = forecast(piece["value"], piece["mark"])
        return _sums(found, piece["target"], counted)

    found = total(sums, windows.take, len(windows), EVALUATION_BATCH, layout)
    squared, absolute = found / (
        len(windows) * windows.horizon * windows.value.shape[1]
    )
    return {"mse": float(squared), "mae": float(absolute)}


@jax.jit
def _sums(
    forecast: Float[Array, "b h c"],
    target: Float[Array, "b h c"],
    counted: Bool[Array, " b"],
) -> tuple[Array, Array]:
    """Of a batch: the sums of its squared and of its absolute errors."""
    error = jnp.where(counted[:, None, None], forecast - target, 0)
    return jnp.sum(error**2), jnp.sum(jnp.abs(error))


run = functools.partial(recipe.run, build=task)
"""Host side: (settings, name=) -> the summary that was written."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    command.main("python -m train.forecast", PRESETS, run, arguments)


if __name__ == "__main__":
    process.use_huge_pages()
    main()
