"""Evaluation: factored(fn) equals fn on the materialised params, however it is used."""

import itertools
import re
import warnings

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, CASES, KINDS, normal
from helpers import TOLERANCE, assert_close, in_low_rank, projected, scalar_loss
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import oialr_jax as oialr
from oialr_jax.lowrank import Axes, factor, is_low_rank, named_leaves
from oialr_jax.transform import with_trainable

GRADIENT_TOLERANCE = 10  # times the tolerance of values: a second pass of rounding


def low_rank_case(case, fraction=0.5):
    fn, params, x = case.build()
    low = in_low_rank(params, oialr.find_matrices(fn, params, x), fraction)
    assert set(oialr.ranks(low)) == {path for path, *_ in case.found}  # not vacuous
    return fn, low, x


EVERY_ORDER = [
    pytest.param(case, order, id=f"{case}-{order}")
    for case in CASES
    for order in (None, "chain", "merged", "rebuilt")
    if order is None or case in KINDS
]


@pytest.mark.parametrize(("case", "order"), EVERY_ORDER)
def test_equals_the_function_on_materialised_params(case, order):
    fn, params, x = low_rank_case(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = eqx.filter_jit(oialr.factored(fn, order=order))(params, x)
    desired = fn(oialr.materialize(params), x)
    assert_close(actual, desired, TOLERANCE[jnp.dtype(case.dtype)])
    said = [
        f"{path} is materialised to its dense shape "
        f"{named_leaves(params)[path].shape}: no low-rank rule for `{primitive}`"
        for path, primitive in case.reported
    ]
    assert [str(w.message) for w in caught] == said


@pytest.mark.parametrize(
    ("case", "order"),
    [
        x
        for x in EVERY_ORDER
        if x.values[0].name != "equinox"
        and (x.values[1] is not None or x.values[0] not in KINDS)
    ],
)
@pytest.mark.filterwarnings("ignore:.*is materialised:UserWarning")
def test_gradient_of_the_core_is_the_projected_dense_gradient(case, order):
    fn, params, x = low_rank_case(case)
    grad = oialr.value_and_grad(scalar_loss(oialr.factored(fn, order=order)))
    _, actual = jax.jit(grad)(params, x)
    dense = jax.jit(jax.grad(scalar_loss(fn)))(oialr.materialize(params), x)
    tolerance = GRADIENT_TOLERANCE * TOLERANCE[jnp.dtype(case.dtype)]
    assert_close(named_leaves(actual), projected(dense, params), tolerance)


def test_plain_grad_gives_the_bases_zero():
    fn, params, x = low_rank_case(BY_NAME["attention"])
    grads = jax.grad(scalar_loss(oialr.factored(fn)))(params, x)
    for node in jax.tree.leaves(grads, is_leaf=is_low_rank):
        if is_low_rank(node):
            assert not np.any(node.u)
            assert not np.any(node.vt)
            assert np.any(node.s)


def test_without_low_rank_leaves_the_function_itself_runs():
    calls = []

    def fn(params, x):
        calls.append(type(x))
        return x @ params

    x = np.ones((2, 2), np.float32)
    oialr.factored(fn)(jnp.ones((2, 2)), x)
    assert calls == [np.ndarray]  # not a tracer


@pytest.mark.parametrize("outer", ["vmap_x", "vmap_all", "remat", "scan", "grad_grad"])
def test_composes_with(outer):
    fn, params, x = low_rank_case(BY_NAME["dense"])
    dense = oialr.materialize(params)
    run = oialr.factored(fn)
    xs = jnp.stack([x, 2 * x, -x])

    def repeated(tree):
        return jax.tree.map(lambda a: jnp.stack([a, a, a]), tree)

    def second_order(f, p):
        return jax.grad(
            lambda y: jnp.sum(jax.grad(lambda z: scalar_loss(f)(p, z))(y) ** 2)
        )(x)

    actual, desired = (
        {
            "vmap_x": lambda f, p: jax.vmap(lambda x: f(p, x))(xs),
            "vmap_all": lambda f, p: jax.vmap(f)(repeated(p), xs),
            "remat": lambda f, p: jax.grad(
                lambda y: scalar_loss(jax.checkpoint(f))(p, y)
            )(x),
            "scan": lambda f, p: jax.lax.scan(lambda c, x: (c, f(p, x)), 0, xs)[1],
            "grad_grad": second_order,
        }[outer](run, params),
        {
            "vmap_x": lambda f, p: jax.vmap(lambda x: f(p, x))(xs),
            "vmap_all": lambda f, p: jax.vmap(f)(repeated(p), xs),
            "remat": lambda f, p: jax.grad(lambda y: scalar_loss(f)(p, y))(x),
            "scan": lambda f, p: jax.lax.scan(lambda c, x: (c, f(p, x)), 0, xs)[1],
            "grad_grad": second_order,
        }[outer](fn, dense),
    )
    assert_close(actual, desired, GRADIENT_TOLERANCE * TOLERANCE[x.dtype])


def test_composes_with_pmap_and_shard_map_and_collectives():
    fn, params, x = low_rank_case(BY_NAME["dense"])
    run = oialr.factored(lambda p, x: jax.lax.pmean(fn(p, x), "devices"))
    xs = jnp.stack([x * (i + 1) for i in range(8)])
    desired = jnp.mean(jax.vmap(lambda x: fn(oialr.materialize(params), x))(xs), 0)

    pmapped = jax.pmap(run, axis_name="devices", in_axes=(None, 0))(params, xs)
    assert_close(pmapped[3], desired, TOLERANCE[x.dtype])

    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        lambda p, x: run(p, x[0]),
        mesh=mesh,
        in_specs=(P(), P("devices")),
        out_specs=P(),
    )
    assert_close(jax.jit(mapped)(params, xs), desired, TOLERANCE[x.dtype])


