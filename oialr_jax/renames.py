"""Arguments by the names that they had: taken for one release more, with a warning."""

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

    def decorate(target: F) -> F:
        inner = target.__init__ if isinstance(target, type) else target

        @functools.wraps(inner)
        def called(*args: Any, **kwargs: Any) -> Any:
            for old in names.keys() & kwargs.keys():
                new, call = names[old], target.__name__
                if new in kwargs:
                    raise TypeError(f"{call} has {new}= and {old}=, its former name")
                warnings.warn(
                    f"{call}({old}=) is now {call}({new}=). The old name goes with "
                    "the next release",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return inner(*args, **kwargs)

        if isinstance(target, type):
            setattr(target, "__init__", called)  # noqa: B010 -- a method, to mypy
            return target
        return cast(F, called)

    return decorate
