"""The search for a recipe: what it tries, what it keeps, how it goes on."""

import optuna
import pytest

from train import images
from train.models.vit import VisionTransformer
from train.studies import sweep

FLAGS = ["--steps", "12", "--out"]


@pytest.fixture(autouse=True)
def _shallow(monkeypatch):
    model = VisionTransformer(patch=2, depth=1, heads=2, width=16, classes=10)
    monkeypatch.setitem(images.MODELS, "vit-digits", (model, {}))


STUDY = "digits-steps12-seed0"


def study(folder):
    storage = f"sqlite:///{folder / 'digits' / 'sweep.db'}"
    return optuna.load_study(study_name=STUDY, storage=storage)


@pytest.mark.long
def test_a_search_goes_on_where_it_was_and_prints_what_no_trial_beats(tmp_path, capsys):
    sweep.main(["digits", "--trials", "1", *FLAGS, str(tmp_path)])
    assert len(study(tmp_path).trials) == 1
    sweep.main(["digits", "--trials", "2", *FLAGS, str(tmp_path)])
    found = study(tmp_path)
    assert len(found.trials) == 2
    assert [x.name for x in found.directions] == ["MAXIMIZE", "MINIMIZE"]
    done = [x for x in found.trials if x.state.name == "COMPLETE"]
    assert done
    for trial in done:
        settings = images.PRESETS["digits"][1]
        rate = trial.params["learning_rate"] / settings.learning_rate
        assert 1 / 4 <= rate <= 4
        accuracy, stored = trial.values
        assert 0 <= accuracy <= 1
        assert stored > 0
        assert (
            tmp_path / "digits" / STUDY / f"trial{trial.number}" / "summary.json"
        ).exists()
    assert len({tuple(x.params.values()) for x in done}) == len(done)
    rows = capsys.readouterr().out.strip().splitlines()
    best = {x.number for x in found.best_trials}
    assert {int(row.split("|")[1]) for row in rows[-len(best) :]} == best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "unknown preset 'digit', did you mean 'digits'?"),
        (["digits", "--trials", "0"], "`trials` must be at least 1, got 0"),
    ],
    ids=["preset", "trials"],
)
def test_bad_input_is_one_clear_line(arguments, message, tmp_path):
    with pytest.raises(SystemExit) as caught:
        sweep.main([*arguments, "--out", str(tmp_path)])
    assert str(caught.value).startswith("error: ")
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_trials_that_do_not_compare_are_no_trials_of_one_search(tmp_path, monkeypatch):
    """Smoke, length and seed each have a search of their own, which goes on."""
    ran = []

    def run(settings, *, name):
        ran.append((settings.out.name, name))
        return {"best": {"a": 0.5}, "metric": "a", "stored_fraction": 0.5}

    monkeypatch.setattr(images, "run", run)
    calls = [["--smoke"], [], ["--steps", "7"], ["--seed", "1"], ["--smoke"]]
    for call in calls:
        trials = "2" if len(ran) == 4 else "1"
        arguments = ["digits", "--trials", trials, "--out", str(tmp_path), *call]
        sweep.main(arguments)
    steps = images.PRESETS["digits"][1].steps
    assert ran == [
        ("digits-smoke-seed0", "trial0"),
        (f"digits-steps{steps}-seed0", "trial0"),
        ("digits-steps7-seed0", "trial0"),
        (f"digits-steps{steps}-seed1", "trial0"),
        ("digits-smoke-seed0", "trial1"),
    ]


def test_a_broken_database_is_one_clear_line(tmp_path):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "sweep.db").write_text("no database " * 100)
    with pytest.raises(
        SystemExit, match=r"sweep\.db cannot be read: delete it"
    ) as caught:
        sweep.main(["digits", "--out", str(tmp_path)])
    assert len(str(caught.value).splitlines()) == 1
