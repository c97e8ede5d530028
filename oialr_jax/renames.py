"""Former arguments: taken for one release more, or refused with the line to write."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[F], F]:
    """A decorator for a function or a dataclass, whose arguments old=new were renamed.

    The signature that is shown and checked is the new one.

    Raises:   TypeError: on call, both names of an argument are given.
    """

    def translated(call: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        for old in names.keys() & kwargs.keys():
            new = names[old]
            if new in kwargs:
                raise TypeError(f"{call} has {new}= and {old}=, its former name")
            warnings.warn(
                f"{call}({old}=) is now {call}({new}=). The old name goes with the "
                "next release",
                DeprecationWarning,
                stacklevel=3,
            )
            kwargs[new] = kwargs.pop(old)
        return kwargs

    return _before(translated)


def replaced(**lines: str) -> Callable[[F], F]:
    """A decorator for one that has lost arguments, by what to write in their place.

    Raises:   TypeError: on call, one of them is given.
    """

    def refused(call: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        for old in lines.keys() & kwargs.keys():
            raise TypeError(f"{call}({old}=) is no more: write {lines[old]}")
        return kwargs

    return _before(refused)


def _before(
    change: Callable[[str, dict[str, Any]], dict[str, Any]],
) -> Callable[[F], F]:
    """The decorator that passes keyword arguments through `change`."""

    def decorate(target: F) -> F:
        inner = target.__init__ if isinstance(target, type) else target

        @functools.wraps(inner)
        def called(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **change(target.__name__, kwargs))

        if isinstance(target, type):
            setattr(target, "__init__", called)  # noqa: B010 -- a method, to mypy
            return target
        return cast(F, called)

    return decorate
