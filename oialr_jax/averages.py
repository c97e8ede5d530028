"""What the averages in an optimizer's state are, read from the jaxpr of its update.

The class of a state does not say it all: Adam's state is used by others too, and how
fast an average decays is known to the optimizer's functions alone.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from oialr_jax import dataflow
from oialr_jax.dataflow import Fact, Known
from oialr_jax.lowrank import PyTree
from oialr_jax.states import Second, fields_of

Path = tuple[Any, ...]
Decay = float | Path | None
"""A number, the path of a scalar in the state that it is, or None if not known."""


@dataclasses.dataclass(frozen=True)
class Average:
    """What an average of squares is, and how it and the mean beside it decay.

    With decay b an average v becomes b v + (1 - b) x.
    """

    second: Second
    mean: Decay = None
    square: Decay = None


def averages(tx: Any, params: PyTree) -> dict[Path, Average]:
    """Of each state with an average of squares and a count of steps, by its path.

    Nothing is computed. A decay is known if it is a constant, or a scalar of the state
    as `optax.inject_hyperparams` has it, but not if it changes with the step.

    Args:     params: `trainable(params)`.
    """
    shapes = jax.tree.map(dataflow.abstract, params)
    return _averages(tx, Known(jax.tree.structure(params), shapes))


@functools.lru_cache(maxsize=64)
def _averages(tx: Any, known: Known) -> dict[Path, Average]:
    params = jax.tree.map(_wide, known.tree)  # where 0.999 is not 1
    state = jax.eval_shape(tx.init, params)
    seconds: dict[Path, tuple[Any, str, Second]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_counted):
        if _is_counted(x):
            name, second = _counted(x)[0]
            if jax.tree.leaves(getattr(x, name)):
                seconds[path] = x, name, second
    update = None
    for given in (jax.tree.map(_wide, state), None) if seconds else ():
        update = dataflow.trace_update(tx, params, given)
        if isinstance(update, dataflow.Update):
            break
    if not isinstance(update, dataflow.Update):
        return {path: Average(kind) for path, (_, _, kind) in seconds.items()}
    places: dict[Path, tuple[Path, Path]] = {}  # of one mean and one square
    for path, (x, name, kind) in seconds.items():
        leaves = jax.tree_util.tree_leaves_with_path(getattr(x, name))
        leaf = max(leaves, key=lambda found: found[1].ndim > 0)[0]
        places[path] = (_at(path, kind.mean, leaf), _at(path, name, leaf))
    kinds = _kinds(update, places)
    decays = _decays(update, places)
    return {
        path: Average(
            kinds[path] if _is_adam(x) and path in kinds else kind, *decays[path]
        )
        for path, (x, _, kind) in seconds.items()
    }


def _wide(x: Any) -> Any:
    """The shape of an array, of float32 where it is a narrower float."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return jax.ShapeDtypeStruct(x.shape, jnp.float32 if narrow else x.dtype)


def _counted(x: object) -> list[tuple[str, Second]]:
    """The fields of a state that are averages of squares beside a count, and which."""
    fields = (fields_of(x) or {}).items()
    return [(k, kind) for k, kind in fields if isinstance(kind, Second) and kind.count]


def _is_counted(x: object) -> bool:
    return bool(_counted(x))


def _is_adam(x: object) -> bool:
    return "ScaleByAdamState" in dir(optax) and isinstance(x, optax.ScaleByAdamState)


def _at(path: Path, field: str | None, leaf: Path) -> Path:
    return (1, *path, jax.tree_util.GetAttrKey(field), *leaf)


def _kinds(
    update: dataflow.Update, places: Mapping[Path, tuple[Path, Path]]
) -> dict[Path, Second]:
    """Of which states of Adam's class `nu` is not what it is in Adam.

    Adamax keeps the largest entries there; ADOPT divides by it before it averages, so
    that `mu` is no mean of the same gradients.
    """
    inputs = {path: Fact() for path in update.inputs}
    for i, (_, square) in enumerate(places.values()):
        inputs[square] = Fact(sources={i: dataflow.AVERAGED})
    outputs = _outputs(update, inputs)
    found = {}
    for i, (path, place) in enumerate(places.items()):
        averaged, largest = (outputs.get(x, Fact()).sources.get(i) for x in place)
        if largest == dataflow.LARGEST:
            found[path] = Second("mu", "count", largest=True)
        elif averaged:
            found[path] = Second()
    return found


def _decays(
    update: dataflow.Update, places: Mapping[Path, tuple[Path, Path]]
) -> dict[Path, tuple[Decay, Decay]]:
    """How the mean and the square decay, at gradients and other moments of zero."""
    inputs = {
        path: Fact(entry=path) if path[0] == 1 and not shape.ndim else Fact(0.0)
        for path, shape in zip(update.inputs, update.jaxpr.in_avals, strict=True)
    }
    for x in {x for pair in places.values() for x in pair} & inputs.keys():
        inputs[x] = Fact(sources={x: dataflow.AVERAGED}, multiple=(x, 1.0))
    outputs = _outputs(update, inputs)

    def decay(place: Path) -> Decay:
        fact = outputs.get(place, Fact())
        if fact.constant == 0:
            return 0.0
        source, factor = fact.multiple or (None, -1.0)
        if source != place:
            return None
        if isinstance(factor, tuple):
            return factor[1:]
        return factor if 0 <= factor < 1 else None

    return {path: (decay(x), decay(y)) for path, (x, y) in places.items()}


def _outputs(update: dataflow.Update, inputs: Mapping[Path, Fact]) -> dict[Path, Fact]:
    found = dataflow.facts(update.jaxpr, [inputs[path] for path in update.inputs])
    return dict(zip(update.outputs, found, strict=True))
