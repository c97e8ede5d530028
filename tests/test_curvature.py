"""Curvature: sums against float64 numpy, the scale in units of loss, every idiom."""

import dataclasses
import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, CASES, normal
from helpers import in_low_rank
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import oialr_jax as oialr
from oialr_jax import allocation, interpret, tracing, views, weighted
from oialr_jax.compression import two_factors
from oialr_jax.curvature import of_outputs
from oialr_jax.linalg import orthogonality_error
from oialr_jax.lowrank import Axes, is_low_rank, named_leaves, path_name

SUMS = {jnp.dtype(jnp.float32): 5e-5, jnp.dtype(jnp.bfloat16): 4e-2}
"""Of the largest entry of a sum."""
EXACT = 1e-4
"""Of a closed form in float32 against float64."""


def scalar(fn):
    """A smooth loss of all outputs, a mean over examples."""

    def loss(params, *batch):
        out = jax.tree.leaves(fn(params, *batch))
        total = sum(jnp.sum(jnp.sin(3 * x.astype(jnp.float32))) for x in out)
        return total / len(batch[0])

    return loss


def close(found, wanted, dtype=jnp.float32):
    wanted = np.asarray(wanted)
    scale = max(float(np.abs(wanted).max()), 1e-30)
    np.testing.assert_allclose(
        np.asarray(found, np.float64) / scale,
        wanted / scale,
        rtol=0,
        atol=SUMS[jnp.dtype(dtype)],
    )


# A slow reference: every use is told to the host, which loops over rows


class _Reference:
    """Handler that has the host add up, row by row, what each use of a leaf sees.

    A view holds its leaf, which number each entry has, and the leaf as it was; the
    walk lays all three out alike, so the host knows which entry of the leaf stands
    where, and by how much it is scaled.
    """

    def __init__(self, matrices, terms):
        self.terms = terms
        self.axes = {x.path: x.axes for x in matrices}
        self.sums = {
            x.path: [
                np.zeros((math.prod(x.axes.l), x.m, x.m)),
                np.zeros((math.prod(x.axes.l), x.n, x.n)),
                np.zeros(math.prod(x.axes.l)),
            ]
            for x in matrices
        }

    def materialize(self, view):
        return views.arrange(view, view.data[0])

    def scale(self, view, factor, axes):
        over = views.over_axes(view, factor, view.present)
        data = (view.data[0] * over.astype(view.data[0].dtype), *view.data[1:])
        return view.replace(data=data)

    def along(self, view, axis, change):
        return tuple(change(x, view.present.index(axis)) for x in view.data)

    def stacks(self, view, axis):
        return axis in self.axes[view.path].stack

    is_stack = stacks

    def sum_squares(self, view, dims):
        return jnp.sum(jnp.square(self.materialize(view)), dims)

    def unknown(self, view, primitive):
        pass

    def contract(self, view, x, use, eqn, rest=()):
        if use.groups > 1 or rest:
            return None
        number, original = (
            views.arrange(view.replace(dtype=jnp.float32), array)
            for array in view.data[1:]
        )
        w = self.materialize(view)
        operands = [x, x]
        operands[use.position] = w
        (out,) = views.bind(eqn, operands)
        add = functools.partial(self.add, view.path, use, eqn.params)

        @jax.custom_vjp
        def told(out, *seen):
            return out

        def backward(seen, g):
            jax.debug.callback(add, g, *seen)
            return g, None, None, None, None

        told.defvjp(lambda out, *seen: (out, seen), backward)
        return told(out, x, w, number, original)

    def add(self, path, use, params, *arrays):
        g, x, w, number, original = (np.asarray(a).astype(np.float64) for a in arrays)
        rows = _dot_rows if use.kind == "dot" else _conv_rows
        scale = rows(x, g, w / original, use, params)[2]
        x, g, number = rows(x, g, number, use, params)
        axes = self.axes[path]
        place = np.unravel_index(number.astype(int), axes.shape)

        def numbered(group):
            if not group:
                return np.zeros(number.shape, int)
            sizes = [axes.shape[a] for a in group]
            return np.ravel_multi_index([place[a] for a in group], sizes)

        stack, row, column = map(numbered, (axes.stack, axes.inputs, axes.outputs))
        inputs, outputs, count = self.sums[path]
        for e in range(len(number)):
            layer = stack[e, 0, 0]
            for seen, gradient in zip(x[e], g[e], strict=True):
                if not gradient.any():
                    continue
                count[layer] += 1
                gradient = self.terms * gradient  # of one term, where they have a mean
                a, b = np.zeros(axes.m), np.zeros(axes.n)
                seen = seen * scale[e, :, 0]
                gradient = gradient * scale[e, 0] / scale[e, 0, 0]
                if axes.m > 1 and row[e, 0, 0] == row[e, -1, 0]:  # contracts outputs
                    a[row[e, 0]], b[column[e, :, 0]] = gradient, seen
                else:
                    a[row[e, :, 0]], b[column[e, 0]] = seen, gradient
                inputs[layer] += np.outer(a, a)
                outputs[layer] += np.outer(b, b)


