"""What the record of a run says of its bases: one line per interval of steps."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import oialr_jax as oialr

DETAILED = 4
"""About so many lines of a run have the null model and the spectra, which cost more."""


@dataclasses.dataclass(frozen=True)
class Tracking:
    """Which matrices a run follows, and how often.

    A run that resumes in the middle of an interval compares with the params that it
    resumed from: its first line has a later `since` than the uninterrupted run's.
    """

    matrices: Sequence[oialr.Matrix]
    every: int
    """Steps between two lines."""
    steps: int
    """Of the whole run."""
    epoch: float
    """Steps in one pass through the data."""
    seed: int = 0
    """Of the random changes of the null model."""
    alone: Callable[[int], bool] = lambda t: False
    """Whether step t calls LAPACK, as rank events do: two such calls at once may
    deadlock on a CPU, so that numbers of the steps before are waited for."""

    def __post_init__(self) -> None:
        """Refuse what would never be compared."""
        if not 1 <= self.every <= self.steps:
            raise ValueError(
                f"`track_every` must be in [1, steps={self.steps}], got {self.every}"
            )

    def start(self, params: Any, step: int) -> Any:
        """Host side: what `compare` wants to know of the params of now."""
        return oialr.tracker(self.matrices).init(params), step

    def compare(
        self, followed: Any, params: Any, step: int
    ) -> tuple[Any, Callable[[], dict[str, Any]]]:
        """Host side: the new `followed`, and what waits for the numbers of this step.

        The params may be used up by the next step, which goes on meanwhile.
        """
        portraits, since = followed
        detailed = self.is_detailed(step)
        key = jax.random.fold_in(jax.random.key(self.seed), step) if detailed else None
        params = _copied(params)
        portraits, found = _updated(portraits, params, key, tuple(self.matrices))
        spectra: Mapping[str, oialr.Spectrum] = {}
        if detailed:
            jax.block_until_ready((portraits, found))  # LAPACK again
            spectra = oialr.spectra(params, self.matrices)
        line = {"since": since, "epoch": step / self.epoch}
        return (portraits, step), functools.partial(_told, line, found, spectra)

    def is_detailed(self, step: int) -> bool:
        """Whether the line of this step has the null model and the spectra."""
        points = self.steps // self.every
        return (step // self.every - 1) % -(-points // DETAILED) == 0


@functools.partial(jax.jit, static_argnames="matrices")
def _updated(
    portraits: Any, params: Any, key: Any, matrices: tuple[oialr.Matrix, ...]
) -> tuple[Any, dict[str, oialr.Stability]]:
    """One program instead of one for each shape: calling them is half of the work."""
    return oialr.tracker(matrices).update(portraits, params, key)


@jax.jit
def _copied(params: Any) -> Any:
    """A copy, whose owner alone decides when it is used up."""
    return jax.tree.map(jnp.copy, params)


def _told(
    line: dict[str, Any],
    found: dict[str, oialr.Stability],
    spectra: Mapping[str, oialr.Spectrum],
) -> dict[str, Any]:
    values = jax.device_get(found)
    layers = {path: _plain(each._asdict()) for path, each in values.items()}
    for path, spectrum in spectra.items():
        layers[path] |= _plain(spectrum._asdict())
    return {**line, "layers": layers}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers as JSON has them, to six digits; None where there is none."""
    result: dict[str, Any] = {}
    for name, x in values.items():
        if isinstance(x, oialr.Stability):
            result[name] = _plain(x._asdict() | {"null": None})
        elif x is not None:
            result[name] = _rounded(np.asarray(x).tolist())
    return result


def _rounded(x: Any) -> Any:
    if isinstance(x, list):
        return [_rounded(y) for y in x]
    return float(f"{x:.6g}") if math.isfinite(x) else None
