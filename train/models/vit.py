"""The vision transformer to be held in low rank: plain Flax, knows nothing of it."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from train.models.initializers import symmetric_uniform

Dense = functools.partial(nn.Dense, kernel_init=nn.initializers.normal(0.02))


class VisionTransformer(nn.Module):
    """Class logits of images, from the class token of a pre-norm encoder.

    Patches are embedded by a strided convolution, a class token is put in front and a
    learned position embedding is added to all of them. No dropout anywhere.

    Shapes:   images: (b, h, w, c), h and w multiples of `patch` and the same in every
              call; logits: (b, classes), float32 whatever `dtype`.
    Args:     dtype: of the computation; the parameters are float32.
              remat: blocks are computed again in the backward pass, which keeps
              their inputs only. scan: one program for all blocks, whose parameters
              are stacked on a first axis of length `depth` under `blocks`.
    Raises:   ValueError: when the image does not split into patches.
    Source:   Dosovitskiy et al. 2021 as timm builds it: fused query, key and value,
              exact GELU, LayerNorm epsilon 1e-6, Dense kernels from normal(0.02).
    """

    patch: int
    depth: int
    heads: int
    width: int
    classes: int
    mlp_ratio: float = 4.0
    qkv_bias: bool = True
    dtype: Any = jnp.float32
    remat: bool = False
    scan: bool = False

    @nn.compact
    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b classes"]:
        """Logits of a batch."""
        b, height, width, channels = images.shape
        if height % self.patch or width % self.patch:
            raise ValueError(
                f"`patch` must divide the image, got patch {self.patch} for "
                f"{height}x{width} pixels"
            )
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=(self.patch, self.patch),
            padding="VALID",
            kernel_init=symmetric_uniform(channels * self.patch**2),
            bias_init=symmetric_uniform(channels * self.patch**2),
            dtype=self.dtype,
            name="patch",
        )(images)
        x = x.reshape(b, -1, self.width)
        token = self.param(
            "class_token", nn.initializers.normal(1e-6), (1, 1, self.width)
        )
        token = jnp.broadcast_to(token.astype(self.dtype), (b, 1, self.width))
        x = jnp.concatenate([token, x], axis=1)
        position = self.param(
            "position", nn.initializers.normal(0.02), (1, x.shape[1], self.width)
        )
        x = x + position.astype(self.dtype)
        block = functools.partial(
            nn.remat(Block) if self.remat else Block,
            self.heads,
            self.mlp_ratio,
            self.qkv_bias,
            self.dtype,
        )
        x = repeat(block, x, depth=self.depth, scan=self.scan)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x)
        return Dense(self.classes, dtype=jnp.float32, name="head")(x[:, 0])


class Block(nn.Module):
    """Tokens after one pre-norm block: attention, then a two-layer perceptron."""

    heads: int
    mlp_ratio: float
    qkv_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """x + attention(norm(x)), then x + perceptron(norm(x))."""
        width = x.shape[-1]
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm1")(x)
        x = x + self.attention(y)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm2")(x)
        y = Dense(int(width * self.mlp_ratio), dtype=self.dtype, name="mlp_in")(y)
        y = gelu(y)
        return x + Dense(width, dtype=self.dtype, name="mlp_out")(y)

    def attention(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Softmax attention over all tokens, scaled by head width to the -1/2."""
        b, tokens, width = x.shape
        if width % self.heads:
            raise ValueError(
                f"`heads` must divide the width, got {self.heads} for {width}"
            )
        qkv = Dense(
            3 * width, use_bias=self.qkv_bias, dtype=self.dtype, name="attention_in"
        )(x)
        qkv = qkv.reshape(b, tokens, 3, self.heads, width // self.heads)
        query, key, value = jnp.transpose(qkv, (2, 0, 3, 1, 4))  # each (b, h, t, d)
        scores = jnp.einsum("bhqd,bhkd->bhqk", query * query.shape[-1] ** -0.5, key)
        y = jnp.einsum("bhqk,bhkd->bhqd", nn.softmax(scores), value)
        y = jnp.transpose(y, (0, 2, 1, 3)).reshape(b, tokens, width)
        return Dense(width, dtype=self.dtype, name="attention_out")(y)


def repeat(
    block: Callable[..., nn.Module], x: Float[Array, "b t d"], *, depth: int, scan: bool
) -> Float[Array, "b t d"]:
    """What `depth` blocks make of x, in a compact method; see `VisionTransformer`."""
    if not scan:
        for i in range(depth):
            x = block(name=f"block{i}")(x)
        return x
    x, _ = nn.scan(
        lambda one, x, _: (one(x), None),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=depth,
    )(block(name="blocks"), x, None)
    return x


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """x Φ(x) with the normal distribution function Φ, exact as timm's default.

    The derivative is computed with the value, so that it alone is kept for the backward
    pass; `jax.nn.gelu` keeps three arrays, and its erfc is twice as slow on CPUs.
    """
    return x * _distribution(x)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    density = jnp.exp(-0.5 * x**2) * (2 * math.pi) ** -0.5
    phi = _distribution(x)
    return x * phi, (phi + x * density) * tangent


def _distribution(x: Array) -> Array:
    return 0.5 * (1 + jax.lax.erf(x * 2**-0.5))
