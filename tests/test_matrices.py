"""Discovery: every use of every leaf, in execution order, by tracing alone."""

import itertools
import re

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import BY_NAME, CASES, normal, plain
from helpers import assert_close, in_low_rank

import oialr_jax as oialr
from oialr_jax import cost
from oialr_jax.lowrank import Axes, factor, named_leaves
from oialr_jax.matrices import Skipped


@pytest.mark.parametrize("case", CASES, ids=str)
def test_finds_every_matrix_in_execution_order(case):
    fn, params, x = case.build()
    matrices = oialr.find_matrices(fn, params, x)
    found = tuple(
        (m.path, (m.axes.stack, m.axes.inputs, m.axes.outputs), m.rows, m.kind, m.uses)
        for m in matrices
    )
    assert found == case.found
    listed = [m.path for m in matrices] + [x.path for x in matrices.skipped]
    leaves = named_leaves(params).items()
    every = {name for name, leaf in leaves if getattr(leaf, "ndim", 0) >= 2}
    assert sorted(listed) == sorted(every)


@pytest.mark.parametrize("name", ["dense", "attention", "nnx", "haiku"])
def test_shapes_suffice(name):
    fn, params, x = BY_NAME[name].build()
    abstract = jax.eval_shape(lambda *a: a, params, x)
    assert oialr.find_matrices(fn, *abstract) == oialr.find_matrices(fn, params, x)


def test_finds_the_same_in_a_low_rank_tree():
    fn, params, x = BY_NAME["attention"].build()
    matrices = oialr.find_matrices(fn, params, x)
    low = in_low_rank(params, matrices[:2])
    assert oialr.find_matrices(fn, low, x) == matrices


def test_discovery_runs_nothing():
    def fn(params, x):
        jax.debug.callback(lambda: pytest.fail("the function ran"))
        return x @ params["w"]

    (found,) = oialr.find_matrices(fn, {"w": jnp.ones((3, 4))}, jnp.ones((2, 3)))
    assert found.path == "w"


def test_a_leaf_that_is_also_gathered_is_reported_and_not_selected():
    fn, params, tokens = BY_NAME["tied_embedding"].build()
    dense, embedding = oialr.find_matrices(fn, params, tokens)
    assert embedding.other == ("gather",)
    assert oialr.select([dense, embedding], dense_last=0) == (dense,)
    assert oialr.select([dense, embedding], include="Embed") == (embedding,)


@pytest.mark.parametrize(
    ("module", "groups"),
    [
        (nn.Conv(12, (3, 3), feature_group_count=4), 4),
        (nn.Conv(8, (3, 3), feature_group_count=8), 8),
    ],
    ids=["grouped", "depthwise"],
)
def test_grouped_convolution_stays_dense_and_is_said(module, groups):
    x = jnp.ones((2, 6, 6, 8))
    params = module.init(jax.random.key(0), x)["params"]
    matrices = oialr.find_matrices(
        lambda p, x: module.apply({"params": p}, x), params, x
    )
    assert [m.path for m in matrices] == ["kernel"]
    said = f"left dense: kernel (grouped convolution, {groups} groups)"
    with pytest.warns(UserWarning, match=re.escape(said)):
        assert oialr.select(matrices, dense_last=0) == ()
    with pytest.raises(ValueError, match="`include` asks for kernel, a grouped"):
        oialr.select(matrices, include="kernel")


def test_two_roles_of_one_leaf_are_reported():
    def fn(p, x):
        once = jnp.einsum("bi,ijk->bjk", x, p["w"])
        return once, jnp.einsum("bj,ijk->bik", x[:, :2], p["w"])

    (found,) = oialr.find_matrices(fn, {"w": jnp.ones((4, 2, 3))}, jnp.ones((5, 4)))
    assert found.other == ("dot over other axes",)
    assert oialr.select([found], dense_last=0) == ()


