"""The compiler below: chains of products as users compile them, and what is said.

Elsewhere the suite compiles with most optimizations off, so that no kernel is fused;
the tests marked `optimized` compile as users do, at sizes that fuse.
"""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import oialr_jax as oialr
from oialr_jax.lowrank import Axes, factor
from oialr_jax.orthogonal import polar
from oialr_jax.versions import CURE, fault

ROUNDING = 2e-5  # float32, relative to the largest entry of the reference
ORDERS = ("chain", "merged", "rebuilt", "dense")
SHAPES = ((128, 384, 16), (128, 512, 64))  # m, n, rank


def centred(x):
    return x - x.mean(-1, keepdims=True)


NORMS = {
    "centred": centred,
    "layer_norm": lambda x: centred(x) / (x.var(-1, keepdims=True) + 1e-5) ** 0.5,
    "rms_norm": lambda x: x / ((x * x).mean(-1, keepdims=True) + 1e-5) ** 0.5,
    "softmax": lambda x: (
        (e := jax.numpy.exp(x) if isinstance(x, jax.Array) else np.exp(x))
        / e.sum(-1, keepdims=True)
    ),
}
"""Of the last axis, for JAX and numpy alike."""


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def low_rank(rng, shape, axes, rank):
    w = normal(rng, *shape) / np.sqrt(np.prod(shape[:-1])).astype(np.float32)
    return factor(jnp.asarray(w), axes, rank)


def backward_of_norm(name, x, h):
    """The gradient with respect to x of ⟨NORMS[name](x), h⟩, in float64."""
    y, mean = NORMS[name](x), lambda a: a.mean(-1, keepdims=True)
    if name == "centred":
        return h - mean(h)
    if name == "softmax":
        return y * (h - np.sum(h * y, -1, keepdims=True))
    square = x.var(-1, keepdims=True) if name == "layer_norm" else mean(x * x)
    middle = mean(h) if name == "layer_norm" else 0
    return (h - middle - y * mean(h * y)) / np.sqrt(square + 1e-5)


