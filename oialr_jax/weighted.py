"""What a direction of a matrix is worth in loss: sums of both sides, weighted cuts.

With C = E[x xᵀ] of what comes in and D = E[δ δᵀ] of the gradients of what goes out, the
loss rises by about ½ tr(Eᵀ C E D) when W becomes W - E. In that norm the best matrix of
rank k has a closed form, and its error is in units of loss, the same for all matrices.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oialr_jax.linalg import compute_dtype, diagonal, signed_qr, svd, token_of

RIDGE = 1e-3
"""What is added to the diagonal of C and D, in parts of their mean eigenvalue."""

WIDE = 2048
"""The sums of a longer side are block-diagonal, zero elsewhere."""

BLOCK = 1024
"""The longest side of such a block."""


class Sides(NamedTuple):
    """Sums of one matrix, one for its inputs and one for its outputs.

    Of examples, with G = Xᵀ Δ the gradient that the rows X and Δ of one example make
    together, Σ G Gᵀ and Σ Gᵀ G. Of independent rows Σ x xᵀ and Σ δ δᵀ, where a row
    whose gradient is zero, as of a padded token, does not count. Of a LowRank leaf the
    rows are those of its core, Uᵀx and Vᵀδ. Of a side above `WIDE` only the blocks on
    the diagonal are summed. None in the place of a sum stands for the identity in a
    cut.

    Shapes:   inputs: (*l, m, m), or a diagonal (*l, m); outputs: (*l, n, n) or (*l, n);
              rows: (*l), how many have a gradient. Of a core m and n are its rank.
    """

    inputs: Array | None
    outputs: Array | None
    rows: Array


@final
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Sums over batches for each matrix, by path; prints as a table.

    `terms` is the number of terms of the likelihood, of all batches. `skipped` names
    the matrices that are not in `sides` because of a use that is not summed, with it.
    """

    sides: dict[str, Any]  # of Sides, of arrays or shapes
    terms: Any
    skipped: tuple[tuple[str, str], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )
    independent_rows: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def form(self) -> dict[str, Any]:
        """What is static of it, in a form that JSON can hold."""
        return {
            "paths": list(self.sides),
            "skipped": [list(x) for x in self.skipped],
            "independent_rows": self.independent_rows,
        }

    @classmethod
    def of_form(
        cls, form: Mapping[str, Any], arrays: Mapping[str, Any]
    ) -> "Statistics":
        """Statistics of a `form`, with arrays (or shapes) by their path in it."""
        sides = {
            path: Sides._make(arrays.get(f"sides/{path}/{x}") for x in Sides._fields)
            for path in form["paths"]
        }
        skipped = tuple((path, why) for path, why in form["skipped"])
        return cls(sides, arrays["terms"], skipped, form["independent_rows"])

    def covariances(self, path: str) -> tuple[Array | None, Array | None]:
        """C and D: the Fisher of a loss that is a mean over N terms is about C ⊗ D.

        Of examples, C = Σ G Gᵀ / Σ |G|² and D = Σ Gᵀ G / N: from the identity one step
        of the power iteration to the nearest Kronecker product, exact in its trace.
        Of T independent rows, C = Σ x xᵀ / T and D = Σ δ δᵀ / N.
        """
        inputs, outputs, rows = self.sides[path]
        if inputs is not None:
            axes = tuple(range(rows.ndim, inputs.ndim))
            total = rows
            if not self.independent_rows:
                full = len(axes) == 2
                total = (
                    jnp.trace(inputs, axis1=-2, axis2=-1) if full else inputs.sum(-1)
                )
            inputs = inputs / jnp.expand_dims(jnp.where(total > 0, total, 1), axes)
        return inputs, None if outputs is None else outputs / self.terms

    def add(self, new: "Statistics", decay: float = 1.0) -> "Statistics":
        """These sums times `decay`, and those of more batches.

        C and D are then means over all batches, weighed by their rows and terms; with a
        decay below one older batches count less.
        """
        return jax.tree.map(lambda a, b: decay * a + b, self, new)

    def __str__(self) -> str:
        width = max([len(x) for x in self.sides] + [6])
        lines = [f"{'matrix':<{width}}  {'inputs':>14} {'outputs':>14}       rows"]
        for path, (inputs, outputs, rows) in self.sides.items():
            sides = (_held(x, rows.ndim) for x in (inputs, outputs))
            count = jax.device_get(jnp.sum(rows)) if _is_known(rows) else "?"
            lines.append(
                f"{path:<{width}}  {' '.join(f'{x:>14}' for x in sides)} {count:>10}"
            )
        return "\n".join(
            [*lines, *(f"{x}: not summed, {why}" for x, why in self.skipped)]
        )


def _held(side: Array | None, stack: int) -> str:
    if side is None:
        return "identity"
    form = "diagonal"
    if side.ndim == stack + 2:
        form = "full" if side.shape[-1] <= WIDE else "in blocks"
    return f"{side.shape[-1]} {form}"