def _chain(*widths):
    """Matrices of a chain of dense layers, found on a real function."""

    def fn(params, x):
        for name in sorted(params):
            x = jnp.tanh(x @ params[name])
        return x

    shapes = {f"w{i}": s for i, s in enumerate(itertools.pairwise(widths))}
    _, params, x = plain(fn, (4, widths[0]), **shapes)()
    return oialr.find_matrices(fn, params, x)


def test_dense_last_spares_the_real_last_matrix():
    matrices = _chain(64, 64, 64, 4)  # a narrow head, not eligible by shape
    assert [m.path for m in oialr.select(matrices)] == ["w0", "w1"]
    assert [m.path for m in oialr.select(matrices, dense_last=2)] == ["w0"]
    authors = oialr.select(matrices, among_eligible=True)
    assert [m.path for m in authors] == ["w0"]  # the layer before the head is spared


def test_dense_first_counts_in_execution_order():
    matrices = _chain(4, 64, 64, 64, 64)  # a narrow stem, not eligible by shape
    assert [m.path for m in oialr.select(matrices, dense_first=1)] == ["w1", "w2"]
    authors = oialr.select(matrices, dense_first=1, among_eligible=True)
    assert [m.path for m in authors] == ["w2"]


def test_keeping_more_than_there_are_keeps_all():
    assert oialr.select(_chain(8, 8, 8), dense_last=5) == ()


def test_aspect_is_strict_as_the_authors():
    matrices = _chain(100, 10, 100, 11)
    chosen = oialr.select(matrices, dense_last=0, min_aspect=0.1)
    assert [m.path for m in chosen] == ["w2"]


def test_include_and_exclude():
    matrices = _chain(8, 8, 8, 8, 8)
    chosen = oialr.select(matrices, include=["w[013]"], exclude="w1")
    assert [m.path for m in chosen] == ["w0", "w3"]
    with pytest.raises(
        ValueError, match="`exclude` 'w9' matches none of: w0, w1, w2, w3"
    ):
        oialr.select(matrices, exclude="w9")


def test_two_leaves_of_one_name():
    """Reports, rules and errors speak of leaves by name."""
    params = {"a/b": jnp.ones((4, 4)), "a": {"b": jnp.ones((4, 4))}}

    def fn(params, x):
        return x @ params["a/b"] @ params["a"]["b"]

    with pytest.raises(ValueError, match="two leaves are called a/b: rename one"):
        oialr.find_matrices(fn, params, jnp.ones((2, 4)))


