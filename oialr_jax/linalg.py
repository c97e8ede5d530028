"""The linear algebra of bases: SVD, Gram matrices, QR, and one solver call at a time.

Two LAPACK calls at the same time, from two programs or in one, a QR beside an SVD, have
been seen to wait for each other for ever on CPUs. JAX does not wait for what it has
started, and XLA runs side by side what does not depend on each other. Upstream know the
overlap by wrong numbers (jax issue 38056, OpenBLAS issue 5825); no issue of theirs has
been found that is this deadlock. What keeps calls apart is here: `alone` between
programs, `token_of` within one.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Tree = TypeVar("Tree")


def alone(result: Tree) -> Tree:
    """Host side: the result of a program with LAPACK calls; on CPUs, once it is ready.

    On other devices programs run one after the other, and the host does not wait.
    """
    arrays = [x for x in jax.tree.leaves(result) if isinstance(x, jax.Array)]
    on_cpu = any(d.platform == "cpu" for x in arrays for d in x.devices())
    return jax.block_until_ready(result) if on_cpu else result


@jax.jit
def token_of(arrays: list[Array]) -> Float[Array, ""]:
    """A token: 0, once all of these, none of them empty, are computed.

    Added to what a LAPACK call is given, it makes the call wait for them. An
    `optimization_barrier` would not: it is gone when XLA orders the calls.
    """
    corners = jnp.stack([jnp.ravel(x)[0].astype(jnp.float32) for x in arrays])
    return 0 * jnp.sum(jnp.nan_to_num(corners))


def compute_dtype(dtype: Any) -> Any:
    """Float32 or wider: what factorisations and rotations of `dtype` run in."""
    return jnp.promote_types(dtype, jnp.float32)


def svd(
    matrix: Float[Array, "*l m n"],
) -> tuple[Float[Array, "*l m k"], Float[Array, "*l k"], Float[Array, "*l k n"]]:
    """Thin SVD with k = min(m, n), in float32 or wider and full matmul precision.

    The factors of a matrix that is not finite, or whose SVD does not converge, are NaN;
    those of the others in a stack are right. Such a matrix never reaches the solver.
    """
    matrix, finite = _harmless(matrix)
    with jax.default_matmul_precision("highest"):
        u, sigma, vt = jnp.linalg.svd(matrix, full_matrices=False)

    def marked(factor: Array) -> Array:
        return jnp.where(finite, factor, jnp.nan)

    return marked(u), marked(sigma[..., None, :])[..., 0, :], marked(vt)


def singular_values(matrix: Float[Array, "*l m n"]) -> Float[Array, "*l k"]:
    """The singular values of `svd`, descending, at about a third of its cost.

    Those of a matrix that is not finite are NaN.
    """
    matrix, finite = _harmless(matrix)
    with jax.default_matmul_precision("highest"):
        sigma = jnp.linalg.svd(matrix, compute_uv=False)
    return jnp.where(finite[..., 0], sigma, jnp.nan)


RESOLVED = 1e-2
"""Part of the largest singular value down to which `gram_svd` finds values (to .1 %)
and directions, in float32; its error is that of σ², about 1e-7 of the largest."""


def gram_svd(
    matrix: Float[Array, "*l m n"], rank: int
) -> tuple[Float[Array, "*l m r"], Float[Array, "*l k"], Float[Array, "*l r n"]]:
    """The first `rank` singular vectors of each matrix, and all values, by WWᵀ or WᵀW.

    Much cheaper than `svd` where one side is long: the eigenvectors of the short side's
    Gram matrix G, and a QR of W times the first of them, whose diagonal are the values.
    Bases are orthonormal whatever the spectrum, and the part of W that is cut off is
    the least possible to the rounding of G. Values below `RESOLVED` of the largest are
    not accurate, and neither is U Σ Vᵀ where `rank` keeps such values. What is not
    finite gives NaN, as in `svd`.
    """
    matrix, finite = _harmless(matrix)
    wide = matrix.shape[-2] <= matrix.shape[-1]
    with jax.default_matmul_precision("highest"):
        sigma, short = _gram_eigh(matrix)
        short = short[..., :rank]
        long, r = signed_qr((matrix.mT if wide else matrix) @ short)
    kept = jax.lax.cummin(jnp.diagonal(r, axis1=-2, axis2=-1), axis=sigma.ndim - 1)
    sigma = jnp.concatenate(
        [kept, jnp.minimum(sigma[..., rank:], kept[..., -1:])], axis=-1
    )
    u, v = (short, long) if wide else (long, short)
    u, vt = (jnp.where(finite, x, jnp.nan) for x in (u, v.mT))
    return u, jnp.where(finite[..., 0], sigma, jnp.nan), vt


def gram_singular_values(matrix: Float[Array, "*l m n"]) -> Float[Array, "*l k"]:
    """The singular values of each matrix by WWᵀ or WᵀW, descending; see `gram_svd`."""
    matrix, finite = _harmless(matrix)
    with jax.default_matmul_precision("highest"):
        sigma, _ = _gram_eigh(matrix)
    return jnp.where(finite[..., 0], sigma, jnp.nan)


def _gram_eigh(matrix: Array) -> tuple[Array, Array]:
    """Singular values, descending, and the vectors of the short side."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    scale = jnp.max(jnp.abs(matrix), axis=(-2, -1), keepdims=True)
    scale = jnp.where(scale > 0, scale, 1)  # squares neither overflow nor vanish
    scaled = matrix / scale
    gram = scaled @ scaled.mT if wide else scaled.mT @ scaled
    values, vectors = jnp.linalg.eigh(gram, symmetrize_input=False)
    sigma = jnp.sqrt(jnp.maximum(values[..., ::-1], 0)) * scale[..., 0]
    return sigma, vectors[..., ::-1]


def signed_qr(matrix: Float[Array, "*l m r"]) -> tuple[Array, Array]:
    """QR, the diagonal not negative: of a basis that has no drift, Q is it itself."""
    q, r = jnp.linalg.qr(matrix)
    sign = jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1, 1).astype(q.dtype)
    return q * sign[..., None, :], sign[..., :, None] * r


def _harmless(matrix: Array) -> tuple[Array, Array]:
    """Matrices in float32 or wider, zeros for those not finite, and which are finite.

    LAPACK's divide and conquer may not return from infinite input.
    """
    matrix = matrix.astype(compute_dtype(matrix.dtype))
    finite = jnp.all(jnp.isfinite(matrix), axis=(-2, -1), keepdims=True)
    return jnp.where(finite, matrix, jnp.zeros_like(matrix)), finite


def diagonal(sigma: Float[Array, "*l r"]) -> Float[Array, "*l r r"]:
    """Diagonal matrices, one per stack entry."""
    eye = jnp.eye(sigma.shape[-1], dtype=sigma.dtype)
    return sigma[..., None] * jnp.broadcast_to(eye, (*sigma.shape, sigma.shape[-1]))


def orthogonality_error(u: Float[Array, "*l m r"], vt: Float[Array, "*l r n"]) -> Array:
    """Largest entry of |UᵀU - I| and |VᵀV - I| over the stack, a float32 scalar."""

    def gram_error(basis: Array) -> Array:
        basis = basis.astype(compute_dtype(basis.dtype))
        with jax.default_matmul_precision("highest"):
            gram = jnp.swapaxes(basis, -1, -2) @ basis
        eye = jnp.eye(gram.shape[-1], dtype=gram.dtype)
        return jnp.max(jnp.abs(gram - jnp.broadcast_to(eye, gram.shape)))

    return jnp.maximum(gram_error(u), gram_error(jnp.swapaxes(vt, -1, -2)))
