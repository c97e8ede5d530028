"""Other ways to train with less, for the benchmark alone: LoRA and OIALR in PyTorch.

GaLore needs no code here: Optax has it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array


def lora(apply: Callable[..., Any], adapter: Mapping[str, Any]) -> Callable[..., Any]:
    """`apply` with x A B added to every Dense and Conv that has an adapter.

    Args:     adapter: (A, B) by the path of the layer, "block0/mlp_in". A has the
              kernel's shape with r output channels, B is (r, outputs).
    Source:   Hu et al. 2021, scale 1; for convolutions A is the convolution.
    """

    def added(
        call: Callable[..., Array], args: Any, kwargs: Any, context: Any
    ) -> Array:
        y = call(*args, **kwargs)
        layer = context.module
        pair = adapter.get("/".join(layer.path))
        if context.method_name != "__call__" or pair is None:
            return y
        a, b = (array.astype(y.dtype) for array in pair)
        x = args[0].astype(y.dtype)
        if isinstance(layer, nn.Dense):
            return y + (x @ a) @ b
        return y + _convolution(layer, x, a) @ b

    def run(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(added):
            return apply(*args, **kwargs)

    return run


def adapters(params: Any, ranks: Mapping[str, int], key: Array) -> dict[str, Any]:
    """(A, B) for the kernels named by `ranks`: A normal(0.02), B zero."""
    result = {}
    for name, rank in ranks.items():
        kernel = params
        for part in name.split("/"):
            kernel = kernel[part]
        key, one = jax.random.split(key)
        a = 0.02 * jax.random.normal(one, (*kernel.shape[:-1], rank), kernel.dtype)
        b = jnp.zeros((rank, kernel.shape[-1]), kernel.dtype)
        result[name.removesuffix("/kernel")] = (a, b)
    return result


def _convolution(layer: nn.Conv, x: Array, kernel: Array) -> Array:
    """x convolved as by a channels-last layer: a number for the padding, or VALID."""
    padding = layer.padding
    if isinstance(padding, int):
        padding = [(padding, padding)] * (kernel.ndim - 2)
    strides = layer.strides
    if strides is None or isinstance(strides, int):
        strides = (strides or 1,) * (kernel.ndim - 2)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
