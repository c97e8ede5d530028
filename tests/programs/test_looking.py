"""train.studies.looking: what a look at curvature costs, beside a step."""

import json

import pytest

from train.studies import looking


def test_every_row_is_measured(tmp_path, capsys):
    path = tmp_path / "looks.json"
    options = ["--models", "mlp", "--batch", "4", "--fractions", "0.25"]
    looking.main([*options, "--repeats", "1", "--json", str(path)])
    found = json.loads(path.read_text())
    dense, low = found["rows"]
    assert found["command"][2] == "train.studies.looking"
    assert (dense["rank_fraction"], low["rank_fraction"]) == (None, 0.25)
    for row in (dense, low):
        assert row["ratio"] == pytest.approx(row["look_ms"] / row["step_ms"])
        assert row["look_ms_min"] <= row["look_ms"] <= row["look_ms_max"]
    assert low["sums_bytes"] < dense["sums_bytes"] / 4
    assert "| mlp | 0.25 |" in capsys.readouterr().out


def test_an_unknown_model_is_told():
    with pytest.raises(SystemExit, match="mini-vit"):
        looking.main(["--models", "mini-vat"])


def test_where_rows_cannot_be_written_nothing_is_measured(tmp_path, monkeypatch):
    def rows(settings):
        raise AssertionError("measured")

    monkeypatch.setattr(looking, "rows", rows)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"^error: .*file is a file"):
        looking.main(["--json", str(tmp_path / "file" / "rows.json")])
