"""The forecasting program end to end, as a user starts it, in its smoke form."""

import dataclasses
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import oialr_jax as oialr
from train import command, forecast, loop
from train import settings as common
from train.data import prepare, series
from train.models.autoformer import Autoformer

ROOT = pathlib.Path(__file__).parents[2]
ORIGINALS = pathlib.Path(os.environ.get("OIALR_DATA", ROOT / ".." / "shared" / "data"))


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    """Runs of the same programs find them again."""
    command.keep_compiled(tmp_path_factory.mktemp("compiled"))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def start(out, *arguments):
    common = ["--smoke", "--out", str(out), "--mesh", "data=1"]
    forecast.main(["etth1-96", *common, *arguments])


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(x) for x in lines]
    for x in lines:
        x.pop("seconds")
    return lines


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory):
    out = tmp_path_factory.mktemp("low_rank")
    start(out)
    return out / "etth1-96-oialr-seed0-adam"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    out = tmp_path_factory.mktemp("dense")
    start(out, "--method", "dense")
    return out / "etth1-96-dense-seed0-adam"


def test_a_low_rank_run_converts_and_truncates(low_rank):
    events = [x for x in records(low_rank) if x["kind"] == "event"]
    assert len(events) >= 2
    result = summary(low_rank)
    assert any(rank < min(m, n) / 2 for m, n, rank in result["ranks"].values())
    assert result["trainable_weights"] < result["stored_weights"]
    assert result["stored_weights"] < result["dense_weights"]
    assert result["steps"] == common.SMOKE["steps"]


def test_a_dense_run_has_the_same_recipe_and_stays_dense(dense, low_rank):
    result = summary(dense)
    assert result["ranks"] == {}
    assert result["stored_weights"] == result["dense_weights"]
    assert not any(x["kind"] == "event" for x in records(dense))
    first = []
    for folder in (dense, low_rank):
        first.append(next(x for x in records(folder) if x["kind"] == "train"))
    assert first[0]["step"] == 4  # before the conversion
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-5)


def test_what_is_evaluated_is_recorded_and_drawn(low_rank):
    found = [x for x in records(low_rank) if x["kind"] == "eval"]
    assert [x["step"] for x in found] == [6, 12]
    result = summary(low_rank)
    assert result["test_mse"] == found[-1]["mse"]
    best = min(found, key=lambda x: x["validation_mse"])
    assert result["best"]["mse"] == best["mse"]
    drawn = {x.name for x in (low_rank / "plots").iterdir()}
    assert {"mse.png", "mae.png", "loss.png", "ranks.png"} <= drawn


@pytest.mark.long
@pytest.mark.parametrize("method", ["oialr", "dense"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    method, tmp_path, monkeypatch, request
):
    whole = request.getfixturevalue("low_rank" if method == "oialr" else "dense")
    train = loop.train

    def stopped(state, step, *rest, interrupts, **options):
        def asking(state, batch):
            interrupts.asked = int(state.step) == 7
            return step(state, batch)

        return train(state, asking, *rest, interrupts=interrupts, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", stopped)
        start(tmp_path, "--method", method)
    folder = tmp_path / whole.name
    assert not (folder / "summary.json").exists()
    start(tmp_path, "--method", method, "--resume")
    assert records(folder) == records(whole)
    ours, theirs = summary(folder), summary(whole)
    for name in ("test_mse", "test_mae", "best", "ranks"):
        assert ours[name] == theirs[name]


@pytest.mark.long
def test_the_task_trains_in_bfloat16_with_layers_computed_again():
    _, settings = forecast.PRESETS["etth1-96"]
    settings = dataclasses.replace(settings, **common.SMOKE, smoke=True, mesh="data=1")
    narrow = dataclasses.replace(settings, dtype="bfloat16", remat=True)
    losses = []
    for each in (settings, narrow):
        task = forecast.task(each)
        params = jax.jit(task.init)(jax.random.key(0))["params"]
        grad = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
        (loss, _), slopes = grad(params, {}, task.batch(0), jax.random.key(1))
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(slopes))
        losses.append(float(loss))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def windows(count, history=6, horizon=3):
    rng = np.random.default_rng(0)
    rows = count + history + horizon - 1
    return series.Windows(
        rng.normal(size=(rows, 2)).astype(np.float32),
        np.zeros((rows, 4), np.float32),
        history,
        horizon,
    )


def repeat(value, mark):
    return jnp.repeat(value[:, -1:], mark.shape[1] - value.shape[1], axis=1)


@pytest.mark.parametrize("mesh", ["data=1", "data=-1"])
def test_an_evaluation_counts_every_window_once(mesh, monkeypatch):
    monkeypatch.setattr(forecast, "EVALUATION_BATCH", 8)
    data = windows(21)
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh(mesh))

    found = forecast.evaluate(repeat, layout, data)
    every = data.take(np.arange(21))
    error = every["target"] - every["value"][:, -1:]
    assert found["mse"] == pytest.approx(float(np.mean(error**2)), rel=1e-5)
    assert found["mae"] == pytest.approx(float(np.mean(np.abs(error))), rel=1e-5)


