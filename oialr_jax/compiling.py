"""What a user's `jit` is given: its own options, and shapes in the place of arrays."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def options_for(jit: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options for `jit`, which donates the state where nothing else is said.

    Raises:   ValueError: donation is asked for in the words of another `jit`.
    """
    known = inspect.signature(jit).parameters
    if filters(jit):
        for name in ("donate_argnums", "donate_argnames", "static_argnums"):
            if name in options:
                raise ValueError(
                    f"`{name}` is no option of {getattr(jit, '__name__', jit)}: it "
                    'donates by donate="all" or "all-except-first", and takes what '
                    "is no array as static"
                )
        return options
    given = {*options, *getattr(jit, "keywords", {})}
    some = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in known.values())
    if given & {"donate_argnums", "donate_argnames"}:
        return options
    if some or "donate_argnums" in known:
        return {"donate_argnums": 0} | options
    return options


def filters(jit: Callable[..., Any]) -> bool:
    """Whether `jit` is `eqx.filter_jit`, or speaks its language."""
    known = inspect.signature(jit).parameters
    return "donate" in known and "donate_argnums" not in known


def zeros_of(x: Any) -> Any:
    """An array of this shape, in the place of it."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    if x.weak_type:  # a Python number makes one
        return jnp.broadcast_to(jnp.asarray(x.dtype.type(0).item()), x.shape)
    return jnp.zeros(x.shape, x.dtype, device=x.sharding)


def dtype_of(x: Any) -> Any:
    """The dtype of an array under `jax.jit`, which has int64 of NumPy only with x64."""
    of_numpy = isinstance(x, np.ndarray | np.generic)
    return jax.dtypes.canonicalize_dtype(x.dtype) if of_numpy else x.dtype


def shape_of(x: Any) -> Any:
    """The shape of a JAX array as `jax.jit` sees it; anything else as it is."""
    if not isinstance(x, jax.Array):
        return x
    return jax.ShapeDtypeStruct(
        x.shape,
        x.dtype,
        sharding=x.sharding if x.committed else None,
        weak_type=getattr(x, "weak_type", False),  # keys have none
    )
