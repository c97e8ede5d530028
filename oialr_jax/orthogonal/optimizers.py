"""Optax: optimizers built on orthogonal gradients, for dense matrices and cores."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oialr_jax.linalg import compute_dtype
from oialr_jax.lowrank import PyTree
from oialr_jax.matrices import Matrix
from oialr_jax.orthogonal.directions import (
    axes_by_name,
    axes_of,
    directions,
    guarded,
    named_map,
)
from oialr_jax.orthogonal.polar import unit
from oialr_jax.orthogonal.transforms import (
    normalize_tensor,
    orthogonalize,
    scale_by_outer_shape,
)


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
