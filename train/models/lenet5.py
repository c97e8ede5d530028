"""The small convolutional network to be held in low rank: plain Flax."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from train.models.pooling import halved


class LeNet5(nn.Module):
    """Class logits of 28x28 images: two 5x5 convolutions, two dense layers, ReLU.

    430,500 weights and 580 biases: 20 and 50 channels, each halved by a 2x2 maximum,
    then 800-500-10.

    Args:     channels: of the convolutions. hidden: width of the dense layer.
    Shapes:   images: (b, 28, 28, 1); logits: (b, classes), float32 whatever `dtype`.
    Source:   the variant of Schotthöfer et al. 2022 (dynamical low-rank training).
    """

    classes: int = 10
    channels: tuple[int, ...] = (20, 50)
    hidden: int = 500
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 1"]) -> Float[Array, "b classes"]:
        """Logits of a batch."""
        x = images
        for i, channels in enumerate(self.channels, start=1):
            x = nn.Conv(
                channels, (5, 5), padding="VALID", dtype=self.dtype, name=f"conv{i}"
            )(x)
            x = nn.relu(halved(x))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(x))
        return nn.Dense(self.classes, dtype=jnp.float32, name="head")(x)
