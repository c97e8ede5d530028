"""factored(fn): the walk with LowRank leaves, so that fn runs on them unmodified."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from oialr_jax import contract, cost, effects, interpret, tracing
from oialr_jax.dataflow import abstract
from oialr_jax.lowrank import Axes, is_marked, is_node, unique_names
from oialr_jax.views import Use, View, as_array, context, is_same


def factored(
    fn: Callable[..., Any],
    *,
    order: cost.Order | str | None = None,
    rates: cost.Rates | None = None,
) -> Callable[..., Any]:
    """fn, running on dense, low-rank or mixed params without being rewritten.

    The function is traced with dense abstract values in the place of nodes (LowRank, or
    another form: `merge`, `adapters`), and each dot product or convolution that meets
    one is contracted with its factors in the cheapest order. Frozen bases get no
    gradient. Without nodes this is fn itself. `explain` shows the chosen orders and
    why.

    There are rules for dense layers, einsum, convolutions (1-D, 2-D, strided, dilated,
    transposed), attention, scanned and rematerialised stacks, LSTM and GRU cells,
    experts by index or `ragged_dot`; for weights that are first cast, transposed,
    reshaped, sliced, joined, stacked or scaled, on either side of a product; and for
    weights that are used twice. Where no rule applies (a sort of a weight, say) the
    leaf is materialised: correct, but at dense cost, and a warning names the leaf and
    the primitive, once for each pair.

    Arguments that are not arrays (flags, strings, functions) are passed as they are.
    The result composes with jit, grad, vmap, remat, scan, pmap and shard_map. A
    `jax.custom_vjp` rule is kept: its gradient for the dense weight is projected. A
    `jax.custom_jvp` function gets the materialised leaf.

    Args:     order: "chain", "merged" or "rebuilt" (the authors' way) for every leaf,
              to compare; None picks the cheapest for each use.
              rates: of the device, measured; by default those in `cost.RATES` for JAX's
              default backend, or FLOPs alone for a backend that is not there.
    Raises:   ValueError: an `order` that is none of a low-rank leaf.

    >>> from oialr_jax.lowrank import Axes, LowRank
    >>> q, _ = jnp.linalg.qr(jnp.arange(8.0).reshape(4, 2) ** 2)
    >>> w = LowRank(q, jnp.eye(2), q.T, Axes((4, 4), (), (0,), (1,)))
    >>> product = factored(lambda w, x: x @ w)(w, q.T)
    >>> bool(jnp.allclose(product, q.T @ w.materialize(), atol=1e-6))
    True
    """
    reported: set[tuple[str, str]] = set()
    pick = picker(order, rates)

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        flat = jax.tree.leaves((args, kwargs), is_leaf=_is_held)
        if not any(map(_is_held, flat)):
            return fn(*args, **kwargs)
        for calls in {id(x.calls): x.calls for x in flat if is_marked(x)}.values():
            calls.append((fn, *_shapes((args, kwargs))))
        traced = tracing.trace(fn, args, kwargs, _is_held, share=True)
        leaves = [leaf for _, leaf in traced.leaves]
        evaluate = functools.partial(contracted, traced, pick=pick, reported=reported)
        if traced.arguments is None:
            return traced.rebuild(evaluate(leaves))
        if any(
            is_node(leaves[i]) for i in traced.replaced.values()
        ):  # an error comes before anything runs
            jax.eval_shape(evaluate, leaves)
        effects.write(
            (args, kwargs), traced.arguments(traced.jaxpr.out_avals), dry=True
        )
        outputs = evaluate(leaves)
        effects.write((args, kwargs), traced.arguments(outputs))
        return traced.rebuild(outputs)

    return run


def _is_held(x: object) -> bool:
    return is_node(x) or is_marked(x)


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: abstract(x) if hasattr(x, "dtype") else x, tree)


class Choice(NamedTuple):
    """The order in which one use of a low-rank leaf, an equation, is contracted."""

    path: str
    kind: str
    load: cost.Workload
    itemsize: int
    order: cost.Order
    place: tuple[int, ...]


Pick = Callable[[cost.Workload, int], cost.Order]


def picker(order: cost.Order | str | None, rates: cost.Rates | None) -> Pick:
    """The order of a use from its workload and the size of an entry in bytes."""
    if order is not None and order not in cost.LOW_RANK:
        known = ", ".join(cost.LOW_RANK)
        raise ValueError(f"`order` must be one of {known}, got {order!r}")
    forced = None if order is None else cost.Order(order)

    def pick(load: cost.Workload, itemsize: int) -> cost.Order:
        if forced is not None:
            return forced
        measured = cost.RATES.get(jax.default_backend()) if rates is None else rates
        return cost.cheapest(load, measured, itemsize)

    return pick


def contracted(
    traced: tracing.Traced,
    leaves: Sequence[Any],
    pick: Pick,
    reported: set[tuple[str, str]],
    choices: list[Choice] | None = None,
    rows: Callable[[Any], int] | None = None,
) -> list[Any]:
    """The outputs of a traced function on `leaves`; each choice is appended.

    An argument that holds no low-rank leaf is taken for data, which gets no gradient.
    `rows` gives the number of rows to decide by where that may be a symbol.
    """
    leaves = [x.materialize() if _is_array_alone(x) else x for x in leaves]
    names = unique_names(path for path, _ in traced.leaves)
    trained = {
        tuple(path[:2])
        for (path, _), leaf in zip(traced.leaves, leaves, strict=True)
        if is_node(leaf)
    }
    nodes = {
        name: leaf for name, leaf in zip(names, leaves, strict=True) if is_node(leaf)
    }
    axes = {name: node.axes for name, node in nodes.items()}
    handler = _Contraction(axes, pick, reported, choices, rows)
    values = [
        contract.view_of(leaf, name) if is_node(leaf) else _plain(leaf)
        for name, leaf in zip(names, leaves, strict=True)
    ]
    fixed = [tuple(path[:2]) not in trained for path, _ in traced.leaves]
    outputs = interpret.evaluate(traced.jaxpr, values, handler, fixed)
    for output, leaf in traced.replaced.items():
        if is_marked(leaves[leaf]):
            outputs[output] = leaves[leaf]
        if not is_node(leaves[leaf]):
            continue
        same = [  # an object that is in the arguments twice was one for the function
            value
            for value, (_, given) in zip(values, traced.leaves, strict=True)
            if given is traced.leaves[leaf][1]
        ]
        if not any(is_same(outputs[output], value) for value in same):
            raise TypeError(
                f"{_said(names[leaf])} is in low rank and the function replaces it in "
                "place: name it in `exclude` of `select`, or in a loss compute from it "
                "and leave it as it is"
            )
        outputs[output] = leaves[leaf]
    return [as_array(out, handler, "output") for out in outputs]


def _plain(leaf: Any) -> Any:
    return leaf.array if is_marked(leaf) else leaf


def _is_array_alone(leaf: Any) -> bool:
    """Whether a leaf is a node without factors: an array in another dtype."""
    return is_node(leaf) and not hasattr(leaf, "axes")


def _said(name: str) -> str:
    return tracing.shown(name) or "the argument"


_CONTRACTIONS = {"dot": contract.dot, "conv": contract.conv, "ragged": contract.ragged}


class _Contraction:
    """Handler whose views hold the factors of a LowRank leaf."""

    def __init__(
        self,
        axes: dict[str, Axes],
        pick: Pick,
        reported: set[tuple[str, str]],
        choices: list[Choice] | None,
        rows: Callable[[Any], int] | None,
    ) -> None:
        self.axes = axes
        self.rows = rows
        self.pick = pick
        self.reported = reported
        self.choices = choices

    def materialize(self, view: View) -> Array:
        return contract.materialize(view, self.axes[view.path])

    def along(
        self, view: View, axis: int, change: Callable[[Array, int], Array]
    ) -> tuple[Any, ...]:
        return contract.along(view, self.axes[view.path], axis, change)

    def stacks(self, view: View, axis: int) -> bool:
        return axis in self.axes[view.path].stack

    is_stack = stacks

    def scale(self, view: View, factor: Array, axes: tuple[int, ...]) -> View | None:
        return contract.scaled(view, self.axes[view.path], factor, axes)

    def sum_squares(self, view: View, dims: tuple[int, ...]) -> Array | None:
        return contract.sum_squares(view, self.axes[view.path], dims)

    def order(
        self, view: View, x: Array, factors: contract.Factors, use: Use
    ) -> cost.Order:
        """In which order a use is contracted.

        Two factors are one chain, which is taken where the number of rows is a symbol,
        as in `jax.export`, too. On a base W is not rebuilt: the way back would be by
        a gradient of its shape.
        """
        if factors.core is None or not isinstance(use.rows, int):
            return cost.Order.CHAIN
        load = contract.workload(x, factors, use)
        itemsize = jnp.promote_types(x.dtype, view.dtype).itemsize
        order = self.pick(load, itemsize)
        if order == cost.Order.REBUILT and contract.base_of(view) is not None:
            order = cost.Order.MERGED
        if self.choices is not None:
            self.choices.append(
                Choice(view.path, use.kind, load, itemsize, order, use.place)
            )
        return order

    def contract(
        self, view: View, x: Array, use: Use, eqn: Any, rest: Sequence[Any] = ()
    ) -> Array | None:
        factors = contract.turned(view, self.axes[view.path], use)
        if factors is None:
            return None
        if self.rows is not None:
            use = use._replace(rows=self.rows(use.rows))
        few = isinstance(use.rows, int) and use.rows < factors.first.shape[-1]
        if few and contract.permutes(
            view, self.axes[view.path], use
        ):  # else into a factor, as `turned`
            with context(eqn):
                return contract.permuted(x, factors, view, use, eqn.params)
        order = self.order(view, x, factors, use)
        contraction: Any = _CONTRACTIONS[use.kind]
        with context(eqn):
            out: Array = contraction(x, factors, use, eqn.params, order, *rest)
        base = contract.base_of(view)
        if base is None:
            return out
        return out + contract.on_base(x, view, base, use, eqn, rest)

    def unknown(self, view: View, primitive: str) -> None:
        if (view.path, primitive) not in self.reported:
            self.reported.add((view.path, primitive))
            warnings.warn(
                f"{_said(view.path)} is materialised to its dense shape "
                f"{self.axes[view.path].shape}: "
                f"no low-rank rule for `{primitive}`",
                stacklevel=2,
            )