class Everything(nn.Module):
    """Dropout, batch statistics, a static flag, a keyword: all of apply's surface."""

    @nn.compact
    def __call__(self, x, train, *, scale=1.0):
        x = nn.Dense(16)(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(4)(x) * scale


def test_rngs_mutable_collections_and_static_arguments():
    module, x = Everything(), normal(3, 8, 12)
    variables = module.init(jax.random.key(0), x, False)
    stats = variables["batch_stats"]

    def fn(params, x, train, rng=None, scale=1.0, name="train"):
        assert isinstance(train, bool)
        assert name == "train"
        return module.apply(
            {"params": params, "batch_stats": stats},
            x,
            train,
            scale=scale,
            rngs={"dropout": rng},
            mutable=["batch_stats"],
        )

    key = jax.random.key(7)
    matrices = oialr.find_matrices(fn, variables["params"], x, True, rng=key)
    params = in_low_rank(variables["params"], matrices)
    actual = oialr.factored(fn)(params, x, True, rng=key, scale=2.0)
    desired = fn(oialr.materialize(params), x, True, rng=key, scale=2.0)
    assert_close(actual, desired, TOLERANCE[x.dtype])
    assert "batch_stats" in actual[1]


def test_low_rank_leaves_in_any_argument_keep_their_own_axes():
    def fn(a, x, *, b):
        return (x @ a["w"]) @ b["w"].T

    a = {"w": factor(normal(0, 6, 8), Axes((6, 8), (), (0,), (1,)), 3)}
    b = {"w": factor(normal(1, 5, 8), Axes((5, 8), (), (1,), (0,)), 2)}
    x = normal(2, 4, 6)
    desired = fn(oialr.materialize(a), x, b=oialr.materialize(b))
    assert_close(oialr.factored(fn)(a, x, b=b), desired, TOLERANCE[x.dtype])


def test_results_that_are_not_arrays_come_back():
    w = factor(normal(0, 4, 4), Axes((4, 4), (), (0,), (1,)))
    out = oialr.factored(lambda w, x: {"y": x @ w, "tag": "a", "none": None, "n": 3})(
        w, jnp.ones((2, 4))
    )
    assert out["tag"] == "a"
    assert out["none"] is None
    assert out["n"] == 3


UNKNOWN = {
    "add": lambda w, x: x @ (w + 1),
    "round": lambda w, x: _quantized(w, x),  # in a function with its own rule
    "sort": lambda w, x: x @ jnp.sort(w, axis=0),
    "reshape": lambda w, x: x[:, :3] @ w.reshape(3, 8),
    "carry of while": lambda w, x: (
        x @ jax.lax.while_loop(lambda w: jnp.sum(w) > 1e9, lambda w: w * 2.0, w)
    ),
    "carry of scan": lambda w, x: (
        x @ jax.lax.scan(lambda w, _: (w * 2.0, None), w, length=2)[0]
    ),
    "scan": lambda w, x: x @ jax.lax.scan(lambda c, row: (c, row), 0, w)[1],
    "output": lambda w, x: (w, x),
    "dot_general": lambda w, x: jnp.einsum("bi,ij->ij", x, w),
}


@jax.custom_vjp
def _quantized(w, x):
    return x @ jnp.round(w * 8) / 8


def _quantized_fwd(w, x):
    return _quantized(w, x), (w, x)


def _quantized_bwd(residuals, g):
    w, x = residuals
    return x.T @ g, g @ w.T  # straight through


_quantized.defvjp(_quantized_fwd, _quantized_bwd)


@pytest.mark.parametrize("primitive", UNKNOWN)
def test_what_no_rule_knows_is_materialised_and_said_once(primitive):
    fn = UNKNOWN[primitive]
    w = factor(normal(0, 4, 6), Axes((4, 6), (), (0,), (1,)), 3)
    params, x = {"w": w}, normal(1, 2, 4)

    def by_name(params, x):
        return fn(params["w"], x)

    run = oialr.factored(by_name)
    rule = f"no low-rank rule for `{primitive}`"
    said = re.escape(f"w is materialised to its dense shape (4, 6): {rule}")
    with pytest.warns(UserWarning, match=said) as caught:
        actual = run(params, x)
    assert len(caught) == 1
    run(params, x)  # a second warning would be an error
    assert_close(actual, by_name(oialr.materialize(params), x), TOLERANCE[x.dtype])


@pytest.mark.filterwarnings("ignore:.*is materialised:UserWarning")
def test_a_custom_rule_about_the_dense_weight_is_respected():
    w = factor(normal(0, 4, 6), Axes((4, 6), (), (0,), (1,)), 3)
    x = normal(1, 2, 4)
    grad = jax.grad(lambda w: jnp.sum(jnp.sin(oialr.factored(_quantized)(w, x))))(w)
    dense = jax.grad(lambda w: jnp.sum(jnp.sin(_quantized(w, x))))(w.materialize())
    assert_close(grad.s, w.u.T @ dense @ w.vt.T, TOLERANCE[x.dtype])


@jax.custom_vjp
def chosen(w, x, labels):
    """The mean score of the labels; what comes back is clipped."""
    return jnp.mean(jnp.take_along_axis(x @ w, labels[:, None], 1))


def _chosen_forward(w, x, labels):
    return chosen(w, x, labels), (w, x, labels)


def _chosen_backward(saved, g):
    w, x, labels = saved
    hot = jnp.clip(g, -0.1, 0.1) * jax.nn.one_hot(labels, w.shape[1]) / len(labels)
    return (hot.T @ x).T, hot @ w.T, None


chosen.defvjp(_chosen_forward, _chosen_backward)


@jax.custom_vjp
def over_time(w, x):
    return jnp.einsum("btm,mn->btn", x, w)


def _over_time_backward(saved, g):
    w, x = saved
    turned = jnp.transpose(g, (2, 1, 0))  # the rows come last, in another order
    return jnp.einsum("btm,ntb->mn", x, turned), jnp.einsum("btn,mn->btm", g, w)


over_time.defvjp(lambda w, x: (over_time(w, x), (w, x)), _over_time_backward)


def test_a_custom_rule_may_sum_over_rows_in_any_order():
    w = factor(normal(0, 12, 10), Axes((12, 10), (), (0,), (1,)), 4)
    x = normal(1, 3, 5, 12)

    def loss(fn):
        return lambda w: jnp.sum(jnp.sin(fn(w, x)))

    actual = jax.jit(jax.grad(loss(oialr.factored(over_time))))
    desired = jax.grad(loss(over_time))(w.materialize())
    assert_close(actual(w).s, w.u.T @ desired @ w.vt.T, TOLERANCE[x.dtype])
    assert not re.search(r"f32\[(12,10|10,12)\]", actual.lower(w).compile().as_text())


def test_a_custom_rule_with_labels_of_whole_numbers_makes_no_dense_array():
    w = factor(normal(0, 48, 40), Axes((48, 40), (), (0,), (1,)), 4)
    x, labels = normal(1, 16, 48), jnp.arange(16) % 40

    def loss(fn):
        return lambda w, x: 3 * fn(w, x, labels) + jnp.sum(x**2)

    grad = jax.jit(jax.grad(loss(oialr.factored(chosen)), argnums=(0, 1)))
    actual = grad(w, x)
    desired = jax.grad(loss(chosen), argnums=(0, 1))(w.materialize(), x)
    assert_close(actual[0].s, w.u.T @ desired[0] @ w.vt.T, TOLERANCE[x.dtype])
    assert_close(actual[1], desired[1], TOLERANCE[x.dtype])
    text = grad.lower(w, x).compile().as_text()
    assert not re.search(r"f32\[(48,40|40,48)\]", text)


def test_the_dense_gradient_never_exists():
    """No array of the shape of W in the compiled step of a chained layer."""
    w = factor(normal(0, 96, 80), Axes((96, 80), (), (0,), (1,)), 8)
    x = normal(1, 512, 96)
    step = jax.jit(
        oialr.value_and_grad(scalar_loss(oialr.factored(lambda w, x: x @ w)))
    )
    text = step.lower(w, x).compile().as_text()
    assert "f32[8,8]" in text
    assert not re.search(r"f32\[(96,80|80,96)\]", text)


def test_a_network_at_15_percent_rank_does_under_035_of_the_dense_flops():
    widths, batch = (256, 512, 512, 512, 256), 512
    params = {
        f"w{i}": normal(i, m, n) for i, (m, n) in enumerate(itertools.pairwise(widths))
    }
    x = normal(9, batch, widths[0])

    def fn(params, x):
        for name in sorted(params):
            x = jnp.tanh(x @ params[name])
        return x

    low = in_low_rank(params, oialr.find_matrices(fn, params, x), fraction=0.15)

    def flops(params):
        step = jax.jit(oialr.value_and_grad(scalar_loss(oialr.factored(fn))))
        return step.lower(params, x).compile().cost_analysis()["flops"]

    assert flops(low) < 0.35 * flops(params)


def test_only_rank_sized_activations_are_kept_for_the_backward_pass():
    w = factor(normal(0, 96, 80), Axes((96, 80), (), (0,), (1,)), 8)
    x = normal(1, 512, 96)
    run = oialr.factored(lambda w, x: x @ w)
    _, pullback = jax.vjp(lambda s: run(with_trainable(w, s), x), w.s)
    kept = [
        leaf.shape for leaf in jax.tree.leaves(pullback) if leaf.shape[:1] == (512,)
    ]
    assert kept == [(512, 8)]


def test_factored_traces_one_program_per_shape():
    fn, params, x = low_rank_case(BY_NAME["dense"])
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(oialr.factored(fn), n=1))
    step(params, x)
    step(jax.tree.map(lambda a: a * 1.5, params), x)


