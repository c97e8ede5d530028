"""adaptive(): a drop-in for jax.jit(train_step) that takes Flax's TrainState."""

import contextlib
import dataclasses
import gc
import importlib
import threading
import weakref
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import nnx, struct
from flax.training.train_state import TrainState
from helpers import assert_close
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import oialr_jax as oialr
from oialr_jax import decompose, ranking, surgery
from oialr_jax.due import Due
from oialr_jax.lowrank import Axes, is_low_rank, named_leaves
from oialr_jax.matrices import Matrix
from oialr_jax.projection import project_to_rank
from oialr_jax.stability.settled import reference_of
from oialr_jax.transform import pending_ranks

SCHEDULE = oialr.Schedule(delay=4, every=3, layer_step=0.5)
RULE = oialr.RankRule(cutoff=0.3)


def fn(params, x):
    for name in ("a", "b", "c"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"].reshape(1, -1))
    return x @ params["head"]


def problem(tx=None, **options):
    params = {
        name: {"kernel": normal(i, 16, 16), "bias": jnp.zeros(16)}
        for i, name in enumerate("abc")
    }
    params["head"] = normal(7, 16, 4)
    tx = oialr.freeze_bases(optax.adamw(1e-2) if tx is None else tx)
    state = TrainState.create(apply_fn=fn, params=params, tx=tx)
    x = normal(3, 32, 16)
    matrices = oialr.select(oialr.find_matrices(fn, params, x))
    forward = oialr.factored(fn)

    def train_step(state, x, y):
        def loss(params):
            return jnp.mean((forward(params, x) - y) ** 2)

        value, grads = oialr.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), {"loss": value}

    options = {"schedule": SCHEDULE, "rule": RULE} | options
    return state, oialr.adaptive(train_step, tx, matrices, **options), train_step


def copied(tree):
    """A tree of its own: the step uses up the state that it is given."""
    return jax.tree.map(jnp.array, tree)


def batch(i):
    x = normal(100 + i, 32, 16)
    return x, jnp.sin(3 * x[:, :4])


def run(state, step, begin, end):
    losses = []
    for i in range(begin, end):
        state, metrics = step(state, *batch(i))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_dense_until_the_delay_then_low_rank_last_layers_first():
    state, step, train_step = problem()
    dense, plain_losses = run(state, jax.jit(train_step), 0, 4)
    state, losses = run(state, step, 0, 4)
    assert losses == plain_losses
    assert oialr.ranks(state.params) == {}
    jax.tree.map(np.testing.assert_array_equal, state.params, dense.params)

    state, losses = run(state, step, 4, 14)
    assert all(np.isfinite(losses))
    events = [(r.step, r.kind, [x.path for x in r.layers]) for r in step.reports]
    a, b, c = ("a/kernel", "b/kernel", "c/kernel")
    assert events == [
        (4, "conversion", [a, b, c]),
        (4, "truncation", [c]),
        (7, "truncation", [b, c]),
        (10, "truncation", [a, b, c]),
        (13, "truncation", [a, b, c]),
    ]
    assert all(rank < 16 for _, _, rank in oialr.ranks(state.params).values())
    assert int(state.step) == 14


def test_a_conversion_with_a_cut_decomposes_every_matrix_once(monkeypatch):
    asked = []
    real = decompose._solved_group

    def spy(arrays, sides, axes, vectors, rank):
        asked.append((len(arrays), vectors))
        return real(arrays, sides, axes=axes, vectors=vectors, rank=rank)

    monkeypatch.setattr(decompose, "_solved_group", spy)
    state, step, _ = problem()
    run(state, step, 0, 5)
    assert [x.kind for x in step.reports] == ["conversion", "truncation"]
    assert asked == [(3, True)]


def test_compiles_once_per_set_of_shapes():
    state, step, _ = problem(rule=oialr.RankRule(cutoff=0.0))
    run(state, step, 0, 14)
    assert len(step.reports) == 5
    assert step.compilations == 2  # dense, full rank: no later event cut anything


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit():
    state, step, _ = problem()
    middle, _ = run(state, step, 0, 7)  # the next call has an event
    copy = copied(middle)
    whole, losses = run(middle, step, 7, 12)
    _, fresh_step, _ = problem()
    resumed, resumed_losses = run(copy, fresh_step, 7, 12)
    assert resumed_losses == losses
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.opt_state, whole.opt_state)


