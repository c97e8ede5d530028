"""The FLOP model: the published expressions and break-evens, and what XLA counts."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oialr_jax as oialr
from oialr_jax import cost
from oialr_jax.cost import LOW_RANK, Cost, Order, Rates, Workload
from oialr_jax.lowrank import Axes, factor
from oialr_jax.transform import with_trainable

MANY = 10**9  # rows for which work that does not grow with the rows vanishes
XLA_TOLERANCE = 0.01  # the counts are equal; XLA may come to count element-wise work

sides = st.integers(1, 5000)


@st.composite
def uses(draw):
    m, n = draw(sides), draw(sides)
    return draw(st.integers(0, 10**6)), m, n, draw(st.integers(1, min(m, n)))


def dense(rows, m, n, r):
    return 6 * rows * m * n


def rebuilt(rows, m, n, r):
    return 6 * rows * m * n + 4 * m * n * r + 4 * min(m, n) * r**2


def chain(rows, m, n, r):
    return rows * (4 * r * (m + n) + 6 * r**2)


def merged(rows, m, n, r):
    q = min(m, n)
    return rows * (4 * r * (m + n) + 2 * r * q) + 4 * q * r**2


@pytest.mark.parametrize("reference", [dense, rebuilt, chain, merged])
@given(use=uses())
@settings(deadline=None)
def test_training_step_costs_the_closed_expression(reference, use):
    order = Order(reference.__name__)
    assert cost.flops(order, Workload(*use)).total == reference(*use)


@pytest.mark.parametrize("order", Order)
@given(use=uses(), stack=st.integers(1, 100))
@settings(deadline=None)
def test_a_stack_costs_its_members(order, use, stack):
    one = cost.flops(order, Workload(*use))
    many = cost.flops(order, Workload(*use, stack=stack))
    assert many == Cost(stack * one.forward, stack * one.backward)


@pytest.mark.parametrize("order", Order)
@given(use=uses())
@settings(deadline=None)
def test_parts_of_a_step_only_add(order, use):
    whole = cost.flops(order, Workload(*use))
    first = cost.flops(order, Workload(*use, input_gradient=False))
    inference = cost.flops(order, Workload(*use, training=False))
    assert first.forward == whole.forward
    assert first.backward <= whole.backward
    assert inference == Cost(whole.forward, 0)


@pytest.mark.parametrize(
    ("shape", "by_chain", "by_merged", "at_inference"),
    [
        ((768, 768), 411, 461, 384),
        ((768, 3072), 719, None, 614),
        ((3072, 768), 719, None, 614),
        ((768, 2304), 655, 768, 576),
        ((512, 512), 274, 307, 256),
        ((512, 2048), 480, None, 410),
        ((9 * 100, 100), None, None, 90),  # 3x3 convolution, same channels
        ((9 * 100, 200), 194, None, 164),  # 3x3 convolution, twice the channels
        ((200, 100), 73, 86, 67),  # 1x1 convolution, half the channels
    ],
    ids=str,
)
def test_break_even_ranks(shape, by_chain, by_merged, at_inference):
    """The largest rank cheaper than dense, where the table has the rounded crossing."""

    def break_even(order, training):
        ranks = range(1, min(shape) + 1)
        saving = [
            cost.flops(order, load).total < cost.flops(Order.DENSE, load).total
            for load in (Workload(MANY, *shape, r, training=training) for r in ranks)
        ]
        assert saving == sorted(saving, reverse=True)
        return None if all(saving) else sum(saving)

    for order, training, expected in [
        (Order.CHAIN, True, by_chain),
        (Order.MERGED, True, by_merged),
        (Order.MERGED, False, at_inference),
    ]:
        found = break_even(order, training)
        assert found == expected or found == expected - 1


@pytest.mark.parametrize(
    ("shape", "chain_until", "merged_until"),
    [
        ((768, 768), 256, 460),
        ((768, 3072), 256, 768),
        ((3072, 768), 256, 768),
        ((512, 512), 170, 307),
    ],
    ids=str,
)
def test_chain_up_to_a_third_of_the_small_side(shape, chain_until, merged_until):
    picked = [
        cost.cheapest(Workload(MANY, *shape, r)) for r in range(1, min(shape) + 1)
    ]
    # 4 q r^2 for merging moves the switch past q / 3 by less than one rank
    expected = [Order.CHAIN] * chain_until
    expected += [Order.MERGED] * (merged_until - chain_until)
    expected += [Order.REBUILT] * (min(shape) - merged_until)
    assert picked == expected


@given(use=uses())
@settings(deadline=None)
def test_rebuilding_never_costs_less_than_dense(use):
    rows, m, n, r = use
    load = Workload(*use)
    low, full = (cost.flops(x, load).total for x in (Order.REBUILT, Order.DENSE))
    assert low > full
    if rows:
        ratio = 1 + 2 * r / (3 * rows) * (1 + r / max(m, n))
        assert low / full == pytest.approx(ratio)


@given(use=uses(), input_gradient=st.booleans(), training=st.booleans())
@settings(deadline=None)
def test_cheapest_is_the_first_of_the_cheapest(use, input_gradient, training):
    load = Workload(*use, input_gradient=input_gradient, training=training)
    totals = [cost.flops(x, load).total for x in LOW_RANK]
    assert cost.cheapest(load) == LOW_RANK[totals.index(min(totals))]


def test_ties_go_to_the_earlier_order():
    # as many rows as the small side: merging saves nothing
    load = Workload(64, 100, 64, 20, training=False)
    a, b = (cost.flops(x, load).total for x in LOW_RANK[:2])
    assert a == b
    assert cost.cheapest(load) == Order.CHAIN


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": -1}, r"^`rows` must be at least 0, got -1$"),
        ({"m": 0}, r"^`m` must be at least 1, got 0$"),
        ({"n": 0}, r"^`n` must be at least 1, got 0$"),
        ({"stack": 0}, r"^`stack` must be at least 1, got 0$"),
        ({"window": -1}, r"^`window` must be at least 0, got -1$"),
        ({"window": 9}, r"^`window` must divide m=100, .*; got 9$"),
        ({"rank": 0}, r"^`rank` must be at least 1, got 0$"),
    ],
)
def test_bad_sizes_are_named(changed, message):
    sizes = {"rows": 10, "m": 100, "n": 64, "rank": 5, "stack": 1} | changed
    with pytest.raises(ValueError, match=message):
        Workload(**sizes)


def use_of(order, x, u, s, vt):
    """One use of a matrix, written out in the given order."""
    small_out = vt.shape[-1] <= u.shape[-2]
    if order == Order.CHAIN:
        return ((x @ u) @ s) @ vt
    if order == Order.MERGED:
        return (x @ u) @ (s @ vt) if small_out else (x @ (u @ s)) @ vt
    w = u @ (s @ vt) if small_out else (u @ s) @ vt
    return x @ w


def counted_by_xla(order, rows, m, n, r, *, stack, input_gradient, training):
    """FLOPs in the compiled program of one use and its vector-Jacobian product."""
    lead = (stack,) if stack > 1 else ()
    x, g, u, s, vt, w = (
        jax.ShapeDtypeStruct((*lead, *shape), jnp.float32)
        for shape in [(rows, m), (rows, n), (m, r), (r, r), (r, n), (m, n)]
    )

    def program(x, g, u, s, vt, w):
        if order == Order.DENSE:
            trained = w
            use = jnp.matmul
        else:
            trained = s

            def use(x, s):
                return use_of(order, x, u, s, vt)

        if not training:
            return use(x, trained)
        if input_gradient:
            y, pullback = jax.vjp(use, x, trained)
        else:
            y, pullback = jax.vjp(lambda trained: use(x, trained), trained)
        return y, pullback(g)

    compiled = jax.jit(program).lower(x, g, u, s, vt, w).compile()
    return compiled.cost_analysis()["flops"]


PARTS = {
    "step": {"input_gradient": True, "training": True},
    "first-layer": {"input_gradient": False, "training": True},
    "inference": {"input_gradient": True, "training": False},
}
SHAPES = {"tall": (384, 160), "wide": (160, 384), "square": (256, 256)}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", Order)
def test_xla_counts_the_same(order, shape, part):
    use = (512, *SHAPES[shape], 96)
    counted = counted_by_xla(order, *use, stack=1, **PARTS[part])
    expected = cost.flops(order, Workload(*use, **PARTS[part])).total
    assert counted == pytest.approx(expected, rel=XLA_TOLERANCE)


@pytest.mark.parametrize("order", Order)
def test_xla_counts_the_same_for_a_stack(order):
    use = (256, 192, 128, 48)
    counted = counted_by_xla(order, *use, stack=3, **PARTS["step"])
    expected = cost.flops(order, Workload(*use, stack=3)).total
    assert counted == pytest.approx(expected, rel=XLA_TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", [Order.CHAIN, Order.MERGED, Order.REBUILT])
def test_a_factored_function_costs_what_the_order_says(order, shape):
    rows, (m, n), r = 512, SHAPES[shape], 96
    axes = Axes(shape=(m, n), stack=(), inputs=(0,), outputs=(1,))
    leaf = factor(jax.random.normal(jax.random.key(0), (m, n)), axes, r)
    apply = oialr.factored(lambda params, x: x @ params["w"], order=order)

    def program(leaf, x, g):
        def use(x, s):
            return apply({"w": dataclasses.replace(leaf, s=s)}, x)

        y, pullback = jax.vjp(use, x, leaf.s)
        return y, pullback(g)

    x, g = jnp.ones((rows, m)), jnp.ones((rows, n))
    counted = jax.jit(program).lower(leaf, x, g).compile().cost_analysis()["flops"]
    expected = cost.flops(order, Workload(rows, m, n, r)).total
    assert counted == pytest.approx(expected, rel=XLA_TOLERANCE)


# Bytes and rates

RATES = Rates(
    dot=1.0,
    dot_kernel=1.0,
    conv=1.0,
    conv_input=1.0,
    conv_kernel=1.0,
    bandwidth=1e30,
)


@pytest.mark.parametrize("order", Order)
@given(use=uses(), itemsize=st.sampled_from([2, 4]))
@settings(deadline=None)
def test_traffic_is_every_array_of_every_product_once(order, use, itemsize):
    load = Workload(*use)
    found = cost.traffic(order, load, itemsize)
    arrays = [p.a * p.b + p.b * p.c + p.a * p.c for p in cost.products(order, load)]
    assert found.total == itemsize * sum(arrays)


def test_traffic_of_a_dense_use_by_hand():
    rows, m, n = 10, 7, 5
    load = Workload(rows, m, n, rank=2, stack=3)
    x, w, y = rows * m, m * n, rows * n
    found = cost.traffic(Order.DENSE, load, itemsize=2)
    assert found == Cost(3 * 2 * (x + w + y), 2 * 3 * 2 * (x + w + y))


def test_a_convolution_reads_its_input_once_not_once_per_tap():
    rows, channels, n = 64, 8, 16
    conv = Workload(rows, 9 * channels, n, rank=4, window=9)
    dot = Workload(rows, 9 * channels, n, rank=4)
    x, w, y = rows * channels, 9 * channels * n, rows * n
    assert cost.traffic(Order.DENSE, conv, itemsize=1).forward == x + w + y
    for order in Order:
        assert cost.flops(order, conv) == cost.flops(order, dot)
        assert cost.traffic(order, conv).total < cost.traffic(order, dot).total


@pytest.mark.parametrize("order", Order)
@given(use=uses())
@settings(deadline=None)
def test_time_at_equal_rates_is_flops(order, use):
    load = Workload(*use)
    time = cost.seconds(order, load, RATES)
    assert time == pytest.approx(cost.flops(order, load).total)


def test_time_is_bytes_where_bandwidth_is_short_and_calls_where_they_are_dear():
    load = Workload(100, 64, 32, rank=8)
    slow = dataclasses.replace(RATES, bandwidth=1e-9)
    time = cost.seconds(Order.CHAIN, load, slow, itemsize=2)
    assert time == pytest.approx(1e9 * cost.traffic(Order.CHAIN, load, 2).total)
    calls = dataclasses.replace(RATES, dot=1e30, dot_kernel=1e30, overhead=1.0)
    assert cost.seconds(Order.CHAIN, load, calls) == pytest.approx(7)
    assert cost.seconds(Order.DENSE, load, calls) == pytest.approx(3)


def test_measured_rates_move_the_choice():
    """Where a gradient over the rows is dear, or bandwidth short, FLOPs mislead."""
    load = Workload(10**5, 768, 768, rank=500)
    assert cost.cheapest(load) == Order.REBUILT
    slow = dataclasses.replace(RATES, dot_kernel=0.01)
    assert cost.cheapest(load, slow) == Order.CHAIN
    merged = Workload(10**5, 768, 768, rank=300)
    assert cost.cheapest(merged, RATES) == Order.MERGED
    narrow = dataclasses.replace(RATES, bandwidth=1e-9)  # rebuilding moves least
    assert cost.cheapest(merged, narrow) == Order.REBUILT


def test_merging_can_be_ruled_out_for_convolutions():
    conv = Workload(10**5, 9 * 64, 64, rank=64, window=9)
    dot = dataclasses.replace(conv, window=0)
    one = Workload(10**5, 64, 64, rank=64, window=1)  # a 1x1 convolution is one
    without = dataclasses.replace(RATES, conv_merging=False)
    assert cost.cheapest(conv, RATES) == cost.cheapest(dot, without) == Order.MERGED
    assert cost.cheapest(conv, without) == Order.CHAIN
    assert cost.cheapest(one, without) != Order.MERGED


def test_times_within_the_margin_are_equal():
    load = Workload(10**5, 768, 768, rank=259)  # merged saves less than 1 % of FLOPs
    chain, merged = (cost.flops(x, load).total for x in LOW_RANK[:2])
    assert 1 - cost.MARGIN < merged / chain < 1
    assert cost.cheapest(load) == Order.MERGED
    assert cost.cheapest(load, RATES) == Order.CHAIN


@pytest.mark.parametrize("name", ["dot", "conv_kernel", "bandwidth"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_rates_are_positive(name, value):
    with pytest.raises(ValueError, match=f"^`{name}` must be positive, got {value}"):
        dataclasses.replace(RATES, **{name: value})


def test_overhead_is_not_negative():
    with pytest.raises(ValueError, match="`overhead` must be at least 0, got -1"):
        dataclasses.replace(RATES, overhead=-1.0)


def test_item_sizes_are_positive():
    with pytest.raises(ValueError, match="`itemsize` must be at least 1, got 0"):
        cost.traffic(Order.CHAIN, Workload(1, 1, 1, 1), itemsize=0)


CONVOLUTIONS = {
    "3x3": (3, 3, 16, 24),
    "1x1-wide": (1, 1, 8, 32),
    "5-tall": (5, 1, 8, 8),
}


@pytest.mark.parametrize("shape", CONVOLUTIONS)
@pytest.mark.parametrize("order", [None, *LOW_RANK])
def test_a_factored_convolution_costs_what_the_order_says(order, shape):
    """No padding, so that every tap of every output position is a product."""
    *window, channels, n = CONVOLUTIONS[shape]
    image = jnp.ones((4, 12, 12, channels))
    axes = Axes(CONVOLUTIONS[shape], (), (0, 1, 2), (3,))
    weight = jax.random.normal(jax.random.key(0), CONVOLUTIONS[shape])
    r = 6

    def call(params, x):
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    leaf = weight if order is None else factor(weight, axes, r)
    apply = oialr.factored(call, order=order)

    def program(leaf, trained, x, g):
        def use(trained):
            return apply({"w": with_trainable(leaf, trained)}, x)

        y, pullback = jax.vjp(use, trained)
        return y, pullback(g)

    y = call({"w": weight}, image)
    trained = oialr.transform.trainable(leaf)
    compiled = jax.jit(program).lower(leaf, trained, image, y).compile()
    taps = window[0] * window[1]
    rows = y.size // n
    load = Workload(rows, taps * channels, n, r, window=taps, input_gradient=False)
    expected = cost.flops(order or Order.DENSE, load).total
    counted = compiled.cost_analysis()["flops"]
    assert counted == pytest.approx(expected, rel=XLA_TOLERANCE)
