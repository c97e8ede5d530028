"""factored(fn): the walk with LowRank leaves, so that fn runs on them unmodified."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from oialr_jax import contract, interpret
from oialr_jax.lowrank import Axes, is_low_rank, unique_names


def factored(fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn, running on dense, low-rank or mixed params without being rewritten.

    The function is traced with dense abstract values in the place of LowRank leaves,
    and each dot product or convolution that meets one is contracted with its factors in
    the cheapest order. Frozen bases get no gradient. Where no rule applies the leaf is
    materialised: right, but at dense cost; a warning names the leaf and the primitive,
    once per leaf and primitive. Without LowRank leaves this is fn itself.

    Arguments that are not arrays (flags, strings, functions) stay as they are. The
    result composes with jit, grad, vmap, remat, scan, pmap and shard_map. Inside
    `jax.custom_jvp` and `jax.custom_vjp` functions a leaf is materialised at the
    boundary, because the custom rule is a rule about the dense array.

    >>> from oialr_jax import Axes, LowRank
    >>> q, _ = jnp.linalg.qr(jnp.arange(8.0).reshape(4, 2) ** 2)
    >>> w = LowRank(q, jnp.eye(2), q.T, Axes((4, 4), (), (0,), (1,)))
    >>> product = factored(lambda w, x: x @ w)(w, q.T)
    >>> bool(jnp.allclose(product, q.T @ w.materialize(), atol=1e-6))
    True
    """
    reported: set[tuple[str, str]] = set()

    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs), is_leaf=is_low_rank)
        if not any(map(is_low_rank, leaves)):
            return fn(*args, **kwargs)
        traced = interpret.trace(fn, args, kwargs, is_low_rank)
        names = unique_names(path for path, _ in traced.leaves)
        nodes = {
            name: leaf
            for name, (_, leaf) in zip(names, traced.leaves, strict=True)
            if is_low_rank(leaf)
        }
        handler = _Contraction({k: v.axes for k, v in nodes.items()}, reported)
        values = [
            contract.view_of(leaf, name) if is_low_rank(leaf) else leaf
            for name, (_, leaf) in zip(names, traced.leaves, strict=True)
        ]
        outputs = interpret.evaluate(traced.jaxpr, values, handler)
        return traced.rebuild(
            [interpret.as_array(out, handler, "output") for out in outputs]
        )

    return run


class _Contraction:
    """Handler whose views hold the factors of a LowRank leaf."""

    def __init__(self, axes: dict[str, Axes], reported: set[tuple[str, str]]) -> None:
        self.axes = axes
        self.reported = reported

    def materialize(self, view: interpret.View) -> Array:
        return contract.materialize(view, self.axes[view.path])

    def scale(self, view: interpret.View, factor: Any) -> interpret.View:
        u, s, vt = view.data
        return view.replace(data=(u, s * jnp.asarray(factor, s.dtype), vt))

    def unstack(self, view: interpret.View, axis: int) -> tuple[Array, ...] | None:
        return contract.unstack(view, self.axes[view.path], axis)

    def contract(
        self, view: interpret.View, x: Array, use: interpret.Use, eqn: Any
    ) -> Array | None:
        factors = contract.turned(view, self.axes[view.path], use)
        if factors is None:
            return None
        with interpret.context(eqn):
            if use.kind == "conv":
                aval = eqn.outvars[0].aval
                out = contract.conv(x, factors, use, eqn.params, aval)
            else:
                out = contract.dot(x, factors, use, eqn.params)
        if out is None:  # rebuilding W is the cheapest order: no cause for a warning
            operands = [x, x]
            operands[use.position] = self.materialize(view)
            return interpret.bind(eqn, operands)[0]
        return out

    def unknown(self, view: interpret.View, primitive: str) -> None:
        if (view.path, primitive) not in self.reported:
            self.reported.add((view.path, primitive))
            warnings.warn(
                f"{view.path.split('/', 2)[-1]} is materialised to its dense shape "
                f"{view.leaf_shape}: "
                f"no low-rank rule for `{primitive}`",
                stacklevel=2,
            )