def test_a_state_put_back_is_noticed():
    """The step number is that of the state given, whatever ran before."""
    state, step, _ = problem()
    run(copied(state), step, 0, 8)
    again, _ = run(state, step, 0, 4)
    assert oialr.ranks(again.params) == {}
    run(again, step, 4, 5)
    assert [r.step for r in step.reports] == [4, 4, 7, 4, 4]


def test_a_call_of_several_steps_misses_no_event():
    state, _, train_step = problem()

    def scanned(state, xs, ys):
        state, metrics = jax.lax.scan(lambda s, xy: train_step(s, *xy), state, (xs, ys))
        return state, metrics

    state, step, _ = problem()
    step = oialr.adaptive(
        scanned, state.tx, step._matrices, SCHEDULE, RULE, steps_per_call=5
    )
    for i in range(0, 15, 5):
        xs, ys = zip(*[batch(j) for j in range(i, i + 5)], strict=True)
        state, _ = step(state, jnp.stack(xs), jnp.stack(ys))
    # updates 0, 1, 2 are due at 4, 7, 10: seen at the calls of steps 5 and 10
    assert [(r.step, r.kind) for r in step.reports] == [
        (5, "conversion"),
        (5, "truncation"),
        (10, "truncation"),
    ]
    assert len(step.reports[-1].layers) == 3


def test_jit_options_and_a_step_that_returns_the_state_alone():
    state, step, train_step = problem()

    def bare(state, x, y, scale):
        assert scale == 1
        return train_step(state, x, y)[0]

    state = jax.tree.map(jnp.array, state)
    step = oialr.adaptive(
        bare,
        state.tx,
        step._matrices,
        SCHEDULE,
        RULE,
        donate_argnums=0,
        static_argnames="scale",
    )
    first = state.params["a"]["kernel"]
    for i in range(6):
        state = step(state, *batch(i), scale=1)
    assert first.is_deleted()
    assert len(oialr.ranks(state.params)) == 3


def test_a_cut_after_a_warm_up_costs_little():
    """Same data, same optimizer; a quarter of the ranks goes."""
    schedule = oialr.Schedule(delay=20, every=15, layer_step=0.5)
    state, step, train_step = problem(
        schedule=schedule, rule=oialr.RankRule(cutoff=0.2)
    )
    _, dense = run(state, jax.jit(train_step), 0, 80)
    state, low = run(state, step, 0, 80)
    assert sum(rank for *_, rank in oialr.ranks(state.params).values()) < 40
    assert np.mean(low[-10:]) < 1.5 * np.mean(dense[-10:])


# Ranks chosen ahead of their event

AHEAD = oialr.Schedule(delay=4, every=6, layer_step=0.5, lag=3)


def test_with_a_lag_an_event_has_the_ranks_that_were_chosen_before_it():
    state, step, _ = problem(schedule=AHEAD)
    state, _ = run(state, step, 0, 4)
    dense = copied(state.params)
    matrices = step._matrices
    chosen = ranking.choose(dense, RULE, matrices[-1:])
    chosen |= {x.path: 16 for x in matrices[:-1]}
    state, _ = run(state, step, 4, 7)
    assert oialr.ranks(state.params) == {}
    assert pending_ranks(state.params, state.opt_state) == chosen
    state, _ = run(state, step, 7, 8)
    assert {k: r for k, (*_, r) in oialr.ranks(state.params).items()} == chosen
    assert chosen["c/kernel"] < 16
    assert pending_ranks(state.params, state.opt_state) == {}

    state, _ = run(state, step, 8, 10)
    chosen = ranking.choose(copied(state.params), RULE, matrices[1:])
    state, losses = run(state, step, 10, 14)
    ranks = {k: r for k, (*_, r) in oialr.ranks(state.params).items()}
    assert ranks == {"a/kernel": 16} | chosen
    assert [(r.step, r.kind) for r in step.reports] == [
        (7, "conversion"),
        (13, "truncation"),
    ]
    assert all(np.isfinite(losses))
    assert [(x.step, x.choosing > 0, x.surgery > 0) for x in step.timings] == [
        (4, True, False),
        (7, False, True),
        (10, True, False),
        (13, False, True),
    ]


