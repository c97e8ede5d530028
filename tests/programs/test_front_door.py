"""The benchmark of the front door compares programs that do the same."""

import json

import numpy as np
import pytest

from train.studies import front_door

TINY = front_door.Settings(width=32, batch=8, rounds=2, block=1)


@pytest.mark.long
@pytest.mark.parametrize("pairs", [front_door.functions, front_door.modules])
def test_both_programs_of_a_pair_do_the_same(pairs):
    for name, ours, hand in pairs(TINY):
        for _ in range(front_door.DELAY + 2):  # over the conversion
            values = ours(), hand()
        np.testing.assert_allclose(*values, rtol=1e-5, err_msg=name)


@pytest.mark.long
def test_it_prints_and_writes_a_row_for_each_pair(tmp_path, capsys):
    options = ["--width", "32", "--batch", "8", "--rounds", "2", "--block", "1"]
    front_door.main([*options, "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["what"] for row in found] == ["training", "wrap", "nnx.wrap"]
    assert capsys.readouterr().out.strip() == front_door.table(found)
    assert all(row["low"] <= row["ratio"] <= row["high"] for row in found)
