"""Trees beside the params: brought into the bases of the params, or refused.

An average of the weights, a target network or the start point of a penalty can be
combined with params only while its nodes are in the same bases. Every node has the
identity of its bases (`lowrank.Basis`). Compiled steps get nodes without it, as an
event that only turns bases would cause a recompilation otherwise.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from oialr_jax.decompose import Run, mesh_of
from oialr_jax.linalg import compute_dtype
from oialr_jax.lowrank import (
    Basis,
    LowRank,
    PyTree,
    is_low_rank,
    leaves_by_path,
    owner_of,
    path_name,
    without_identity,
)
from oialr_jax.sharding import Layout

Path = tuple[Any, ...]


def rebase(tree: PyTree, params: PyTree) -> PyTree:
    """The tree with its matrices in the bases of the params at the same paths.

    `tree` is any pytree: an average of the params, or something that contains one. A
    leaf belongs to the parameter whose path is the longest end of its own path, if both
    have the same dense shape. For a LowRank parameter a dense W becomes the core UᵀWV,
    and a node with core S the core (UᵀUₑ) S (VₑᵀV): the nearest matrix in the span of
    the parameter's bases; the part outside of the span is dropped. For a dense
    parameter a node becomes dense. All other leaves stay as they are: leaves without a
    parameter, of another shape or dtype, or in these bases already.

    Traceable. The bases of the result are copies, so that both trees can be donated.

    >>> from oialr_jax.lowrank import Axes, factor
    >>> params = {"w": factor(jnp.ones((4, 3)), Axes((4, 3), (), (0,), (1,)), rank=1)}
    >>> ema = rebase({"ema": {"w": 2 * jnp.ones((4, 3))}, "decay": 0.9}, params)
    >>> bool(jnp.allclose(ema["ema"]["w"].materialize(), 2)), ema["decay"]
    (True, 0.9)
    """
    owners = leaves_by_path(params)

    def brought(path: Path, leaf: Any) -> Any:
        owner = owners.get(owner_of(path, owners))
        return _brought(leaf, owner) if _moves(leaf, owner) else leaf

    return jax.tree_util.tree_map_with_path(brought, tree, is_leaf=is_low_rank)


def _moves(leaf: Any, owner: Any) -> bool:
    """Whether a leaf is not yet as its owner: in its bases, or dense."""
    if owner is None or getattr(leaf, "shape", None) != getattr(owner, "shape", None):
        return False
    if not is_low_rank(owner):
        return is_low_rank(leaf)
    if is_low_rank(leaf):
        return not (_alike(leaf, owner) and owner.basis and leaf.rank == owner.rank)
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _alike(leaf: Any, owner: Any) -> bool:
    """Whether two nodes are over the same axes, and say the same of their bases."""
    return leaf.axes == owner.axes and leaf.basis == owner.basis


def _brought(leaf: Any, owner: Any) -> Any:
    if not is_low_rank(owner):
        return leaf.materialize()
    wide = jnp.promote_types(compute_dtype(leaf.dtype), compute_dtype(owner.dtype))
    u, vt = owner.u.astype(wide), owner.vt.astype(wide)
    with jax.default_matmul_precision("highest"):
        if is_low_rank(leaf) and leaf.axes == owner.axes:
            left = jnp.swapaxes(u, -1, -2) @ leaf.u.astype(wide)
            right = leaf.vt.astype(wide) @ jnp.swapaxes(vt, -1, -2)
            core = left @ leaf.s.astype(wide) @ right
        else:
            dense = leaf.materialize() if is_low_rank(leaf) else leaf
            matrix = owner.axes.to_matrix(dense.astype(wide))
            core = jnp.swapaxes(u, -1, -2) @ matrix @ jnp.swapaxes(vt, -1, -2)
    core = core.astype(leaf.dtype)
    return dataclasses.replace(
        owner, u=jnp.copy(owner.u), s=core, vt=jnp.copy(owner.vt)
    )


def followed(
    trees: PyTree, before: PyTree, params: PyTree, layout: Layout | None, run: Run
) -> PyTree:
    """Host side: `rebase(trees, params)` after an event, by one compiled program.

    Args:     before: the params before the event. layout: where the result lies; by
              default `Layout(mesh)` of the params' mesh, if they lie on one.
    Raises:   ValueError: a tree has a core, without its bases, in the place of a leaf.
    """
    owners = leaves_by_path(params)
    old = leaves_by_path(before)
    flat, treedef = jax.tree_util.tree_flatten_with_path(trees, is_leaf=is_low_rank)
    places = [owner_of(path, owners) for path, _ in flat]
    for (path, leaf), place in zip(flat, places, strict=True):
        node: Any = old.get(place)
        if (
            is_low_rank(node)
            and not is_low_rank(leaf)
            and getattr(leaf, "shape", None) == node.s.shape
        ):
            raise ValueError(
                f"{path_name(path)} of `follow` looks like the core of "
                f"{path_name(place)}, whose bases it does not have: keep a copy of the "
                "params there, not of oialr_jax.transform.trainable(params)"
            )
    moving = [
        i
        for i, ((_, leaf), place) in enumerate(zip(flat, places, strict=True))
        if _moves(leaf, owners.get(place))
    ]
    if not moving:
        return trees
    mesh = mesh_of(jax.tree.leaves(params))
    if layout is None and mesh is not None:
        layout = Layout(mesh)
    where = None
    if layout is not None:
        at = leaves_by_path(layout(params))
        where = tuple(tuple(jax.tree.leaves(at[places[i]])) for i in moving)
    found = [flat[i][1] for i in moving], [owners[places[i]] for i in moving]
    leaves = [leaf for _, leaf in flat]
    for i, new in zip(
        moving, run.call(_followed, *without_identity(found), where=where), strict=True
    ):
        if is_low_rank(new):
            new = dataclasses.replace(new, basis=owners[places[i]].basis)
        leaves[i] = new
    return jax.tree.unflatten(treedef, leaves)


@functools.partial(jax.jit, static_argnames="where")
def _followed(
    leaves: Sequence[Array | LowRank],
    owners: Sequence[Array | LowRank],
    where: tuple[Any, ...] | None,
) -> list[Any]:
    new = [_brought(leaf, owner) for leaf, owner in zip(leaves, owners, strict=True)]
    if where is None:
        return new
    flat, treedef = jax.tree.flatten(new)
    flat = jax.lax.with_sharding_constraint(flat, [x for each in where for x in each])
    return jax.tree.unflatten(treedef, flat)


class Identities:
    """Host side: removes the identities of bases from the arguments of a compiled step.

    And restores them in its results, so that a step is compiled once for all bases of a
    shape.
    """

    def __init__(self) -> None:
        """Nothing has been seen."""
        self._given: Any = None  # structures: with identities, without if they differ
        self._returned: Any = None  # structures: without identities, with them
        self._owners: dict[Any, Any] = {}

    def off(self, given: PyTree, params: PyTree, event: str) -> PyTree:
        """`given`, (state, args, kwargs), as the compiled step is to see it.

        Raises:   ValueError: a node that belongs to a parameter, by its path and axes,
                  is not in its bases, but in those from before `event`.
        """
        leaves, treedef = jax.tree.flatten(given)
        if self._given is None or self._given[0] != treedef:
            nothing = jax.tree.map(lambda _: None, params)  # holds no arrays
            self._owners = leaves_by_path(nothing)
            plain: Any = jax.tree.structure(bare(given, params, event))
            self._given = treedef, None if plain == treedef else plain
            self._returned = None
        plain = self._given[1]
        return given if plain is None else jax.tree.unflatten(plain, leaves)

    def on(self, returned: PyTree) -> PyTree:
        """What the compiled step returned, with the identities of its bases."""
        if self._given[1] is None:
            return returned
        leaves, treedef = jax.tree.flatten(returned)
        if self._returned is None or self._returned[0] != treedef:
            named = _named(returned, self._owners)
            self._returned = treedef, jax.tree.structure(named)
        return jax.tree.unflatten(self._returned[1], leaves)


def _node_of(path: Path, leaf: Any, owners: Mapping[Any, Any]) -> Any:
    """The parameter's node that a node elsewhere belongs to, if there is one."""
    owner: Any = owners.get(owner_of(path, owners)) if is_low_rank(leaf) else None
    return owner if is_low_rank(owner) and owner.axes == leaf.axes else None


