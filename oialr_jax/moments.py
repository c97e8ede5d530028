"""Carries an optimizer state across a change of basis, for any Optax chain.

A change of basis turns the gradient of a leaf linearly, G' = L G Rᵀ, with L and R the
overlaps of the new bases with the old (`Move`). What a transformation stores of the
gradient turns with it: sums and averages of gradients exactly, by the same formula;
averages of squares by a rule, because the entries that would be needed were not stored.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oialr_jax.averages import Average
from oialr_jax.linalg import compute_dtype
from oialr_jax.lowrank import Axes, PyTree, owner_of, path_name
from oialr_jax.states import (
    AFRESH,
    COVER,
    FACTORED,
    KEEP_LABELS,
    LINEAR,
    MEMORY,
    PARAMS,
    RESET,
    STATE,
    Kind,
    Second,
    fields_of,
)

Path = tuple[Any, ...]
B1, B2 = 0.9, 0.999
"""Adam's own decays, taken where those of an optimizer are not known."""


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

    The contents of a state are known by its class. A class of your own declares them by
    a static method `crosses()`, which maps its fields to "linear" (sums and averages of
    gradients) or "params" (weights); see `oialr_jax.states`.

    `variance` undoes Adam's bias correction and does it again, which matters in the
    first 1/(1 - b2) steps only. The decays b1 and b2 are those of the optimizer, read
    from its update or its state. Where they cannot be read (they change with the step,
    say) they are `b1` and `b2`, by default 0.9 and 0.999 with a warning.

    Raises:   ValueError: an unknown `second`, or a decay outside [0, 1).
    Source:   SOAP (Vyas et al., 2024) turns first moments alike; `variance` is after
              LDAdam (Robert et al., 2024).
    """

    second: str = "variance"
    b1: float | None = None
    b2: float | None = None

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        for name in ("b1", "b2"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {value}")
        if self.second not in ("variance", "squared", "scalar", "keep"):
            raise ValueError(
                "`second` must be variance, squared, scalar or keep, "
                f"got {self.second!r}"
            )


def carry(
    opt_state: PyTree,
    fresh: PyTree,
    moves: Mapping[Path, Move],
    rule: MomentRule,
    *,
    params: PyTree = None,
    averages: Mapping[Path, Average] | None = None,
) -> PyTree:
    """The optimizer state after some leaves changed basis.

    `fresh` is the state that the optimizer initialises for the new params; it gives
    every shape. What a leaf means is known by the class of the state that holds it
    (`states`), and whose it is by its path below the field: the path of a parameter.
    Leaves of parameters that did not move, step counts and schedules are kept bit for
    bit. What no class explains, or has no counterpart, starts fresh for the parameters
    that moved, with a warning that names it. Weights in a state (slow ones, a start
    point) keep what they have within the bases.

    Args:     params: the new `trainable(params)`; what moved alone if it is not given.
              averages: as `averages(tx, params)` reads them from the optimizer.
    Raises:   ValueError: a parameter that moved has state where it had none, or the
              reverse: its optimizer has changed.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    known = averages or {}
    carrier = _Carrier(opt_state, fresh, moves, rule, {*paths, *moves}, known)
    carrier.check_places()
    new = carrier.state(fresh, ())
    if carrier.lost:
        warnings.warn(
            "optimizer state that no rule carries across the change of basis starts "
            f"fresh: {', '.join(map(path_name, carrier.lost))}",
            stacklevel=3,
        )
    if carrier.guessed:
        warnings.warn(
            "how the moments decay is not known from the optimizer for "
            f"{', '.join(map(path_name, carrier.guessed))}: their bias correction "
            f"takes b1={B1}, b2={B2}. Give yours as MomentRule(b1=..., b2=...)",
            stacklevel=3,
        )
    for line in carrier.contradicted:
        warnings.warn(line, stacklevel=3)
    return new


