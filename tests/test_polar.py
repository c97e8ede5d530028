"""Polar factors by products: the polynomials, how near they come, and from where on."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from cases import normal
from scipy.optimize import linprog

from oialr_jax.orthogonal import polar

ROUNDING = 1e-4  # float32; coefficients of the short table reach 577


def polynomial(row, sigma):
    return sum(a * sigma ** (2 * i + 1) for i, a in enumerate(row))


def table(steps):
    best = polar._POLAR_EXPRESS if steps >= polar.EXACT_STEPS else polar._SHORT
    return [*best, *itertools.repeat(polar._CLASSIC, 8)][:steps]


@pytest.mark.parametrize("steps", [1, 3, 4, 6, 7, 9])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)], ids=str)
def test_every_step_is_its_polynomial_of_the_singular_values(steps, shape):
    u, sigma, vt = np.linalg.svd(normal(steps, *shape), full_matrices=False)
    expected = sigma / np.sum(sigma**8) ** (1 / 8) / (1 + polar._SAFETY)
    for row in table(steps):
        expected = polynomial(row, expected)
    x = jnp.asarray((u * sigma) @ vt, jnp.float32)[None]
    out = polar.polar_by("polar_express", steps=steps)(x)[0]
    np.testing.assert_allclose(out, (u * expected) @ vt, atol=ROUNDING)


def test_few_steps_map_to_near_one_from_where_they_say():
    sigma = np.geomspace(polar.SHORT_FROM, 1, 100_000)
    for row in polar._SHORT:
        sigma = polynomial(row, sigma)
    assert np.max(np.abs(sigma - 1)) < 0.17
    below = np.array([polar.SHORT_FROM / 2])
    for row in polar._SHORT:
        below = polynomial(row, below)
    assert below[0] < 0.5


def test_no_polynomials_of_these_degrees_come_nearer():
    """Each is the minimax one on what the step before leaves, by linear programming."""
    low, high = polar.SHORT_FROM, 1.0
    for row in polar._SHORT:
        grid = np.unique(
            np.concatenate([np.geomspace(low, high, 999), np.linspace(low, high, 999)])
        )
        powers = (grid[:, None] / high) ** (2 * np.arange(len(row)) + 1)
        slack = -np.ones((len(grid), 1))
        least = linprog(
            [0] * len(row) + [1],
            A_ub=np.block([[powers, slack], [-powers, slack]]),
            b_ub=np.concatenate([np.ones(len(grid)), -np.ones(len(grid))]),
            bounds=[(None, None)] * len(row) + [(0, None)],
        ).x[-1]
        found = np.max(np.abs(polynomial(row, grid) - 1))
        assert least <= found < 1.001 * least
        low, high = 1 - found, 1 + found


@pytest.mark.parametrize(
    ("steps", "condition", "error"),
    [(3, 1e2, 0.15), (4, 1e2, 0.02), (5, 1e2, 1e-5), (7, 1e3, 1e-4)],
)
def test_three_steps_are_within_a_sixth_and_seven_exact(steps, condition, error):
    """As the docstring of `orthogonalize` says; three take ten products."""
    u, _, vt = np.linalg.svd(normal(0, 64, 64))
    x = jnp.asarray((u * np.geomspace(1, 1 / condition, 64)) @ vt, jnp.float32)
    out = polar.polar_by("polar_express", steps=steps)(x[None])[0]
    assert np.linalg.norm(out - u @ vt) < error * np.linalg.norm(u @ vt)
