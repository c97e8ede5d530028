"""What happens to a weight before its product: whatever it is, the product is exact."""

import math
import warnings

import jax
import jax.numpy as jnp
import pytest
from cases import (
    BY_NAME,
    conv_joined,
    experts_by_index,
    experts_ragged,
    gates,
    iterated,
    normal,
    on_devices,
    own_rule,
    penalised,
    plain,
    stacked,
)
from helpers import assert_close, in_low_rank, projected, scalar_loss
from hypothesis import given, note, settings
from hypothesis import strategies as st

import oialr_jax as oialr
from oialr_jax.lowrank import Axes, named_leaves

TOLERANCE = 5e-5


def attention_like(p, x):
    q, k, v = jnp.split(p["qkv"], 3, axis=1)
    y = jnp.tanh(x @ q) * jnp.sin(x @ k) + x @ v
    return y[:, :64] @ p["wo"][:64] + jnp.tanh(y[:, 64:]) @ p["wo"][64:]


def normed_twice(p, x):
    def normed(w):
        return w / jnp.linalg.norm(w, axis=0, keepdims=True)

    return jnp.tanh(x @ normed(p["a"])) @ normed(p["b"])


def _convolved(x, w):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", None, None, numbers)


LARGE = {
    "stack_iterated": plain(iterated, (256, 128), w=(3, 128, 128)),
    "gates_joined": plain(gates, (256, 128), **dict.fromkeys("ifgo", (128, 96))),
    "rows_joined": plain(
        lambda p, x: x @ jnp.concatenate([p["a"], p["b"]]),
        (256, 256),
        a=(128, 96),
        b=(128, 96),
    ),
    "weights_stacked": plain(stacked, (256, 128), a=(128, 128), b=(128, 128)),
    "split_apart": plain(attention_like, (512, 256), qkv=(256, 384), wo=(128, 64)),
    "heads_cut": plain(
        lambda p, x: x @ p["w"].reshape(256, 2, 256)[:, 1], (512, 256), w=(256, 512)
    ),
    "conv_cut": plain(
        lambda p, x: _convolved(x[..., :48], p["w"][:, :, :48]) + x @ p["w"][1, 1],
        (4, 12, 12, 64),
        w=(3, 3, 64, 64),
    ),
    "conv_joined": plain(
        conv_joined, (4, 16, 16, 64), a=(3, 3, 64, 48), b=(3, 3, 64, 64)
    ),
    "weight_normed": plain(normed_twice, (2048, 128), a=(128, 128), b=(128, 128)),
    "penalised": plain(penalised, (1024, 128), a=(128, 128), b=(128, 128)),
    "experts_by_index": plain(experts_by_index, (16, 64), w=(3, 64, 64)),
    "experts_ragged": plain(
        experts_ragged, (8, 128), up=(3, 128, 128), down=(3, 128, 128)
    ),
    "on_devices": plain(on_devices, (512, 128), a=(128, 256), b=(256, 128)),
    "own_rule": plain(own_rule, (512, 128), a=(128, 128), b=(128, 128)),
}
"""The cases of what is done to a weight first, at sizes at which products count."""


@pytest.mark.parametrize("name", LARGE)
def test_a_step_at_a_quarter_of_the_rank_does_less_than_half_of_the_work(name):
    fn, params, x = LARGE[name]()
    matrices = oialr.find_matrices(fn, params, x)
    assert not any(matrix.other for matrix in matrices)
    low = in_low_rank(params, matrices, 0.25)
    assert len(oialr.ranks(low)) == len(matrices) > 0

    def flops(params):
        step = jax.jit(oialr.value_and_grad(scalar_loss(oialr.factored(fn))))
        return step.lower(params, x).compile().cost_analysis()["flops"]

    assert flops(low) < 0.5 * flops(params)


@pytest.mark.parametrize("outer", ["vmap", "scan", "jit_of_mixed"])
@pytest.mark.parametrize("name", LARGE)
def test_composes_with(name, outer):
    if (name, outer) == ("experts_ragged", "vmap"):
        pytest.skip("JAX has no rule for ragged_dot under vmap")
    fn, params, x = BY_NAME[name].build()
    matrices = oialr.find_matrices(fn, params, x)
    chosen = matrices[::2] if outer == "jit_of_mixed" else matrices
    low = in_low_rank(params, chosen)
    xs = jnp.stack([x, -2 * x])

    def over(fn, params):
        if outer == "vmap":
            return jax.vmap(lambda x: fn(params, x))(xs)
        if outer == "scan":
            return jax.lax.scan(lambda c, x: (c, fn(params, x)), 0, xs)[1]
        return fn(params, x)

    def loss(fn):
        return scalar_loss(lambda params: over(fn, params))

    value = jax.jit(oialr.value_and_grad(loss(oialr.factored(fn))))
    actual, gradient = value(low)
    dense = oialr.materialize(low)
    desired, expected = jax.jit(jax.value_and_grad(loss(fn)))(dense)
    assert_close(actual, desired, TOLERANCE)
    assert_close(named_leaves(gradient), projected(expected, low), 10 * TOLERANCE)