def test_narrow_cuts_do_not_pay():
    """Each of 16 inputs meets 8 columns of its own: x U alone is more than x W."""

    def fn(params, x):
        w = params["w"]
        parts = [x[i] @ w[:, 8 * i : 8 * i + 8] for i in range(16)]
        return sum(parts) @ params["v"]

    params = {"w": jnp.ones((128, 128)), "v": jnp.ones((8, 1))}
    found = oialr.find_matrices(fn, params, jnp.ones((16, 4, 128)))
    assert [(m.path, m.uses) for m in found] == [("w", 16), ("v", 1)]
    assert found[0].flops(32) > found[0].flops()
    assert oialr.select(found) == ()
    assert oialr.select(found, min_aspect=0.1) == found[:1]


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("dense", {"layers_2/kernel"}),
        ("scan_remat", {"Dense_0/kernel"}),
        ("recurrent", {"wh"}),  # what it gives, it reads itself
        ("split_apart", {"wo"}),
        ("custom_rules", {"b"}),
        ("on_devices", {"b"}),
        ("own_rule", {"b"}),
        ("cond", {"a"}),
    ],
)
def test_a_head_is_read_by_no_other_matrix(name, heads):
    fn, params, x = BY_NAME[name].build()
    found = oialr.find_matrices(fn, params, x)
    assert {m.path for m in found if m.is_head} == heads


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint, jax.jit])
def test_every_head_is_spared_unless_none_is(wrap):
    def fn(params, x):
        y = jnp.tanh(jnp.tanh(x @ params["stem"]) @ params["trunk"])
        return wrap(lambda p, y: (y @ p["policy"], y @ p["value"]))(params, y)

    shapes = {"stem": (8, 8), "trunk": (8, 8), "policy": (8, 6), "value": (8, 4)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    found = oialr.find_matrices(fn, params, jnp.ones((4, 8)))
    assert [m.path for m in oialr.select(found)] == ["stem", "trunk"]
    assert oialr.select(found, dense_last=0) == found
    assert oialr.select(found, among_eligible=True) == found[:-1]  # as the authors


def test_what_a_loop_gives_the_next_turn_reads():
    def fn(params, x):
        def turn(_, y):
            return jnp.tanh(jnp.tanh(y @ params["a"]) @ params["b"])

        return jax.lax.fori_loop(0, 3, turn, x)

    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    found = oialr.find_matrices(fn, params, jnp.ones((4, 8)))
    assert [m.path for m in found if m.is_head] == []


# What is no matrix

STOPPED = {
    "gather": lambda w, x: w[jnp.arange(2)],
    "sort": lambda w, x: x @ jnp.sort(w, axis=0),
    "add": lambda w, x: x @ (w + 1),
    "mul": lambda w, x: x.sum() + w * jnp.ones((4, 6)),
    "exp": lambda w, x: x @ jnp.exp(w),
    "integer_pow": lambda w, x: x + jnp.sum(w**3),
    "reduce_sum": lambda w, x: x + w.sum(),
    "rev": lambda w, x: x @ w[:, ::-1],
    "reshape": lambda w, x: x[:, :3] @ w.reshape(3, 8),
    "dot_general over every axis": lambda w, x: jnp.vdot(w, jnp.ones((4, 6))),
    "dot_general over part of an axis": lambda w, x: jnp.einsum(
        "bi,ijk->bjk", x[:, :2], w.reshape(2, 2, 6)
    ),
    "dot_general over no axis": lambda w, x: jnp.einsum("bi,ij->ij", x, w),
    "conv_general_dilated": lambda w, x: jax.lax.conv(
        w[None, None], jnp.ones((1, 1, 2, 2)), (1, 1), "SAME"
    ),
    "carry of while": lambda w, x: jax.lax.while_loop(
        lambda w: w.sum() < 9, lambda w: w * 2, w
    ),
    "output": lambda w, x: (w, x),
    "never used": lambda w, x: x,
}


@pytest.mark.parametrize("reason", STOPPED)
def test_a_leaf_that_is_no_matrix_is_listed_with_what_stopped_it(reason):
    params = {"w": jnp.ones((4, 6)), "v": jnp.ones((4, 5))}

    def fn(params, x):
        return STOPPED[reason](params["w"], x), x @ params["v"]

    matrices = oialr.find_matrices(fn, params, jnp.ones((2, 4)))
    assert [m.path for m in matrices] == ["v"]
    assert matrices.skipped == (Skipped("w", (4, 6), reason),)
    lines = str(matrices).splitlines()
    assert lines[1].split() == ["v", "dot", "2", "4x5", "1"]
    assert lines[2:] == ["no matrices:", f"w  [4, 6]  {reason}"]


def test_a_product_over_what_an_array_of_indices_took():
    def fn(params, x):
        return jnp.tensordot(x, params["w"][:, jnp.array([2, 0])], [[1], [1]])

    params = {"w": normal(0, 4, 3, 6)}
    found = oialr.find_matrices(fn, params, normal(1, 5, 2))
    assert found == ()
    assert found.skipped[0].reason == "dot_general over an axis that is indexed"


def convolved(w, x):
    return jax.lax.conv_general_dilated(
        x, w, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )


BESIDE = {
    "reduce_sum": lambda w: jnp.sum(w**2, axis=0),  # over the window alone
    "reduce_sum of a part": lambda w: jnp.sum(w.reshape(3, 2, 2, 6) ** 2, axis=(0, 1)),
    "mul": lambda w: convolved(w * jnp.ones((1, 4, 6)), jnp.ones((2, 5, 4))),
    "": lambda w: jnp.sum(w**2, axis=(0, 1)) + jnp.sum(w**2),
    "scaled": lambda w: convolved(w * jnp.ones((3, 4, 1)), jnp.ones((2, 5, 4))),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_done_beside_a_product_decides_by_the_sides_of_the_matrix(name):
    def fn(params, x):
        return convolved(params["w"], x), BESIDE[name](params["w"])

    (found,) = oialr.find_matrices(fn, {"w": normal(0, 3, 4, 6)}, normal(1, 2, 5, 4))
    assert found.axes == Axes((3, 4, 6), (), (0, 1), (2,))
    assert found.other == {"mul": ("mul",), "": (), "scaled": ()}.get(
        name, ("reduce_sum",)
    )


def test_a_use_of_one_entry_does_not_say_what_an_axis_is():
    """The middle tap alone comes first; the convolution tells the window."""

    def fn(params, x):
        return x @ params["w"][1], convolved(params["w"], x)

    (found,) = oialr.find_matrices(fn, {"w": normal(0, 3, 4, 6)}, normal(1, 2, 5, 4))
    assert found.axes == Axes((3, 4, 6), (), (0, 1), (2,))
    assert (found.uses, found.other) == (2, ())


def test_the_result_is_a_tuple():
    fn, params, x = BY_NAME["dense"].build()
    matrices = oialr.find_matrices(fn, params, x)
    assert matrices == tuple(matrices)
    assert matrices[:1] + matrices[1:] == matrices
    assert len(matrices) == 2
    assert oialr.select(matrices, dense_last=0) == matrices


def test_leaves_that_cannot_be_matrices_are_listed_and_those_that_are_no_arrays_not():
    params = {
        "w": normal(0, 4, 5),
        "tall": jnp.ones((4, 0)),
        "flat": jnp.ones((0, 5)),
        "mask": jnp.ones((4, 5), bool),
        "int8": jnp.ones((4, 5), jnp.int8),
        "complex": jnp.ones((4, 5), jnp.complex64),
        "ref": jax.new_ref(jnp.ones((4, 5))),
        "numpy": np.ones((4, 5), np.float32),
        "key": jax.random.key(0),
        "scalar": jnp.ones(()),
        "number": 2.0,
        "function": jnp.tanh,
        "none": None,
        "name": "w",
    }

    def fn(p, x):
        y = p["function"](x @ p["w"] * p["number"]) + p["scalar"] + p["ref"][...].sum()
        masked = x @ jnp.where(p["mask"], p["numpy"], p["complex"].real)
        return y + masked + (x @ p["tall"]) @ p["flat"] + p["int8"].sum()

    matrices = oialr.find_matrices(fn, params, jnp.ones((2, 4)))
    assert [m.path for m in matrices] == ["w"]
    assert {x.path: x.reason for x in matrices.skipped} == {
        "tall": "no entries",
        "flat": "no entries",
        "mask": "bool, no float",
        "int8": "int8, no float",
        "complex": "complex64, no float",
        "ref": "held in a jax.Ref",
        "numpy": "select_n",
    }
    low = {**params, "w": factor(params["w"], matrices[0].axes, 2)}
    x = normal(1, 2, 4)
    assert_close(
        oialr.factored(fn)(low, x), fn({**low, "w": low["w"].materialize()}, x), 1e-5
    )
    told = oialr.explain(fn, low, x)
    assert told.skipped == matrices.skipped
    assert "\nnumpy    [4, 5]  select_n\n" in str(told)
    assert oialr.ranks(low) == {"w": (4, 5, 2)}


class Everything(eqx.Module):
    """A module with fields of every kind, none of them marked static."""

    conv: eqx.nn.Conv1d
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.BatchNorm
    mlp: eqx.nn.MLP
    activation: object = jax.nn.relu
    name: str = "everything"
    nothing: object = None
    number: int = 2

    def __init__(self):
        key = jax.random.key(0)
        self.conv = eqx.nn.Conv1d(3, 8, 1, key=key)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=key)
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.mlp = eqx.nn.MLP(8, 4, 6, 1, key=key)

    def __call__(self, x, state):
        x = self.activation(self.conv(x)).T
        x = self.attention(x, x, x).mean(0)
        x, state = self.norm(x, state)
        return self.mlp(x) * self.number, state


def test_a_whole_equinox_module_with_state():
    model, state = eqx.nn.make_with_state(Everything)()

    def fn(model, x, state):
        mapped = jax.vmap(
            model, axis_name="batch", in_axes=(0, None), out_axes=(0, None)
        )
        return mapped(x, state)

    x = normal(1, 5, 3, 7)
    matrices = oialr.find_matrices(fn, model, x, state)
    assert len(matrices) == 7
    assert [x.path for x in matrices.skipped] == ["conv/bias"]
    low = in_low_rank(model, matrices)
    dense = oialr.materialize(low)
    run, fn_jit = eqx.filter_jit(oialr.factored(fn)), eqx.filter_jit(fn)
    actual, desired = run(low, x, state), fn_jit(dense, x, state)
    assert_close(jax.tree.leaves(actual), jax.tree.leaves(desired), 1e-4)
    assert len(oialr.explain(fn, low, x, state).lines) == 7
    run = oialr.factored(lambda m, x, s: jnp.sum(fn(m, x, s)[0] ** 2))
    value, grads = eqx.filter_jit(oialr.value_and_grad(run))(low, x, state)
    assert np.isfinite(value)
    assert grads.mlp.layers[0].weight.shape == low.mlp.layers[0].weight.s.shape
    assert oialr.counts(low).dense == oialr.counts(model).dense


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False, axis_name="batch")(nn.Dense(4)(x))
        return jax.lax.pmean(nn.Dense(3)(x), "batch")


