"""train.studies.controls: each number beside a small dense network of its weights."""

import dataclasses
import json

import jax
import pytest

import oialr_jax as oialr
from train import images, text
from train.studies import controls


def settings(out, preset="sonnets", **options):
    return controls.Settings(preset, budgets=(0.5,), seeds=(0, 1), out=out, **options)


@pytest.mark.parametrize(
    ("program", "preset", "budget"),
    [(text, "sonnets", 0.4), (images, "digits", 0.3)],
    ids=["text", "images"],
)
def test_a_small_dense_network_fills_its_budget_and_no_more(
    program, preset, budget, tmp_path
):
    usual = program.PRESETS[preset][1]
    scale = controls._scale(settings(tmp_path, preset), program, usual, budget)

    def weights(scale):
        changed = dict(vars(usual), scale=scale, mesh="data=1")
        init = program.task(type(usual)(**changed)).init
        params = jax.eval_shape(init, jax.random.key(0))["params"]
        return oialr.counts(params).stored

    whole = weights(1.0)
    assert 0.8 * budget * whole < weights(scale) <= budget * whole


@pytest.mark.parametrize(
    ("metric", "chosen"), [("accuracy", "0.2"), ("loss", "0.1"), ("mse", "0.1")]
)
def test_a_rate_is_chosen_on_a_seed_of_its_own(metric, chosen, tmp_path):
    asked = []

    def run(options, seed):
        asked.append((options[-1], seed))
        rate = float(options[-1].split()[1])
        return {"metric": metric, "best": {metric: rate}, "seed": seed}

    arm = controls._best(settings(tmp_path), run, ["--method dense"], [0.1, 0.2])
    assert arm["options"] == ["--method dense", f"--learning-rate {chosen}"]
    assert [seed for _, seed in asked] == [controls.CHOOSING] * 2 + [0, 1]
    assert [x["seed"] for x in arm["runs"]] == [0, 1]


def test_nothing_is_trained_to_choose_among_one_rate(tmp_path):
    def run(options, seed):
        assert seed != controls.CHOOSING
        return {"metric": "loss", "best": {"loss": 1.0}, "seed": seed}

    arm = controls._best(settings(tmp_path), run, ["--method dense"], [0.1])
    assert arm["options"] == ["--method dense", "--learning-rate 0.1"]
    assert [x["seed"] for x in arm["runs"]] == [0, 1]


def test_optimizers_train_the_plain_runs_each_at_its_best_rate(tmp_path, monkeypatch):
    def run(_, program, options, seed):
        assert program == "train.text"
        rate = next((x.split()[1] for x in options if "rate" in x), "0")
        best = 0.002 if any("muon" in x for x in options) else 0.004
        found = {"loss": abs(float(rate) - best), "seed": seed}
        return {"metric": "loss", "best": found, "seed": seed}

    monkeypatch.setattr(controls, "_run", run)
    (tmp_path / "sonnets").mkdir()
    found = controls.measured(settings(tmp_path, optimizers=("adamw", "muon")))
    arms = found["arms"]
    names = ["adamw", "adamw and weighed", "muon", "muon and weighed"]
    assert list(arms)[-4:] == [f"{name}, 0.5" for name in names]
    for name, rate in (("adamw", "0.004"), ("muon", "0.002")):
        expected = ["--budget 0.5", f"--optimizer {name}", f"--learning-rate {rate}"]
        assert arms[f"{name}, 0.5"]["options"] == expected
        weighed = arms[f"{name} and weighed, 0.5"]
        assert weighed["options"] == [*expected, "--weigh 8"]
        for arm in (arms[f"{name}, 0.5"], weighed):
            assert [x["seed"] for x in arm["runs"]] == [0, 1]
    small = arms["small dense, muon, 0.5"]["options"]
    assert small[-2:] == ["--optimizer muon", "--learning-rate 0.002"]
    assert "small dense, adamw, 0.5" not in arms
    assert not any("optimizer" in x for x in arms["plain, 0.5"]["options"])
    late = settings(tmp_path, options=("delay=0.9",), label="late ")
    both = controls.measured(late)["arms"]
    assert both["late plain, 0.5"]["options"][0] == "--delay 0.9"
    assert both.keys() == arms.keys() | {"late plain, 0.5", "late weighed, 0.5"}


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    """A table that has been written; nothing more may be trained."""

    def run(_, program, options, seed):
        return {"metric": "loss", "best": {"loss": 1.0}, "seed": seed}

    (tmp_path / "sonnets").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(controls, "_run", run)
        controls.measured(settings(tmp_path))

    def trained(*_):
        raise AssertionError("trained before it is refused")

    monkeypatch.setattr(controls, "_run", trained)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": (0,)}, r"has seeds \[0, 1\], not \[0\]: name another --out"),
        ({"steps": 24}, "has steps None, not 24: name another --out"),
        ({"rates": (1.0,)}, r"has rates .*: name another --out"),
        ({"batches": 2}, "has batches 8, not 2: name another --out"),
        ({"options": ("delay=0.9",)}, "labelled '' with --options : .*another --label"),
        ({"rates": ()}, "`rates` must have one at least"),
    ],
)
def test_runs_of_another_kind_are_not_added_to_a_table(earlier, changed, message):
    path = earlier / "sonnets" / "controls.json"
    before = path.read_bytes()
    other = dataclasses.replace(settings(earlier), **changed)
    with pytest.raises(ValueError, match=message):
        controls.measured(other)
    assert path.read_bytes() == before


