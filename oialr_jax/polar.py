"""The polar factor of a matrix, by every method, for stacks of one shape.

Of X = A D Bᵀ it is A Bᵀ. Singular values that are zero stay zero, which makes it
unique: the canonical partial isometry. Input is expected finite, its largest entry one
unless all are zero: see `directions.py`, which sees to it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from oialr_jax.lowrank import svd

METHODS = ("auto", "svd", "newton_schulz", "polar_express", "qdwh")
LAPACK = ("svd", "qdwh")
"""Methods that call LAPACK on CPUs, know a rank, and can fill the null space."""

# Coefficients (a, b, c) of steps X <- aX + b(XXᵀ)X + c(XXᵀ)²X

_MUON = (3.4445, -4.7750, 2.0315)
"""Jordan 2024: singular values end in [0.68, 1.13] and never converge."""

_POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Amsel et al. 2025: each step the best for what the one before leaves; the values are
those of Dion's authors, who let the norm of the input be 1 / (1 + `_SAFETY`)."""
_SAFETY = 0.02

RESOLVED = 1e-4
"""Part of the largest singular value from which on `polar` makes one of another."""

_CLASSIC = (15 / 8, -10 / 8, 3 / 8)
"""Converges to the polar factor, to third order."""


def polar_by(
    method: str,
    *,
    steps: int | None = None,
    rank_tolerance: float | None = None,
    fill: bool = False,
    precision: str = "highest",
) -> Callable[[Array], Array]:
    """The function (b, m, n) -> (b, m, n) that takes polar factors by this method.

    Args:     as in `orthogonalize`.
    Raises:   ValueError: an unknown method, or an option that the method does not have.

    >>> polar_by("svd")(jnp.array([[[1.0, 0.0], [0.0, -0.1]]])).tolist()
    [[[1.0, 0.0], [0.0, -1.0]]]
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be one of {', '.join(METHODS)}: {method!r}")
    if steps is not None and (method == "svd" or steps < 1):
        raise ValueError(f"`steps` must be at least 1, and svd has none: got {steps}")
    if method not in LAPACK and (fill or rank_tolerance is not None):
        raise ValueError(
            f"`fill` and `rank_tolerance` need svd or qdwh, `method` is {method!r}"
        )
    by: Any
    if method == "svd":
        by = functools.partial(_by_svd, tolerance=rank_tolerance, fill=fill)
    elif method == "qdwh":
        by = functools.partial(
            _by_qdwh, steps=steps or 10, tolerance=rank_tolerance, fill=fill
        )
    elif method == "newton_schulz":
        by = functools.partial(_by_products, table=(_MUON,) * (steps or 5), eps=1e-7)
    else:
        count = steps or 8
        table = (_POLAR_EXPRESS + (_CLASSIC,) * count)[:count]
        by = functools.partial(_by_products, table=table, eps=_SAFETY)

    def polar(x: Array) -> Array:
        with jax.default_matmul_precision(precision):
            return by(x)

    return polar


def polar(matrix: Float[Array, "*l a c"]) -> Float[Array, "*l a c"]:
    """U Vᵀ of the SVD of a matrix, by matrix products alone.

    Singular values above `RESOLVED` times the largest become 1, smaller ones less, and
    zeros stay zero: of a matrix that lacks directions this is the partial isometry.

    Source:   Newton-Schulz, scaled as in Chen and Chow 2014 ("A stable scaling of
              Newton-Schulz"): x -> ρx (3 - ρ²x²) / 2, with ρ² = 3 / (1 + l + l²) for
              singular values in [l, 1], maps both ends to the same value and none
              above 1.
    """
    wide = matrix.shape[-2] < matrix.shape[-1]
    x = jnp.swapaxes(matrix, -1, -2) if wide else matrix
    x = x / or_one(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))
    with jax.default_matmul_precision("highest"):
        gram = jnp.swapaxes(x, -1, -2) @ x
        # (Σσ⁴)^¼ is above the largest σ, by n^¼ at most
        x = x / or_one(jnp.sqrt(jnp.linalg.norm(gram, axis=(-2, -1), keepdims=True)))

        def step(x: Array, rho: Array) -> tuple[Array, None]:
            x = rho.astype(x.dtype) * x
            return 1.5 * x - 0.5 * (x @ (jnp.swapaxes(x, -1, -2) @ x)), None

        lowest = RESOLVED / min(matrix.shape[-2:]) ** 0.25
        x, _ = jax.lax.scan(step, x, jnp.asarray(_scales(lowest)))
    return jnp.swapaxes(x, -1, -2) if wide else x


def _scales(lowest: float) -> list[float]:
    """ρ of each Newton-Schulz step until singular values from `lowest` on are 1."""
    scales = []
    while lowest < 1 - 1e-9:
        bound = max(lowest, 0.1)  # a smaller one maps 1 to about it, by cancellation
        rho = math.sqrt(3 / (1 + bound + bound**2))
        lowest = rho * lowest * (3 - (rho * lowest) ** 2) / 2
        scales.append(rho)
    return scales


def or_one(x: Array) -> Array:
    """Denominators, 1 where they are 0."""
    return jnp.where(x == 0, jnp.ones_like(x), x)


def unit(x: Float[Array, "b m n"]) -> Float[Array, "b m n"]:
    """Each matrix over its Frobenius norm, zero for zero."""
    norm = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    return x / jnp.where(norm > 0, norm, 1)


def _by_svd(
    x: Float[Array, "b m n"], *, tolerance: float | None, fill: bool
) -> Float[Array, "b m n"]:
    u, sigma, vt = svd(x)
    return u @ vt if fill else (u * _kept(sigma, x, tolerance)[..., None, :]) @ vt


def _by_qdwh(
    x: Float[Array, "b m n"], *, steps: int, tolerance: float | None, fill: bool
) -> Float[Array, "b m n"]:
    """X = QH of a tall X; the null space of H is taken out of Q."""

    def one(matrix: Array) -> Array:
        q, h, _, _ = jax.lax.linalg.qdwh(matrix, max_iterations=steps)
        if fill:
            return q
        v, sigma = jax.lax.linalg.eigh(h)
        return (q @ (v * _kept(sigma, x, tolerance)[None, :])) @ v.T

    if x.shape[-2] >= x.shape[-1]:
        return jax.lax.map(one, x)
    return jnp.swapaxes(jax.lax.map(one, jnp.swapaxes(x, -1, -2)), -1, -2)


def _kept(sigma: Array, x: Array, tolerance: float | None) -> Array:
    """One for each singular value that counts as more than zero, zero for the others.

    The default tolerance is that of numpy's `matrix_rank`.
    """
    if tolerance is None:
        tolerance = max(x.shape[-2:]) * float(jnp.finfo(x.dtype).eps)
    largest = jnp.max(sigma, axis=-1, keepdims=True)
    return (sigma > tolerance * largest).astype(sigma.dtype)


def _by_products(
    x: Float[Array, "b m n"], *, table: tuple[tuple[float, ...], ...], eps: float
) -> Float[Array, "b m n"]:
    """Optax has the iteration inside Muon, which without momentum is nothing else."""
    muon = optax.contrib.scale_by_muon(
        table,  # one row per step: Optax then scans, faster on CPUs than unrolled
        len(table),
        beta=0.0,
        nesterov=False,
        eps=eps,  # is added to the norm, which is one
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2),
    )
    return muon.update(unit(x), muon.init(x))[0]
