"""Shows what a program does with its matrices: order, FLOPs and why, by layer."""

import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax

from oialr_jax import cost, tracing
from oialr_jax.factored import Choice, contracted, picker
from oialr_jax.lowrank import (
    abstract_low_rank,
    check_forms,
    is_low_rank,
    named_leaves,
)
from oialr_jax.matrices import Skipped, find_matrices, skipped_lines


class Line(NamedTuple):
    """One use of a matrix in a training step.

    `flops` are those of the chosen order, `dense_flops` those of the dense matrix, both
    forward and backward. `why` has the work of every order over that of dense:
    estimated time if the rates of the device are known, else FLOPs. A dense leaf has no
    `rank`, and no order to choose.
    """

    path: str
    kind: str
    rows: int
    m: int
    n: int
    rank: int | None
    order: str
    flops: int
    dense_flops: int
    why: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The matrices of a function in the order of their use; prints as a table.

    `skipped` are the leaves of two or more axes that are no matrices, as in
    `find_matrices`.
    """

    lines: tuple[Line, ...]
    skipped: tuple[Skipped, ...] = ()

    @property
    def flops(self) -> int:
        """Of all matrices listed, forward and backward."""
        return sum(line.flops for line in self.lines)

    @property
    def dense_flops(self) -> int:
        """Of the same matrices held dense."""
        return sum(line.dense_flops for line in self.lines)

    def __str__(self) -> str:
        width = max([len(line.path) for line in self.lines] + [5])
        head = f"{'layer':<{width}}  kind     rows        shape  rank  order     GFLOP"
        table = [f"{head}  /dense  why"]
        for x in self.lines:
            rank = "" if x.rank is None else x.rank
            table.append(
                f"{x.path:<{width}}  {x.kind:<4} {x.rows:>8} {f'{x.m}x{x.n}':>12} "
                f"{rank:>5}  {x.order:<7} {x.flops / 1e9:>7.3f} "
                f"{x.flops / max(1, x.dense_flops):>7.1%}  {x.why}"
            )
        share = self.flops / max(1, self.dense_flops)
        table.append(f"{self.flops / 1e9:.3f} GFLOP a step, {share:.1%} of dense")
        return "\n".join([*table, *skipped_lines(self.skipped)])


def explain(
    fn: Callable[..., Any],
    params: Any,
    *args: Any,
    order: cost.Order | str | None = None,
    rates: cost.Rates | None = None,
    axis_env: Iterable[tuple[str, int]] = (),
    **kwargs: Any,
) -> Explanation:
    """What `factored(fn)` does with each matrix of fn(params, *args), and why.

    The function is traced, never run, so arguments may be `jax.ShapeDtypeStruct`, also
    within LowRank nodes. Matrices alone are counted; a body of a scan counts once. An
    argument without a low-rank or trained matrix is data and gets no gradient.

    Args:     order, rates: as for `factored`. axis_env: as for `find_matrices`.
    Raises:   ValueError: an `order` that is none of a low-rank leaf; a mapped axis that
              `axis_env` does not name; params that were merged or stand on a base.
    """
    check_forms(params, what="explain takes")
    pick = picker(order, rates)
    if rates is None:
        rates = cost.RATES.get(jax.default_backend())
    leaves = named_leaves(params)
    axes = tuple(dict(axis_env).items())
    matrices = find_matrices(fn, params, *args, axis_env=axes, **kwargs)
    dense = {
        found.path: found.axes
        for found in matrices
        if not is_low_rank(leaves[found.path])
    }

    params = abstract_low_rank(params, dense)
    traced = tracing.trace(fn, (params, *args), kwargs, is_low_rank, axis_env=axes)
    choices: list[Choice] = []

    def walk(leaves: list[Any]) -> list[Any]:
        return contracted(traced, leaves, pick, set(), choices)

    with warnings.catch_warnings():  # of leaves that no rule contracts: `factored` says
        warnings.simplefilter("ignore")
        jax.make_jaxpr(walk, axis_env=axes)([leaf for _, leaf in traced.leaves])
    once = {(choice.path, choice.place): choice for choice in choices}
    lines = tuple(_line(x, dense, rates) for x in once.values())
    return Explanation(lines, matrices.skipped)


def _line(choice: Choice, dense: Collection[str], rates: cost.Rates | None) -> Line:
    load = choice.load
    path = tracing.shown(choice.path)
    order = cost.Order.DENSE if path in dense else choice.order
    full = cost.flops(cost.Order.DENSE, load).total

    def share(order: cost.Order) -> float:
        if rates is None:
            return cost.flops(order, load).total / max(1, full)
        work, base = (
            cost.seconds(x, load, rates, choice.itemsize)
            for x in (order, cost.Order.DENSE)
        )
        return work / base if base else 0.0

    parts = ", ".join(f"{x.value} {share(x):.2f}" for x in cost.LOW_RANK)
    return Line(
        path=path,
        kind=choice.kind,
        rows=load.rows,
        m=load.m,
        n=load.n,
        rank=None if path in dense else load.rank,
        order=order.value,
        flops=cost.flops(order, load).total,
        dense_flops=full,
        why="" if path in dense else f"{'time' if rates else 'FLOPs'}: {parts}",
    )