def _dot_rows(x, g, number, use, params):
    """(e, rows, inner), (e, rows, outer) and (e, inner, outer) of a dot product."""

    def grouped(array, *groups):
        sizes = [math.prod(array.shape[d] for d in group) for group in groups]
        return array.transpose([d for group in groups for d in group]).reshape(sizes)

    b, free = len(use.batch), len(use.free)
    rows = [d for d in range(x.ndim) if d not in (*use.x_batch, *use.x_contracted)]
    first = g.ndim - free if use.position == 1 else b
    outer = range(first, first + free)
    others = [d for d in range(b, g.ndim) if d not in outer]
    return (
        grouped(x, use.x_batch, rows, use.x_contracted),
        grouped(g, range(b), others, outer),
        grouped(number, use.batch, use.contracted, use.free),
    )


def _conv_rows(x, g, number, use, params):
    """The same of a convolution, tap by tap."""
    numbers = params["dimension_numbers"]
    x, g = x.transpose(numbers.lhs_spec), g.transpose(numbers.out_spec)
    number = number.transpose(numbers.rhs_spec)
    g = np.moveaxis(g, 1, -1)
    windows = []
    for place in np.ndindex(*g.shape[:-1]):
        window = np.zeros(number.shape[1:])
        for tap in np.ndindex(*number.shape[2:]):
            at = []
            for i, (t, k) in enumerate(zip(place[1:], tap, strict=True)):
                p = t * params["window_strides"][i] + k * params["rhs_dilation"][i]
                at.append((p - params["padding"][i][0]) / params["lhs_dilation"][i])
            inside = all(
                p == int(p) and 0 <= p < size
                for p, size in zip(at, x.shape[2:], strict=True)
            )
            if inside:
                window[(slice(None), *tap)] = x[(place[0], slice(None), *map(int, at))]
        windows.append(window.ravel())
    return (
        np.stack(windows)[None],
        g.reshape(1, -1, g.shape[-1]),
        number.reshape(1, len(number), -1).transpose(0, 2, 1),
    )


def reference(loss, params, matrices, *batch):
    """Σ x xᵀ, Σ δ δᵀ and the number of rows, by path, in float64."""
    traced = tracing.trace(loss, (params, *batch), {}, is_low_rank)
    terms = len(jax.tree.leaves(batch)[0])
    handler = _Reference(matrices, terms)

    def view(path, leaf, zero):
        name = path_name(path[2:])
        if name not in handler.axes:
            return leaf
        number = jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape)
        data = (leaf + zero.astype(leaf.dtype), number, leaf)
        return views.View.of(data, name, leaf.shape, leaf.dtype)

    def total(zero):
        values = [view(path, leaf, zero) for path, leaf in traced.leaves]
        return traced.rebuild(
            [
                views.as_array(x, handler, "output")
                for x in interpret.evaluate(traced.jaxpr, values, handler)
            ]
        )

    jax.block_until_ready(jax.grad(total)(jnp.zeros(())))
    jax.effects_barrier()
    return handler.sums


SKIPPED = {
    "experts_ragged": dict.fromkeys(("up", "down"), "ragged_dot_general"),
    "tied_embedding": {"Embed_0/embedding": "gather"},
    "two_weights_multiplied": {"b": "dot_general with no data"},
}


PUSHED = (
    *("dense_general", "conv2d_strided_dilated", "scan_remat", "experts_ragged"),
    *("weight_on_the_left", "used_twice_once_transposed", "cond", "nnx"),
    *("bfloat16_compute", "gates_joined", "two_weights_multiplied", "tied_embedding"),
    *("heads_cut", "weight_normed", "on_devices"),
)
"""Of the table of cases; all of them in full."""


def some(cases):
    return [
        pytest.param(x, id=x.name, marks=() if x.name in PUSHED else pytest.mark.long)
        for x in cases
    ]


