"""What an event did to each matrix: a table for people, plain numbers for JSON."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from oialr_jax.lowrank import Axes


class LayerReport(NamedTuple):
    """What one event did to one leaf.

    `before` is None where the leaf was dense. `energy` is the kept fraction of the sum
    of squared singular values. `sigma` holds all singular values before the cut, one
    row per matrix of the stack. A leaf that is not `finite` was left as it was.
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


@dataclasses.dataclass(frozen=True)
class Report:
    """What one event did: prints as a table, `to_dict` is ready for JSON."""

    layers: tuple[LayerReport, ...]
    kind: str
    step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists; singular values to six digits."""
        layers = []
        for layer in self.layers:
            sigma = [[float(f"{x:.6g}") for x in row] for row in layer.sigma.tolist()]
            layers.append({**layer._asdict(), "sigma": sigma})
        return {"step": self.step, "kind": self.kind, "layers": layers}

    def __str__(self) -> str:
        when = "" if self.step is None else f" at step {self.step}"
        width = max([len(layer.path) for layer in self.layers] + [5])
        lines = [
            f"{self.kind}{when}",
            f"{'layer':<{width}}  {'shape':>11}  {'rank':>12}  {'energy':>7}  UᵀU-I",
        ]
        for x in self.layers:
            before = "dense" if x.before is None else str(x.before)
            after = "dense" if x.after is None else str(x.after)
            note = "" if x.finite else "  not finite, left as it was"
            lines.append(
                f"{x.path:<{width}}  {f'{x.m}x{x.n}':>11}  {before:>5} -> {after:<5}"
                f" {x.energy:>7.1%}  {x.orthogonality_error:.0e}{note}"
            )
        return "\n".join(lines)


def layer_report(
    path: str,
    axes: Axes,
    before: int | None,
    after: int | None,
    sigma: np.ndarray,
    error: Any,
) -> LayerReport:
    """What became of a leaf; `after` is None if it was left as it was, not finite."""
    flat = np.asarray(sigma, np.float64).reshape(-1, sigma.shape[-1])
    energy, finite = 1.0, after is not None
    if finite and np.sum(flat**2) > 0:
        energy = float(np.sum(flat[:, :after] ** 2) / np.sum(flat**2))
    return LayerReport(
        path,
        axes.m,
        axes.n,
        before,
        after if finite else before,
        energy,
        finite,
        float(error),
        flat,
    )
