"""How far bases, mixing and weights move along a run, and when a basis has settled."""

from oialr_jax.stability.comparison import (
    Portrait,
    Stability,
    Tracker,
    compare,
    tracker,
)
from oialr_jax.stability.settled import keep_reference, when_settled
from oialr_jax.stability.singular import Spectrum, Subspaces, spectra, subspaces

__all__ = [
    "Portrait",
    "Spectrum",
    "Stability",
    "Subspaces",
    "Tracker",
    "compare",
    "keep_reference",
    "spectra",
    "subspaces",
    "tracker",
    "when_settled",
]
