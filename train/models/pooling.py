"""Pooling that the convolutional models share."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def halved(x: Float[Array, "b h w c"]) -> Float[Array, "b i j c"]:
    """The largest of each 2x2 pixels; an odd last row or column is left out.

    As `nn.max_pool`, whose gradient takes CPUs most of a step of LeNet5.
    """
    h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    rows = jnp.maximum(x[:, 0:h:2, :w], x[:, 1:h:2, :w])
    return jnp.maximum(rows[:, :, ::2], rows[:, :, 1::2])
