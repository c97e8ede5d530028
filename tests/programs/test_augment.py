"""Augmentation on the device: a function of its key, and timm's formulas."""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from train.data import augment

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 12, 10, 3), dtype=np.uint8)
FLOATS = (PIXELS.astype(np.float32) - 128) / 64
TARGET = np.asarray(augment.targets(jnp.arange(6), 8, 0.1))
FUNCTIONS = {
    "flip": lambda key: augment.flip(key, PIXELS),
    "crop": lambda key: augment.crop(key, PIXELS, pad=3),
    "resized_crop": lambda key: augment.resized_crop(key, PIXELS),
    "erase": lambda key: augment.erase(key, FLOATS, probability=0.9),
    "mixup": lambda key: augment.mixup(key, FLOATS, TARGET, 0.8),
    "cutmix": lambda key: augment.cutmix(key, FLOATS, TARGET),
    "mix": lambda key: augment.mix(key, FLOATS, TARGET),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_key_alone_decides(name):
    first, again, other = (FUNCTIONS[name](jax.random.key(x)) for x in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(jax.tree.leaves(first)[0] != jax.tree.leaves(other)[0])
    image = jax.tree.leaves(first)[0]
    assert image.shape == PIXELS.shape
    assert image.dtype in (jnp.uint8, jnp.float32)


def test_half_of_the_images_are_flipped():
    image = jnp.broadcast_to(jnp.arange(3.0)[None, None, :, None], (1000, 2, 3, 1))
    found = np.asarray(augment.flip(jax.random.key(0), image))
    turned = np.all(found == image[:, :, ::-1], axis=(1, 2, 3))
    kept = np.all(found == image, axis=(1, 2, 3))
    assert np.all(turned ^ kept)
    assert 440 < turned.sum() < 560


def test_crops_are_the_padded_image_somewhere_everywhere():
    image = jnp.broadcast_to(PIXELS[:1], (2000, *PIXELS.shape[1:]))
    found = np.asarray(augment.crop(jax.random.key(0), image, pad=2))
    wide = np.pad(PIXELS[0], ((2, 2), (2, 2), (0, 0)))
    parts = {
        wide[i : i + 12, j : j + 10].tobytes(): (i, j)
        for i in range(5)
        for j in range(5)
    }
    places = [parts[x.tobytes()] for x in found]
    counts = np.unique(places, axis=0, return_counts=True)[1]
    assert len(counts) == 25
    assert counts.min() > 40  # of 80 expected


@pytest.mark.parametrize("kind", ["BILINEAR", "BICUBIC"])
@pytest.mark.parametrize(
    "box", [(0, 0, 12, 10), (2, 3, 5, 4), (7, 0, 5, 10), (11, 9, 1, 1)], ids=str
)
def test_rectangles_are_resized_as_pillow_does(kind, box):
    top, left, h, w = box
    arrays = [jnp.full(6, x) for x in box]
    cubic = jnp.full(6, kind == "BICUBIC")
    found = np.asarray(augment.resize(jnp.asarray(PIXELS), *arrays, cubic))
    for pixels, ours in zip(PIXELS, found, strict=True):
        part = Image.fromarray(pixels[top : top + h, left : left + w])
        theirs = np.asarray(part.resize((10, 12), Image.Resampling[kind]))
        difference = np.abs(ours.astype(int) - theirs)
        assert np.max(difference) <= 1
        assert np.mean(difference) < 0.1  # halves are rounded either way


def timm_rectangle(rng, size, area, aspect, *, erasing):
    """Of one image in plain Python; None where none of ten fits."""
    height, width = size
    for _ in range(10):
        pixels = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(*np.log(aspect)))
        w, h = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
        if (w < width and h < height) if erasing else (w <= width and h <= height):
            return h, w, rng.integers(height - h + 1), rng.integers(width - w + 1)
    return None


@pytest.mark.parametrize("erasing", [True, False], ids=["erase", "resized_crop"])
def test_rectangles_are_distributed_as_those_of_timm(erasing):
    count, size = 4000, (16, 24)
    area, aspect = ((0.02, 1 / 3), (0.3, 1 / 0.3)) if erasing else ((0.3, 1), (0.5, 2))
    *found, fits = augment._rectangles(
        jax.random.key(3), count, size, area, aspect, inclusive=not erasing
    )
    rng = np.random.default_rng(0)
    drawn = [
        timm_rectangle(rng, size, area, aspect, erasing=erasing) for _ in range(count)
    ]
    missing = sum(x is None for x in drawn) / count
    assert abs(1 - float(jnp.mean(fits)) - missing) < 0.01
    expected = np.array([x for x in drawn if x is not None]).T
    for ours, theirs in zip(found, expected, strict=True):
        ours = np.asarray(ours)[np.asarray(fits)]
        assert ours.min() == theirs.min()
        assert ours.max() == theirs.max()
        grid = np.arange(25)
        below = [np.searchsorted(np.sort(x), grid) / len(x) for x in (ours, theirs)]
        assert np.max(np.abs(below[0] - below[1])) < 0.04


def test_what_is_erased_is_noise_in_rectangles_of_some_images():
    image = jnp.full((2000, 16, 24, 3), 7.0)
    found = np.asarray(augment.erase(jax.random.key(0), image, probability=0.25))
    erased = np.any(found != 7, axis=-1)
    some = np.any(erased, axis=(1, 2))
    assert 0.22 < some.mean() < 0.28
    for mask in erased[some]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert 0.01 < mask.mean() < 0.4
    noise = found[erased]
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


def test_no_rectangle_of_the_size_of_an_image_leaves_its_middle():
    wide = jnp.asarray(RNG.integers(0, 256, (3, 2, 40, 1), dtype=np.uint8))
    found = augment.resized_crop(jax.random.key(0), wide, area=(1.0, 1.0))
    part = [jnp.full(3, x) for x in (0, 18, 2, 3)]
    both = [augment.resize(wide, *part, jnp.full(3, x)) for x in (False, True)]
    for i in range(3):
        assert any(bool(jnp.all(found[i] == x[i])) for x in both)


def test_targets_are_smoothed_over_all_classes():
    expected = np.full((6, 8), 0.1 / 8)
    expected[np.arange(6), np.arange(6)] += 0.9
    np.testing.assert_allclose(TARGET, expected, rtol=1e-6)


def share_of(target):
    """How much of itself the first target kept."""
    own, other = TARGET[0], TARGET[-1]
    return float(np.dot(target[0] - other, own - other) / np.sum((own - other) ** 2))


@pytest.mark.parametrize("seed", range(5))
def test_mixup_blends_images_and_targets_with_the_batch_turned_around(seed):
    image, target = augment.mixup(jax.random.key(seed), FLOATS, TARGET, 0.8)
    share = share_of(np.asarray(target))
    assert 0 <= share <= 1
    expected = share * FLOATS + (1 - share) * FLOATS[::-1]
    np.testing.assert_allclose(image, expected, atol=1e-5)
    np.testing.assert_allclose(
        target, share * TARGET + (1 - share) * TARGET[::-1], atol=1e-6
    )


def test_shares_are_from_the_beta_distribution():
    keys = jax.random.split(jax.random.key(0), 2000)
    image = jnp.zeros((2, 1, 1, 1))
    target = jnp.eye(2)
    share = jax.vmap(lambda k: augment.mixup(k, image, target, 0.4)[1][0, 0])(keys)
    assert abs(float(share.mean()) - 0.5) < 0.03
    assert abs(float(share.var()) - 1 / (4 * (2 * 0.4 + 1))) < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_takes_a_box_and_its_part_of_the_target(seed):
    image, target = augment.cutmix(jax.random.key(seed), FLOATS, TARGET)
    mask = np.any(np.asarray(image) != FLOATS, axis=(0, 3))
    np.testing.assert_array_equal(
        image, np.where(mask[..., None], FLOATS[::-1], FLOATS)
    )
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(rows):
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    share = 1 - mask.mean()
    np.testing.assert_allclose(
        target, share * TARGET + (1 - share) * TARGET[::-1], atol=1e-6
    )


@pytest.mark.parametrize("share", [0.0, 0.3, 0.77, 1.0])
def test_boxes_are_those_of_timm(share):
    size = (12, 10)
    side = math.sqrt(1 - share)
    for row in range(12):
        for column in range(10):
            found = augment.bounds(size, jnp.asarray(share), row, column)
            expected = []
            for length, middle in zip(size, (row, column), strict=True):
                cut = int(length * side)
                expected.append(max(0, middle - cut // 2))
                expected.append(min(length, middle + (cut + 1) // 2))
            assert [int(x) for x in found] == expected


def test_mixing_is_one_or_the_other():
    keys = jax.random.split(jax.random.key(0), 200)
    found = jax.vmap(lambda key: augment.mix(key, FLOATS, TARGET)[0])(keys)
    found = np.asarray(found)
    either = (found == FLOATS) | (found == FLOATS[::-1])
    cut = np.all(either, axis=(1, 2, 3, 4))
    assert 70 < cut.sum() < 130


@pytest.mark.peers
def test_timm_mixes_the_same(monkeypatch):
    """When it draws what we drew."""
    mixup = importlib.import_module("timm.data.mixup")
    torch = importlib.import_module("torch")
    images = torch.tensor(FLOATS.transpose(0, 3, 1, 2))
    make = functools.partial(mixup.Mixup, label_smoothing=0.1, num_classes=8)
    mixed, target = augment.mixup(jax.random.key(4), FLOATS, TARGET, 0.8)
    share = share_of(np.asarray(target))
    with monkeypatch.context() as patch:
        patch.setattr(np.random, "beta", lambda *_: share)
        theirs = make(mixup_alpha=0.8)(images.clone(), torch.arange(6))
    np.testing.assert_allclose(
        mixed, theirs[0].numpy().transpose(0, 2, 3, 1), atol=1e-5
    )
    np.testing.assert_allclose(target, theirs[1].numpy(), atol=1e-5)
    for share in (0.0, 0.3, 0.77):
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "randint", lambda low, high, size: high // 2)
            theirs = mixup.rand_bbox((3, 12, 10), share)
        ours = augment.bounds((12, 10), jnp.asarray(share), 6, 5)
        assert [int(x) for x in ours] == [int(x) for x in theirs]
