"""The language model program: a short run, every optimizer's name, its evaluation."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from train import text as program
from train.data import text


def test_a_short_run_with_an_optimizer_by_name_ends_in_low_rank(tmp_path):
    arguments = ["shakespeare", "--smoke", "--mesh", "data=1", "--optimizer", "muon"]
    program.main([*arguments, "--out", str(tmp_path)])
    folder = tmp_path / "shakespeare-oialr-seed0-muon"
    found = json.loads((folder / "summary.json").read_text())
    assert found["optimizer"] == "muon"
    assert found["test_loss"] < np.log(len(text.embedded().characters))
    assert 0 < found["test_accuracy"] < 1
    names = {"attention_in", "attention_out", "mlp_in", "mlp_out"}
    assert set(found["ranks"]) == {f"block0/{x}/kernel" for x in names} | {
        "head/kernel"
    }


@pytest.mark.parametrize("mesh", ["data=1", "data=8"])
def test_evaluation_counts_every_character_once(mesh):
    """An oracle that is wrong, and sure of it, at every fourth place."""
    data = text.embedded()
    passages = text.passages(data.parts["train"], context=16)
    count = len(passages["target"])
    assert count % program.EVALUATION_BATCH  # the last piece is filled up
    truth = {
        x.tobytes(): y
        for x, y in zip(passages["token"], passages["target"], strict=True)
    }
    characters = len(data.characters)

    def oracle(token):
        target = np.stack([truth[x.tobytes()] for x in np.asarray(token)])
        wrong = np.arange(16) % 4 == 0
        return 50 * jnp.eye(characters)[(target + wrong) % characters]

    layout = oialr.sharding.Layout(oialr.sharding.make_mesh(mesh))
    found = program.evaluate(oracle, layout, passages)
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["loss"] == pytest.approx(12.5, rel=1e-4)


def test_presets_name_data_that_exists():
    for _, settings in program.PRESETS.values():
        assert settings.dataset in program.DATASETS


def test_a_text_shorter_than_a_passage_is_said():
    settings = dataclasses.replace(program.PRESETS["sonnets"][1], context=10_000)
    with pytest.raises(ValueError, match=r"`context` must be in \[1, \d+\], got 10000"):
        program.task(settings)