# What is kept for the backward pass


def kept(order, m, n, rank, rows=64):
    """Shapes of the arrays that JAX saves between forward and backward pass."""
    axes = Axes((m, n), (), (0,), (1,))
    leaf = factor(normal(0, m, n), axes, rank)
    apply = oialr.factored(lambda w, x: x @ w, order=order)

    def use(x, core):
        return apply(with_trainable(leaf, core), x)

    _, pullback = jax.vjp(use, normal(1, rows, m), leaf.s)
    return {array.shape for array in jax.tree.leaves(pullback) if array.ndim}


@pytest.mark.parametrize(("m", "n"), [(96, 40), (40, 96), (56, 56)])
def test_a_chain_keeps_rows_by_rank_and_no_input(m, n):
    rows, r = 64, 8
    assert (rows, r) in kept("chain", m, n, r)
    assert kept("chain", m, n, r) <= {(rows, r), (m, r), (r, r), (r, n)}


def test_merged_keeps_rows_by_rank_where_the_core_goes_into_the_outputs():
    assert kept("merged", 96, 40, 8) <= {(64, 8), (96, 8), (8, 8), (8, 40)}


def test_other_orders_keep_the_input():
    """The gradient of U S, or of W, is a product with x; merging saves other work."""
    assert (64, 40) in kept("merged", 40, 96, 8)
    assert (64, 96) in kept("rebuilt", 96, 40, 8)


def test_a_convolution_chain_keeps_positions_by_rank_and_no_input():
    axes = Axes((3, 3, 12, 20), (), (0, 1, 2), (3,))
    leaf = factor(normal(0, 3, 3, 12, 20), axes, 5)
    x = normal(1, 4, 8, 8, 12)

    def conv(w, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=numbers
        )

    apply = oialr.factored(conv, order="chain")
    _, pullback = jax.vjp(
        lambda x, core: apply(with_trainable(leaf, core), x), x, leaf.s
    )
    saved = {array.shape for array in jax.tree.leaves(pullback)}
    assert (4, 8, 8, 5) in saved
    assert x.shape not in saved
    assert all(shape[-1] <= 5 for shape in saved if shape[:1] == (4,))
