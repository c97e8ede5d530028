"""Barlow Twins: its loss against numpy, views, the linear classifier, a short run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal

import oialr_jax as oialr
from train import images, selfsup


def test_the_loss_is_that_of_the_correlations():
    first, second = normal(0, 20, 6), 0.5 * normal(0, 20, 6) + normal(1, 20, 6) + 3
    agreement, redundancy = selfsup.barlow_twins(first, second, eps=0.0)
    both = np.asarray(np.concatenate([first, second], axis=1), np.float64)
    c = np.corrcoef(both.T)[:6, 6:]
    own = np.diagonal(c)
    np.testing.assert_allclose(agreement, np.sum((1 - own) ** 2), rtol=1e-4)
    rest = np.sum(c**2) - np.sum(own**2)
    np.testing.assert_allclose(redundancy, rest, rtol=1e-4)


def test_nothing_is_lost_on_equal_views_of_independent_components():
    random = np.asarray(normal(0, 20, 6))
    z, _ = np.linalg.qr(random - random.mean(0))
    z = jnp.asarray(z * np.arange(20, 80, 10))
    agreement, redundancy = selfsup.barlow_twins(z, z)
    np.testing.assert_allclose([agreement, redundancy], 0, atol=1e-5)


def test_embeddings_that_collapse_lose_the_most_and_stay_finite():
    z = jnp.ones((20, 6))
    agreement, redundancy = selfsup.barlow_twins(z, z)
    np.testing.assert_allclose([agreement, redundancy], [6, 0], atol=1e-6)
    grad = jax.grad(lambda z: sum(selfsup.barlow_twins(z, z)))(z)
    assert np.all(np.isfinite(grad))


def test_views_are_random_by_key_and_differ_by_image():
    image = jnp.broadcast_to(normal(0, 1, 8, 8, 1), (5, 8, 8, 1))
    one, again, other = (selfsup.shaded(jax.random.key(i), image) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.all(np.any(one != other, axis=(1, 2, 3)))
    assert np.all(np.any(one[1:] != one[:1], axis=(1, 2, 3)))
    factor = np.sum(one * image, axis=(1, 2, 3)) / np.sum(image**2, axis=(1, 2, 3))
    assert np.all((factor > 0.5) & (factor < 1.5))
    assert np.all(np.abs(one - factor[:, None, None, None] * image) < 1)


def test_views_move_by_an_eighth_at_most_and_turn_only_where_they_may():
    """One bright pixel per image: where it is."""
    image = jnp.zeros((400, 8, 8, 1), jnp.uint8).at[:, 3, 2].set(200)

    def places(flips):
        found = selfsup.moved(jax.random.key(0), image, flips=flips)
        flat = np.argmax(np.reshape(found, (400, -1)), axis=1)
        return {(int(i) // 8, int(i) % 8) for i in flat}

    near = {(i, j) for i in (2, 3, 4) for j in (1, 2, 3)}
    assert places(False) == near
    assert places(True) == near | {(i, 7 - j) for i, j in near}


def test_the_classifier_is_as_good_as_the_features():
    label = np.arange(300) % 3
    features = 5 * np.eye(3)[label] + np.asarray(normal(0, 300, 3))
    train, test = slice(0, 200), slice(200, 300)
    right = selfsup.probe(features[train], label[train], features[test], label[test])
    assert right > 0.95
    noise = np.asarray(normal(1, 300, 3))
    assert selfsup.probe(noise[train], label[train], noise[test], label[test]) < 0.5
    assert selfsup.probe(0 * noise[train], label[train], noise[test], label[test]) < 0.5


def test_features_that_are_not_finite_are_worth_no_number():
    label, features = np.arange(6) % 3, np.ones((6, 2))
    for bad in (np.nan, np.inf):
        broken = features.copy()
        broken[3, 1] = bad
        for train, test in ((features, broken), (broken, features)):
            assert np.isnan(selfsup.probe(train, label, test, label))


@pytest.mark.parametrize("mesh", ["data=1", "data=8"])
def test_features_of_every_image_come_in_order(mesh):
    image = np.arange(selfsup.EVALUATION_BATCH + 37)[:, None]
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh(mesh))
    found = selfsup.every(lambda x: 2 * x, layout, image)
    np.testing.assert_array_equal(found, 2 * image)


def test_a_short_run_learns(tmp_path):
    arguments = ["digits", "--steps", "30", "--batch", "128", "--mesh", "data=1"]
    arguments += ["--log-every", "10", "--eval-every", "30", "--width", "32"]
    selfsup.main([*arguments, "--out", str(tmp_path), "--name", "run"])
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["test_accuracy"] > 0.6
    assert not found["ranks"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [x["loss"] for x in map(json.loads, lines) if x["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_images_that_do_not_fit_into_memory_are_refused(monkeypatch):
    settings = dataclasses.replace(selfsup.PRESETS["digits"][1], dataset="imagenet2012")
    monkeypatch.setattr(images, "dataset", lambda _: object())
    with pytest.raises(ValueError, match="imagenet2012 does not fit into memory"):
        selfsup.task(settings)
