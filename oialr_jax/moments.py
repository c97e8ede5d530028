"""Carries an optimizer state across a change of basis, for any Optax chain.

A change of basis turns the gradient of a leaf linearly, G' = L G Rᵀ, with L and R the
overlaps of the new bases with the old (`Move`). What a transformation stores of the
gradient turns with it: sums and averages of gradients exactly, by the same formula;
averages of squares by a rule, because the entries that would be needed were not stored.
"""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oialr_jax.lowrank import Axes, PyTree, compute_dtype, is_low_rank, path_name

# What Optax's states call their leaves, by how the leaf depends on the gradient.
_LINEAR = frozenset(
    {"mu", "trace", "ema", "acc_grads", "momentum", "velocity", "reference"}
)
_QUADRATIC = frozenset({"nu", "nu_max", "sum_of_squares", "e_g", "e_x", "v"})
_FACTORED = frozenset({"v_row", "v_col"})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """One leaf's change of basis; new coordinates of a gradient G are left G rightᵀ.

    `before` and `after` are the leaf's Axes where it is a dense array on that side, and
    None where it is a core.

    Shapes:   left: (*l, r', a), right: (*l, r', b) for a gradient in (*l, a, b).
    """

    left: Any
    right: Any
    before: Axes | None = dataclasses.field(default=None, metadata={"static": True})
    after: Axes | None = dataclasses.field(default=None, metadata={"static": True})

    def matrix(self, moment: Array) -> Array:
        """The moment (dense or core) as (*l, a, b) in float32 or wider."""
        moment = moment if self.before is None else self.before.to_matrix(moment)
        return moment.astype(compute_dtype(moment.dtype))

    def leaf(self, matrix: Array) -> Array:
        """The moved matrix as the leaf stores it."""
        return matrix if self.after is None else self.after.to_array(matrix)


@dataclasses.dataclass(frozen=True)
class MomentRule:
    """How second moments v cross a change of basis; first moments M' = L M Rᵀ always.

    Adam's v is the diagonal of a covariance whose other entries were never stored, and
    Adam itself depends on the basis, so each rule is an estimate of the v that Adam
    would have gathered in the new one. `L²` is the elementwise square.

    variance: v' = L² max(v - m², 0) R²ᵀ + (L m Rᵀ)², on bias-corrected moments: moves
              the mean exactly and the variance as if it were uncorrelated. Keeps
              v' >= m'², so no step can exceed the learning rate. Without a first moment
              it is `squared`. (LDAdam, 2024, takes an absolute value over the sum
              instead of clipping the variance, which can leave v' near zero under a
              large m'.)
    squared:  v' = L² v R²ᵀ: exact when gradient entries are uncorrelated.
    scalar:   v' = mean of `squared` over each matrix: forgets the shape.
    keep:     the leading block of v as it is, in axes that no longer exist. It is what
              the authors' code and SOAP do; only from core to core, a conversion uses
              `squared`.

    Zeroing v is not offered: Optax counts steps once for all leaves, so a zeroed v is
    read as converged and the next steps are up to 1/sqrt(1 - b2) learning rates long.

    `b1` and `b2` undo and redo Adam's bias correction in `variance`; they matter in the
    first 1/(1 - b2) steps only.

    Source:   SOAP (Vyas et al., 2024) turns first moments alike; `variance` is after
              LDAdam (Robert et al., 2024).
    """

    second: str = "variance"
    b1: float = 0.9
    b2: float = 0.999

    def __post_init__(self) -> None:
        if self.second not in ("variance", "squared", "scalar", "keep"):
            raise ValueError(
                "`second` must be variance, squared, scalar or keep, "
                f"got {self.second!r}"
            )


def carry(
    opt_state: PyTree,
    fresh: PyTree,
    moves: dict[tuple[Any, ...], Move],
    rule: MomentRule,
) -> PyTree:
    """The optimizer state after some leaves changed basis.

    `fresh` is the state that the optimizer initialises for the new params; it gives
    every shape. A leaf of the state belongs to a parameter when its path ends with the
    parameter's path, and is a first or second moment by the name of the field that it
    sits in. Leaves of parameters that did not move, step counts and schedules are kept
    bit for bit. What is not recognised, or has no counterpart, starts fresh, with a
    warning that names it.
    """
    old = dict(jax.tree_util.tree_leaves_with_path(opt_state))
    flat, treedef = jax.tree_util.tree_flatten_with_path(fresh)
    lost: list[str] = []
    new = []
    for path, initial in flat:
        field, param = _owner(path, moves)
        if param is None:
            same = path in old and np.shape(old[path]) == np.shape(initial)
            new.append(old[path] if same else initial)
            if not same:
                lost.append(path_name(path))
            continue
        moved = _moved(path, len(param), field, old, moves[param], initial, rule)
        new.append(initial if moved is None else moved)
        if moved is None:
            lost.append(path_name(path))
    if lost:
        warnings.warn(
            "optimizer state that no rule carries across the change of basis starts "
            f"fresh: {', '.join(lost)}",
            stacklevel=3,
        )
    return jax.tree.unflatten(treedef, new)