@pytest.mark.parametrize("case", some(CASES))
def test_every_idiom_has_the_sums_of_a_slow_loop_or_says_why_not(case):
    fn, params, x = case.build()
    matrices = oialr.find_matrices(fn, params, x)
    loss = scalar(fn)
    run = oialr.curvature(loss, matrices, independent_rows=True)
    found = eqx.filter_jit(run)(params, x)
    assert dict(found.skipped) == SKIPPED.get(case.name, {})
    wanted = reference(loss, params, matrices, x)
    assert {*found.sides, *dict(found.skipped)} == set(wanted)
    for path, sides in found.sides.items():
        inputs, outputs, rows = wanted[path]
        if case.name == "weight_normed":  # a scale of both sides may be of either
            of_one = np.trace(np.asarray(sides.inputs)) / np.trace(inputs[0])
            inputs, outputs = inputs * of_one, outputs / of_one
        for side, sums in zip(sides, (inputs, outputs, rows), strict=True):
            close(np.reshape(side, sums.shape), sums, case.dtype)


@pytest.mark.parametrize("case", some(x for x in CASES if x.dtype == jnp.float32))
def test_the_sums_of_a_core_are_those_of_its_matrix_in_its_bases(case):
    fn, params, x = case.build()
    matrices = oialr.find_matrices(fn, params, x)
    low = in_low_rank(params, matrices)
    run = oialr.curvature(scalar(fn), matrices, independent_rows=True)
    run = eqx.filter_jit(run)
    found, dense = run(low, x), run(oialr.materialize(low), x)
    assert dict(found.skipped) == SKIPPED.get(case.name, {})
    for path, (inputs, outputs, rows) in found.sides.items():
        node, wanted = named_leaves(low)[path], dense.sides[path]
        close(inputs, node.u.mT @ wanted.inputs @ node.u)
        close(outputs, node.vt @ wanted.outputs @ node.vt.mT)
        np.testing.assert_array_equal(rows, wanted.rows)


def test_sums_of_a_network_written_out_in_numpy():
    a, b, x = (normal(i, *shape) for i, shape in enumerate([(6, 5), (5, 4), (7, 6)]))
    target = normal(3, 7, 4)

    def loss(params, x, target):
        out = jnp.tanh(x @ params["a"]) @ params["b"]
        return jnp.mean(jnp.sum((out - target) ** 2, axis=1))

    params = {"a": a, "b": b}
    matrices = oialr.find_matrices(loss, params, x, target)
    run = oialr.curvature(loss, matrices, independent_rows=True)
    found = jax.jit(run)(params, x, target)
    a, b, x, target = (np.asarray(v, np.float64) for v in (a, b, x, target))
    hidden = np.tanh(x @ a)
    last = 2 * (hidden @ b - target)  # of one example's loss
    first = (last @ b.T) * (1 - hidden**2)
    close(found.sides["a"].inputs, x.T @ x)
    close(found.sides["a"].outputs, first.T @ first)
    close(found.sides["b"].inputs, hidden.T @ hidden)
    close(found.sides["b"].outputs, last.T @ last)
    assert float(found.sides["b"].rows) == float(found.terms) == 7
    inputs, outputs = found.covariances("b")
    close(inputs, hidden.T @ hidden / 7)
    close(outputs, last.T @ last / 7)


def regression(params, x, target):
    """A mean over examples, of a residual network."""
    for name in sorted(params):
        x = x + jnp.tanh(x @ params[name])
    return jnp.mean(jnp.sum((x - target) ** 2, axis=-1))


SEPARATE = (
    "dense",
    "dense_general",
    "conv1d",
    "conv2d_strided_dilated",
    "conv_transpose",
    "attention",
    "scan_remat",
    "reshaped_first",
    "nnx",
    "haiku",
    "equinox",
)
"""Cases whose examples do not see each other and whose matrices are used once."""


@pytest.mark.parametrize("is_low", [False, True], ids=["dense", "low"])
@pytest.mark.parametrize("name", SEPARATE)
def test_sums_of_examples_are_those_of_their_gradients(name, is_low):
    fn, params, x = BY_NAME[name].build()
    matrices = oialr.find_matrices(fn, params, x)
    if is_low:
        params = in_low_rank(params, matrices)
    loss = scalar(fn)
    found = eqx.filter_jit(oialr.curvature(loss, matrices))(params, x)
    cores, rest = eqx.partition(params, eqx.is_inexact_array)

    def alone(cores, example):
        return loss_of(eqx.combine(cores, rest), example[None])

    loss_of = oialr.factored(loss)
    gradients = eqx.filter_jit(jax.vmap(jax.grad(alone), (None, 0)))(cores, x)
    gradients = named_leaves(gradients)
    assert set(found.sides) == {m.path for m in matrices}
    for matrix in matrices:
        g = gradients[matrix.path]
        g = g.s if is_low else jax.vmap(matrix.axes.to_matrix)(g)
        g = np.asarray(g, np.float64)
        inputs, outputs, _ = found.sides[matrix.path]
        close(inputs, np.sum(g @ np.swapaxes(g, -1, -2), axis=0))
        close(outputs, np.sum(np.swapaxes(g, -1, -2) @ g, axis=0))
        c, d = found.covariances(matrix.path)
        size = np.sum(g**2, axis=(0, -2, -1)) / len(x)
        close(jnp.trace(c, axis1=-2, axis2=-1) * jnp.trace(d, axis1=-2, axis2=-1), size)


