"""train.tuning: cores after a few steps of Adam."""

import jax
import jax.numpy as jnp
import numpy as np
from cases import normal
from helpers import in_low_rank

import oialr_jax as oialr
from train.tuning import tuned

STEPS = 40


@oialr.factored
def loss(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["head"] - y) ** 2)


def test_cores_are_tuned_and_what_was_given_stays():
    dense = {"w": normal(0, 12, 8), "head": normal(1, 8, 3)}
    x, y = normal(2, 64, 12), normal(3, 64, 3)
    matrices = oialr.find_matrices(loss, dense, x, y)[:1]
    given = in_low_rank(dense, matrices)
    before = jax.tree.map(np.array, given)
    new, state = tuned(loss, given, [(x, y)] * STEPS, 0.02, STEPS)
    jax.tree.map(np.testing.assert_array_equal, given, before)  # nothing is donated
    assert loss(new, x, y) < 0.7 * loss(given, x, y)
    for part in ("u", "vt"):
        np.testing.assert_array_equal(
            getattr(new["w"], part), getattr(given["w"], part)
        )
    assert np.any(new["w"].s != given["w"].s)
    assert int(state.inner_state[0].count) == STEPS