@pytest.mark.parametrize("verb", ["choose", "apply_ranks"])
def test_steps_still_running_are_not_timed_as_the_event(verb, monkeypatch):
    schedule = oialr.Schedule(delay=2, every=2, lag=1)
    state, _, train_step = problem()
    matrices = oialr.select(oialr.find_matrices(fn, state.params, batch(0)[0]))

    def slow(state, x, y):
        state, metrics = train_step(state, x, y)
        spent = jax.lax.fori_loop(0, 3000, lambda _, z: jnp.tanh(z @ z), jnp.eye(128))
        params = jax.tree.map(lambda p: p + 0 * spent[0, 0], state.params)
        return state.replace(params=params), metrics

    step = oialr.adaptive(slow, state.tx, matrices, schedule, RULE)
    room = importlib.import_module("oialr_jax.adaptive")
    real, ready = getattr(room, verb), []

    def watched(params, *args, **kwargs):
        arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
        ready.append(all(x.is_ready() for x in arrays))  # of none ahead of time
        return real(params, *args, **kwargs)

    monkeypatch.setattr(room, verb, watched)
    for i in range(6):
        state, _ = step(state, *batch(i))
    assert len(ready) >= 2
    assert all(ready)


@pytest.mark.parametrize("middle", [4, 5, 6, 7, 11, 12])
def test_a_run_resumed_between_choice_and_event_is_the_uninterrupted_one(middle):
    state, step, _ = problem(schedule=AHEAD)
    before, _ = run(state, step, 0, middle)
    copy = copied(before)
    whole, losses = run(before, step, middle, 15)
    _, fresh, _ = problem(schedule=AHEAD)
    resumed, resumed_losses = run(copy, fresh, middle, 15)
    assert resumed_losses == losses
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert len(step.reports) == 2


def compiled_by_main_thread(fn):
    """fn(), and how many programs this thread compiled in it."""
    main, found = threading.get_ident(), []

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            found.append(threading.get_ident())

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        fn()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return found.count(main)


@pytest.mark.parametrize("middle", [4, 11], ids=["whole", "resumed"])
@pytest.mark.parametrize("turn", [1, -1], ids=["tree order", "another order"])
def test_nothing_is_compiled_at_an_event_whose_ranks_were_chosen_before(middle, turn):
    """Two events; a fresh process that finds ranks waiting compiles ahead as well."""

    def begun():
        state, step, train_step = problem(schedule=AHEAD)
        matrices = step._matrices[::turn]  # not always as the tree has them
        return state, oialr.adaptive(train_step, state.tx, matrices, AHEAD, RULE)

    jax.clear_caches()
    state, step = begun()
    state, _ = run(state, step, 0, middle)
    if middle > 4:
        jax.clear_caches()
        _, step = begun()
    for i in range(middle, 14):
        args = batch(i)

        def call(args=args):
            nonlocal state
            state, _ = step(state, *args)
            jax.block_until_ready(state)

        count = compiled_by_main_thread(call)
        if i in (7, 13):
            assert count == 0
        if i == middle:
            assert count > 0  # the listener hears
    assert len(step.reports) == (2 if middle == 4 else 1)


@pytest.mark.parametrize("place", ["device", "mesh", "context"])
def test_nor_where_the_state_has_a_fixed_place_as_after_a_restore(place):
    """Committed to a device, or to a mesh, by itself or in the context of the loop."""
    jax.clear_caches()
    where = onto = jax.devices()[1]
    context = contextlib.nullcontext()
    if place != "device":
        mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))
        where = NamedSharding(mesh, PartitionSpec())
        onto = NamedSharding(mesh, PartitionSpec("x"))
    if place == "context":
        context = jax.set_mesh(mesh)
    state, step, train_step = problem(schedule=AHEAD)

    def constrained(state, x, y):  # a bare spec has a meaning in the context only
        x = jax.lax.with_sharding_constraint(x, PartitionSpec("x"))
        return train_step(state, x, y)

    chosen = constrained if place == "context" else train_step
    step = oialr.adaptive(chosen, state.tx, step._matrices, AHEAD, RULE)
    state = jax.device_put(state, where)
    with context:
        for i in range(14):
            args = jax.device_put(batch(i), onto)

            def call(args=args):
                nonlocal state
                state, _ = step(state, *args)
                jax.block_until_ready(state)

            count = compiled_by_main_thread(call)
            assert (count > 0) == (i in (0, 4)), i  # the first call, the first choice
    assert [r.step for r in step.reports] == [7, 13]
    assert step.compilations == 3


