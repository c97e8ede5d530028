"""How far bases, mixing and weights move along a run, and when a basis has settled."""

from oialr_jax.stability.comparison import compare, tracker
from oialr_jax.stability.settled import keep_reference, when_settled
from oialr_jax.stability.singular import spectra, subspaces

__all__ = [
    "compare",
    "keep_reference",
    "spectra",
    "subspaces",
    "tracker",
    "when_settled",
]