def _is_known(x: Any) -> bool:
    return isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)


class Directions(NamedTuple):
    """A matrix as a sum of directions, the one that is worth most first.

    W = left . right; a cut to rank k keeps the first k columns and rows, and the loss
    rises by ½ Σ σ² over the others. A matrix that no row of a loss reached is worth
    nothing: its sigma are zeros, its directions those of its SVD.

    Shapes:   left: (*l, m, q); sigma: (*l, q), descending; right: (*l, q, n).
    """

    left: Array
    sigma: Array
    right: Array


def directions(
    matrix: Float[Array, "*l m n"],
    inputs: Array | None,
    outputs: Array | None,
    *,
    ridge: float = RIDGE,
) -> Directions:
    """The directions of W, weighed by C on the side of inputs and D on that of outputs.

    With C = A A, D = B B (symmetric roots) and P Σ Qᵀ = svd(A W B), left is A⁻¹ P Σ
    and right Qᵀ B⁻¹: no W of rank k has a smaller tr(EᵀCED) than their first k. None
    stands for the identity; without both this is the SVD.

    Shapes:   inputs: (*l, m, m), or (*l, m) for a diagonal; outputs: the same with n.
    Source:   K-FAC's Fisher C ⊗ D (Martens and Grosse 2015); the closed form of both
              sides as in GFWSVD (arXiv 2505.17974), with roots from `eigh`, which a
              semidefinite C does not break.
    """
    matrix = matrix.astype(compute_dtype(matrix.dtype))
    stack = matrix.ndim - 2
    with jax.default_matmul_precision("highest"):
        a, a_inverse, known_a = _roots(inputs, stack, ridge)
        if a is not None and outputs is not None:
            outputs = outputs + token_of([a])
        b, b_inverse, known_b = _roots(outputs, stack, ridge)
        p, sigma, qt = svd(_times(a, matrix, b))
        left = _times(a_inverse, p * sigma[..., None, :], None)
        right = _times(None, qt, b_inverse)
    known = known_a & known_b
    return Directions(left, jnp.where(known[..., None], sigma, 0), right)


def cut(found: Directions, rank: int) -> tuple[Array, Array, Array]:
    """The factors u, s, vt of the first directions, as the SVD of their sum has them.

    Shapes:   u: (*l, m, r); s: (*l, r, r), diagonal; vt: (*l, r, n).
    """
    with jax.default_matmul_precision("highest"):
        u, left = signed_qr(found.left[..., :rank])
        token = token_of([u])
        v, right = signed_qr(found.right[..., :rank, :].mT + token)
        p, sigma, qt = svd(left @ right.mT + token_of([v]))
        return u @ p, diagonal(sigma), qt @ v.mT


def rise(sigma: Float[Array, "*l q"], rank: int) -> Float[Array, "*l"]:
    """How much the loss rises, as predicted, when a matrix is cut to `rank`."""
    return 0.5 * jnp.sum(jnp.square(sigma[..., rank:]), axis=-1)


def _roots(
    covariance: Array | None, stack: int, ridge: float
) -> tuple[Array | None, Array | None, Array]:
    """Symmetric root, its inverse, and whether there is anything, for each matrix.

    A covariance of zeros counts as the identity.
    """
    if covariance is None:
        return None, None, jnp.asarray(True)
    covariance = covariance.astype(compute_dtype(covariance.dtype))
    full = covariance.ndim == stack + 2
    diagonal = jnp.diagonal(covariance, axis1=-2, axis2=-1) if full else covariance
    mean = jnp.mean(diagonal, axis=-1)
    finite = jnp.isfinite(jnp.sum(covariance, axis=(-2, -1) if full else -1))
    covariance = jnp.where(
        finite[..., None, None] if full else finite[..., None], covariance, 0
    )
    known = ~finite | (mean > 0)
    scale = jnp.where(known, mean, 1)  # squares neither overflow nor vanish
    scale = jnp.where(finite, scale, jnp.nan)[..., None]
    if full:
        values, vectors = jnp.linalg.eigh(covariance / scale[..., None])
    else:
        values, vectors = covariance / scale, None
    values = jnp.where(known[..., None], jnp.maximum(values, 0) + ridge, 1)

    def built(values: Array) -> Array:
        if vectors is None:
            return values
        return (vectors * values[..., None, :]) @ vectors.mT

    root = jnp.sqrt(values * scale)
    return built(root), built(1 / root), known


def _times(a: Array | None, matrix: Array, b: Array | None) -> Array:
    """A . matrix . B; a side may be a diagonal, or None for the identity."""
    if a is not None:
        matrix = a @ matrix if a.ndim == matrix.ndim else a[..., None] * matrix
    if b is not None:
        matrix = matrix @ b if b.ndim == matrix.ndim else matrix * b[..., None, :]
    return matrix
