"""From trained params to a file that runs without us: merge, export, load."""

from oialr_jax.export.folder import Exported, export, load
from oialr_jax.export.merge import merge

__all__ = ["Exported", "export", "load", "merge"]
