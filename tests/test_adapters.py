"""Cores on a frozen base: nothing of the base trains, and merging back is exact."""

import dataclasses
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BY_NAME, KINDS, normal
from flax.training.train_state import TrainState
from helpers import TOLERANCE, assert_close, scalar_loss

import oialr_jax as oialr
from oialr_jax.adapters import attached, on_base
from oialr_jax.curvature import of_outputs
from oialr_jax.linalg import orthogonality_error
from oialr_jax.lowrank import is_low_rank, is_node, named_leaves
from oialr_jax.surgery import widen

RANK = 3


def fn(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return hidden @ params["second"]["kernel"] @ params["head"]


def model():
    params = {
        "first": {"kernel": normal(0, 9, 12), "bias": normal(1, 12)},
        "second": {"kernel": normal(2, 12, 10)},
        "head": normal(3, 10, 4),
    }
    x = normal(4, 20, 9)
    matrices = oialr.find_matrices(fn, params, x)[:2]
    assert [x.path for x in matrices] == ["first/kernel", "second/kernel"]
    return params, x, matrices


def loss(params, x):
    return jnp.mean(jnp.square(fn(params, x) - 1))


def moved(cores, seed=0):
    """Cores that are not zero."""
    rng = np.random.default_rng(seed)

    def one(node):
        s = jnp.asarray(rng.normal(size=node.s.shape), node.s.dtype)
        return dataclasses.replace(node, s=s)

    return jax.tree.map(
        lambda x: one(x) if is_low_rank(x) else x,
        cores,
        is_leaf=is_low_rank,
    )


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
def test_at_first_nothing_changes_and_what_is_merged_is_what_ran(dtype):
    params, x, matrices = model()
    cores, base = oialr.adapters(params, matrices, RANK, train="bias", dtype=dtype)
    forward = on_base(fn)
    near = {None: 1e-6, "bfloat16": 1e-2, "int8": 1e-2}[dtype]
    np.testing.assert_allclose(forward(cores, base, x), fn(params, x), atol=near)
    cores = moved(cores)
    merged = oialr.materialize(attached(cores, base))
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(forward(cores, base, x), fn(merged, x), atol=2e-5)
    if dtype is None:
        node = cores["first"]["kernel"]
        exact = params["first"]["kernel"] + node.materialize()
        np.testing.assert_array_equal(merged["first"]["kernel"], exact)
        np.testing.assert_array_equal(merged["head"], params["head"])
    assert forward(cores, base, x).dtype == jnp.float32


def test_the_numbers_are_those_of_the_cores():
    params, _, matrices = model()
    cores, base = oialr.adapters(params, matrices, RANK, train=["bias"], dtype="int8")
    assert oialr.counts(cores).trainable == 2 * RANK**2 + 12
    whole = oialr.counts(attached(cores, base))
    assert whole.trainable == 2 * RANK**2 + 12
    assert whole.dense == oialr.counts(params).dense
    state = oialr.freeze_bases(optax.adam(1e-3)).init(cores)
    moments = jax.tree.leaves((state.inner_state[0].mu, state.inner_state[0].nu))
    assert sum(x.size for x in moments) == 2 * (2 * RANK**2 + 12)
    held = base["first"]["kernel"]
    assert held.array.dtype == jnp.int8
    assert held.scale.shape == (1, 12)
    assert base["first"]["bias"] is None
    assert base["head"].array.dtype == jnp.float32  # no matrix that was named


HALF = [  # of the uses in a push
    pytest.param(case, id=str(case), marks=[pytest.mark.long] if i % 2 else [])
    for i, case in enumerate(KINDS)
    if case.name != "equinox"  # its functions are no arrays: see below
]


@pytest.mark.parametrize("case", HALF)
@pytest.mark.filterwarnings("ignore:.*is materialised:UserWarning")
def test_every_use_of_a_matrix_runs_on_a_base(case):
    function, params, x = case.build()
    matrices = oialr.find_matrices(function, params, x)
    rank = {m.path: max(1, min(m.m, m.n) // 2) for m in matrices}
    cores, base = oialr.adapters(params, matrices, rank, dtype="int8")
    cores = moved(cores)
    actual = jax.jit(on_base(function))(cores, base, x)
    merged = oialr.materialize(attached(cores, base))
    tolerance = 3 * TOLERANCE[jnp.dtype(case.dtype)]
    assert_close(actual, jax.jit(function)(merged, x), tolerance)


def test_functions_stay_in_the_base():
    function, params, x = BY_NAME["equinox"].build()
    cores, base = oialr.adapters(params, oialr.find_matrices(function, params, x), 2)
    actual = eqx.filter_jit(on_base(function))(cores, base, x)
    np.testing.assert_allclose(actual, function(params, x), atol=1e-5)


def products(jaxpr):
    """Shapes of all products in a jaxpr, at any depth."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn.outvars[0].aval.shape
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("dtype", [None, "int8"])
@pytest.mark.parametrize("rank", [RANK, 9])
def test_no_gradient_of_the_shape_of_a_matrix_is_formed(dtype, rank):
    params, x, matrices = model()
    x = normal(5, 2000, 9)  # for which the cost model would rebuild W at full rank
    cores, base = oialr.adapters(params, matrices, rank, dtype=dtype)
    forward = on_base(loss)
    grad = oialr.value_and_grad(lambda c, b, x: forward(c, b, x))
    found = [
        tuple(sorted(s)) for s in products(jax.make_jaxpr(grad)(cores, base, x).jaxpr)
    ]
    assert (9, 2000) in found or (12, 2000) in found  # it sees the products
    wanted = {(9, 12), (10, 12), (4, 10)} - {(min(rank, 9), 12), (min(rank, 9), 10)}
    if rank != 9:
        assert not wanted & set(found)
    dense = jax.make_jaxpr(jax.grad(loss))(params, x).jaxpr
    assert {(9, 12), (10, 12)} <= {tuple(sorted(s)) for s in products(dense)}


def test_the_gradient_of_a_core_is_the_projected_dense_one():
    params, x, matrices = model()
    cores, base = oialr.adapters(params, matrices, RANK, train="bias")
    cores = moved(cores)
    forward = on_base(loss)
    _, grads = oialr.value_and_grad(forward)(cores, base, x)
    merged = oialr.materialize(attached(cores, base))
    dense = jax.grad(loss)(merged, x)
    for name in ("first", "second"):
        node, g = cores[name]["kernel"], dense[name]["kernel"]
        assert_close(grads[name]["kernel"], node.u.T @ g @ node.vt.T, 1e-5)
    assert_close(grads["first"]["bias"], dense["first"]["bias"], 1e-5)
    assert grads["head"] is None


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_plain_grad_gives_the_base_zero(dtype):
    params, x, matrices = model()
    cores, base = oialr.adapters(params, matrices, RANK, train="bias", dtype=dtype)
    grads = jax.grad(on_base(loss), argnums=(0, 1))(cores, base, x)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads[1]))
    assert np.any(grads[0]["first"]["kernel"].s)


def test_directions_of_the_weights():
    params, _, matrices = model()
    cores, _ = oialr.adapters(params, matrices, RANK)
    u, _, vt = np.linalg.svd(params["second"]["kernel"], full_matrices=False)
    node = cores["second"]["kernel"]
    np.testing.assert_allclose(abs(node.u.T @ u[:, :RANK]), np.eye(RANK), atol=1e-4)
    np.testing.assert_allclose(abs(vt[:RANK] @ node.vt.T), np.eye(RANK), atol=1e-4)
    assert not np.any(node.s)
    assert float(orthogonality_error(node.u, node.vt)) < 1e-5


def test_directions_of_gradients():
    params, x, matrices = model()
    gradient = jax.grad(loss)(params, x)
    cores, _ = oialr.adapters(params, matrices, RANK, of=gradient)
    u, _, _ = np.linalg.svd(gradient["second"]["kernel"], full_matrices=False)
    node = cores["second"]["kernel"]
    span = node.u @ node.u.T @ u[:, :RANK]
    np.testing.assert_allclose(span, u[:, :RANK], atol=1e-3)


def test_directions_of_curvature():
    """C of data that lie in few directions: U spans C⁻¹ P of the weighed matrix."""
    params, x, matrices = model()
    x = x.at[:, 4:].mul(1e-2)
    sums = oialr.curvature(of_outputs(fn), matrices)(params, x, key=jax.random.key(0))
    cores, _ = oialr.adapters(params, matrices, 2, of=sums)
    c, d = (np.asarray(y, np.float64) for y in sums.covariances("first/kernel"))

    def root(matrix, power):
        values, vectors = np.linalg.eigh(matrix)
        values = np.maximum(values, 0) + 1e-3 * np.mean(np.diag(matrix))
        return vectors * values**power @ vectors.T

    w = np.asarray(params["first"]["kernel"], np.float64)
    p, _, _ = np.linalg.svd(root(c, 0.5) @ w @ root(d, 0.5))
    wanted = root(c, -0.5) @ p[:, :2]
    node = cores["first"]["kernel"]
    left = np.linalg.lstsq(np.asarray(node.u, np.float64), wanted, rcond=None)
    assert np.max(left[1]) < 1e-6 * np.sum(wanted**2)
    assert float(orthogonality_error(node.u, node.vt)) < 1e-5


def test_ranks_are_raised_and_nothing_changes():
    params, x, matrices = model()
    cores, base = oialr.adapters(params, matrices, RANK)
    cores = moved(cores)
    tx = oialr.freeze_bases(optax.adam(1e-3))
    opt_state = tx.init(cores)
    forward = on_base(loss)
    _, grads = oialr.value_and_grad(forward)(cores, base, x)
    _, opt_state = tx.update(grads, opt_state, cores)
    gradient = jax.grad(loss)(oialr.materialize(attached(cores, base)), x)
    ranks = {"first/kernel": 5}
    new, state, report = widen(cores, opt_state, ranks, gradient, tx=tx)
    assert [(x.path, x.before, x.after) for x in report.layers] == [
        ("first/kernel", RANK, 5)
    ]
    node, old = new["first"]["kernel"], cores["first"]["kernel"]
    assert node.rank == 5
    assert node.basis != old.basis
    assert_close(node.materialize(), old.materialize(), 1e-6)
    assert float(orthogonality_error(node.u, node.vt)) < 1e-5
    assert new["second"]["kernel"] is cores["second"]["kernel"]
    before, after = (x.inner_state[0].mu["first"]["kernel"] for x in (opt_state, state))
    assert_close(node.u @ after @ node.vt, old.u @ before @ old.vt, 1e-5)
    squares = state.inner_state[0].nu["first"]["kernel"]
    assert np.all(squares[:RANK, :RANK] > 0)
    assert not np.any(squares[RANK:])
    assert not np.any(squares[:, RANK:])
    # the new directions are those in which the gradient is largest
    g = gradient["first"]["kernel"]
    rest = g - old.u @ (old.u.T @ g)
    rest = rest - rest @ old.vt.T @ old.vt
    sigma = np.linalg.svd(rest, compute_uv=False)
    found = np.linalg.norm(node.u[:, RANK:].T @ g @ node.vt[RANK:].T)
    np.testing.assert_allclose(found, np.linalg.norm(sigma[:2]), rtol=1e-3)


def test_moments_that_are_kept_get_zeros_where_a_rank_goes_up():
    params, _, matrices = model()
    cores, _ = oialr.adapters(params, matrices, RANK)
    tx = oialr.freeze_bases(optax.adam(1e-3))
    ones = jax.tree.map(jnp.ones_like, tx.init(cores))
    rule = oialr.MomentRule(second="keep")
    _, state, _ = widen(
        cores, ones, {"first/kernel": 5}, params, tx=tx, moment_rule=rule
    )
    wanted = np.pad(np.ones((RANK, RANK)), (0, 2))
    np.testing.assert_array_equal(state.inner_state[0].nu["first"]["kernel"], wanted)


def test_ranks_are_raised_to_the_full_one():
    """Where the source has nothing left, the directions are orthonormal still."""
    params, _, matrices = model()
    cores, _ = oialr.adapters(params, matrices, 8)
    full = {"first/kernel": 9, "second/kernel": 10}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for source in (params, zeros):
        tree, *_ = widen(cores, None, full, source)
        for node in (tree["first"]["kernel"], tree["second"]["kernel"]):
            assert float(orthogonality_error(node.u, node.vt)) < 1e-5


def test_a_rank_stays_where_directions_are_not_finite():
    params, _, matrices = model()
    cores, _ = oialr.adapters(params, matrices, RANK)
    source = params | {"first": {"kernel": params["first"]["kernel"] * jnp.nan}}
    ranks = {"first/kernel": 5, "second/kernel": 5}
    tree, _, report = widen(cores, None, ranks, source)
    assert tree["first"]["kernel"] is cores["first"]["kernel"]
    assert tree["second"]["kernel"].rank == 5
    assert [x.finite for x in report.layers] == [False, True]


def test_ranks_are_cut_by_events_as_ever():
    params, x, matrices = model()
    cores, base = oialr.adapters(params, matrices, 6)
    tx = oialr.freeze_bases(optax.sgd(0.3, momentum=0.9))
    forward = on_base(loss)
    state = TrainState.create(apply_fn=forward, params=cores, tx=tx)

    def step(state, base, x):
        value, grads = oialr.value_and_grad(state.apply_fn)(state.params, base, x)
        return state.apply_gradients(grads=grads), value

    adaptive = oialr.adaptive(
        step,
        tx,
        matrices,
        oialr.Schedule(delay=3, every=3, layer_step=1.0),
        oialr.RankRule(cutoff=0.3),
        donate_argnums=(),
    )
    values = []
    for _ in range(8):
        state, value = adaptive(state, base, x)
        values.append(float(value))
    assert values[-1] < values[0]
    after = {name: r for name, (_, _, r) in oialr.ranks(state.params).items()}
    assert max(after.values()) < 6
    whole = attached(state.params, base)
    np.testing.assert_allclose(
        fn(oialr.materialize(whole), x), oialr.factored(fn)(whole, x), atol=1e-5
    )


@pytest.mark.parametrize("layout", [None, "fsdp=8"])
def test_training_on_a_frozen_base(layout):
    params, x, matrices = model()
    x = jnp.tile(x, (2, 1))
    place = (
        None
        if layout is None
        else oialr.sharding.Layout(oialr.sharding.make_mesh(layout))
    )
    run = oialr.training(
        loss,
        optax.adam(3e-2),
        base=oialr.FrozenBase(rank=RANK, train="bias", dtype="bfloat16"),
        select=matrices,
        layout=place,
        follow={"ema": lambda p, e: optax.incremental_update(p, e, 0.5)},
    )
    before = jax.tree.map(np.array, params)
    state = run.init(params, x)
    assert set(oialr.ranks(state.params)) == {"first/kernel", "second/kernel"}
    kept = jax.tree.map(np.array, run.base)
    values = []
    for _ in range(12):
        state, value = run.step(state, x)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]
    assert run.compilations == 1
    assert run.reports == []
    jax.tree.map(np.testing.assert_array_equal, kept, jax.tree.map(np.array, run.base))
    jax.tree.map(np.testing.assert_array_equal, before, params)
    merged = oialr.merge(run.attached(state))
    assert not any(map(is_node, jax.tree.leaves(merged, is_leaf=is_node)))
    assert float(loss(merged, x)) < values[0]
    assert state.beside["ema"]["first"]["kernel"].rank == RANK


def test_the_base_is_the_same_in_every_process():
    """A run is resumed by its cores alone: `init` makes the base anew."""
    params, x, matrices = model()
    runs = [
        oialr.training(loss, optax.sgd(0.1), base="frozen", select=matrices)
        for _ in range(2)
    ]
    states = [run.init(params, x) for run in runs]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for a, b in zip(
        *(jax.tree.leaves((r.base, s)) for r, s in zip(runs, states, strict=True)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_training_cuts_cores_by_a_schedule():
    params, x, matrices = model()
    run = oialr.training(
        loss,
        optax.sgd(0.3),
        base=oialr.FrozenBase(rank=6),
        select=matrices,
        schedule=oialr.Schedule(delay=5, every=5, layer_step=1.0),
        rule=oialr.RankRule(cutoff=0.5),
    )
    state = run.init(params, x)
    for _ in range(7):
        state, _ = run.step(state, x)
    assert [x.kind for x in run.reports] == ["truncation"]
    assert oialr.ranks(state.params)["second/kernel"][2] < 6  # the last of the two


RAISING = {
    "base": oialr.FrozenBase(rank=2, dtype="bfloat16"),
    "rule": oialr.RankRule(cutoff=0.0, raise_by=2),
    "schedule": oialr.Schedule(delay=4, every=4, layer_step=1.0),
}


def steps(run, state, x, count):
    values = []
    for _ in range(count):
        state, value = run.step(state, x)
        values.append(float(value))
    return state, values


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("layout", "lag"),
    [
        pytest.param(None, 0, marks=LONG),
        (None, 2),
        pytest.param("fsdp=8", 0, marks=LONG),
        pytest.param("fsdp=8", 2, marks=LONG),
    ],
)
def test_training_raises_ranks_by_a_schedule(layout, lag):
    """By the one event: averages follow, and a resumed run does the same."""
    params, x, matrices = model()
    x = jnp.tile(x, (2, 1))
    place = (
        None
        if layout is None
        else oialr.sharding.Layout(oialr.sharding.make_mesh(layout))
    )
    options = RAISING | {
        "schedule": dataclasses.replace(RAISING["schedule"], lag=lag),
        "select": matrices,
        "follow": {"ema": lambda p, e: optax.incremental_update(p, e, 0.5)},
        "layout": place,
    }
    run = oialr.training(loss, optax.adam(3e-2), **options)
    state, _ = steps(run, run.init(params, x), x, 4 + lag)
    whole = run.attached(state)
    before = oialr.factored(fn)(whole, x)
    copy = jax.tree.map(jnp.array, state)
    state, values = steps(run, state, x, 6)
    found = [
        (x.step, x.kind, [(y.path, y.before, y.after) for y in x.layers])
        for x in run.reports
    ]
    assert found == [
        (4 + lag, "truncation", [("second/kernel", 2, 4)]),
        (8 + lag, "truncation", [("first/kernel", 2, 4), ("second/kernel", 4, 6)]),
    ]
    assert run.compilations == 3
    assert state.beside["ema"]["second"]["kernel"].rank == 6
    assert_close(values[0], jnp.mean(jnp.square(before - 1)), 1e-5)
    assert np.all(state.params["second"]["kernel"].s != 0)
    again = oialr.training(loss, optax.adam(3e-2), **options)
    again.init(params, x)
    other, others = steps(again, copy, x, 6)
    assert others == values
    jax.tree.map(np.testing.assert_array_equal, other, state)


def test_a_rank_is_raised_where_the_gradient_is():
    """What is left of the target lies outside of the bases; the event finds it."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(12, 12)))[0][:, :6] for _ in range(2))
    start = jnp.asarray(u[:, :2] * [9, 8] @ v[:, :2].T, jnp.float32)
    target = start + jnp.asarray(u * [5, 4, 3, 2, 0, 0] @ v.T, jnp.float32)

    def distance(params, x):
        return jnp.mean(jnp.square(x @ params["w"] - x @ target))

    x = jnp.eye(12)
    values = {}
    for more in (0, 2):
        run = oialr.training(
            distance,
            optax.sgd(36.0),
            base=oialr.FrozenBase(rank=2),
            select=oialr.find_matrices(distance, {"w": start}, x),
            schedule=oialr.Schedule(delay=30, every=100),
            rule=oialr.RankRule(raise_by=more),
        )
        state = run.init({"w": start}, x)
        state, found = steps(run, state, x, 60)
        values[more] = found[-1]
    np.testing.assert_allclose(values[0], (9 + 4) / 144, rtol=1e-3)
    assert values[2] < 1e-6


def test_a_run_with_raised_ranks_is_restored(tmp_path):
    params, x, matrices = model()
    run = oialr.training(loss, optax.adam(3e-2), select=matrices, **RAISING)
    state, _ = steps(run, run.init(params, x), x, 6)
    with oialr.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(state)
    state, values = steps(run, state, x, 4)
    again = oialr.training(loss, optax.adam(3e-2), select=matrices, **RAISING)
    template = again.init(params, x)
    with oialr.Checkpoints(tmp_path / "run") as checkpoints:
        found = checkpoints.restore(template, again.tx)
    other, others = steps(again, found.state, x, 4)
    assert others == values
    jax.tree.map(np.testing.assert_array_equal, other.params, state.params)


def test_ranks_are_raised_without_a_base_too():
    params, x, matrices = model()
    run = oialr.training(
        loss,
        optax.adam(3e-2),
        select=matrices,
        schedule=oialr.Schedule(delay=2, every=2, layer_step=1.0),
        rule=oialr.RankRule(cutoff=0.3, raise_by=1),
    )
    _, _ = steps(run, run.init(params, x), x, 8)
    ways = {
        np.sign(y.after - y.before)
        for x in run.reports
        if x.kind == "truncation"
        for y in x.layers
    }
    assert {-1, 1} <= ways


BAD = {
    "rank": ({"rank": 0}, "`rank` must be at least 1, got 0"),
    "rank_by_path": (
        {"rank": {"first/kernel": 10, "second/kernel": 1}},
        r"in \[1, 9\]",
    ),
    "no_rank": ({"rank": {"first/kernel": 2}}, "for second/kernel, got 0"),
    "unknown": ({"rank": {"first": 2}}, "`rank` names first; there are"),
    "train": ({"train": "tail"}, "`train` 'tail' matches none of: first/bias"),
    "twice": ({"train": "kernel"}, "`train` 'kernel' matches first/kernel, .* core"),
    "dtype": ({"dtype": "int4"}, "`dtype` must be one of"),
    "of": ({"of": {"first": jnp.ones(2)}}, "no leaf at first/kernel"),
    "nan": (
        {"of": jax.tree.map(lambda x: x * jnp.nan, model()[0])},
        "first/kernel, or what its directions come from, is not finite",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_adapters_are_refused(bad):
    options, error = BAD[bad]
    params, _, matrices = model()
    with pytest.raises(ValueError, match=error):
        oialr.adapters(params, matrices, **{"rank": 2} | options)


def test_trees_that_do_not_belong_together_are_refused():
    params, x, matrices = model()
    cores, base = oialr.adapters(params, matrices, 2)
    with pytest.raises(ValueError, match="first/bias is in both of cores and base"):
        attached(cores | {"first": cores["first"] | {"bias": x[0]}}, base)
    with pytest.raises(ValueError, match="head is in neither of cores and base"):
        attached(cores, base | {"head": None})
    with pytest.raises(ValueError, match="the base has no place for other"):
        attached(cores | {"other": x}, base)
    turned = dataclasses.replace(
        base["second"]["kernel"], array=base["second"]["kernel"].array.T
    )
    with pytest.raises(ValueError, match=r"has shape \(12, 10\) in the cores and"):
        attached(cores, base | {"second": {"kernel": turned}})


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"base": "lora"}, "`base` must be 'frozen', a FrozenBase"),
        ({"base": "frozen", "delay": 3}, "`delay` is for a conversion"),
        ({"base": "frozen", "budget": 0.5}, "`budget` is for a conversion"),
        ({"base": "frozen", "rule": oialr.RankRule()}, "both `schedule` and `rule`"),
    ],
    ids=["word", "delay", "budget", "rule"],
)
def test_settings_that_say_nothing_on_a_base_are_refused(options, error):
    with pytest.raises(ValueError, match=re.escape(error)):
        oialr.training(loss, optax.sgd(0.1), **options)


@pytest.mark.parametrize(
    ("ranks", "options", "error"),
    [
        ({"first/kernel": 2}, {}, r"in \[3, 9\] for first/kernel, got 2"),
        ({"first/kernel": 10}, {}, r"in \[3, 9\] for first/kernel, got 10"),
        ({"head": 3}, {}, "no low-rank leaf at head"),
        ({"first/kernel": 4}, {"tx": optax.sgd(0.1)}, "`tx` without `opt_state`"),
    ],
    ids=["below", "above", "path", "tx"],
)
def test_bad_ranks_to_raise_are_refused(ranks, options, error):
    params, _, matrices = model()
    cores, _ = oialr.adapters(params, matrices, RANK)
    with pytest.raises(ValueError, match=error):
        widen(cores, None, ranks, params, **options)


def test_a_rule_that_raises_needs_directions():
    params, x, matrices = model()
    cores, _ = oialr.adapters(params, matrices, RANK)
    rule = oialr.RankRule(raise_by=1)
    with pytest.raises(ValueError, match=r"no direction was shown for first/kernel"):
        oialr.truncate(moved(cores), None, rule)
    tx = oialr.freeze_bases(optax.sgd(0.1))
    given = (loss, tx, matrices, RAISING["schedule"])
    with pytest.raises(ValueError, match=r"both RankRule\(raise_by=...\) and adaptive"):
        oialr.adaptive(*given, rule)
    with pytest.raises(ValueError, match=r"both RankRule\(raise_by=...\) and adaptive"):
        oialr.adaptive(*given, directions=lambda state: state.params)
    with pytest.raises(ValueError, match=r"`directions` need jit=jax\.jit"):
        oialr.adaptive(*given, rule, directions=loss, jit=jax.pmap)
    run = oialr.training(
        loss,
        optax.sgd(0.1),
        select=matrices,
        directions=lambda state, x, base: {"first": state.params["first"]},
        **RAISING,
    )
    state = run.init(params, x)
    with pytest.raises(ValueError, match="no leaf at second/kernel"):
        steps(run, state, x, 6)


def test_names_of_leaves_are_those_of_the_params():
    params, _, matrices = model()
    cores, _ = oialr.adapters(params, matrices, RANK, train="head")
    assert set(named_leaves(cores)) == {"first/kernel", "second/kernel", "head"}


def test_a_loss_of_all_outputs_runs_on_a_base():
    params, x, matrices = model()
    cores, base = oialr.adapters(params, matrices, RANK)
    grad = oialr.value_and_grad(on_base(scalar_loss(fn)))
    _, grads = jax.jit(grad)(cores, base, x)
    assert {name for name, _ in named_leaves(grads).items()} == {
        "first/kernel",
        "second/kernel",
    }
