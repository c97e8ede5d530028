"""training() and wrap(): the front door is the composition by hand, in one call."""

import dataclasses
import difflib
import functools
import gc
import os
import pathlib
import subprocess
import sys
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import nnx
from flax.training.train_state import TrainState
from helpers import assert_close

import oialr_jax as oialr
from oialr_jax.lowrank import is_low_rank, without_identity
from oialr_jax.training import TrainingState
from oialr_jax.transform import with_trainable

WIDTH, DELAY, STEPS = 32, 20, 26
TUTORIALS = pathlib.Path(__file__).parent / "tutorials"


def predict(params, x):
    for name in ("a", "b"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"].reshape(1, -1))
    return x @ params["head"]


def loss(params, x, y):
    return jnp.mean((predict(params, x) - y) ** 2)


def weights():
    params = {
        name: {"kernel": normal(i, WIDTH, WIDTH), "bias": jnp.zeros(WIDTH)}
        for i, name in enumerate("ab")
    }
    return params | {"head": normal(7, WIDTH, 4)}


def batch(t):
    x = normal(100 + t, 16, WIDTH)
    return x, jnp.sin(3 * x[:, :4])


def advance(run, state, end):
    """The state after step `end`, and what each step returned."""
    outs = []
    while int(state.step) < end:
        state, out = run.step(state, *batch(int(state.step)))
        outs.append(jax.device_get(out))
    return state, outs


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = map(jax.random.key_data, (x, y))
        np.testing.assert_array_equal(x, y)


def share(params):
    counts = oialr.counts(params)
    return counts.stored / counts.dense


# The same as by hand


def by_hand(tx):
    """What `training` does, composed of the public parts."""
    params = weights()
    matrices = oialr.select(oialr.find_matrices(loss, params, *batch(0)))
    forward = oialr.factored(loss)
    tx = oialr.freeze_bases(tx)
    schedule = oialr.Schedule(
        delay=18, every=3, lag=2, stop=19, projections=range(6, 18)
    )
    rule = oialr.RankRule(budget=2 * WIDTH**2 // 4)

    def train_step(state, x, y):
        value, grads = oialr.value_and_grad(forward)(state.params, x, y)
        return state.apply_gradients(grads=grads), value

    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    state = state.replace(step=jnp.zeros((), jnp.int32))
    return state, oialr.adaptive(train_step, tx, matrices, schedule, rule)


def program(step, state, t):
    """The program of a step, as it goes to the compiler."""
    given = without_identity((state, *batch(t)))
    return step._jitted.lower(*given).as_text()


def test_it_is_the_composition_by_hand_bit_for_bit():
    tx = optax.adamw(1e-2)
    hand, step = by_hand(tx)
    run = oialr.training(loss, tx, delay=DELAY)
    state = run.init(weights(), *batch(0))
    dense = program(run._step, state, 0), program(step, hand, 0)
    assert dense[0] == dense[1]
    state, values = advance(run, state, STEPS)
    expected = []
    for t in range(STEPS):
        hand, value = step(hand, *batch(t))
        expected.append(jax.device_get(value))
    assert values == expected
    same((state.params, state.opt_state), (hand.params, hand.opt_state))
    assert [x.step for x in run.reports] == [x.step for x in step.reports] == [20]
    assert len(run.timings) == len(step.timings)
    assert len(oialr.ranks(state.params)) == 2
    assert program(run._step, state, 0) == program(step, hand, 0)
    assert run.compilations == step.compilations == 2


def test_its_parts_make_the_same_step_below():
    run = oialr.training(loss, optax.adamw(1e-2), delay=DELAY)
    begin = run.init(weights(), *batch(0))
    step = oialr.adaptive(
        run.train_step, run.tx, run.matrices, run.schedule, run.rule, donate_argnums=()
    )
    below = begin
    for t in range(STEPS):
        below, _ = step(below, *batch(t))
    state, _ = advance(run, begin, STEPS)
    same(state, below)


def test_an_optimizer_of_the_matrices_is_the_one_made_of_them():
    def muon(matrices):
        return oialr.orthogonal.core_muon(0.05, matrices)

    run = oialr.training(loss, muon, delay=4)
    state, _ = advance(run, run.init(weights(), *batch(0)), 7)
    known = oialr.training(loss, muon(run.matrices), delay=4)
    desired, _ = advance(known, known.init(weights(), *batch(0)), 7)
    same(state, desired)
    assert len(oialr.ranks(state.params)) == 2


def test_a_rate_alone_is_that_of_muon_on_the_matrices():
    run = oialr.training(loss, 1e-2, delay=4)
    state, values = advance(run, run.init(weights(), *batch(0)), STEPS)
    tx = oialr.orthogonal.core_muon(1e-2, run.matrices, rms=0.2)
    known = oialr.training(loss, tx, delay=4)
    desired, _ = advance(known, known.init(weights(), *batch(0)), STEPS)
    same(state, desired)
    assert values[-1] < values[0]


def test_params_stay_the_callers():
    params = weights()
    schedule_free = optax.contrib.schedule_free_sgd(0.1)  # begins with the params
    key, extra = jax.random.key(0), {"mean": jnp.zeros(3)}
    run = oialr.training(
        lambda params, extra, x, y, key: (loss(params, x, y), extra),
        schedule_free,
        delay=4,
        follow={"ema": lambda new, old: new},
    )
    state = run.init(params, *batch(0), extra=extra, key=key)
    advance(run, state, 2)
    assert not any(x.is_deleted() for x in jax.tree.leaves((params, key, extra)))


# What is chosen where nothing is said


def test_the_network_gets_smaller_by_default():
    run = oialr.training(loss, optax.adamw(1e-2), steps=3 * DELAY)
    state, values = advance(run, run.init(weights(), *batch(0)), DELAY)
    assert oialr.ranks(state.params) == {}
    state, after = advance(run, state, STEPS)
    inside = sum(r * (m + n + r) for m, n, r in oialr.ranks(state.params).values())
    assert len(oialr.ranks(state.params)) == 2
    assert 0.8 * 2 * WIDTH**2 / 4 < inside <= 2 * WIDTH**2 / 4
    assert after[-1] < values[0]
    assert len(run.timings) == 12 + 2  # projections, the choice and the event


@pytest.mark.parametrize("budget", [0.2, 0.25, 0.5])
def test_a_float_is_the_share_of_all_weights(budget):
    run = oialr.training(loss, optax.adamw(1e-2), delay=2, budget=budget)
    state, _ = advance(run, run.init(weights(), *batch(0)), 4)
    assert budget - 0.03 < share(state.params) <= budget


def test_an_int_counts_weights_in_matrices():
    run = oialr.training(loss, optax.adamw(1e-2), delay=2, budget=300)
    state, _ = advance(run, run.init(weights(), *batch(0)), 4)
    inside = sum(r * (m + n + r) for m, n, r in oialr.ranks(state.params).values())
    assert 300 - 2 * 2 * WIDTH < inside <= 300


def test_the_least_share_is_named_and_can_be_had():
    with pytest.raises(ValueError, match=r"the least is budget=0\.1") as error:
        oialr.training(loss, optax.adamw(1e-2), delay=2, budget=0.1).init(
            weights(), *batch(0)
        )
    least = float(str(error.value).split("budget=")[-1].split(",")[0])
    run = oialr.training(loss, optax.adamw(1e-2), delay=2, budget=least)
    state, _ = advance(run, run.init(weights(), *batch(0)), 4)
    assert share(state.params) <= least
    assert {r for *_, r in oialr.ranks(state.params).values()} == {1}


@pytest.mark.parametrize("delay", [0, 1, 19, 20, 333, 2500])
def test_the_conversion_is_at_the_delay_and_is_the_only_event(delay):
    schedule = oialr.training(loss, optax.sgd(0.1), delay=delay).schedule
    assert schedule.events(10 * delay + 100) == (delay,)
    projected = [t for t in range(delay) if schedule.projected(t)]
    assert len(projected) == 0 if delay < 20 else 12 <= len(projected) <= 15
    assert not projected or 0.29 * delay < projected[0] < 0.31 * delay


def test_matrices_can_be_chosen():
    run = oialr.training(loss, optax.sgd(0.1), delay=2, select={"exclude": "a/"})
    run.init(weights(), *batch(0))
    assert [x.path for x in run.matrices] == ["b/kernel"]
    given = oialr.find_matrices(loss, weights(), *batch(0))[:1]
    run = oialr.training(loss, optax.sgd(0.1), delay=2, select=given)
    run.init(weights(), *batch(0))
    assert [x.path for x in run.matrices] == ["a/kernel"]


def test_a_schedule_and_a_rule_of_ones_own():
    schedule = oialr.Schedule(delay=2, every=2, layer_step=1.0)
    rule = oialr.RankRule(cutoff=0.5)
    run = oialr.training(loss, optax.sgd(0.1), schedule=schedule, rule=rule)
    advance(run, run.init(weights(), *batch(0)), 6)
    assert (run.schedule, run.rule) == (schedule, rule)
    assert [x.step for x in run.reports] == [2, 2, 4]


# More than params and a batch


def test_aux_comes_back_beside_the_value():
    def with_aux(params, x, y):
        error = predict(params, x) - y
        return jnp.mean(error**2), {"largest": jnp.max(jnp.abs(error))}

    plain = oialr.training(loss, optax.adamw(1e-2), delay=2)
    run = oialr.training(with_aux, optax.adamw(1e-2), delay=2, has_aux=True)
    _, values = advance(plain, plain.init(weights(), *batch(0)), 4)
    _, outs = advance(run, run.init(weights(), *batch(0)), 4)
    assert [value for value, _ in outs] == values
    assert all(aux["largest"] ** 2 >= value for value, aux in outs)


class Normalised(nn.Module):
    """Batch statistics and dropout, as in Flax's guides."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(WIDTH)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dropout(self.rate, deterministic=not train)(nn.relu(x))
        x = nn.relu(nn.Dense(WIDTH)(x))
        return nn.Dense(4)(x)


def linen(**options):
    """A run of a Linen model with batch statistics and dropout, and its state."""
    model = Normalised(**options)
    variables = model.init(jax.random.key(0), batch(0)[0], train=False)

    def linen_loss(params, extra, x, y, key):
        out, extra = model.apply(
            {"params": params, **extra},
            x,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return jnp.mean((out - y) ** 2), extra

    run = oialr.training(linen_loss, optax.adamw(1e-2), delay=4)
    params, extra = variables["params"], {"batch_stats": variables["batch_stats"]}
    return run, lambda: run.init(params, *batch(0), extra=extra, key=jax.random.key(1))


def test_other_collections_and_dropout_keys():
    run, init = linen()
    state = init()
    first, _ = advance(run, init(), 1)
    state, values = advance(run, state, 8)
    mean = state.extra["batch_stats"]["BatchNorm_0"]["mean"]
    assert np.any(mean != first.extra["batch_stats"]["BatchNorm_0"]["mean"])
    assert np.all(np.isfinite(values))
    assert len(oialr.ranks(state.params)) == 2
    _, again = advance(run, init(), 8)
    assert again == values


def test_each_step_has_a_key_of_its_own():
    def noise(params, x, y, *, key):
        return loss(params, x, y), jax.random.normal(key)

    run = oialr.training(noise, optax.adamw(1e-2), delay=2, has_aux=True)
    state = run.init(weights(), *batch(0), key=jax.random.key(5))
    _, outs = advance(run, state, 5)
    expected = [
        jax.random.normal(jax.random.fold_in(jax.random.key(5), t)) for t in range(5)
    ]
    np.testing.assert_array_equal([aux for _, aux in outs], expected)


def test_an_average_follows_the_conversion():
    average = functools.partial(optax.incremental_update, step_size=0.5)
    run = oialr.training(loss, optax.sgd(0.05), delay=3, follow={"ema": average})
    state = run.init(weights(), *batch(0))
    desired = jax.tree.map(jnp.copy, state.params)
    while int(state.step) < 6:
        before = oialr.ranks(state.params)
        state, _ = run.step(state, *batch(int(state.step)))
        if oialr.ranks(state.params) != before:
            desired = oialr.following.rebase(desired, state.params)
        desired = with_trainable(
            desired,
            average(
                oialr.transform.trainable(state.params),
                oialr.transform.trainable(desired),
            ),
        )
    assert oialr.ranks(state.beside["ema"]) == oialr.ranks(state.params) != {}
    assert_close(state.beside["ema"], desired, 1e-5)
    for ema, param in zip(
        jax.tree.leaves(state.beside["ema"], is_leaf=is_low_rank),
        jax.tree.leaves(state.params, is_leaf=is_low_rank),
        strict=True,
    ):
        if is_low_rank(param):
            np.testing.assert_array_equal(ema.u, param.u)


def test_a_loss_sees_the_copy_that_it_names():
    def distilled(params, x, y, *, target):
        return loss(params, x, y + 0.1 * jax.lax.stop_gradient(predict(target, x)))

    def kept(new, old):
        return old

    run = oialr.training(
        distilled, optax.sgd(0.05), delay=3, follow={"target": kept, "start": kept}
    )
    state, values = advance(run, run.init(weights(), *batch(0)), 6)
    _, plain = advance(*begun(), 6)
    assert values[0] != plain[0]
    assert oialr.ranks(state.beside["start"]) == oialr.ranks(state.params)


def begun(**options):
    options = {"delay": 3} | options
    run = oialr.training(loss, optax.sgd(0.05), **options)
    return run, run.init(weights(), *batch(0))


def test_a_line_search_has_what_it_asks_for():
    run = oialr.training(loss, optax.lbfgs(), delay=3)
    state = run.init(weights(), *batch(0))
    values = []
    for _ in range(8):
        state, value = run.step(state, *batch(0))
        values.append(float(value))
    assert values[2] < values[0]
    assert values[7] < values[3]


def test_layouts_place_the_state_and_the_batches():
    run, state = begun()
    _, values = advance(run, state, 6)
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh("fsdp=8"), min_size=64)
    run, state = begun(layout=layout)
    assert len(state.params["a"]["kernel"].addressable_shards) == 8
    shard = state.params["a"]["kernel"].addressable_shards[0]
    assert shard.data.size == WIDTH**2 // 8
    state, spread = advance(run, state, 6)
    np.testing.assert_allclose(spread, values, rtol=1e-5)
    shards = state.params["a"]["kernel"].u.addressable_shards
    assert shards[0].data.size == state.params["a"]["kernel"].u.size // 8
    given, jitted = [], run._step._jitted
    run._step._jitted = lambda state, *batch: (
        given.append(batch),
        jitted(state, *batch),
    )[1]
    advance(run, state, 7)
    assert [x.sharding for x in given[0]] == [layout.batch] * 2


@pytest.mark.parametrize(
    "middle", [4, *(pytest.param(x, marks=pytest.mark.long) for x in (2, 7))]
)
def test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_one(middle, tmp_path):
    """Before, between (a lag) and after the conversion at step 5."""
    schedule = oialr.Schedule(delay=3, every=4, stop=4, lag=2, projections=range(1, 3))

    def begin():
        def noisy(params, x, y, *, key):
            return loss(params, x + 0.1 * jax.random.normal(key, x.shape), y)

        run = oialr.training(
            noisy,
            optax.adamw(1e-2),
            schedule=schedule,
            follow={"ema": functools.partial(optax.incremental_update, step_size=0.1)},
        )
        return run, run.init(weights(), *batch(0), key=jax.random.key(3))

    run, state = begin()
    state, _ = advance(run, state, middle)
    with oialr.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        whole, values = advance(run, state, 9)
        fresh, template = begin()
        state = checkpoints.restore(template, fresh.tx).state
    resumed, again = advance(fresh, state, 9)
    assert again == values
    same(resumed, whole)
    assert len(oialr.ranks(whole.params)) == 2
    gc.collect()  # asyncio of Orbax


def test_a_whole_equinox_module():
    model = eqx.nn.MLP(WIDTH, 4, WIDTH, 2, key=jax.random.key(0))

    def module_loss(model, x, y):
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    run = oialr.training(module_loss, optax.adamw(1e-2), delay=3, jit=eqx.filter_jit)
    state = run.init(model, *batch(0))
    state, values = advance(run, state, 6)
    trained = oialr.materialize(state.params)
    assert jax.vmap(trained)(batch(0)[0]).shape == (16, 4)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    run = oialr.training(
        lambda p, x, y: module_loss(eqx.combine(p, static), x, y),
        optax.adamw(1e-2),
        delay=3,
    )
    _, desired = advance(run, run.init(params, *batch(0)), 6)
    np.testing.assert_allclose(values, desired, rtol=1e-5)


class Stateful(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.b = nnx.Linear(WIDTH, 4, rngs=rngs)

    def __call__(self, x):
        return self.b(self.dropout(nnx.relu(self.norm(self.a(x)))))


def test_an_nnx_module_with_statistics_and_counters():
    graph, params, rest = nnx.split(Stateful(nnx.Rngs(0)), nnx.Param, ...)

    def split_loss(params, rest, x, y):
        model = nnx.merge(graph, params, rest)
        value = jnp.mean((model(x) - y) ** 2)
        return value, nnx.split(model, nnx.Param, ...)[2]

    run = oialr.training(split_loss, optax.adamw(1e-2), delay=3)
    state = run.init(params, *batch(0), extra=rest)
    state, values = advance(run, state, 6)
    assert np.all(np.isfinite(values))
    assert len(oialr.ranks(state.params)) == 1
    model = nnx.merge(graph, oialr.materialize(state.params), state.extra)
    assert int(model.dropout.rngs.count[...]) == 6
    assert np.any(model.norm.mean[...] != 0)


# What is wrong is said in one sentence, before anything runs


def init(loss=loss, params=None, example=None, *, extra=None, tx=None, **options):
    tx = optax.adamw(1e-2) if tx is None else tx
    run = oialr.training(loss, tx, **({"delay": 2} | options))
    params = weights() if params is None else params
    return run.init(params, *(batch(0) if example is None else example), extra=extra)


X, Y = jax.eval_shape(lambda: batch(0))
MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "no_optimizer": (lambda: init(tx="adamw"), TypeError, "optax.adamw.*got 'adamw'"),
    "no_rate": (
        lambda: init(tx=-1e-3),
        ValueError,
        "must be positive and finite, got -0.001",
    ),
    "infinite_rate": (lambda: init(tx=np.inf), ValueError, "and finite, got inf"),
    "class_of_optimizers": (
        lambda: init(tx=optax.GradientTransformation),
        TypeError,
        r"has to be an optimizer of Optax.*got <class",
    ),
    "schedule": (
        lambda: init(tx=optax.cosine_decay_schedule(1e-3, 9)),
        TypeError,
        r"calling it with the matrices fails: give optax\.adamw\(schedule\)",
    ),
    "not_called": (
        lambda: init(tx=optax.adamw),
        TypeError,
        r"got adamw itself: write adamw\(3e-4\)",
    ),
    "no_optimizer_of_matrices": (
        lambda: init(tx=lambda matrices: matrices),
        TypeError,
        "has to be an optimizer of Optax",
    ),
    "frozen": (
        lambda: init(tx=oialr.freeze_bases(optax.sgd(0.1))),
        ValueError,
        r"frozen already.*training\(loss, optax\.adamw",
    ),
    "frozen_inside": (
        lambda: init(tx=optax.chain(oialr.freeze_bases(optax.sgd(0.1)))),
        ValueError,
        "`freeze_bases` is inside of another",
    ),
    "neither": (
        lambda: init(delay=None),
        ValueError,
        "give steps=, the length of the run.*or delay=",
    ),
    "negative_delay": (
        lambda: init(delay=-1),
        ValueError,
        "`delay` must be at least 0, got -1",
    ),
    "late": (
        lambda: init(delay=30, steps=30),
        ValueError,
        "delay=30 is not before the end.*delay=10",
    ),
    "twice": (
        lambda: init(schedule=oialr.Schedule(delay=2, every=2)),
        ValueError,
        "leave out `delay` and `steps`",
    ),
    "percent": (lambda: init(budget=25.0), ValueError, r"float in \(0, 1\).*got 25"),
    "nothing": (lambda: init(budget=0), ValueError, "int of at least 1.*got 0"),
    "few_weights": (
        lambda: init(budget=100),
        ValueError,
        "budget=100 is out of reach.*or 130 as an int",
    ),
    "budget_and_rule": (
        lambda: init(budget=0.3, rule=oialr.RankRule()),
        ValueError,
        "give one of the two",
    ),
    "cutoff_once": (
        lambda: init(rule=oialr.RankRule(cutoff=0.1)),
        ValueError,
        "give it a schedule=",
    ),
    "small_matrices": (
        lambda: init(
            lambda params, x: jnp.mean(x @ params["w"]),
            {"w": jnp.ones((2, 2))},
            (jnp.ones((3, 2)),),
            select={"include": "w"},
        ),
        ValueError,
        "4 weights dense and 5 at their least ranks",
    ),
    "aux": (
        lambda: init(lambda p, x, y: (loss(p, x, y), x)),
        TypeError,
        r"must return value, got \(float32\[\], float32\[16, 32\]\).*has_aux=True",
    ),
    "no_aux": (
        lambda: init(has_aux=True),
        TypeError,
        r"must return \(value, aux\), got float32\[\]",
    ),
    "not_scalar": (
        lambda: init(lambda p, x, y: (predict(p, x) - y) ** 2),
        TypeError,
        r"got float32\[16, 4\].*jnp\.mean",
    ),
    "not_float": (
        lambda: init(lambda p, x, y: jnp.argmax(predict(p, x))),
        TypeError,
        r"got int32\[\]",
    ),
    "no_extra": (
        lambda: init(lambda p, e, x, y: loss(p, x, y), extra={"n": jnp.zeros(())}),
        TypeError,
        r"must return \(value, extra\), got",
    ),
    "another_extra": (
        lambda: init(
            lambda p, e, x, y: (loss(p, x, y), jnp.zeros(2)), extra=jnp.zeros(3)
        ),
        TypeError,
        r"`extra` as run.init got it, float32\[3\]; got float32\[2\]",
    ),
    "no_inner_pair": (
        lambda: init(
            lambda p, e, x, y: (loss(p, x, y), e), extra=jnp.zeros(3), has_aux=True
        ),
        TypeError,
        r"must return \(value, \(extra, aux\)\)",
    ),
    "no_example": (
        lambda: init(example=()),
        ValueError,
        r"loss\(params\) fails: give run.init.*one batch.*missing 2 required",
    ),
    "another_example": (
        lambda: init(example=(X, jax.ShapeDtypeStruct((16, 5), jnp.float32))),
        ValueError,
        r"loss\(params, float32\[16, 32\], float32\[16, 5\]\) fails",
    ),
    "other_params": (
        lambda: init(params={"a": jnp.ones((3, 3))}),
        ValueError,
        "give run.init the params of the model",
    ),
    "integers": (
        lambda: init(params=weights() | {"count": jnp.zeros((), jnp.int32)}),
        ValueError,
        "count of the params is int32.*`extra`",
    ),
    "functions": (
        lambda: init(params=weights() | {"act": jnp.tanh}),
        ValueError,
        r"act of the params is no array.*eqx\.partition",
    ),
    "low_rank": (
        lambda: init(
            params=oialr.factorize(
                weights(), None, oialr.find_matrices(loss, weights(), X, Y)
            )[0]
        ),
        ValueError,
        r"in low rank already.*materialize\(params\)",
    ),
    "no_matrices": (
        lambda: init(lambda p, x, y: sum(map(jnp.sum, jax.tree.leaves(p)))),
        ValueError,
        r"no leaf of the params is used as a matrix: .*reduce_sum",
    ),
    "none_selected": (
        lambda: init(select={"dense_last": 3}),
        ValueError,
        r"no matrix pays.*a/kernel 32x32.*select=\{'include'",
    ),
    "empty": (lambda: init(select=()), ValueError, "`select` is empty"),
    "step_before_init": (
        lambda: oialr.training(loss, optax.sgd(0.1), delay=1).step(
            TrainingState(0, {}, ())
        ),
        ValueError,
        r"state = run\.init\(params, \*batch\) comes first",
    ),
    "optimizer_by_shape": (
        lambda: init(
            tx=optax.masked(
                optax.sgd(0.1),
                lambda params: jax.tree.map(lambda x: x.shape == (32, 32), params),
            )
        ),
        ValueError,
        "`mask` .* says True of a/kernel",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_that_says_what_to_change(mistake):
    make, kind, match = MISTAKES[mistake]
    with pytest.raises(kind, match=match) as error:
        make()
    assert len(str(error.value).splitlines()) == 1


# A step that there is already


class Statistics(TrainState):
    batch_stats: Any = None


def flax_state():
    model = Normalised(rate=0.0)
    variables = model.init(jax.random.key(0), batch(0)[0], train=False)
    return Statistics.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=optax.adamw(1e-2),
        batch_stats=variables["batch_stats"],
    )


@jax.jit
def flax_step(state, batch):
    """As in Flax's guide to batch normalisation, word for word."""

    def loss_fn(params):
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x=batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        return jnp.mean((logits - batch["label"]) ** 2), (logits, updates)

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (_, updates)), grads = grad_fn(state.params)
    state = state.apply_gradients(grads=grads)
    state = state.replace(batch_stats=updates["batch_stats"])
    return state, {"loss": loss}


def images(t):
    x, y = batch(t)
    return {"image": x, "label": y}


def test_a_flax_step_with_batch_statistics_is_left_alone():
    begin = flax_state()
    state, step = oialr.wrap(begin, flax_step, images(0), delay=4, budget=0.5)
    dense, losses, expected = begin, [], []
    for t in range(8):
        state, metrics = step(state, images(t))
        losses.append(float(metrics["loss"]))
        dense, metrics = flax_step(dense, images(t))
        expected.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[:4], expected[:4], rtol=1e-5)
    assert np.all(np.isfinite(losses))
    assert list(oialr.ranks(state.params)) == ["Dense_0/kernel", "Dense_1/kernel"]
    assert share(state.params) <= 0.5
    assert step.compilations == 2
    mean = state.batch_stats["BatchNorm_0"]["mean"]
    assert np.any(mean != 0)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    assert state.apply_fn(variables, batch(0)[0], train=False).shape == (16, 4)
    assert not any(
        x.is_deleted() for x in jax.tree.leaves(begin) if isinstance(x, jax.Array)
    )


