"""What is promised of the digits, measured again: one seed, or all six."""

import json
import os
import statistics
import subprocess
import sys

import pytest

from train import images

SEEDS = range(2, 8)  # the recipe was tuned on seeds 0 and 1


def trained(method, seed, out):
    """The summary of one run."""
    name = f"{method}-{seed}"
    arguments = ["--method", method, "--seed", str(seed), "--name", name]
    images.main(["digits", *arguments, "--mesh", "data=1", "--out", str(out)])
    return json.loads((out / name / "summary.json").read_text())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    return {
        (method, seed): trained(method, seed, out)
        for method in ("dense", "oialr")
        for seed in SEEDS
    }


def test_one_seed_of_digits_in_low_rank(tmp_path):
    """As users run it, in a process of its own; six seeds: `train/results/`."""
    options = ["--method", "oialr", "--seed", str(SEEDS[0]), "--name", "run"]
    command = [sys.executable, "-m", "train.images", "digits", *options]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run([*command, "--out", str(tmp_path)], check=True, env=env)
    run = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert run["test_accuracy"] >= 0.965
    assert run["stored_fraction"] <= 0.35
    assert run["trainable_fraction"] <= 0.12


def mean(digits, method, key):
    return statistics.mean(digits[method, seed][key] for seed in SEEDS)


@pytest.mark.long
@pytest.mark.optimized
def test_digits_in_low_rank_within_a_point_of_dense(digits):
    dense = mean(digits, "dense", "test_accuracy")
    assert dense >= 0.96
    assert mean(digits, "oialr", "test_accuracy") >= dense - 0.01


@pytest.mark.long
@pytest.mark.optimized
def test_digits_store_and_train_few_weights(digits):
    assert mean(digits, "oialr", "stored_fraction") <= 0.35
    assert mean(digits, "oialr", "trainable_fraction") <= 0.12
    for seed in SEEDS:
        run = digits["oialr", seed]
        assert run["stored_fraction"] <= 0.35
        assert run["stored_weights"] == round(
            run["stored_fraction"] * run["dense_weights"]
        )
        stored = run["dense_weights"] + sum(
            (m + n + r) * r - m * n for m, n, r in run["ranks"].values()
        )
        assert run["stored_weights"] == stored
