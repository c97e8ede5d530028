"""What would fail at the conversion fails on the first call, by shapes alone.

The step is traced once with every matrix at full rank. Where that fails, the mistake is
found by trying: the dense step, and the step with the trees beside the params in low
rank as well. A step that cannot be traced in this way at all is left alone.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from oialr_jax.compiling import dtype_of
from oialr_jax.lowrank import (
    PyTree,
    abstract_low_rank,
    arrays_only,
    check_forms,
    is_low_rank,
    path_name,
)
from oialr_jax.matrices import Matrix
from oialr_jax.transform import is_frozen


def check_state(state: Any, follow: Sequence[str], trees: Any) -> None:
    """Host side: `state` has what `adaptive` needs, and no values under tracing.

    Raises:   TypeError: a field is missing, or `state.step` is no integer. ValueError:
              the call is traced; `state.step` is no scalar; `follow` names no field.
    """
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((state, trees))):
        raise ValueError(
            "the step of `adaptive` is called under jax.vmap, jax.jit, jax.grad or "
            "jax.lax.scan, but its rank events happen on the host, between the calls: "
            "put the transformation inside of the step. Seeds side by side are one "
            "state: params and batch with a leading axis, matrices found in "
            "jax.vmap(forward), tx.init outside of jax.vmap"
        )
    for name in ("step", "params", "opt_state", "replace"):
        if not hasattr(state, name):
            raise TypeError(
                f"the first argument of the step has no `.{name}`: it is a "
                f"{type(state).__name__}, and has to be a state with .step, .params, "
                ".opt_state and .replace(...), such as "
                "flax.training.train_state.TrainState; a model and an nnx.Optimizer go "
                "to oialr_jax.nnx.wrap, params and a loss to oialr_jax.training"
            )
    check_forms(state.params, what="adaptive takes")
    if np.shape(state.step) != ():
        raise ValueError(
            f"`state.step` has shape {np.shape(state.step)}, but events happen at one "
            "step of all: seeds side by side share one number. Create the state once, "
            "outside of jax.vmap, from params with a leading axis, and jax.vmap the "
            "loss inside of the step"
        )
    whole = isinstance(state.step, int) and not isinstance(state.step, bool)
    if not whole and not (
        _is_array(state.step) and jnp.issubdtype(state.step.dtype, jnp.integer)
    ):
        raise TypeError(f"`state.step` must be an integer, got {state.step!r}")
    paths = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_low_rank)
    fields = list(dict.fromkeys(path_name(path[:1]) for path, _ in paths))
    for name in follow:
        if not hasattr(state, name):
            raise ValueError(
                f"`follow` names {name!r}, which the state has not; it has: "
                f"{', '.join(fields)}"
            )


def check_opt_state(state: Any, tx: optax.GradientTransformation) -> None:
    """Host side: the optimizer state is that of `tx`, with one `freeze_bases` around.

    Raises:   ValueError: it is not.
    """
    frozen = [
        x for x in jax.tree.leaves(state.opt_state, is_leaf=is_frozen) if is_frozen(x)
    ]
    if not frozen:
        raise ValueError(
            "the optimizer would move frozen bases: build it as "
            "oialr_jax.freeze_bases(tx), with nothing outside it, create the state "
            "with that, and give it to `adaptive`"
        )
    inner = [x.inner_state for x in frozen]
    if any(map(is_frozen, jax.tree.leaves(inner, is_leaf=is_frozen))):
        raise ValueError(
            "`freeze_bases` is inside of another `freeze_bases`: leave the outer one "
            "alone, around the whole chain"
        )
    fresh = traced(tx.init, arrays_only(state.params))
    if isinstance(fresh, Exception):
        return
    if not any(map(is_frozen, jax.tree.leaves(fresh, is_leaf=is_frozen))):
        raise ValueError(
            "the `tx` given to `adaptive` was not wrapped: give it the "
            "oialr_jax.freeze_bases(tx) with which `state.opt_state` was made"
        )
    if _structure(fresh) != _structure(state.opt_state):
        raise ValueError(
            "`state.opt_state` is not a state of the `tx` given to `adaptive`: give "
            "both the same optimizer, state.opt_state = tx.init(params). It is\n"
            f"{_structure(state.opt_state)}\nwhere tx.init(params) is\n"
            f"{_structure(fresh)}"
        )


def rehearse(
    step: Callable[..., Any],
    tx: optax.GradientTransformation,
    matrices: Sequence[Matrix],
    state: Any,
    args: Any,
    kwargs: Any,
    *,
    follow: Sequence[str],
    rebase: Callable[[PyTree, PyTree], PyTree],
    options: Mapping[str, Any],
    multiple: int,
) -> None:
    """Host side: trace the step as it will be called after the conversion.

    Args:     rebase: brings trees beside the params into low rank.
              options: of `jax.jit`, of which shardings are looked at.
              multiple: what every rank below full rank is a multiple of.
    Raises:   ValueError: the step would fail then and does not fail now, with the line
              to change; from the error that it would be.
    """
    axes = {x.path: x.axes for x in matrices}

    params = abstract_low_rank(shapes(state.params), axes)
    opt_state = traced(tx.init, arrays_only(params))
    if isinstance(opt_state, Exception):
        if isinstance(traced(tx.init, arrays_only(state.params)), Exception):
            return
        raise ValueError(
            "the optimizer cannot be initialised for cores in the place of matrices, "
            f"which tx.init will be asked for at the conversion: {line(opt_state)}"
        ) from opt_state

    def converted(names: Sequence[str]) -> Any:
        new = {name: _rebased(rebase, getattr(state, name), params) for name in names}
        return state.replace(params=params, opt_state=opt_state, **new)

    low = converted(follow)
    out = traced(step, low, *args, **kwargs)
    if isinstance(out, Warning):
        raise out  # a filter made an error of it
    if isinstance(out, RuntimeError):
        return  # what the program itself says, and will say again
    dense = traced(step, state, *args, **kwargs) if _is_wrong(out, low) else None
    if isinstance(dense, Exception) or _is_wrong(dense, state):
        return  # it cannot be traced here, or is no such step: the call will say
    if isinstance(out, Exception):
        beside = _beside(state, axes, follow)
        raise ValueError(
            _diagnosis(step, converted, beside, follow, rebase, params, args, kwargs)
            + f" ({line(out)})"
        ) from out
    wrong = _is_wrong(out, low)
    if wrong:
        raise ValueError(
            f"the step returns another `state.{wrong}` than it is given, once matrices "
            "are in low rank: it has to return LowRank nodes where it gets them, as "
            "optax.apply_updates and TrainState.apply_gradients do"
        )
    if any(options.get(name) is not None for name in ("in_shardings", "out_shardings")):
        dense = traced(step, state, *args, **kwargs)
        _check_shardings(
            options, ((low, *args), out), ((state, *args), dense), axes, multiple
        )


def _diagnosis(
    step: Callable[..., Any],
    converted: Callable[[Sequence[str]], Any],
    beside: list[str],
    follow: Sequence[str],
    rebase: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    args: Any,
    kwargs: Any,
) -> str:
    """Which mistake makes a step fail at the conversion: found by trying."""
    names = (*follow, *beside)
    if beside and not isinstance(
        traced(step, converted(names), *args, **kwargs), Exception
    ):
        fields = ", ".join(f"state.{name}" for name in beside)
        return (
            f"the step combines params with {fields}, which will stay dense when "
            "matrices are converted to low rank: name what has to follow them, "
            f"adaptive(..., follow={names!r})"
        )
    turned = _rebased(rebase, (args, kwargs), params)
    if not isinstance(turned, Exception):
        out = traced(step, converted(names), *turned[0], **turned[1])
        if not isinstance(out, Exception):
            return (
                "the step combines params with an argument that is a copy of them and "
                "will stay dense when matrices are converted to low rank: keep it in "
                "the state and name its field in adaptive(..., follow=...)"
            )
    return (
        "the step cannot run on params in low rank, which it gets from the conversion "
        "on: wrap the function that applies the model, forward = "
        "oialr_jax.factored(forward), and differentiate that; combine whole trees of "
        "params by jax.tree.map, as optax.incremental_update does"
    )


def _beside(state: Any, axes: Mapping[str, Any], follow: Sequence[str]) -> list[str]:
    """Fields of the state beside the params that have arrays shaped like a matrix."""
    shapes = {x.shape for x in axes.values()}
    found: dict[str, None] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = path_name(path[:1])
        known = ("step", "params", "opt_state", *follow)
        if name not in known and np.shape(leaf) in shapes:
            found[name] = None
    return list(found)


def _is_wrong(out: Any, state: Any) -> str | None:
    """The field that a step gave back in another shape, or "result" if it failed."""
    if out is None:
        return None
    if isinstance(out, Exception):
        return "result"
    new = out
    if isinstance(out, tuple) and out and not hasattr(out, "params"):
        new = out[0]
    for name in ("params", "opt_state"):
        if _signature(getattr(new, name, None)) != _signature(getattr(state, name)):
            return name
    return None


def _signature(tree: PyTree) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    return [np.shape(x) if _is_array(x) else None for x in leaves], treedef


def _structure(tree: PyTree) -> Any:
    return jax.tree.structure(tree)


def traced(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What fn returns, in shapes, or the exception that it raises; nothing runs.

    Arrays are traced and anything else is as it is given: static arguments, functions.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays = {i: _shape(x) for i, x in enumerate(leaves) if _is_array(x)}
    result: list[Any] = []

    def run(arrays: dict[int, Any]) -> None:
        given = [arrays.get(i, x) for i, x in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(treedef, given)
        result.append(shapes(fn(*args, **kwargs)))

    try:
        jax.eval_shape(run, arrays)
    except Exception as error:
        return error
    return result[0]


def _rebased(rebase: Callable[..., Any], tree: PyTree, params: PyTree) -> Any:
    return traced(rebase, tree, params)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    weak = getattr(x, "weak_type", False)
    return jax.ShapeDtypeStruct(np.shape(x), dtype_of(x), weak_type=weak)


def shapes(tree: PyTree) -> PyTree:
    """The tree with shapes in the place of arrays."""
    return jax.tree.map(lambda x: _shape(x) if _is_array(x) else x, tree)


def shown(x: Any) -> str:
    """A value in an error: its dtype and shape, or what it is made of."""
    if _is_array(x):
        return f"{x.dtype}{list(np.shape(x))}"
    if isinstance(x, tuple) and not hasattr(x, "_fields"):
        return f"({', '.join(map(shown, x))})"
    leaves = jax.tree.leaves(x)
    some = ", ".join(map(shown, leaves[:3])) + ", ..." * (len(leaves) > 3)
    return f"{type(x).__name__} of {some}" if leaves and leaves != [x] else repr(x)


def line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _check_shardings(
    options: Mapping[str, Any],
    low: tuple[Any, Any],
    dense: tuple[Any, Any],
    axes: Mapping[str, Any],
    multiple: int,
) -> None:
    """Shardings that were made for the dense state have to fit factors too.

    Raises:   ValueError: they do not; `layout` is what to give instead.
    """
    for name, tree, now in zip(
        ("in_shardings", "out_shardings"), low, dense, strict=True
    ):
        where = options.get(name)
        if where is None or _spread(where, now) is None:
            continue  # what does not fit the dense state either, jit will refuse
        found = _spread(where, tree)
        trouble, names = "has no entry for", ", ".join(axes)
        if found is not None:
            trouble = "cannot divide"
            names = _indivisible(found, tree, multiple)
            if not names:
                continue
        raise ValueError(
            f"`{name}` {trouble} the factors of {names}, which "
            "come in the place of a dense matrix at the conversion, and whose ranks "
            "change: leave it out and give adaptive(..., layout=oialr_jax.sharding."
            "Layout(mesh, rules)), which places dense and low-rank leaves and the "
            "optimizer state"
        )


def _spread(where: Any, tree: PyTree) -> list[Any] | None:
    """The sharding of every leaf of `tree`, if `where` is a prefix of it."""
    with contextlib.suppress(ValueError, TypeError):
        return jax.tree.leaves(
            jax.tree.broadcast(where, tree, is_leaf=_is_place), is_leaf=_is_place
        )
    return None


def _is_place(x: Any) -> bool:
    return x is None or isinstance(
        x, jax.sharding.Sharding | jax.sharding.PartitionSpec
    )


def _indivisible(places: list[Any], tree: PyTree, multiple: int) -> str:
    """The first node with a factor that its sharding cannot divide at some rank."""
    known = [False if x is None else x for x in places]  # None would be no leaf
    marked = jax.tree.unflatten(jax.tree.structure(tree), known)
    nodes = jax.tree_util.tree_leaves_with_path(marked, is_leaf=is_low_rank)
    shapes = jax.tree.leaves(tree, is_leaf=is_low_rank)
    for (path, node), leaf in zip(nodes, shapes, strict=True):
        if not is_low_rank(leaf):
            continue
        small = abstract_low_rank(leaf, {}, multiple)
        for part in ("u", "s", "vt"):
            place = getattr(node, part)
            for shape in (getattr(leaf, part).shape, getattr(small, part).shape):
                try:
                    if isinstance(place, jax.sharding.Sharding):
                        place.shard_shape(shape)
                except ValueError:
                    return path_name(path)
    return ""
