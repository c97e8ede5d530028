"""Discovery: every use of every leaf, in execution order, by tracing alone."""

import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from cases import BY_NAME, CASES, plain
from helpers import in_low_rank

import oialr_jax as oialr


@pytest.mark.parametrize("case", CASES, ids=str)
def test_finds_every_matrix_in_execution_order(case):
    fn, params, x = case.build()
    found = tuple(
        (m.path, (m.axes.stack, m.axes.inputs, m.axes.outputs), m.rows, m.kind, m.uses)
        for m in oialr.find_matrices(fn, params, x)
    )
    assert found == case.found


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
    assert oialr.select([dense, embedding], keep_last=0) == (dense,)
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
        assert oialr.select(matrices, keep_last=0) == ()
    with pytest.raises(ValueError, match="`include` asks for kernel, a grouped"):
        oialr.select(matrices, include="kernel")


def test_two_roles_of_one_leaf_are_reported():
    def fn(p, x):
        once = jnp.einsum("bi,ijk->bjk", x, p["w"])
        return once, jnp.einsum("bj,ijk->bik", x[:, :2], p["w"])

    (found,) = oialr.find_matrices(fn, {"w": jnp.ones((4, 2, 3))}, jnp.ones((5, 4)))
    assert found.other == ("dot over other axes",)
    assert oialr.select([found], keep_last=0) == ()


def _chain(*widths):
    """Matrices of a chain of dense layers, found on a real function."""

    def fn(params, x):
        for name in sorted(params):
            x = jnp.tanh(x @ params[name])
        return x

    shapes = {f"w{i}": s for i, s in enumerate(itertools.pairwise(widths))}
    _, params, x = plain(fn, (4, widths[0]), **shapes)()
    return oialr.find_matrices(fn, params, x)


def test_keep_last_spares_the_real_last_matrix():
    matrices = _chain(64, 64, 64, 4)  # a narrow head, not eligible by shape
    assert [m.path for m in oialr.select(matrices)] == ["w0", "w1"]
    assert [m.path for m in oialr.select(matrices, keep_last=2)] == ["w0"]
    authors = oialr.select(matrices, keep_eligible=True)
    assert [m.path for m in authors] == ["w0"]  # the layer before the head is spared


def test_keep_first_counts_in_execution_order():
    matrices = _chain(4, 64, 64, 64, 64)  # a narrow stem, not eligible by shape
    assert [m.path for m in oialr.select(matrices, keep_first=1)] == ["w1", "w2"]
    authors = oialr.select(matrices, keep_first=1, keep_eligible=True)
    assert [m.path for m in authors] == ["w2"]


def test_keeping_more_than_there_are_keeps_all():
    assert oialr.select(_chain(8, 8, 8), keep_last=5) == ()


def test_aspect_is_strict_as_the_authors():
    matrices = _chain(100, 10, 100, 11)
    assert [m.path for m in oialr.select(matrices, keep_last=0)] == ["w2"]


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
