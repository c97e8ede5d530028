"""Whether masks and labels call a core what they call its dense matrix.

A core has two axes, so what is labelled by its shape may change its optimizer at a rank
event. Nothing is computed.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import jax
import numpy as np

from oialr_jax.dataflow import Known, by_shapes
from oialr_jax.lowrank import PyTree, path_name
from oialr_jax.states import KEEP_LABELS


def check_labels(tx: Any, before: PyTree, after: PyTree) -> None:
    """Whether every mask and label of `tx` is the same at the shapes after as before.

    Masks and labels are functions that the optimizer holds by such a name (`mask`,
    `param_labels`, `weight_decay_mask`); they are called with abstract arrays. Trees of
    labels are the same anyway.

    Args:     before, after: what is trained, `trainable(params)`.
    Raises:   ValueError: a leaf is labelled in another way.
    """
    old, new = by_shapes(before), by_shapes(after)
    if old != new:
        _check_labelled(tx, old, new)


@functools.lru_cache(maxsize=256)
def _check_labelled(tx: Any, before: Known, after: Known) -> None:
    for name, function in _labellers((tx.init, tx.update)):
        old, new = _labels(function, before.tree), _labels(function, after.tree)
        if old is None or new is None:
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(after.tree):
            a, b = (_at(path, labels) for labels in (old, new))
            if a != b:
                was = dict(jax.tree_util.tree_leaves_with_path(before.tree))[path]
                what = getattr(function, "__qualname__", type(function).__name__)
                hint = ""
                if "muon" in what:
                    hint = "; or take oialr_jax.core_muon, which knows leaves by name"
                raise ValueError(
                    f"`{name}` ({what}) says {a!r} of {path_name(path)} with shape "
                    f"{was.shape} and {b!r} with {leaf.shape}, so that its optimizer "
                    f"would change at a rank event. {KEEP_LABELS}{hint}"
                )


def _labels(function: Any, tree: PyTree) -> dict[Any, Any] | None:
    """What a function calls the leaves, by path, or None where it labels none."""
    found: list[Any] = []
    try:
        jax.eval_shape(lambda x: found.append(function(x)), tree)
    except Exception:  # it takes something else
        return None
    labels = jax.tree_util.tree_leaves_with_path(found[0], is_leaf=_is_none)
    if any(hasattr(x, "dtype") and not isinstance(x, np.bool_) for _, x in labels):
        return None
    return dict(labels)


def _is_none(x: object) -> bool:
    return x is None


def _at(path: tuple[Any, ...], labels: Mapping[Any, Any]) -> Any:
    """The label of a leaf in a tree of labels, or in a prefix of one."""
    ends = (path[:end] for end in range(len(path), -1, -1))
    return next((labels[x] for x in ends if x in labels), None)


_NAMES = re.compile("mask|label")


def _labellers(roots: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Functions called masks or labels among all that some functions hold."""
    stack, seen = [("", x) for x in roots], set()
    while stack:
        name, x = stack.pop()
        if id(x) in seen or isinstance(x, ModuleType | type | jax.Array | np.ndarray):
            continue
        seen.add(id(x))
        if callable(x) and _NAMES.search(name):
            yield name, x
        stack += _held(name, x)


def _held(name: str, x: Any) -> list[tuple[str, Any]]:
    """What an object holds, by name."""
    if isinstance(x, functools.partial):
        parts = {"func": x.func, **x.keywords}
        return [*parts.items(), *((name, y) for y in x.args)]
    if isinstance(x, MethodType):
        return [(name, x.__self__), (name, x.__func__)]
    if isinstance(x, FunctionType):
        free = zip(x.__code__.co_freevars, x.__closure__ or (), strict=True)
        held = [(key, _contents(cell)) for key, cell in free]
        held += list((x.__kwdefaults__ or {}).items())
        count = x.__code__.co_argcount
        named = x.__code__.co_varnames[count - len(x.__defaults__ or ()) : count]
        held += list(zip(named, x.__defaults__ or (), strict=True))
        held += list(vars(x).items())
        if x.__module__ is None or x.__module__.split(".")[0] not in ("optax", "jax"):
            used = (key for key in x.__code__.co_names if _NAMES.search(key))
            held += [(key, x.__globals__.get(key)) for key in used]
        return held
    if isinstance(x, Mapping):
        return [(str(key), y) for key, y in x.items()]
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return list(zip(x._fields, x, strict=True))
    if isinstance(x, list | tuple | set | frozenset):
        return [(name, y) for y in x]
    return list(vars(x).items()) if hasattr(x, "__dict__") else []


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
