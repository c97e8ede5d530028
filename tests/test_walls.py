"""The walls: who imports whom, read from the import statements of every file."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LIBRARY = ROOT / "oialr_jax"

FLOORS = {
    "allocation": 0,
    "compiling": 0,
    "effects": 0,
    "linalg": 0,
    "renames": 0,
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
    "weighted": 1,
    "averages": 2,
    "contract": 2,
    "decompose": 2,
    "forms": 2,
    "interpret": 2,
    "labels": 2,
    "rows": 2,
    "reports": 2,
    "serialization": 2,
    "sharding": 2,
    "transform": 2,
    "checkpoint": 3,
    "factored": 3,
    "following": 3,
    "matrices": 3,
    "moments": 3,
    "bases": 4,
    "checks": 4,
    "due": 4,
    "explain": 4,
    "export": 4,
    "curvature": 4,
    "ranking": 4,
    "rehearsal": 4,
    "orthogonal": 4,
    "adapters": 5,
    "projection": 5,
    "stability": 5,
    "surgery": 5,
    "weighing": 5,
    "adaptive": 6,
    "defaults": 6,
    "loss_step": 6,
    "compression": 6,
    "training": 7,
    "wrapping": 7,
    "nnx": 8,
    "__init__": 9,  # sees every room and is seen by none
}
STAIRS = {  # of a room that is a package, whose __init__ sees all of its own
    "export": {"identity": 0, "program": 0, "manifest": 1, "merge": 1, "folder": 2},
    "orthogonal": {"polar": 0, "directions": 1, "transforms": 2, "optimizers": 3},
    "stability": {"singular": 0, "comparison": 1, "settled": 2},
}
PLAIN = ("allocation", "cost", "schedule")  # decide on integers: no JAX
FLAX = ("nnx", "serialization")  # know Flax, and import it where it is used
FILES = ("checkpoint", "export")  # the rooms that may open files


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


def climbs(room: str, source: str) -> set[str]:
    """Imports of ours, in the source of a room, that do not go to a lower floor.

    A room of a package, say "stability.singular", imports what lies below the package,
    and within it what lies further down the stairs. From outside each import of such a
    room is one of the package, whose __init__ runs first.
    """
    outer, _, inner = room.partition(".")
    stairs, found = STAIRS.get(outer, {}), set()
    for name in within(imported(source), "oialr_jax"):
        # a name of the package itself, say oialr_jax.adaptive's, comes from __init__
        target = [*name.split("."), "__init__"][1]
        if target != outer or not stairs:
            down = FLOORS.get(target, FLOORS["__init__"]) < FLOORS[outer]
        else:
            step = [*name.split("."), "", ""][2]
            down = step in stairs and (not inner or stairs[step] < stairs[inner])
        if not down:
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


def room_of(path: pathlib.Path) -> str:
    """The name of a file's room, dotted within a package; its __init__ is the package.

    >>> room_of(LIBRARY / "stability" / "__init__.py")
    'stability'
    """
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[1:] and parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", files("oialr_jax"))
def test_imports_go_down_a_floor(path):
    room = room_of(path)
    outer, _, inner = room.partition(".")
    assert outer in FLOORS, f"room {outer!r} is not in the table of floors"
    if path.parent != LIBRARY:
        assert outer in STAIRS, f"package {outer!r} has no stairs in the table"
        assert not inner or inner in STAIRS[outer], f"{room!r} is not on its stairs"
    assert climbs(room, path.read_text()) == set()


def test_the_tables_name_rooms_that_exist():
    inside = {f"{outer}.{x}" for outer, stairs in STAIRS.items() for x in stairs}
    assert FLOORS.keys() | inside == {room_of(x) for x in LIBRARY.rglob("*.py")}


@pytest.mark.parametrize("path", files("oialr_jax"))
def test_the_library_needs_neither_flax_nor_programs(path):
    ours = ("train", "tests")
    foreign = ours if room_of(path) in FLAX else ("flax", *ours)
    assert within(imported(path.read_text()), *foreign) == set()


@pytest.mark.parametrize("room", FLAX)
def test_flax_is_imported_where_it_is_used(room):
    tree = ast.parse((LIBRARY / f"{room}.py").read_text())
    top = [x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)]
    source = "\n".join(map(ast.unparse, top))
    assert within(imported(source), "flax") == set()


@pytest.mark.parametrize("path", files("oialr_jax"))
def test_only_rooms_of_files_open_files(path):
    if room_of(path).partition(".")[0] not in FILES:
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
        ("surgery", "from oialr_jax import training", {"oialr_jax.training"}),
        ("surgery", "from oialr_jax import RankRule", {"oialr_jax.RankRule"}),
        ("adaptive", "import oialr_jax", {"oialr_jax"}),
        ("cost", "import oialr_jax.lowrank as x", {"oialr_jax.lowrank"}),
        ("export", "from oialr_jax.export.merge import merge", set()),
        ("cost", "def f():\n  from .schedule import x", {"oialr_jax.schedule.x"}),
        ("__init__", "from oialr_jax.adaptive import adaptive", set()),
        ("cost", "import oialr_jax_tools", set()),
        ("adaptive", "from oialr_jax.stability.comparison import compare", set()),
        ("stability", "from oialr_jax.stability.comparison import compare", set()),
        (
            "stability.singular",
            "from oialr_jax.stability.comparison import compare",
            {"oialr_jax.stability.comparison.compare"},
        ),
        (
            "stability.comparison",
            "from oialr_jax import stability",
            {"oialr_jax.stability"},
        ),
        ("stability.comparison", "from oialr_jax.orthogonal.polar import polar", set()),
        (
            "orthogonal.polar",
            "from oialr_jax.stability import compare",
            {"oialr_jax.stability.compare"},
        ),
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
