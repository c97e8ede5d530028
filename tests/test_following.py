"""Trees beside the params: they follow events, or are refused before a step runs."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import nnx
from flax.training.train_state import TrainState

import oialr_jax as oialr
from oialr_jax.lowrank import Axes, factor, is_low_rank, named_leaves
from oialr_jax.matrices import Matrix
from oialr_jax.transform import with_trainable

AXES = Axes((6, 5), (), (0,), (1,))
RATE = 0.3


class State(TrainState):
    ema: Any = None


def fn(params, x):
    return jnp.tanh(x @ params["a"]["w"]) @ params["b"]["w"]


def begun(lag=0, follow=("ema",), ema=lambda x: x, step=None, jit=jax.jit, **options):
    """A state whose params and average differ, and its step."""
    params = {"a": {"w": normal(0, 6, 5)}, "b": {"w": normal(1, 5, 4)}}
    average = jax.tree.map(lambda x: x + 0.1 * normal(9, *x.shape), params)
    tx = oialr.freeze_bases(optax.sgd(0.1))
    state = State.create(apply_fn=None, params=params, tx=tx, ema=ema(average))
    state = jax.device_put(state.replace(step=jnp.zeros((), jnp.int32)))
    matrices = oialr.find_matrices(fn, params, batch())
    forward = oialr.factored(fn)

    def train_step(state, x):
        def loss(params):
            return jnp.mean((forward(params, x) - 1) ** 2)

        value, grads = oialr.value_and_grad(loss)(state.params)
        state = state.apply_gradients(grads=grads)
        if follow:
            new = optax.incremental_update(ema(state.params), state.ema, RATE)
            state = state.replace(ema=new)
        return state, value

    schedule = oialr.Schedule(delay=2, every=2, layer_step=1.0, lag=lag)
    step = oialr.adaptive(
        train_step if step is None else step,
        tx,
        matrices,
        schedule,
        oialr.RankRule(cutoff=0.25, min_rank_share=0.5),
        follow=follow,
        jit=jit,
        **options,
    )
    return state, step


def batch():
    return normal(5, 8, 6)


def dense(tree):
    return jax.device_get(oialr.materialize(tree))


def projected(w, node):
    """W in the span of a node's bases, in float64."""
    u, v = np.asarray(node.u, np.float64), np.asarray(node.vt, np.float64).T
    return u @ (u.T @ np.asarray(w, np.float64) @ v) @ v.T


def low_rank(seed, rank, w=None):
    return factor(normal(seed, 6, 5) if w is None else w, AXES, rank)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", ["dense", "node", "others_axes"])
def test_rebase_gives_the_nearest_matrix_in_the_span(kind, jitted):
    node = low_rank(0, 3)
    swapped = Axes((6, 5), (), (1,), (0,))
    leaf = {
        "dense": normal(1, 6, 5),
        "node": low_rank(1, 4),
        "others_axes": factor(normal(1, 6, 5), swapped, 4),
    }[kind]
    verb = jax.jit(oialr.following.rebase) if jitted else oialr.following.rebase
    tree = {"step": jnp.arange(3), "mine": [{"w": leaf, "x": normal(2, 6, 5)}]}
    found = verb(tree, {"w": node, "y": normal(3, 2)})
    new = found["mine"][0]["w"]
    wanted = projected(dense(leaf), node)
    np.testing.assert_allclose(new.materialize(), wanted, atol=1e-5)
    assert jax.tree.structure(new) == jax.tree.structure(node)
    np.testing.assert_array_equal(new.u, node.u)
    assert new.u.unsafe_buffer_pointer() != node.u.unsafe_buffer_pointer()
    np.testing.assert_array_equal(found["mine"][0]["x"], normal(2, 6, 5))
    optax.incremental_update(found["mine"][0]["w"], node, 0.5)


