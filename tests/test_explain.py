"""explain(): what factored() does with each matrix, and why; without running it."""

import jax
import jax.numpy as jnp
import pytest
from cases import BY_NAME, KINDS, normal
from flax import linen as nn
from helpers import in_low_rank

import oialr_jax as oialr
from oialr_jax import cost
from oialr_jax.cost import Rates
from oialr_jax.lowrank import Axes, factor

RATES = Rates(
    dot=1e9, dot_kernel=1e7, conv=1e9, conv_input=1e9, conv_kernel=1e9, bandwidth=1e12
)


def network(params, x, scale):
    x = jnp.tanh((2 * x) @ params["a"])
    x = jax.jit(lambda x: jax.checkpoint(lambda x: jnp.tanh(x @ params["b"]))(x))(x)
    return scale * (x @ params["c"])


def problem():
    params = {"a": normal(0, 24, 64), "b": normal(1, 64, 64), "c": normal(2, 64, 10)}
    x = normal(3, 32, 24)
    low = dict(params)
    low["a"] = factor(params["a"], Axes((24, 64), (), (0,), (1,)), 4)
    low["b"] = factor(params["b"], Axes((64, 64), (), (0,), (1,)), 48)
    return low, x


def test_lists_every_use_in_order_with_its_flops():
    params, x = problem()
    told = oialr.explain(network, params, x, jnp.ones(()))
    a, b, c = told.lines
    assert [(y.path, y.kind, y.rows, y.m, y.n, y.rank) for y in told.lines] == [
        ("a", "dot", 32, 24, 64, 4),
        ("b", "dot", 32, 64, 64, 48),
        ("c", "dot", 32, 64, 10, None),
    ]
    first = cost.Workload(32, 24, 64, 4, input_gradient=False)
    inner, head = cost.Workload(32, 64, 64, 48), cost.Workload(32, 64, 10, 1)
    assert a.flops == cost.flops(cost.Order(a.order), first).total
    assert a.dense_flops == cost.flops(cost.Order.DENSE, first).total
    assert b.flops == cost.flops(cost.Order(b.order), inner).total
    assert (c.order, c.why) == ("dense", "")
    assert c.flops == c.dense_flops == cost.flops(cost.Order.DENSE, head).total
    assert told.flops == a.flops + b.flops + c.flops
    assert told.dense_flops == a.dense_flops + b.dense_flops + c.dense_flops


def test_the_first_layer_is_known_through_jit_and_remat():
    """Data needs no gradient, whatever is done to it before it meets a matrix."""

    @jax.jit
    def fn(params, x, y):
        x = jax.checkpoint(lambda x: jnp.cos(x) @ params["a"])(x.astype(jnp.float32))
        return x @ params["b"] + y @ params["a"]

    params = {"a": normal(0, 16, 16), "b": normal(1, 16, 16)}
    low = in_low_rank(params, oialr.find_matrices(fn, params, *[normal(2, 8, 16)] * 2))
    told = oialr.explain(fn, low, *[normal(2, 8, 16)] * 2)
    no_gradient, one = (
        cost.flops(
            cost.Order.DENSE, cost.Workload(8, 16, 16, 8, input_gradient=g)
        ).total
        for g in (False, True)
    )
    assert [(x.path, x.dense_flops) for x in told.lines] == [
        ("a", no_gradient),
        ("b", one),
        ("a", no_gradient),
    ]


@pytest.mark.parametrize("order", [None, "chain", "merged", "rebuilt"])
def test_what_it_says_is_what_xla_counts(order):
    """Every product of a whole step, dense head included, to 1 %."""
    widths = (256, 320, 192, 10)
    params = {k: normal(i, *widths[i : i + 2]) for i, k in enumerate("abc")}
    x = normal(3, 512, 256)

    def fn(params, x):  # no nonlinearity, so that XLA counts products alone
        return x @ params["a"] @ params["b"] @ params["c"]

    found = oialr.select(oialr.find_matrices(fn, params, x))
    low = in_low_rank(params, found, fraction=0.3)
    forward = oialr.factored(fn, order=order)
    step = jax.jit(oialr.value_and_grad(lambda p, x: jnp.sum(forward(p, x))))
    counted = step.lower(low, x).compile().cost_analysis()["flops"]
    told = oialr.explain(fn, low, x, order=order)
    assert [line.rank for line in told.lines] == [76, 57, None]
    assert counted == pytest.approx(told.flops, rel=0.01)


@pytest.mark.parametrize("order", ["chain", "merged", "rebuilt"])
def test_a_forced_order_is_told(order):
    params, x = problem()
    told = oialr.explain(network, params, x, 1.0, order=order)
    assert [line.order for line in told.lines] == [order, order, "dense"]


def test_why_has_all_orders_and_their_unit():
    params, x = problem()
    flops = oialr.explain(network, params, x, 1.0, rates=None)
    with_rates = oialr.explain(network, params, x, 1.0, rates=RATES)
    assert with_rates.lines[1].why.startswith("time: chain ")
    unit = "time" if jax.default_backend() in cost.RATES else "FLOPs"
    assert flops.lines[1].why.startswith(f"{unit}: chain ")
    load = cost.Workload(32, 64, 64, 48)
    dense = cost.seconds(cost.Order.DENSE, load, RATES)
    for order in cost.LOW_RANK:
        share = cost.seconds(order, load, RATES) / dense
        assert f"{order.value} {share:.2f}" in with_rates.lines[1].why
    assert with_rates.lines[1].order == cost.cheapest(load, RATES)


def test_shapes_suffice_and_it_prints():
    model = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(5)])
    x = jax.ShapeDtypeStruct((7, 12), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]

    def forward(params, x):
        return model.apply({"params": params}, x)

    r = 3
    abstract = [
        jax.ShapeDtypeStruct(s, jnp.float32) for s in [(12, r), (r, r), (r, 32)]
    ]
    params["layers_0"]["kernel"] = oialr.LowRank(
        *abstract, Axes((12, 32), (), (0,), (1,))
    )
    text = str(oialr.explain(forward, params, x))
    assert "layers_0/kernel" in text
    assert "12x32" in text
    assert "GFLOP a step" in text.splitlines()[-1]


EXPLAINED = (*KINDS, *(BY_NAME[x] for x in ("gates_joined", "experts_ragged")))


@pytest.mark.parametrize("case", [c for c in EXPLAINED if c.name != "equinox"], ids=str)
def test_every_case_can_be_explained(case):
    fn, params, x = case.build()
    low = in_low_rank(params, oialr.find_matrices(fn, params, x))
    paths = {line.path for line in oialr.explain(fn, low, x).lines}
    assert paths >= {path for path, *_ in case.found}


@pytest.mark.parametrize("use", [oialr.factored, oialr.explain])
def test_an_unknown_order_is_an_error(use):
    params, x = problem()
    with pytest.raises(
        ValueError, match="`order` must be one of chain, merged, rebuilt"
    ):
        use(network, params, x, 1.0, order="dense") if use is oialr.explain else use(
            network, order="dense"
        )
