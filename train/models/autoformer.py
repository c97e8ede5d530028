"""The forecasting transformer of the paper, to be held in low rank: plain Flax."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from train.models.initializers import symmetric_uniform
from train.models.vit import gelu

UNIFORM = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""±fan_in^(-1/2): torch's kernels."""
Dense = functools.partial(nn.Dense, use_bias=False, kernel_init=UNIFORM)
Conv = functools.partial(nn.Conv, kernel_size=(3,), padding="CIRCULAR", use_bias=False)


class Autoformer(nn.Module):
    """The next `horizon` rows of several series, from their last rows.

    Seasonal and trend parts are taken apart all the way; attention is replaced by
    auto-correlation. The defaults are the authors'; with seven series and five time
    marks (data every 15 minutes) there are 10,536,967 weights, with four 10,535,943.
    Dropout, where `train` is True, needs a key called `dropout`.

    Shapes:   values: (b, t, c), standardised; marks: (b, t + horizon, f), of the given
              rows and those to come; forecast: (b, horizon, c), float32 whatever
              `dtype`.
    Args:     label: how many given rows the decoder begins with, even `horizon` aside.
              window: rows of the moving average, odd. factor: of the number of delays.
              dtype: of the products; decomposition, correlation and the parameters
              are float32. remat: layers are computed again in the backward pass.
    Source:   Wu et al. 2021 and their code, with its peculiarities: no positions; the
              number of heads has no effect; no mask; no dropout of the correlation.
    """

    horizon: int
    label: int = 48
    width: int = 512
    hidden: int = 2048
    encoder_layers: int = 2
    decoder_layers: int = 1
    window: int = 25
    factor: float = 1.0
    dropout: float = 0.05
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        values: Float[Array, "b t c"],
        marks: Float[Array, "b rows f"],
        train: bool = False,
    ) -> Float[Array, "b horizon c"]:
        """Forecasts of a batch."""
        _, rows, series = values.shape
        if marks.shape[1] != rows + self.horizon:
            raise ValueError(
                f"`marks` must have {rows} + {self.horizon} rows, got {marks.shape[1]}"
            )
        if not 0 < self.label <= rows:
            raise ValueError(f"`label` must be in [1, {rows}], got {self.label}")
        seasonal, trend = decompose(values, self.window)
        mean = jnp.mean(values, axis=1, keepdims=True)
        trend = jnp.concatenate(
            [trend[:, -self.label :], jnp.repeat(mean, self.horizon, axis=1)], axis=1
        )
        ahead = ((0, 0), (0, self.horizon), (0, 0))
        seasonal = jnp.pad(seasonal[:, -self.label :], ahead)
        layer = functools.partial(
            nn.remat(Layer) if self.remat else Layer,
            self.hidden,
            self.window,
            self.factor,
            self.dropout,
            train,
            self.dtype,
        )
        x = self.embedding(values, marks[:, :rows], train, "encoder")
        for i in range(self.encoder_layers):
            x, _ = layer(name=f"encoder{i}")(x)
        memory = SeasonalNorm(self.dtype, name="encoder_norm")(x)
        x = self.embedding(seasonal, marks[:, rows - self.label :], train, "decoder")
        for i in range(self.decoder_layers):
            x, removed = layer(name=f"decoder{i}")(x, memory)
            trend = trend + Conv(
                series, kernel_init=UNIFORM, dtype=self.dtype, name=f"trend{i}"
            )(removed).astype(jnp.float32)
        x = SeasonalNorm(self.dtype, name="decoder_norm")(x)
        seasonal = Dense(
            series,
            use_bias=True,
            bias_init=symmetric_uniform(self.width),
            dtype=jnp.float32,
            name="head",
        )(x)
        return (trend + seasonal)[:, -self.horizon :]

    def embedding(
        self,
        values: Float[Array, "b t c"],
        marks: Float[Array, "b t f"],
        train: bool,
        name: str,
    ) -> Float[Array, "b t d"]:
        """A convolution of the values plus a linear map of the time marks."""
        kaiming = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        x = Conv(
            self.width, kernel_init=kaiming, dtype=self.dtype, name=f"{name}_values"
        )(values)
        x = x + Dense(self.width, dtype=self.dtype, name=f"{name}_marks")(marks)
        return nn.Dropout(self.dropout, deterministic=not train)(x)