def bare(given: PyTree, params: PyTree, event: str) -> PyTree:
    """(state, args, kwargs) without the identities of bases that params have too.

    Raises:   ValueError: a node that belongs to a parameter, by its path and axes, is
              not in its bases, but in those from before `event`.
    """
    owners = leaves_by_path(params)

    def plain(path: Path, leaf: Any) -> Any:
        owner = _node_of(path, leaf, owners)
        if owner is None:
            return leaf
        if leaf.basis != owner.basis:
            raise ValueError(_stale(path, event))
        return dataclasses.replace(leaf, basis=Basis(0))

    return jax.tree_util.tree_map_with_path(plain, given, is_leaf=is_low_rank)


def _named(returned: PyTree, owners: Mapping[Any, Any]) -> PyTree:
    def named(path: Path, leaf: Any) -> Any:
        owner = _node_of(path, leaf, owners)
        if owner is None or leaf.basis:
            return leaf
        return dataclasses.replace(leaf, basis=owner.basis)

    return jax.tree_util.tree_map_with_path(named, returned, is_leaf=is_low_rank)


def _stale(path: Path, event: str) -> str:
    """What is wrong with a node of (state, args, kwargs), and the line to change."""
    part, rest = path[0].idx, path[1:]
    name = path_name(rest)
    if part == 0:
        field = path_name(rest[:1])
        return (
            f"state.{name} is in bases from "
            f"before {event}: give adaptive(..., follow=({field!r},)), or bring it "
            f"along: state.replace({field}=oialr_jax.following.rebase(state.{field}, "
            "state.params))"
        )
    what = f"argument {rest[0].idx + 2}" if part == 1 else f"`{rest[0].key}`"
    return (
        f"{what} has {path_name(rest[1:])} in bases from before {event}: keep this "
        "tree in the state and name its field in adaptive(..., follow=...); one that "
        "is only evaluated can be given as oialr_jax.materialize(tree), one that was "
        "left behind be brought along by oialr_jax.following.rebase(tree, state.params)"
    )
