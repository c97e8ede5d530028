"""Optimizers around low rank: right across an event, or refused with what to change.

What a state holds is known by its class, whose it is by its path; what stands outside
`freeze_bases` moves no basis; masks say the same of a core as of its dense matrix; and
functions in the extra arguments of `update` see the params tree.
"""

import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal

import oialr_jax as oialr
from oialr_jax import transform
from oialr_jax.checks import check_optimizer
from oialr_jax.lowrank import Axes, factor, is_low_rank
from oialr_jax.matrices import Matrix
from oialr_jax.transform import value_and_grad_from_state

contrib = optax.contrib
SGD = optax.sgd(0.1)


def axes(*shape):
    last = len(shape) - 1
    return Axes(shape, (), tuple(range(last)), (last,))


def matrix(path, *shape):
    return Matrix(path, axes(*shape), rows=1, kind="dot")


def gathered(tx, steps=60, shape=(10, 8)):
    """A dense state, carried to new bases, and what the optimizer gathers in those."""
    tx = oialr.freeze_bases(tx)
    dense = {"w": normal(0, *shape), "b": normal(1, 3)}
    node = factor(dense["w"], axes(*shape))
    low = {**dense, "w": node}
    states, mean = [tx.init(dense), tx.init(low)], 0.3 * normal(99, *shape)
    update = jax.jit(tx.update)
    for i in range(steps):
        g = 0.3 * normal(100 + i, *shape) + mean
        for k, (params, of) in enumerate([(dense, g), (low, node.u.T @ g @ node.vt.T)]):
            grads = {"w": of, "b": normal(2, 3)}
            states[k] = update(grads, states[k], params)[1]
    carried = oialr.factorize(dense, states[0], [matrix("w", *shape)], tx=tx)[1]
    return carried.inner_state, states[1].inner_state


# How far a carried field is from what is gathered: linear ones exactly, squares by the
# rule, of gradients with as much mean as noise.
EXACT, RULE = 1e-4, 0.35
FIELDS = {
    "adan": (optax.adan(1e-3), {"m": EXACT, "v": EXACT, "g": EXACT, "n": RULE}),
    "sm3": (optax.sm3(1e-3), {"nu": 0.1, "mu": 0.2}),
    "adabelief": (optax.adabelief(1e-3), {"mu": EXACT, "nu": RULE}),
    "adamax": (optax.adamax(1e-3), {"mu": EXACT, "nu": RULE}),
    "adamax_within": (
        optax.inject_hyperparams(
            lambda rate: optax.apply_if_finite(optax.adamax(rate), 3)
        )(1e-3),
        {"mu": EXACT, "nu": RULE},
    ),
    "yogi": (optax.yogi(1e-3), {"mu": EXACT, "nu": RULE}),
    "ademamix": (contrib.ademamix(1e-3), {"m1": EXACT, "m2": EXACT, "nu": RULE}),
    "schedule_free": (contrib.schedule_free_sgd(1e-3), {"z": EXACT}),
    "prodigy": (contrib.prodigy(), {"exp_avg": EXACT, "params0": EXACT}),
    "mechanize": (contrib.mechanize(optax.sgd(1e-3)), {"x0": EXACT}),
    "centered": (
        optax.rmsprop(1e-3, centered=True, bias_correction=True),
        {"mu": EXACT, "nu": RULE},
    ),
    "optimistic": (
        optax.optimistic_gradient_descent(1e-3),
        {"previous_gradient": EXACT},
    ),
    "lbfgs": (
        optax.scale_by_lbfgs(3),
        {"params": EXACT, "updates": EXACT, "diff_updates_memory": EXACT},
    ),
}


UNREAD = pytest.mark.filterwarnings("ignore:how the moments decay .* inner_state/0")


@pytest.mark.parametrize(
    "name",
    [  # Yogi's squares move by a part of g² at most: they do not decay
        pytest.param(x, marks=UNREAD) if x == "yogi" else x for x in FIELDS
    ],
)
def test_a_field_is_carried_as_what_its_class_says(name):
    tx, fields = FIELDS[name]
    carried, expected = gathered(tx)
    flat = dict(jax.tree_util.tree_leaves_with_path(carried))
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        names = [getattr(key, "name", None) for key in path]
        dicts = [getattr(key, "key", None) for key in path]
        for field in fields.keys() & set(names):
            if "w" in dicts[names.index(field) :]:
                error = np.linalg.norm(flat[path] - leaf) / np.linalg.norm(leaf)
                assert error < fields[field], field
                seen.add(field)
    assert seen == fields.keys()


