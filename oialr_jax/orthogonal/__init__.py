"""Orthogonal gradients: Optax transformations, and the optimizers built on them."""

from oialr_jax.orthogonal.optimizers import (
    core_muon,
    orthogonal_sgd,
    spectral_trust_region,
    swan,
)
from oialr_jax.orthogonal.transforms import (
    normalize_components,
    normalize_tensor,
    orthogonalize,
    scale_by_core_rank,
    scale_by_outer_shape,
)

__all__ = [
    "core_muon",
    "normalize_components",
    "normalize_tensor",
    "orthogonal_sgd",
    "orthogonalize",
    "scale_by_core_rank",
    "scale_by_outer_shape",
    "spectral_trust_region",
    "swan",
]
