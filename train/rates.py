"""Learning rates over the updates of a run, as Optax schedules."""

from collections.abc import Sequence

import jax.numpy as jnp
import optax


def cosine(
    base: float,
    *,
    length: int,
    lowest: float = 0.0,
    warmup: int = 0,
    warmup_rate: float = 0.0,
    prefix: bool = True,
    k: float = 1.0,
    cycles: int = 1,
    decay: float = 1.0,
) -> optax.Schedule:
    """From `warmup_rate` to `base` in a line, then along half a cosine to `lowest`.

    At update τ of a cycle of T: lowest + (peak - lowest)(1 + cos(π (τ/T)^k)) / 2, where
    peak is base · decay^i in cycle i, and lowest after the last. With `lowest` above
    `base` the rate rises, as the authors of OIALR have it in their low-rank runs.

    Args:     length: updates of a cycle. prefix: the cosine begins after the warm-up;
              else its first part is lost in it. k: below 1 falls early.
    Raises:   ValueError: a length or number of cycles below 1, a negative warm-up.
    Source:   timm's CosineLRScheduler, for cycles of one length; Zhang and Li 2020 (k).
    """
    if length < 1 or cycles < 1 or warmup < 0:
        raise ValueError(
            "`length` and `cycles` must be at least 1 and `warmup` at least 0, got "
            f"{length}, {cycles} and {warmup}"
        )

    def rate(count: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
        count = jnp.asarray(count, jnp.float32)
        rising = warmup_rate + count * (base - warmup_rate) / max(1, warmup)
        place = jnp.maximum(0.0, count - warmup) if prefix else count
        cycle = jnp.floor(place / length)
        part = (place - cycle * length) / length
        peak = base * decay**cycle
        falling = lowest + 0.5 * (peak - lowest) * (1 + jnp.cos(jnp.pi * part**k))
        after = jnp.where(cycle < cycles, falling, lowest)
        return jnp.where(count < warmup, rising, after)

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


def rewarmed(
    rate: optax.Schedule, events: Sequence[int], *, length: int
) -> optax.Schedule:
    """The rate, which after each event begins anew at its part 1/length.

    The whole of it is back `length` - 1 updates later.

    Args:     events: updates before which ranks or bases change, in order.
    Raises:   ValueError: `length` below 1.
    Source:   the authors of OIALR had it in their first trainer, with 3 updates.
    """
    if length < 1:
        raise ValueError(f"`length` must be at least 1, got {length}")
    starts = jnp.array(sorted(events), jnp.float32)

    def slowed(count: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
        since = jnp.asarray(count, jnp.float32) - starts
        part = jnp.where(since >= 0, jnp.minimum(1.0, (since + 1) / length), 1.0)
        return rate(count) * jnp.min(part, initial=1.0)

    return slowed
