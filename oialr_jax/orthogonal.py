"""Optax: gradients made orthogonal, and the optimizers built on it, cores included.

Every matrix of the gradient is replaced by a direction that does not depend on its
scale: its polar factor (`orthogonalize`), or, as controls, the matrix over a norm. The
gradient of a core is S = UᵀGV, and U polar(S) Vᵀ is the polar factor of the projected
gradient UUᵀGVVᵀ. So on a core the same transformation is steepest descent in the
spectral norm of W, within its bases.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oialr_jax.directions import (
    axes_by_name,
    axes_of,
    directions,
    guarded,
    named_map,
    stateless,
)
from oialr_jax.linalg import compute_dtype
from oialr_jax.lowrank import PyTree
from oialr_jax.matrices import Matrix
from oialr_jax.polar import LAPACK, polar_by, unit


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
    >>> jax.tree.map(lambda x: x.tolist(), tx.update(g, tx.init(g))[0])
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


# Recipes


def orthogonal_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: float | None = 0.9,
    weight_decay: float = 0.0,
    method: str = "auto",
    matrices: Iterable[Matrix] | None = None,
    **options: Any,
) -> optax.GradientTransformation:
    """Orthogonal gradients, then SGD: coupled L2 decay of every leaf, then momentum.

    Args:     matrices, options: as in `orthogonalize`. Other leaves get plain SGD.
    Source:   Tuddenham, Prügel-Bennett and Hare (2022): rate 1e-2, decay 5e-4.
    """
    return optax.chain(
        orthogonalize(method, matrices=matrices, **options),
        optax.add_decayed_weights(weight_decay),
        optax.identity() if momentum is None else optax.trace(momentum),
        optax.scale_by_learning_rate(learning_rate),
    )


def swan(
    learning_rate: optax.ScalarOrSchedule,
    matrices: Iterable[Matrix],
    *,
    rms: float | None = 1.0,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    adam: optax.GradientTransformation | None = None,
    method: str = "auto",
    **options: Any,
) -> optax.GradientTransformation:
    """Normalised, whitened gradients without any state; Adam for all other leaves.

    The gradient of each output loses its mean over the inputs and is divided by its
    deviation; the matrix of these is replaced by its polar factor, which is what
    whitening, (GGᵀ)^(-1/2) G, is. On a core the first part depends on the basis.

    Args:     matrices: those without embeddings and head. options: of `orthogonalize`.
              rms: of the entries of a step over the learning rate, that of the
              normalised gradient; None for the polar factor as it is.
              eps: of the deviation, relative to the largest entry.
              weight_decay: decoupled, of the matrices.
              adam: for the other leaves, `optax.adam(learning_rate)` by default.
    Source:   Ma, Gong, Scetbon and Meeds (2025), who take the inverse root by a coupled
              Newton-Schulz iteration, which squares the condition number.
    """
    matrices = tuple(matrices)

    def normalized(x: Array) -> Array:
        x = x - jnp.mean(x, axis=-2, keepdims=True)
        return x / (jnp.std(x, axis=-2, keepdims=True) + eps)

    scale = scale_by_outer_shape(matrices, rms=rms) if rms else optax.identity()
    whitened = optax.chain(
        directions(normalized, matrices),
        orthogonalize(method, matrices=matrices, **options),
        scale,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _split(whitened, adam or optax.adam(learning_rate), matrices)


def spectral_trust_region(
    learning_rate: optax.ScalarOrSchedule,
    *,
    norm: str = "spectral",
    averaging: float = 0.1,
    weight_decay: float = 0.0,
    matrices: Iterable[Matrix] | None = None,
    method: str = "auto",
    **options: Any,
) -> optax.GradientTransformation:
    """Averages gradients, then goes to the far end of a ball around the weights.

    m <- (1-a) m + a g from m = g at first; each step W minimises <m, W> over a ball of
    radius `learning_rate` in the norm: spectral moves by the polar factor, frobenius by
    the matrix over its norm, max by signs. Leaves that are no matrices have the
    Euclidean ball (max: signs). The ball's centre is (1 - rate * weight_decay) W, which
    keeps ||W|| <= max(||W at first||, 1 / weight_decay) while rate * decay <= 1.

    Args:     averaging: a. matrices, method, options: as in `orthogonalize`.
    Raises:   ValueError: an unknown norm; options with another norm than spectral.
    Source:   Kovalev (2025), algorithms 1 and 2, one ball for each matrix.
    """
    if norm not in ("spectral", "frobenius", "max"):
        raise ValueError(f"`norm` must be spectral, frobenius or max, got {norm!r}")
    if norm != "spectral" and (options or method != "auto"):
        raise ValueError(f"`method` and its options need norm spectral, got {norm!r}")
    matrices = None if matrices is None else tuple(matrices)
    known = axes_by_name(matrices)

    def others(tree: PyTree) -> PyTree:
        return named_map(lambda name, leaf: axes_of(name, leaf, known) is None, tree)

    if norm == "max":
        ball = optax.scale_by_sign()
    elif norm == "frobenius":
        ball = normalize_tensor(matrices=matrices)
    else:
        ball = orthogonalize(method, matrices=matrices, **options)
    euclidean = optax.masked(_euclidean(), others)
    return optax.chain(
        _average(averaging),
        ball,
        optax.identity() if norm == "max" else euclidean,
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def core_muon(
    learning_rate: optax.ScalarOrSchedule,
    matrices: Iterable[Matrix],
    *,
    rms: float | None = None,
    beta: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    adam: optax.GradientTransformation | None = None,
    precision: str = "highest",
    **options: Any,
) -> optax.GradientTransformation:
    """Optax's Muon on these matrices, dense or cores; Adam for all other leaves.

    Which leaf is a matrix is known by name, so a convolution stays with Muon when it is
    converted (`optax.contrib.muon` takes leaves of two axes); and the step of a core is
    scaled by the shape of its W, see `scale_by_outer_shape`.

    Args:     matrices: those without embeddings and head. rms: None for Muon's own
              scale, 0.2 for steps as large as Adam's. weight_decay: decoupled, of the
              matrices. adam: for the other leaves, `optax.adam(learning_rate)` by
              default. options: of `optax.contrib.scale_by_muon`.
    Source:   Jordan (2024); Optax.
    """
    matrices = tuple(matrices)
    known = axes_by_name(matrices)

    def numbers(name: str, leaf: Array) -> Any:
        axes = axes_of(name, leaf, known)
        return axes and optax.contrib.MuonDimensionNumbers(axes.inputs, axes.outputs)

    muon = optax.contrib.scale_by_muon(
        beta=beta,
        nesterov=nesterov,
        weight_dimension_numbers=functools.partial(named_map, numbers),
        **{"eps": 1e-20, **options},  # absolute in Optax, where small gradients shrink
    )

    def update(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(precision):
            return muon.update(*args, **kwargs)

    chain = optax.chain(
        optax.GradientTransformation(muon.init, update),
        scale_by_outer_shape(matrices, rms=rms),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return _split(chain, adam or optax.adam(learning_rate), matrices)


# Parts


def _euclidean() -> optax.GradientTransformation:
    """Every leaf over its norm."""

    def turned(leaf: Array, _: Any) -> Array:
        column = leaf.reshape(1, -1, 1).astype(compute_dtype(leaf.dtype))
        return guarded(unit, column)[0].reshape(leaf.shape).astype(leaf.dtype)

    return optax.stateless_with_tree_map(turned)


def _average(a: float) -> optax.GradientTransformation:
    """m <- (1-a) m + a g, from m = g at first; the state is that of `optax.ema`."""
    if not 0 < a <= 1:
        raise ValueError(f"`averaging` must be in (0, 1], got {a}")
    zeros = optax.ema(1 - a, debias=False)

    def update(
        updates: PyTree, state: optax.EmaState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmaState]:
        first = state.count == 0
        ema = jax.tree.map(lambda m, g: jnp.where(first, g, m), state.ema, updates)
        return zeros.update(updates, state._replace(ema=ema), params)

    return optax.GradientTransformation(zeros.init, update)


def _split(
    of_matrices: optax.GradientTransformation,
    of_others: optax.GradientTransformation,
    matrices: Iterable[Matrix],
) -> optax.GradientTransformation:
    """One transformation for these leaves, by name, and another for all others."""
    known = axes_by_name(matrices) or {}

    def labels(tree: PyTree) -> PyTree:
        return named_map(lambda name, _: ("other", "matrix")[name in known], tree)

    return optax.partition({"matrix": of_matrices, "other": of_others}, labels)