def test_wrap_finds_what_find_matrices_finds_and_keeps_moments():
    state = flax_state()
    for t in range(3):
        state, _ = flax_step(state, images(t))
    wrapped, step = oialr.wrap(state, flax_step, images(0), delay=9)
    same(wrapped.opt_state.inner_state, state.opt_state)
    variables = {"batch_stats": state.batch_stats}

    def forward(params, x):
        return Normalised(rate=0.0).apply({"params": params} | variables, x, False)

    desired = oialr.find_matrices(forward, state.params, batch(0)[0])
    assert step._matrices == oialr.select(desired)


def test_wrap_with_an_average_and_a_layout():
    class Averaged(TrainState):
        ema: Any = None

    def train_step(state, x, y):
        def loss_fn(params):
            return jnp.mean((state.apply_fn(params, x) - y) ** 2)

        value, grads = jax.value_and_grad(loss_fn)(state.params)
        state = state.apply_gradients(grads=grads)
        ema = optax.incremental_update(state.params, state.ema, 0.1)
        return state.replace(ema=ema), value

    state = Averaged.create(
        apply_fn=predict, params=weights(), tx=optax.sgd(0.1), ema=weights()
    )
    with pytest.raises(ValueError, match=r"follow=\('ema',\)"):
        oialr.wrap(state, train_step, *batch(0), delay=2)
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh("data=8"))
    state, step = oialr.wrap(
        state, train_step, *batch(0), delay=2, follow="ema", layout=layout
    )
    for t in range(4):
        state, _ = step(state, *layout.put_batch(batch(t), 16))
    assert oialr.ranks(state.ema) == oialr.ranks(state.params) != {}
    assert len(state.params["head"].sharding.device_set) == 8


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Own:
    """A state of one's own: no `.tx` and no `.apply_fn`."""

    step: Any
    params: Any
    opt_state: Any

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def test_wrap_of_another_state_and_a_model_function_by_another_name():
    tx = oialr.freeze_bases(optax.adamw(1e-2))
    forward = oialr.factored(predict)

    def step_with(model):
        def train_step(state, x, y):
            value, grads = jax.value_and_grad(
                lambda params: jnp.mean((model(params, x) - y) ** 2)
            )(state.params)
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return Own(state.step + 1, params, opt_state), value

        return train_step

    begin = Own(0, weights(), tx.init(weights()))
    matrices = oialr.select(oialr.find_matrices(predict, weights(), X))
    with pytest.raises(ValueError, match=r"no `\.tx`: give wrap\(\.\.\., tx=tx\)"):
        oialr.wrap(begin, step_with(forward), *batch(0), delay=2)
    options = {"delay": 2, "tx": tx}
    with pytest.raises(ValueError, match=r"write state\.apply_fn.*factored\(model"):
        oialr.wrap(begin, step_with(predict), *batch(0), **options)
    with pytest.raises(ValueError, match=r"wrap the function that applies the model"):
        oialr.wrap(begin, step_with(predict), *batch(0), **options, select=matrices)
    state, step = oialr.wrap(begin, step_with(forward), *batch(0), **options)
    assert step._matrices == matrices
    for t in range(4):
        state, _ = step(state, *batch(t))
    assert len(oialr.ranks(state.params)) == 2


