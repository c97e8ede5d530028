"""From trained params to a file that runs without us: merge, export, load."""

from oialr_jax.export.merge import merge

__all__ = ["merge"]
