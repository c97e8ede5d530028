"""The small convolutional network of the orthogonal-gradient papers: plain Flax."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class BasicCNN(nn.Module):
    """Class logits of small images: three strided 3x3 convolutions, one dense layer.

    Each convolution has 32 channels, no bias, batch normalisation and ReLU. Batch
    statistics live in the collection `batch_stats`, mutable where `train` is True.
    24,618 weights for ten classes of 32x32 colour images.

    Shapes:   images: (b, h, w, c); logits: (b, classes), float32 whatever `dtype`.
    Args:     classes: None for the features that the dense layer would see.
    Source:   Tuddenham, Prügel-Bennett and Hare 2022.
    """

    classes: int | None = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Logits of a batch."""
        x = images
        for i in range(1, 4):
            x = nn.Conv(
                32,
                (3, 3),
                strides=2,
                padding=1,
                use_bias=False,
                dtype=self.dtype,
                name=f"conv{i}",
            )(x)
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                epsilon=1e-5,
                dtype=self.dtype,
                name=f"norm{i}",
            )(x)
            x = nn.relu(x)
        x = x.reshape(x.shape[0], -1)
        if self.classes is None:
            return x.astype(jnp.float32)
        return nn.Dense(self.classes, dtype=jnp.float32, name="head")(x)
