"""Other forms of the one idea's node: for inference, and on a frozen base.

`LowRank` trains its core. The nodes here stand in the same place of a params tree, and
`factored` runs them all; events, `freeze_bases` and checkpoints know `LowRank` alone.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oialr_jax.linalg import compute_dtype
from oialr_jax.lowrank import Axes, LowRank, NoArray, Parts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TwoFactors(NoArray):
    """A matrix W = A B: r (m + n) numbers, one product less than with a core.

    Shapes:   a: (*l, m, r); b: (*l, r, n), of any float dtype; `dtype` is that of the
              dense array, in which they meet other arrays.
    """

    a: Any
    b: Any
    axes: Axes = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array that this node stands for."""
        return self.axes.shape

    @property
    def rank(self) -> int:
        """Columns of A."""
        return self.a.shape[-1]

    @property
    def stored(self) -> int:
        """Numbers in both factors."""
        return math.prod(self.a.shape) + math.prod(self.b.shape)

    @property
    def trainable(self) -> int:
        """Both factors get gradients."""
        return self.stored

    def parts(self) -> Parts:
        """The arrays, without a core."""
        return Parts(self.a, None, self.b)

    def materialize(self) -> Array:
        """The dense array of shape `shape` and dtype `dtype`."""
        return self.parts().product(self.axes, self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Identity(NoArray):
    """A matrix W = C [I Z] Πᵀ: r (m + n - r) numbers, never more than dense.

    C are r columns of W, and Z says how the others are made of them. Column j of W is
    column `order[j]` of C [I Z].

    Shapes:   c: (*l, m, r); z: (*l, r, n - r); order: (*l, n), integers.
    Source:   the interpolative decomposition by a strong rank-revealing QR, Gu and
              Eisenstat 1996; Cheng, Gimbutas, Martinsson and Rokhlin 2005.
    """

    c: Any
    z: Any
    order: Any
    axes: Axes = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array that this node stands for."""
        return self.axes.shape

    @property
    def rank(self) -> int:
        """Columns of C."""
        return self.c.shape[-1]

    @property
    def stored(self) -> int:
        """Numbers in C and Z."""
        return math.prod(self.c.shape) + math.prod(self.z.shape)

    @property
    def trainable(self) -> int:
        """C and Z get gradients."""
        return self.stored

    def parts(self) -> Parts:
        """The arrays, without a core."""
        return Parts(self.c, None, self.z, self.order)

    def materialize(self) -> Array:
        """The dense array of shape `shape` and dtype `dtype`."""
        return self.parts().product(self.axes, self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Frozen(NoArray):
    """A dense array that does not train, in a dtype of its own.

    It counts as array times `scale`, in `dtype`. Nothing of it gets a gradient.

    Shapes:   array: that of the leaf; scale: None, or the leaf's with size one where
              all entries share it.
    """

    array: Any
    scale: Any
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.array.shape)

    @property
    def stored(self) -> int:
        """Numbers in the array."""
        return math.prod(self.array.shape)

    @property
    def trainable(self) -> int:
        """None."""
        return 0

    def parts(self) -> Parts:
        """No factors."""
        return Parts(None, None, None, None, self.materialize())

    def materialize(self) -> Array:
        """The array in `dtype`."""
        array = jax.lax.stop_gradient(self.array).astype(self.dtype)
        if self.scale is None:
            return array
        return array * jax.lax.stop_gradient(self.scale).astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Adapted(NoArray):
    """A matrix W = W0 + U S Vᵀ on a frozen base W0, of which the core S trains.

    Source:   LoRA-XS (Bałazy et al. 2024, arXiv 2405.17604), whose factors of W0 are
              not orthonormal; here U and V are.
    """

    base: Frozen
    core: LowRank

    @property
    def axes(self) -> Axes:
        """Of the core, and so of the base."""
        return self.core.axes

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array that this node stands for."""
        return self.core.shape

    @property
    def dtype(self) -> Any:
        """Dtype of the base as the function sees it; the core may be wider."""
        return self.base.dtype

    @property
    def rank(self) -> int:
        """Rank of U S Vᵀ."""
        return self.core.rank

    @property
    def stored(self) -> int:
        """Numbers in the base, both bases and the core."""
        core = self.core
        factors = (core.u, core.s, core.vt)
        return self.base.stored + sum(math.prod(x.shape) for x in factors)

    @property
    def trainable(self) -> int:
        """Numbers in the core."""
        return math.prod(self.core.s.shape)

    def parts(self) -> Parts:
        """The arrays; the base gets no gradient."""
        return self.core.parts()._replace(base=self.base)

    def materialize(self) -> Array:
        """The dense array: W0 plus U S Vᵀ."""
        core = self.core.materialize()
        return (self.base.materialize().astype(core.dtype) + core).astype(self.dtype)


STORED = ("float32", "bfloat16", "float16", "int8")
"""Dtypes in which factors and frozen bases are stored."""


def check_stored(dtype: str) -> None:
    """Raise unless arrays can be stored in this dtype.

    Raises:   ValueError: they cannot.
    """
    if dtype not in STORED:
        raise ValueError(f"`dtype` must be one of {', '.join(STORED)}, got {dtype!r}")


def narrowed(
    array: Array, dtype: str | None, along: tuple[int, ...]
) -> tuple[Any, Any]:
    """(array in a storage dtype, scale), int8 with one scale over the axes `along`.

    The scale is None where there is none. An int8 entry is at most half a step off,
    of which the largest entry of its column has 127.

    Raises:   ValueError: a finite entry is too large for the dtype.
    """
    if dtype is None:
        return array, None
    check_stored(dtype)
    wide = array.astype(compute_dtype(array.dtype))
    if dtype == "int8":
        largest = jnp.max(jnp.abs(wide), axis=along, keepdims=True, initial=0)
        scale = jnp.where(largest > 0, largest, 1) / 127
        return jnp.round(wide / scale).astype(jnp.int8), scale
    narrow = array.astype(dtype)
    if not isinstance(narrow, jax.core.Tracer):
        lost = np.isfinite(np.asarray(wide)) & ~np.isfinite(
            np.asarray(narrow.astype(jnp.float32))
        )
        if lost.any():
            raise ValueError(
                f"an entry of {float(jnp.max(jnp.abs(wide))):g} is too large for "
                f"{dtype}: store it in bfloat16 or float32"
            )
    return narrow, None


def frozen(array: Array, dtype: str | None, axes: Axes | None = None) -> Frozen:
    """An array as a frozen base in a storage dtype, its own where none is given.

    With int8 each column of the matrix, an entry over all inputs, has a scale; an
    array that is no matrix, or no float, stays as it is.
    """
    if not jnp.issubdtype(array.dtype, jnp.floating) or (
        dtype == "int8" and axes is None
    ):
        dtype = None
    along = () if axes is None else axes.inputs
    stored, scale = narrowed(array, dtype, along)
    return Frozen(stored, scale, jnp.dtype(array.dtype))