def shapes_before(trained: PyTree, moves: Mapping[Path, Move]) -> PyTree:
    """Of `trainable(params)` after some moves, the shapes that it had before them."""

    def before(path: Path, leaf: Array) -> jax.ShapeDtypeStruct:
        move = moves.get(path)
        shape = leaf.shape if move is None else _side_shape(move)
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return jax.tree_util.tree_map_with_path(before, trained)


@dataclasses.dataclass
class _Carrier:
    """One walk through the fresh state; `lost` are the leaves that stay fresh."""

    opt_state: dataclasses.InitVar[PyTree]
    fresh: dataclasses.InitVar[PyTree]
    moves: Mapping[Path, Move]
    rule: MomentRule
    params: set[Path]
    averages: Mapping[Path, Average]
    lost: list[Path] = dataclasses.field(default_factory=list)
    guessed: dict[Path, None] = dataclasses.field(default_factory=dict)
    contradicted: dict[str, None] = dataclasses.field(default_factory=dict)

    def __post_init__(self, opt_state: PyTree, fresh: PyTree) -> None:
        self.old = dict(jax.tree_util.tree_leaves_with_path(opt_state))
        self.new = dict(jax.tree_util.tree_leaves_with_path(fresh))

    def check_places(self) -> None:
        """Raises where a moved leaf has state in other places than it had."""

        def places(state: dict[Path, Any], owner: Path) -> set[Path]:
            paths = [x for x in state if x[len(x) - len(owner) :] == owner]
            return {x[: -len(owner)] for x in paths if self.owner(x) == owner}

        for owner in filter(None, self.moves):
            before, after = places(self.old, owner), places(self.new, owner)
            if before != after:
                raise ValueError(
                    f"{path_name(owner)} changes its optimizer at this event: it had "
                    f"{_listed(before - after)} of the state, which it has not, or it "
                    f"has {_listed(after - before)}, which it had not. {KEEP_LABELS}"
                )

    def owner(self, path: Path) -> Path | None:
        return owner_of(path, self.params)

    def state(self, fresh: PyTree, path: Path) -> PyTree:
        """A state, or a container of states, with its leaves carried."""
        fields = fields_of(fresh)
        if fields is not None:
            new = {}
            for name in fresh._fields:
                at = (*path, jax.tree_util.GetAttrKey(name))
                kind = fields.get(name)
                if isinstance(kind, Second) and name == "nu" and path in self.averages:
                    kind = self.averages[path].second
                new[name] = self.field(kind, getattr(fresh, name), at)
            if MEMORY in fields.values():
                new["weights_memory"] = self.weights(new, path)
            return fresh._replace(**new)
        parts, treedef = jax.tree_util.tree_flatten_with_path(
            fresh, is_leaf=lambda x: x is not fresh
        )
        if len(parts) == 1 and not parts[0][0]:
            return self.unknown(path, fresh)
        children = [self.state(child, (*path, *key)) for key, child in parts]
        return jax.tree.unflatten(treedef, children)

    def field(self, kind: Kind | None, fresh: PyTree, path: Path) -> PyTree:
        """A field of a state whose class is known."""
        if kind == STATE:
            return self.state(fresh, path)
        if kind == AFRESH:
            return fresh
        leaves, treedef = jax.tree_util.tree_flatten_with_path(fresh)
        new = []
        for below, initial in leaves:
            whole = (*path, *below)
            if kind is None:
                new.append(self.kept(whole, initial))
                continue
            mine = below[:-1] if kind == COVER else below
            owner = self.owner(whole) if kind == RESET else self.part(mine)
            if owner is None and self.doubtful(mine):
                new.append(self.fresh_leaf(whole, initial))
                continue
            if owner is None or owner not in self.moves:
                new.append(self.kept(whole, initial))
            else:
                moved = None
                if kind != RESET:
                    moved = self.moved(kind, path, below, self.moves[owner], initial)
                new.append(self.fresh_leaf(whole, initial) if moved is None else moved)
        return jax.tree.unflatten(treedef, new)

    def part(self, below: Path) -> Path | None:
        """The parameter with this path; or with this end, of an optimizer of a part."""
        if below in self.params:
            return below
        ends = [x for x in self.params if below and x[len(x) - len(below) :] == below]
        return ends[0] if len(ends) == 1 else None

    def doubtful(self, below: Path) -> bool:
        """Whether a path is the end of several parameters' and one of them moved."""
        ends = (x for x in self.moves if below and x[len(x) - len(below) :] == below)
        return any(ends)

    def kept(self, path: Path, initial: Array) -> Array:
        old = self.old.get(path)
        if old is None or np.shape(old) != np.shape(initial):
            return self.fresh_leaf(path, initial)
        return old

    def fresh_leaf(self, path: Path, initial: Array) -> Array:
        self.lost.append(path)
        return initial

    def unknown(self, path: Path, initial: Array) -> Array:
        """A leaf that no class explains: fresh if it is of a parameter that moved."""
        owner = self.owner(path)
        if owner is None or owner not in self.moves:
            return self.kept(path, initial)
        side = _side_shape(self.moves[owner])

        def fits(x: Path) -> bool:
            shape = np.shape(self.old.get(x, ()))
            if not owner:
                return shape[len(shape) - len(side) :] == side
            return math.prod(shape) > 1

        unit = path[: -len(owner) - 1] if owner else path
        others = [
            x
            for x in self.new
            if x[: len(unit)] == unit and self.owner(x[len(unit) :]) == owner
        ]
        if any(map(fits, others)):
            return self.fresh_leaf(path, initial)
        return self.kept(path, initial)

    def moved(
        self, kind: Kind, field: Path, below: Path, move: Move, initial: Array
    ) -> Array | None:
        """A moved leaf in its new coordinates, or None where it has none."""
        stem, shape = field[:-1], _side_shape(move)

        def sibling(name: str | None, after: Path = below) -> Array | None:
            return self.old.get((*stem, jax.tree_util.GetAttrKey(name), *after))

        name = field[-1].name
        if kind == FACTORED:
            matrix = _unfactored(sibling("v_row"), sibling("v_col"), sibling("v"), move)
            if matrix is None:
                return None
            full = move.leaf(_second(matrix, None, 1.0, 1.0, move, self.rule))
            return _factored(name, full, initial)
        if kind == COVER:
            return _cover(field, below, self.old, move, self.rule, initial)
        moment = sibling(name)
        if kind == MEMORY and moment is not None and moment.shape[1:] == shape:
            result = jax.vmap(lambda x: _turned(x, move))(moment)
        elif moment is None or moment.shape != shape:
            return None
        elif kind in (LINEAR, PARAMS):
            result = _turned(moment, move)
        elif isinstance(kind, Second):
            count = sibling(kind.count, ()) if kind.count else None
            mean = sibling(kind.mean) if kind.mean else None
            decays: tuple[Any, Any] | None = None
            if self.rule.second == "variance" and not (count is None or mean is None):
                decays = self.decays(stem, kind)
            result = _squares(kind, moment, mean, count, decays, move, self.rule)
        else:
            return None
        same = result.shape == initial.shape
        return result.astype(initial.dtype) if same else None

    def decays(self, path: Path, kind: Second) -> tuple[Any, Any]:
        """Of the mean and the squares of a state, numbers or scalars of its own."""
        known = self.averages.get(path)
        read = {
            "b1": known.mean if known else None,
            "b2": known.square if known else None,
        }
        found: dict[str, Any] = {"b2": 0.0}
        for name in ("b1",) if kind.corrected or kind.largest else ("b1", "b2"):
            given, decay = getattr(self.rule, name), read[name]
            if isinstance(decay, tuple):
                found[name] = self.old[decay]
            elif decay is not None:
                found[name] = decay
                if given is not None and not math.isclose(given, decay, rel_tol=1e-5):
                    line = f"MomentRule({name}={given}) is not that of the optimizer"
                    self.contradicted[f"{line}, {decay:.6g}, which is taken"] = None
            elif given is not None:
                found[name] = given
            else:
                found[name] = B1 if name == "b1" else B2
                self.guessed[path] = None
        return found["b1"], found["b2"]

    def weights(self, new: dict[str, Any], path: Path) -> Array:
        """L-BFGS: 1/<s, y> of the carried pairs, 0 (no pair) where that is not > 0."""
        old = self.old[(*path, jax.tree_util.GetAttrKey("weights_memory"))]
        pairs = [
            jax.tree.leaves(new[f"diff_{x}_memory"]) for x in ("params", "updates")
        ]
        products = [
            jnp.sum((s * y).reshape(len(old), -1), axis=1)
            for s, y in zip(*pairs, strict=True)
        ]
        total = functools.reduce(jnp.add, products, jnp.zeros_like(old))
        good = (old != 0) & (total * old > 0)
        return jnp.where(good, 1 / jnp.where(good, total, 1), 0).astype(old.dtype)


