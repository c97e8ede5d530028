"""The polar factor of a matrix, by every method, for stacks of one shape.

Of X = A D Bᵀ it is A Bᵀ. Singular values that are zero stay zero, which makes it
unique: the canonical partial isometry. Input is expected finite, its largest entry one
unless all are zero: `directions.py` sees to that.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oialr_jax.linalg import svd

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

_SHORT = (
    (14.1538, -135.97136, 449.92549, -576.74869, 250.5276),
    (3.4369886, -2.576321, 0.52000612),
    (2.4139675, -1.7688485, 0.42966769),
)
"""The same for few steps: the first has degree nine, which takes one product more. Of
all such they map [`SHORT_FROM`, 1] nearest to 1, to within .17 (`tests/test_polar.py`
finds them anew)."""
SHORT_FROM = 8e-3
EXACT_STEPS = 7
"""Five of the above and two that converge; with fewer steps `_SHORT` is nearer."""

RESOLVED = 1e-3
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
        table = (_MUON,) * (steps or 5)
        by = functools.partial(_by_products, table=table, order=2)
    else:
        count = EXACT_STEPS if steps is None else steps
        best = _POLAR_EXPRESS if count >= EXACT_STEPS else _SHORT
        table = (*best, *(_CLASSIC,) * count)[:count]
        by = functools.partial(_by_products, table=table, order=8)

    def polar(x: Array) -> Array:
        with jax.default_matmul_precision(precision):
            return by(x)

    return polar


def polar(matrix: Float[Array, "*l a c"]) -> Float[Array, "*l a c"]:
    """U Vᵀ of the SVD of a matrix, by `polar_express`, for input of any scale.

    Singular values above `RESOLVED` times the largest become 1, smaller ones less, and
    zeros stay zero: of a matrix that lacks directions this is the partial isometry.
    """
    x = matrix.reshape(-1, *matrix.shape[-2:])
    x = x / or_one(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))
    return polar_by("polar_express")(x).reshape(matrix.shape)


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
    x: Float[Array, "b m n"], *, table: Sequence[Sequence[float]], order: int
) -> Float[Array, "b m n"]:
    """One odd polynomial after the other, of X over its Schatten norm.

    Args:     order: of the norm, 2 or 8. Both are at least the largest singular value;
              of n equal ones 2 is √n times as large and 8 only n^⅛ times, so that
              fewer steps are left to do.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    # Eighth powers of singular values, from 1 to √(mn) at first, stay within float32.
    x = unit(x) if order == 2 else x / (x.shape[-2] * x.shape[-1]) ** 0.25
    first, *rest = table
    x = _step(x, first, shrunk=order == 8)
    if rest:
        rows = jnp.asarray(rest, x.dtype)
        x, _ = jax.lax.scan(lambda x, row: (_step(x, row), None), x, rows)
    return jnp.swapaxes(x, -1, -2) if tall else x


def _step(x: Array, row: Any, *, shrunk: bool = False) -> Array:
    """aX + b(XXᵀ)X + c(XXᵀ)²X + ...; where `shrunk`, of X over its Schatten-8 norm."""
    gram = x @ jnp.swapaxes(x, -1, -2)
    square = gram @ gram
    norm = jnp.ones((len(x), 1, 1), x.dtype)
    if shrunk:  # (Σσ⁸)^⅛, from what the step computes anyway
        fourth = jnp.linalg.norm(square, axis=(-2, -1), keepdims=True)
        norm = or_one((1 + _SAFETY) * jnp.sqrt(jnp.sqrt(fourth)))
    a, b, c, *high = (each / norm ** (2 * i + 1) for i, each in enumerate(row))
    one = jnp.eye(x.shape[-2], dtype=x.dtype)[None]
    if not high:
        return (a * one + b * gram + c * square) @ x
    d, e = high
    return (a * one + b * gram + square @ (c * one + d * gram + e * square)) @ x
