"""LowRank nodes in `flax.serialization`, where Flax is installed."""

from typing import Any

import numpy as np

from oialr_jax.lowrank import Basis, LowRank

_FACTORS = ("u", "s", "vt")


def register() -> None:
    """Register LowRank nodes with `to_state_dict`, `to_bytes` and their inverses.

    Without Flax installed this does nothing.
    """
    try:
        from flax import serialization
    except ImportError:
        return
    serialization.register_serialization_state(
        LowRank,
        lambda node: (
            {name: getattr(node, name) for name in _FACTORS}
            | {"basis": np.uint32(node.basis)}
        ),
        lambda node, state: _restored(
            node, state, serialization.current_path().removeprefix("./")
        ),
        override=True,
    )


def _restored(node: LowRank, state: Any, path: str) -> LowRank:
    """The node with the factors of a state, of whatever rank; its axes stay."""
    if not isinstance(state, dict) or set(state) - {"basis"} != set(_FACTORS):
        raise ValueError(
            f"{path} is in low rank in the target and not in what is restored: restore "
            "into dense params, then `factorize`"
        )
    u, s, vt = (state[name] for name in _FACTORS)
    stack, m, n, r = node.axes.l, node.axes.m, node.axes.n, s.shape[-1]
    wanted = ((*stack, m, r), (*stack, r, r), (*stack, r, n))
    shapes = tuple(tuple(factor.shape) for factor in (u, s, vt))
    if shapes != wanted:
        raise ValueError(
            f"{path}: factors of shapes {shapes} do not fit the target's array of "
            f"shape {node.shape}: they must be {wanted}"
        )
    return LowRank(u, s, vt, node.axes, Basis(state.get("basis", 0)))