def problem(depth=3, width=6, rows=16):
    params = {f"w{i}": normal(i, width, width) for i in range(depth)}
    x, target = normal(7, rows, width), normal(8, rows, width)
    matrices = oialr.find_matrices(regression, params, x, target)
    return params, x, target, matrices


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        close(a, b)


def test_batches_add_up_to_one_large_batch():
    params, x, target, matrices = problem()
    run = jax.jit(oialr.curvature(regression, matrices))
    whole = run(params, x, target)
    first, second = run(params, x[:4], target[:4]), run(params, x[4:], target[4:])
    assert_same(first.add(second), whole)
    added = first.add(second)
    for path in whole.sides:
        for a, b in zip(added.covariances(path), whole.covariances(path), strict=True):
            close(a, b)


def test_older_batches_count_less_with_a_decay():
    params, x, target, matrices = problem()
    run = jax.jit(oialr.curvature(regression, matrices, independent_rows=True))
    first, second = run(params, x[:8], target[:8]), run(params, x[8:], target[8:])
    found = first.add(second, decay=0.25).covariances("w0")
    for a, x, y in zip(
        found, first.covariances("w0"), second.covariances("w0"), strict=True
    ):
        close(a, (0.25 * x + y) / 1.25)


def test_a_scan_over_batches_is_their_sum():
    params, x, target, matrices = problem()
    run = oialr.curvature(regression, matrices)
    batches = x.reshape(4, 4, 6), target.reshape(4, 4, 6)

    @jax.jit
    def scanned(params, batches):
        zero = jax.tree.map(
            jnp.zeros_like, run(params, *(array[0] for array in batches))
        )
        return jax.lax.scan(
            lambda total, batch: (total.add(run(params, *batch)), None), zero, batches
        )[0]

    assert_same(scanned(params, batches), run(params, x, target))


def test_a_batch_divided_over_a_mesh_has_the_same_sums():
    params, x, target, matrices = problem()
    run = jax.jit(oialr.curvature(regression, matrices))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    placed = jax.device_put((x, target), NamedSharding(mesh, P("data")))
    whole = jax.device_put(params, NamedSharding(mesh, P()))
    found = run(whole, *placed)
    assert_same(found, run(params, x, target))
    assert all(side.is_fully_replicated for side in jax.tree.leaves(found.sides))


def test_models_trained_side_by_side_under_vmap():
    params, x, target, matrices = problem()
    both = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params)
    run = oialr.curvature(regression, matrices)
    found = jax.vmap(run, (0, None, None))(both, x, target)
    for i in range(2):
        one = run(jax.tree.map(lambda w, i=i: w[i], both), x, target)
        assert_same(jax.tree.map(lambda a, i=i: a[i], found), one)


def test_padded_places_do_not_count():
    w, x = normal(0, 5, 4), normal(1, 3, 6, 5)
    mask = jnp.arange(6)[None] < jnp.array([[6], [2], [1]])

    def loss(params, x, mask):
        out = jnp.sum(jnp.sin(x @ params), axis=-1)
        return jnp.sum(jnp.where(mask, out, 0)) / jnp.sum(mask)

    matrices = oialr.find_matrices(loss, w, x, mask)
    run = oialr.curvature(
        loss, matrices, terms=lambda x, mask: jnp.sum(mask), independent_rows=True
    )
    found = run(w, x, mask)
    assert float(found.terms) == float(found.sides[""].rows) == 9
    seen = np.asarray(x, np.float64)[np.asarray(mask)]
    close(found.covariances("")[0], seen.T @ seen / 9)
    gradient = np.cos(seen @ np.asarray(w, np.float64))
    close(found.covariances("")[1], gradient.T @ gradient / 9)


def test_a_wide_side_is_a_diagonal_and_says_so():
    fn, params, x = BY_NAME["scan_remat"].build()
    matrices = oialr.find_matrices(fn, params, x)
    full = oialr.curvature(scalar(fn), matrices)(params, x)
    found = oialr.curvature(scalar(fn), matrices, widest=20)(params, x)
    path = "ScanCheckpointBlock_0/Dense_1/kernel"
    inputs, outputs, _ = found.sides[path]
    assert inputs.shape == (3, 16, 16)
    assert outputs.shape == (3, 24)
    close(inputs, full.sides[path].inputs)
    close(outputs, jnp.diagonal(full.sides[path].outputs, axis1=1, axis2=2))
    assert "24 diagonal" in str(found)
    low, _ = oialr.compress(params, matrices, found, {path: 4})
    assert low["ScanCheckpointBlock_0"]["Dense_1"]["kernel"].rank == 4