def test_wrap_says_what_is_wrong_with_its_arguments():
    with pytest.raises(ValueError, match=r"train_step\(state\) fails.*missing 1"):
        oialr.wrap(flax_state(), flax_step, delay=2)
    with pytest.raises(TypeError, match=r"no `\.step`: it is a dict"):
        oialr.wrap({}, flax_step, images(0), delay=2)
    with pytest.raises(ValueError, match=r"give steps=.*or delay="):
        oialr.wrap(flax_state(), flax_step, images(0))
    with pytest.raises(ValueError, match=r"least is budget="):
        oialr.wrap(flax_state(), flax_step, images(0), delay=2, budget=0.01)


# A stranger's first result


def source(name):
    return (TUTORIALS / f"{name}.py").read_text()


def ran(code):
    """A program in a process of its own, as a user runs it."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    root = str(pathlib.Path(oialr.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=env | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )


FIRST = ("equinox_mlp", "linen_cnn", "nnx_cnn", "nnx_mlp")


@pytest.mark.parametrize("name", FIRST)
def test_the_first_result_of_a_stranger_takes_a_few_lines(name):
    dense, low_rank = source(f"{name}_dense"), source(name)
    diff = list(difflib.ndiff(dense.splitlines(), low_rank.splitlines()))
    added = [x[2:] for x in diff if x.startswith("+ ") and len(x) > 2]
    reported = [x for x in added if x.startswith(("counts = ", 'print("stored"'))]
    assert len(reported) == 2
    assert 0 < len(added) - len(reported) <= (4 if name == "nnx_cnn" else 8)


@pytest.mark.long
@pytest.mark.parametrize("name", FIRST)
def test_the_first_result_of_a_stranger(name):
    done = ran(source(name))
    assert done.returncode == 0, done.stderr
    _, accuracy, _, stored = done.stdout.split()
    assert float(accuracy) > 0.87  # dense: 0.92 to 0.94
    assert float(stored) <= 0.3


@pytest.mark.parametrize(
    ("name", "right", "wrong", "match"),
    [
        ("linen_cnn", ", steps=300", "", "give steps=, the length of the run"),
        ("nnx_cnn", "    @oialr.factored\n", "", "write @oialr_jax.factored above"),
        pytest.param(
            "nnx_mlp",
            ", extra=rest",
            "",
            "give run.init the params of the model and",
            marks=pytest.mark.long,
        ),
        (
            "equinox_mlp",
            "init(params",
            "init(model",
            "eqx.partition(model, eqx.is_inexact",
        ),
    ],
    ids=["linen_cnn", "nnx_cnn", "nnx_mlp", "equinox_mlp"],
)
def test_the_first_mistake_of_a_stranger(name, right, wrong, match):
    assert right in source(name)
    done = ran(source(name).replace(right, wrong))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(("ValueError: ", "TypeError: "))
    assert match in last
