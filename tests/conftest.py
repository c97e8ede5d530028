"""Eight fake CPU devices, strict promotion, runtime types: set before JAX starts."""

import gc
import os
import pathlib
import shutil
import tempfile

# Workers get the environment that this leaves.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Many tests compile the same small programs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/oialr_tests_{os.getpid()}"
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import jaxlib
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
ROOMS += [f"oialr_jax.{x.parent.name}" for x in LIBRARY.glob("*/__init__.py")]

if os.environ.get("RUNTIME_TYPES") == "0":  # a quarter of the time
    ROOMS = []
with install_import_hook(ROOMS, "beartype.beartype"):
    import oialr_jax  # noqa: F401 -- imported here so that every test runs it typed

collect_ignore_glob = ["tutorials/*"]  # programs, which test_training runs

SLOWEST = ("test_train_images", "test_digits", "test_durability", "test_presets")
"""Files that begin first: one worker has all tests of a file."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first, so that no worker has one left when the others are done."""
    place = {name: i for i, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


QUICK = "--xla_cpu_parallel_codegen_split_count=1"
if jaxlib.__version__.startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # later ones have no such flag
"""What has XLA compile small programs quickly, which run but a few times."""


def pytest_configure(config: pytest.Config) -> None:
    """Before any backend starts."""
    if "not optimized" in config.option.markexpr:
        os.environ["XLA_FLAGS"] += f" {QUICK}"


def pytest_collection_finish() -> None:
    """What is imported by now stays: it is never looked through for garbage again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_unconfigure() -> None:
    """The folder that this process, and no worker, has named after itself."""
    mine = pathlib.Path(tempfile.gettempdir(), f"oialr_tests_{os.getpid()}")
    shutil.rmtree(mine, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures of a module, in which some train."""
    as_users_do = item.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not as_users_do)
