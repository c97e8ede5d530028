"""Public names of oialr_jax: low-rank training of any JAX model.

What is needed to train, to convert and to measure stands here; orthogonal gradients,
the stability of bases, meshes and Flax NNX have namespaces of their own, and results
and helpers their rooms, such as `oialr_jax.reports`.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from oialr_jax import nnx, orthogonal, sharding, stability
from oialr_jax.adapters import FrozenBase, adapters
from oialr_jax.adaptive import adaptive
from oialr_jax.checkpoint import Checkpoints
from oialr_jax.compression import compress
from oialr_jax.curvature import curvature
from oialr_jax.explain import explain
from oialr_jax.export import export, load, merge
from oialr_jax.factored import factored
from oialr_jax.lowrank import LowRank, counts, materialize, ranks
from oialr_jax.matrices import find_matrices, select
from oialr_jax.moments import MomentRule
from oialr_jax.schedule import RankRule, Schedule
from oialr_jax.serialization import register
from oialr_jax.surgery import densify, factorize, truncate
from oialr_jax.training import training
from oialr_jax.transform import freeze_bases, value_and_grad
from oialr_jax.versions import warn_of_faults as _warn_of_faults
from oialr_jax.weighing import Weighing
from oialr_jax.wrapping import wrap

register()

__version__ = "0.1.0"

__all__ = [
    "Checkpoints",
    "FrozenBase",
    "LowRank",
    "MomentRule",
    "RankRule",
    "Schedule",
    "Weighing",
    "adapters",
    "adaptive",
    "compress",
    "counts",
    "curvature",
    "densify",
    "explain",
    "export",
    "factored",
    "factorize",
    "find_matrices",
    "freeze_bases",
    "load",
    "materialize",
    "merge",
    "nnx",
    "orthogonal",
    "ranks",
    "select",
    "sharding",
    "stability",
    "training",
    "truncate",
    "value_and_grad",
    "wrap",
]

_MOVED = {
    "adaptive": ("AdaptiveStep", "Timing"),
    "checkpoint": ("Restored",),
    "compression": ("Cut",),
    "cost": ("Rates",),
    "curvature": ("of_outputs",),
    "explain": ("Explanation",),
    "linalg": ("orthogonality_error",),
    "following": ("rebase",),
    "lowrank": (
        *("Axes", "Counts", "factor", "global_norm", "is_low_rank"),
        "without_identity",
    ),
    "matrices": ("Matrices", "Matrix", "Skipped"),
    "orthogonal": tuple(orthogonal.__all__),
    "projection": ("project",),
    "reports": ("LayerReport", "Report"),
    "sharding": ("Layout", "Rules", "make_mesh"),
    "stability": ("spectra", "subspaces", "tracker"),
    "stability.comparison": ("Portrait", "Stability", "Tracker"),
    "stability.singular": ("Spectrum", "Subspaces"),
    "training": ("Training", "TrainingState"),
    "weighted": ("Statistics",),
    "transform": (
        *("FreezeBasesState", "trainable", "value_and_grad_from_state"),
        "with_trainable",
    ),
}
"""Names that stood here, by the module that has them now."""
_RENAMED = {"project": "project_to_rank"}

if not TYPE_CHECKING:  # a type checker is to see the new places alone

    def __getattr__(name: str) -> Any:
        """A name that has moved, for one release more."""
        for module, names in _MOVED.items():
            if name in names:
                new = _RENAMED.get(name, name)
                warnings.warn(
                    f"oialr_jax.{name} has moved: from oialr_jax.{module} import "
                    f"{new}. The old place goes with the next release",
                    DeprecationWarning,
                    stacklevel=2,
                )
                return getattr(importlib.import_module(f"oialr_jax.{module}"), new)
        raise AttributeError(f"module 'oialr_jax' has no attribute {name!r}")


_warn_of_faults()
