"""The benchmark of the front door compares programs that do the same."""

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
def test_it_prints_a_row_for_each_pair(capsys):
    front_door.main(TINY)
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split()[1] for row in rows] == ["training", "wrap", "nnx.wrap"]
