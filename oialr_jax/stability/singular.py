"""Singular values and leading subspaces of matrices along a run."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.linalg
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from oialr_jax.decompose import NOW, decomposed, mesh_of, on_host
from oialr_jax.lowrank import (
    PyTree,
    check_forms,
    is_low_rank,
    leaf_at,
    named_leaves,
    without_identity,
)
from oialr_jax.matrices import Matrix


class Spectrum(NamedTuple):
    """Singular values of one leaf, descending, and two measures of their rank.

    `effective_rank`: exp of the entropy of σ / Σσ. `stable_rank`: Σσ² / σ₁². Both are 0
    for a matrix of zeros.

    Shapes:   sigma: (*l, k); the ranks: (*l,).
    Source:   Roy and Vetterli 2007; Rudelson and Vershynin 2007.
    """

    sigma: Float[np.ndarray, "*l k"]
    effective_rank: Float[np.ndarray, "*l"]
    stable_rank: Float[np.ndarray, "*l"]


def spectra(params: PyTree, matrices: Sequence[Matrix]) -> dict[str, Spectrum]:
    """Host side: singular values and ranks of each matrix; of cores where low-rank.

    Raises:   ValueError: a matrix names no leaf of `params`, or one of another shape.
    """
    leaves = leaves_at(params, matrices)
    found = decomposed(leaves, [x.axes for x in matrices], NOW, vectors=False)
    return {
        matrix.path: spectrum(sigma)
        for matrix, sigma in zip(matrices, on_host(found, NOW), strict=True)
    }


def spectrum(sigma: Float[np.ndarray, "*l k"]) -> Spectrum:
    """The ranks that go with singular values, descending.

    >>> spectrum(np.array([2.0, 2.0, 0.0])).effective_rank.round(3)
    np.float64(2.0)
    """
    values = sigma.astype(np.float64)
    total = np.sum(values, axis=-1, keepdims=True)
    share = values / np.where(total > 0, total, 1)
    entropy = -np.sum(share * np.log(np.where(share > 0, share, 1)), axis=-1)
    some = total[..., 0] > 0
    largest = np.where(some, values[..., 0], 1)
    stable = np.sum((values / largest[..., None]) ** 2, axis=-1)
    return Spectrum(sigma, np.exp(entropy) * some, stable)


class Subspaces(NamedTuple):
    """How alike the leading r singular subspaces of a matrix are at two times.

    `inputs` and `outputs` are |U₁ᵀU₂|² / r and |V₁ᵀV₂|² / r, in [0, 1]; the angles are
    the principal ones, radians, descending.

    Shapes:   inputs, outputs: (*l,); their angles: (*l, r).
    Source:   Björck and Golub 1973.
    """

    inputs: Float[np.ndarray, "*l"]
    outputs: Float[np.ndarray, "*l"]
    input_angles: Float[np.ndarray, "*l r"]
    output_angles: Float[np.ndarray, "*l r"]


def subspaces(
    before: PyTree, after: PyTree, matrices: Sequence[Matrix], rank: int
) -> dict[str, Subspaces]:
    """Host side: the leading `rank` directions of each matrix in two params trees.

    Takes a full SVD of each dense matrix, and of the core of each low-rank one.

    Raises:   ValueError: `rank` is outside [1, rank of a matrix]; a matrix names no
              leaf of a tree, or one of another shape.
    """
    first, second = (_leading(tree, matrices, rank) for tree in (before, after))
    return {path: _angles(first[path], second[path]) for path in first}


def leaves_at(params: PyTree, matrices: Sequence[Matrix]) -> list[Any]:
    """The leaf of each matrix; whole on one device where the params lie on a mesh.

    Raises:   ValueError: a matrix names no leaf of `params`, or one of another shape.
    """
    check_forms(params, what="stability takes")
    named = named_leaves(params)
    found = [leaf_at(matrix.path, named, matrix.axes.shape) for matrix in matrices]
    leaves = without_identity(found)
    mesh = mesh_of([leaf.s if is_low_rank(leaf) else leaf for leaf in leaves])
    if mesh is None:
        return leaves
    # each device would call LAPACK, and no two calls may overlap (`linalg`)
    return jax.tree.map(lambda x: x.addressable_data(0), _gathered(mesh)(leaves))


@functools.cache
def _gathered(mesh: Mesh) -> Callable[[list[Any]], list[Any]]:
    """The program that has every array whole on every device."""
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _leading(
    params: PyTree, matrices: Sequence[Matrix], rank: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The leading directions of inputs (*l, m, r) and outputs (*l, n, r), by path."""
    leaves = leaves_at(params, matrices)
    for leaf, matrix in zip(leaves, matrices, strict=True):
        full = leaf.rank if is_low_rank(leaf) else min(matrix.m, matrix.n)
        if not 1 <= rank <= full:
            raise ValueError(
                f"`rank` must be in [1, {full}] for {matrix.path}, got {rank}"
            )
    solved = decomposed(leaves, [x.axes for x in matrices], NOW, vectors=True)
    result = {}
    for leaf, matrix, found in zip(leaves, matrices, solved, strict=True):
        rows = slice(found.start, found.start + math.prod(found.stack))
        u, _, vt = (np.asarray(x[rows]) for x in found.batch)
        u = u.reshape(*found.stack, *u.shape[1:])[..., :rank]
        v = np.swapaxes(vt.reshape(*found.stack, *vt.shape[1:]), -1, -2)[..., :rank]
        if is_low_rank(leaf):
            u = np.asarray(leaf.u, u.dtype) @ u
            v = np.swapaxes(np.asarray(leaf.vt, v.dtype), -1, -2) @ v
        result[matrix.path] = (u, v)
    return result


def _angles(
    before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]
) -> Subspaces:
    angles = []
    for one, two in zip(before, after, strict=True):
        stack = one.shape[:-2]
        found = [
            scipy.linalg.subspace_angles(one[i].astype(float), two[i].astype(float))
            for i in np.ndindex(stack)
        ]
        angles.append(np.array(found).reshape(*stack, one.shape[-1]))
    overlaps = [np.mean(np.cos(x) ** 2, axis=-1) for x in angles]
    return Subspaces(*overlaps, *angles)