def _listed(paths: set[Path]) -> str:
    return ", ".join(sorted(map(path_name, paths))) or "nothing more"


def _turned(moment: Array, move: Move) -> Array:
    return move.leaf(_conjugate(move.left, move.matrix(moment), move.right))


def _squares(
    kind: Second,
    moment: Array,
    mean: Array | None,
    count: Array | None,
    decays: tuple[Any, Any] | None,
    move: Move,
    rule: MomentRule,
) -> Array:
    """An average of squares in its new coordinates, by the rule."""
    c1 = c2 = jnp.ones(())
    if count is not None and count.shape == () and decays is not None:
        b1, b2 = decays
        c1 = jnp.where(count > 0, 1 - b1**count, 1.0)
        if not kind.corrected and not kind.largest:
            c2 = jnp.where(count > 0, 1 - b2**count, 1.0)
    v = move.matrix(moment)
    v = v**2 if kind.largest else v
    mean = None if mean is None else move.matrix(mean)
    new = _second(v, mean, c1, c2, move, rule)
    return move.leaf(jnp.sqrt(new) if kind.largest else new)


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
        sides = [x.shape[-2] for x in (left, right)]
        more = [(0, max(0, r - k)) for r, k in zip(sides, v.shape[-2:], strict=True)]
        kept = v[..., : sides[0], : sides[1]]
        return jnp.pad(kept, [(0, 0)] * (v.ndim - 2) + more)
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
    """The part of a full second moment that `field` holds, in `initial`'s shape.

    Optax factors no matrix below a size: then `v` is whole, and the others have one
    entry that says nothing.
    """
    part = full
    if field != "v":
        small, large = _factored_axes(full.shape)
        part = jnp.mean(full, axis=large if field == "v_row" else small)
    return (part if part.shape == initial.shape else initial).astype(initial.dtype)


# SM3: the largest sum of squares along each axis; an entry has at most the least one


def _cover(
    field: Path,
    below: Path,
    old: Mapping[Path, Array],
    move: Move,
    rule: MomentRule,
    initial: Array,
) -> Array | None:
    shape = _side_shape(move)
    full = None
    for axis, size in enumerate(shape):
        line = old.get((*field, *below[:-1], jax.tree_util.SequenceKey(axis)))
        if line is None or line.shape != (size,):
            return None
        sides = [size if a == axis else 1 for a in range(len(shape))]
        line = jnp.broadcast_to(line.reshape(sides), shape)
        full = line if full is None else jnp.minimum(full, line)
    if full is None:
        return None
    second = _second(move.matrix(full), None, 1.0, 1.0, move, rule)
    new = move.leaf(second)
    axis = below[-1].idx
    result = jnp.max(new, axis=tuple(a for a in range(new.ndim) if a != axis))
    same = result.shape == initial.shape
    return result.astype(initial.dtype) if same else None