def test_states_of_adopt_have_no_mean_of_the_gradients():
    """`mu` averages g / sqrt(nu): as a mean of g it would raise `nu` a thousandfold."""
    carried, expected = gathered(contrib.adopt(1e-3))
    got, wanted = (float(np.mean(x[0].nu["w"])) for x in (carried, expected))
    assert got == pytest.approx(wanted, rel=0.3)


@pytest.mark.parametrize(
    ("tx", "fields"),
    [
        (optax.rprop(0.1), ("step_sizes", "prev_updates")),
        (contrib.cocob(), ("init_particles", "scale", "reward")),
    ],
    ids=["rprop", "cocob"],
)
def test_what_has_no_counterpart_starts_fresh_as_a_whole_and_is_named(tx, fields):
    tx = oialr.freeze_bases(tx)
    params = {"w": normal(0, 6, 6), "v": normal(1, 6, 6)}
    _, state = tx.update(params, tx.init(params), params)
    with pytest.warns(UserWarning, match="starts fresh") as caught:
        low, new, _ = oialr.factorize(params, state, [matrix("w", 6, 6)], tx=tx)
    fresh = tx.init(low)
    for field in fields:
        assert f"{field}/w" in str(caught[0].message)
        get = [optax.tree.get(x.inner_state, field) for x in (new, fresh, state)]
        np.testing.assert_array_equal(get[0]["w"], get[1]["w"])
        np.testing.assert_array_equal(get[0]["v"], get[2]["v"])


def test_moments_of_what_did_not_move_are_kept_bit_for_bit():
    """Whose a leaf is, is said by the longest path of any parameter, moved or not."""
    params = {
        "kernel": normal(0, 6, 6),
        "head": {"kernel": normal(1, 6, 6)},
        "blocks": [{"kernel": normal(2, 6, 6)}, normal(3, 6)],
    }
    tx = oialr.freeze_bases(optax.chain(optax.adam(0.1), optax.ema(0.9)))
    _, state = tx.update(params, tx.init(params), params)
    low, new, _ = oialr.factorize(params, state, [matrix("kernel", 6, 6)], tx=tx)
    old = dict(jax.tree_util.tree_leaves_with_path(state.inner_state))
    key = jax.tree_util.DictKey("kernel")
    for path, leaf in jax.tree_util.tree_leaves_with_path(new.inner_state):
        attribute = isinstance(path[-2], jax.tree_util.GetAttrKey)
        if path[-1] == key and attribute:
            assert np.any(leaf != old[path])
        else:
            np.testing.assert_array_equal(leaf, old[path])
    node, mu = low["kernel"], state.inner_state[0][0].mu["kernel"]
    np.testing.assert_allclose(
        new.inner_state[0][0].mu["kernel"], node.u.T @ mu @ node.vt.T, atol=1e-6
    )


def test_with_one_array_as_params_counts_are_kept():
    tx = oialr.freeze_bases(optax.inject_hyperparams(optax.adam)(0.1))
    array = normal(0, 6, 6)
    state = tx.init(array)
    for _ in range(3):
        _, state = tx.update(array, state, array)
    _, new, _ = oialr.factorize(array, state, [matrix("", 6, 6)], tx=tx)
    adam = new.inner_state.inner_state[0]
    assert adam.count == 3
    assert new.inner_state.count == 3
    assert np.any(adam.nu != state.inner_state.inner_state[0].nu)


class Slow(NamedTuple):
    weights: Any
    steps: Any

    @staticmethod
    def crosses():
        return {"weights": "params"}


class Wrong(NamedTuple):
    weights: Any

    @staticmethod
    def crosses():
        return {"weight": "params"}


def test_a_class_of_ones_own_says_what_its_fields_hold():
    def kept(make):
        return optax.GradientTransformation(
            make, lambda g, state, params=None: (g, state)
        )

    params = {"w": normal(0, 6, 4)}
    tx = oialr.freeze_bases(kept(lambda p: Slow(p, jnp.zeros((), jnp.int32))))
    low, state, _ = oialr.factorize(params, tx.init(params), [matrix("w", 6, 4)], tx=tx)
    np.testing.assert_allclose(state.inner_state.weights["w"], low["w"].s, atol=1e-5)
    tx = oialr.freeze_bases(kept(lambda p: Wrong(p)))
    with pytest.raises(ValueError, match=r"`crosses` of Wrong must map its fields"):
        oialr.factorize(params, tx.init(params), [matrix("w", 6, 4)], tx=tx)


# ------------------------------------------------- what stands outside freeze_bases