def test_the_sums_of_a_wide_side_are_block_diagonal_and_say_so():
    w, x = normal(0, 8, 2100), normal(1, 6, 8)
    fn = scalar(lambda params, x: jnp.sin(x @ params))
    found = oialr.curvature(fn, oialr.find_matrices(fn, w, x))(w, x)
    whole = oialr.curvature(fn, oialr.find_matrices(fn, w[:, :700], x))
    outputs = np.array(found.sides[""].outputs)
    for i in range(3):
        part = slice(700 * i, 700 * (i + 1))
        close(outputs[part, part], whole(w[:, part], x).sides[""].outputs)
        outputs[part, part] = 0
    assert not outputs.any()
    assert "2100 in blocks" in str(found)
    assert "8 full" in str(found)


def equations(jaxpr):
    """Every equation of a jaxpr, at any depth."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("independent", [False, True])
def test_no_array_of_rows_times_a_matrix(independent):
    params, x, target, matrices = problem(width=16, rows=64)
    run = oialr.curvature(regression, matrices, independent_rows=independent)
    jaxpr = jax.make_jaxpr(run)(params, x, target)
    made = [v.aval for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars]
    assert max(math.prod(x.shape) for x in made) == 64 * 16


def test_of_a_core_of_a_convolution_no_patches_are_cut_out():
    def loss(w, x):
        return jnp.sum(jax.lax.conv(x, w, (1, 1), "SAME")) ** 2

    w, x = normal(0, 4, 8, 5, 5), normal(1, 3, 8, 9, 9)
    matrices = oialr.find_matrices(loss, w, x)
    patches = x.size * 5 * 5
    low = in_low_rank(w, matrices)
    for params, are_there in ((w, True), (low, False)):
        jaxpr = jax.make_jaxpr(oialr.curvature(loss, matrices))(params, x)
        made = [v.aval for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars]
        largest = max(math.prod(x.shape) for x in made)
        assert (largest >= patches) is are_there


def test_no_gradient_of_a_weight_is_computed():
    """Three products forward, two of gradients of inputs, six of sums."""
    params, x, target, matrices = problem(width=16, rows=64)
    run = oialr.curvature(regression, matrices, independent_rows=True)
    jaxpr = jax.make_jaxpr(run)(params, x, target)
    products = [eqn.primitive.name for eqn in equations(jaxpr.jaxpr)]
    assert products.count("dot_general") == 3 + 2 + 6


def test_params_of_another_shape_or_without_the_leaf_are_refused():
    params, x, target, matrices = problem()
    run = oialr.curvature(regression, matrices)
    with pytest.raises(ValueError, match="no leaf w2, which is in `matrices`"):
        run({"w0": params["w0"], "w1": params["w1"]}, x, target)
    with pytest.raises(ValueError, match=r"w0 has shape \(4, 4\), the matrix was"):
        run(jax.tree.map(lambda w: w[:4, :4], params), x[:, :4], target[:, :4])
    with pytest.raises(ValueError, match="pass `terms`"):
        oialr.curvature(lambda p: jnp.sum(p["w0"]), matrices[:1])(params)


def test_a_grouped_convolution_says_so():
    def loss(params, x):
        y = jax.lax.conv_general_dilated(x, params, (1,), "SAME", feature_group_count=2)
        return jnp.mean(y)

    params, x = normal(0, 4, 2, 3), normal(1, 2, 4, 8)
    matrices = oialr.find_matrices(loss, params, x)
    found = oialr.curvature(loss, matrices)(params, x)
    assert found.sides == {}
    reason = "conv_general_dilated of a grouped convolution"
    assert found.skipped == (("", reason),)
    assert reason in str(found)


def test_a_masked_weight_says_so():
    """A scale of rows times one of columns is summed; any other is no change of x."""
    w, x, mask = normal(0, 5, 4), normal(1, 6, 5), jnp.eye(5, 4) + 1
    loss = scalar(lambda w, x: x @ (w * mask))
    matrices = oialr.find_matrices(lambda w, x: x @ w, w, x)
    found = oialr.curvature(loss, matrices)(w, x)
    assert found.skipped == (("", "mul of rows and columns"),)


def test_of_a_part_the_rest_is_zero():
    """Every other column, the last rows, as of the whole with padded rows."""
    w, x = normal(0, 6, 5), normal(1, 8, 4)
    matrices = oialr.find_matrices(lambda w, x: x @ w[2:], w, x)

    def cut(w, x):
        return x[:, :3] @ w[1:4, ::2] + x @ w[-4:, 1:4]

    def whole(w, x):
        far = jnp.zeros((8, 6)).at[:, 1:4].set(x[:, :3]) @ w
        near = jnp.zeros((8, 6)).at[:, 2:].set(x) @ w
        return far[:, ::2] + near[:, 1:4]

    for independent in (True, False):
        of_part, of_whole = (
            oialr.curvature(scalar(fn), matrices, independent_rows=independent)(w, x)
            for fn in (cut, whole)
        )
        assert of_part.skipped == ()
        for a, b in zip(of_part.sides[""], of_whole.sides[""], strict=True):
            close(a, b)


# What a direction is worth


def metric(error, inputs, outputs):
    """½ tr(Eᵀ C E D)."""
    return 0.5 * np.trace(error.T @ inputs @ error @ outputs)


def covariance(rng, side, rank=None):
    a = rng.normal(size=(side, side if rank is None else rank))
    return a @ a.T / side


def ridged(c, ridge=weighted.RIDGE):
    return c + ridge * np.trace(c) / len(c) * np.eye(len(c))


@settings(max_examples=6, deadline=None)
@given(
    st.integers(2, 7),
    st.integers(2, 7),
    st.integers(0, 10**6),
    st.floats(1e-3, 3.0),
)
def test_no_other_matrix_of_the_rank_is_better(m, n, seed, size):
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, min(m, n) + 1))
    w = rng.normal(size=(m, n))
    c, d = covariance(rng, m), covariance(rng, n, rank=max(1, n - 1))
    found = weighted.directions(*(jnp.asarray(x, jnp.float32) for x in (w, c, d)))
    u, s, vt = (np.asarray(x, np.float64) for x in weighted.cut(found, rank))
    c, d = ridged(c), ridged(d)
    best = metric(w - u @ s @ vt, c, d)
    predicted = float(weighted.rise(found.sigma, rank))
    assert best == pytest.approx(predicted, rel=EXACT, abs=EXACT)
    for _ in range(10):
        left = u @ s + size * rng.normal(size=(m, rank))
        right = vt + size * rng.normal(size=(rank, n))
        assert metric(w - left @ right, c, d) >= best * (1 - EXACT) - EXACT
        other = rng.normal(size=(m, rank)) @ rng.normal(size=(rank, n))
        assert metric(w - other, c, d) >= best * (1 - EXACT) - EXACT


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (3, 4, 6)], ids=str)
def test_bases_are_orthonormal_and_all_directions_are_the_matrix(shape):
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    c, d = (
        jnp.asarray([covariance(rng, s) for _ in range(3)], jnp.float32)
        if len(shape) == 3
        else jnp.asarray(covariance(rng, s), jnp.float32)
        for s in shape[-2:]
    )
    found = weighted.directions(w, c, d)
    np.testing.assert_allclose(found.left @ found.right, w, atol=EXACT)
    for rank in (1, 3):
        u, _, vt = weighted.cut(found, rank)
        assert float(orthogonality_error(u, vt)) < 1e-5


@pytest.mark.parametrize("identity", ["none", "matrix", "diagonal"])
def test_without_curvature_it_is_the_svd(identity):
    w = normal(0, 6, 4)
    sides = {
        "none": (None, None),
        "matrix": (jnp.eye(6), jnp.eye(4)),
        "diagonal": (jnp.ones(6), jnp.ones(4)),
    }[identity]
    found = weighted.directions(w, *sides, ridge=0.0)
    np.testing.assert_allclose(
        found.sigma, jnp.linalg.svd(w, compute_uv=False), rtol=1e-5
    )
    u, s, vt = weighted.cut(found, 2)
    svd = oialr.lowrank.factor(w, Axes((6, 4), (), (0,), (1,)), 2)
    np.testing.assert_allclose(u @ s @ vt, svd.materialize(), atol=1e-5)


def test_a_diagonal_weighs_as_its_matrix():
    w, c, d = normal(0, 6, 4), jnp.arange(1.0, 7), jnp.arange(2.0, 6)
    short = weighted.directions(w, c, d)
    full = weighted.directions(w, jnp.diag(c), jnp.diag(d))
    np.testing.assert_allclose(short.sigma, full.sigma, rtol=1e-5)
    for rank in (1, 2):
        a, b = (
            functools.reduce(jnp.matmul, weighted.cut(x, rank)) for x in (short, full)
        )
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_tiny_or_absent_curvature_breaks_nothing():
    w = normal(0, 2, 6, 4)
    c, d = jnp.stack([jnp.eye(6), jnp.zeros((6, 6))]), 1e-30 * jnp.eye(4)
    found = weighted.directions(w, c, jnp.stack([d, d]))
    assert float(found.sigma[0, 0]) > 0
    np.testing.assert_array_equal(found.sigma[1], 0)  # no row reached this one
    np.testing.assert_allclose(found.left @ found.right, w, atol=1e-5)


def test_the_predicted_rise_is_that_of_a_quadratic():
    """f(x) = x W M: its squared distance is a quadratic in W, and exactly C ⊗ D."""
    w, m = normal(0, 6, 5), normal(1, 5, 4)
    x = normal(2, 20, 6)
    # every direction of the outputs once for each x, in the place of a normal draw
    noise = jnp.tile(2.0 * jnp.eye(4), (20, 1))
    rows = jnp.repeat(x, 4, axis=0)

    def loss(w, rows, noise):
        return jnp.mean(jnp.sum((rows @ w @ m) * noise, axis=1))

    matrices = oialr.find_matrices(loss, w, rows, noise)
    found = oialr.curvature(loss, matrices)(w, rows, noise)
    low, (cut,) = oialr.compress(w, matrices, found, {"": 2})
    change = x @ (w - low.materialize()) @ m
    actual = 0.5 * float(jnp.mean(jnp.sum(change**2, axis=1)))
    assert cut.rise == pytest.approx(actual, rel=1e-2)


def test_the_loss_of_outputs_predicts_their_distance():
    def fn(w, x):
        return x @ w

    w, x = normal(0, 12, 8), normal(1, 4000, 12)
    matrices = oialr.find_matrices(fn, w, x)
    run = oialr.curvature(of_outputs(fn), matrices)
    found = run(w, x, key=jax.random.key(2))
    assert float(found.terms) == 4000
    low, (cut,) = oialr.compress(w, matrices, found, {"": 3})
    actual = 0.5 * float(jnp.mean(jnp.sum((fn(low.materialize(), x) - x @ w) ** 2, 1)))
    assert cut.rise == pytest.approx(actual, rel=0.1)


def test_the_predicted_rise_is_that_of_a_likelihood():
    """Labels drawn from the model's own prediction: the rise is that of the KL."""
    w, x = 0.3 * normal(0, 10, 8), jnp.sqrt(10) * normal(1, 6000, 10).T[:10].T
    x = jnp.sqrt(6000 / 10) * x

    def loss(w, x, key):
        logits = x @ w
        label = jax.random.categorical(key, jax.lax.stop_gradient(logits))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)
        return -jnp.mean(chosen)

    key = jax.random.key(2)
    matrices = oialr.find_matrices(loss, w, x, key)
    found = oialr.curvature(loss, matrices)(w, x, key)
    for rank in (2, 4, 6):
        low, (cut,) = oialr.compress(w, matrices, found, {"": rank})
        before, after = (jax.nn.log_softmax(x @ v) for v in (w, low.materialize()))
        actual = float(jnp.mean(jnp.sum(jnp.exp(before) * (before - after), axis=1)))
        assert cut.rise == pytest.approx(actual, rel=0.15)


