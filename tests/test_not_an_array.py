"""What a LowRank node is not: an array; and what it is to Flax and to a norm."""

import copy
import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BY_NAME, normal
from flax import serialization
from flax.training.train_state import TrainState
from helpers import in_low_rank

import oialr_jax as oialr
from oialr_jax.lowrank import Axes, factor

AXES = Axes((6, 4), (), (0,), (1,))
X = np.ones((3, 6), np.float32)
NOT_DEFINED = {
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "at": lambda w: w.at[0],
    "astype": lambda w: w.astype(jnp.bfloat16),
    "reshape": lambda w: w.reshape(24),
    "jnp.asarray": jnp.asarray,
    "np.asarray": np.asarray,
    "np.array_of_list": lambda w: np.array([w]),
    "jax_matmul": lambda w: jnp.asarray(X) @ w,
    "numpy_matmul": lambda w: X @ w,
    "node_matmul": lambda w: w @ X,
    "add": lambda w: w + X[:, :4],
    "add_from_the_right": lambda w: jnp.ones((6, 4)) + w,
    "scaled": lambda w: w * 2,
    "scaled_from_the_left": lambda w: 2 * w,
    "negative": lambda w: -w,
    "compared": lambda w: w < 1,
    "indexed": lambda w: w[0],
    "iterated": list,
    "len": len,
    "float": float,
    "jnp.sum": jnp.sum,
    "np.sum": np.sum,
    "jnp.einsum": lambda w: jnp.einsum("bi,ij->bj", X, w),
    "two_nodes": lambda w: w - w,
    "product_of_two_nodes": lambda w: w @ w,
    "remainder": lambda w: 3 % w,
}


def node(rank=2):
    return factor(normal(0, 6, 4), AXES, rank)


@pytest.mark.parametrize("use", NOT_DEFINED)
def test_a_node_is_no_array_and_says_what_to_call(use):
    with pytest.raises(TypeError, match=r"`factored\(fn\)`.*materialize"):
        NOT_DEFINED[use](node())


def test_what_a_node_answers_as_its_dense_array_would():
    w = node()
    dense = w.materialize()
    assert (w.shape, w.ndim, w.size, w.dtype) == (
        dense.shape,
        dense.ndim,
        dense.size,
        dense.dtype,
    )
    assert w  # an object, whatever is in it
    assert not hasattr(w, "T")
    with pytest.raises(AttributeError, match="no attribute 'rnak'"):
        w.rnak  # noqa: B018


def test_tree_functions_copies_and_pickles_still_work():
    w = node()
    for again in (copy.deepcopy(w), pickle.loads(pickle.dumps(w)), jax.device_put(w)):
        assert jax.tree.structure(again) == jax.tree.structure(w)
    shapes = jax.eval_shape(lambda w: w, w)
    assert (shapes.shape, shapes.size, shapes.rank) == ((6, 4), 24, 2)
    jax.tree.map(lambda _: None, w)
    jax.tree.unflatten(jax.tree.structure(w), [object()] * 3)


def test_the_norm_counts_a_matrix_as_its_dense_array():
    fn, dense, x = BY_NAME["scan_remat"].build()
    params = in_low_rank(dense, oialr.find_matrices(fn, dense, x))
    leaves = [np.asarray(a, np.float64) for a in jax.tree.leaves(dense)]
    full = in_low_rank(dense, oialr.find_matrices(fn, dense, x), fraction=1)
    desired = np.sqrt(sum(np.sum(a**2) for a in leaves))
    for tree in (dense, full, oialr.transform.trainable(full)):
        np.testing.assert_allclose(oialr.lowrank.global_norm(tree), desired, rtol=1e-5)
    cut = jax.tree.leaves(oialr.materialize(params))
    desired = np.sqrt(sum(np.sum(np.asarray(a, np.float64) ** 2) for a in cut))
    np.testing.assert_allclose(oialr.lowrank.global_norm(params), desired, rtol=1e-5)
    assert optax.tree.norm(params) > 1.05 * desired  # what it is there for


def test_the_norm_of_gradients_with_nodes_and_without():
    w, x = node(), jnp.asarray(X)
    loss = oialr.factored(lambda w, x: jnp.sum(jnp.sin(x @ w)))
    nodes, (_, cores) = jax.grad(loss)(w, x), oialr.value_and_grad(loss)(w, x)
    desired = np.linalg.norm(np.asarray(cores, np.float64))
    np.testing.assert_allclose(oialr.lowrank.global_norm(nodes), desired, rtol=1e-5)
    np.testing.assert_allclose(oialr.lowrank.global_norm(cores), desired, rtol=1e-5)


def test_the_norm_is_float32_or_wider_and_leaves_out_what_is_no_float():
    tree = {
        "w": jnp.full((1000,), 3.0, jnp.bfloat16),
        "z": jnp.asarray([3 + 4j]),
        "n": jnp.arange(5),
        "key": jax.random.key(0),
        "f": jnp.tanh,
        "none": None,
    }
    norm = oialr.lowrank.global_norm(tree)
    assert norm.dtype == jnp.float32
    np.testing.assert_allclose(norm, np.sqrt(9000 + 25), rtol=1e-6)
    assert oialr.lowrank.global_norm({}) == 0


def params(rank=2):
    return {"a": {"kernel": node(rank), "bias": jnp.ones(4)}, "b": [node(rank)]}


@pytest.mark.parametrize("target_rank", [2, 3])
def test_flax_serialization_gives_what_was_stored_at_its_own_rank(target_rank):
    stored = params(2)
    restored = serialization.from_bytes(
        params(target_rank), serialization.to_bytes(stored)
    )
    assert oialr.ranks(restored) == oialr.ranks(stored)
    assert jax.tree.structure(restored) == jax.tree.structure(stored)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(stored), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_train_state_goes_through_flax_serialization():
    tx = oialr.freeze_bases(optax.adam(1e-2))
    state = TrainState.create(apply_fn=None, params=params(), tx=tx)
    grads = jax.tree.map(jnp.ones_like, state.params)
    trained = state.apply_gradients(grads=grads)
    restored = serialization.from_bytes(state, serialization.to_bytes(trained))
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)


def test_flax_serialization_refuses_what_does_not_fit():
    dense = serialization.to_bytes(oialr.materialize(params()))
    with pytest.raises(ValueError, match="a/kernel is in low rank in the target and"):
        serialization.from_bytes(params(), dense)
    turned = {"w": factor(normal(0, 6, 4), Axes((6, 4), (), (1,), (0,)))}
    stored = serialization.to_bytes({"w": node()})
    with pytest.raises(ValueError, match=r"w: factors of shapes .* do not fit"):
        serialization.from_bytes(turned, stored)


@pytest.mark.parametrize("blocked", [True, False], ids=["no_flax", "flax_first"])
def test_the_library_imports_without_flax_and_after_it(blocked):
    first = "sys.modules['flax'] = None" if blocked else "import flax.serialization"
    code = f"import sys; {first}; import oialr_jax"
    subprocess.run([sys.executable, "-c", code], check=True)
