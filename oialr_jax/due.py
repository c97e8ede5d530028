"""Which matrices an update of the schedule treats: the one place that chooses them."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

from oialr_jax.matrices import Matrix
from oialr_jax.schedule import RankRule, Schedule


class Due(NamedTuple):
    """What an update treats.

    `held` are the matrices that are to be in low rank from now on, and `cut` those of
    them whose ranks the rule chooses anew. `state` is the training state, in which the
    chooser may have noted what the next update needs.
    """

    state: Any
    held: tuple[Matrix, ...]
    cut: tuple[Matrix, ...]


@runtime_checkable
class Chooser(Protocol):
    """What `adaptive(due=)` takes: asked at each update which matrices it treats.

    `looks_at_state` is False where update number and matrices alone decide. Such a
    chooser is also asked ahead, to compile for the next update, and again at an event
    that finds no ranks waiting; `state` is None then and comes back as it is.
    """

    looks_at_state: bool

    def check(self, opt_state: Any, rule: RankRule) -> None:
        """Raise what would fail at an update."""

    def __call__(self, state: Any, update: int, matrices: Sequence[Matrix]) -> Due:
        """What update number `update`, counted from 0, treats."""


@final
@dataclasses.dataclass(frozen=True)
class LastExecutedFirst:
    """OIALR's order: all are held, and each update cuts a share more of them.

    With a budget, which all matrices share, each update cuts all of them.
    """

    schedule: Schedule
    rule: RankRule
    looks_at_state = False

    def check(self, opt_state: Any, rule: RankRule) -> None:
        """Nothing can fail."""

    def __call__(self, state: Any, update: int, matrices: Sequence[Matrix]) -> Due:
        """The last executed matrices, as many as `Schedule.treated` says."""
        held = tuple(matrices)
        if self.rule.budget is not None:
            return Due(state, held, held)
        count = self.schedule.treated(update, len(held))
        return Due(state, held, held[len(held) - count :])
