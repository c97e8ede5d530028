"""Public names of oialr_jax: low-rank training of any JAX model."""

from oialr_jax.adaptive import AdaptiveStep, Timing, adaptive
from oialr_jax.cost import Rates
from oialr_jax.explain import Explanation, explain
from oialr_jax.factored import factored
from oialr_jax.lowrank import (
    Axes,
    Counts,
    LowRank,
    counts,
    factor,
    is_low_rank,
    materialize,
    orthogonality_error,
    ranks,
)
from oialr_jax.matrices import Matrix, find_matrices, select
from oialr_jax.moments import MomentRule
from oialr_jax.schedule import RankRule, Schedule
from oialr_jax.surgery import LayerReport, Report, densify, factorize, truncate
from oialr_jax.transform import (
    FreezeBasesState,
    freeze_bases,
    trainable,
    value_and_grad,
    with_trainable,
)

__version__ = "0.1.0"

__all__ = [
    "AdaptiveStep",
    "Axes",
    "Counts",
    "Explanation",
    "FreezeBasesState",
    "LayerReport",
    "LowRank",
    "Matrix",
    "MomentRule",
    "RankRule",
    "Rates",
    "Report",
    "Schedule",
    "Timing",
    "adaptive",
    "counts",
    "densify",
    "explain",
    "factor",
    "factored",
    "factorize",
    "find_matrices",
    "freeze_bases",
    "is_low_rank",
    "materialize",
    "orthogonality_error",
    "ranks",
    "select",
    "trainable",
    "truncate",
    "value_and_grad",
    "with_trainable",
]
