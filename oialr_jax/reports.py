"""What an event did to each matrix: a table for people, plain numbers for JSON."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from oialr_jax.lowrank import Axes


class LayerReport(NamedTuple):
    """What one event did to one leaf.

    `before` is None where the leaf was dense. `energy` is the kept fraction of the sum
    of squared singular values. `sigma` holds all singular values before the cut, one
    row per matrix of the stack. A leaf that is not `finite` was left as it was. Where
    the cut was weighed by curvature, `sigma` is in roots of twice the loss, and `rise`
    is by how much the loss rises, as predicted: ½ Σ σ² of what went.
    """

    path: str
    m: int
    n: int
    before: int | None
    after: int | None
    energy: float
    finite: bool
    orthogonality_error: float
    sigma: np.ndarray
    rise: float | None = None


@dataclasses.dataclass(frozen=True)
class Report:
    """What one event did: prints as a table, `to_dict` is ready for JSON.

    `actual` is by how much the loss of one batch rose, where it was measured.
    """

    layers: tuple[LayerReport, ...]
    kind: str
    step: int | None = None
    actual: float | None = None

    @property
    def predicted(self) -> float | None:
        """The sum of the predicted rises of loss; None where nothing was weighed."""
        rises = [x.rise for x in self.layers if x.rise is not None]
        return sum(rises) if rises else None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; singular values to six digits."""
        layers = []
        for layer in self.layers:
            sigma = [[float(f"{x:.6g}") for x in row] for row in layer.sigma.tolist()]
            layers.append({**layer._asdict(), "sigma": sigma})
        weighed = {"predicted": self.predicted, "actual": self.actual}
        return {"step": self.step, "kind": self.kind, **weighed, "layers": layers}

    def __str__(self) -> str:
        when = "" if self.step is None else f" at step {self.step}"
        width = max([len(layer.path) for layer in self.layers] + [5])
        lines = [
            f"{self.kind}{when}",
            f"{'layer':<{width}}  {'shape':>11}  {'rank':>12}  {'energy':>7}  UᵀU-I"
            + ("" if self.predicted is None else "  predicted"),
        ]
        for x in self.layers:
            before = "dense" if x.before is None else str(x.before)
            after = "dense" if x.after is None else str(x.after)
            note = "" if x.finite else "  not finite, left as it was"
            lines.append(
                f"{x.path:<{width}}  {f'{x.m}x{x.n}':>11}  {before:>5} -> {after:<5}"
                f" {x.energy:>7.1%}  {x.orthogonality_error:.0e}{_rise(x.rise)}{note}"
            )
        if self.predicted is not None:
            lines.append(f"the loss rises by {self.predicted:.3g}, as predicted")
        if self.actual is not None:
            lines.append(f"the loss of one batch rose by {self.actual:.3g}")
        return "\n".join(lines)


def _rise(rise: float | None) -> str:
    return "" if rise is None else f"  {rise:.2e}"


def layer_report(
    path: str,
    axes: Axes,
    before: int | None,
    after: int | None,
    sigma: np.ndarray,
    error: Any,
    *,
    finite: bool,
    weighted: bool,
) -> LayerReport:
    """What became of a leaf; `after` is None if it was left as it was."""
    flat = np.asarray(sigma, np.float64).reshape(-1, sigma.shape[-1])
    energy, rise, rank = 1.0, None, before if after is None else after
    squares = np.sum(flat**2, axis=0)
    if finite and np.sum(squares) > 0:
        energy = float(np.sum(squares[:rank]) / np.sum(squares))
    if finite and weighted:
        rise = float(np.sum(squares[rank:]) / 2) if rank is not None else 0.0
    return LayerReport(
        path,
        axes.m,
        axes.n,
        before,
        rank,
        energy,
        finite,
        float(error),
        flat,
        rise,
    )