def test_the_preset_holds_the_matrices_in_low_rank_that_the_authors_hold():
    """21, with the first square one dense: 2.98 % of the weights train at rank 5."""
    _, settings = forecast.PRESETS["ettm2-192"]
    model = Autoformer(horizon=192)
    value = jax.ShapeDtypeStruct((1, 96, 7), jnp.float32)
    mark = jax.ShapeDtypeStruct((1, 96 + 192, 5), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), value, mark)["params"]
    found = oialr.find_matrices(
        lambda p, *x: model.apply({"params": p}, *x), params, value, mark
    )
    chosen = oialr.select(
        found,
        min_aspect=settings.min_aspect,
        dense_first=settings.dense_first,
        dense_last=settings.dense_last,
        among_eligible=settings.among_eligible,
    )
    total = sum(x.size for x in jax.tree.leaves(params))
    dense = total - sum(x.m * x.n for x in chosen)
    assert len(chosen) == 21
    assert dense + 21 * 5**2 == 313_876


def test_presets_have_the_steps_of_the_paper():
    epochs = {96: 1074, 192: 1071, 336: 1066, 720: 1054}
    for horizon, steps in epochs.items():
        _, settings = forecast.PRESETS[f"ettm2-{horizon}"]
        assert settings.eval_every == steps
        assert settings.steps == 10 * steps
    assert len(forecast.PRESETS) == 17  # with a short form


@pytest.mark.skipif(not ORIGINALS.exists(), reason=f"no data in {ORIGINALS}")
def test_a_prepared_series_is_read_and_evaluated_as_the_table_says(tmp_path):
    """Of a preset, with the forecast that repeats the last row."""
    prepare.prepare("etth1", data_dir=tmp_path, source=ORIGINALS / "ett")
    _, settings = forecast.PRESETS["etth1-96"]
    found = forecast.load(dataclasses.replace(settings, data_dir=tmp_path))
    assert [len(x) for x in found.values()] == [8449, 2785, 2785]
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh("data=1"))
    errors = forecast.evaluate(repeat, layout, found["test"])
    assert errors["mse"] == pytest.approx(1.2944, abs=1e-3)
    assert errors["mae"] == pytest.approx(0.7132, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eth1-96"], "unknown preset 'eth1-96', did you mean 'etth1-96'?"),
        (["etth2-96"], "etth2 is not prepared in .* train.data.prepare etth2"),
        (["etth1-96", "--dataset", "eth1"], "unknown dataset 'eth1', did you mean"),
        (["etth1-96", "--smoke", "--mesh", "model=1"], "an axis `model` is of no use"),
    ],
    ids=["preset", "data", "dataset", "mesh"],
)
def test_bad_input_is_an_error_in_one_line(arguments, message, tmp_path):
    common = ["--data-dir", str(tmp_path), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match=message):
        forecast.main([*arguments, *common])
