"""The perceptron to be held in low rank: plain Flax."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float


class MLP(nn.Module):
    """Class logits of inputs of any shape, flattened: hidden layers of ReLU.

    Shapes:   inputs: (b, ...), the same in every call; logits: (b, classes), float32
              whatever `dtype`.
    Args:     hidden: width of each hidden layer.
    """

    hidden: tuple[int, ...]
    classes: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "b ..."]) -> Float[Array, "b classes"]:
        """Logits of a batch."""
        x = inputs.reshape(inputs.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"hidden{i}")(x))
        return nn.Dense(self.classes, dtype=jnp.float32, name="head")(x)
