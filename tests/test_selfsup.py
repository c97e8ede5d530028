"""Barlow Twins: its loss against numpy, views, the linear classifier, a short run."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal

import oialr_jax as oialr
from train import selfsup


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
    one, again, other = (selfsup.view(jax.random.key(i), image) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.all(np.any(one != other, axis=(1, 2, 3)))
    assert np.all(np.any(one[1:] != one[:1], axis=(1, 2, 3)))


def test_views_move_by_an_eighth_at_most_and_turn_only_where_they_may():
    """One bright pixel per image: where it is, and that no other is as bright."""
    image = jnp.zeros((400, 8, 8, 1)).at[:, 3, 2].set(100.0)

    def places(flips):
        found = selfsup.view(jax.random.key(0), image, flips=flips)[..., 0]
        assert np.all(np.max(found, axis=(1, 2)) > 55)
        assert np.all(np.max(found, axis=(1, 2)) < 145)
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


@pytest.mark.parametrize("mesh", ["data=1", "data=8"])
def test_features_of_every_image_come_in_order(mesh):
    image = np.arange(selfsup.EVALUATION_BATCH + 37)[:, None]
    layout = oialr.Layout(oialr.make_mesh(mesh))
    found = selfsup.every(lambda x: 2 * x, layout, image)
    np.testing.assert_array_equal(found, 2 * image)


@pytest.mark.parametrize(
    ("method", "optimizer", "rate"),
    [("dense", "orthogonal_lars", 10), ("oialr", "orthogonal_sgd", 0.01)],
)
def test_a_short_run(tmp_path, method, optimizer, rate):
    arguments = ["digits", "--method", method, "--optimizer", optimizer]
    arguments += ["--learning-rate", str(rate)]
    arguments += ["--steps", "12", "--batch", "32", "--mesh", "data=1", "--width", "16"]
    arguments += ["--log-every", "3", "--eval-every", "12", "--save-every", "6"]
    selfsup.main([*arguments, "--out", str(tmp_path), "--name", "run"])
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["test_accuracy"] > 0.5
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [x["loss"] for x in map(json.loads, lines) if x["kind"] == "train"]
    assert losses[-1] < losses[0]
    convolutions = {f"encoder/conv{i}/kernel" for i in (1, 2, 3)}
    assert set(found["ranks"]) == (convolutions if method == "oialr" else set())