def test_rebase_leaves_what_is_no_copy_of_the_parameter():
    node = low_rank(0, 3)
    params = {"w": node, "head": {"w": normal(1, 6, 5)}}
    mask = {"w": jnp.ones((6, 5), bool)}
    tree = {"mask": mask, "w": jnp.ones(6), "head": {"w": node}, "fn": jnp.tanh}
    new = oialr.following.rebase(tree, params)
    assert new["mask"]["w"] is mask["w"]
    assert new["w"] is tree["w"]  # another shape
    assert new["fn"] is jnp.tanh
    np.testing.assert_allclose(new["head"]["w"], node.materialize())  # the owner's kind
    again = oialr.following.rebase({"w": node}, params)
    assert again["w"] is node  # in these bases already


def test_nodes_of_different_bases_are_not_combined():
    w = normal(0, 6, 5)
    tx = oialr.freeze_bases(optax.sgd(0.1))
    matrices = [Matrix("w", AXES, rows=1, kind="dot")]
    params, state, _ = oialr.factorize({"w": w}, tx.init({"w": w}), matrices, tx=tx)
    other, _, _ = oialr.factorize({"w": w + 0.1}, state, matrices, tx=tx)
    with pytest.raises(
        ValueError, match=r"oialr_jax\.following\.rebase\(tree, params\)"
    ):
        optax.incremental_update(params, other, 0.1)
    jax.tree.map(jnp.add, params, jax.grad(lambda p: p["w"].s.sum())(params))
    turned, state, _ = oialr.truncate(
        with_trainable(params, {"w": params["w"].s + 0.01}),
        state,
        {"w": 5},
        tx=tx,
    )
    with pytest.raises(
        ValueError, match=r"oialr_jax\.following\.rebase\(tree, params\)"
    ):
        jax.tree.map(lambda p, q: jnp.where(True, p, q), turned, params)
    average = optax.incremental_update(
        turned, oialr.following.rebase(params, turned), 0.1
    )
    wanted = 0.1 * dense(turned)["w"] + 0.9 * dense(params)["w"]
    np.testing.assert_allclose(average["w"].materialize(), wanted, atol=1e-5)
    same, _, _ = oialr.factorize({"w": w}, tx.init({"w": w}), matrices, tx=tx)
    assert jax.tree.structure(same) == jax.tree.structure(params)  # deterministic