def test_a_broken_table_is_told(earlier):
    (earlier / "sonnets" / "controls.json").write_text('{"pre')
    with pytest.raises(ValueError, match=r"controls\.json is broken .*: delete it"):
        controls.measured(settings(earlier))


def test_the_table_has_means_and_deviations():
    runs = [
        {
            "seed": seed,
            "metric": "accuracy",
            "test_accuracy": value,
            "stored_weights": 1500,
            "wall_seconds": 10,
        }
        for seed, value in enumerate((0.9, 0.92))
    ]
    swept = {"options": ["--method dense", "--learning-rate 0.1"], "tried": {}}
    arms = {
        "dense": {**swept, "runs": runs},
        "plain": {"options": ["--weigh 0"], "runs": runs},
    }
    shown = controls.table(arms)
    assert "| run | weights | test accuracy, % | seeds | rate | s |" in shown
    same = "1,500 | 91.00 ± 1.41 | 90.00 92.00"
    assert f"| dense | {same} | 0.1 | 10 |" in shown
    assert f"| plain | {same} | preset's | 10 |" in shown
    del runs[0]["wall_seconds"]
    assert f"| dense | {same} | 0.1 | 10 |" in controls.table(arms)
    del runs[1]["wall_seconds"]
    assert f"| dense | {same} | 0.1 | - |" in controls.table(arms)
    runs[1]["test_accuracy"] = None
    broken = "1,500 | nan ± nan | 90.00 nan"
    assert f"| dense | {broken} | 0.1 | - |" in controls.table(arms)


def test_the_overview_has_a_row_for_each_budget_with_the_whole_networks():
    def arm(value):
        run = {"metric": "validation_loss", "test_loss": value}
        return {"options": [], "runs": [run, run]}

    arms = {"dense": arm(1.0), "dense, Muon": arm(2.0)}
    for i, budget in enumerate(("0.5", "0.25")):
        for j, kind in enumerate((*controls.KINDS, "muon")):
            arms[f"{kind}, {budget}"] = arm(3.0 + 4 * i + j)
    arms |= {"late plain, 0.25": arm(11.0), "late weighed, 0.25": arm(12.0)}
    result = {"preset": "sonnets", "arms": arms, "labels": {"": [], "late ": ["x"]}}
    head, _, *lines = controls.overview([result]).splitlines()
    whole = "| preset | test | weights | dense | dense, Muon"
    assert head == f"{whole} | small dense | plain | weighed |"
    numbers = [
        " ± 0.0000 | ".join(f"{x}.0000" for x in (1, 2, *y)) + " ± 0.0000"
        for y in ((3, 4, 5), (7, 8, 9), (7, 11, 12))
    ]
    assert lines == [
        f"| sonnets | loss | 50.0% | {numbers[0]} |",
        f"| sonnets | loss | 25.0% | {numbers[1]} |",
        f"| sonnets, late | loss | 25.0% | {numbers[2]} |",
    ]


def test_a_run_that_fails_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"failed: .*`steps` must be at least 1"):
        controls._run(settings(tmp_path, steps=-3), "train.text", ["--method dense"], 0)


def test_runs_of_another_length_are_other_runs(tmp_path, monkeypatch):
    names = []

    def started(command, **options):
        names.append(command[command.index("--name") + 1])
        return controls.subprocess.CompletedProcess(command, 1, "", "no")

    monkeypatch.setattr(controls.subprocess, "run", started)
    for steps in (None, 10, 20):
        with pytest.raises(RuntimeError, match="failed: no"):
            controls._run(
                settings(tmp_path, steps=steps), "train.text", ["--weigh 0"], 0
            )
    assert len(set(names)) == 3


def test_a_rate_that_was_never_finite_is_not_chosen(tmp_path):
    def run(options, seed):
        rate = float(options[-1].split()[1])
        return {"metric": "loss", "best": {} if rate < 0.15 else {"loss": rate}}

    arm = controls._best(settings(tmp_path), run, ["--method dense"], [0.1, 0.2])
    assert arm["tried"] == {"0.2": 0.2}
    with pytest.raises(RuntimeError, match="not finite at any rate"):
        controls._best(settings(tmp_path), run, ["--method dense"], [0.1, 0.12])


def test_an_unknown_preset_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit, match="sonets"):
        controls.main(["sonets", "--budgets", "0.5", "--out", str(tmp_path)])


@pytest.mark.long
def test_a_study_of_short_runs(tmp_path):
    arguments = ["sonnets", "--budgets", "0.6", "--steps", "24", "--seeds", "0"]
    options = ["--batches", "2", "--out", str(tmp_path)]
    controls.main([*arguments, *options])
    found = json.loads((tmp_path / "sonnets" / "controls.json").read_text())
    names = ["dense", "dense, Muon", "small dense, 0.6", "plain, 0.6", "weighed, 0.6"]
    assert list(found["arms"]) == names
    whole = found["arms"]["dense"]["runs"][0]["stored_weights"]
    for name in names[2:]:
        assert found["arms"][name]["runs"][0]["stored_weights"] <= 0.6 * whole