@pytest.mark.parametrize("count", [1, 3, 8])
def test_nor_where_long_matrices_go_by_their_gram_matrix(count):
    """On one device and on several, which come to the same."""
    jax.clear_caches()
    axes = Axes((12, 40), (), (0,), (1,))
    names = [f"w{i}" for i in range(5)]
    matrices = [Matrix(name, axes, rows=1, kind="dot") for name in names]
    params = {name: normal(i, 12, 40) for i, name in enumerate(names)}
    ranks = {name: 3 + i % 2 for i, name in enumerate(names)}
    tx = oialr.freeze_bases(optax.adam(0.1))
    state = tx.init(params)
    expected, _, _ = surgery.apply_ranks(params, state, matrices, ranks, tx=tx)
    jax.clear_caches()
    mesh = jax.make_mesh(
        (count,), ("x",), (AxisType.Auto,), devices=jax.devices()[:count]
    )
    params, state = jax.device_put(
        (params, state), NamedSharding(mesh, PartitionSpec())
    )
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        (params, state),
    )
    surgery.compile_ahead(*shapes, matrices, ranks, tx=tx)

    def event():
        nonlocal params
        params, *rest = surgery.apply_ranks(params, state, matrices, ranks, tx=tx)
        jax.block_until_ready((params, rest[0]))

    assert compiled_by_main_thread(event) == 0
    assert {name: node.rank for name, node in params.items()} == ranks
    assert_close(params, expected, 1e-5)


def test_without_a_lag_the_event_compiles():
    jax.clear_caches()
    state, step, _ = problem()
    state, _ = run(state, step, 0, 4)
    assert compiled_by_main_thread(lambda: step(state, *batch(4))) > 0


@pytest.mark.parametrize("schedule", [SCHEDULE, AHEAD], ids=["no-lag", "lag"])
def test_compilations_stay_within_the_bound_of_the_schedule(schedule):
    rule = oialr.RankRule(cutoff=0.9, multiple=8)
    state, step, _ = problem(schedule=schedule, rule=rule)
    run(state, step, 0, 40)
    sides = [min(x.m, x.n) for x in step._matrices]
    bound = schedule.compilations(40, rule, sides)
    assert bound == 1 + 1 + 3  # dense, conversion, three falls from 16 to 8
    assert bound < schedule.compilations(40)
    assert 1 < step.compilations <= bound


def test_what_fails_in_the_background_is_raised_at_the_event():
    state, step, train_step = problem(schedule=AHEAD)

    def fails(state, x, y):
        if oialr.ranks(state.params):
            raise RuntimeError("no low rank today")
        return train_step(state, x, y)

    step = oialr.adaptive(fails, state.tx, step._matrices, AHEAD, RULE)
    state, _ = run(state, step, 0, 7)
    with pytest.raises(RuntimeError, match="no low rank today"):
        step(state, *batch(7))


def test_a_failure_of_the_background_alone_is_raised_as_well(monkeypatch):
    def fails(*args, **options):
        raise MemoryError("no room to compile")

    module = importlib.import_module("oialr_jax.adaptive")  # not the function
    monkeypatch.setattr(module, "compile_ahead", fails)
    state, step, _ = problem(schedule=AHEAD)
    state, _ = run(state, step, 0, 7)
    with pytest.raises(MemoryError, match="no room to compile"):
        step(state, *batch(7))


def test_a_matrix_that_is_not_finite_when_ranks_are_chosen_is_left_as_it_is():
    state, step, _ = problem(schedule=AHEAD)
    state, _ = run(state, step, 0, 10)
    node = state.params["c"]["kernel"]
    broken = oialr.LowRank(node.u, node.s.at[0, 0].set(jnp.inf), node.vt, node.axes)
    params = copied({**state.params, "c": {**state.params["c"], "kernel": broken}})
    state, _ = step(state.replace(params=params), *batch(10))
    assert set(pending_ranks(state.params, state.opt_state)) == {"b/kernel"}
    state, _ = run(state, step, 11, 14)
    assert [x.path for x in step.reports[-1].layers] == ["b/kernel"]


def test_a_matrix_that_is_no_longer_finite_at_the_event_is_left_as_it_is():
    state, step, _ = problem(schedule=AHEAD)
    state, _ = run(state, step, 0, 13)
    node = state.params["c"]["kernel"]
    broken = oialr.LowRank(node.u, node.s.at[0, 0].set(jnp.inf), node.vt, node.axes)
    params = copied({**state.params, "c": {**state.params["c"], "kernel": broken}})
    state, _ = step(state.replace(params=params), *batch(13))
    flags = {x.path: x.finite for x in step.reports[-1].layers}
    assert flags == {"b/kernel": True, "c/kernel": False}
    assert oialr.ranks(state.params)["c/kernel"][2] == node.rank


