"""The drop-in for jax.jit(train_step): schedule and surgery around a compiled step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from oialr_jax.lowrank import is_low_rank, named_leaves
from oialr_jax.matrices import Matrix
from oialr_jax.moments import MomentRule
from oialr_jax.schedule import RankRule, Schedule
from oialr_jax.surgery import Report, factorize, truncate


def adaptive(
    step: Callable[..., Any],
    tx: optax.GradientTransformation,
    matrices: Sequence[Matrix],
    schedule: Schedule,
    rule: RankRule = RankRule(),  # noqa: B008 -- frozen
    *,
    moment_rule: MomentRule = MomentRule(),  # noqa: B008 -- frozen
    steps_per_call: int = 1,
    **jit_options: Any,
) -> "AdaptiveStep":
    """Host side: `step(state, *args)`, compiled, with OIALR's events between the calls.

    `state` is anything with `.step`, `.params`, `.opt_state` and `.replace`, such as
    Flax's TrainState. Before the batch of a step at which `schedule` has an event, the
    `matrices` are converted (once) and the last executed of them truncated; the step is
    then compiled for the new shapes, which blocks. What happens at a step depends on
    the step number and the params alone, so a run resumed from a saved state repeats
    the uninterrupted one.

    Args:     matrices: in execution order, as `find_matrices` and `select` give them.
              steps_per_call: by how much one call raises `state.step`.
              jit_options: passed to `jax.jit` (donate_argnums, static_argnames, ...).
    Raises:   ValueError: no matrices, or `steps_per_call` below 1; on call, what
              `factorize` and `truncate` raise, and a step whose `state.step` does not
              advance by `steps_per_call`.
    """
    if not matrices:
        raise ValueError("`matrices` is empty: there is nothing to hold in low rank")
    if steps_per_call < 1:
        raise ValueError(f"`steps_per_call` must be at least 1, got {steps_per_call}")
    return AdaptiveStep(
        step,
        tx,
        tuple(matrices),
        schedule,
        rule,
        moment_rule,
        steps_per_call,
        jit_options,
    )


class AdaptiveStep:
    """A compiled training step whose params change shape between calls.

    `reports` lists what each event of this process did; `compilations` counts how often
    the step was traced and compiled. Neither decides anything.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        tx: optax.GradientTransformation,
        matrices: tuple[Matrix, ...],
        schedule: Schedule,
        rule: RankRule,
        moment_rule: MomentRule,
        steps_per_call: int,
        jit_options: dict[str, Any],
    ) -> None:
        """Use `adaptive`, which checks its arguments."""
        self.reports: list[Report] = []
        self.compilations = 0
        self._tx = tx
        self._matrices = matrices
        self._schedule = schedule
        self._rule = rule
        self._moment_rule = moment_rule
        self._stride = steps_per_call
        self._last: tuple[Any, int] = (None, 0)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.compilations += 1  # runs when jit traces, once per set of shapes
            return step(*args, **kwargs)

        self._jitted = jax.jit(counted, **jit_options)

    def __call__(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        """What the step returns: the new state, alone or first in a tuple."""
        number = self._number(state)
        update = self._schedule.due(number, number - self._stride)
        if self._schedule.converted(number) and update is not None:
            state = self._event(state, number, update)
        out = self._jitted(state, *args, **kwargs)
        new_state = out[0] if isinstance(out, tuple) and not _is_state(out) else out
        if self._last[0] is None and int(new_state.step) != number + self._stride:
            raise ValueError(
                f"one call took `state.step` from {number} to {int(new_state.step)}; "
                f"`steps_per_call` is {self._stride}"
            )
        self._last = (new_state, number + self._stride)
        return out

    def _number(self, state: Any) -> int:
        """state.step, read from the device only for a state that is not our last.

        Reading it for every call would make the host wait for the step before.
        """
        known, number = self._last
        if state is known:
            return number
        return int(state.step)

    def _event(self, state: Any, number: int, update: int) -> Any:
        params, opt_state = state.params, state.opt_state
        leaves = named_leaves(params)
        dense = [x for x in self._matrices if not is_low_rank(leaves.get(x.path))]
        if dense:
            params, opt_state, report = factorize(
                params, opt_state, dense, tx=self._tx, moment_rule=self._moment_rule
            )
            self.reports.append(dataclasses.replace(report, step=number))
            leaves = named_leaves(params)
        count = self._schedule.treated(update, len(self._matrices))
        paths = [
            x.path
            for x in self._matrices[len(self._matrices) - count :]
            if is_low_rank(leaves[x.path])
        ]
        if paths:
            params, opt_state, report = truncate(
                params,
                opt_state,
                self._rule,
                tx=self._tx,
                paths=paths,
                moment_rule=self._moment_rule,
            )
            self.reports.append(dataclasses.replace(report, step=number))
        return state.replace(params=params, opt_state=opt_state)


def _is_state(out: Any) -> bool:
    return hasattr(out, "params") and hasattr(out, "opt_state")