def holds_bases(opt_state: PyTree) -> bool:
    """Whether a state has leaves for frozen bases: its optimizer was not wrapped."""
    return any(map(is_low_rank, jax.tree.leaves(opt_state, is_leaf=is_low_rank)))


def _owner(
    path: tuple[Any, ...], moves: dict[tuple[Any, ...], Move]
) -> tuple[str, tuple[Any, ...] | None]:
    """The field name and the moved parameter that a leaf of the state belongs to."""
    for start in range(len(path) + 1):  # the longest suffix first
        if path[start:] in moves:
            field = path[start - 1] if start else None
            return str(getattr(field, "name", "")), path[start:]
    return "", None


def _moved(
    path: tuple[Any, ...],
    length: int,
    field: str,
    old: dict[tuple[Any, ...], Array],
    move: Move,
    initial: Array,
    rule: MomentRule,
) -> Array | None:
    stem = path[: len(path) - length - 1]
    suffix = path[len(path) - length :]
    attribute = jax.tree_util.GetAttrKey

    def sibling(name: str) -> Array | None:
        return old.get((*stem, attribute(name), *suffix))

    if field in _FACTORED or (field == "v" and sibling("v_row") is not None):
        matrix = _unfactored(sibling("v_row"), sibling("v_col"), sibling("v"), move)
        if matrix is None:
            return None
        full = move.leaf(_second(matrix, None, 1.0, 1.0, move, rule))
        return _factored(field, full, initial)
    moment = sibling(field)
    side = _side_shape(move)
    if moment is None or moment.shape != side:
        return None
    if field in _LINEAR:
        result = move.leaf(_conjugate(move.left, move.matrix(moment), move.right))
    elif field in _QUADRATIC:
        mean, count = sibling("mu"), old.get((*stem, attribute("count")))
        c1 = c2 = jnp.ones(())
        if count is not None and count.shape == ():
            c1 = jnp.where(count > 0, 1 - rule.b1**count, 1.0)
            c2 = jnp.where(count > 0, 1 - rule.b2**count, 1.0)
        mean = None if mean is None else move.matrix(mean)
        matrix = _second(move.matrix(moment), mean, c1, c2, move, rule)
        result = move.leaf(matrix)
    else:
        return None
    return result.astype(initial.dtype) if result.shape == initial.shape else None


def _side_shape(move: Move) -> tuple[int, ...]:
    if move.before is not None:
        return move.before.shape
    return (*move.left.shape[:-2], move.left.shape[-1], move.right.shape[-1])


def _conjugate(left: Array, matrix: Array, right: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return left @ matrix @ jnp.swapaxes(right, -1, -2)


def _second(
    v: Array, mean: Array | None, c1: Any, c2: Any, move: Move, rule: MomentRule
) -> Array:
    left, right = move.left, move.right
    if rule.second == "keep" and move.before is None and move.after is None:
        return v[..., : left.shape[-2], : right.shape[-2]]
    if rule.second == "variance" and mean is not None:
        mean = mean / c1
        variance = jnp.maximum(v / c2 - mean**2, 0)
        moved_mean = _conjugate(left, mean, right)
        return c2 * (_conjugate(left**2, variance, right**2) + moved_mean**2)
    squared = _conjugate(left**2, v, right**2)
    if rule.second == "scalar":
        mean_square = jnp.mean(squared, axis=(-2, -1), keepdims=True)
        return jnp.broadcast_to(mean_square, squared.shape)
    return squared


# Adafactor: v is stored as its means over one axis each (Shazeer and Stern, 2018)


def _factored_axes(shape: tuple[int, ...]) -> tuple[int, int]:
    """The second largest and the largest axis, as Optax chooses them."""
    order = np.argsort(shape)
    return int(order[-2]), int(order[-1])


def _unfactored(
    row: Array | None, col: Array | None, v: Array | None, move: Move
) -> Array | None:
    """The full second moment that a factored state stands for, as a matrix."""
    if row is None or col is None or v is None:
        return None
    shape = _side_shape(move)
    if v.shape == shape:
        return move.matrix(v)
    small, large = _factored_axes(shape)
    if row.ndim != len(shape) - 1 or col.ndim != len(shape) - 1:
        return None
    row, col = jnp.expand_dims(row, large), jnp.expand_dims(col, small)
    mean = jnp.mean(row, axis=small, keepdims=True)
    return move.matrix(row * col / jnp.where(mean > 0, mean, 1))


def _factored(field: str, full: Array, initial: Array) -> Array:
    """The part of a full second moment that `field` holds, in `initial`'s shape."""
    if field == "v":
        kept = full if initial.shape == full.shape else initial
    elif initial.ndim != full.ndim - 1:
        kept = initial
    else:
        small, large = _factored_axes(full.shape)
        kept = jnp.mean(full, axis=large if field == "v_row" else small)
    return kept.astype(initial.dtype)
