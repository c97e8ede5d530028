"""train.compress run: a dense run cut at once, and what follows it."""

import json

import pytest

import oialr_jax as oialr
from train import compress, export, text

STEPS = ["--steps", "60", "--log-every", "30", "--eval-every", "60"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    options = ["--method", "dense", "--width", "32", "--mesh", "data=1"]
    text.main(["sonnets", *options, *STEPS, "--out", str(out), "--name", "dense"])
    return out / "dense"


@pytest.mark.long
def test_a_run_is_cut_evaluated_tuned_and_can_be_exported(dense, capsys):
    out = dense.with_name("small")
    options = ["--keep", "0.6", "--steps", "10", "--batches", "4", "--out", str(out)]
    compress.main(["run", str(dense), *options])
    summary = json.loads((out / "summary.json").read_text())
    whole = json.loads((dense / "summary.json").read_text())
    assert summary["dense"]["loss"] == pytest.approx(whole["test_loss"], rel=1e-5)
    assert summary["dense"]["stored_weights"] == whole["dense_weights"]
    assert summary["labels"] == "drawn"
    # worse by the cut, by less where it is weighed, and better after the tuning
    losses = [summary[x]["loss"] for x in ("dense", "curvature", "plain")]
    assert losses == sorted(losses)
    assert summary["tuned"]["loss"] < summary["curvature"]["loss"]
    assert "curvature: loss" in capsys.readouterr().out
    opened = export.opened(out, out)
    low = opened.variables["params"]
    inside = sum(x.weights() for x in opened.begun.matrices)
    stored = oialr.counts(low).stored
    assert stored == summary["tuned"]["stored_weights"]
    assert stored - (whole["dense_weights"] - inside) <= 0.6 * inside
    again = opened.task.evaluate(_State(low))
    assert again["loss"] == pytest.approx(summary["tuned"]["loss"], rel=1e-5)
    with pytest.raises(SystemExit, match="is there already: name another --out"):
        compress.main(["run", str(dense), *options])
    with pytest.raises(SystemExit, match="is in low rank already"):
        compress.main(["run", str(out), "--out", str(out.with_name("other"))])
    assert not out.with_name("other").exists()


class _State:
    def __init__(self, params):
        self.averaged, self.extra = params, {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--keep", "1.5"], r"`keep` must be in \(0, 1\), got 1.5"),
        (["--batches", "0"], "`batches` must be at least 1, got 0"),
        (["--keep", "0.5"], "is no run"),
        (["--out", "gs://bucket/x"], "is a URL"),
        (["--out", __file__ + "/x"], "is a file: name another folder"),
    ],
)
def test_mistakes_are_told_before_a_run_is_opened(options, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        compress.main(["run", str(tmp_path / "none"), *options])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_budget_out_of_reach_is_told_and_nothing_is_written(dense):
    out = dense.with_name("wrong")
    with pytest.raises(SystemExit, match="`budget` is"):
        compress.main(["run", str(dense), "--keep", "0.0001", "--out", str(out)])
    assert not out.exists()
