"""Eight fake CPU devices, strict promotion, runtime types: set before JAX starts."""

import atexit
import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "PYTEST_XDIST_WORKER" not in os.environ:  # whose environment is this one
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
    # Many tests compile the same small programs: half of the suite's time.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="oialr_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    atexit.register(
        shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True
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

PLAIN = ("cost", "schedule")
"""Rooms of plain integers, called so often that runtime types cost minutes there; they
are as strictly typed as the others, which mypy checks."""

LIBRARY = pathlib.Path(__file__).parent.parent / "oialr_jax"
ROOMS = [f"oialr_jax.{x.stem}" for x in LIBRARY.glob("*.py") if x.stem not in PLAIN]

with install_import_hook(ROOMS, "beartype.beartype"):
    import oialr_jax  # noqa: F401 -- imported here so that every test runs it typed

SLOWEST = ("test_durability", "test_presets", "test_notebooks", "test_adaptive")
"""Files that begin first: one worker has all tests of a file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, so that no worker has one left when the others are done."""
    place = {name: i for i, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Most of the time goes into XLA compiling what runs a few times; not in training.

    Nor where the compiler itself is tested. Before the fixtures of a module, in which
    the long runs train.
    """
    as_users_do = {"long", "optimized"} & {mark.name for mark in item.iter_markers()}
    jax.config.update("jax_disable_most_optimizations", not as_users_do)
