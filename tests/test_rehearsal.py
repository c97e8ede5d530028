"""What would fail at the conversion is refused on the first call, and named."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import struct
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import oialr_jax as oialr
from oialr_jax.lowrank import Axes
from oialr_jax.matrices import Matrix


class State(TrainState):
    ema: Any = None


def fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


X = normal(5, 8, 6)


def begun(*, tx=None, given=None, forward=None, after=None, compiled=True, **options):
    """A state and its step; `after` changes what the step returns."""
    params = {"a": normal(0, 6, 4), "b": normal(1, 4, 4)}
    tx = oialr.freeze_bases(optax.adam(0.1)) if tx is None else tx
    state = State.create(
        apply_fn=None, params=params, tx=tx, ema=jax.tree.map(jnp.copy, params)
    )
    forward = oialr.factored(fn) if forward is None else forward

    def train_step(state, x, *rest):
        def loss(params):
            return jnp.mean(forward(params, x) ** 2)

        value, grads = oialr.value_and_grad(loss)(state.params)
        state = state.apply_gradients(grads=grads)
        return (state if after is None else after(state, *rest)), value

    options = {"schedule": oialr.Schedule(delay=3, every=5)} | options
    matrices = options.pop("matrices", oialr.find_matrices(fn, params, X))
    return state, oialr.adaptive(
        train_step, tx if given is None else given, matrices, **options
    )


def refused(match, state, step, *args, kind=ValueError):
    with pytest.raises(kind, match=match):
        step(state, X, *args)
    assert not any(
        x.is_deleted() for x in jax.tree.leaves(state) if isinstance(x, jax.Array)
    )
    assert step.compilations == 0


def average(state):
    new = optax.incremental_update(state.params, state.ema, 0.1)
    return state.replace(ema=new)


def pulled(state, target):
    gap = jax.tree.map(lambda p, t: p - 0.1 * (p - t), state.params, target)
    return state.replace(params=gap)


def test_a_model_that_was_not_wrapped():
    refused(r"wrap the function.*oialr_jax\.factored\(forward\)", *begun(forward=fn))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tx": optax.adam(0.1)}, r"oialr_jax\.freeze_bases\(tx\)"),
        (
            {"tx": oialr.freeze_bases(oialr.freeze_bases(optax.adam(0.1)))},
            "inside of another `freeze_bases`",
        ),
        ({"given": optax.adam(0.1)}, "`tx` given to `adaptive` was not wrapped"),
        (
            {"given": oialr.freeze_bases(optax.sgd(0.1, momentum=0.9))},
            "is not a state of the `tx` given",
        ),
    ],
    ids=["unwrapped", "nested", "unwrapped_given", "another"],
)
def test_an_optimizer_that_moves_bases_or_is_another_one(options, match):
    refused(match, *begun(**options))


def test_a_tree_beside_the_params_that_does_not_follow():
    refused(r"state\.ema.*follow=\('ema',\)", *begun(after=average))
    state, step = begun(after=average, follow="ema")  # one name is enough
    for _ in range(4):
        state, _ = step(state, X)
    assert oialr.ranks(state.ema) == oialr.ranks(state.params) != {}


def test_a_tree_in_an_argument():
    state, step = begun(after=pulled)
    target = jax.tree.map(jnp.copy, state.params)
    refused(r"argument that is a copy.*follow=", state, step, target)


def test_a_field_that_is_not_there():
    refused(
        "`follow` names 'emma'.*step, params, opt_state, ema", *begun(follow=("emma",))
    )
    with pytest.raises(ValueError, match="follow an event by themselves"):
        begun(follow=("params",))


def test_a_step_that_gives_dense_params_back():
    def after(state):
        return state.replace(params=oialr.materialize(state.params))

    refused(r"returns another `state\.params`", *begun(after=after))


@pytest.mark.parametrize(
    ("matrix", "match"),
    [
        (("c", (6, 4)), "no leaf at c; there are: a, b"),
        (("a", (4, 6)), r"a has shape \(6, 4\), the matrix has \(4, 6\)"),
    ],
    ids=["path", "shape"],
)
def test_matrices_of_other_params(matrix, match):
    path, shape = matrix
    axes = Axes(shape, (), (0,), (1,))
    refused(match, *begun(matrices=[Matrix(path, axes, rows=1, kind="dot")]))


@struct.dataclass
class Other:
    params: Any
    opt_state: Any


@pytest.mark.parametrize(
    ("change", "kind", "match"),
    [
        (
            lambda s: Other(s.params, s.opt_state),
            TypeError,
            "has no `.step`: it is a O",
        ),
        (lambda s: {"params": s.params}, TypeError, r"it is a dict.*TrainState"),
        (lambda s: s.replace(step=jnp.zeros(())), TypeError, "must be an integer"),
        (lambda s: s.replace(step=jnp.zeros(3, int)), ValueError, "one step of all"),
    ],
    ids=["no_step", "dict", "float", "seeds"],
)
def test_a_state_that_is_none(change, kind, match):
    state, step = begun()
    refused(match, change(state), step, kind=kind)


@pytest.mark.parametrize("how", ["vmap", "jit", "scan"])
def test_a_call_under_a_transformation(how):
    state, step = begun()
    call = {
        "vmap": lambda: jax.vmap(step, in_axes=(None, 0))(state, X[None]),
        "jit": lambda: jax.jit(step)(state, X),
        "scan": lambda: jax.lax.scan(lambda s, x: step(s, x), state, X[None]),
    }[how]
    with pytest.raises(ValueError, match="put the transformation inside of the step"):
        call()


def test_seeds_side_by_side_are_one_state():
    """The way that the refusals name: a stack axis, one step number."""
    seeds, x = jax.vmap(fn), jnp.stack([X, X + 1, X - 1])
    stacked = {"a": normal(0, 3, 6, 4), "b": normal(1, 3, 4, 4)}
    tx = oialr.freeze_bases(optax.adam(0.1))
    state = TrainState.create(apply_fn=None, params=stacked, tx=tx)
    matrices = oialr.find_matrices(seeds, stacked, x)
    forward = oialr.factored(seeds)

    def train_step(state, x):
        value, grads = oialr.value_and_grad(
            lambda p: jnp.sum(jnp.mean(forward(p, x) ** 2, axis=(1, 2)))
        )(state.params)
        return state.apply_gradients(grads=grads), value

    step = oialr.adaptive(train_step, tx, matrices, oialr.Schedule(delay=1, every=9))
    for _ in range(2):
        state, _ = step(state, x)
    assert state.params["a"].u.shape == (3, 6, 4)


def sharded(spec):
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,), devices=jax.devices()[:2])
    state, _ = begun()
    return jax.tree.map(
        lambda x: NamedSharding(mesh, spec if np.ndim(x) == 2 else PartitionSpec()),
        state,
    )


def test_shardings_that_do_not_fit_factors():
    where = sharded(PartitionSpec("x", None))
    tx = where.tx
    options = {"tx": tx, "in_shardings": (where, None)}
    refused(
        r"`in_shardings` cannot divide.*layout=oialr_jax\.sharding\.Layout",
        *begun(**options),
    )
    options = {"tx": tx, "out_shardings": (where, None)}
    refused(r"`out_shardings` cannot divide.*layout=", *begun(**options))
    whole = sharded(PartitionSpec()).replace(tx=tx)
    state, step = begun(tx=tx, in_shardings=(whole, None))
    for _ in range(4):  # replicated shardings do fit
        state, _ = step(state, X)
    assert oialr.ranks(state.params)


def test_a_step_that_cannot_be_traced_alone_is_left_alone():
    """An axis of `jax.pmap` is not there when the step is traced by itself."""
    params = {"a": normal(0, 6, 4)}
    tx = oialr.freeze_bases(optax.sgd(0.1))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    forward = oialr.factored(lambda p, x: x @ p["a"])
    matrices = oialr.find_matrices(lambda p, x: x @ p["a"], params, X)

    def train_step(state, x):
        value, grads = oialr.value_and_grad(
            lambda p: jnp.mean(forward(p, x) ** 2), axis_name="batch"
        )(state.params)
        return state.apply_gradients(grads=grads), value

    step = oialr.adaptive(
        train_step,
        tx,
        matrices,
        oialr.Schedule(delay=9, every=9),
        jit=jax.pmap,
        axis_name="batch",
        in_axes=(None, 0),
        out_axes=None,
    )
    state, _ = step(state, X.reshape(2, 4, 6))
    assert int(state.step) == 1


def test_a_leaf_that_will_be_materialised_is_told_once():
    params = {"a": normal(0, 6, 4)}
    tx = oialr.freeze_bases(optax.sgd(0.1))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)

    def odd(params, x):
        return x @ params["a"] + jnp.sum(jnp.sort(params["a"], axis=0))

    forward = oialr.factored(odd)

    def train_step(state, x):
        value, grads = oialr.value_and_grad(lambda p: jnp.mean(forward(p, x) ** 2))(
            state.params
        )
        return state.apply_gradients(grads=grads), value

    matrices = oialr.find_matrices(odd, params, X)
    step = oialr.adaptive(train_step, tx, matrices, oialr.Schedule(delay=1, every=9))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            state, _ = step(state, X)
    assert ["is materialised" in str(x.message) for x in found] == [True]
