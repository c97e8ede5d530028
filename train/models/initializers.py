"""First values as torch draws them, which the models of the papers start from."""

from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array


def symmetric_uniform(fan_in: int) -> nn.initializers.Initializer:
    """Uniform on ±fan_in^(-1/2): torch's kernels and biases of linear layers."""
    bound = fan_in**-0.5

    def init(key: Array, shape: tuple[int, ...], dtype: Any = None) -> Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
