"""In-place changes of a function's arguments come back, or are refused by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import nnx
from helpers import assert_close
from jax.experimental import io_callback

import oialr_jax as oialr
from oialr_jax.lowrank import Axes, factor, is_low_rank, map_low_rank

TOLERANCE = 1e-4
AXES = Axes((6, 8), (), (0,), (1,))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.dropout(nnx.relu(self.norm(self.linear(x))), rngs=rngs)


class Model(nnx.Module):
    """A block in a list, the same or another one at its side, a counter of its own."""

    def __init__(self, rngs, wrap, shared):
        self.blocks = nnx.List([Block(rngs)])
        self.again = self.blocks[0] if shared else Block(rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))
        self.wrap = wrap

    def __call__(self, x, rngs=None):
        def call(block, x):
            return block(x, rngs)

        self.calls[...] += 1
        x = self.wrap(call)(self.blocks[0], x)
        return self.head(self.wrap(call)(self.again, x[:, :6]))


def models(wrap=lambda call: call, shared=True):
    """The model with one kernel in low rank, and the same model dense."""
    low, dense = (Model(nnx.Rngs(0), wrap, shared) for _ in range(2))
    node = factor(low.blocks[0].linear.kernel[...], AXES, 3)
    low.blocks[0].linear.kernel.set_raw_value(node)
    dense.blocks[0].linear.kernel[...] = node.materialize()
    return low, dense


def loss(model, x, y, rngs=None):
    return jnp.mean((model(x, rngs) - y) ** 2)


def state_of(model):
    """All but what is trained."""
    state = nnx.state(model, nnx.Not(nnx.Param))
    leaves = jax.tree.leaves(state)
    keys = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    return [
        jax.random.key_data(x) if key else x
        for x, key in zip(leaves, keys, strict=True)
    ]


def data():
    return normal(1, 5, 6), normal(2, 5, 3)


def jitted(fn, **options):
    return nnx.jit(lambda *args: nnx.value_and_grad(fn, **options)(*args))


WAYS = {
    "jit": jitted,
    "eager": nnx.value_and_grad,
    "jit_without_gradient": nnx.jit,
    "our_value_and_grad": lambda f: nnx.jit(lambda *a: oialr.value_and_grad(f)(*a)),
}


@pytest.mark.parametrize("way", WAYS)
def test_statistics_counters_and_masks_follow_as_in_the_dense_program(way):
    low, dense = models(shared=way != "our_value_and_grad")
    before = state_of(dense)
    ours, theirs = WAYS[way](oialr.factored(loss)), WAYS[way](loss)
    if way == "our_value_and_grad":  # the dense idiom brings changes back
        theirs = WAYS["jit"](loss)
    for _ in range(2):
        actual, desired = ours(low, *data()), theirs(dense, *data())
    assert_close(jax.tree.leaves(actual)[0], jax.tree.leaves(desired)[0], TOLERANCE)
    assert_close(state_of(low), state_of(dense), TOLERANCE)
    assert int(low.calls[...]) == 2
    changed = [np.any(a != b) for a, b in zip(before, state_of(dense), strict=True)]
    assert sum(changed) >= 4  # not vacuous: mean, var, two counters
    assert is_low_rank(low.blocks[0].linear.kernel.get_raw_value())


def test_our_value_and_grad_refuses_an_object_that_is_there_twice():
    low, _ = models()
    with pytest.raises(TypeError, match="the object is also"):
        oialr.value_and_grad(oialr.factored(loss))(low, *data())


@pytest.mark.parametrize("wrap", [nnx.remat, nnx.jit], ids=["remat", "jit"])
def test_through_transformations_within_the_model(wrap):
    low, dense = models(wrap)
    actual, desired = (
        jitted(f)(m, *data()) for f, m in ((oialr.factored(loss), low), (loss, dense))
    )
    assert_close(actual[0], desired[0], TOLERANCE)
    assert_close(state_of(low), state_of(dense), TOLERANCE)


def test_in_another_argument_with_aux_and_rngs():
    def with_aux(x, model, rngs):
        out = model(x, rngs)
        return jnp.mean(out**2), out

    low, dense = models()
    ours, theirs = nnx.Rngs(dropout=3), nnx.Rngs(dropout=3)
    options = {"argnums": 1, "has_aux": True}
    actual = jitted(oialr.factored(with_aux), **options)(data()[0], low, ours)
    desired = jitted(with_aux, **options)(data()[0], dense, theirs)
    assert_close(actual[0], desired[0], TOLERANCE)
    assert_close(state_of(low), state_of(dense), TOLERANCE)
    assert int(ours.dropout.count[...]) == int(theirs.dropout.count[...]) == 2


def test_evaluation_changes_nothing_and_a_mode_set_inside_comes_back():
    def evaluated(model, x, y):
        model.eval()
        return loss(model, x, y)

    low, dense = models()
    before = [np.asarray(x) for x in state_of(low)][:-1]
    nnx.jit(oialr.factored(evaluated))(low, *data())
    nnx.jit(evaluated)(dense, *data())
    assert low.again.dropout.deterministic
    assert dense.again.dropout.deterministic
    assert_close(state_of(low), state_of(dense), TOLERANCE)
    assert len(before) >= 4


def test_an_nnx_optimizer_trains_the_core_alone():
    low, _ = models()
    first = low.again.linear.kernel.get_raw_value()
    optimizer = nnx.Optimizer(low, oialr.freeze_bases(optax.adam(1e-2)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        value, grads = nnx.value_and_grad(oialr.factored(loss))(model, x, y)
        optimizer.update(model, grads)
        return value

    for _ in range(2):
        step(low, optimizer, *data())
    node = low.again.linear.kernel.get_raw_value()
    np.testing.assert_array_equal(node.u, first.u)
    np.testing.assert_array_equal(node.vt, first.vt)
    assert np.any(node.s != first.s)
    assert low.again.norm.mean[...].any()
    graph, params, rest = nnx.split(low, nnx.Param, ...)
    assert oialr.ranks(jax.tree.map(lambda x: x, params))
    assert_close(state_of(nnx.merge(graph, params, rest)), state_of(low), 0)


def test_discovery_and_explain_change_nothing():
    low, _ = models()
    before = [np.asarray(x) for x in state_of(low)]
    oialr.find_matrices(loss, low, *data())
    oialr.explain(loss, low, *data())
    for a, b in zip(before, state_of(low), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_low_rank_leaf_that_is_replaced_is_refused_and_not_selected():
    ran = []

    def decayed(params, x):
        jax.debug.callback(lambda: ran.append(1))
        params["w"] = 0.9 * params["w"]
        return x @ params["w"]

    params = {"w": normal(0, 6, 8)}
    (found,) = oialr.find_matrices(decayed, params, normal(1, 5, 6))
    assert found.other == ("replaced in place",)
    assert oialr.select([found], dense_last=0) == ()
    low = {"w": factor(params["w"], AXES, 3)}
    with pytest.raises(TypeError, match="w is in low rank and the function replaces"):
        oialr.factored(decayed)(low, normal(1, 5, 6))
    jax.effects_barrier()
    assert not ran


def weight():
    return factor(normal(0, 6, 8), AXES, 3)


def test_plain_containers_change_as_when_the_function_itself_runs():
    def fn(params, batch, log):
        params["sum"] = params["sum"] + batch["x"].sum()
        params["renamed"] = params.pop("w")
        params["calls"] += 1
        log.append(batch.pop("y"))
        log[0] = log[0] * 2
        return (batch["x"] @ params["renamed"]).sum()

    x = normal(1, 5, 6)
    results = []
    for w, run in ((weight(), oialr.factored(fn)), (weight().materialize(), fn)):
        params = {"w": w, "sum": jnp.zeros(()), "calls": 3}
        batch, log = {"x": x, "y": jnp.ones(2)}, [jnp.ones(())]
        results.append((run(params, batch, log), params, batch, log))
    assert is_low_rank(results[0][1]["renamed"])
    assert results[0][1]["calls"] == 4
    actual, desired = (map_low_rank(lambda x: x.materialize(), r) for r in results)
    assert_close(actual, desired, TOLERANCE)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["w", "n"], meta_fields=[]
)
@dataclasses.dataclass
class Counted:
    w: object
    n: object


@jax.tree_util.register_pytree_node_class
class Keyless(Counted):
    def tree_flatten(self):
        return (self.w, self.n), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def counting(params, x):
    params.n = params.n + 1
    return (x @ params.w).sum()


def test_attributes_are_written_where_their_names_are_known():
    params, x = Counted(weight(), jnp.zeros(())), normal(1, 5, 6)
    oialr.factored(counting)(params, x)
    assert float(params.n) == 1
    keyless = Keyless(weight(), jnp.zeros(()))
    said = "changes its argument 0 in place at 1, which cannot be written back"
    with pytest.raises(TypeError, match=said):
        oialr.factored(counting)(keyless, x)
    assert float(keyless.n) == 0


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("closed", [True, False], ids=["closed_over", "argument"])
def test_refs_are_written_once_a_call(jit, closed):
    ref, x = jax.new_ref(jnp.zeros(())), normal(1, 5, 6)

    def fn(w, ref, x):
        ref[...] += 1
        return (x @ w).sum()

    run = oialr.factored(fn)
    if closed:
        inner = oialr.factored(lambda w, x: fn(w, ref, x))
        run = jit(lambda w, _, x: inner(w, x))
    else:
        run = jit(run)
    passed = jnp.zeros(()) if closed else ref
    run(weight(), passed, x)
    run(weight(), passed, x)
    assert float(ref[...]) == 2


@pytest.mark.parametrize("jit", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_callbacks_fire_once_a_call(jit):
    fired = []

    def fn(w, x):
        jax.debug.callback(lambda: fired.append("debug"))
        io_callback(lambda: fired.append("ordered"), None, ordered=True)
        io_callback(lambda: fired.append("unordered"), None)
        return (x @ w).sum()

    run = jit(oialr.factored(fn))
    for _ in range(2):
        run(weight(), normal(1, 5, 6))
    jax.effects_barrier()
    assert sorted(fired) == ["debug"] * 2 + ["ordered"] * 2 + ["unordered"] * 2


def test_a_variable_that_is_closed_over_is_refused_by_flax():
    count = nnx.Variable(jnp.zeros(()))

    def fn(w, x):
        count[...] += 1
        return x @ w

    with pytest.raises(Exception, match="from a different trace level"):
        oialr.factored(fn)(weight(), normal(1, 5, 6))
    assert float(count[...]) == 0


def test_no_tracer_leaks_and_no_transfer_is_hidden():
    def forward(params, x):
        params["n"] = params["n"] + 1
        return ((-x) @ (-params["w"])).sum()

    params = {"w": weight(), "n": jnp.zeros(())}
    x = normal(1, 5, 6)
    step = jax.jit(oialr.value_and_grad(oialr.factored(forward)))
    with jax.checking_leaks(), jax.transfer_guard("disallow"):
        found = oialr.find_matrices(forward, params, x)
        assert oialr.select(found, dense_last=0) == tuple(found)
        oialr.explain(forward, params, x)
        step(params, x)
        oialr.materialize(params)
        oialr.counts(params)
        oialr.ranks(params)
        oialr.transform.trainable(params)
        jax.jit(oialr.lowrank.global_norm)(params)


def test_leaves_without_a_gradient_get_none():
    key = jax.random.key(0)
    params = {"w": weight(), "f": jnp.tanh, "i": jnp.arange(3), "k": key, "s": "a"}
    run = oialr.factored(lambda p, x: p["f"](x @ p["w"]).sum())
    value, grads = oialr.value_and_grad(run)(params, normal(1, 5, 6))
    assert grads["w"].shape == (3, 3)
    assert {k: v for k, v in grads.items() if v is None}.keys() == set("fiks")
    assert np.isfinite(value)
