"""ResNet-RS, the residual network of the paper, to be held in low rank: plain Flax."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from train.models import resnet
from train.models.resnet import Conv

WIDTHS = (64, 128, 256, 512)


class ResNetRS(nn.Module):
    """Class logits of images: a deep stem, then bottlenecks with channel gates.

    Four stages of (3, 4, 23, 3) blocks are ResNet-RS 101, 63,618,696 weights for 1000
    classes. Batch statistics live in the collection `batch_stats`, mutable where
    `train` is True; a `dropout` above zero then needs a key of that name.

    Shapes:   images: (b, h, w, c); logits: (b, classes), float32 whatever `dtype`.
    Args:     blocks: bottlenecks by stage. dropout: before the head.
              dtype: of the computation; the parameters are float32.
              remat: blocks are computed again in the backward pass.
    Source:   Bello et al. 2021, as timm's `resnetrs101` builds it: three 3x3 and a
              strided 3x3 convolution for a stem, average before a strided shortcut.
    """

    blocks: tuple[int, ...]
    classes: int
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> Float[Array, "b classes"]:
        """Logits of a batch."""
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
        )
        x = images
        for i, (width, stride) in enumerate(((32, 2), (32, 1), (64, 1), (64, 2))):
            x = Conv(
                width,
                (3, 3),
                (stride, stride),
                padding=1,
                dtype=self.dtype,
                name=f"stem{i}",
            )(x)
            x = nn.relu(norm(name=f"stem_norm{i}")(x))
        block = nn.remat(Bottleneck) if self.remat else Bottleneck
        for i, count in enumerate(self.blocks):
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"stage{i}_block{j}"
                x = block(WIDTHS[i], stride, norm, self.dtype, name=name)(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, dtype=jnp.float32, name="head")(x)


class Bottleneck(resnet.Bottleneck):
    """That of ResNet-50 with a gate, and a shortcut that averages what it strides."""

    def gated(self, y: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Each channel times a factor in (0, 1), from the means of all of them."""
        channels = y.shape[-1]  # a quarter of them is a multiple of 8 at these widths
        x = jnp.mean(y, axis=(1, 2), keepdims=True)
        x = nn.Conv(channels // 4, (1, 1), dtype=self.dtype, name="squeeze")(x)
        x = nn.Conv(channels, (1, 1), dtype=self.dtype, name="excite")(nn.relu(x))
        return y * nn.sigmoid(x)

    def shortcut(
        self, x: Float[Array, "b h w c"], wide: int
    ) -> Float[Array, "b i j wide"]:
        """A 1x1 convolution, of means where it strides."""
        if self.stride > 1:
            x = _average(x, self.stride)
        return Conv(wide, (1, 1), dtype=self.dtype, name="shortcut")(x)


def _average(x: Float[Array, "b h w c"], stride: int) -> Float[Array, "b i j c"]:
    """Means over squares; those that stick out of the image count what is in it."""
    pad = tuple((0, -size % stride) for size in x.shape[1:3])
    window = (stride, stride)
    return nn.avg_pool(x, window, window, padding=pad, count_include_pad=False)