# Ranks for a budget


def test_a_list_of_all_directions_is_the_best_choice():
    rng = np.random.default_rng(0)
    sigmas = [np.sort(rng.exponential(size=6))[::-1] for _ in range(3)]
    price = allocation.Prices(1.0 * np.arange(1, 7), None)
    for budget in range(3, 19):
        ranks = allocation.allocate(sigmas, [price] * 3, budget)
        assert sum(ranks) == budget
        worth = sum(np.sum(s[:r] ** 2) for s, r in zip(sigmas, ranks, strict=True))
        best = max(
            sum(np.sum(s[:r] ** 2) for s, r in zip(sigmas, other, strict=True))
            for other in np.ndindex(7, 7, 7)
            if sum(other) == budget and min(other) >= 1
        )
        assert worth == pytest.approx(best)


def test_a_matrix_that_costs_less_dense_stays_dense():
    steep, flat = np.exp(-np.arange(8.0)), np.ones(8)
    price = allocation.Prices(16.0 * np.arange(1, 9), dense=64.0)
    steep_rank, flat_rank = allocation.allocate([steep, flat], [price] * 2, 64 + 16)
    assert flat_rank is None
    assert steep_rank == 1
    assert allocation.allocate([steep, flat], [price] * 2, 128) == [None, None]
    # the dense one does not fit: its directions that are below it do
    steep_rank, flat_rank = allocation.allocate([steep, flat], [price] * 2, 64)
    assert (steep_rank, flat_rank) == (1, 3)


