"""The suite layers: one matrix at a time beside the cost model, and its rates."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

import oialr_jax as oialr
from oialr_jax import cost
from oialr_jax.cost import Rates
from oialr_jax.lowrank import Axes, factor
from oialr_jax.transform import with_trainable
from train.bench.settings import Row, Settings, read_rates
from train.bench.steps import of_model
from train.bench.timing import interleaved


@dataclasses.dataclass(frozen=True)
class Layer:
    """One matrix in use: a product of `rows` rows, or a 3x3 convolution."""

    rows: int
    m: int
    n: int
    side: int | None = None
    """Height and width of the image that a convolution sees; none for a product."""

    @property
    def name(self) -> str:
        """As it stands in the table."""
        if self.side is None:
            return f"dot {self.rows}x{self.m}x{self.n}"
        return f"conv 3x3 {self.m // 9}-{self.n} on {self.side}x{self.side}"

    def call(self, params: Any, x: Array) -> Array:
        """x W, or the convolution of x with the kernel W."""
        if self.side is None:
            return x @ params["w"]
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=numbers
        )

    def arrays(self, dtype: Any) -> tuple[Array, Array, Axes]:
        """x, W and its axes."""
        key = jax.random.key(0)
        x: tuple[int, ...] = (self.rows, self.m)
        w: tuple[int, ...] = (self.m, self.n)
        axes = Axes(w, (), (0,), (1,))
        if self.side is not None:
            channels, count = self.m // 9, self.rows // self.side**2
            x = (count, self.side, self.side, channels)
            w = (3, 3, channels, self.n)
            axes = Axes(w, (), (0, 1, 2), (3,))
        return (
            jax.random.normal(key, x, dtype),
            jax.random.normal(key, w, dtype) * self.m**-0.5,
            axes,
        )


LAYERS = (
    Layer(1088, 768, 768),
    Layer(1088, 768, 3072),
    Layer(1088, 3072, 768),
    Layer(64, 1024, 1024),
    Layer(16384, 768, 768),
    Layer(65536, 576, 64, side=32),
    Layer(16384, 1152, 128, side=16),
    Layer(4096, 2304, 256, side=8),
    Layer(1024, 4608, 512, side=4),
)


def layers(settings: Settings) -> list[Row]:
    """Host side: rows of single matrices, forward and backward, with the estimate."""
    rates = read_rates(settings.rates) or cost.RATES.get(jax.default_backend())
    return [row for layer in LAYERS for row in _layer(layer, settings, rates)]


def _layer(layer: Layer, settings: Settings, rates: Rates | None) -> list[Row]:
    dtype = jnp.dtype(settings.dtype)
    x, w, axes = layer.arrays(dtype)

    def pulled(forward: Callable[..., Any], params: Any) -> Callable[[], Any]:
        def step(trained: Any, rest: Any, x: Array) -> Any:
            def use(trained: Any, x: Array) -> Array:
                return forward({"w": with_trainable(rest, trained)}, x)

            y, pullback = jax.vjp(use, trained, x)
            return pullback(y)

        trained = oialr.transform.trainable(params)
        compiled = jax.jit(step).lower(trained, params, x).compile()
        return lambda: jax.block_until_ready(compiled(trained, params, x))

    dense = (1.0, cost.Order.DENSE)
    programs = {dense: pulled(layer.call, w)}
    labels: list[tuple[float, str, cost.Order, cost.Workload]] = []
    full = min(layer.m, layer.n)
    window = 0 if layer.side is None else 9
    for fraction in settings.fractions:
        rank = max(1, int(fraction * full))
        load = cost.Workload(layer.rows, layer.m, layer.n, rank, window=window)
        node = factor(w.astype(jnp.float32), axes, rank)
        node = jax.tree.map(lambda a: a.astype(dtype), node)
        for name in settings.orders:
            order = (
                cost.cheapest(load, rates, dtype.itemsize)
                if name == "auto"
                else cost.Order(name)
            )
            if (fraction, order) not in programs:
                forward = oialr.factored(layer.call, order=order)
                programs[fraction, order] = pulled(forward, node)
            labels.append((fraction, name, order, load))
    times = interleaved(list(programs.values()), settings.repeats)
    each = {key: middle for key, (middle, *_) in zip(programs, times, strict=True)}
    rows = []
    for fraction, name, order, load in labels:
        taken = each[fraction, order]
        row = {
            "model": layer.name,
            "batch": layer.rows,
            "dtype": settings.dtype,
            "rank_fraction": fraction,
            "order": name,
            "picked": order.value,
            "step_ms": 1e3 * taken,
            "ratio_to_dense": taken / each[dense],
            "flops_ratio": cost.flops(order, load).total
            / cost.flops(cost.Order.DENSE, load).total,
            "bytes_ratio": cost.traffic(order, load).total
            / cost.traffic(cost.Order.DENSE, load).total,
            "backend": jax.default_backend(),
        }
        if rates is not None:
            low, base = (
                cost.seconds(x, load, rates, dtype.itemsize)
                for x in (order, cost.Order.DENSE)
            )
            row["estimated_ratio"] = low / base
        rows.append(row)
    return rows


def calibrate(settings: Settings) -> Rates:
    """Host side: the rates of JAX's default device, medians over the rounds."""
    dtype = jnp.dtype(settings.dtype)
    shapes = [layer for layer in LAYERS if layer.side is not None]

    def normal(*shape: int) -> Array:
        return jax.random.normal(jax.random.key(0), shape, dtype)

    def timed(fn: Callable[..., Any], *arrays: Array) -> Callable[[], Any]:
        compiled = jax.jit(fn).lower(*arrays).compile()
        return lambda: jax.block_until_ready(compiled(*arrays))

    def chain(x: Array) -> Array:
        for _ in range(100):
            x = x @ x
        return x

    runs = [
        timed(jnp.matmul, normal(4096, 1024), normal(1024, 1024)),
        timed(lambda x, y: x.T @ y, normal(4096, 512), normal(4096, 512)),
        timed(jnp.matmul, normal(16384, 1024), normal(1024, 8)),
        timed(chain, jnp.eye(8, dtype=dtype)),
    ]
    for layer in shapes:
        x, w, _ = layer.arrays(dtype)

        def conv(x: Array, w: Array, layer: Layer = layer) -> Array:
            return layer.call({"w": w}, x)

        y = conv(x, w)
        runs += [
            timed(conv, x, w),
            timed(lambda y, x, w, f=conv: jax.vjp(f, x, w)[1](y)[0], y, x, w),
            timed(lambda y, x, w, f=conv: jax.vjp(f, x, w)[1](y)[1], y, x, w),
        ]
    dot, kernel, skinny, small, *convolutions = (
        middle for middle, *_ in interleaved(runs, settings.repeats)
    )
    work = [2 * layer.rows * layer.m * layer.n for layer in shapes]
    forward, to_input, to_kernel = (
        sum(work) / sum(convolutions[kind::3]) for kind in range(3)
    )
    return Rates(
        dot=2 * 4096 * 1024 * 1024 / dot,
        dot_kernel=2 * 512 * 4096 * 512 / kernel,
        conv=forward,
        conv_input=to_input,
        conv_kernel=to_kernel,
        bandwidth=dtype.itemsize * (16384 * 1024 + 1024 * 8 + 16384 * 8) / skinny,
        overhead=small / 100,
        conv_merging=_merging_pays(settings),
    )


def _merging_pays(settings: Settings) -> bool:
    """Whether a whole convolutional network is faster merged than as chains."""
    orders = ("chain", "merged")
    options: Any = {"fractions": (1.0,), "orders": orders, "peers": ()}
    rows = of_model("resnet18", dataclasses.replace(settings, **options))
    took = {row["order"]: row["step_ms"] for row in rows}
    return bool(took["merged"] < took["chain"])
