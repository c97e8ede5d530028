"""The comparison of orthogonal gradients: its runs, what it repeats, what it prints."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from train import files, optimizers
from train.models.mlp import MLP
from train.models.table import MODELS
from train.studies import arms
from train.studies import orthogonal as program

DENSE = arms.Kind("digits", "mlp", "orthogonal", 32, 12)
LOW = dataclasses.replace(DENSE, arm="muon", named=True, cosine=True, rank=0.25)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(program, "RATES", (1e-3, 1e-2))
    monkeypatch.setitem(MODELS, "mlp", (MLP(hidden=(16, 12), classes=10), {}))


def row(arm, rate, seed, validation, accuracy, **more):
    usual = {"loss": 0.5, "ms_per_step": 2.0, "seconds": 1.0, "steps": 24}
    own = {"arm": arm, "rate": rate, "seed": seed}
    return {**own, "validation": validation, "accuracy": accuracy, **usual, **more}


def test_training_is_compiled_once_and_repeats_bit_for_bit(monkeypatch):
    data = arms.load("digits", None)
    assert [len(x.label) for x in data] == [1149, 288, 360]
    made = arms.Program(DENSE, data)
    first, again, other, faster = (
        made.run(rate, seed)
        for rate, seed in ((0.01, 0), (0.01, 0), (0.01, 1), (0.1, 0))
    )
    assert first["loss"] == again["loss"]
    assert len({first["loss"], other["loss"], faster["loss"]}) == 3
    assert len(made.compiled) == 1
    assert first["accuracy"] > 0.3
    monkeypatch.setattr(made, "predicted", lambda *_: jnp.full((1, 10), jnp.nan))
    diverged = made.evaluated(
        None, None, arms.Part(data.test.image[:1], jnp.zeros(1, int))
    )
    assert diverged == (0.0, float("inf"))


def test_a_rank_holds_the_matrices_from_a_third_of_the_run_on(monkeypatch):
    made = arms.Program(LOW, arms.load("digits", None))
    phases, phase = [], made.phase

    def watched(carry, rate, order):
        carry, seconds = phase(carry, rate, order)
        phases.append((len(order), oialr.ranks(carry[0])))
        return carry, seconds

    monkeypatch.setattr(made, "phase", watched)
    made.run(0.01, 0)
    (before, dense), (after, low) = phases
    assert (before, after) == (4, 8)
    assert dense == {}
    assert {k: rank for k, (*_, rank) in low.items()} == {
        "hidden0/kernel": 4,
        "hidden1/kernel": 3,
    }


def test_the_rate_warms_up_and_falls_to_zero_where_it_shall():
    """The last step of a run does nothing, the steps of a constant rate are alike."""
    kind = dataclasses.replace(LOW, arm="adamw", rank=None, steps=40)
    made = arms.Program(kind, _flat())
    tx, params = made.optimizer(0.1), {"w": jnp.ones((4, 3))}
    state, steps = tx.init(params), []
    for _ in range(41):
        updates, state = jax.jit(tx.update)(params, state, params)
        steps.append(float(jnp.max(jnp.abs(updates["w"]))))
    assert steps[0] == 0
    assert steps[-1] < 1e-4 * max(steps)
    assert np.argmax(steps) < 10


def _flat():
    part = arms.Part(jnp.zeros((8, 4, 4, 1)), jnp.zeros(8, int))
    return arms.Data(part, part, part)


def test_every_epoch_is_a_new_order_of_all():
    order = arms.batches(0, 10, 3, 7)
    assert order.shape == (7, 3)
    for epoch in (order[:3], order[3:6]):
        assert len(set(epoch.ravel())) == 9
    assert not np.array_equal(order[:3], order[3:6])
    np.testing.assert_array_equal(order, arms.batches(0, 10, 3, 7))
    with pytest.raises(ValueError, match=r"`batch` must be in \[1, 10\], got 11"):
        arms.batches(0, 10, 11, 7)


def test_what_is_in_the_record_is_not_trained_again(tmp_path, monkeypatch, capsys):
    trained = []

    results = {"validation": 0.9, "accuracy": 0.8, "loss": 0.5}
    results |= {"seconds": 1.0, "ms_per_step": 2.0}

    class Fake:
        def __init__(self, kind, data):
            self.kind = kind

        def run(self, rate, seed):
            trained.append((rate, seed))
            return results

    monkeypatch.setattr(program, "Program", Fake)
    other = dataclasses.replace(DENSE, arm="sgd")
    monkeypatch.setattr(program, "kinds", lambda _: [DENSE, other])
    record = tmp_path / "sub" / "record.jsonl"
    command = ["--studies", "digits", "--seeds", "2", "--out", str(record)]
    program.main(command)
    assert len(trained) == 2 * 2 * 2
    lines = record.read_text().splitlines()
    record.write_text("\n".join(lines[:-1]) + "\n")
    program.main(command)
    assert trained[8:] == [(1e-2, 1)]
    assert (
        len({program.identity(json.loads(x)) for x in record.read_text().splitlines()})
        == 8
    )
    printed = capsys.readouterr().out
    for arm in ("orthogonal", "sgd"):
        assert printed.count(f"| {arm} | 80.0 ± 0.0 / 0.500 (80.0) |") == 2


def test_a_record_that_was_cut_goes_on_and_has_what_diverged(tmp_path, capsys):
    run = program.Run("digits", DENSE, 1e-3, 0)
    bad = {"validation": -np.inf, "accuracy": 0.0, "loss": np.inf, "ms_per_step": 1.0}
    record = tmp_path / "record.jsonl"
    files.append(record, program.as_row(run) | bad)
    assert "Infinity" not in record.read_text()
    with record.open("a") as stream:
        stream.write('{"study": "di')
    (found,) = program.read(record)
    assert (found["validation"], found["loss"]) == (-np.inf, np.inf)
    assert "line 2 is no record" in capsys.readouterr().err
    program.perform([run], program.Settings(out=record))
    assert "the last line was cut short" in capsys.readouterr().err
    assert len(record.read_text().splitlines()) == 1


def test_a_record_in_use_is_refused(tmp_path, monkeypatch):
    def train(study, settings):
        raise AssertionError("trains beside the other")

    monkeypatch.setattr(program, "of", train)
    with (
        files.held(tmp_path),
        pytest.raises(SystemExit, match="writes in"),
    ):
        program.main(["--studies", "digits", "--out", str(tmp_path / "x.jsonl")])


def test_a_result_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "of", lambda *_: pytest.fail("trained"))
    given = ["--out", str(tmp_path / "x.jsonl"), "--json", str(tmp_path)]
    with pytest.raises(SystemExit, match="cannot be written"):
        program.main(given)


def test_the_rate_is_chosen_by_validation_and_the_test_reported():
    rows = [
        row("sgd", 1e-3, 0, 0.7, 0.99),
        row("sgd", 1e-2, 0, 0.8, 0.50, loss=1.0),
        row("sgd", 1e-2, 1, 0.8, 0.60, loss=2.0, ms_per_step=1.5),
        row("orthogonal", 1e-3, 0, 0.9, 0.950),
        row("orthogonal", 1e-2, 0, 0.8, 0.945),
    ]
    assert program.chosen(rows) == {"sgd": 1e-2, "orthogonal": 1e-3}
    sgd, orthogonal = program.summary("digits", rows)
    assert (sgd["arm"], sgd["rate"], sgd["plateau"]) == ("sgd", 1e-2, 1)
    assert (sgd["accuracy"], sgd["loss"]) == ([0.5, 0.6], [1.0, 2.0])
    assert (orthogonal["rate"], orthogonal["plateau"]) == (1e-3, 2)
    assert json.loads(json.dumps([sgd, orthogonal])) == [sgd, orthogonal]
    lines = program.table([sgd, orthogonal]).splitlines()
    assert lines[2].startswith("| sgd | 55.0 ± 5.0 / 1.500 (55.0) |  |")
    assert lines[3].startswith("| orthogonal | 95.0 ± 0.0 / 0.500 (94.5) |")
    diverged = files.nulled([{**sgd, "loss": [np.inf, 1.0]}])  # as JSON has it
    assert "| sgd | 55.0 ± 5.0 / inf (55.0) |" in program.table(diverged)


def test_equal_time_is_as_many_steps_as_adamw_leaves_time_for():
    took = {kind.arm: 2.0 for kind in program.kinds("cores")} | {"muon": 4.0}
    rows = [row(arm, rate, 0, rate, 0.9) for arm in took for rate in (1e-3, 1e-2)]
    runs = program.as_long(rows, took, seeds=2)
    steps = {run.kind.arm: run.kind.steps for run in runs}
    assert steps == {x: 200 if x == "muon" else 400 for x in took}
    assert {run.rate for run in runs} == {1e-2}
    assert {run.seed for run in runs} == {0, 1}


def test_times_are_those_of_dense_and_low_rank_steps(monkeypatch):
    low = dataclasses.replace(LOW, steps=30)
    monkeypatch.setattr(program, "kinds", lambda _: [low])
    ranks = []

    def interleaved(runs, rounds):
        for run in runs:
            run()
            (carry,) = (
                x.cell_contents
                for x in run.__closure__
                if type(x.cell_contents) is list
            )
            ranks.append(len(oialr.ranks(carry[0][0])))
        return [(1.0, 0, 0), (0.25, 0, 0)]

    monkeypatch.setattr(program, "interleaved", interleaved)
    assert program.times(None) == {"muon": pytest.approx(6 * 1.5 / 3)}
    assert ranks == [0, 2]


def test_studies_name_what_exists():
    for study in set(program.STUDIES) - {"cores-time"}:
        for kind in program.kinds(study):
            table = optimizers.OPTIMIZERS if kind.named else arms.ARMS
            assert kind.arm in table
            assert kind.model in {*MODELS, "barlow-twins", "transformer"}
            assert kind.data in {*arms.SIZES, "shakespeare"}
    with pytest.raises(
        SystemExit, match="unknown study 'digit', did you mean 'digits'"
    ):
        program.main(["--studies", "digit"])


def test_cores_time_needs_the_cores(tmp_path):
    with pytest.raises(SystemExit, match="`cores-time` needs the runs of `cores`"):
        program.main(["--studies", "cores-time", "--out", str(tmp_path / "none.jsonl")])