AXES = Axes((6, 8), (), (0,), (1,))
SQUARES = {
    "of_columns": lambda w: jnp.sum(w[:, 1:4] ** 2),
    "of_rows_scaled": lambda w: jnp.sum(jnp.square(w * jnp.arange(6.0)[:, None]), 1),
    "of_columns_scaled": lambda w: jnp.sum((w * jnp.arange(8.0)[None]) ** 2, 0),
    "of_rows_scaled_in_all": lambda w: jnp.sum((w * jnp.arange(6.0)[:, None]) ** 2),
    "of_columns_scaled_in_all": lambda w: jnp.sum((w * jnp.arange(8.0)[None]) ** 2),
    "over_scaled_rows": lambda w: jnp.sum((w * jnp.arange(6.0)[:, None]) ** 2, 0),
    "scaled_after": lambda w: jnp.sum(0.5 * w**2 + 1.0, 1),
    "turned": lambda w: jnp.sum((w.T.reshape(2, 4, 6) ** 2).astype(jnp.float32), 2),
    "joined": lambda w: jnp.sum(jnp.concatenate([w, 2 * w, jnp.ones((6, 3))], 1) ** 2),
    "joined_rows": lambda w: jnp.sum(jnp.concatenate([w, 2 * w], 1) ** 2, 1),
    "joined_columns": lambda w: jnp.sum(jnp.stack([w, 2 * w]) ** 2, (1, 2)),
    "own_rows": lambda w: jnp.einsum("ij,ij->i", w, w),
}
NO_SQUARES = {
    "reduce_sum": lambda w: jnp.sum(w.reshape(3, 2, 8) ** 2, 1),  # part of the rows
    "integer_pow": lambda w: jnp.sum(w**3),
    "dot_general": lambda w: jnp.einsum("ij,ik->jk", w, w),
    "exp": lambda w: jnp.exp(-(w**2)),
    "mul": lambda w: jnp.sum((w * jnp.outer(jnp.arange(6.0), jnp.ones(8))) ** 2),
}


