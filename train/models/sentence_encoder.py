"""The sentence encoder to be compressed: BERT and a mean over tokens, plain Flax."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from train.models.vit import gelu


class SentenceEncoder(nn.Module):
    """Vectors of norm one for texts, and vectors of their tokens.

    Post-norm blocks of attention and a two-layer perceptron over learned positions; the
    mean over the tokens of a text, divided by its norm. No dropout anywhere.

    Shapes:   tokens, mask: (b, t) with t up to `places`; the mask is True where there
              is a token. Results: (b, width) and (b, t, width).
    Source:   Devlin et al. 2019 (BERT) without its pooler; Reimers and Gurevych 2019;
              the sizes of all-MiniLM-L6-v2 (Wang et al. 2020).
    """

    words: int = 30_522
    places: int = 512
    depth: int = 6
    heads: int = 12
    width: int = 384
    hidden: int = 1536

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "b t"], mask: Bool[Array, "b t"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b t d"]]:
        """Vectors of texts, and of their tokens."""
        x = nn.Embed(self.words, self.width, name="words")(tokens)
        x = (
            x
            + self.param(
                "places", nn.initializers.normal(0.02), (self.places, self.width)
            )[None, : tokens.shape[1]]
        )
        x = x + self.param("kind", nn.initializers.normal(0.02), (1, 1, self.width))
        x = _norm("norm")(x)
        for i in range(self.depth):
            x = Block(self.heads, self.hidden, name=f"block{i}")(x, mask)
        counted = mask[..., None].astype(x.dtype)
        mean = jnp.sum(x * counted, axis=1) / jnp.sum(counted, axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True), x


class Block(nn.Module):
    """Tokens after attention and a perceptron, each added to its input and normed."""

    heads: int
    hidden: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], mask: Bool[Array, "b t"]
    ) -> Float[Array, "b t d"]:
        """norm(x + attention(x)), then norm(x + perceptron(x))."""
        x = _norm("norm1")(x + self.attention(x, mask))
        y = gelu(nn.Dense(self.hidden, name="mlp_in")(x))
        return _norm("norm2")(x + nn.Dense(x.shape[-1], name="mlp_out")(y))

    def attention(
        self, x: Float[Array, "b t d"], mask: Bool[Array, "b t"]
    ) -> Float[Array, "b t d"]:
        """Softmax attention of each token over all that the mask has."""
        b, t, width = x.shape
        query, key, value = (
            nn.Dense(width, name=name)(x).reshape(b, t, self.heads, -1)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        scores = jnp.where(mask[:, None, None], scores, -1e9)
        y = jnp.einsum("bhqk,bkhd->bqhd", nn.softmax(scores), value)
        return nn.Dense(width, name="attention_out")(y.reshape(b, t, width))


def _norm(name: str) -> nn.Module:
    return nn.LayerNorm(epsilon=1e-12, name=name)


def from_bert(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The params in a file of BERT's, by its names in Hugging Face's transformers.

    Raises:   KeyError: a tensor is missing.
    """

    def dense(name: str) -> dict[str, Array]:
        kernel, bias = tensors[f"{name}.weight"].T, tensors[f"{name}.bias"]
        return {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}

    def norm(name: str) -> dict[str, Array]:
        scale, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}

    def block(name: str) -> dict[str, Any]:
        attention = f"{name}.attention"
        heads = {x: dense(f"{attention}.self.{x}") for x in ("query", "key", "value")}
        return heads | {
            "attention_out": dense(f"{attention}.output.dense"),
            "norm1": norm(f"{attention}.output.LayerNorm"),
            "mlp_in": dense(f"{name}.intermediate.dense"),
            "mlp_out": dense(f"{name}.output.dense"),
            "norm2": norm(f"{name}.output.LayerNorm"),
        }

    def table(name: str) -> Array:
        return jnp.asarray(tensors[f"embeddings.{name}_embeddings.weight"])

    depth = 0
    while f"encoder.layer.{depth}.output.dense.weight" in tensors:
        depth += 1
    return {
        "words": {"embedding": table("word")},
        "places": table("position"),
        "kind": table("token_type")[None, :1],
        "norm": norm("embeddings.LayerNorm"),
    } | {f"block{i}": block(f"encoder.layer.{i}") for i in range(depth)}
