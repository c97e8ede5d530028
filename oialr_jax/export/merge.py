"""merge(params): the forms of inference, in which no core is left to train."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from oialr_jax import cost
from oialr_jax.export.identity import chosen_columns
from oialr_jax.forms import (
    Adapted,
    Frozen,
    Identity,
    TwoFactors,
    check_stored,
    narrowed,
)
from oialr_jax.lowrank import LowRank, PyTree, is_low_rank, is_node, path_name
from oialr_jax.matrices import Matrix

FORMS = ("auto", "factors", "identity", "core", "dense")
"""What `merge` makes of a matrix."""


def merge(
    params: PyTree,
    *,
    form: str = "auto",
    dtype: str | None = None,
    matrices: Sequence[Matrix] = (),
    rates: cost.Rates | None = None,
) -> PyTree:
    """Host side: the params for inference, which `factored(fn)` runs.

    "factors" holds a matrix as W = A B, the core folded into the smaller side;
    "identity" as W = C [I Z] Πᵀ, r (m + n - r) numbers, exact to rounding; "core" as
    U S Vᵀ; "dense" as an array. "auto" picks "factors" where these are both smaller and
    faster than the dense matrix, which it takes else; where `dtype` is int8 it picks
    "core". A matrix on a frozen base (`adapters`) becomes dense: the base is of full
    rank. Other leaves stay as they are.

    Args:     dtype: in which factors are stored, float32, bfloat16, float16 or int8; by
              default their own, as dense matrices in any case. They are widened where
              they meet other arrays. int8 is for the bases of "core", a scale for each
              column, whose core is float32 and the best for the rounded bases; it is
              not for training on.
              matrices: what `find_matrices` found, whose rows tell how fast each form
              is; without them the number of weights decides.
              rates: of the device; None has those that `cost.RATES` knows.
    Raises:   ValueError: another form or dtype; int8 for another form than "core"; an
              entry that a narrow dtype cannot hold; a matrix that is not finite.
    """
    if form not in FORMS:
        raise ValueError(f"`form` must be one of {', '.join(FORMS)}, got {form!r}")
    if dtype is not None:
        check_stored(dtype)
    if dtype == "int8" and form not in ("auto", "core"):
        raise ValueError(
            f"dtype='int8' is for frozen bases and form={form!r} has none: say "
            "form='core', or dtype='bfloat16'"
        )
    if rates is None:
        rates = cost.RATES.get(jax.default_backend())
    known = {x.path: x for x in matrices}

    def merged(path: Any, leaf: Any) -> Any:
        if isinstance(leaf, Adapted | Frozen):
            return leaf.materialize()
        if not is_low_rank(leaf):
            return leaf
        if not all(bool(jnp.all(jnp.isfinite(x))) for x in (leaf.u, leaf.s, leaf.vt)):
            raise ValueError(f"{path_name(path)} is not finite: restore an older state")
        chosen = form
        if form == "auto":
            low = "core" if dtype == "int8" else "factors"
            matrix = known.get(path_name(path))
            chosen = low if _pays(leaf, low, matrix, rates) else "dense"
        return _MERGED[chosen](leaf, dtype)

    return jax.tree_util.tree_map_with_path(merged, params, is_leaf=is_node)


def _pays(
    leaf: LowRank, form: str, matrix: Matrix | None, rates: cost.Rates | None
) -> bool:
    """Whether a form is smaller than the dense matrix, and faster in every use."""
    m, n, r = leaf.axes.m, leaf.axes.n, leaf.rank
    core = r * r if form == "core" else 0
    if r * (m + n) + core >= m * n:
        return False
    loads = () if matrix is None else matrix.loads
    itemsize = 4 if matrix is None else matrix.itemsize

    def time(load: cost.Workload) -> float:
        load = dataclasses.replace(load, training=False)
        order = cost.Order.DENSE
        if rates is None:
            return float(cost.flops(order, load).forward)
        return cost.seconds(order, load, rates, itemsize)

    def time_low(load: cost.Workload) -> float:
        then = dataclasses.replace(load, m=r, window=0)
        middle = dataclasses.replace(then, n=r)
        total = time(dataclasses.replace(load, n=r)) + time(then)
        return total + (time(middle) if form == "core" else 0)

    return all(time_low(x) <= (1 - cost.MARGIN) * time(x) for x in loads)


def _wide(leaf: LowRank) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The factors in float64."""
    found = jax.device_get((leaf.u, leaf.s, leaf.vt))
    u, s, vt = (np.asarray(x).astype(np.float64) for x in found)
    return u, s, vt


def _stored(array: np.ndarray, leaf: LowRank, dtype: str | None) -> Any:
    """An array in the dtype of storage, or of the leaf."""
    return narrowed(jnp.asarray(array, leaf.dtype), dtype, ())[0]


def _two_factors(leaf: LowRank, dtype: str | None) -> TwoFactors:
    u, s, vt = _wide(leaf)
    a, b = (u @ s, vt) if leaf.axes.m < leaf.axes.n else (u, s @ vt)
    a, b = (_stored(x, leaf, dtype) for x in (a, b))
    return TwoFactors(a, b, leaf.axes, jnp.dtype(leaf.dtype))


def _identity(leaf: LowRank, dtype: str | None) -> Identity:
    u, s, vt = _wide(leaf)
    *stack, r, n = vt.shape
    count = math.prod(stack)
    picked = [chosen_columns(x) for x in vt.reshape(count, r, n)]
    order = np.stack([x for x, _ in picked]) if picked else np.zeros((0, n), np.int64)
    z = np.stack([x for _, x in picked]) if picked else np.zeros((0, r, n - r))
    order, z = order.reshape(*stack, n), z.reshape(*stack, r, n - r)
    kept = np.take_along_axis(vt, order[..., None, :r], axis=-1)
    c, others = (_stored(x, leaf, dtype) for x in (u @ (s @ kept), z))
    place = jnp.asarray(np.argsort(order, axis=-1), jnp.int32)
    return Identity(c, others, place, leaf.axes, jnp.dtype(leaf.dtype))


def _with_core(leaf: LowRank, dtype: str | None) -> LowRank:
    """The node with narrow bases; of int8 ones the core is the best for these.

    Of all cores S' that one makes Q S' Rᵀ nearest to W, with Q and R the rounded
    bases: Q⁺ W (R⁺)ᵀ. Their scales are in it.
    """
    if dtype != "int8":
        u, vt = (narrowed(x, dtype, ())[0] for x in (leaf.u, leaf.vt))
        s = leaf.s.astype(jnp.float32) if dtype is not None else leaf.s
        return dataclasses.replace(leaf, u=u, s=s, vt=vt)
    u, s, vt = _wide(leaf)
    rounded = narrowed(leaf.u, dtype, (-2,))[0], narrowed(leaf.vt, dtype, (-1,))[0]
    q, rt = (np.asarray(x).astype(np.float64) for x in rounded)
    core = np.linalg.pinv(q) @ u @ s @ vt @ np.linalg.pinv(rt)
    return LowRank(rounded[0], jnp.asarray(core, jnp.float32), rounded[1], leaf.axes)


def _dense(leaf: LowRank, dtype: str | None) -> Any:
    del dtype  # of factors
    return leaf.axes.to_array(_product(leaf))


def _product(leaf: LowRank) -> Any:
    u, s, vt = _wide(leaf)
    return jnp.asarray(u @ s @ vt, leaf.dtype)


_MERGED: Mapping[str, Any] = {
    "factors": _two_factors,
    "identity": _identity,
    "core": _with_core,
    "dense": _dense,
}
