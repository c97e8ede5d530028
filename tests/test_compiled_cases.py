"""The table of cases, compiled as users compile: with all of XLA's optimizations."""

import jax
import jax.numpy as jnp
import pytest
from cases import CASES
from helpers import TOLERANCE, assert_close, projected, scalar_loss
from test_factored import GRADIENT_TOLERANCE, low_rank_case

import oialr_jax as oialr
from oialr_jax.lowrank import is_low_rank, named_leaves


def taken_apart(tree):
    """The arrays of a tree, and what puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def rebuilt(arrays):
        given = dict(zip(places, arrays, strict=True))
        return jax.tree.unflatten(
            structure, [given.get(i, leaf) for i, leaf in enumerate(leaves)]
        )

    return [leaves[i] for i in places], rebuilt


def outputs_and_gradient(fn, params, x):
    """Compiled as one program, of params that may have functions among their leaves."""
    arrays, rebuilt = taken_apart(params)

    def loss(arrays, x):
        out = fn(rebuilt(arrays), x)
        return scalar_loss(lambda out: out)(out), out

    @jax.jit
    def both(arrays, x):
        gradient, out = jax.grad(loss, has_aux=True)(arrays, x)
        return out, gradient

    out, gradient = both(arrays, x)
    return out, rebuilt(gradient)


FEW = ("dense", "attention", "used_twice_once_transposed", "bfloat16_compute")
"""What every push compiles so; the others are in full."""


@pytest.mark.optimized
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(x, id=x.name, marks=() if x.name in FEW else pytest.mark.long)
        for x in CASES
    ],
)
@pytest.mark.filterwarnings("ignore:.*is materialised:UserWarning")
def test_the_table_of_cases_compiled_as_users_do(case):
    """That one program; not what makes the params, nor the dense one to compare."""
    jax.config.update("jax_disable_most_optimizations", True)
    fn, params, x = low_rank_case(case)
    desired, dense = outputs_and_gradient(fn, oialr.materialize(params), x)
    jax.config.update("jax_disable_most_optimizations", False)  # as before each test
    out, gradient = outputs_and_gradient(oialr.factored(fn), params, x)
    tolerance = TOLERANCE[jnp.dtype(case.dtype)]
    assert_close(out, desired, tolerance)
    actual = {
        name: leaf.s if is_low_rank(leaf) else leaf
        for name, leaf in named_leaves(gradient).items()
    }
    expected = projected(dense, params)
    arrays = [x for x in expected if isinstance(expected[x], jax.Array)]
    assert_close(
        {x: actual[x] for x in arrays},
        {x: expected[x] for x in arrays},
        GRADIENT_TOLERANCE * tolerance,
    )
