"""When a basis has settled: each matrix is converted, and cut, once its own has."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oialr_jax.due import Due
from oialr_jax.lowrank import PyTree, without_identity
from oialr_jax.matrices import Matrix
from oialr_jax.schedule import RankRule
from oialr_jax.sharding import on_auto_axes
from oialr_jax.stability.comparison import compare
from oialr_jax.transform import trainable, with_trainable


class ReferenceState(NamedTuple):
    """State of `keep_reference`: what was trained, as it was at the last update."""

    reference: Any

    @staticmethod
    def crosses() -> Mapping[str, str]:
        """The reference turns with the bases, as weights do."""
        return {"reference": "params"}


def keep_reference() -> optax.GradientTransformation:
    """Optax: no change to the updates; its state has a copy of what is trained.

    `when_settled` compares the params with it, and renews it at each update of the
    schedule. A part of the chain, for all params, inside of `freeze_bases`. While
    matrices are dense it takes as much memory as they do.

    >>> tx = optax.chain(optax.adamw(3e-4), keep_reference())
    """

    def init(params: PyTree) -> ReferenceState:
        return ReferenceState(jax.tree.map(jnp.copy, params))

    def update(
        updates: PyTree, state: ReferenceState, params: PyTree | None = None
    ) -> tuple[PyTree, ReferenceState]:
        del params
        return updates, state

    return optax.GradientTransformation(init, update)


class Settled:
    """What `when_settled` returns.

    `scores` has (step, stability by path) of every update of this process, of a stack
    that of its least stable matrix. It decides nothing.
    """

    looks_at_state = True

    def __init__(self, threshold: float) -> None:
        """Use `when_settled`, which checks its argument."""
        self.threshold = threshold
        self.scores: list[tuple[int, dict[str, float]]] = []

    def check(self, opt_state: PyTree, rule: RankRule) -> None:
        """Raise what would fail at an update.

        Raises:   ValueError: there is a budget, or no reference in the state.
        """
        if rule.budget is not None:
            raise ValueError(
                "a `budget` is shared by all matrices, which `when_settled` treats "
                "one by one: give the rule a `cutoff`, or leave out `due`"
            )
        reference_of(opt_state)

    def __call__(self, state: Any, update: int, matrices: Sequence[Matrix]) -> Due:
        """Those whose basis has settled; in the state, the params as new reference."""
        matrices = tuple(matrices)
        found = jax.device_get(
            _stabilities(
                reference_of(state.opt_state), without_identity(state.params), matrices
            )
        )
        scores = {x.path: float(s) for x, s in zip(matrices, found, strict=True)}
        self.scores.append((int(jax.device_get(state.step)), scores))
        settled = tuple(x for x in matrices if scores[x.path] >= self.threshold)
        renewed = _with_reference(
            state.opt_state, jax.tree.map(jnp.copy, trainable(state.params))
        )
        return Due(state.replace(opt_state=renewed), settled, settled)


def when_settled(threshold: float = 0.98) -> Settled:
    """Host side: for `adaptive(due=)`, each matrix once its basis has settled.

    An update of the schedule treats the matrices whose basis has turned little since
    the previous update (the first one: since the optimizer state was initialised), by a
    `Stability.basis` of at least `threshold`. A dense one is converted then and a
    low-rank one truncated. The others wait for the next update; some may stay dense.
    `Schedule.layer_step` has no meaning.

        tx = freeze_bases(optax.chain(optax.adamw(3e-4), keep_reference()))
        step = adaptive(train_step, tx, matrices, schedule, due=when_settled(0.9))

    Args:     threshold: in [-1, 1]; 1 is a basis that stands still.
    Raises:   ValueError: `threshold` out of range; at the first step, an optimizer
              without `keep_reference`, or a rule with a budget.
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"`threshold` must be in [-1, 1], got {threshold}")
    return Settled(threshold)


def reference_of(opt_state: PyTree) -> PyTree:
    """What `keep_reference` has in an optimizer state.

    Raises:   ValueError: it is not in there.
    """
    for state in jax.tree.leaves(opt_state, is_leaf=_is_reference):
        if _is_reference(state):
            return state.reference
    raise ValueError(
        "`when_settled` compares the params with a reference: make the optimizer by "
        "freeze_bases(optax.chain(tx, oialr_jax.stability.keep_reference()))"
    )


def _with_reference(opt_state: PyTree, reference: PyTree) -> PyTree:
    return jax.tree.map(
        lambda x: ReferenceState(reference) if _is_reference(x) else x,
        opt_state,
        is_leaf=_is_reference,
    )


def _is_reference(x: object) -> bool:
    return isinstance(x, ReferenceState)


@on_auto_axes
@functools.partial(jax.jit, static_argnames="matrices")
def _stabilities(
    reference: PyTree, params: PyTree, matrices: tuple[Matrix, ...]
) -> list[Array]:
    """How stable the basis of each matrix is, of a stack the least stable one."""
    found = compare(with_trainable(params, reference), params, matrices)
    return [jnp.min(found[matrix.path].basis) for matrix in matrices]
