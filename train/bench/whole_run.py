"""The suite run: the same training dense and in low rank, wall time in its parts."""

import dataclasses
import pathlib
import tempfile

import jax

from train import images
from train.bench.settings import Row, Settings
from train.bench.timing import compile_times, covered

RECIPE = images.Settings(
    dataset="digits",
    model="mini-vit-digits",
    steps=160,
    learning_rate=3e-4,
    weight_decay=0.1,
    delay=0.25,
    every=0.125,
    stop=0.75,
    cutoff=0.2,
    multiple=16,
    layer_step=1.0,
    eval_every=160,
    log_every=40,
)
"""The paper's mini-ViT, in patches of 2x2, on the digits that scikit-learn has."""


def run(settings: Settings) -> list[Row]:
    """Host side: the same recipe dense and in low rank, wall time in its parts."""
    rows = []
    for method in ("dense", "oialr"):
        recipe = dataclasses.replace(
            RECIPE,
            method=method,
            batch=settings.batch,
            lag=settings.lag,
            mesh="data=1",  # every suite measures one device
        )
        with tempfile.TemporaryDirectory() as folder, compile_times() as log:
            recipe = dataclasses.replace(recipe, out=pathlib.Path(folder))
            summary = images.run(recipe, name=method)
        blocking = covered(log, main=True)
        waited = blocking + summary["event_seconds"] + summary["waiting_seconds"]
        rows.append(
            {
                "model": recipe.model,
                "batch": settings.batch,
                "method": method,
                "steps": recipe.steps,
                "wall_s": summary["wall_seconds"],
                "steps_s": summary["wall_seconds"] - waited,
                "compiling_s": blocking,
                "compiling_behind_s": covered(log, main=False),
                "waiting_s": summary["waiting_seconds"],
                "svd_s": summary["event_seconds"],
                "compilations": summary["compilations"],
                "test_accuracy": summary["test_accuracy"],
                "stored_fraction": summary["stored_fraction"],
                "trainable_fraction": summary["trainable_fraction"],
                "backend": jax.default_backend(),
            }
        )
    for row in rows:
        row["ratio_to_dense"] = row["wall_s"] / rows[0]["wall_s"]
    return rows
