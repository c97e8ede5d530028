"""Features and embeddings of images, to be trained without labels: plain Flax."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from train.models.basic_cnn import BasicCNN


class BarlowTwins(nn.Module):
    """Features of small images, and their embedding by a two-layer projector.

    The embedding is for the loss, the features for what comes after it. Batch
    statistics live in the collection `batch_stats`, mutable where `train` is True.

    Shapes:   images: (b, h, w, c); features: (b, f); embedding: (b, width), float32
              whatever `dtype`.
    Source:   Zbontar et al. 2021, with a small encoder and one hidden layer less.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> tuple[Float[Array, "b f"], Float[Array, "b width"]]:
        """Of a batch."""
        encoder = BasicCNN(classes=None, dtype=self.dtype, name="encoder")
        features = encoder(images, train)
        x = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name="hidden")(
            features
        )
        x = nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            name="norm",
        )(x)
        x = nn.relu(x)
        dense = nn.Dense(
            self.width, use_bias=False, dtype=jnp.float32, name="projected"
        )
        return features, dense(x)
