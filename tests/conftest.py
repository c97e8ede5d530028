"""Eight fake CPU devices, strict promotion, runtime types: set before JAX starts."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import numpy  # noqa: F401 -- its BLAS must be loaded to be limited
import pytest
import scipy.linalg.cython_lapack  # noqa: F401 -- the BLAS of JAX on CPUs, likewise
from jaxtyping import install_import_hook
from threadpoolctl import threadpool_limits

# Small SVDs on two busy cores are up to thirty times slower with BLAS threads.
threadpool_limits(1, user_api="blas")

jax.config.update("jax_numpy_rank_promotion", "raise")

with install_import_hook("oialr_jax", "beartype.beartype"):
    import oialr_jax  # noqa: F401 -- imported here so that every test runs it typed


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Most of the time goes into XLA compiling what runs a few times; not in training.

    Nor where the compiler itself is tested. Before the fixtures of a module, in which
    the long runs train.
    """
    as_users_do = {"long", "optimized"} & {mark.name for mark in item.iter_markers()}
    jax.config.update("jax_disable_most_optimizations", not as_users_do)
