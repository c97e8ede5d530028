"""Public names of oialr_jax: low-rank training of any JAX model."""

from oialr_jax.adapters import Adapters, FrozenBase, adapters, attached, on_base, raised
from oialr_jax.adaptive import AdaptiveStep, Timing, adaptive
from oialr_jax.checkpoint import Checkpoints, Restored
from oialr_jax.compression import Cut, compress
from oialr_jax.cost import Rates
from oialr_jax.curvature import Statistics, curvature, of_outputs
from oialr_jax.explain import Explanation, explain
from oialr_jax.export import Exported, export, load, merge
from oialr_jax.factored import factored
from oialr_jax.following import rebase
from oialr_jax.forms import Adapted, Frozen, Identity, TwoFactors
from oialr_jax.linalg import orthogonality_error
from oialr_jax.lowrank import (
    Axes,
    Counts,
    LowRank,
    counts,
    factor,
    global_norm,
    is_low_rank,
    materialize,
    ranks,
    without_identity,
)
from oialr_jax.matrices import Matrices, Matrix, Skipped, find_matrices, select
from oialr_jax.moments import MomentRule
from oialr_jax.orthogonal import (
    core_muon,
    normalize_components,
    normalize_tensor,
    orthogonal_sgd,
    orthogonalize,
    scale_by_outer_shape,
    spectral_trust_region,
    swan,
)
from oialr_jax.projection import project
from oialr_jax.reports import LayerReport, Report
from oialr_jax.schedule import RankRule, Schedule
from oialr_jax.serialization import register
from oialr_jax.sharding import Layout, Rules, make_mesh
from oialr_jax.stability import (
    Portrait,
    Spectrum,
    Stability,
    Subspaces,
    Tracker,
    spectra,
    stability,
    subspaces,
    tracker,
)
from oialr_jax.surgery import densify, factorize, truncate
from oialr_jax.training import Training, TrainingState, training
from oialr_jax.transform import (
    FreezeBasesState,
    freeze_bases,
    trainable,
    value_and_grad,
    value_and_grad_from_state,
    with_trainable,
)
from oialr_jax.versions import warn_of_faults as _warn_of_faults
from oialr_jax.wrapping import wrap

register()

__version__ = "0.1.0"

__all__ = [
    "Adapted",
    "Adapters",
    "AdaptiveStep",
    "Axes",
    "Checkpoints",
    "Counts",
    "Cut",
    "Explanation",
    "Exported",
    "FreezeBasesState",
    "Frozen",
    "FrozenBase",
    "Identity",
    "LayerReport",
    "Layout",
    "LowRank",
    "Matrices",
    "Matrix",
    "MomentRule",
    "Portrait",
    "RankRule",
    "Rates",
    "Report",
    "Restored",
    "Rules",
    "Schedule",
    "Skipped",
    "Spectrum",
    "Stability",
    "Statistics",
    "Subspaces",
    "Timing",
    "Tracker",
    "Training",
    "TrainingState",
    "TwoFactors",
    "adapters",
    "adaptive",
    "attached",
    "compress",
    "core_muon",
    "counts",
    "curvature",
    "densify",
    "explain",
    "export",
    "factor",
    "factored",
    "factorize",
    "find_matrices",
    "freeze_bases",
    "global_norm",
    "is_low_rank",
    "load",
    "make_mesh",
    "materialize",
    "merge",
    "normalize_components",
    "normalize_tensor",
    "of_outputs",
    "on_base",
    "orthogonal_sgd",
    "orthogonality_error",
    "orthogonalize",
    "project",
    "raised",
    "ranks",
    "rebase",
    "scale_by_outer_shape",
    "select",
    "spectra",
    "spectral_trust_region",
    "stability",
    "subspaces",
    "swan",
    "tracker",
    "trainable",
    "training",
    "truncate",
    "value_and_grad",
    "value_and_grad_from_state",
    "with_trainable",
    "without_identity",
    "wrap",
]

_warn_of_faults()
