"""In-place changes of a function to its arguments, made to the caller's objects.

A traced function works on copies of its arguments. Where it changes them in place, as
modules do with batch statistics and random counters, the copies tell what to write.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

Path = tuple[Any, ...]
Children = list[tuple[Any, Any]]  # of a pytree node: keys and values


class Template(NamedTuple):
    """A pytree whose arrays are outputs, by position, and whose other leaves stay."""

    tree: Any
    leaves: list[Any]  # a leaf, or the position of an output
    is_output: list[bool]

    @classmethod
    def of(
        cls,
        tree: Any,
        kinds: tuple[type, ...],
        origin: Mapping[int, Any] = MappingProxyType({}),
        start: int = 0,
        is_leaf: Callable[[Any], bool] | None = None,
    ) -> "tuple[Template, list[Any]]":
        """The template of a tree and its leaves of some kinds, numbered from `start`.

        In the place of a leaf whose id is in `origin` stands what is there.
        """
        flat, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
        is_output = [id(x) not in origin and isinstance(x, kinds) for x in flat]
        arrays = [leaf for leaf, keep in zip(flat, is_output, strict=True) if keep]
        position = itertools.count(start)
        leaves = [
            next(position) if keep else origin.get(id(leaf), leaf)
            for leaf, keep in zip(flat, is_output, strict=True)
        ]
        return cls(treedef, leaves, is_output), arrays

    def fill(self, outputs: Sequence[Any]) -> Any:
        """The tree with all outputs of the jaxpr in their places."""
        full = [
            outputs[leaf] if keep else leaf
            for leaf, keep in zip(self.leaves, self.is_output, strict=True)
        ]
        return jax.tree.unflatten(self.tree, full)


def write(old: Any, new: Any, *, dry: bool = False) -> None:
    """Change the objects in `old` in place, so that they become those in `new`.

    Attributes, items of dicts and of lists are set, added and deleted where they
    differ; arrays that are the same object are left alone. With `dry` nothing is set,
    and only the errors are raised.

    Raises:   TypeError: a change that cannot be written, named by its path.
    """
    if not _written(old, new, (), dry):
        raise _cannot((), old, "it is replaced as a whole")


def share(old: Any, new: Any) -> None:
    """Make objects of a copy one object wherever they are one in the original."""
    seen: dict[int, tuple[Any, Any]] = {}  # holds the object, so its id stays its own

    def walk(old: Any, new: Any) -> None:
        before, after = _children(old), _children(new)
        for (key, child), (_, copy) in zip(before or (), after or (), strict=False):
            _, first = seen.setdefault(id(child), (child, copy))
            if first is copy or _is_fixed(child):
                walk(child, copy)
            elif _children(child) and not _is_fixed(new):
                _set(new, key, first, (), dry=False)

    walk(old, new)


def refuse_shared(tree: Any) -> None:
    """Raise where an object that can be changed in place is in a tree twice.

    Raises:   TypeError: with both paths.
    """
    seen: dict[int, tuple[Any, Path]] = {}

    def walk(tree: Any, path: Path) -> None:
        for key, child in _children(tree) or ():
            if not _is_fixed(child) and _children(child):
                _, first = seen.setdefault(id(child), (child, (*path, key)))
                if first != (*path, key):
                    raise _cannot(first, tree, f"the object is also {key}")
            walk(child, (*path, key))

    walk(tree, ())


def _written(old: Any, new: Any, path: Path, dry: bool) -> bool:
    """Whether `old` is `new`, or was made it; False asks the parent to set it."""
    if old is new:
        return True
    before, after = _children(old), _children(new)
    if before is None or after is None or type(old) is not type(new):
        return False
    if _static(old) == _static(new) and dict(before).keys() == dict(after).keys():
        for (key, child), (_, value) in zip(before, after, strict=True):
            if not _written(child, value, (*path, key), dry):
                if _is_fixed(old):
                    return False
                _set(old, key, value, (*path, key), dry)
        return True
    if _is_fixed(old):
        return False
    if isinstance(old, MutableMapping):
        return _items(old, new, path, dry)
    if isinstance(old, MutableSequence) and not hasattr(old, "__dict__"):
        if not dry:
            old[:] = new
        return True
    if _is_variable(old) or not hasattr(old, "__dict__"):
        raise _cannot(path, old, "its structure changes")
    return _attributes(old, new, path, dry)


def _items(old: Any, new: Any, path: Path, dry: bool) -> bool:
    for key in [key for key in old if key not in new]:
        if not dry:
            del old[key]
    for key, value in new.items():
        here = (*path, jax.tree_util.DictKey(key))
        if key not in old or not _written(old[key], value, here, dry):
            _set(old, here[-1], value, here, dry)
    return True


def _attributes(old: Any, new: Any, path: Path, dry: bool) -> bool:
    """Set the public attributes that differ; a class keeps its own books of them."""
    have, want = vars(old), vars(new)
    names = [name for name in {**have, **want} if not name.startswith("_")]
    for name in names:
        here = (*path, jax.tree_util.GetAttrKey(name))
        if name not in want:
            if not dry:
                delattr(old, name)
        elif name not in have or not _written(have[name], want[name], here, dry):
            _set(old, here[-1], want[name], here, dry)
    if not dry and _static(old) != _static(new):
        raise _cannot(path, old, "its structure changes")
    return True


def _set(old: Any, key: Any, value: Any, path: Path, dry: bool) -> None:
    name = getattr(key, "name", None)
    index = getattr(key, "key", getattr(key, "idx", None))
    if name is None and (index is None or not hasattr(type(old), "__setitem__")):
        raise _cannot(path, old, "it has no place of that name")
    if dry:
        return
    if name is None:
        old[index] = value
    elif name == "value" and _is_variable(old):
        old.set_raw_value(value)
    else:
        setattr(old, name, value)


def _children(tree: Any) -> Children | None:
    """The keys and children of a pytree node, None for a leaf."""
    flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is not tree)
    if any(not path for path, _ in flat):
        return None
    return [(path[0], child) for path, child in flat]


def _static(tree: Any) -> Any:
    return jax.tree.structure(tree, is_leaf=lambda x: x is not tree)


def _is_variable(x: Any) -> bool:
    """Whether x is a variable as Flax NNX has them, which are set by a method."""
    return hasattr(type(x), "set_raw_value")


def _is_fixed(x: Any) -> bool:
    """Whether x is replaced as a whole and not changed in place."""
    params = getattr(type(x), "__dataclass_params__", None)
    frozen = dataclasses.is_dataclass(x) and bool(getattr(params, "frozen", False))
    return frozen or isinstance(x, tuple)


def _cannot(path: Path, old: Any, what: str) -> TypeError:
    place = jax.tree_util.keystr(path[2:], simple=True, separator="/")
    argument = jax.tree_util.keystr(path[1:2], simple=True)
    return TypeError(
        f"the function changes its argument {argument} in place"
        f"{place and ' at '}{place}, which cannot be written back into a "
        f"{type(old).__name__}: {what}. Return the new value, with has_aux=True "
        "under a gradient"
    )