def test_ranks_are_multiples():
    sigmas = [np.linspace(1, 0.1, 10), np.linspace(2, 0.2, 9)]
    prices = [allocation.Prices(10.0 * np.arange(1, x.size + 1), None) for x in sigmas]
    for budget in (80, 120, 190):
        for rank, x in zip(
            allocation.allocate(sigmas, prices, budget, multiple=4), sigmas, strict=True
        ):
            assert rank % 4 == 0 or rank == x.size


def test_a_budget_below_the_least_ranks_is_refused():
    price = allocation.Prices(10.0 * np.arange(1, 5), None)
    with pytest.raises(ValueError, match="`budget` is 15: the least ranks of the 2"):
        allocation.allocate([np.ones(4)] * 2, [price] * 2, 15)
    with pytest.raises(ValueError, match="must be finite, those of matrix 0"):
        allocation.allocate([np.full(4, np.nan)], [price], 100)


def test_compress_keeps_to_its_budget_and_the_loss_rises_as_predicted():
    params, x, _, matrices = problem(width=12, rows=400)

    def fn(params, x):
        for name in sorted(params):
            x = x + jnp.tanh(x @ params[name])
        return x

    run = jax.jit(oialr.curvature(of_outputs(fn), matrices))
    found = run(params, x, key=jax.random.key(0))
    low, cuts = oialr.compress(params, matrices, found, 250, price=two_factors)
    spent = sum(two_factors(m, c.rank) for m, c in zip(matrices, cuts, strict=True))
    assert spent <= 250
    plain = dataclasses.replace(
        found,
        sides={
            k: v._replace(inputs=None, outputs=None) for k, v in found.sides.items()
        },
    )
    other, _ = oialr.compress(params, matrices, plain, dict.fromkeys(params, 3))

    def distance(low):
        change = oialr.factored(fn)(low, x) - fn(params, x)
        return 0.5 * float(jnp.mean(jnp.sum(change**2, axis=1)))

    assert distance(low) < distance(other)
    assert distance(low) == pytest.approx(sum(c.rise for c in cuts), rel=0.5)


