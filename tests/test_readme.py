"""README: its code runs, its numbers are those of train/results/, it stays short."""

import ast
import json
import pathlib
import re
import statistics

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


def section(file, title):
    """The text below a heading of a results file."""
    text = (RESULTS / file).read_text()
    _, found, rest = text.partition(f"\n## {title}\n")
    assert found, f"{file} has no section {title!r}"
    return rest.partition("\n## ")[0]


def rows(text):
    """The rows of all tables, as lists of cells."""
    lines = [x for x in text.splitlines() if x.startswith("|")]
    return [[cell.strip() for cell in x.strip("|").split("|")] for x in lines]


def step(model, fraction, order):
    """The step over dense as the benchmark has it, to two digits."""
    found = json.loads((RESULTS / "steps-cpu.json").read_text())["rows"]
    (row,) = (
        x
        for x in found
        if (x["model"], x["rank_fraction"], x["order"]) == (model, fraction, order)
    )
    return f"{row['ratio_to_dense']:.2f}"


VGG = "A small VGG on Fashion-MNIST"
TASKS = {  # of README's table: the section, and its names of the methods
    "small VGG, Fashion-MNIST": (VGG, "dense", "oialr, preset"),
    "Autoformer, ETTh2 (MSE)": ("A short form of etth2-192", "dense", "oialr"),
    "LeNet5, Fashion-MNIST": ("LeNet5 on Fashion-MNIST", "dense", "oialr"),
    "small ViT, digits": ("Digits", "dense", "oialr"),
}
SAID = [  # what README says outside of its table, and what its source says
    (r"\*\*24.7 % of its weights\*\*", "| 24.7% |"),
    ("at 92.94 % test", "| 92.94 ± 0.10 % |"),
    (r"\(93.42 % dense\)", "| 93.42 ± 0.08 % |"),
    ("after 93 % of the time", "93 % of the dense time"),
    ("91.85 % against", "widths 16, 32 and 64, 91.85 %"),
    ("at most 91.55 % in", "to the end (.97) 91.55 %"),
]
TIMED = [
    ("takes {} of the dense step at a quarter", ("mini-vit", 0.25, "auto")),
    ("rebuilt, as in the authors' code, {}", ("mini-vit", 0.25, "rebuilt")),
    ("takes {} times the dense step at full rank", ("mlp", 1, "auto")),
]


def test_the_table_of_results_has_the_numbers_of_the_experiments():
    text = README.partition("## Results\n")[2].partition("\n\nMean")[0]
    _, _, *found = rows(text)
    assert len(found) == 2 * len(TASKS)
    task = seeds = ""
    for name, method, test, stored, each, whole in found:
        task, _, seeds = name.rpartition(", ") if name else (task, "", seeds)
        title, *methods = TASKS[task]
        source = section("experiments.md", title)
        (row,) = (x for x in rows(source) if x[0] == methods[method != "dense"])
        cells = {x.replace("%", " %").replace("  ", " ") for x in row}
        assert {test.replace("%", " %").replace("  ", " "), stored} <= cells, row
        assert not whole or whole in cells, row
        assert not each or each.removesuffix(" ms") in re.findall(NUMBER, source)
        listed = [x for x in row if re.fullmatch(rf"{NUMBER}(?: {NUMBER})+", x)]
        if listed and title != "A short form of etth2-192":
            assert len(listed[0].split()) == int(seeds)


@pytest.mark.parametrize(("said", "there"), SAID, ids=[x for x, _ in SAID])
def test_what_is_said_stands_in_the_results(said, there):
    assert re.search(said.replace(" ", r"\s+"), README), said
    assert there in section("experiments.md", VGG)


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


@pytest.mark.parametrize("file", ["experiments.md"])
def test_means_and_spreads_are_those_of_the_seeds_beside_them(file):
    checked = 0
    for row in rows((RESULTS / file).read_text()):
        listed = [x.split() for x in row if re.fullmatch(r"[\d.]+( [\d.]+){2,4}", x)]
        listed = [x for x in listed if all("." in y for y in x)]
        if not listed:
            continue
        mean, _, spread = row[1].removesuffix(" %").partition(" ± ")
        values = [float(x) for x in listed[0]]
        digits = len(mean.partition(".")[2])
        assert abs(statistics.mean(values) - float(mean)) <= 0.6 * 10**-digits, row
        assert abs(statistics.stdev(values) - float(spread)) <= 0.6 * 10**-digits, row
        checked += 1
    assert checked >= 8


def test_tables_are_those_that_are_printed_from_the_json():
    """`python -m train.results --write` changes nothing."""
    texts = [path.read_text() for path in RESULTS.glob("*.md")]
    assert [results.marked(text) for text in texts] == texts
    names = re.findall(r"<!-- (\S+)\.json -->\n\|", "".join(texts))
    assert sorted(names) == sorted(results.TABLES)
    plain = {x.stem for x in RESULTS.glob("*.json")} - results.TABLES.keys()
    assert plain == {"rates-cpu"}  # what a benchmark reads


MEASURED = re.compile(r"\d ?(?:%|m?s\b|min\b)|± ?\.?\d")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "train").rglob("*.py")), ids=lambda x: x.stem
)
def test_docstrings_of_programs_have_no_results_that_can_go_stale(path):
    found = ast.get_docstring(ast.parse(path.read_text())) or ""
    assert MEASURED.findall(found) == []
