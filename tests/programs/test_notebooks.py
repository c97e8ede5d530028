"""The notebooks: each runs in a fresh kernel and says what its committed outputs say.

`python tests/test_notebooks.py` runs them all and writes their outputs anew; so does it
with the names of some.
"""

import os
import pathlib
import re
import sys

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 150_000  # bytes: notebooks are read on the web and kept in the history
SECONDS = 300  # for one cell; a notebook takes less than a minute on two idle cores


def executed(path: pathlib.Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel, on one device."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=SECONDS,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": path.parent}},
    )
    client.execute(env=environment())
    del notebook.metadata["language_info"]  # the version of Python, which may be any
    return notebook


def environment() -> dict[str, str]:
    """Of a kernel: this checkout, and none of the devices that conftest.py fakes."""
    variables = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    paths = [str(ROOT), variables.get("PYTHONPATH", "")]
    return variables | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
    }


def words(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """What the outputs of every cell say, without numbers, which depend on the machine.

    Of a figure that there is one.
    """
    return [
        [said(output) for output in cell.get("outputs", [])] for cell in notebook.cells
    ]


def said(output: nbformat.NotebookNode) -> str:
    if output.output_type == "stream":
        return " ".join([output.name, *re.sub(r"\S*\d\S*", "#", output.text).split()])
    return " ".join([output.output_type, *sorted(output.get("data", {}))])


def code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@notebooks
def test_is_committed_with_the_outputs_of_one_run(path):
    cells = code(nbformat.read(path, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell.outputs for cell in cells)


@notebooks
def test_is_small(path):
    assert path.stat().st_size <= LARGEST


@notebooks
def test_readme_links_to_it(path):
    assert f"(notebooks/{path.name})" in (ROOT / "README.md").read_text()


@pytest.mark.long
@notebooks
def test_runs_and_says_what_is_committed(path):
    notebook = executed(path)  # raises what a cell raises
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert [x.text for x in outputs if x.get("name") == "stderr"] == []  # no warnings
    assert words(notebook) == words(nbformat.read(path, as_version=4))


def output(text: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_output("stream", name="stdout", text=text)


def test_numbers_are_not_compared_and_words_are():
    assert said(output("rank 16, 98.3% off by 3e-06\n")) == said(
        output("rank 8, 7% off by -1.0e+10")
    )
    assert said(output("rank 16 kept")) != said(output("rank 16 cut"))


if __name__ == "__main__":
    for argument in sys.argv[1:] or NOTEBOOKS:
        file = pathlib.Path(argument).absolute()
        nbformat.write(executed(file), file)