def decayed(base):
    """A wrapper of somebody's own that adds decay to whatever it is given."""

    def update(grads, state, params=None):
        updates, state = base.update(grads, state, params)
        return jax.tree.map(lambda u, p: u - 0.01 * p, updates, params), state

    return optax.GradientTransformation(base.init, update)


def by_name(params):
    def label(path, leaf):
        return "a" if path[0].key == "w" else "b"

    return jax.tree_util.tree_map_with_path(label, params)


FROZEN = oialr.freeze_bases(SGD)
OUTSIDE = {
    "decay": optax.chain(FROZEN, optax.add_decayed_weights(1e-2)),
    "own_wrapper": decayed(FROZEN),
    "another_update": FROZEN._replace(update=decayed(FROZEN).update),
    "noise": optax.chain(FROZEN, optax.add_noise(0.1, 0.9, 0)),
    "within_a_condition": optax.apply_if_finite(
        optax.chain(FROZEN, optax.add_decayed_weights(1e-2)), 3
    ),
    "injected": optax.inject_hyperparams(
        lambda rate: optax.chain(FROZEN, optax.add_decayed_weights(rate))
    )(0.1),
    "a_part": optax.multi_transform({"a": FROZEN, "b": optax.adam(0.1)}, by_name),
    "multi_steps": optax.MultiSteps(FROZEN, 2).gradient_transformation(),
}
HARMLESS = {
    "scale": optax.chain(FROZEN, optax.scale(0.5)),
    "clip": optax.chain(FROZEN, optax.clip(1.0), optax.clip_by_global_norm(1.0)),
    "finite": optax.apply_if_finite(FROZEN, 3),
    "schedule": optax.chain(
        FROZEN, optax.scale_by_schedule(optax.cosine_decay_schedule(1.0, 10))
    ),
    "injected": optax.inject_hyperparams(
        lambda rate: optax.chain(FROZEN, optax.scale(rate))
    )(0.1),
    "repacked": optax.GradientTransformation(FROZEN.init, FROZEN.update),
    "twice": oialr.freeze_bases(FROZEN),
    "inside": oialr.freeze_bases(optax.chain(SGD, optax.add_decayed_weights(0.1))),
    "line_search": optax.chain(oialr.freeze_bases(optax.lbfgs()), optax.scale(1.0)),
}
SMALL = {"w": jnp.ones((6, 4)), "b": jnp.ones(4)}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_moves_bases_from_outside_is_refused_by_shapes_alone(name):
    said = r"(frozen bases( of w)?|alone): build it as oialr_jax\.freeze_bases\(tx\)"
    with pytest.raises(ValueError, match=said):
        check_optimizer(OUTSIDE[name], SMALL, [matrix("w", 6, 4)])


def test_lookahead_whose_two_trees_would_get_bases_of_their_own_is_refused():
    params = optax.LookaheadParams.init_synced({"w": normal(0, 6, 4)})
    tx = oialr.freeze_bases(optax.lookahead(SGD, 5, 0.5))
    state, matrices = (
        tx.init(params),
        [matrix(f"{x}/w", 6, 4) for x in ("fast", "slow")],
    )
    with pytest.raises(ValueError, match="LookaheadParams holds each matrix twice"):
        oialr.factorize(params, state, matrices, tx=tx)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_leaves_zeros_zeros_may_stand_outside(name):
    check_optimizer(HARMLESS[name], SMALL, [matrix("w", 6, 4)])


def test_an_event_refuses_it_and_a_warm_one_does_not_look_again(monkeypatch):
    tx, params = OUTSIDE["decay"], {"w": normal(0, 6, 4), "b": jnp.ones(4)}
    with pytest.raises(ValueError, match="move the frozen bases of w"):
        oialr.factorize(params, tx.init(params), [matrix("w", 6, 4)], tx=tx)
    looked = []
    real = transform.dataflow.trace_update
    monkeypatch.setattr(
        transform.dataflow, "trace_update", lambda *a: looked.append(a) or real(*a)
    )
    tx = optax.chain(oialr.freeze_bases(optax.adam(0.1)), optax.scale(0.5))
    for _ in range(2):
        oialr.factorize(params, tx.init(params), [matrix("w", 6, 4)], tx=tx)
        count = len(looked)
    assert 0 < count <= 2  # for bases, and for who uses the state of Adam
    assert len(looked) == count


# ------------------------------------------------------------------ masks and labels


def by_axes(params):
    return jax.tree.map(lambda x: "a" if x.ndim == 2 else "b", params)


def four(params):
    return jax.tree.map(lambda x: np.ndim(x) == 4, params)


