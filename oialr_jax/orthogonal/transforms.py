"""Optax: gradients made orthogonal, and the controls; cores included.

Every matrix of the gradient is replaced by a direction that does not depend on its
scale: its polar factor (`orthogonalize`), or, as controls, the matrix over a norm. The
gradient of a core is S = UᵀGV, and U polar(S) Vᵀ is the polar factor of the projected
gradient UUᵀGVVᵀ. So on a core the same transformation is steepest descent in the
spectral norm of W, within its bases.
"""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from oialr_jax.matrices import Matrix
from oialr_jax.orthogonal.directions import (
    axes_by_name,
    axes_of,
    directions,
    named_map,
    stateless,
)
from oialr_jax.orthogonal.polar import LAPACK, polar_by


def orthogonalize(
    method: str = "auto",
    *,
    matrices: Iterable[Matrix] | None = None,
    steps: int | None = None,
    rank_tolerance: float | None = None,
    fill: bool = False,
    precision: str = "highest",
) -> optax.GradientTransformation:
    """Every matrix G = A D Bᵀ of the updates becomes its polar factor A Bᵀ; no state.

    Singular values that are zero stay zero (the canonical partial isometry), so zero
    gradients give zero. A matrix that is not finite is passed on as it is and disturbs
    no other. Matrices of one shape are stacked into one batched computation.

    svd            exact. On CPUs the calls of one update run one after the other.
    qdwh           exact, QR and Cholesky instead of an SVD; then an eigendecomposition
                   finds the null space, unless `fill`.
    polar_express  products alone. Seven steps are exact to 1e-5 up to condition 1e3.
                   Three, with half as many products, come within a sixth up to 1e2:
                   nearer than newton_schulz, for less. Null directions of rounding
                   noise end at 1e-3.
    newton_schulz  products alone, Muon's coefficients: within a third of exact.
    auto           polar_express: no LAPACK call inside a compiled step.

    Args:     matrices: of `find_matrices` or `select`; exactly these leaves, by their
              axes, as dense arrays or as cores. Grouped convolutions among them are
              left alone. By default every leaf of two or more axes, the last of which
              is the outputs, as Flax has it; stacks of matrices need `matrices`.
              steps: iterations of all methods but svd; 7, 5 for newton_schulz, at most
              10 for qdwh.
              rank_tolerance: of svd and qdwh; singular values up to this part of the
              largest count as zero. By default max(m, n) times machine epsilon.
              fill: of svd and qdwh; null directions get arbitrary unit vectors, as in
              the paper, where every singular value becomes one.
              precision: of matrix products; less than "highest" is faster on devices
              with tensor cores.
    Raises:   ValueError: an unknown method, or an option that the method does not have;
              at init, a matrix that no leaf of the params is.
    Source:   Tuddenham, Prügel-Bennett and Hare (2022), whose code is svd with `fill`.

    >>> tx = orthogonalize("svd")
    >>> g = {"w": jnp.array([[3.0, 0.0], [0.0, -0.1]]), "b": jnp.array([2.0])}
    >>> {name: x.tolist() for name, x in tx.update(g, tx.init(g))[0].items()}
    {'b': [2.0], 'w': [[1.0, 0.0], [0.0, -1.0]]}
    """
    polar = polar_by(
        method,
        steps=steps,
        rank_tolerance=rank_tolerance,
        fill=fill,
        precision=precision,
    )
    return directions(polar, matrices, in_order=method in LAPACK)


def normalize_tensor(
    *, matrices: Iterable[Matrix] | None = None, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Every matrix over its Frobenius norm: normalised SGD, a control of the paper.

    Args:     matrices: as in `orthogonalize`.
              eps: added to the norm, relative to the largest entry.
    """

    def direction(x: Array) -> Array:
        return x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + eps)

    return directions(direction, matrices)


def normalize_components(
    *, matrices: Iterable[Matrix] | None = None, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Every filter (column) of every matrix over its norm: the fair control.

    Where there are no more outputs than inputs its steps have the norm of orthogonal
    ones, per filter and in all. On a core it depends on the basis.

    Args:     as in `normalize_tensor`; the paper's code has no eps, so that there a
              filter without gradient gives NaN.
    """

    def direction(x: Array) -> Array:
        return x / (jnp.linalg.norm(x, axis=-2, keepdims=True) + eps)

    return directions(direction, matrices)


def scale_by_outer_shape(
    matrices: Iterable[Matrix], *, rms: float | None = None
) -> optax.GradientTransformation:
    """Scales orthogonal updates by the shape (m, n) of W, also those of its core.

    By sqrt(max(1, n/m)), Muon's factor; or, with `rms`, such that the entries of the
    step of W have this root mean square: rms * sqrt(mn/k), k being the rank of the core
    or the small side of a dense matrix. The second grows as the rank falls.

    Source:   Jordan (2024); Liu et al. (2025) for full rank, sqrt(max(m, n)) there.
    """
    known = axes_by_name(matrices) or {}

    def scaled(name: str, leaf: Any) -> Any:
        axes = axes_of(name, leaf, known)
        if axes is None:
            return leaf
        m, n = known[name].m, known[name].n
        factor = max(1, n / m) ** 0.5
        if rms is not None:
            factor = rms * (m * n / min(axes.m, axes.n)) ** 0.5
        return leaf * jnp.asarray(factor, leaf.dtype)

    return stateless(lambda updates: named_map(scaled, updates), known)


def scale_by_core_rank(
    matrices: Iterable[Matrix], *, most: float | None = None
) -> optax.GradientTransformation:
    """Scales Adam-like updates of cores: a step of W as large as that of a dense W.

    By sqrt(mn)/r. An update of a core whose r² entries are about one moves W = U S Vᵀ
    by a root mean square of r/sqrt(mn); that of a dense W moves it by one. Dense leaves
    stay as they are, and so does the rate: it is chosen for the dense network.

    Args:     most: bounds the factor, which is large at small ranks.
    """
    known = axes_by_name(matrices) or {}

    def scaled(name: str, leaf: Any) -> Any:
        axes = axes_of(name, leaf, known)
        if axes is None or axes.shape == known[name].shape:
            return leaf
        factor = (known[name].m * known[name].n) ** 0.5 / axes.m
        factor = factor if most is None else min(factor, most)
        return leaf * jnp.asarray(factor, leaf.dtype)

    return stateless(lambda updates: named_map(scaled, updates), known)
