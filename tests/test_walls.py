"""The walls: who imports whom, read from the import statements of every file."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LIBRARY = ROOT / "oialr_jax"

FLOORS = {
    "effects": 0,
    "linalg": 0,
    "views": 0,
    "cost": 1,
    "dataflow": 1,
    "rewrites": 1,
    "lowrank": 1,
    "readers": 1,
    "schedule": 1,
    "states": 1,
    "tracing": 1,
    "versions": 1,
    "contract": 2,
    "decompose": 2,
    "forms": 2,
    "interpret": 2,
    "labels": 2,
    "rows": 2,
    "weighted": 2,
    "moments": 2,
    "polar": 2,
    "reports": 2,
    "serialization": 2,
    "sharding": 2,
    "transform": 2,
    "checkpoint": 3,
    "factored": 3,
    "following": 3,
    "matrices": 3,
    "checks": 4,
    "defaults": 4,
    "directions": 4,
    "explain": 4,
    "export": 4,
    "projection": 4,
    "curvature": 4,
    "rehearsal": 4,
    "stability": 4,
    "surgery": 4,
    "adapters": 5,
    "adaptive": 5,
    "compression": 5,
    "orthogonal": 5,
    "training": 6,
    "wrapping": 6,
    "__init__": 7,  # sees every room and is seen by none
}
PLAIN = ("cost", "schedule")  # decide on integers: no JAX
FLAX = ("serialization",)  # registers nodes with Flax, where it is installed
FILES = ("checkpoint", "export")  # the rooms that may open files
PACKAGES = ("export",)  # rooms of several files, which import each other


def imported(source: str, package: str = "oialr_jax") -> set[str]:
    """Dotted names of all imports in a module of `package`, at any depth.

    >>> sorted(imported("import jax.numpy as jnp; from . import cost"))
    ['jax.numpy', 'oialr_jax.cost']
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")
            up = up[: len(up) - node.level + 1] if node.level else []
            base = ".".join([*up, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def within(names: set[str], *roots: str) -> set[str]:
    """Those names that are one of the dotted roots or lie below it."""
    return {x for x in names for root in roots if f"{x}.".startswith(f"{root}.")}


def room_of(path: pathlib.Path) -> str:
    """The room that a file of the library is, or is part of."""
    return path.relative_to(LIBRARY).with_suffix("").parts[0]


def climbs(room: str, source: str) -> set[str]:
    """Imports of ours, in the source of a room, that do not go to a lower floor."""
    floor, found = FLOORS[room], set()
    for name in within(imported(source), "oialr_jax"):
        # a name of the package itself, say oialr_jax.adaptive's, comes from __init__
        target = [*name.split("."), "__init__"][1]
        if target == room and room in PACKAGES:
            continue
        if FLOORS.get(target, FLOORS["__init__"]) >= floor:
            found.add(name)
    return found


def opens_files(source: str) -> set[str]:
    """What in a source deals with files: the builtin open, modules about paths."""
    found = within(imported(source), "pathlib", "io", "shutil", "tempfile")
    names = (x.id for x in ast.walk(ast.parse(source)) if isinstance(x, ast.Name))
    return found | ({"open"} & set(names))


def files(*folders: str) -> list[pytest.param]:
    """Every Python file below the folders, with its path as the id of a test."""
    paths = sorted(path for x in folders for path in (ROOT / x).rglob("*.py"))
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def package_of(path: pathlib.Path) -> str:
    """The dotted package that a file's relative imports start from."""
    return ".".join(path.parent.relative_to(ROOT).parts)


@pytest.mark.parametrize("path", files("oialr_jax"))
def test_imports_go_down_a_floor(path):
    room, inside = room_of(path), len(path.relative_to(LIBRARY).parts)
    within_room = f"{path.relative_to(ROOT)} is a room within a room"
    assert inside == 1 or (inside == 2 and room in PACKAGES), within_room
    assert room in FLOORS, f"room {room!r} is not in the table of floors"
    assert climbs(room, path.read_text()) == set()


@pytest.mark.parametrize("path", files("oialr_jax"))
def test_the_library_needs_neither_flax_nor_programs(path):
    foreign = ("train", "tests") if path.stem in FLAX else ("flax", "train", "tests")
    assert within(imported(path.read_text()), *foreign) == set()


@pytest.mark.parametrize("path", files("oialr_jax"))
def test_only_rooms_of_files_open_files(path):
    if room_of(path) not in FILES:
        assert opens_files(path.read_text()) == set()


@pytest.mark.parametrize("room", PLAIN)
def test_decisions_on_integers_need_no_jax(room):
    path = LIBRARY / f"{room}.py"
    if path.exists():
        assert within(imported(path.read_text()), "jax", "jaxlib") == set()


@pytest.mark.parametrize("path", files("train/models"))
def test_models_import_nothing_of_ours_but_models(path):
    names = imported(path.read_text(), package_of(path))
    assert within(names, "oialr_jax", "train") == within(names, "train.models")


@pytest.mark.parametrize("path", files("oialr_jax", "train", "tests"))
def test_public_jax_only(path):
    source = path.read_text()
    names = imported(source, package_of(path))
    assert within(names, "jax._src") == set()
    if path != pathlib.Path(__file__):
        assert "jax._src" not in source


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("import os.path, re as r", {"os.path", "re"}),
        ("from jax import _src", {"jax._src"}),
        ("from jax._src.core import x as y", {"jax._src.core.x"}),
        ("from . import cost, lowrank", {"oialr_jax.cost", "oialr_jax.lowrank"}),
        ("from .cost import Order", {"oialr_jax.cost.Order"}),
        ("def f():\n  if x:\n    import flax.linen", {"flax.linen"}),
        ("'import flax'", set()),
    ],
    ids=["as", "from", "deep_from", "relative", "relative_name", "nested", "string"],
)
def test_reads_every_form_of_import(source, names):
    assert imported(source) == names


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("surgery", "from oialr_jax import moments", set()),
        ("surgery", "from oialr_jax import adaptive", {"oialr_jax.adaptive"}),
        ("surgery", "from oialr_jax import explain", {"oialr_jax.explain"}),
        ("surgery", "from oialr_jax import RankRule", {"oialr_jax.RankRule"}),
        ("adaptive", "import oialr_jax", {"oialr_jax"}),
        ("cost", "import oialr_jax.lowrank as x", {"oialr_jax.lowrank"}),
        ("export", "from oialr_jax.export.merge import merge", set()),
        ("cost", "def f():\n  from .schedule import x", {"oialr_jax.schedule.x"}),
        ("__init__", "from oialr_jax.adaptive import adaptive", set()),
        ("cost", "import oialr_jax_tools", set()),
    ],
    ids=str,
)
def test_sees_an_import_that_climbs(room, source, found):
    assert climbs(room, source) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("with open('x') as f: pass", {"open"}),
        ("read = open", {"open"}),
        ("from pathlib import Path", {"pathlib.Path"}),
        ("import io", {"io"}),
        ("store.open()", set()),
    ],
    ids=str,
)
def test_sees_files_being_opened(source, found):
    assert opens_files(source) == found
