"""Public names of oialr_jax: low-rank training of any JAX model."""

__version__ = "0.1.0"
