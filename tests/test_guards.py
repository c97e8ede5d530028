"""Nothing moves that was not asked for, and no tracer stays behind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax.training.train_state import TrainState

import oialr_jax as oialr
from oialr_jax.projection import project_to_rank
from oialr_jax.ranking import choose

TX = oialr.freeze_bases(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
RULE = oialr.RankRule(cutoff=0.4)


def fn(params, x):
    return jnp.tanh(x @ params["a"] + params["c"][None]) @ params["b"]


def create(key):
    a, b = jax.random.split(key)
    params = {
        "a": jax.random.normal(a, (16, 48)),
        "b": jax.random.normal(b, (48, 8)),
        "c": jnp.zeros(48),
    }
    state = TrainState.create(apply_fn=fn, params=params, tx=TX)
    return state.replace(step=jnp.zeros((), jnp.int32))


def life(folder, state, x, layout):
    """Everything that happens on the host to one state."""
    matrices = oialr.find_matrices(fn, state.params, x)
    kept = project_to_rank(state.params, RULE, matrices)
    ranks = choose(kept, RULE, matrices)
    params, opt_state, _ = oialr.factorize(kept, state.opt_state, matrices, tx=TX)
    u = params["a"].u  # far enough from orthonormal to be repaired
    drifted = params | {"a": dataclasses.replace(params["a"], u=jnp.add(u, u))}
    params, opt_state, _ = oialr.truncate(drifted, opt_state, ranks, tx=TX)
    oialr.densify(params, opt_state, tx=TX)
    low = state.replace(params=params, opt_state=opt_state)
    with oialr.Checkpoints(folder, best="max") as saved:
        saved.save(low, {"scalar": low.step}, metric=low.step)
        found = saved.restore(state, TX, layout).state
    schedule = oialr.Schedule(delay=2, every=2, layer_step=1.0, lag=1)
    step = oialr.adaptive(
        train_step, TX, matrices, schedule, RULE, layout=layout, donate_argnums=()
    )
    new = state
    for _ in range(5):
        new, _ = step(new, x)
    return low, found, new


def train_step(state, x):
    forward = oialr.factored(fn)
    _, grads = oialr.value_and_grad(lambda p: jnp.mean(forward(p, x) ** 2))(
        state.params
    )
    return state.apply_gradients(grads=grads), {}


@pytest.mark.parametrize("spec", [None, "fsdp=4,data=2"], ids=str)
def test_transfers_that_were_not_asked_for_are_none(spec, tmp_path):
    key, x = jax.random.key(0), np.asarray(normal(1, 8, 16))
    mesh = None if spec is None else oialr.sharding.make_mesh(spec)
    layout = mesh and oialr.sharding.Layout(mesh, min_size=64)
    state = jax.jit(create)(key)
    with jax.transfer_guard("disallow"):
        if layout is not None:
            state = layout.constrain(layout.initialize(create, key))
        x = jax.device_put(x) if layout is None else layout.put_batch(x, 8)
        low, found, new = life(tmp_path, state, x, layout)
    assert oialr.ranks(new.params)
    for a, b in zip(jax.tree.leaves(low), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_counts_that_nobody_placed_are_placed_beside_the_params():
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh("data=8"))
    params = {
        "a": jax.device_put(normal(0, 16, 8), layout({"a": normal(0, 16, 8)})["a"])
    }
    opt_state = TX.init(params)
    matrices = oialr.find_matrices(lambda p, x: x @ p["a"], params, normal(1, 4, 16))
    with jax.transfer_guard("disallow"):
        _, new, _ = oialr.factorize(params, opt_state, matrices, tx=TX)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(new))


def test_no_tracer_leaks(tmp_path):
    state, x = create(jax.random.key(0)), normal(1, 8, 16)
    with jax.checking_leaks():
        life(tmp_path, state, x, None)
