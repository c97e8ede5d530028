"""Fine-tuning in every way: what trains, and that all of them learn."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from train import finetune, images
from train.data.arrays import drawn

SMALL = finetune.Settings(
    dataset="mnist",
    seeds=(0,),
    pretrain=2,
    steps=3,
    batch=8,
    ranks=(2, 3, 4),
    rates=(1e-2,),
    full_rates=(1e-3,),
    held_back=8,
)


def network(classes=5):
    model = finetune.LeNet5(classes=classes)
    params = model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))["params"]
    found = oialr.find_matrices(finetune.forward, params, jnp.zeros((1, 28, 28, 1)))
    return params, [x for x in found if not x.path.startswith("head")]


def test_a_half_has_its_classes_numbered_anew():
    data = drawn((28, 28, 1), 10)
    found = finetune.half(data, range(5, 10))
    assert set(found.label) == set(range(5))
    rows = data.train_label >= 5
    np.testing.assert_array_equal(found.label, data.train_label[rows] - 5)
    assert found.image.shape == (rows.sum(), 28, 28, 1)
    assert abs(found.image.mean()) < 0.5


def test_factors_are_as_many_as_cores():
    """At the ranks of the command, LoRA's least rank has an eighth more."""
    params, matrices = network()
    settings = finetune.Settings(dataset="mnist")
    factors = finetune.lora(params, matrices, settings, 0)
    weights = sum(a.size + b.size for a, b in factors)
    cores = sum(r * r for r in settings.ranks)
    assert cores <= weights < 1.15 * cores
    assert not any(np.any(b) for _, b in factors)
    share = (cores + 5 * 501) / oialr.counts(params).dense
    assert 0.009 < share <= 0.01


def test_every_pass_has_another_order():
    image, label = np.arange(20.0)[:, None], np.arange(20)
    settings = dataclasses.replace(SMALL, batch=10)
    given = [y for _, y in finetune.batches(image, label, settings, 4, seed=0)]
    assert sorted(np.concatenate(given[:2])) == list(range(20))
    assert sorted(np.concatenate(given[2:])) == list(range(20))
    assert not np.array_equal(given[0], given[2])


def test_unknown_names_are_one_line():
    with pytest.raises(SystemExit, match="unknown way 'all'; there are: full, head"):
        finetune.main(["mnist", "--ways", "all"])
    with pytest.raises(SystemExit, match="unknown dataset 'mnst', did you mean"):
        finetune.main(["mnst"])


def test_a_place_that_cannot_be_written_is_told_before_anything_is_trained(tmp_path):
    with pytest.raises(SystemExit, match=r"cannot be written \(Is a directory\)"):
        finetune.main(["mnist", "--json", str(tmp_path)])


@pytest.mark.long
def test_every_way_is_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(images, "dataset", lambda _: drawn((28, 28, 1), 10))
    results = finetune.run(SMALL)
    json.dumps(results)
    ways = results["ways"]
    assert set(ways) == set(finetune.WAYS)
    head = 5 * 501
    assert ways["head"]["trained_weights"] == head
    for way in ("cores", "gradients", "curvature"):
        assert ways[way]["trained_weights"] == head + 2**2 + 3**2 + 4**2
        assert ways[way]["state_mb"] == 8 * ways[way]["trained_weights"] / 1e6
    assert ways["full"]["state_mb"] > 80 * ways["cores"]["state_mb"]
    assert finetune.table(ways).count("\n") == 1 + len(ways)