def test_stacks_share_a_rank_and_cores_are_cut_further():
    fn, params, x = BY_NAME["scan_remat"].build()
    matrices = oialr.find_matrices(fn, params, x)
    run = oialr.curvature(scalar(fn), matrices)
    low, _ = oialr.compress(
        params, matrices, run(params, x), {m.path: 6 for m in matrices}
    )
    assert oialr.ranks(low)["ScanCheckpointBlock_0/Dense_1/kernel"] == (16, 24, 6)
    found = run(low, x)
    lower, cuts = oialr.compress(low, matrices, found, {m.path: 3 for m in matrices})
    before, after = named_leaves(low), named_leaves(lower)
    for cut in cuts:
        old, new = before[cut.path], after[cut.path]
        assert new.rank == 3
        assert new.basis != old.basis
        assert float(orthogonality_error(new.u, new.vt)) < 1e-5
        error = old.s - old.u.mT @ (new.u @ new.s @ new.vt) @ old.vt.mT
        c, d = (np.asarray(s, np.float64) for s in found.covariances(cut.path))
        total = sum(
            metric(e, ridged(a), ridged(b))
            for e, a, b in zip(
                *(np.reshape(v, (-1, 6, 6)) for v in (error, c, d)), strict=True
            )
        )
        assert cut.rise == pytest.approx(total, rel=1e-2, abs=1e-7)
    everything = sum(m.weights(3) for m in matrices)
    by_budget, _ = oialr.compress(low, matrices, found, everything)
    assert (
        sum(m.weights(named_leaves(by_budget)[m.path].rank) for m in matrices)
        <= everything
    )


def test_what_no_row_reached_stays_as_it_is():
    fn, params, x = BY_NAME["half_stopped"].build()
    matrices = oialr.find_matrices(fn, params, x)
    found = oialr.curvature(scalar(fn), matrices)(params, x)
    low, cuts = oialr.compress(params, matrices, found, 30)
    assert [c.path for c in cuts] == ["moving"]
    assert low["fixed"] is params["fixed"]


def test_bad_matrices_and_ranks_are_refused():
    params, x, target, matrices = problem()
    found = oialr.curvature(regression, matrices)(params, x, target)
    with pytest.raises(ValueError, match=r"must be in \[1, 6\] for w1, got 7"):
        oialr.compress(params, matrices, found, {"w1": 7})
    with pytest.raises(ValueError, match=r"`budget` names w9; there are: w0, w1, w2"):
        oialr.compress(params, matrices, found, {"w9": 2})
    broken = params | {"w1": params["w1"].at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match="w1 or its statistics are not finite"):
        oialr.compress(broken, matrices, found, {"w1": 2})