NESTED = {
    "plain": lambda x: x,
    "nested": lambda x: {"deep": (x, [jax.tree.map(jnp.copy, x)])},
    "optax": lambda x: optax.EmaState(jnp.zeros((), jnp.int32), x),
}


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("lag", [0, 1])
def test_an_average_follows_conversion_and_truncation(kind, lag):
    state, step = begun(lag, ema=NESTED[kind])
    for i in range(7):
        before = dense(state.ema)
        state, _ = step(state, batch())
        assert jax.tree.structure(state.ema) == jax.tree.structure(
            NESTED[kind](state.params)
        )
        old, new, params, nodes = (
            [x for x in jax.tree.leaves(t, is_leaf=is_low_rank) if x.ndim == 2]
            for t in (before, dense(state.ema), dense(state.params), state.ema)
        )
        params = params * (len(new) // len(params))
        for w, after, p, node in zip(old, new, params, nodes, strict=True):
            w = projected(w, node) if is_low_rank(node) else w
            wanted = (1 - RATE) * w + RATE * p
            np.testing.assert_allclose(after, wanted, atol=2e-5, err_msg=str(i))
        if not lag:
            assert bool(oialr.ranks(state.params)) == (i >= 2)
    assert len(step.reports) >= 2
    assert step.compilations <= 5


def test_events_that_cut_nothing_compile_no_step_and_change_the_bases():
    state, step = begun()
    step._rule = oialr.RankRule(cutoff=0.0)
    seen = set()
    for _ in range(7):
        state, _ = step(state, batch())
        bases = [getattr(x["a"]["w"], "basis", 0) for x in (state.params, state.ema)]
        assert bases[0] == bases[1]
        seen.add(bases[0])
    assert len(seen) == 4  # dense, and after the events at 2, 4 and 6
    assert step.compilations == 2


def test_a_tree_that_stayed_behind_is_refused_before_the_step():
    def own(state, x, other=None):
        state, value = train(state, x)
        return state, value if other is None else value + oialr.factored(fn)(other, x)

    train = begun(follow=())[1]._step
    state, step = begun(follow=(), step=own)
    for _ in range(3):
        state, _ = step(state, batch())
    state = state.replace(ema=jax.tree.map(jnp.copy, state.params))  # best so far
    state, _ = step(state, batch())
    kept = state
    with pytest.raises(ValueError, match=r"state\.ema/a/w is in bases.*step 4.*follow"):
        step(state, batch())
    assert not kept.params["a"]["w"].s.is_deleted()
    state = state.replace(ema=None)
    target = jax.tree.map(jnp.copy, state.params)
    with pytest.raises(ValueError, match=r"argument 3 has a/w in bases.*follow"):
        step(state, batch(), target)
    with pytest.raises(ValueError, match=r"`other` has a/w in bases"):
        step(state, batch(), other=target)


def test_cores_beside_the_params_are_refused():
    state, step = begun()
    for _ in range(3):
        state, _ = step(state, batch())
    state = state.replace(
        ema=oialr.transform.trainable(jax.tree.map(jnp.copy, state.params))
    )
    state = state.replace(step=jnp.asarray(4, jnp.int32))
    with pytest.raises(ValueError, match="looks like the core of a/w"):
        step(state, batch())


def test_a_layout_places_what_follows():
    mesh = oialr.sharding.make_mesh("fsdp=2", jax.devices()[:2])
    layout = oialr.sharding.Layout(mesh, min_size=1)
    state, step = begun(layout=layout)
    state = jax.device_put(state, layout(state))
    for _ in range(3):
        state, _ = step(state, batch())
    places = named_leaves(layout(state.params))
    for name, node in named_leaves(state.ema).items():
        assert node.u.sharding.is_equivalent_to(places[name].u, 2)


def test_a_run_is_silent_under_the_transfer_guard():
    state, step = begun(lag=1)
    x = jax.device_put(batch())
    with jax.transfer_guard("disallow"):
        for _ in range(5):
            state, _ = step(state, x)
    assert len(step.reports) == 1


@pytest.mark.parametrize("lag", [0, 1])
def test_a_run_leaks_no_tracer(lag):
    state, step = begun(lag)
    with jax.checking_leaks():
        for _ in range(4):
            state, _ = step(state, batch())
    assert oialr.ranks(state.params)


@pytest.mark.parametrize("jit", [nnx.jit, lambda fn: jax.jit(fn)], ids=["nnx", "bare"])
def test_other_compilers_of_the_step(jit):
    state, step = begun(lag=1, jit=jit)
    for _ in range(4):
        state, _ = step(state, batch())
    assert step.compilations == 2


class Whole(eqx.Module):
    step: Any
    params: Any
    opt_state: Any

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_whole_equinox_module_trains_under_filter_jit(lag):
    model = eqx.nn.MLP(6, 4, width_size=5, depth=2, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)

    def forward(model, x):
        return jax.vmap(model)(x)

    matrices = oialr.find_matrices(
        lambda p, x: forward(eqx.combine(p, static), x), arrays, batch()
    )
    low = oialr.factored(forward)
    tx = oialr.freeze_bases(optax.adam(1e-2))

    def train_step(state, x):
        def loss(model):
            return jnp.mean((low(model, x) - 1) ** 2)

        value, grads = eqx.filter_value_and_grad(loss)(state.params)
        params = eqx.filter(state.params, eqx.is_array)
        updates, opt_state = tx.update(grads, state.opt_state, params)
        return Whole(
            state.step + 1, eqx.apply_updates(state.params, updates), opt_state
        ), value

    schedule = oialr.Schedule(delay=1, every=2, lag=lag)
    arguments = train_step, tx, matrices, schedule
    with pytest.raises(ValueError, match="no option of filter_jit"):
        oialr.adaptive(*arguments, jit=eqx.filter_jit, donate_argnums=0)
    step = oialr.adaptive(*arguments, jit=eqx.filter_jit)
    state = Whole(jnp.asarray(0), model, tx.init(arrays))
    losses = []
    for _ in range(4):
        state, value = step(state, batch())
        losses.append(float(value))
    assert len(oialr.ranks(eqx.filter(state.params, eqx.is_array))) == 3
    assert losses[-1] < losses[0]
    assert state.params.activation is model.activation
    assert step.compilations <= 3
