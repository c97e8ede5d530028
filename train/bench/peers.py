"""Other ways to train with less: GaLore, LoRA, and the authors' scheme in PyTorch."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array

from train import names
from train.bench import problem as problems
from train.bench.problem import Problem, Program, State
from train.models.vit import VisionTransformer


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


class TorchViT:
    """A training step of the vision transformer in PyTorch, in the authors' scheme.

    The matrices named by `ranks` are U S Vᵀ with a trained S and are rebuilt in every
    forward pass, as the authors' layers do; the others are dense. AdamW, float32.

    Raises:   ValueError: PyTorch is not installed.
    """

    temp_bytes = None

    def __init__(
        self, model: VisionTransformer, ranks: Mapping[str, int], image: Any, label: Any
    ) -> None:
        """The model with random weights, and one batch."""
        try:
            import torch
        except ImportError:
            raise ValueError(
                'PyTorch is not installed: python -m pip install -e ".[peers]"'
            ) from None
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.manual_seed(0)
        self.module = _transformer(torch, model, ranks, image.shape)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=3e-4)
        self.batch = (
            torch.from_numpy(np.array(image)),
            torch.from_numpy(np.array(label)).long(),
        )
        self.loss = torch.nn.functional.cross_entropy

    def run(self) -> None:
        """Host side: one step."""
        image, label = self.batch
        loss = self.loss(self.module(image), label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if not np.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} in a benchmark")

    @property
    def state_bytes(self) -> int:
        """Memory of the optimizer's state: two moments of what is trained."""
        return sum(2 * 4 * x.numel() for x in self.module.parameters())


def _transformer(
    torch: Any, model: VisionTransformer, ranks: Mapping[str, int], shape: Any
) -> Any:
    """The module; images are of this shape."""
    nn, functional = torch.nn, torch.nn.functional
    width, heads = model.width, model.heads
    hidden = int(width * model.mlp_ratio)

    def basis(side: int, rank: int) -> Any:
        return torch.linalg.qr(torch.randn(side, rank))[0]

    class Linear(nn.Module):
        def __init__(self, m: int, n: int, name: str, bias: bool = True) -> None:
            super().__init__()
            rank = ranks.get(f"{name}/kernel")
            self.bias = nn.Parameter(torch.zeros(n)) if bias else None
            if rank is None:
                self.weight = nn.Parameter(0.02 * torch.randn(n, m))
                return
            self.weight = None
            self.core = nn.Parameter(0.5 * torch.eye(rank))
            self.register_buffer("u", basis(n, rank))
            self.register_buffer("v", basis(m, rank))

        def forward(self, x: Any) -> Any:
            weight = self.weight
            if weight is None:
                weight = torch.linalg.multi_dot([self.u, self.core, self.v.T])
            return functional.linear(x, weight, self.bias)

    class Block(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.norm1 = nn.LayerNorm(width, eps=1e-6)
            self.norm2 = nn.LayerNorm(width, eps=1e-6)
            bias = model.qkv_bias
            self.qkv = Linear(width, 3 * width, f"{name}/attention_in", bias)
            self.out = Linear(width, width, f"{name}/attention_out")
            self.mlp_in = Linear(width, hidden, f"{name}/mlp_in")
            self.mlp_out = Linear(hidden, width, f"{name}/mlp_out")

        def forward(self, x: Any) -> Any:
            b, t, _ = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(b, t, 3, heads, -1)
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(query, key, value)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
            y = functional.gelu(self.mlp_in(self.norm2(x)))
            return x + self.mlp_out(y)

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            size = model.patch**2 * shape[-1]
            self.patch = Linear(size, width, "patch")
            self.token = nn.Parameter(torch.zeros(1, 1, width))
            tokens = shape[1] * shape[2] // model.patch**2 + 1
            self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
            self.blocks = nn.Sequential(
                *(Block(f"block{i}") for i in range(model.depth))
            )
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.head = Linear(width, model.classes, "head")

        def forward(self, x: Any) -> Any:
            b, h, w, c = x.shape
            p = model.patch
            x = x.reshape(b, h // p, p, w // p, p, c).permute(0, 1, 3, 2, 4, 5)
            x = self.patch(x.reshape(b, -1, p * p * c))
            x = torch.cat([self.token.expand(b, -1, -1), x], 1) + self.position
            return self.head(self.norm(self.blocks(x))[:, 0])

    return Transformer()


def _galore(problem: Problem, fraction: float) -> Program:
    """The dense model under Optax's GaLore, its one rank that of the median layer."""
    ranks = sorted(problem.ranks(fraction).values())
    tx = optax.contrib.galore(
        3e-4,
        rank=ranks[len(ranks) // 2],
        update_proj_gap=200,
        base_optimizer=optax.scale_by_adam(),
        weight_decay=1e-4,
    )
    holder = {"state": problem.state(problem.params, tx)}
    step = problem.train_step(problem.forward)
    return Program(step, holder, problem.image, problem.label)


def _lora(problem: Problem, fraction: float) -> Program:
    """The dense model, frozen, with trained adapters of the same ranks."""
    pairs = adapters(problem.params, problem.ranks(fraction), jax.random.key(1))
    base = problem.params

    def forward(pairs: Any, rest: Any, image: Array) -> Any:
        base, rest = rest["base"], rest["rest"]
        apply = lora(problem.forward, pairs)
        out, rest = apply(base, rest, image)
        return out, {"base": base, "rest": rest}

    params, rest = jax.tree.map(
        jnp.array, (pairs, {"base": base, "rest": problem.rest})
    )
    tx = problem.optimizer
    state = State.create(apply_fn=None, params=params, tx=tx, rest=rest)
    step = problem.train_step(forward)
    return Program(step, {"state": state}, problem.image, problem.label)


def compares(peer: str, name: str) -> bool:
    """Whether the peer has this model: PyTorch has the vision transformers."""
    model, _ = names.find("model", name, problems.CASES)
    return not peer.startswith("torch") or isinstance(model, VisionTransformer)


def _torch(problem: Problem, ranks: Mapping[str, int]) -> Any:
    return TorchViT(problem.model, ranks, problem.image, problem.label)


PEERS: Mapping[str, Callable[[Problem, float], Any]] = {
    "galore": _galore,
    "lora": _lora,
    "torch": lambda problem, fraction: _torch(problem, problem.ranks(fraction)),
    "torch-dense": lambda problem, fraction: _torch(problem, {}),
}