@pytest.mark.parametrize(
    ("stride", "first", "events"),
    [
        # chosen at 4, 10, 16 and due at 7, 13, 19: seen at 5, 10 and at 10, 15
        (5, 0, [(10, "conversion", 3), (15, "truncation", 2)]),
        # at 8 both; at 16 the choice of 10 is made up for, and that of 16 made
        (8, 0, [(8, "conversion", 3), (8, "truncation", 1), (16, "truncation", 2)]),
        # at 5 the choice of 4; at 13 the event of 7 gives way to the newer one
        (8, 5, [(13, "conversion", 3), (13, "truncation", 2)]),
    ],
    ids=["choice_then_event", "both_in_one", "overtaken"],
)
def test_a_call_may_jump_over_choices_and_events(stride, first, events):
    def scanned(state, xs, ys):
        return jax.lax.scan(lambda s, xy: train_step(s, *xy), state, (xs, ys))

    state, step, train_step = problem()
    step = oialr.adaptive(
        scanned, state.tx, step._matrices, AHEAD, RULE, steps_per_call=stride
    )
    state = state.replace(step=first)
    for i in range(first, 17, stride):
        xs, ys = zip(*[batch(j) for j in range(i, i + stride)], strict=True)
        state, _ = step(state, jnp.stack(xs), jnp.stack(ys))
        waiting = AHEAD.due(i, -1) != AHEAD.decided(i, -1)
        assert bool(pending_ranks(state.params, state.opt_state)) == waiting
    found = [(r.step, r.kind, len(r.layers)) for r in step.reports]
    assert found == events


def test_ranks_that_do_not_wait_at_their_event_are_chosen_then():
    state, step, train_step = problem(schedule=AHEAD)
    state, _ = run(state, step, 0, 4)
    state, _ = run(state, jax.jit(train_step), 4, 6)  # a loop that chooses nothing
    state, _ = run(state, step, 6, 8)
    assert [(r.step, r.kind) for r in step.reports] == [
        (7, "conversion"),
        (7, "truncation"),
    ]


def test_bases_are_not_copied_by_a_step():
    state, step, _ = problem()
    state, _ = run(state, step, 0, 5)
    given = state
    where = {
        path: (node.u.unsafe_buffer_pointer(), node.vt.unsafe_buffer_pointer())
        for path, node in named_leaves(state.params).items()
        if is_low_rank(node)
    }
    assert len(where) == 3
    state, _ = step(state, *batch(5))
    assert given.params["a"]["kernel"].u.is_deleted()
    for path, pointers in where.items():
        node = named_leaves(state.params)[path]
        found = (node.u.unsafe_buffer_pointer(), node.vt.unsafe_buffer_pointer())
        assert found == pointers


def test_a_state_that_is_dropped_is_freed():
    state, step, _ = problem()
    state, _ = run(state, step, 0, 5)
    u = weakref.ref(state.params["a"]["kernel"].u)
    assert u() is not None
    del state
    gc.collect()
    assert u() is None


def test_a_state_may_be_changed_between_calls():
    """Its step number is not fetched anew, nor are its programs compiled again."""
    state, step, _ = problem(schedule=AHEAD)
    state, _ = run(state, step, 0, 5)
    ahead = step._ahead
    assert ahead is not None
    state, _ = step(state.replace(opt_state=copied(state.opt_state)), *batch(5))
    assert step._ahead is ahead


def test_a_key_is_an_argument_like_others():
    state, step, train_step = problem(schedule=AHEAD)

    def noisy(state, x, y, key):
        return train_step(state, x + 0.01 * jax.random.normal(key, x.shape), y)

    step = oialr.adaptive(noisy, state.tx, step._matrices, AHEAD, RULE)
    key = jax.random.key(0)
    for i in range(8):
        state, _ = step(state, *batch(i), jax.random.fold_in(key, i))
    assert len(oialr.ranks(state.params)) == 3
    assert step.compilations == 2


def test_donation_can_be_declined():
    state, step, _ = problem(donate_argnums=())
    first = state.params["a"]["kernel"]
    run(state, step, 0, 6)
    assert not first.is_deleted()


# Bad input