def double(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def relative_error(actual, desired):
    assert actual.shape == desired.shape
    return np.max(np.abs(np.asarray(actual, np.float64) - desired)) / np.max(
        np.abs(desired)
    )


def by_order(fn, order):
    return fn if order == "dense" else oialr.factored(fn, order=order)


def wrong(outputs, desired):
    """Of named trees, those farther than rounding: empty when the compiler is right."""
    found = {}
    for name, tree in outputs.items():
        expected = desired[name]
        errors = [relative_error(a, d) for a, d in zip(tree, expected, strict=True)]
        if not max(errors) < ROUNDING:
            found[name] = [f"{x:.1e}" for x in errors]
    return found


@pytest.mark.optimized
@pytest.mark.parametrize("norm", NORMS)
def test_products_after_a_normalisation(norm):
    """Forward alone, where the norm joins the product's kernel, and with gradients."""
    rng = np.random.default_rng(0)
    args, desired = {}, {}
    for m, n, rank in SHAPES:
        axes = Axes((m, n), (), (0,), (1,))
        for order in ORDERS:
            w = low_rank(rng, (m, n), axes, rank)
            w = w.materialize() if order == "dense" else w
            x, g = normal(rng, 64, 64, m), normal(rng, 64, 64, n)
            args[f"{order}_{m}_{n}"] = order, w, x, g
            x, g = double(x, g)
            y = NORMS[norm](x)
            if order == "dense":
                (full,) = double(w)
                gradient = np.einsum("abm,abn->mn", y, g)
            else:
                u, s, vt = double(w.u, w.s, w.vt)
                full = u @ s @ vt
                gradient = np.einsum("abr,abq->rq", y @ u, g @ vt.T)
            back = backward_of_norm(norm, x, g @ full.T)
            desired[f"{order}_{m}_{n}"] = y @ full, gradient, back

    def layer(w, x):
        return NORMS[norm](x) @ w

    def forward(given):
        return {
            name: [by_order(layer, orders[name])(w, x)]
            for name, (w, x, _) in given.items()
        }

    def both(given):
        result = {}
        for name, (w, x, g) in given.items():
            y, pullback = jax.vjp(by_order(layer, orders[name]), w, x)
            dw, dx = pullback(g)
            result[name] = [y, getattr(dw, "s", dw), dx]
        return result

    orders = {name: order for name, (order, *_) in args.items()}
    given = {name: tuple(rest) for name, (_, *rest) in args.items()}
    alone = {name: value[:1] for name, value in desired.items()}
    assert wrong(jax.jit(forward)(given), alone) == {}
    few = {name: value for name, value in given.items() if "512" in name}
    assert wrong(jax.jit(both)(few), desired) == {}


@pytest.mark.optimized
@pytest.mark.parametrize("shape", [(64, 64, 128), (12000, 128)], ids=str)
def test_products_of_the_users_own(shape):
    """No library in it: factors that a user multiplies himself, in both orders."""
    rng = np.random.default_rng(1)
    x, a, b = normal(rng, *shape), normal(rng, 128, 32), normal(rng, 32, 384)

    def fn(x, a, b):
        y = centred(x)
        return [y @ (a @ b), (y * 2) @ a @ b, (a @ b).T @ (a * 2)]

    found = jax.jit(fn)(x, a, b)
    alone = [jax.jit(lambda x, a, b: centred(x) @ (a @ b))(x, a, b)]
    desired = fn(*double(x, a, b))
    assert (
        wrong({"all": found, "alone": alone}, {"all": desired, "alone": desired[:1]})
        == {}
    )


def convolved(x, w):
    """Stride one, zero padding: a sum of shifted products."""
    height, width = w.shape[0] // 2, w.shape[1] // 2
    padded = np.pad(x, ((0, 0), (height, height), (width, width), (0, 0)))
    rows, columns = x.shape[1:3]
    return sum(
        padded[:, i : i + rows, j : j + columns] @ w[i, j]
        for i in range(w.shape[0])
        for j in range(w.shape[1])
    )


@pytest.mark.optimized
def test_convolutions_after_a_normalisation():
    rng = np.random.default_rng(2)
    shape = (3, 3, 32, 96)
    axes = Axes(shape, (), (0, 1, 2), (3,))
    given, desired = {}, {}
    for order in ORDERS[:3]:
        w = low_rank(rng, shape, axes, 24)
        x, g = normal(rng, 4, 32, 32, 32), normal(rng, 4, 32, 32, 96)
        given[order] = w, x, g
        x, g = double(x, g)
        u, s, vt = double(w.u, w.s, w.vt)
        through = convolved(NORMS["layer_norm"](x), u.reshape(*shape[:3], -1))
        core = np.einsum("bhwr,bhwq->rq", through, g @ vt.T)
        turned = np.flip((u @ s @ vt).reshape(shape), (0, 1)).swapaxes(2, 3)
        back = backward_of_norm("layer_norm", x, convolved(g, turned))
        desired[order] = through @ s @ vt, core, back

    def layer(w, x):
        return jax.lax.conv_general_dilated(
            NORMS["layer_norm"](x),
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    def forward(given):
        return {
            order: [by_order(layer, order)(w, x)] for order, (w, x, _) in given.items()
        }

    def both(given):
        result = {}
        for order, (w, x, g) in given.items():
            y, pullback = jax.vjp(by_order(layer, order), w, x)
            dw, dx = pullback(g)
            result[order] = [y, dw.s, dx]
        return result

    alone = {order: value[:1] for order, value in desired.items()}
    assert wrong(jax.jit(forward)(given), alone) == {}
    assert wrong(jax.jit(both)(given), desired) == {}


def by_singular_values(x, table, order):
    """The polynomials of `orthogonal.polar` on the singular values of x, in float64."""
    u, sigma, vt = np.linalg.svd(x, full_matrices=False)
    norm = np.sum(sigma**order, -1, keepdims=True) ** (1 / order)
    sigma = sigma / norm / (1 + polar._SAFETY if order == 8 else 1)
    for row in table:
        sigma = sum(a * sigma ** (2 * i + 1) for i, a in enumerate(row))
    return (u * sigma[..., None, :]) @ vt


@pytest.mark.optimized
@pytest.mark.parametrize("method", ["newton_schulz", "polar_express", "short"])
def test_chains_of_orthogonalisations(method):
    """Of products that are still to be computed, as a momentum or a gradient is."""
    rng = np.random.default_rng(3)
    steps = {"newton_schulz": 5, "polar_express": 7, "short": 3}[method]
    by = method if method == "newton_schulz" else "polar_express"
    table, order = {
        "newton_schulz": ((polar._MUON,) * 5, 2),
        "polar_express": ((*polar._POLAR_EXPRESS, *(polar._CLASSIC,) * 2), 8),
        "short": (polar._SHORT, 8),
    }[method]
    shapes = [(1, 128, 384), (2, 256, 64)]
    given = [
        (normal(rng, b, 2048, m), normal(rng, b, 2048, n) / 64) for b, m, n in shapes
    ]

    def fn(given):
        return [
            polar.polar_by(by, steps=steps)(jnp.einsum("bim,bin->bmn", centred(x), g))
            for x, g in given
        ]

    desired = []
    for x, g in given:
        x, g = double(x, g)
        gradient = np.einsum("bim,bin->bmn", centred(x), g)
        desired.append(by_singular_values(gradient, table, order))
    errors = [
        relative_error(a, d) for a, d in zip(jax.jit(fn)(given), desired, strict=True)
    ]
    assert max(errors) < 1e-3, errors  # coefficients reach 577


SAID = {
    "cpu": ("0.10.2", "", "cpu"),
    "any_platform": ("0.10.2", "", ""),
    "beside_an_accelerator": ("0.10.2", "", "cuda, cpu"),
    "a_build": ("0.10.2+local", "", "cpu"),
    "other_flags": ("0.10.2", "--xla_cpu_enable_fast_math=true", "cpu"),
    "partly_off": ("0.10.2", f"{CURE}-dot", "cpu"),
    "turned_on_again": ("0.10.2", f"{CURE} {CURE}dot", "cpu"),
}
SILENT = {
    "before": ("0.10.1", "", "cpu"),
    "after": ("0.11.0", "", "cpu"),
    "newest": ("0.12.0.1", "", ""),
    "longer": ("0.10.20", "", "cpu"),
    "flag": ("0.10.2", f"--xla_dump_to=/tmp {CURE}", "cpu"),
    "flag_last": ("0.10.2", f"{CURE}dot {CURE}", ""),
    "accelerator_alone": ("0.10.2", "", "cuda"),
    "tpu": ("0.10.2", "", "tpu"),
}


@pytest.mark.parametrize("given", SAID.values(), ids=SAID)
def test_a_wrong_compiler_is_named(given):
    said = fault(*given)
    assert said is not None
    for word in (given[0], "wrong numbers", "39103", CURE, '"jaxlib!=0.10.2"'):
        assert word in said


@pytest.mark.parametrize("given", SILENT.values(), ids=SILENT)
def test_a_right_compiler_or_a_cured_one_is_not(given):
    assert fault(*given) is None


IMPORTED = """
import sys, warnings
import jax, jaxlib
jaxlib.__version__ = "0.10.2"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import oialr_jax
    import oialr_jax.lowrank
said = [w for w in caught if "jaxlib 0.10.2" in str(w.message)]
print(len(said), said[0].filename, said[0].category.__name__)
jax.config.update("jax_platforms", "nowhere")
try:
    print(jax.devices())
except RuntimeError:
    print("no backend was started")
"""


def test_it_is_said_once_at_the_users_import_and_starts_no_backend():
    """Backends must not start before `jax.distributed.initialize`."""
    environment = dict(os.environ, XLA_FLAGS="")
    command = [sys.executable, "-c", IMPORTED]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "1 <string> UserWarning",
        "no backend was started",
    ]
