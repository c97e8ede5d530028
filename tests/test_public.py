"""The public surface: names, signatures and defaults, beside the committed listing.

A change of it is seen in a diff: python tests/test_public.py > tests/public.txt
"""

import difflib
import importlib
import inspect
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

import oialr_jax as oialr
from oialr_jax.renames import renamed

LISTING = pathlib.Path(__file__).parent / "public.txt"
UPDATE = "python tests/test_public.py > tests/public.txt"
NAMESPACES = (oialr, oialr.nnx, oialr.orthogonal, oialr.sharding, oialr.stability)


def value(default: object) -> str:
    """A default as one would write it, where it is no literal."""
    if inspect.isroutine(default):
        home = default.__module__.partition("._")[0]
        return f"{home}.{default.__qualname__}"
    kind = type(default)
    if kind.__module__.startswith("oialr_jax") and default == kind():
        return f"{kind.__name__}()"
    return "{}" if default == {} else repr(default)


def signature(called: object) -> str:
    """The parameters and defaults of a function or class, without types.

    >>> signature(lambda a, /, b, *c, d=3, **e: None)
    '(a, /, b, *c, d=3, **e)'
    """
    parameters = []
    found = inspect.signature(called)
    for x in found.parameters.values():
        if x.default is not x.empty:
            x = x.replace(default=_Shown(value(x.default)))
        parameters.append(x.replace(annotation=x.empty))
    return str(inspect.Signature(parameters)).replace("self, ", "").replace("self", "")


class _Shown(str):
    """A default that is printed as it is."""

    __slots__ = ()
    __repr__ = str.__str__


def members(kind: type) -> Iterator[str]:
    """The public methods and properties that a class defines, one a line."""
    for name, member in sorted(vars(kind).items()):
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            yield f"    .{name}"
        elif isinstance(member, staticmethod | classmethod):
            yield f"    .{name}{signature(getattr(kind, name))}"
        elif inspect.isfunction(member):
            yield f"    .{name}{signature(member)}"


def listing() -> str:
    """Every public name, in the order of a dictionary, with what it takes."""
    lines = []
    for module in NAMESPACES:
        lines += [module.__name__.replace("_jax", "", 1), ""]
        for name in sorted(module.__all__, key=str.lower):
            member = getattr(module, name)
            if inspect.ismodule(member):
                continue
            line = f"{name}{signature(member)}"
            lines.append(f"class {line}" if inspect.isclass(member) else line)
            lines += members(member) if inspect.isclass(member) else ()
        lines.append("")
    return "\n".join(lines[:-1])


def test_the_public_surface_is_the_one_that_is_written_down():
    wanted, found = LISTING.read_text().splitlines(), listing().splitlines()
    changes = difflib.unified_diff(wanted, found, "tests/public.txt", "now", n=0)
    shown = "\n".join(changes)
    assert not shown, f"the public surface has changed:\n{shown}\nif meant: {UPDATE}"


@pytest.mark.parametrize("module", NAMESPACES, ids=lambda x: x.__name__)
def test_all_that_is_public_is_there_sorted_and_described(module):
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), name


def test_results_are_no_names_of_the_front_door():
    kinds = {x for x in oialr.__all__ if inspect.isclass(getattr(oialr, x))}
    assert kinds == {
        "Checkpoints",
        "FrozenBase",
        "LowRank",
        "MomentRule",
        "RankRule",
        "Schedule",
        "Weighing",
    }


MOVED = [(name, room) for room, names in oialr._MOVED.items() for name in names]


@pytest.mark.parametrize(("name", "room"), MOVED, ids=[name for name, _ in MOVED])
def test_a_name_that_has_moved_works_and_says_where_it_is(name, room):
    new = oialr._RENAMED.get(name, name)
    line = f"from oialr_jax.{room} import {new}"
    with pytest.warns(DeprecationWarning, match=line):
        found = getattr(oialr, name)
    assert found is getattr(importlib.import_module(f"oialr_jax.{room}"), new)
    assert name not in oialr.__all__


def test_a_name_that_never_was_is_no_attribute():
    with pytest.raises(AttributeError, match="'oialr_jax' has no attribute 'lora'"):
        oialr.lora  # noqa: B018


@pytest.mark.parametrize(
    ("call", "old", "new"),
    [
        (oialr.RankRule, {"floor": 0.5}, {"min_rank_share": 0.5}),
        (
            lambda **x: oialr.select([], **x),
            {"keep_first": 1, "keep_last": 2, "keep_eligible": True},
            {"dense_first": 1, "dense_last": 2, "among_eligible": True},
        ),
    ],
    ids=["RankRule", "select"],
)
def test_arguments_by_their_former_names_are_taken_with_a_warning(call, old, new):
    with pytest.warns(DeprecationWarning, match="goes with the next") as caught:
        found = call(**old)
    assert found == call(**new)
    said = " ".join(str(x.message) for x in caught)
    assert all(f"{name}=" in said for name in (*old, *new))
    if os.environ.get("RUNTIME_TYPES") == "0":  # which put their frames between
        assert {x.filename for x in caught} == {__file__}  # the line that is to change


def test_an_argument_under_both_names_is_refused():
    @renamed(colour="color")
    def paint(*, color):
        return color

    with pytest.raises(TypeError, match="paint has color= and colour=, its former"):
        paint(color=1, colour=2)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (
            lambda: oialr.Schedule(9, 2, project=3, project_from=1),
            r"Schedule\(project.*=\) is no more: write projections=range\(first, ",
        ),
        (
            lambda: oialr.Schedule(9, 2, when="stable"),
            r"Schedule\(when=\) .* due=oialr_jax.stability.when_settled\(threshold",
        ),
        (
            lambda: oialr.freeze_bases(oialr.orthogonal.orthogonalize(), reference=1),
            r"freeze_bases\(reference=\) .*\(optax.chain\(tx, .*keep_reference\(\)\)",
        ),
    ],
    ids=["project", "when", "reference"],
)
def test_arguments_that_are_gone_name_what_is_in_their_place(call, line):
    with pytest.raises(TypeError, match=line):
        call()


def test_the_listing_can_be_written_anew():
    command = [sys.executable, __file__]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == LISTING.read_text()


if __name__ == "__main__":
    print(listing())
