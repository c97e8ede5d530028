"""train.studies.stability: what it draws and prints of runs that have ended."""

import json

import pytest

from train import files, images
from train.studies import stability


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """Runs of two seeds at both rates, of six records of two layers each."""

    def trained(settings, *, name):
        raise AssertionError(f"{name} is trained again")

    monkeypatch.setattr(images, "run", trained)
    for i, rate in enumerate(stability.RATES):
        for seed in range(2):
            folder = tmp_path / f"stability-digits-{rate}-seed{seed}"
            files.begin(folder)
            for step in range(1, 7):
                basis = 0.9 + 0.01 * step - 0.05 * i + 0.02 * seed
                usual = {"cosine": 0.5, "mixing": 0.25, "null": {"basis": 0.4}}
                if step in (3, 6):  # without a null, as most records of a run are
                    usual.pop("null")
                layers = {x: {**usual, "basis": basis} for x in ("a", "b")}
                line = {"kind": "stability", "step": step, "since": step - 1}
                line |= {"epoch": step / 2, "layers": layers}
                files.append(folder / files.METRICS, line)
            files.finish(folder, {"test_accuracy": 0.9 + 0.02 * seed})
    return tmp_path


def test_ended_runs_are_drawn_printed_and_written(ended, capsys):
    path = ended / "found.json"
    options = ["--presets", "digits", "--seeds", "2", "--out", str(ended)]
    stability.main([*options, "--json", str(path)])
    assert (ended / "stability-digits.png").stat().st_size > 10_000
    rows = json.loads(path.read_text())["rows"]
    said = capsys.readouterr().out
    assert said.strip() == stability.table(rows)
    epochs = "0.5 | 1 | 2 | 2.5 | 3"  # those with a null, and the last
    assert f"| digits, cosine, accuracy 91.00 ± 1.41 %; epoch | {epochs} |" in said
    assert "| basis P (sd to 0.014) | 0.920 | 0.930 | 0.950 | 0.960 | 0.970 |" in said
    assert "| basis P (sd to 0.014) | 0.870 | 0.880 | 0.900 | 0.910 | 0.920 |" in said
    null = "basis after a random change as large (sd to 0.000)"
    assert f"| {null} | 0.400 | 0.400 | 0.400 | 0.400 | - |" in said
    thirds = "0.925 (0.400) / 0.945 (0.400) / 0.965 (0.400)"
    assert f"| digits: a | {thirds} | 0.875 (0.400) /" in said


def test_one_seed_has_no_deviation(ended, capsys):
    stability.main(["--presets", "digits", "--seeds", "1", "--out", str(ended)])
    said = capsys.readouterr().out
    assert "| digits, cosine, accuracy 90.00 %; epoch |" in said
    assert "| basis P (sd to -) | 0.910 |" in said


def test_an_unknown_preset_is_told(tmp_path):
    with pytest.raises(SystemExit, match="digit"):
        stability.main(["--presets", "digit", "--out", str(tmp_path)])
