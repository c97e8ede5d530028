"""Learning rates over the updates of a run, as Optax schedules."""

import jax.numpy as jnp
import optax


def cosine(
    base: float, *, length: int, lowest: float = 0.0, warmup: int = 0, k: float = 1.0
) -> optax.Schedule:
    """From 0 to `base` in a line, then along half a cosine to `lowest`.

    Update τ of T after it has lowest + (base - lowest)(1 + cos(π (τ/T)^k)) / 2, and
    later ones lowest. With `lowest` above `base` the rate rises, as the authors of
    OIALR have it in their low-rank runs.

    Args:     length: T, without the warm-up. k: below 1 falls early.
    Raises:   ValueError: a length below 1, a negative warm-up.
    Source:   timm's CosineLRScheduler, for one cycle; Zhang and Li 2020 (k).
    """
    if length < 1 or warmup < 0:
        raise ValueError(
            "`length` must be at least 1 and `warmup` at least 0, got "
            f"{length} and {warmup}"
        )

    def rate(count: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
        count = jnp.asarray(count, jnp.float32)
        part = jnp.clip((count - warmup) / length, 0.0, 1.0)
        falling = lowest + 0.5 * (base - lowest) * (1 + jnp.cos(jnp.pi * part**k))
        return jnp.where(count < warmup, count * base / max(1, warmup), falling)

    return rate


def halving(base: float, *, every: int) -> optax.Schedule:
    """`base` for two epochs of `every` updates, half of it for the next, and so on.

    Source:   the authors of Autoformer, who count epochs from one and set the rate of
              an epoch after it.
    """
    return optax.exponential_decay(
        base,
        transition_steps=every,
        decay_rate=0.5,
        transition_begin=every,
        staircase=True,
    )