@pytest.mark.parametrize("name", [*SQUARES, *NO_SQUARES])
def test_sums_of_squares(name):
    fn = SQUARES.get(name) or NO_SQUARES[name]
    w = oialr.lowrank.factor(normal(0, 6, 8), AXES, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value, grad = jax.value_and_grad(scalar_loss(oialr.factored(fn)))(w)
    said = [str(x.message).rsplit("`")[-2] for x in caught]
    assert said == ([] if name in SQUARES else [name])
    desired, dense = jax.value_and_grad(scalar_loss(fn))(w.materialize())
    assert_close(value, desired, TOLERANCE)
    assert_close(grad.s, w.u.T @ dense @ w.vt.T, 10 * TOLERANCE)


@pytest.mark.parametrize("mode", ["fill", "clip"])
def test_an_index_out_of_bounds_gives_what_it_gives_of_the_dense_weight(mode):
    axes = Axes((3, 4, 5), (0,), (1,), (2,))
    w = oialr.lowrank.factor(normal(0, 3, 4, 5), axes, 2)

    def fn(w, x):
        chosen = jnp.take(w, jnp.array([0, 7, 2]), axis=0, mode=mode)
        return jnp.einsum("bi,bij->bj", x, chosen)

    x = normal(1, 3, 4)
    actual, desired = oialr.factored(fn)(w, x), fn(w.materialize(), x)
    assert bool(jnp.isnan(desired[1]).all()) == (mode == "fill")
    assert_close(jnp.isnan(actual), jnp.isnan(desired), 0)
    assert_close(jnp.nan_to_num(actual), jnp.nan_to_num(desired), TOLERANCE)


# A grammar of uses


def _changes(draw, shape):
    """One thing that is done to a weight of this shape, as (name, function)."""
    dim = draw(st.integers(0, len(shape) - 1))
    n = shape[dim]
    kind = draw(
        st.sampled_from(
            (
                *("cast", "transpose", "split_dim", "merge", "cut", "part"),
                *("concatenate", "stack", "scale", "vector", "index"),
            )
        )
    )
    if kind == "cast":
        return kind, lambda w, p: w.astype(jnp.float16).astype(jnp.float32)
    if kind == "transpose":
        order = draw(st.permutations(range(len(shape))))
        return f"transpose{order}", lambda w, p: jnp.transpose(w, order)
    if kind == "split_dim" and n % 2 == 0:
        new = (*shape[:dim], *draw(st.sampled_from([(2, n // 2), (n // 2, 2)])))
        new += shape[dim + 1 :]
        return f"reshape{new}", lambda w, p: w.reshape(new)
    if kind == "merge" and dim + 1 < len(shape):
        new = (*shape[:dim], n * shape[dim + 1], *shape[dim + 2 :])
        return f"reshape{new}", lambda w, p: w.reshape(new)
    if kind == "cut" and n > 2:
        first = draw(st.integers(0, n - 2))
        last = draw(st.integers(first + 1, n))
        step = draw(st.sampled_from([1, 1, 2]))
        where = (*[slice(None)] * dim, slice(first, last, step))
        return f"w[{where}]", lambda w, p: w[where]
    if kind == "part" and n % 2 == 0:
        i = draw(st.integers(0, 1))
        return f"split{dim}[{i}]", lambda w, p: jnp.split(w, 2, dim)[i]
    if kind == "concatenate":
        other = draw(st.sampled_from(["w", "array", "both"]))
        array = 0.5 * jnp.ones(shape)

        def joined(w, p):
            parts = {"w": [w, w], "array": [array, w], "both": [w, array, 2.0 * w]}
            return jnp.concatenate(parts[other], dim)

        return f"concatenate{dim} {other}", joined
    if kind == "stack":
        return f"stack{dim}", lambda w, p: jnp.stack([w, -w], dim)
    if kind == "vector":
        sizes = [1] * len(shape)
        sizes[dim] = n
        factor = jnp.linspace(0.5, 1.5, n).reshape(sizes)
        return f"vector{dim}", lambda w, p: w * factor
    if kind == "index" and len(shape) > 2:
        i = draw(st.integers(0, n - 1))
        where = (*[slice(None)] * dim, i)
        return f"w[{where}]", lambda w, p: w[where]
    return "scale", lambda w, p: w * 1.5


@st.composite
def uses(draw):
    """A function of one weight: what is done to it, its product, and another use."""
    shape = draw(
        st.sampled_from([(6, 4), (4, 6), (8, 8), (2, 6, 4), (6, 2, 4), (3, 4, 6)])
    )
    steps, now = [], shape
    for _ in range(draw(st.integers(0, 4))):
        name, change = _changes(draw, now)
        new = jax.eval_shape(lambda w, f=change: f(w, None), jnp.ones(now)).shape
        if math.prod(new) <= 400 and len(new) <= 5:
            steps.append((name, change))
            now = new
    conv = len(now) == 3 and draw(st.booleans())
    gone = sorted(
        draw(st.sets(st.integers(0, len(now) - 1), min_size=1, max_size=len(now) - 1))
        if len(now) > 1
        else {0}
    )
    left, again = (
        draw(st.booleans()),
        draw(st.sampled_from(["", "same", "turned", "l2"])),
    )
    x = normal(1, 2, 5, now[1]) if conv else normal(1, 3, *(now[d] for d in gone))
    x2 = normal(2, 3, shape[0]), normal(3, 3, shape[-1])

    def fn(p, x):
        w = p["w"]
        for _, change in steps:
            w = change(w, p)
        if conv:
            y = jax.lax.conv_general_dilated(
                x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
            )
        else:
            axes = (gone, list(range(1, 1 + len(gone))))
            y = jnp.tensordot(w, x, axes) if left else jnp.tensordot(x, w, axes[::-1])
        if again == "l2":
            return y, jnp.sum(p["w"] ** 2)
        if again == "same":
            return y, jnp.tensordot(x2[0], p["w"], 1)
        if again == "turned":
            return y, jnp.tensordot(p["w"], x2[1], [[-1], [-1]])
        return y

    described = [shape, *(name for name, _ in steps), "conv" if conv else gone, again]
    return described, fn, {"w": normal(0, *shape)}, x, draw(st.floats(0.2, 1.0))


def _is_exact(use):
    described, fn, params, x, fraction = use
    note(str(described))
    matrices = oialr.find_matrices(fn, params, x)
    axes = [Axes(params["w"].shape, *_sides(params["w"].ndim))]
    axes = [matrix.axes for matrix in matrices] or axes
    rank = max(1, int(fraction * min(axes[0].m, axes[0].n)))
    low = {"w": oialr.lowrank.factor(params["w"], axes[0], rank)}

    @jax.jit  # one program, which compiles in the time of a few operations
    def both(low, x):
        dense, run = oialr.materialize(low), oialr.factored(fn)
        _, grad = oialr.value_and_grad(scalar_loss(run))(low, x)
        expected = projected(jax.grad(scalar_loss(fn))(dense, x), low)
        return (run(low, x), named_leaves(grad)), (fn(dense, x), expected)

    supported = matrices and not matrices[0].other
    with warnings.catch_warnings():
        warnings.simplefilter("error" if supported else "ignore")
        actual, desired = both(low, x)
    tolerance = 1e-2 if "cast" in described else TOLERANCE  # factors round, not W
    assert_close(actual[0], desired[0], tolerance)
    assert_close(actual[1], desired[1], 20 * tolerance)


def _sides(ndim):
    return tuple(range(ndim - 2)), (ndim - 2,), (ndim - 1,)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(uses())
def test_thirty_random_uses(use):
    _is_exact(use)


@pytest.mark.long
@settings(max_examples=400, deadline=None)
@given(uses())
def test_four_hundred_random_uses(use):
    _is_exact(use)