def test_no_matrices():
    state, _, train_step = problem()
    with pytest.raises(ValueError, match="`matrices` is empty"):
        oialr.adaptive(train_step, state.tx, (), SCHEDULE)


def test_steps_per_call_must_be_true():
    with pytest.raises(ValueError, match="`steps_per_call` must be at least 1, got 0"):
        problem(steps_per_call=0)
    state, step, _ = problem(steps_per_call=2)
    said = "took `state.step` from 0 to 1; `steps_per_call` is 2"
    with pytest.raises(ValueError, match=said):
        step(state, *batch(0))


def test_an_optimizer_that_was_not_wrapped_is_refused_and_the_state_kept():
    state, step, train_step = problem()
    bare = optax.adamw(1e-2)
    state = TrainState.create(apply_fn=fn, params=state.params, tx=bare)
    step = oialr.adaptive(
        train_step, bare, step._matrices, oialr.Schedule(delay=0, every=5), RULE
    )
    with pytest.raises(ValueError, match="freeze_bases"):
        step(state, *batch(0))
    assert oialr.ranks(state.params) == {}


def test_a_nan_in_one_layer_does_not_stop_the_others():
    state, step, _ = problem()
    state, _ = run(state, step, 0, 6)
    node = state.params["b"]["kernel"]
    broken = oialr.LowRank(node.u, node.s.at[0, 0].set(jnp.nan), node.vt, node.axes)
    params = copied({**state.params, "b": {**state.params["b"], "kernel": broken}})
    state, _ = run(state, step, 6, 7)
    state, _ = step(state.replace(params=params), *batch(7))
    flags = {x.path: x.finite for x in step.reports[-1].layers}
    assert flags == {"b/kernel": False, "c/kernel": True}


# Other frameworks: params of any kind, a state of the user's own


@struct.dataclass
class State:
    """The least that `adaptive` needs: .step, .params, .opt_state, .replace."""

    step: jax.Array
    params: Any
    opt_state: Any


def build_equinox():
    model = eqx.nn.MLP(16, 4, width_size=32, depth=2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    return params, lambda p, x: jax.vmap(eqx.combine(p, static))(x)


def build_nnx():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(16, 32, rngs=rngs)
            self.b = nnx.Linear(32, 32, rngs=rngs)
            self.c = nnx.Linear(32, 4, rngs=rngs)

        def __call__(self, x):
            return self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))

    graph, params = nnx.split(Model(nnx.Rngs(0)))
    return params, lambda p, x: nnx.merge(graph, p)(x)


@pytest.mark.parametrize("build", [build_equinox, build_nnx])
def test_models_of_other_frameworks_train_in_low_rank(build):
    params, forward = build()
    tx = oialr.freeze_bases(optax.adam(1e-2))
    matrices = oialr.select(oialr.find_matrices(forward, params, batch(0)[0]))
    low_rank_forward = oialr.factored(forward)

    def train_step(state, x, y):
        def loss(params):
            return jnp.mean((low_rank_forward(params, x) - y) ** 2)

        value, grads = oialr.value_and_grad(loss)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(state.step + 1, params, opt_state), {"loss": value}

    schedule = oialr.Schedule(delay=10, every=10, layer_step=1.0)
    step = oialr.adaptive(train_step, tx, matrices, schedule, RULE)
    state = State(jnp.asarray(0), params, tx.init(params))
    state, losses = run(state, step, 0, 40)
    assert len(oialr.ranks(state.params)) == 2
    assert all(rank < min(m, n) for m, n, rank in oialr.ranks(state.params).values())
    assert losses[-1] < 0.5 * losses[0]
    dense = forward(oialr.materialize(state.params), batch(0)[0])
    assert_close(low_rank_forward(state.params, batch(0)[0]), dense, 2e-5)


SETTLING = oialr.Schedule(delay=4, every=4)


def slowing(lag=0):
    """Of three layers a never moves, b until step 6, and c until step 14."""
    rates = {
        name: optax.piecewise_constant_schedule(3.0, {end: 0.0})
        for name, end in (("a", 0), ("b", 6), ("c", 14))
    }
    tx = optax.multi_transform(
        {name: optax.sgd(rate, momentum=0.5) for name, rate in rates.items()}
        | {"head": optax.sgd(0.1)},
        lambda params: {
            name: jax.tree.map(lambda _, name=name: name, leaf)
            for name, leaf in params.items()
        },
    )
    schedule = dataclasses.replace(SETTLING, lag=lag)
    due = oialr.stability.when_settled(0.999)
    state, _, train_step = problem()
    matrices = oialr.select(oialr.find_matrices(fn, state.params, batch(0)[0]))
    tx = oialr.freeze_bases(optax.chain(tx, oialr.stability.keep_reference()))
    state = TrainState.create(apply_fn=fn, params=state.params, tx=tx)
    step = oialr.adaptive(
        train_step, tx, matrices, schedule, oialr.RankRule(cutoff=0.6), due=due
    )
    return state, step, due


