"""What the record of a run says of its bases: one line per interval of steps."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

import oialr_jax as oialr
from oialr_jax.decompose import mesh_of
from oialr_jax.lowrank import without_identity
from oialr_jax.matrices import Matrix
from oialr_jax.stability.comparison import Stability, sigmas
from oialr_jax.stability.singular import spectrum

DETAILED = 4
"""About so many lines of a run have the null model and the spectra, which cost more."""


@dataclasses.dataclass(frozen=True)
class Tracking:
    """Which matrices a run follows, and how often.

    A run that resumes in the middle of an interval compares with the params that it
    resumed from: its first line has a later `since` than the uninterrupted run's.
    """

    matrices: Sequence[Matrix]
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
        return oialr.stability.tracker(self.matrices).init(params), step

    def compare(
        self, followed: Any, params: Any, step: int
    ) -> tuple[Any, Callable[[], dict[str, Any]]]:
        """Host side: the new `followed`, and what waits for the numbers of this step.

        The params may be used up by the next step, which goes on meanwhile.
        """
        portraits, since = followed
        detailed = self.is_detailed(step)
        key = jax.random.fold_in(jax.random.key(self.seed), step) if detailed else None
        portraits, found, numbers = _updated(
            portraits, _copied(params), key, tuple(self.matrices)
        )
        line = {"since": since, "epoch": step / self.epoch}
        told = functools.partial(_told, line, found, numbers)
        return (portraits, step), told

    def is_detailed(self, step: int) -> bool:
        """Whether the line of this step has the null model and the spectra."""
        points = self.steps // self.every
        return (step // self.every - 1) % -(-points // DETAILED) == 0


@functools.partial(jax.jit, static_argnames="matrices")
def _updated(
    portraits: Any, params: Any, key: Any, matrices: tuple[Matrix, ...]
) -> tuple[Any, tuple[dict[str, Stability], dict[str, Array]], Array]:
    """One program, not one for each shape, and all numbers in one array as well.

    Calling several and fetching number by number is a third of the work.
    """
    portraits, values = oialr.stability.tracker(matrices).update(portraits, params, key)
    found = values, {} if key is None else sigmas(portraits, after=values)
    numbers = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(found)])
    return portraits, found, numbers


def _copied(params: Any) -> Any:
    """A copy on one device, whose owner alone decides when it is used up.

    In a program of several devices each would call LAPACK, at the same time.
    """
    mesh = mesh_of(jax.tree.leaves(params))
    copies = _copying(mesh)(without_identity(params))
    return copies if mesh is None else jax.tree.map(_first, copies)


@functools.cache
def _copying(mesh: Mesh | None) -> Callable[[Any], Any]:
    """The program that copies, and gathers what is divided over a mesh."""
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=place)


def _first(whole: Array) -> Array:
    return whole.addressable_data(0)


def _told(
    line: dict[str, Any],
    found: tuple[dict[str, Stability], dict[str, Array]],
    numbers: Array,
) -> dict[str, Any]:
    leaves, treedef = jax.tree.flatten(found)
    ends = np.cumsum([x.size for x in leaves])[:-1]
    parts = np.split(np.asarray(numbers), ends)
    shaped = [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]
    values, singular = jax.tree.unflatten(treedef, shaped)
    layers = {path: _plain(each._asdict()) for path, each in values.items()}
    for path, sigma in singular.items():
        layers[path] |= _plain(spectrum(sigma)._asdict())
    return {**line, "layers": layers}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers as JSON has them, to six digits; None where there is none."""
    result: dict[str, Any] = {}
    for name, x in values.items():
        if isinstance(x, Stability):
            result[name] = _plain(x._asdict() | {"null": None})
        elif x is not None:
            result[name] = _rounded(np.asarray(x).tolist())
    return result


def _rounded(x: Any) -> Any:
    if isinstance(x, list):
        return [_rounded(y) for y in x]
    return float(f"{x:.6g}") if math.isfinite(x) else None