CONV = {"k": jnp.ones((3, 3, 4, 8)), "w": jnp.ones((8, 8)), "b": jnp.ones(8)}
CONV_MATRICES = [matrix("k", 3, 3, 4, 8), matrix("w", 8, 8)]
FLIPPING = {
    "labels": optax.multi_transform({"a": optax.adam(0.1), "b": SGD}, by_axes),
    "no_state": optax.multi_transform({"a": SGD, "b": optax.set_to_zero()}, by_axes),
    "muon": contrib.muon(0.1),
    "decay_mask": optax.adamw(0.1, mask=four),
    "injected": optax.inject_hyperparams(optax.adamw, static_args=("mask",))(
        0.1, mask=four
    ),
    "accumulated": optax.MultiSteps(optax.masked(SGD, four), 2),
}
KEEPING = {
    "a_tree": optax.multi_transform({"a": optax.adam(0.1), "b": SGD}, by_axes(CONV)),
    "more_than_one_axis": optax.adamw(
        0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    ),
    "by_name": oialr.orthogonal.core_muon(0.1, CONV_MATRICES),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=4),
    "sm3": optax.sm3(0.1),
}


@pytest.mark.parametrize("name", FLIPPING)
def test_a_leaf_that_would_change_its_label_is_named(name):
    tx = oialr.freeze_bases(FLIPPING[name])
    said = r"of k with shape \(3, 3, 4, 8\) and .* with \(8, 8\).* labels as a tree"
    with pytest.raises(ValueError, match=said):
        check_optimizer(tx, CONV, CONV_MATRICES)


@pytest.mark.parametrize("name", KEEPING)
def test_labels_that_keep_are_let_through(name):
    check_optimizer(oialr.freeze_bases(KEEPING[name]), CONV, CONV_MATRICES)


def test_an_event_refuses_a_flip_and_state_that_a_parameter_had_not():
    params = {"k": normal(0, 3, 3, 4, 8)}
    tx = oialr.freeze_bases(FLIPPING["no_state"])
    with pytest.raises(ValueError, match=r"`param_labels` \(by_axes\) says 'b' of k"):
        oialr.factorize(params, tx.init(params), CONV_MATRICES[:1], tx=tx)

    def init(params):  # decides by shape without a function that one could ask
        flat = jax.tree.map(
            lambda x: jnp.zeros_like(x) if x.ndim == 2 else optax.MaskedNode(), params
        )
        return optax.TraceState(flat)

    own = optax.GradientTransformation(init, lambda g, s, p=None: (g, s))
    tx = oialr.freeze_bases(own)
    with pytest.raises(ValueError, match="k changes its optimizer at this event"):
        oialr.factorize(params, tx.init(params), CONV_MATRICES[:1], tx=tx)


# -------------------------------------------------- functions in the extra arguments

X, Y = normal(3, 30, 6), 2 * normal(4, 30, 6)


def forward(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"] + params["b"].reshape(1, -1)


def loss(params):
    return jnp.mean((oialr.factored(forward)(params, X) - Y) ** 2)


def search(tx, params, state):
    value, grads = jax.value_and_grad(loss)(params)
    return tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)


def search_from_state(tx, params, state):
    value, grads = value_and_grad_from_state(loss)(params, state=state)
    return tx.update(grads, state, params, value=value, grad=grads, value_fn=loss)


def sharpness(tx, params, state):
    gradient = jax.grad(lambda params, _: (loss(params), "aux"), has_aux=True)
    grads = gradient(params, 0)[0]
    return tx.update(grads, state, params, grad_fn=lambda *a: gradient(*a)[0])


def valued(tx, params, state):
    value, grads = oialr.value_and_grad(loss)(params)
    return tx.update(grads, state, params, value=value)


ADVERSARY = optax.chain(contrib.normalize(), optax.sgd(0.1))
CALLED = {
    "lbfgs": (optax.lbfgs(), search),
    "backtracking": (
        optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(9, store_grad=True)
        ),
        search_from_state,
    ),
    "sam": (
        contrib.sam(optax.sgd(0.3, momentum=0.9), ADVERSARY, opaque_mode=True),
        sharpness,
    ),
    "polyak": (optax.polyak_sgd(max_learning_rate=0.5), valued),
}


