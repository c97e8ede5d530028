"""When and on what a run looks at curvature: a few batches before every cut."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, final

import jax

from oialr_jax.curvature import WIDEST, curvature
from oialr_jax.factored import factored
from oialr_jax.matrices import Matrix
from oialr_jax.schedule import Schedule
from oialr_jax.weighted import Statistics


@final
@dataclasses.dataclass(frozen=True)
class Weighing:
    """What the cuts of a run are weighed by: the curvature of a loss, and when.

    The `batches` up to and including that of a cut are looked at before they are
    trained on, each at the cost of one to one and two thirds of a step
    (train/results/README.md). The sums wait in `state.curvature`, a field that the
    state has to have, None between the cuts. A checkpoint holds them.

    Args:     loss: of (state, *args), the state and what the step gets beside it, for
              dense params: a mean over `terms`. With labels of the data it is the
              empirical Fisher; with labels that the loss draws from the prediction (a
              key in the state) the true one.
              terms, has_aux, independent_rows, widest: as in `curvature`; `terms` gets
              what the step gets beside the state.
    Raises:   ValueError: `batches` below 1.
    """

    loss: Callable[..., Any]
    batches: int = 8
    terms: int | Callable[..., Any] | None = None
    has_aux: bool = False
    independent_rows: bool = False
    widest: int = WIDEST

    def __post_init__(self) -> None:
        """Refuse settings out of range."""
        if self.batches < 1:
            raise ValueError(f"`batches` must be at least 1, got {self.batches}")

    def value(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of one batch, with dense, low-rank or mixed params."""
        out = factored(self._loss)(*_parts(state, args), **kwargs)
        return out[0] if self.has_aux else out

    def statistics(
        self, matrices: Sequence[Matrix], state: Any, *args: Any, **kwargs: Any
    ) -> Statistics:
        """The sums of one batch."""

        def terms(*rest: Any, **kwargs: Any) -> Any:
            return self.terms(*rest[:-1], **kwargs) if callable(self.terms) else None

        run = curvature(
            self._loss,
            matrices,
            terms=terms if callable(self.terms) else self.terms,
            has_aux=self.has_aux,
            independent_rows=self.independent_rows,
            widest=self.widest,
        )
        return run(*_parts(state, args), **kwargs)

    def _loss(self, params: Any, *rest: Any, **kwargs: Any) -> Any:
        *args, others = rest
        return self.loss(others.replace(params=params), *args, **kwargs)

    def looks(self, schedule: Schedule, step: int, stride: int) -> bool:
        """Whether the batch of this step is one of those before a cut.

        Not while ranks that are chosen wait for their event: the sums are kept for it.
        """
        chosen = schedule.decided(step - stride, previous=-1)
        if chosen is not None and chosen != schedule.due(step - stride, previous=-1):
            return False
        return any(
            schedule.decided(t, t - stride) is not None
            or schedule.projected(t, t - stride)
            for t in range(step, step + self.batches * stride, stride)
        )


def _parts(state: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Params, the batch, and the rest of the state.

    The batch before the rest: its first array says how many examples there are.
    """
    return state.params, *args, state.replace(params=(), opt_state=(), curvature=None)


@jax.jit
def added(sums: Statistics, new: Statistics) -> Statistics:
    """The sums of one more batch."""
    return sums.add(new)
