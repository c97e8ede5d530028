"""adaptive(): a drop-in for jax.jit(train_step) that takes Flax's TrainState."""

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

import oialr_jax as oialr

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


def test_compiles_once_per_set_of_shapes():
    state, step, _ = problem(rule=oialr.RankRule(cutoff=0.0))
    run(state, step, 0, 14)
    assert len(step.reports) == 5
    assert step.compilations == 2  # dense, full rank: no later event cut anything


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit():
    state, step, _ = problem()
    middle, _ = run(state, step, 0, 7)  # the next call has an event
    whole, losses = run(middle, step, 7, 12)
    _, fresh_step, _ = problem()
    copy = jax.tree.map(jnp.array, middle)
    resumed, resumed_losses = run(copy, fresh_step, 7, 12)
    assert resumed_losses == losses
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)
    jax.tree.map(np.testing.assert_array_equal, resumed.opt_state, whole.opt_state)


def test_a_state_put_back_is_noticed():
    """The step number is that of the state given, whatever ran before."""
    state, step, _ = problem()
    run(state, step, 0, 8)
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
    params = {**state.params, "b": {**state.params["b"], "kernel": broken}}
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
    dense = forward(oialr.densify(state.params), batch(0)[0])
    assert_close(low_rank_forward(state.params, batch(0)[0]), dense, 2e-5)
