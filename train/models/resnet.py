"""Residual convolutional networks to be held in low rank: plain Flax."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

Conv = functools.partial(
    nn.Conv,
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
)


class ResNet(nn.Module):
    """Class logits of images: a stem, then stages of residual blocks.

    The first block of every stage but the first halves height and width. Batch
    statistics live in the collection `batch_stats`, mutable where `train` is True.
    Widths (64, 128, 256, 512) with two blocks each are ResNet-18 in its CIFAR form,
    11,173,962 weights for 10 classes; (16, 32, 64) with three ResNet-20, 272,474; the
    first widths with (3, 4, 6, 3) bottlenecks and a large stem ResNet-50, 25,557,032
    for 1000 classes.

    Shapes:   images: (b, h, w, c); logits: (b, classes), float32 whatever `dtype`.
    Args:     widths: channels by stage. blocks: blocks by stage.
              dtype: of the computation; the parameters are float32.
              bottleneck: blocks of 1x1, 3x3 and 1x1 convolutions, four times as wide
              outside. large_stem: 7x7 convolution and maximum, each of stride 2, for
              224 pixels, in place of a 3x3 convolution for 32. remat: blocks are
              computed again in the backward pass, which keeps their inputs only.
    Source:   He et al. 2016, projection (1x1 convolution) where shapes change, stride
              in the 3x3 convolution; padding is symmetric as torchvision's, kernels
              from He's normal over the fan-out.
    """

    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    classes: int
    dtype: Any = jnp.float32
    bottleneck: bool = False
    large_stem: bool = False
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
        size, stride, pad = (7, 2, 3) if self.large_stem else (3, 1, 1)
        x = Conv(
            self.widths[0],
            (size, size),
            (stride, stride),
            padding=pad,
            dtype=self.dtype,
            name="stem",
        )(images)
        x = nn.relu(norm(name="norm")(x))
        if self.large_stem:
            x = nn.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        block = Bottleneck if self.bottleneck else Block
        block = nn.remat(block) if self.remat else block
        for i, (width, count) in enumerate(zip(self.widths, self.blocks, strict=True)):
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                x = block(width, stride, norm, self.dtype, name=f"stage{i}_block{j}")(x)
        x = jnp.mean(x, axis=(1, 2))
        return nn.Dense(self.classes, dtype=jnp.float32, name="head")(x)


class Block(nn.Module):
    """ReLU of the input plus two 3x3 convolutions, each normalised."""

    width: int
    stride: int
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j width"]:
        """The shortcut is a strided 1x1 convolution where the shape changes."""
        stride = (self.stride, self.stride)
        y = Conv(self.width, (3, 3), stride, padding=1, dtype=self.dtype, name="conv1")(
            x
        )
        y = nn.relu(self.norm(name="norm1")(y))
        y = Conv(self.width, (3, 3), padding=1, dtype=self.dtype, name="conv2")(y)
        y = self.norm(name="norm2")(y)
        if x.shape != y.shape:
            x = Conv(self.width, (1, 1), stride, dtype=self.dtype, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """ReLU of the input plus a narrow 3x3 between two 1x1 convolutions.

    The scale of the last normalisation begins at zero, as timm's, so that every block
    begins as its shortcut.
    """

    width: int
    stride: int
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j wide"]:
        """The output has four times `width` channels."""
        stride, wide = (self.stride, self.stride), 4 * self.width
        y = Conv(self.width, (1, 1), dtype=self.dtype, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = Conv(self.width, (3, 3), stride, padding=1, dtype=self.dtype, name="conv2")(
            y
        )
        y = nn.relu(self.norm(name="norm2")(y))
        y = Conv(wide, (1, 1), dtype=self.dtype, name="conv3")(y)
        y = self.norm(name="norm3", scale_init=nn.initializers.zeros)(y)
        y = self.gated(y)
        if x.shape != y.shape:
            x = self.shortcut(x, wide)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)

    def gated(self, y: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """What is added to the shortcut."""
        return y

    def shortcut(
        self, x: Float[Array, "b h w c"], wide: int
    ) -> Float[Array, "b i j wide"]:
        """A strided 1x1 convolution, where the shape changes."""
        stride = (self.stride, self.stride)
        return Conv(wide, (1, 1), stride, dtype=self.dtype, name="shortcut")(x)
