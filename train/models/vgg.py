"""VGG networks to be held in low rank: plain Flax."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from train.models.pooling import halved

VGG16 = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)


class VGG(nn.Module):
    """Class logits of images: groups of 3x3 convolutions, each halved by a maximum.

    `VGG16` groups with two hidden layers of 4096 are the original for 224 pixels,
    138,357,544 weights for 1000 classes; with batch normalisation and no hidden layer
    the usual form for 32 pixels, 14,728,266 for 10. Variants differ tenfold in size:
    name the variant beside any compression.

    Shapes:   images: (b, h, w, c), the same in every call; logits: (b, classes),
              float32 whatever `dtype`.
    Args:     groups: channels of the convolutions. hidden: widths of the dense layers
              before the head, each followed by `dropout`, whose key is called so.
              dtype: of the computation; the parameters are float32.
    Source:   Simonyan and Zisserman 2015, torchvision's dropout and initial values.
    """

    groups: tuple[tuple[int, ...], ...]
    classes: int
    hidden: tuple[int, ...] = ()
    batch_norm: bool = False
    dropout: float = 0.5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Logits of a batch."""
        x = images
        for i, group in enumerate(self.groups):
            for j, channels in enumerate(group):
                x = nn.Conv(
                    channels,
                    (3, 3),
                    padding=1,
                    kernel_init=nn.initializers.variance_scaling(
                        2.0, "fan_out", "normal"
                    ),
                    dtype=self.dtype,
                    name=f"conv{i}_{j}",
                )(x)
                if self.batch_norm:
                    x = nn.BatchNorm(
                        use_running_average=not train,
                        momentum=0.9,
                        dtype=self.dtype,
                        name=f"norm{i}_{j}",
                    )(x)
                x = nn.relu(x)
            x = halved(x)
        x = x.reshape(x.shape[0], -1)
        init = nn.initializers.normal(0.01)
        for i, width in enumerate(self.hidden):
            x = nn.Dense(width, kernel_init=init, dtype=self.dtype, name=f"hidden{i}")(
                x
            )
            x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return nn.Dense(self.classes, kernel_init=init, dtype=jnp.float32, name="head")(
            x
        )