@pytest.mark.parametrize("name", CALLED)
def test_optimizers_that_call_functions_train_as_on_dense_params(name):
    """Square matrices at full rank, and optimizers that no rotation changes."""
    tx, method = CALLED[name]
    tx = oialr.freeze_bases(tx)
    start = {"w": normal(0, 6, 6), "v": normal(1, 6, 6), "b": jnp.zeros(6)}

    @jax.jit
    def step(params, state):
        updates, state = method(tx, params, state)
        return optax.apply_updates(params, updates), state

    dense, dense_state = low, state = start, tx.init(start)
    matrices = [matrix("w", 6, 6), matrix("v", 6, 6)]
    for i in range(6):
        if i == 3:
            low, state, _ = oialr.factorize(low, state, matrices, tx=tx)
        if i == 5:
            rule = oialr.RankRule(cutoff=0.0)
            low, state, _ = oialr.truncate(low, state, rule, tx=tx)
        dense, dense_state = step(dense, dense_state)
        low, state = step(low, state)
    for key, leaf in oialr.materialize(low).items():
        np.testing.assert_allclose(leaf, dense[key], atol=2e-4)
    assert loss(dense) < 0.98 * loss(start)


def test_a_function_without_params_is_refused():
    tx = oialr.freeze_bases(optax.lbfgs())
    state = tx.init(SMALL)
    with pytest.raises(ValueError, match="`value_fn` is a function of the params"):
        tx.update(SMALL, state, value=1.0, grad=SMALL, value_fn=lambda p: 0.0)


def test_functions_see_nodes_and_give_back_cores():
    """Value and aux too; an argument that is no params tree is handed on as it is."""
    node = factor(normal(0, 6, 4), axes(6, 4))
    params, seen = {"w": node}, []

    def update(grads, state, params=None, *, fn, tree, scale):
        (value, aux), back = fn(params, scale, key=params)
        assert scale == 3
        assert isinstance(back["w"], jax.Array)
        return tree, (value, aux)

    def fn(params, number, *, key):
        seen.append((params["w"], number, key["w"]))
        return (1.0, "aux"), params

    inner = optax.GradientTransformationExtraArgs(lambda p: (), update)
    tx = oialr.freeze_bases(inner)
    updates, state = tx.update(
        params, tx.init(params), params, fn=fn, tree=params, scale=3
    )
    ((first, number, second),) = seen
    assert is_low_rank(first)
    assert is_low_rank(second)
    assert number == 3
    assert state.inner_state == (1.0, "aux")
    np.testing.assert_array_equal(updates["w"].s, node.s)


# --------------------------------------------------------------------- no optimizer


def test_params_without_an_optimizer_are_converted_and_cut():
    params = {"w": normal(0, 6, 4), "b": jnp.ones(4)}
    low, state, report = oialr.factorize(params, None, [matrix("w", 6, 4)])
    assert state is None
    assert report.layers[0].after == 4
    cut, state, _ = oialr.truncate(low, None, {"w": 2}, tx=None)
    assert state is None
    assert cut["w"].rank == 2


@pytest.mark.parametrize("given", ["tx", "opt_state"])
def test_one_of_optimizer_and_state_is_refused(given):
    params, tx = {"w": normal(0, 6, 4)}, oialr.freeze_bases(SGD)
    state = tx.init(params) if given == "opt_state" else None
    other = {"tx": "opt_state", "opt_state": "tx"}[given]
    with (
        pytest.raises(ValueError, match=f"^`{given}` without `{other}`"),
        warnings.catch_warnings(),
    ):
        oialr.factorize(
            params, state, [matrix("w", 6, 4)], tx=tx if given == "tx" else None
        )


def test_pairs_of_lbfgs_are_weighted_by_what_a_cut_left_of_them():
    """Each pair's weight is 1/<s, y>, or 0 where the pair is of no use any more."""
    params = {"w": normal(0, 6, 6), "v": normal(1, 6, 6), "b": jnp.zeros(6)}
    tx = oialr.freeze_bases(optax.scale_by_lbfgs(4))
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(jax.grad(loss)(params), state, params)
        params = jax.tree.map(lambda p, u: p - 0.05 * u, params, updates)
    _, new, _ = oialr.factorize(params, state, [matrix("w", 6, 6)], tx=tx, rank=2)
    before, after = state.inner_state, new.inner_state
    pairs = (after.diff_params_memory, after.diff_updates_memory)
    products = sum(
        np.sum(np.asarray(s * y, np.float64).reshape(4, -1), axis=1)
        for s, y in zip(*map(jax.tree.leaves, pairs), strict=True)
    )
    good = before.weights_memory * products > 0
    assert good.sum() >= 2  # the first step has no pair
    np.testing.assert_allclose(after.weights_memory[~good], 0)
    np.testing.assert_allclose(after.weights_memory[good] * products[good], 1, 1e-4)
    change = after.weights_memory[good] / before.weights_memory[good]
    assert np.any(np.abs(change - 1) > 0.05)  # the cut matters
