"""What is known of the compiler below: a jaxlib that computes wrong numbers."""

import os
import warnings

import jax
import jaxlib

CURE = "--xla_cpu_experimental_ynn_fusion_type="
"""With an empty value in XLA_FLAGS this turns off what is wrong in jaxlib 0.10.2."""


def fault(jaxlib_version: str, xla_flags: str, platforms: str) -> str | None:
    """The sentence to warn with, or None where the numbers are right.

    Without `platforms` JAX always starts a CPU backend, beside an accelerator's too.

    Args:     xla_flags: as in XLA_FLAGS; of a flag given twice XLA takes the last one.
              platforms: as in JAX_PLATFORMS, names with commas between, or "".
    Source:   jax issue 39103.

    >>> fault("0.10.1", "", "cpu") is fault("0.10.2", "", "cuda") is None
    True
    """
    given = [flag for flag in xla_flags.split() if flag.startswith(CURE)]
    names = [name.strip() for name in platforms.split(",") if name.strip()]
    cured = given[-1:] == [CURE]
    wrong = jaxlib_version.partition("+")[0] == "0.10.2"
    if not wrong or cured or (names and "cpu" not in names):
        return None
    return (
        f"jaxlib {jaxlib_version} computes wrong numbers on CPUs, without an error, "
        "where a matrix product follows another or a normalisation (jax issue 39103). "
        'Install another one, `pip install "jax!=0.10.2" "jaxlib!=0.10.2"`, or set '
        f"XLA_FLAGS={CURE} (an empty value) before JAX starts; what runs on an "
        "accelerator is not concerned."
    )


def warn_of_faults() -> None:
    """Host side: warn of this process's jaxlib; no backend of JAX is started."""
    said = fault(
        jaxlib.__version__,  # type: ignore[attr-defined]  # it has no stub
        os.environ.get("XLA_FLAGS", ""),
        getattr(jax.config, "jax_platforms", None) or "",
    )
    if said is not None:
        warnings.warn(said, stacklevel=3)  # at the user's import
