"""Tables over runs: means and spreads by hand, and folders that hold no result."""

import json

import pytest

from train import report, table


def write(folder, name, **values):
    summary = {
        "seed": 0,
        "method": "oialr",
        "test_accuracy": 0.9,
        "test_loss": 1.0,
        "stored_fraction": 0.25,
        "trainable_fraction": 0.04,
        "train_flops": 300,
        "dense_flops": 400,
        "ranks": {"a": [8, 8, 2], "b": [8, 4, 4]},
        "wall_seconds": 10.0,
    }
    (folder / name).mkdir()
    (folder / name / "summary.json").write_text(json.dumps(summary | values))
    (folder / name / "metrics.jsonl").write_text("")
    return folder / name


def test_rows_are_kinds_of_runs_with_the_spread_over_their_seeds(tmp_path):
    folders = [
        write(tmp_path, "x-oialr-seed0", test_accuracy=0.9),
        write(tmp_path, "x-oialr-seed1", seed=1, test_accuracy=0.94, wall_seconds=12),
        write(tmp_path, "x-dense-seed0", ranks={}, stored_fraction=1.0),
    ]
    head, _, *rows = table.markdown(table.read(folders)).splitlines()
    cells = [[x.strip() for x in row.strip("|").split("|")] for row in rows]
    assert [x.strip() for x in head.strip("|").split("|")][2:4] == ["accuracy", "loss"]
    assert [x[:2] for x in cells] == [["x-oialr", "0, 1"], ["x-dense", "0"]]
    assert cells[0][2] == "0.92 ± 0.03"
    stored, trained, flops = "25.0 ± 0.0 %", "4.0 ± 0.0 %", "75.0 ± 0.0 %"
    assert cells[0][4:] == [stored, trained, flops, "2 to 4", "11 ± 1"]
    assert cells[1][2:] == ["0.9", "1", "100.0 %", "4.0 %", "75.0 %", "dense", "10"]


def test_the_points_of_the_plot_are_the_runs(tmp_path):
    folders = [
        write(tmp_path, "x-seed0", stored_fraction=0.2),
        write(tmp_path, "x-seed1", seed=1, stored_fraction=0.3, test_accuracy=0.8),
    ]
    stored, trained = table.draw(table.read(folders)).axes
    (line,) = stored.get_lines()
    assert line.get_xdata() == pytest.approx([20, 30])
    assert line.get_ydata() == pytest.approx([0.9, 0.8])
    (line,) = trained.get_lines()
    assert line.get_xdata() == pytest.approx([4, 4])


def test_a_report_of_several_runs_prints_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda folder: [])
    folders = [write(tmp_path, f"x-seed{i}", seed=i) for i in range(2)]
    report.main([str(x) for x in folders])
    assert "| x | 0, 1 |" in capsys.readouterr().out
    assert (tmp_path / "comparison.png").stat().st_size > 1000


def test_the_lines_of_the_steps_are_the_rows_of_the_benchmark(tmp_path):
    rows = [
        {"model": m, "order": o, "rank_fraction": r, "ratio_to_dense": r + i}
        for i, m in enumerate(("mini-vit", "resnet18"))
        for o in table.ORDERS
        for r in (1.0, 0.5)
    ]
    first, second = table.steps(rows).axes
    assert [x.get_label() for x in first.get_lines()[:4]] == [*table.ORDERS.values()]
    for i, axes in enumerate((first, second)):
        for line in axes.get_lines()[:4]:
            assert line.get_xdata() == pytest.approx([1.0, 0.5])
            assert line.get_ydata() == pytest.approx([1.0 + i, 0.5 + i])
    source = tmp_path / "steps.json"
    source.write_text(json.dumps({"rows": rows}))
    table.main(source)
    assert (tmp_path / "steps.png").stat().st_size > 0
    assert len(table.steps(rows[: len(rows) // 2]).axes) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ("[]", "has no rows of `python -m train.bench --suite steps`"),
        ('{"rows": [{"lag": 1}]}', "has no rows of `python -m train.bench"),
        ('{"rows": [{"model": "mlp"}]}', "has no steps of mini-vit or resnet18"),
    ],
)
def test_a_file_without_steps_is_told_in_one_line(content, message, tmp_path):
    source = tmp_path / "x.json"
    if content is not None:
        source.write_text(content)
    with pytest.raises(SystemExit, match=message) as told:
        table.main(source)
    assert str(source) in str(told.value)
    assert "\n" not in str(told.value)
    assert not source.with_suffix(".png").exists()