def basis(w):
    u, _, vt = np.linalg.svd(np.asarray(w, np.float64))
    return u @ vt


@pytest.mark.parametrize("lag", [0, 2])
def test_layers_are_converted_when_their_basis_has_settled(lag):
    state, step, due = slowing(lag)
    kinds, dense = {}, {}
    for i in range(24):
        dense[i] = jax.device_get(oialr.materialize(state.params))
        state, _ = step(state, *batch(i))
        for name, (*_, rank) in oialr.ranks(state.params).items():
            kinds.setdefault(name, (i, rank))
    assert [(k, i) for k, (i, _) in sorted(kinds.items())] == [
        ("a/kernel", 4 + lag),
        ("b/kernel", 12 + lag),
        ("c/kernel", 20 + lag),
    ]
    assert all(rank < 16 for _, rank in kinds.values())  # cut by the same event
    assert [i for i, _ in due.scores] == [4, 8, 12, 16, 20]
    for (before, _), (now, found) in pairwise([(0, {}), *due.scores]):
        for name in "abc":
            same = name == "a" or (name == "b" and before >= 8) or before >= 16
            score = found[f"{name}/kernel"]
            assert (score >= 0.999) == same
            if not same:  # dense at both times
                p, q = (basis(dense[i][name]["kernel"]) for i in (before, now))
                np.testing.assert_allclose(score, np.sum(p * q) / 16, atol=1e-4)


def few(pushed, others):
    """Values of a parameter: some for every push, all of them in full."""
    return [*pushed, *(pytest.param(x, marks=pytest.mark.long) for x in others)]


@pytest.mark.parametrize("middle", few([5, 13], [3, 7, 17]))
def test_a_run_that_waits_for_stability_can_be_resumed(middle):
    state, step, _ = slowing(lag=2)
    before, _ = run(state, step, 0, middle)
    kept = copied(before)
    whole, losses = run(before, step, middle, 24)
    _, fresh, _ = slowing(lag=2)
    resumed, again = run(kept, fresh, middle, 24)
    assert again == losses
    assert jax.tree.structure(resumed.params) == jax.tree.structure(whole.params)
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_reference_turns_with_the_bases():
    """It is the matrix of the update before, in the coordinates of the core."""
    state, step, _ = slowing()
    state, _ = run(state, step, 0, 12)
    reference = jax.device_get(state.params["b"]["kernel"])  # dense at step 12
    state, _ = run(state, step, 12, 13)
    node = state.params["b"]["kernel"]
    kept = reference_of(state.opt_state)["b"]["kernel"]
    assert_close(kept, node.u.T @ reference @ node.vt.T, 1e-5)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (oialr.RankRule(cutoff=0.6), r"chain\(tx, oialr_jax.stability.keep_reference"),
        (oialr.RankRule(budget=3 * 4 * (32 + 4)), "`budget` is shared by all matrices"),
    ],
    ids=["no_reference", "a_budget"],
)
def test_what_settling_needs_is_said_before_the_first_step(rule, message):
    due = oialr.stability.when_settled(0.999)
    state, step, _ = problem(schedule=SETTLING, rule=rule, due=due)
    for run in (step.check, step):
        with pytest.raises(ValueError, match=message):
            run(state, *batch(0))


def test_a_run_of_training_waits_for_settled_bases_too():
    """Of two layers one never moves, and is alone in low rank at the end."""

    def loss(params, x):
        return jnp.mean(jnp.tanh(jax.lax.stop_gradient(params["a"]) @ x) @ params["b"])

    due = oialr.stability.when_settled(0.999)
    run = oialr.training(
        loss,
        optax.chain(optax.sgd(100.0), oialr.stability.keep_reference()),
        schedule=oialr.Schedule(delay=2, every=3),
        rule=oialr.RankRule(cutoff=0.3),
        select={"include": "a|b"},
        due=due,
    )
    x = normal(2, 16, 16)
    state = run.init({"a": normal(0, 16, 16), "b": normal(1, 16, 16)}, x)
    for _ in range(4):
        state, _ = run.step(state, x)
    ((step, scores),) = due.scores
    assert step == 2
    assert scores["a"] > 0.999 > scores["b"]
    assert list(oialr.ranks(state.params)) == ["a"]


