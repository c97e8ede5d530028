"""Momentum before or after the polar factor, on a noisy quadratic: no network."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import oialr_jax as oialr
from train import markdown
from train.markdown import spread

NOISES = (0.1, 0.5, 2.0, 5.0)


QUADRATIC: Mapping[str, optax.GradientTransformation] = {
    "sgd": optax.trace(0.9),
    "normalize_components": optax.chain(
        oialr.orthogonal.normalize_components(), optax.trace(0.9)
    ),
    "orthogonal": optax.chain(oialr.orthogonal.orthogonalize(), optax.trace(0.9)),
    "momentum, then orthogonal": optax.chain(
        optax.trace(0.9), oialr.orthogonal.orthogonalize()
    ),
}


def quadratic(seeds: int = 16, steps: int = 300, side: int = 16) -> str:
    """The last loss of each order by noise, each at its own rate; Markdown.

    The loss is half the trace of (W - A)ᵀ H (W - A), H with eigenvalues from 0.01 to 1;
    the entries of a gradient have noise of deviation sigma. The rate falls as a cosine
    from one of 13 values; the best by the mean over seeds is shown in brackets.
    """
    rates = jnp.logspace(-4, 0, 13)
    h = jnp.logspace(-2, 0, side)[:, None]
    fall = optax.cosine_decay_schedule(1.0, steps)

    def last(tx: optax.GradientTransformation, sigma: Any, rate: Any, key: Any) -> Any:
        first, *keys = jax.random.split(key, steps + 1)
        target = jax.random.normal(first, (side, side))

        def step(carry: Any, x: Any) -> Any:
            w, state = carry
            t, key = x
            g = h * (w - target) + sigma * jax.random.normal(key, w.shape)
            updates, state = tx.update({"w": g}, state)
            return (w - rate * fall(t) * updates["w"], state), None

        start = jnp.zeros((side, side))
        carry = (start, tx.init({"w": start}))
        (w, _), _ = jax.lax.scan(step, carry, (jnp.arange(steps), jnp.stack(keys)))
        return 0.5 * jnp.sum(h * (w - target) ** 2)

    lines = []
    for name, tx in QUADRATIC.items():
        of_seeds = jax.vmap(functools.partial(last, tx), (None, None, 0))
        run = jax.jit(jax.vmap(of_seeds, (None, 0, None)))
        cells = [name]
        for sigma in NOISES:
            losses = run(sigma, rates, jax.random.split(jax.random.key(0), seeds))
            best = int(jnp.argmin(jnp.nan_to_num(jnp.mean(losses, 1), nan=jnp.inf)))
            cells.append(f"{spread(losses[best], '.4f', ddof=0)} ({rates[best]:.2g})")
        lines.append(cells)
    return markdown.table(["arm", *(f"sigma {x:g}" for x in NOISES)], lines)
