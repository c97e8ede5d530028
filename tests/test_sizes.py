"""Programs stay small enough to be read: files and functions have a largest size."""

import ast
import pathlib

import pytest

PROGRAMS = pathlib.Path(__file__).parent.parent / "train"
LONGEST, LARGEST = 80, 24_000
"""Lines of a function, and bytes of a file."""


def too_long(source):
    """Functions with more lines than the longest may have."""
    functions = (
        x
        for x in ast.walk(ast.parse(source))
        if isinstance(x, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [x.name for x in functions if x.end_lineno - x.lineno >= LONGEST]


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(x, id=str(x.relative_to(PROGRAMS)))
        for x in sorted(PROGRAMS.rglob("*.py"))
    ],
)
def test_programs_are_in_files_and_functions_that_can_be_read(path):
    assert path.stat().st_size <= LARGEST
    assert too_long(path.read_text()) == []


def test_sees_a_function_that_is_too_long():
    body = "    pass\n" * LONGEST
    assert too_long(f"def f():\n{body}") == ["f"]
    assert too_long(f"def f():\n{body.removesuffix('    pass' + chr(10))}") == []
