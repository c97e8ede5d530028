"""The language model over characters, to be held in low rank: plain Flax."""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from train.models.vit import Dense, gelu, repeat


class Transformer(nn.Module):
    """Logits of the next token at each place, from the tokens up to it.

    Pre-norm blocks of causal attention and a two-layer perceptron, learned positions.
    Dropout, where `train` is True, needs a key called `dropout`.

    Shapes:   tokens: (b, t) with t up to `context`; logits: (b, t, tokens), float32
              whatever `dtype`.
    Args:     tokens: how many there are. dtype: of the computation; the parameters are
              float32. remat, scan: as in `VisionTransformer`.
    Raises:   ValueError: more places than `context`, or heads that do not divide.
    Source:   Radford et al. 2019 (GPT-2), without its tied embeddings and with the
              exact GELU.
    """

    tokens: int
    context: int
    depth: int
    heads: int
    width: int
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False
    scan: bool = False

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b t"], train: bool = False
    ) -> Float[Array, "b t tokens"]:
        """Logits of a batch."""
        places = tokens.shape[1]
        if places > self.context:
            raise ValueError(
                f"`context` is {self.context} places, got a text of {places}"
            )
        init = nn.initializers.normal(0.02)
        x = nn.Embed(
            self.tokens,
            self.width,
            embedding_init=init,
            dtype=self.dtype,
            name="embedding",
        )(tokens)
        position = self.param("position", init, (1, self.context, self.width))
        x = x + position[:, :places].astype(self.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        block = functools.partial(
            nn.remat(Block) if self.remat else Block,
            self.heads,
            self.dropout,
            train,
            self.dtype,
        )
        x = repeat(block, x, depth=self.depth, scan=self.scan)
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        return Dense(self.tokens, use_bias=False, dtype=jnp.float32, name="head")(x)


class Block(nn.Module):
    """Places after causal attention and a perceptron, each added to its input."""

    heads: int
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """x + attention(norm(x)), then x + perceptron(norm(x))."""
        width = x.shape[-1]
        drop = nn.Dropout(self.dropout, deterministic=not self.train)
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm1")(x)
        x = x + drop(self.attention(y))
        y = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm2")(x)
        y = gelu(Dense(4 * width, dtype=self.dtype, name="mlp_in")(y))
        return x + drop(Dense(width, dtype=self.dtype, name="mlp_out")(y))

    def attention(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Softmax attention of each place over itself and those before it."""
        b, places, width = x.shape
        if width % self.heads:
            raise ValueError(
                f"`heads` must divide the width, got {self.heads} for {width}"
            )
        qkv = Dense(3 * width, dtype=self.dtype, name="attention_in")(x)
        qkv = qkv.reshape(b, places, 3, self.heads, width // self.heads)
        query, key, value = (qkv[:, :, i] for i in range(3))  # each (b, t, h, d)
        mask = nn.make_causal_mask(jnp.ones((b, places)), dtype=jnp.bool_)
        y = nn.dot_product_attention(query, key, value, mask=mask, dtype=self.dtype)
        y = y.reshape(b, places, width)
        return Dense(width, dtype=self.dtype, name="attention_out")(y)
