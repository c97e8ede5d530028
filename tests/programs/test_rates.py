"""Learning rates: timm's formula, rates that rise, and halvings."""

import importlib
import math

import jax
import numpy as np
import optax
import pytest

from train import rates

CASES = {
    "plain": {"length": 40},
    "warm-up": {"length": 40, "warmup": 7, "lowest": 1e-5},
    "k-decay": {"length": 40, "warmup": 5, "k": 0.34},
    # The authors' low-rank runs of the mini vision transformer.
    "rising": {"length": 40, "warmup": 4, "lowest": 8e-4, "k": 0.34},
}
BASE = 3e-4


def timm_rate(t, *, length, lowest=0.0, warmup=0, k=1.0):
    """In plain Python, one update at a time."""
    if t < warmup:
        return t * BASE / warmup
    t = t - warmup
    if t >= length:
        return lowest
    wave = 1 + math.cos(math.pi * t**k / length**k)
    return lowest + 0.5 * (BASE - lowest) * wave


@pytest.mark.parametrize("name", CASES)
def test_the_cosine_is_that_of_timm(name):
    fields = CASES[name]
    rate = jax.jit(rates.cosine(BASE, **fields))
    found = [float(rate(t)) for t in range(60)]
    expected = [timm_rate(t, **fields) for t in range(60)]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-9)


@pytest.mark.peers
@pytest.mark.parametrize("name", CASES)
def test_the_cosine_is_what_timm_computes(name):
    scheduler = importlib.import_module("timm.scheduler")
    torch = importlib.import_module("torch")
    fields = dict(CASES[name])
    theirs = scheduler.CosineLRScheduler(
        torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=BASE),
        t_initial=fields["length"],
        lr_min=fields.get("lowest", 0.0),
        warmup_t=fields.get("warmup", 0),
        warmup_prefix=True,
        k_decay=fields.get("k", 1.0),
    )
    rate = rates.cosine(BASE, **fields)
    for t in range(60):
        (expected,) = theirs._get_lr(t)
        np.testing.assert_allclose(float(rate(t)), expected, rtol=2e-5, atol=1e-9)


def test_the_cosine_of_one_cycle_is_that_of_optax():
    ours = rates.cosine(BASE, length=40, warmup=10, lowest=1e-6)
    theirs = optax.warmup_cosine_decay_schedule(0.0, BASE, 10, 50, end_value=1e-6)
    for t in range(60):
        np.testing.assert_allclose(ours(t), theirs(t), rtol=1e-5, atol=1e-9)


def test_k_decay_has_the_known_multipliers():
    rate = rates.cosine(1.0, length=1000, k=0.34)
    found = [float(rate(t)) for t in (10, 50, 100, 250, 500, 750, 900)]
    expected = [0.896, 0.711, 0.567, 0.310, 0.105, 0.021, 0.003]
    np.testing.assert_allclose(found, expected, atol=5e-4)


def test_a_rate_whose_end_is_above_its_base_rises_all_the_time():
    rate = rates.cosine(BASE, **CASES["rising"])
    found = [float(rate(t)) for t in range(45)]
    assert np.all(np.diff(found) >= 0)
    assert found[-1] == pytest.approx(8e-4)


def test_halving_begins_after_the_second_epoch():
    rate = rates.halving(1e-4, every=5)
    found = [float(rate(t)) for t in range(20)]
    expected = np.repeat([1e-4, 1e-4, 5e-5, 2.5e-5], 5)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rates.cosine(1.0, length=0), "at least 0, got 0 and 0"),
        (lambda: rates.cosine(1.0, length=3, warmup=-1), "got 3 and -1"),
    ],
    ids=["length", "warmup"],
)
def test_a_rate_that_cannot_be_is_an_error(build, message):
    with pytest.raises(ValueError, match=message):
        build()
