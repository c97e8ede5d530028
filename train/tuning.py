"""Train cores, and what is dense, a little more: after a cut, or on a frozen base."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

import oialr_jax as oialr


def tuned(
    loss: Callable[..., Array],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    rate: float,
    steps: int,
    *,
    b2: float = 0.99,
) -> tuple[Any, Any]:
    """Host side: params after a step of Adam for each batch, and its state.

    The loss is one of (params, *batch). The rate warms up for a twentieth of the steps
    and falls to zero as a cosine.
    """
    schedule = optax.schedules.warmup_cosine_decay_schedule(
        0.0, rate, math.ceil(steps / 20), steps
    )
    tx = oialr.freeze_bases(optax.adam(schedule, b2=b2))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, *batch: Any) -> Any:
        _, grads = oialr.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state = jax.jit(tx.init)(params)
    for batch in batches:
        params, state = step(params, state, *batch)
    return jax.block_until_ready(params), state