def test_a_chooser_of_ones_own_decides_what_is_due():
    """Update j treats matrix j alone: no state is looked at, so it is asked ahead."""

    class OneEach:
        looks_at_state = False

        def check(self, opt_state, rule):
            del opt_state, rule

        def __call__(self, state, update, matrices):
            return Due(state, matrices[: update + 1], matrices[update : update + 1])

    schedule = dataclasses.replace(SETTLING, lag=2)
    state, step, _ = problem(schedule=schedule, due=OneEach())
    state, _ = run(state, step, 0, 16)
    first = {x.path: r.step for r in reversed(step.reports) for x in r.layers}
    assert first == {"a/kernel": 6, "b/kernel": 10, "c/kernel": 14}


# --------------------------------------------------------------------- projections

PROJECTED = oialr.Schedule(delay=9, every=3, projections=range(2, 9, 3), stop=10)
BUDGET = oialr.RankRule(budget=3 * 4 * (32 + 4))


def rank_of(leaf):
    return int(np.linalg.matrix_rank(np.asarray(leaf), tol=1e-4))


def test_the_dense_warm_up_is_projected_on_schedule():
    state, step, _ = problem(schedule=PROJECTED, rule=BUDGET)
    plain, unprojected, _ = problem(
        schedule=dataclasses.replace(PROJECTED, projections=()), rule=BUDGET
    )
    matrices = oialr.select(oialr.find_matrices(fn, state.params, batch(0)[0]))
    for t in range(9):
        if t in (2, 5, 8):  # one step moves W a little
            cut = project_to_rank(state.params, BUDGET, matrices)
            ranks = [rank_of(cut[name]["kernel"]) for name in "abc"]
            assert all(0 < r < 16 for r in ranks)
            assert sum(r * (32 + r) for r in ranks) <= BUDGET.budget
            plain = plain.replace(params=copied(cut))
        state, losses = run(state, step, t, t + 1)
        plain, wanted = run(plain, unprojected, t, t + 1)
        assert losses == wanted
        jax.tree.map(np.testing.assert_array_equal, state.params, plain.params)
    assert oialr.ranks(state.params) == {}
    assert step.reports == []
    assert [x.step for x in step.timings] == [2, 5, 8]


def test_after_projections_the_conversion_is_one_event_that_loses_little():
    state, step, _ = problem(schedule=PROJECTED, rule=BUDGET)
    state, _ = run(state, step, 0, 20)
    assert [(r.step, r.kind) for r in step.reports] == [
        (9, "conversion"),
        (9, "truncation"),
    ]
    energies = [x.energy for x in step.reports[1].layers]
    plain, unprojected, _ = problem(
        schedule=dataclasses.replace(PROJECTED, projections=()), rule=BUDGET
    )
    run(plain, unprojected, 0, 20)
    others = [x.energy for x in unprojected.reports[1].layers]
    assert min(energies) > 0.95 > max(others)
    assert step.compilations == 2  # dense, and at the ranks of the budget
    stored = [r * (m + n + r) for m, n, r in oialr.ranks(state.params).values()]
    assert sum(stored) <= BUDGET.budget


def test_a_budget_counts_all_matrices_whatever_the_layer_step():
    schedule = dataclasses.replace(PROJECTED, layer_step=0.0)
    state, step, _ = problem(schedule=schedule, rule=BUDGET)
    state, _ = run(state, step, 0, 10)
    assert {x.path for x in step.reports[1].layers} == {
        "a/kernel",
        "b/kernel",
        "c/kernel",
    }


@pytest.mark.parametrize("middle", [4, 5, 9])
def test_a_run_resumed_among_projections_is_the_uninterrupted_one(middle):
    state, step, _ = problem(schedule=PROJECTED, rule=BUDGET)
    state, _ = run(state, step, 0, middle)
    copy = copied(state)
    whole, losses = run(state, step, middle, 12)
    _, fresh_step, _ = problem(schedule=PROJECTED, rule=BUDGET)
    resumed, resumed_losses = run(copy, fresh_step, middle, 12)
    assert resumed_losses == losses
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.opt_state, whole.opt_state)
