"""What the record of a run says of its bases: one line per interval of steps."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import oialr_jax as oialr

DETAILED = 7
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

    def __post_init__(self) -> None:
        """Refuse what would never be compared."""
        if not 1 <= self.every <= self.steps:
            raise ValueError(
                f"`track_every` must be in [1, steps={self.steps}], got {self.every}"
            )

    def start(self, params: Any, step: int) -> Any:
        """Host side: what `compare` wants to know of the params of now."""
        return oialr.tracker(self.matrices).init(params), step

    def compare(self, followed: Any, params: Any, step: int) -> tuple[Any, Any]:
        """Host side: the new `followed`, and the numbers since the old one."""
        portraits, since = followed
        detailed = self._is_detailed(step)
        key = jax.random.fold_in(jax.random.key(self.seed), step) if detailed else None
        track = oialr.tracker(self.matrices)
        portraits, found = track.update(portraits, params, key)
        values = jax.device_get(found)
        layers = {x.path: _plain(values[x.path]._asdict()) for x in self.matrices}
        if detailed:
            for path, spectrum in oialr.spectra(params, self.matrices).items():
                layers[path] |= _plain(spectrum._asdict())
        line = {"since": since, "epoch": step / self.epoch, "layers": layers}
        return (portraits, step), line

    def _is_detailed(self, step: int) -> bool:
        points = self.steps // self.every
        return (step // self.every - 1) % -(-points // DETAILED) == 0


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
