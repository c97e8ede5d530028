"""Augmentation on the device: pure functions of a key and a batch, inside the step."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped


def random_shift(
    key: Array, image: Shaped[Array, "b h w c"], pixels: int
) -> Shaped[Array, "b h w c"]:
    """Each image moved by its own whole number of pixels, zeros where it came from.

    Both offsets are uniform on -pixels..pixels.
    """
    b, height, width, channels = image.shape
    padded = jnp.pad(image, ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0)))
    start = jax.random.randint(key, (b, 2), 0, 2 * pixels + 1)

    def window(one: Array, offset: Array) -> Array:
        corner = (offset[0], offset[1], jnp.zeros((), offset.dtype))
        return jax.lax.dynamic_slice(one, corner, (height, width, channels))

    return jax.vmap(window)(padded, start)
