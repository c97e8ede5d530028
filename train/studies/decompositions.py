"""The suite decompositions: the routes to singular values, and to vectors to keep."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oialr_jax import linalg
from train.bench.settings import Row, Settings
from train.bench.timing import compared

SHAPES = ((4, 768, 768), (4, 768, 1152), (4, 768, 3072), (4, 4608, 512), (24, 192, 192))
"""Matrices of a shape, as a vision transformer, ResNet-18 and cores have them."""


SPREAD = 1e-4
"""The least singular value of those matrices over the largest, evenly in logarithms."""


def decompositions(settings: Settings) -> list[Row]:
    """Host side: a row for each route to the values, or to the vectors to keep.

    `values_error` is the largest relative error of the singular values above
    `linalg.RESOLVED` of the largest; `excess` what the matrix of the kept vectors is
    farther from W than the best one of its rank, over the norm of W.
    """
    rows = []
    for count, m, n in SHAPES:
        k = min(m, n)
        sigma = np.geomspace(1, SPREAD, k)
        w = _of_spectrum(count, m, n, sigma)
        routes: dict[str, tuple[int, Callable[[Array], Any]]] = {
            "svd": (k, linalg.svd),
            "qdwh": (k, _qdwh_svd),
            "values: svd": (0, lambda x: (linalg.singular_values(x),)),
            "values: gram": (0, lambda x: (linalg.gram_singular_values(x),)),
        }
        for part in (2, 8):
            r = k // part
            name = f"gram, 1/{part} of the vectors"
            routes[name] = r, functools.partial(linalg.gram_svd, rank=r)
        compiled = {x: jax.jit(fn).lower(w).compile() for x, (_, fn) in routes.items()}
        runs = {
            x: functools.partial(lambda fn, w: jax.block_until_ready(fn(w)), fn, w)
            for x, fn in compiled.items()
        }
        found = compared(f"{count} of {m}x{n}", runs, settings.repeats)
        for row, (r, _) in zip(found, routes.values(), strict=True):
            parts = [np.asarray(x, np.float64) for x in compiled[row["method"]](w)]
            values, clear = parts[len(parts) // 2], sigma >= linalg.RESOLVED
            row["values_error"] = float(np.max(abs(values / sigma - 1)[:, clear]))
            if r:
                left, _, right = parts
                kept = (left[..., :r] * values[:, None, :r]) @ right[:, :r]
                error = np.linalg.norm(np.asarray(w, np.float64) - kept, axis=(1, 2))
                best, norm = np.linalg.norm(sigma[r:]), np.linalg.norm(sigma)
                row["excess"] = float(np.max(error - best) / norm)
        rows += found
    return rows


def _of_spectrum(count: int, m: int, n: int, sigma: np.ndarray) -> Array:
    """Matrices with these singular values in float64, and random vectors."""
    rng = np.random.default_rng(0)

    def basis(side: int) -> np.ndarray:
        return np.linalg.qr(rng.standard_normal((count, side, len(sigma))))[0]

    return jnp.asarray((basis(m) * sigma) @ basis(n).swapaxes(1, 2), jnp.float32)


def _qdwh_svd(w: Array) -> tuple[Array, Array, Array]:
    """W = U H by polar iterations, and H = V Σ Vᵀ."""
    tall = w if w.shape[-2] >= w.shape[-1] else w.mT
    with jax.default_matmul_precision("highest"):
        u, h = jax.vmap(lambda x: jax.lax.linalg.qdwh(x)[:2])(tall)
        values, v = jnp.linalg.eigh(h)
        values, v = values[:, ::-1], v[..., ::-1]
        left = u @ v
    return (left, values, v.mT) if tall is w else (v, values, left.mT)
