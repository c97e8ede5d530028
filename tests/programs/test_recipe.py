"""What every program shares: model state, averages, accumulation, early stopping."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import oialr_jax as oialr
from train import command, files, images, loop, optimizers, recipe
from train import settings as common
from train.models.resnet import ResNet

STEPS = 12
SETTINGS = dataclasses.replace(
    images.PRESETS["digits"][1],
    model="resnet",
    steps=STEPS,
    batch=32,
    mesh="data=1",
    cutoff=0.6,
    log_every=3,
    eval_every=4,
    save_every=3,
)


@pytest.fixture(autouse=True)
def _small_resnet(monkeypatch):
    model = ResNet(widths=(8, 16), blocks=(1, 1), classes=10)
    monkeypatch.setitem(images.MODELS, "resnet", (model, {}))


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(x) for x in lines]
    return [
        {k: v for k, v in x.items() if k not in ("seconds", "event")} for x in lines
    ]


@pytest.mark.long
def test_a_model_with_batch_statistics_goes_on_bit_for_bit(tmp_path, monkeypatch):
    settings = dataclasses.replace(SETTINGS, out=tmp_path, ema=0.9)
    whole = images.run(settings, name="whole")
    assert any(rank < min(m, n) for m, n, rank in whole["ranks"].values())

    train = loop.train

    def stopped(state, step, *rest, interrupts, **options):
        def asking(state, batch):
            interrupts.asked = int(state.step) == 6
            return step(state, batch)

        return train(state, asking, *rest, interrupts=interrupts, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train", stopped)
        with pytest.raises(loop.StoppedError):
            images.run(settings, name="parts")
    settings = dataclasses.replace(settings, resume=True)
    parts = images.run(settings, name="parts")
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    for name in ("test_accuracy", "test_loss", "best", "ranks"):
        assert parts[name] == whole[name]


def test_batch_statistics_of_the_evaluation_are_those_that_were_trained(tmp_path):
    settings = dataclasses.replace(SETTINGS, method="dense", out=tmp_path)
    task = images.task(settings)
    variables = task.init(jax.random.key(0))
    extra = {"batch_stats": variables["batch_stats"]}
    batch = jax.tree.map(jnp.asarray, task.batch(0))
    _, (new, metrics) = task.loss(variables["params"], extra, batch, jax.random.key(1))
    assert set(new) == {"batch_stats"}
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), extra, new)
    assert all(jax.tree.leaves(moved))
    assert 0 <= float(metrics["accuracy"]) <= 1
    tx = oialr.freeze_bases(optax.sgd(0.1))
    state = recipe.State.create(
        apply_fn=None, params=variables["params"], tx=tx, extra=extra
    )
    assert task.evaluate(state) != task.evaluate(state.replace(extra=new))


def problem(tx):
    params = {
        "a": jax.random.normal(jax.random.key(0), (6, 5)),
        "b": jnp.arange(3.0),
    }
    grads = jax.tree.map(lambda x: jnp.cos(x), params)
    return TrainState.create(apply_fn=None, params=params, tx=tx), grads


def test_the_average_is_that_of_the_weights_after_each_update():
    tx = oialr.freeze_bases(optimizers.build("sgd", 0.1, 0.0, (), clip=None, ema=0.75))
    state, grads = problem(tx)
    average = state.params
    for _ in range(4):
        state = state.apply_gradients(grads=grads)
        average = jax.tree.map(lambda a, w: 0.75 * a + 0.25 * w, average, state.params)
    found = optimizers.averaged(state.params, state.opt_state)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, average
    )


def test_the_average_crosses_rank_events_as_the_weights_do():
    tx = oialr.freeze_bases(optimizers.build("sgd", 0.1, 0.0, (), clip=None, ema=0.75))
    state, grads = problem(tx)
    matrices = oialr.find_matrices(
        lambda p, x: jnp.sum(x @ p["a"]), state.params, jnp.ones((2, 6))
    )
    for _ in range(3):
        state = state.apply_gradients(grads=grads)
    average = optimizers.averaged(state.params, state.opt_state)["a"]
    params, opt_state, _ = oialr.factorize(
        state.params, state.opt_state, matrices, tx=tx
    )
    for rank in (5, 2):
        params, opt_state, _ = oialr.truncate(params, opt_state, {"a": rank}, tx=tx)
        node = optimizers.averaged(params, opt_state)["a"]
        assert node.s.shape == (rank, rank)
        projected = node.u @ node.u.T @ average @ node.vt.T @ node.vt
        np.testing.assert_allclose(node.u @ node.s @ node.vt, projected, atol=1e-5)
        assert not np.allclose(node.s, params["a"].s, atol=1e-3)


def test_gradients_of_several_batches_make_one_update():
    step = {"a": jnp.ones((6, 5)), "b": jnp.ones(3)}
    alone = oialr.freeze_bases(optimizers.build("sgd", 0.1, 0.0, ()))
    pairs = oialr.freeze_bases(optimizers.build("sgd", 0.1, 0.0, (), accumulate=2))
    once, _ = problem(alone)
    twice, _ = problem(pairs)
    once = once.apply_gradients(grads=jax.tree.map(lambda x: 2 * x, step))
    first = twice.apply_gradients(grads=step)
    jax.tree.map(np.testing.assert_array_equal, first.params, twice.params)
    second = first.apply_gradients(grads=jax.tree.map(lambda x: 3 * x, step))
    jax.tree.map(np.testing.assert_allclose, second.params, once.params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ema": 1.0}, "`ema` must be in [0, 1), got 1.0"),
        ({"accumulate": 0}, "`accumulate` must be at least 1, got 0"),
        ({"patience": 0}, "`patience` must be at least 1, got 0"),
        ({"budget": 1.5}, "`budget` must be in (0, 1], part of all weights; got 1.5"),
        (
            {"budget": 0.01},
            "`budget` 0.01 of 5122 weights leaves nothing for the matrices: 314 "
            "weights stay dense",
        ),
        ({"projections": (0.1, 0.0)}, "parts of the run; got 0.1 0.0"),
        (
            {"projections": (0.4, 0.1)},
            "`projections` must begin in [0, `delay` 0.333) and be (0, 1] apart",
        ),
    ],
    ids=lambda x: "".join(x) if isinstance(x, dict) else "",
)
def test_settings_out_of_range_are_refused(change, message, tmp_path):
    settings = dataclasses.replace(SETTINGS, out=tmp_path, **change)
    with pytest.raises(ValueError, match=re.escape(message)):
        images.run(settings, name="x")


def test_a_budget_is_a_part_of_all_weights_that_one_conversion_reaches(tmp_path):
    settings = dataclasses.replace(
        SETTINGS,
        out=tmp_path,
        budget=0.3,
        projections=(0.15, 0.1),
        delay=0.5,
        stop=1.0,
        multiple=1,
    )
    plan = common.schedule(settings)
    assert plan.projections == range(2, 6)
    found = images.run(settings, name="x")
    lines = (tmp_path / "x" / files.METRICS).read_text().splitlines()
    events = [x for x in map(json.loads, lines) if x["kind"] == "event"]
    assert [(x["step"], x["event"]["kind"]) for x in events] == [
        (6, "conversion"),
        (6, "truncation"),
    ]
    assert 0.25 < found["stored_fraction"] <= 0.3
    assert found["compilations"] == 2


def test_the_best_of_a_low_rank_run_comes_after_its_conversion(tmp_path, monkeypatch):
    scores = iter([0.9, 0.5, 0.4])
    monkeypatch.setattr(images, "evaluate", lambda *_: {"accuracy": next(scores)})
    settings = dataclasses.replace(SETTINGS, out=tmp_path, delay=0.5)
    found = images.run(settings, name="x")
    assert found["best"] == {"step": 8, "accuracy": 0.5}


def test_out_of_memory_names_the_batch_and_the_largest_arrays(tmp_path):
    large = jnp.zeros((9, 1024, 1024))

    def run(settings, *, name):
        jnp.zeros((1 << 22, 1 << 22)).block_until_ready()

    presets = {"x": ("one", dataclasses.replace(SETTINGS, out=tmp_path))}
    with pytest.raises(SystemExit) as caught:
        command.main("python -m x", presets, run, ["x"])
    text = str(caught.value)
    assert text.startswith("error: out of memory with --batch 32: ")
    assert "float32[9, 1024, 1024] of 36 MiB" in text
    assert large.size


def rate_of(**change):
    """The rate of each update."""
    settings = dataclasses.replace(SETTINGS, steps=40, learning_rate=1.0, **change)
    rate = common.learning_rate(settings)
    return np.array([float(rate(t)) for t in range(40 // settings.accumulate)])


def test_the_rate_falls_early_or_rises():
    falling, rising = rate_of(), rate_of(lowest_rate=3.0)
    np.testing.assert_allclose(falling[:5], [0, 0.25, 0.5, 0.75, 1])
    assert np.all(np.diff(falling[4:]) < 0)
    assert np.all(np.diff(rising) > 0)
    assert rising[-1] > 2.9
    early = rate_of(k_decay=0.34)
    assert np.all(early[5:-1] < falling[5:-1])


def test_the_rate_halves_with_every_tenth_of_the_run():
    found = rate_of(rate="halving", accumulate=2)
    np.testing.assert_allclose(
        found, np.repeat(0.5 ** np.maximum(0, np.arange(10) - 1), 2)
    )
