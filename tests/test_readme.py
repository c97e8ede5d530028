"""README: its code runs, its numbers are those of train/results/, it stays short."""

import ast
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax.training.train_state import TrainState

import oialr_jax as oialr
from train.results import __main__ as results

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "train" / "results"
LONGEST = 145  # lines


def test_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= LONGEST


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)", README))))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists(), target


# ----------------------------------------------------------------------------- code

BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


class Model:
    """Two wide layers and a head, as the `model` that README takes for given."""

    params = {"a": normal(0, 32, 48), "b": normal(1, 48, 48), "head": normal(2, 48, 4)}  # noqa: RUF012

    @staticmethod
    def apply(variables, x):
        params = variables["params"]
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["head"]


def cross_entropy(logits, labels):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)


def names():
    """What README's code takes for given."""
    example = normal(3, 16, 32), np.arange(16) % 4
    return {
        "model": Model(),
        "cross_entropy": cross_entropy,
        "optax": optax,
        "params": dict(Model.params),
        "example": example,
        "data": [example] * 8,
    }


def test_the_one_call_trains_and_ends_with_a_quarter_of_the_weights():
    given = names()
    exec(BLOCKS[0].replace("delay=2500", "delay=4"), given)
    assert given["run"].schedule.events(8) == (4,)
    counts = oialr.counts(given["state"].params)
    assert counts.stored <= 0.25 * counts.dense
    assert jax.tree.map(jnp.shape, given["params"]) == {
        name: x.shape for name, x in Model.params.items()
    }
    assert np.isfinite(given["value"])


def test_the_parts_that_are_shown_train_too():
    given = names()
    exec(BLOCKS[0].partition("\n\nrun =")[0], given)

    def train_step(state, x, y):
        gradient = oialr.value_and_grad(given["forward"])
        value, grads = gradient(state.params, x, y)
        return state.apply_gradients(grads=grads), value

    given["train_step"] = train_step
    code = BLOCKS[1].replace("delay=2500, every=500, lag=25", "delay=2, every=3, lag=1")
    assert code != BLOCKS[1]
    exec(code, given)
    state = TrainState.create(apply_fn=None, params=given["params"], tx=given["tx"])
    for batch in given["data"]:
        state, value = given["step"](state, *batch)
    assert sorted(oialr.ranks(state.params)) == ["a", "b"]
    assert np.isfinite(value)


def test_every_block_of_code_is_one_of_these():
    assert len(BLOCKS) == 2


# -------------------------------------------------------------------------- numbers

NUMBER = r"\d+(?:\.\d+)?"
QUANTITY = re.compile(rf"({NUMBER}) ?(?:%|ms\b|s\b)|(\d+\.\d+)|± ({NUMBER})")


def prose(text):
    """The text without code, links' targets and what is set as code."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    named = r"(?:arXiv |jax |Python |Apache-)[\d.]+"
    return re.sub(rf"`[^`]*`|\]\([^)]*\)|{named}", "", text)


def step(model, fraction, order):
    """The step over dense as the benchmark has it, to two digits."""
    found = json.loads((RESULTS / "steps-cpu.json").read_text())["rows"]
    (row,) = (
        x
        for x in found
        if (x["model"], x["rank_fraction"], x["order"]) == (model, fraction, order)
    )
    return f"{row['ratio_to_dense']:.2f}"


SAID = [  # what README says outside of its table, and what its source says
    (r"\*\*18 % of its weights\*\*", "| plain, 0.1845 | 78,711 |"),
    (r"99.35 % test accuracy", "| plain, 0.1845 | 78,711 | 99.35 ± "),
    (r"\(99.38 % dense", "| dense | 431,080 | 99.38 ± "),
    (r"99.27 % for a small dense", "| small dense, 0.1845 | 77,309 | 99.27 ± "),
]
TIMED = [
    ("takes {} of the dense step at a quarter", ("mini-vit", 0.25, "auto")),
    ("rebuilt, as in the authors' code, {}", ("mini-vit", 0.25, "rebuilt")),
    ("takes {} times the dense step at full rank", ("mlp", 1, "auto")),
    ("at full rank and {} at half", ("mlp", 0.5, "auto")),
]


@pytest.mark.parametrize(("said", "there"), SAID, ids=[x for x, _ in SAID])
def test_what_is_said_stands_in_the_results(said, there):
    assert re.search(said.replace(" ", r"\s+"), README), said
    assert there in (RESULTS / "experiments.md").read_text()


@pytest.mark.parametrize(("said", "row"), TIMED, ids=[x[0][:24] for x in TIMED])
def test_steps_are_those_of_the_benchmark(said, row):
    assert said.format(step(*row)) in README


def test_no_other_quantity_is_in_the_readme():
    """A new number needs a line above, with its source."""
    known = {x for said, _ in SAID for x in re.findall(NUMBER, said)}
    known |= {step(*row) for _, row in TIMED}
    table = README.partition("## Results\n")[2].partition("\n\nMean")[0]
    text = prose(README.replace(table, ""))
    found = {x for match in QUANTITY.findall(text) for x in match if x}
    assert found - known == set()


def test_tables_are_those_that_are_printed_from_the_json():
    """`python -m train.results --write` changes nothing."""
    texts = [path.read_text() for path in (*RESULTS.glob("*.md"), ROOT / "README.md")]
    assert [results.marked(text) for text in texts] == texts
    names = re.findall(r"<!-- (\S+)\.json -->\n\|", "".join(texts))
    assert sorted(names) == sorted([*results.TABLES, results.OVERVIEW])
    plain = {x.stem for x in RESULTS.glob("*.json")} - results.TABLES.keys()
    assert plain == {"rates-cpu"}  # what a benchmark reads


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda x: x.stem)
def test_results_name_no_place_of_the_machine(path):
    assert re.findall(r'"[^"]*(?<![\w.])/\w[^"]*"', path.read_text()) == []


MEASURED = re.compile(r"\d ?(?:%|m?s\b|min\b)|± ?\.?\d")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "train").rglob("*.py")), ids=lambda x: x.stem
)
def test_docstrings_of_programs_have_no_results_that_can_go_stale(path):
    found = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert MEASURED.findall(found) == []