class Layer(nn.Module):
    """Rows after auto-correlation and a perceptron, and the trends taken out of them.

    With a `memory` it is a decoder layer, which correlates with it in between; the
    trends are the sum of what its decompositions took out.
    """

    hidden: int
    window: int
    factor: float
    dropout: float
    train: bool
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], memory: Float[Array, "b s d"] | None = None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
        """Seasonal part and sum of trends."""
        trends = []
        drop = nn.Dropout(self.dropout, deterministic=not self.train)

        def seasonal(x: Array) -> Array:
            x, trend = decompose(x, self.window)
            trends.append(trend)
            return x

        x = seasonal(x + drop(self.correlation(x, x, "self")))
        if memory is not None:
            x = seasonal(x + drop(self.correlation(x, memory, "cross")))
        y = gelu(Dense(self.hidden, dtype=self.dtype, name="mlp_in")(x))
        y = Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(drop(y))
        x = seasonal(x + drop(y))
        return x, sum(trends[1:], start=trends[0])

    def correlation(
        self, x: Float[Array, "b t d"], memory: Float[Array, "b s d"], name: str
    ) -> Float[Array, "b t d"]:
        """Rolled values of the memory, between four linear maps with biases."""
        width = x.shape[-1]

        def linear(part: str, x: Array) -> Array:
            return Dense(
                width,
                use_bias=True,
                bias_init=symmetric_uniform(width),
                dtype=self.dtype,
                name=f"{name}_{part}",
            )(x)

        query, key, value = (
            linear("query", x),
            linear("key", memory),
            linear("value", memory),
        )
        y = correlate(query, key, value, factor=self.factor, shared=self.train)
        return linear("out", y)


class SeasonalNorm(nn.Module):
    """LayerNorm over channels, less its mean over time."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Normalised rows of mean zero over time."""
        x = nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name="norm")(x)
        return x - jnp.mean(x, axis=1, keepdims=True)


def decompose(
    x: Float[Array, "b t d"], window: int
) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
    """Seasonal part and trend, the moving average with the edges repeated."""
    if window % 2 == 0:
        raise ValueError(f"`window` must be odd, got {window}")
    pad = ((0, 0), (window // 2, window // 2), (0, 0))
    padded = jnp.pad(x.astype(jnp.float32), pad, mode="edge")
    trend = nn.avg_pool(padded, (window,)).astype(x.dtype)
    return x - trend, trend


def correlate(
    query: Float[Array, "b t d"],
    key: Float[Array, "b s d"],
    value: Float[Array, "b s d"],
    *,
    factor: float,
    shared: bool,
) -> Float[Array, "b t d"]:
    """Σ_i w_i roll(value, -τ_i): each row from its likes, whole delays away.

    R(τ) is the mean over channels of the circular correlation Σ_t query(t + τ) key(t).
    Of its int(factor ln t) largest the delays τ are taken and w = softmax R(τ). Keys
    and values are cut, or filled up by zeros, to the length of the queries. No gradient
    passes through the choice of delays.

    Args:     shared: all of the batch take the delays that are largest in the mean
              over it, as in training; else each takes its own.
    Source:   Wu et al. 2021, equations 5 to 7 and their code. The mean over channels is
              taken before the inverse transform, which is linear: one transform back
              for each series of the batch, not one for each channel. The sum of rolled
              values is a correlation too, with the weights at their delays: no loop.
    """
    length = query.shape[1]
    ahead = ((0, 0), (0, max(0, length - key.shape[1])), (0, 0))
    key, value = (jnp.pad(x[:, :length], ahead) for x in (key, value))
    query_f, key_f = (jnp.fft.rfft(x.astype(jnp.float32), axis=1) for x in (query, key))
    spectrum = jnp.mean(query_f * jnp.conj(key_f), axis=-1)
    curve = jnp.fft.irfft(spectrum, n=length, axis=1)  # (b, t)
    count = int(factor * math.log(length))
    ranked = jnp.mean(curve, axis=0, keepdims=True) if shared else curve
    _, delays = jax.lax.top_k(jax.lax.stop_gradient(ranked), count)  # (1 or b, count)
    rows = jnp.broadcast_to(delays, (curve.shape[0], count))
    # vmap, as take_along_axis asks for the number of rows, which an export has not
    weights = nn.softmax(jax.vmap(lambda x, at: x[at])(curve, rows))
    parts = jax.vmap(lambda at, x: jnp.zeros(length, x.dtype).at[at].set(x))(
        rows, weights
    )
    value_f = jnp.fft.rfft(value.astype(jnp.float32), axis=1)
    parts_f = jnp.conj(jnp.fft.rfft(parts, axis=1))[..., None]
    return jnp.fft.irfft(value_f * parts_f, n=length, axis=1).astype(value.dtype)