def test_a_function_with_a_named_axis():
    module, x = Normed(), normal(1, 2, 5, 6)
    variables = jax.vmap(module.init, axis_name="batch", in_axes=(None, 0))(
        jax.random.key(0), x
    )
    variables = jax.tree.map(lambda a: a[0], variables)
    params, stats = variables["params"], variables["batch_stats"]

    def fn(params, x):
        variables = {"params": params, "batch_stats": stats}
        return module.apply(variables, x, mutable=["batch_stats"])

    for use in (oialr.find_matrices, oialr.explain):
        with pytest.raises(ValueError, match=r"pass axis_env=.*batch"):
            use(fn, params, x[0])
    env = [("batch", 2)]
    matrices = oialr.find_matrices(fn, params, x[0], axis_env=env)
    assert [(m.path, m.rows) for m in matrices] == [
        ("Dense_0/kernel", 5),
        ("Dense_1/kernel", 5),
    ]
    low = in_low_rank(params, matrices)
    told = oialr.explain(fn, low, x[0], axis_env=env)
    assert [line.path for line in told.lines] == [m.path for m in matrices]
    actual, desired = (
        jax.vmap(f, in_axes=(None, 0), axis_name="batch")(p, x)
        for f, p in ((oialr.factored(fn), low), (fn, oialr.materialize(low)))
    )
    assert_close(actual, desired, 1e-5)


@pytest.mark.parametrize("rates", [None, cost.RATES["cpu"]])
def test_flops_at_any_rank_need_no_new_trace(monkeypatch, rates):
    """Integers, equal to what `explain` finds in another trace of low-rank params."""
    monkeypatch.setattr(cost, "RATES", {})
    for name in ("attention", "conv2d_strided_dilated", "split_apart", "scan_remat"):
        fn, params, x = BY_NAME[name].build()
        matrices = oialr.find_matrices(fn, params, x)
        dense = oialr.explain(fn, params, x)
        assert sum(m.flops() for m in matrices) == dense.flops > 0
        low = in_low_rank(params, matrices, 1 / 3)
        held = oialr.ranks(low)
        assert len(held) == len(matrices)
        flops = [m.flops(held[m.path][2], rates) for m in matrices]
        assert sum(flops) == oialr.explain(fn, low, x, rates=rates).flops
    with pytest.raises(ValueError, match=r"`rank` must be in \[1, 6\] for w0, got 7"):
        _chain(6, 8)[0].flops(7)
