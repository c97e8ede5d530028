"""Eight fake CPU devices, strict promotion, runtime types: set before JAX starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")

with install_import_hook("oialr_jax", "beartype.beartype"):
    import oialr_jax  # noqa: F401 -- imported here so that every test runs it typed
