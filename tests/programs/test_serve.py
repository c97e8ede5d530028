"""Times of exported programs: every row has what the table shows."""

import json

import pytest

from train import serve

ROW = {
    "rank": 0.25,
    "form": "core",
    "dtype": "int8",
    "ms": 3.0,
    "least_ms": 2.0,
    "most_ms": 4.0,
    "ratio": 0.5,
    "temporary_mb": 1.5,
    "file_mb": 7.0,
    "difference": 0.001,
}


def test_the_table_has_a_line_for_each_program():
    dense = {k: ROW[k] for k in ROW if k not in ("file_mb", "difference")}
    dense |= {"rank": None, "form": "JAX, dense", "dtype": "float32"}
    rows = [x | {"batch": batch} for batch in (1, 64) for x in (dense, ROW)]
    lines = serve.table(rows).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3] == (
        "| 0.25 | core, int8 | 3.0 (2.0 to 4.0) | 0.50 | 1.5 | "
        "3.0 (2.0 to 4.0) | 0.50 | 1.5 | 7.0 | 1e-03 |"
    )


def test_an_unknown_model_is_one_line():
    with pytest.raises(SystemExit, match="unknown model 'vit'"):
        serve.main(["--model", "vit"])


@pytest.mark.long
def test_an_mlp_is_served(tmp_path):
    out = tmp_path / "serve.json"
    options = ["--ranks", "0.25", "1.0", "--forms", "core/int8", "--repeats", "1"]
    serve.main(["--model", "mlp", *options, "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(x["form"], x["batch"]) for x in rows] == [
        (form, batch)
        for batch in (1, 64)
        for form in ("JAX, dense", "auto", "auto", "core")
    ]
    for row in rows[1:4]:
        assert row["file_mb"] <= 1.02 * row["weights_mb"]
        assert row["difference"] < (0.05 if row["dtype"] == "int8" else 1e-5)
    assert rows[2]["stored_weights"] == rows[2]["dense_weights"]
    assert rows[1]["stored_weights"] < rows[1]["dense_weights"]
    assert rows[3]["weights_mb"] < 0.5 * rows[1]["weights_mb"]
