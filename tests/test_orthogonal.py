"""Orthogonal gradients: against numpy, on cores as on W, and laws of every recipe."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BY_NAME, normal
from helpers import in_low_rank, projected, scalar_loss

import oialr_jax as oialr
from oialr_jax.lowrank import Axes, factor, is_low_rank, named_leaves
from oialr_jax.matrices import Matrix
from oialr_jax.orthogonal import directions

EXACT = 1e-5  # float32, condition up to 1e1
PRODUCTS = 5e-3  # null directions of rounding noise after all steps of products


def reference(matrix, tolerance=1e-5):
    """The canonical polar factor of matrices (..., m, n) in float64."""
    u, sigma, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    kept = sigma > tolerance * sigma[..., :1]
    return (u * kept[..., None, :]) @ vt


def conditioned(seed, *shape, sigma=None):
    """Matrices with these singular values, by default spread from 1 to 0.1."""
    u, _, vt = np.linalg.svd(normal(seed, *shape), full_matrices=False)
    sigma = np.geomspace(1, 0.1, min(shape[-2:])) if sigma is None else sigma
    return jnp.asarray((u * sigma) @ vt, jnp.float32)


def apply(tx, grads, params=None):
    """Updates of a fresh transformation, jitted."""
    params = grads if params is None else params
    return jax.jit(tx.update)(grads, tx.init(params), params)[0]


def matrix(path, *shape, stack=(), inputs=(0,), outputs=(1,), other=()):
    axes = Axes(shape, stack, inputs, outputs)
    return Matrix(path, axes, rows=1, kind="dot", other=other)


SHAPES = [(12, 12), (20, 7), (7, 20), (9, 1), (1, 9)]
METHODS = ["auto", "svd", "qdwh", "polar_express"]


# The polar factor


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_product_of_the_singular_vectors(method, shape):
    g = conditioned(0, *shape)
    u, _, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    out = apply(oialr.orthogonal.orthogonalize(method), {"w": g})["w"]
    np.testing.assert_allclose(out, u @ vt, atol=EXACT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_newton_schulz_keeps_singular_vectors_and_comes_near_one(shape):
    g = conditioned(0, *shape)
    u, _, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
    out = apply(oialr.orthogonal.orthogonalize("newton_schulz"), {"w": g})["w"]
    inner = u.T @ out @ vt.T
    sigma = np.diagonal(inner)
    np.testing.assert_allclose(inner, np.diag(sigma), atol=EXACT)
    assert np.all((sigma > 0.65) & (sigma < 1.25))


@pytest.mark.parametrize(
    ("method", "tolerance"), [("svd", EXACT), ("qdwh", EXACT), ("auto", PRODUCTS)]
)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_null_directions_stay_empty(method, tolerance, shape):
    k = min(shape)
    g = conditioned(1, *shape, sigma=np.where(np.arange(k) < k // 2, 1.0, 0.0))
    out = apply(oialr.orthogonal.orthogonalize(method), {"w": g})["w"]
    np.testing.assert_allclose(out, reference(g), atol=tolerance)


@pytest.mark.parametrize("method", ["svd", "qdwh"])
def test_fill_completes_what_the_canonical_factor_leaves_empty(method):
    g = conditioned(1, 12, 12, sigma=np.where(np.arange(12) < 6, 1.0, 0.0))
    out = np.asarray(
        apply(oialr.orthogonal.orthogonalize(method, fill=True), {"w": g})["w"]
    )
    np.testing.assert_allclose(out.T @ out, np.eye(12), atol=EXACT)
    canonical = reference(g)
    np.testing.assert_allclose(canonical.T @ (out - canonical), 0, atol=EXACT)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.parametrize("method", ["svd", "qdwh"])
def test_rank_tolerance_decides_what_counts_as_zero(method, scale):
    """Relative to the largest: the four of these that are below a hundredth."""
    sigma = np.concatenate([np.geomspace(1, 0.02, 20), np.geomspace(5e-3, 1e-3, 4)])
    g = conditioned(1, 24, 24, sigma=sigma)
    tx = oialr.orthogonal.orthogonalize(method, rank_tolerance=0.01)
    out = apply(tx, {"w": scale * g})["w"]
    np.testing.assert_allclose(out, reference(g, 0.01), atol=2e-4)


@pytest.mark.parametrize("name", ["svd", "qdwh", "auto", "muon"])
def test_products_have_the_precision_that_was_asked_for(name):
    """On devices with tensor cores the default is not float32."""
    g, counts = {"w": normal(0, 6, 4)}, {}
    for precision in ("highest", "default"):
        if name == "muon":
            tx = oialr.orthogonal.core_muon(
                0.1, [matrix("w", 6, 4)], precision=precision
            )
        else:
            tx = oialr.orthogonal.orthogonalize(name, precision=precision)
        jaxpr = jax.make_jaxpr(lambda g, tx=tx: tx.update(g, tx.init(g), g)[0])(g)
        counts[precision] = str(jaxpr).count("HIGHEST")
    assert counts["highest"] > counts["default"]  # some of qdwh's own are the highest


DIRECTIONS = {
    "svd": oialr.orthogonal.orthogonalize("svd"),
    "qdwh": oialr.orthogonal.orthogonalize("qdwh"),
    "auto": oialr.orthogonal.orthogonalize(),
    "newton_schulz": oialr.orthogonal.orthogonalize("newton_schulz"),
    "tensor": oialr.orthogonal.normalize_tensor(),
    "components": oialr.orthogonal.normalize_components(),
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_zero_gradient_stays_zero(name):
    out = apply(DIRECTIONS[name], {"w": jnp.zeros((6, 4)), "v": normal(0, 6, 4)})
    assert not np.any(out["w"])
    assert np.all(np.isfinite(out["v"]))
    assert np.any(out["v"])


@pytest.mark.parametrize("bad", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_layer_that_is_not_finite_stays_as_it_is_and_alone(name, bad):
    good = {"a": normal(0, 6, 4), "b": normal(1, 6, 4), "c": normal(2, 8, 3)}
    broken = {**good, "a": (100 * good["a"]).at[1, 2].set(bad)}
    out, expected = apply(DIRECTIONS[name], broken), apply(DIRECTIONS[name], good)
    np.testing.assert_array_equal(out["a"], broken["a"])
    for other in ("b", "c"):
        np.testing.assert_allclose(out[other], expected[other], atol=1e-6)


def test_what_takes_a_direction_sees_finite_entries_up_to_one():
    """LAPACK need not come to an end on others."""
    seen = []
    x = jnp.stack(
        [normal(0, 6, 4) * 1e20, jnp.full((6, 4), jnp.nan), jnp.zeros((6, 4))]
    )
    result, _ = directions.guarded(lambda x: seen.append(x) or x, x)
    np.testing.assert_allclose(np.max(np.abs(seen[0]), axis=(1, 2)), [1, 0, 0])
    np.testing.assert_array_equal(result[1:], x[1:])


def test_a_direction_that_fails_leaves_its_matrix_alone():
    """As an SVD that does not converge, which gives NaN."""
    x = jnp.stack([normal(0, 6, 4), normal(1, 6, 4)])
    failing = jnp.array([True, False])[:, None, None]
    result, _ = directions.guarded(lambda x: jnp.where(failing, jnp.nan, 2 * x), x)
    np.testing.assert_array_equal(result[0], x[0])
    np.testing.assert_allclose(result[1], 2 * x[1] / np.max(np.abs(x[1])), rtol=1e-6)


@pytest.mark.parametrize("method", ["svd", "qdwh", "auto"])
def test_float64_stays_float64_beside_float32_of_the_same_shape(method):
    with jax.enable_x64(True):
        g = np.asarray(conditioned(0, 12, 9), np.float64)
        grads = {"a": jnp.asarray(g), "b": jnp.asarray(g, jnp.float32)}
        out = apply(oialr.orthogonal.orthogonalize(method, steps=None), grads)
        assert dtypes(out) == dtypes(grads) == [jnp.float64, jnp.float32]
        exact = 1e-12 if method != "auto" else EXACT
        np.testing.assert_allclose(out["a"], reference(g), atol=exact)
        np.testing.assert_allclose(out["b"], reference(g), atol=EXACT)


@pytest.mark.parametrize("name", DIRECTIONS)
@pytest.mark.parametrize("scale", [1e-30, 1e30], ids=str)
def test_does_not_depend_on_the_scale_of_the_gradient(name, scale):
    g = conditioned(0, 9, 5)
    out = apply(DIRECTIONS[name], {"w": g * scale})["w"]
    expected = apply(DIRECTIONS[name], {"w": g})["w"]
    np.testing.assert_allclose(out, expected, atol=EXACT)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_directions_have_no_state_and_keep_types(name):
    g = {
        "w": normal(0, 6, 4).astype(jnp.bfloat16),
        "b": normal(1, 4),
        "n": jnp.arange(6).reshape(2, 3),
    }
    tx = DIRECTIONS[name]
    assert tx.init(jax.eval_shape(lambda: g)) == tx.init(g) == optax.EmptyState()
    out = apply(tx, g)
    assert dtypes(out) == dtypes(g)
    exact = apply(tx, {"w": g["w"].astype(jnp.float32)})["w"]
    np.testing.assert_allclose(out["w"].astype(jnp.float32), exact, atol=1e-2)
    for other in ("b", "n"):
        np.testing.assert_array_equal(out[other], g[other])


def test_controls_are_what_they_say():
    g = normal(0, 6, 4).at[:, 1].set(0)  # a filter without gradient
    out = apply(oialr.orthogonal.normalize_tensor(), {"w": g})["w"]
    np.testing.assert_allclose(out, g / np.linalg.norm(g), atol=1e-6)
    out = apply(oialr.orthogonal.normalize_components(), {"w": g})["w"]
    norms = np.linalg.norm(out, axis=0)
    np.testing.assert_allclose(norms, [1, 0, 1, 1], atol=1e-6)
    np.testing.assert_allclose(
        np.asarray(out) * np.linalg.norm(g, axis=0), g, atol=1e-6
    )


def test_components_step_as_far_as_orthogonal_ones():
    g = conditioned(0, 20, 7)
    steps = [
        apply(tx, {"w": g})["w"]
        for tx in (
            oialr.orthogonal.normalize_components(),
            oialr.orthogonal.orthogonalize("svd"),
        )
    ]
    for out in steps:
        np.testing.assert_allclose(np.linalg.norm(out, axis=0), 1, atol=EXACT)


# Which leaves, and how


def test_by_default_the_last_axis_is_the_outputs_and_vectors_stay():
    g = {"conv": normal(0, 3, 3, 4, 8), "bias": normal(1, 8)}
    out = apply(oialr.orthogonal.orthogonalize("svd"), g)
    expected = reference(g["conv"].reshape(36, 8)).reshape(3, 3, 4, 8)
    np.testing.assert_allclose(out["conv"], expected, atol=EXACT)
    np.testing.assert_array_equal(out["bias"], g["bias"])


def test_matrices_say_which_leaves_and_axes():
    g = {"q": normal(0, 8, 2, 3), "scan": normal(1, 3, 6, 4), "embed": normal(2, 9, 4)}
    matrices = [
        matrix("q", 8, 2, 3, outputs=(1, 2)),
        matrix("scan", 3, 6, 4, stack=(0,), inputs=(2,), outputs=(1,)),
    ]
    out = apply(oialr.orthogonal.orthogonalize("svd", matrices=matrices), g)
    expected = reference(g["q"].reshape(8, 6)).reshape(8, 2, 3)
    np.testing.assert_allclose(out["q"], expected, atol=EXACT)
    np.testing.assert_allclose(out["scan"], reference(g["scan"]), atol=EXACT)
    np.testing.assert_array_equal(out["embed"], g["embed"])


def test_a_stack_of_cores_is_a_stack():
    """Of three matrices at once, cores (3, 4, 4) of a dense (3, 9, 6)."""
    found = matrix("w", 3, 9, 6, stack=(0,), inputs=(1,), outputs=(2,))
    g = normal(0, 3, 4, 4)
    out = apply(oialr.orthogonal.orthogonalize("svd", matrices=[found]), {"w": g})["w"]
    np.testing.assert_allclose(out, reference(g), atol=1e-4)


def test_grouped_convolutions_are_left_alone():
    grouped = matrix("w", 6, 4, other=("grouped convolution, 2 groups",))
    g = {"w": normal(0, 6, 4)}
    out = apply(oialr.orthogonal.orthogonalize(matrices=[grouped]), g)
    np.testing.assert_array_equal(out["w"], g["w"])


def dependencies(hlo):
    """Of the main computation: operands of each instruction, by name."""
    entry = hlo[hlo.index("ENTRY") :]
    found = re.findall(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*)$", entry, re.M)
    names = {name for name, _ in found}
    return {
        name: {x for x in re.findall(r"[\w.-]+", rest) if x in names}
        for name, rest in found
    }, {name: rest for name, rest in found}


@pytest.mark.parametrize("method", ["svd", "auto"])
def test_equal_shapes_are_one_call_and_svds_follow_one_another(method):
    shapes = {"a": (6, 4), "b": (6, 4), "c": (4, 6), "d": (3, 2, 4), "e": (5, 5)}
    g = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    tx = oialr.orthogonal.orthogonalize(method)
    jaxpr = str(jax.make_jaxpr(lambda g: tx.update(g, tx.init(g))[0])(g))
    calls = re.findall(r"= svd\[", jaxpr)
    assert len(calls) == (3 if method == "svd" else 0)
    hlo = jax.jit(lambda g: tx.update(g, tx.init(g))[0]).lower(g).compile().as_text()
    operands, text = dependencies(hlo)
    svds = [name for name in operands if "gesdd" in text[name]]
    assert len(svds) == len(calls)
    if method != "svd":
        return

    def above(name):
        found, todo = set(), [name]
        while todo:
            for x in operands[todo.pop()] - found:
                found.add(x)
                todo.append(x)
        return found

    counts = sorted(len(above(name) & set(svds)) for name in svds)
    assert counts == [0, 1, 2]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: oialr.orthogonal.orthogonalize("qr"),
            "`method` must be one of auto, .*'qr'",
        ),
        (
            lambda: oialr.orthogonal.orthogonalize(fill=True),
            "need svd or qdwh, .*'auto'",
        ),
        (lambda: oialr.orthogonal.orthogonalize("svd", steps=3), "svd has none: got 3"),
        (
            lambda: oialr.orthogonal.orthogonalize(steps=0),
            "`steps` must be at least 1.*got 0",
        ),
        (
            lambda: oialr.orthogonal.spectral_trust_region(1.0, norm="l1"),
            "`norm` must .*'l1'",
        ),
        (
            lambda: oialr.orthogonal.spectral_trust_region(1.0, averaging=0.0),
            r"\(0, 1\], got 0",
        ),
        (
            lambda: oialr.orthogonal.spectral_trust_region(
                1.0, norm="max", method="svd"
            ),
            "need norm spectral, got 'max'",
        ),
    ],
    ids=["method", "fill", "no_steps", "steps", "norm", "averaging", "options"],
)
def test_options_that_do_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (matrix("v", 6, 4), "no leaf at v; there are: b, w"),
        (matrix("w", 6, 5), r"w has shape \(6, 4\): neither \(6, 5\) nor"),
    ],
    ids=["name", "shape"],
)
@pytest.mark.parametrize("recipe", ["orthogonalize", "swan", "core_muon"])
def test_matrices_that_do_not_fit_the_params(recipe, found, message):
    build = {
        "orthogonalize": lambda x: oialr.orthogonal.orthogonalize(matrices=x),
        "swan": lambda x: oialr.orthogonal.swan(0.1, x),
        "core_muon": lambda x: oialr.orthogonal.core_muon(0.1, x),
    }[recipe]
    with pytest.raises(ValueError, match=message):
        build([found]).init({"w": normal(0, 6, 4), "b": normal(0, 4)})


def test_a_square_leaf_beyond_full_rank_is_no_core():
    tx = oialr.orthogonal.orthogonalize(matrices=[matrix("w", 6, 4)])
    assert tx.init({"w": normal(0, 4, 4)}) == optax.EmptyState()
    with pytest.raises(ValueError, match=r"w has shape \(5, 5\): neither"):
        tx.init({"w": normal(0, 5, 5)})


def test_without_freeze_bases_low_rank_is_refused():
    found = matrix("w", 6, 4)
    with pytest.raises(ValueError, match=r"w is in low rank: build .*freeze_bases"):
        oialr.orthogonal.orthogonalize().init(
            {"w": factor(normal(0, 6, 4), found.axes)}
        )


# On cores as on W


@pytest.mark.parametrize("method", ["svd", "qdwh", "auto"])
def test_polar_of_a_core_is_that_of_the_projected_gradient(method):
    found = matrix("w", 12, 9)
    node = factor(normal(0, 12, 9), found.axes, rank=5)
    u, vt = (np.asarray(f, np.float64) for f in (node.u, node.vt))
    g = conditioned(1, 12, 9)
    core = jnp.asarray(u.T @ g @ vt.T, jnp.float32)
    tx = oialr.freeze_bases(oialr.orthogonal.orthogonalize(method, matrices=[found]))
    s = apply(tx, {"w": core}, {"w": node})["w"].s
    projected = u @ u.T @ g @ vt.T @ vt
    np.testing.assert_allclose(u @ s @ vt, reference(projected), atol=EXACT)
    np.testing.assert_allclose(s, reference(u.T @ g @ vt.T), atol=EXACT)


def test_cores_of_a_network_move_as_its_projected_gradient_says():
    """By value_and_grad through the factors, against the dense gradient in numpy."""
    fn, params, x, matrices = network("dense", "low_rank")
    loss = scalar_loss(oialr.factored(fn))
    _, cores = oialr.value_and_grad(loss)(params, x)
    tx = oialr.freeze_bases(oialr.orthogonal.orthogonalize("svd", matrices=matrices))
    updates = jax.jit(tx.update)(cores, tx.init(params), params)[0]
    dense = projected(jax.grad(loss)(oialr.materialize(params), x), params)
    moved = {k: v for k, v in named_leaves(updates).items() if is_low_rank(v)}
    assert len(moved) == len(matrices) == 2
    for name, leaf in moved.items():
        np.testing.assert_allclose(leaf.s, reference(dense[name]), atol=EXACT)


GAUGE = matrix("w", 10, 8)
INVARIANT = {
    "orthogonal_sgd": oialr.orthogonal.orthogonal_sgd(
        0.05, weight_decay=0.01, method="svd"
    ),
    "orthogonal_sgd_products": oialr.orthogonal.orthogonal_sgd(0.05),
    "trust_spectral": oialr.orthogonal.spectral_trust_region(0.05, method="svd"),
    "trust_frobenius": oialr.orthogonal.spectral_trust_region(0.05, norm="frobenius"),
    "momentum_then_tensor": optax.chain(
        optax.trace(0.9), oialr.orthogonal.normalize_tensor(), optax.scale(-0.05)
    ),
    "core_muon": oialr.orthogonal.core_muon(0.05, [GAUGE], weight_decay=0.1),
}


def trajectory(tx, *, turn_every, carry=True, steps=30):
    """W after steps on a noisy quadratic, with the bases turned now and then."""
    tx = oialr.freeze_bases(tx)
    target, start = np.asarray(normal(1, 10, 8)), normal(0, 10, 8)
    params = {"w": factor(start, GAUGE.axes, rank=6)}
    state = tx.init(params)
    update = jax.jit(tx.update)
    for t in range(steps):
        g = params["w"].materialize() - target + 0.3 * normal(100 + t, 10, 8)
        core = params["w"].u.T @ g @ params["w"].vt.T
        updates, state = update({"w": core}, state, params)
        params = optax.apply_updates(params, updates)
        if turn_every and t % turn_every == turn_every - 1:
            new, carried, _ = oialr.truncate(params, state, {"w": 6}, tx=tx)
            params, state = new, carried if carry else state
    return np.asarray(params["w"].materialize())


@pytest.mark.parametrize("name", INVARIANT)
def test_turning_the_bases_does_not_change_the_run(name):
    fixed = trajectory(INVARIANT[name], turn_every=0)
    turned = trajectory(INVARIANT[name], turn_every=5)
    np.testing.assert_allclose(turned, fixed, atol=EXACT)


def test_that_comparison_can_fail():
    """With momentum left in the old basis, and with Adam, which depends on it."""
    for tx, carry in ((INVARIANT["trust_spectral"], False), (optax.adam(0.05), True)):
        fixed = trajectory(tx, turn_every=0)
        turned = trajectory(tx, turn_every=5, carry=carry)
        assert np.max(np.abs(turned - fixed)) > 1e-2


BOUNDED = {  # and the largest singular value of its directions
    "trust": (
        lambda *x, **k: oialr.orthogonal.spectral_trust_region(
            x[0], matrices=x[1], **k
        ),
        1,
    ),
    "muon": (oialr.orthogonal.core_muon, 1.2),
}


@pytest.mark.parametrize("low", [False, True], ids=["dense", "low_rank"])
@pytest.mark.parametrize("name", BOUNDED)
def test_decoupled_decay_bounds_the_spectral_norm(name, low):
    rate, decay = 0.1, 2.0
    build, largest = BOUNDED[name]
    found = matrix("w", 8, 6)
    tx = oialr.freeze_bases(build(rate, [found], weight_decay=decay))
    start = 0.4 * reference(normal(0, 8, 6))
    params = {"w": jnp.asarray(start, jnp.float32)}
    if low:
        params = {"w": factor(params["w"], found.axes, rank=4)}
    state, norms = tx.init(params), []
    update = jax.jit(tx.update)
    g = conditioned(3, *oialr.transform.trainable(params)["w"].shape)
    for _ in range(60):
        updates, state = update({"w": g}, state, params)
        params = optax.apply_updates(params, updates)
        w = oialr.materialize(params)["w"]
        norms.append(np.linalg.norm(w, 2))
    assert max(norms) <= max(0.4, largest / decay) * (1 + EXACT)
    assert norms[-1] > 0.99 / decay  # the same way every time: the bound is reached


# Recipes against numpy


def run(tx, params, grads):
    """Params after these gradients, one step each."""
    state, update = tx.init(params), jax.jit(tx.update)
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def problem(steps=4):
    params = {"w": normal(0, 9, 5), "b": normal(1, 5)}
    grads = [
        {"w": conditioned(10 + t, 9, 5), "b": normal(20 + t, 5)} for t in range(steps)
    ]
    return params, grads, [matrix("w", 9, 5)]


@pytest.mark.parametrize("momentum", [0.9, None])
def test_orthogonal_sgd_is_orthogonalise_then_decay_then_momentum(momentum):
    params, grads, _ = problem()
    tx = oialr.orthogonal.orthogonal_sgd(0.1, momentum=momentum, weight_decay=0.05)
    actual, state = run(tx, params, grads)
    assert len(jax.tree.leaves(state)) == (2 if momentum else 0)
    for name, direction in (("w", reference), ("b", np.asarray)):
        x, buffer = np.asarray(params[name], np.float64), 0.0
        for g in grads:
            buffer = (momentum or 0) * buffer + direction(g[name]) + 0.05 * x
            x = x - 0.1 * buffer
        np.testing.assert_allclose(actual[name], x, atol=EXACT)


@pytest.mark.peers
@pytest.mark.parametrize("fill", [True, False], ids=["paper", "canonical"])
def test_orthogonal_sgd_is_the_paper_in_torch(fill):
    """Filters are rows there; rank-deficient gradients only where zeros stay zero."""
    torch = importlib.import_module("torch")
    sigma = None if fill else np.array([1, 0.5, 0.2, 0, 0])
    shapes = {"conv": (3, 2, 2, 5), "dense": (9, 5), "bias": (5,)}
    params = {k: normal(i, *shape) for i, (k, shape) in enumerate(shapes.items())}

    def gradient(seed, shape):
        if len(shape) == 1:
            return normal(seed, *shape)
        rows = int(np.prod(shape[:-1]))
        return conditioned(seed, rows, shape[-1], sigma=sigma).reshape(shape)

    grads = [
        {k: gradient(10 * t + i, shape) for i, (k, shape) in enumerate(shapes.items())}
        for t in range(1, 5)
    ]
    tx = oialr.orthogonal.orthogonal_sgd(
        0.1, weight_decay=0.05, method="svd", fill=fill
    )
    actual, _ = run(tx, params, grads)

    def theirs(x):
        return torch.tensor(np.moveaxis(np.asarray(x), -1, 0).copy())

    weights = {k: torch.nn.Parameter(theirs(x)) for k, x in params.items()}
    sgd = torch.optim.SGD(weights.values(), lr=0.1, momentum=0.9, weight_decay=0.05)
    for g in grads:
        for k, weight in weights.items():
            weight.grad = theirs(g[k])
            if weight.ndim > 1:
                flat = weight.grad.reshape(len(weight), -1)
                u, s, vt = torch.linalg.svd(flat, full_matrices=False)
                kept = torch.ones_like(s) if fill else (s > 1e-5 * s[0]).to(s.dtype)
                weight.grad = ((u * kept) @ vt).reshape(weight.shape)
        sgd.step()
    for k, weight in weights.items():
        expected = np.moveaxis(weight.detach().numpy(), 0, -1)
        np.testing.assert_allclose(actual[k], expected, atol=EXACT)


@pytest.mark.parametrize("norm", ["spectral", "frobenius", "max"])
def test_trust_region_averages_from_the_first_gradient(norm):
    params, grads, matrices = problem()
    tx = oialr.orthogonal.spectral_trust_region(
        0.1, norm=norm, averaging=0.3, weight_decay=0.5, matrices=matrices
    )
    actual, _ = run(tx, params, grads)

    def euclidean(m):
        return m / np.linalg.norm(m)

    ball = {"spectral": reference, "frobenius": euclidean, "max": np.sign}[norm]
    balls = {"w": ball, "b": np.sign if norm == "max" else euclidean}
    for name, x in params.items():
        x, m = np.asarray(x, np.float64), np.asarray(grads[0][name], np.float64)
        for g in grads:
            m = 0.7 * m + 0.3 * np.asarray(g[name], np.float64)
            x = (1 - 0.1 * 0.5) * x - 0.1 * balls[name](m)
        np.testing.assert_allclose(actual[name], x, atol=EXACT)


def test_swan_normalises_then_whitens_and_stores_nothing_for_matrices():
    params, grads, matrices = problem()
    tx = oialr.orthogonal.swan(0.1, matrices, weight_decay=0.5, method="svd")
    actual, state = run(tx, params, grads)
    x = np.asarray(params["w"], np.float64)
    for g in grads:
        g = np.asarray(g["w"], np.float64)
        g = (g - g.mean(0)) / g.std(0)
        step = reference(g) * np.sqrt(9 * 5 / 5)
        np.testing.assert_allclose(np.sqrt(np.mean(step**2)), 1, rtol=1e-9)
        x = x - 0.1 * (step + 0.5 * x)
    np.testing.assert_allclose(actual["w"], x, atol=2 * EXACT)
    adam, _ = run(optax.adam(0.1), {"b": params["b"]}, [{"b": g["b"]} for g in grads])
    np.testing.assert_array_equal(actual["b"], adam["b"])
    assert all(leaf.size <= 5 for leaf in jax.tree.leaves(state))


def test_swan_does_nothing_for_an_output_without_gradient():
    g = conditioned(0, 9, 5).at[:, 1].set(0)
    tx = oialr.orthogonal.swan(1.0, [matrix("w", 9, 5)], rms=None, method="svd")
    alive = np.delete(np.asarray(g, np.float64), 1, axis=1)
    alive = (alive - alive.mean(0)) / alive.std(0)
    expected = np.insert(-reference(alive), 1, 0, axis=1)
    np.testing.assert_allclose(apply(tx, {"w": g})["w"], expected, atol=2 * EXACT)


def test_swan_on_more_outputs_than_inputs_where_the_mean_takes_a_rank():
    """Centred columns of (4, 7) have rank 3; nothing may fill the fourth direction."""
    g = conditioned(0, 4, 7)
    tx = oialr.orthogonal.swan(1.0, [matrix("w", 4, 7)], rms=None, method="svd")
    out = apply(tx, {"w": g})["w"]
    np.testing.assert_allclose(np.sum(out, axis=0), 0, atol=EXACT)
    assert np.linalg.matrix_rank(out, tol=1e-3) == 3


@pytest.mark.parametrize("recipe", [oialr.orthogonal.swan, oialr.orthogonal.core_muon])
def test_other_leaves_get_the_optimizer_that_was_given(recipe):
    params, grads, matrices = problem()
    out = apply(recipe(0.1, matrices, adam=optax.sgd(2.0)), grads[0], params)
    np.testing.assert_allclose(out["b"], -2 * grads[0]["b"], rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"beta": 0.5, "nesterov": False}], ids=str)
def test_core_muon_on_dense_matrices_is_optax_muon(options):
    params, grads, matrices = problem()
    ours = oialr.orthogonal.core_muon(0.1, matrices, weight_decay=0.2, **options)
    theirs = optax.contrib.muon(0.1, weight_decay=0.2, **options)
    actual, _ = run(ours, params, grads)
    expected, _ = run(theirs, params, grads)
    np.testing.assert_allclose(actual["w"], expected["w"], atol=1e-6)


def test_core_muon_does_not_depend_on_the_scale_of_the_gradient():
    """With Optax's own eps, which is absolute, small gradients make small steps."""
    params, grads, matrices = problem()
    tx = oialr.orthogonal.core_muon(0.1, matrices)
    small = jax.tree.map(lambda g: 1e-10 * g, grads[0])
    steps = [apply(tx, g, params)["w"] for g in (grads[0], small)]
    np.testing.assert_allclose(*steps, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("rms", [None, 0.2], ids=["spectral", "rms"])
def test_core_muon_scales_by_the_shape_of_w(rms):
    found = matrix("w", 6, 24)
    node = factor(normal(0, 6, 24), found.axes, rank=4)
    tables = ((15 / 8, -10 / 8, 3 / 8),) * 20
    tx = oialr.orthogonal.core_muon(
        1.0, [found], rms=rms, ns_coeffs=tables, ns_steps=20
    )
    tx = oialr.freeze_bases(tx)
    s = apply(tx, {"w": conditioned(1, 4, 4)}, {"w": node})["w"].s
    step = np.asarray(node.u @ s @ node.vt)
    if rms is None:
        np.testing.assert_allclose(np.linalg.norm(step, 2), 2, rtol=1e-4)
    else:
        np.testing.assert_allclose(np.sqrt(np.mean(step**2)), rms, rtol=1e-4)


# Events


def test_a_convolution_stays_with_muon_when_it_is_converted():
    found = matrix("w", 3, 3, 4, 8, inputs=(0, 1, 2), outputs=(3,))
    tx = oialr.freeze_bases(oialr.orthogonal.core_muon(0.1, [found]))
    params = {"w": normal(0, 3, 3, 4, 8), "b": normal(1, 8)}
    grads = {"w": normal(2, 3, 3, 4, 8), "b": normal(3, 8)}
    _, state = tx.update(grads, tx.init(params), params)
    low, low_state, _ = oialr.factorize(params, state, [found], tx=tx)

    def muon(state):
        return state.inner_state.inner_states["matrix"].inner_state[0].mu["w"]

    node = low["w"]
    expected = node.u.T @ muon(state).reshape(36, 8) @ node.vt.T
    np.testing.assert_allclose(muon(low_state), expected, atol=1e-6)


def recipes(matrices):
    return {
        "orthogonal_sgd": oialr.orthogonal.orthogonal_sgd(3e-3, matrices=matrices),
        "orthogonal_sgd_svd": oialr.orthogonal.orthogonal_sgd(
            3e-3, method="svd", matrices=matrices
        ),
        "swan": oialr.orthogonal.swan(3e-3, matrices),
        "spectral_trust_region": oialr.orthogonal.spectral_trust_region(
            3e-3, matrices=matrices, weight_decay=0.1
        ),
        "trust_frobenius": oialr.orthogonal.spectral_trust_region(
            3e-3, norm="frobenius", matrices=matrices
        ),
        "trust_max": oialr.orthogonal.spectral_trust_region(
            3e-3, norm="max", matrices=matrices
        ),
        "core_muon": oialr.orthogonal.core_muon(3e-3, matrices, weight_decay=0.1),
        "core_muon_rms": oialr.orthogonal.core_muon(3e-3, matrices, rms=0.2),
        "components": optax.chain(
            oialr.orthogonal.normalize_components(matrices=matrices), optax.sgd(3e-3)
        ),
    }


NAMES = tuple(recipes(()))


def network(case, form):
    """Function, params in this form, input and matrices of a shared case."""
    fn, params, x = BY_NAME[case].build()
    matrices = oialr.find_matrices(fn, params, x)
    low = {"dense": [], "low_rank": matrices, "mixed": matrices[::2]}[form]
    return fn, in_low_rank(params, low), x, matrices


MAIN = ("orthogonal_sgd", "swan", "spectral_trust_region", "core_muon")
LAWS = [("dense", "mixed", name) for name in NAMES]
LAWS += [("dense", form, name) for form in ("dense", "low_rank") for name in MAIN]
LAWS += [
    ("conv2d_strided_dilated", "mixed", "orthogonal_sgd_svd"),
]


@pytest.mark.parametrize(("case", "form", "name"), LAWS)
def test_the_loss_falls_and_nothing_compiles_twice(case, form, name):
    fn, params, x, matrices = network(case, form)
    tx = oialr.freeze_bases(recipes(matrices)[name])
    loss = scalar_loss(oialr.factored(fn))

    @jax.jit
    def step(params, state):
        value, grads = oialr.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    new, state, losses = params, tx.init(params), []
    for _ in range(8):
        new, state, value = step(new, state)
        losses.append(float(value))
    assert losses[-1] < losses[0] - 0.01 * abs(losses[0])
    assert step._cache_size() == 1
    for path, leaf in named_leaves(new).items():
        old = named_leaves(params)[path]
        if is_low_rank(leaf):
            np.testing.assert_array_equal(leaf.u, old.u)
            np.testing.assert_array_equal(leaf.vt, old.vt)
            leaf, old = leaf.s, old.s
        assert np.any(leaf != old), path


MANY = [
    matrix("heads", 6, 2, 4, outputs=(1, 2)),
    matrix("stack", 3, 8, 6, stack=(0,), inputs=(1,), outputs=(2,)),
    matrix("conv", 2, 2, 3, 6, inputs=(0, 1, 2), outputs=(3,)),
]


@pytest.mark.parametrize("name", NAMES)
def test_heads_stacks_and_convolutions_cross_events_without_losing_state(name):
    """Dense, converted, truncated: a warning that state is lost would fail this."""
    tx = oialr.freeze_bases(recipes(MANY)[name])
    params = {x.path: normal(i, *x.axes.shape) for i, x in enumerate(MANY)}
    params["bias"] = normal(9, 5)

    def step(params, state, seed):
        shapes = oialr.transform.trainable(params)
        grads = {k: normal(seed + i, *shapes[k].shape) for i, k in enumerate(params)}
        updates, state = jax.jit(tx.update)(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, tx.init(params), 10)
    params, state, _ = oialr.factorize(params, state, MANY, tx=tx, rank=5)
    params, state = step(params, state, 20)
    params, state, _ = oialr.truncate(params, state, {x.path: 4 for x in MANY}, tx=tx)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, tx.init(params))
    after, _ = step(params, state, 30)
    for path, leaf in named_leaves(oialr.transform.trainable(after)).items():
        assert np.all(np.isfinite(leaf)), path
        assert np.any(leaf != oialr.transform.trainable(params)[path]), path


AVERAGES = {"trace", "ema", "mu"}
STATELESS = ("swan", "components")


def averages(state):
    """What a recipe remembers of the gradients of the leaf w."""
    flat = jax.tree_util.tree_leaves_with_path(state)
    names = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat
    }
    return [
        x for k, x in names.items() if k.endswith("/w") and AVERAGES & {*k.split("/")}
    ]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_remembered_turns_with_the_bases(name):
    """UᵀMV at the conversion, and with the turned bases at a truncation."""
    found = matrix("w", 9, 6)
    tx = oialr.freeze_bases(recipes([found])[name])
    params = {"w": normal(0, 9, 6), "b": normal(1, 6)}
    grads = {"w": normal(2, 9, 6), "b": normal(3, 6)}
    _, state = tx.update(grads, tx.init(params), params)
    low, low_state, _ = oialr.factorize(params, state, [found], tx=tx)
    low["w"] = oialr.LowRank(low["w"].u, normal(4, 6, 6), low["w"].vt, found.axes)
    cut, cut_state, _ = oialr.truncate(low, low_state, {"w": 4}, tx=tx)
    dense, whole, part = averages(state), averages(low_state), averages(cut_state)
    assert len(dense) == len(whole) == len(part) == (name not in STATELESS)
    for m, first, second in zip(dense, whole, part, strict=True):
        assert np.any(m)
        expected = low["w"].u.T @ m @ low["w"].vt.T
        np.testing.assert_allclose(first, expected, atol=EXACT)
        expected = cut["w"].u.T @ low["w"].u @ first @ low["w"].vt @ cut["w"].vt.T
        np.testing.assert_allclose(second, expected, atol=EXACT)


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


TYPED = [(name, form) for name in MAIN for form in ("dense", "low_rank")]
TYPED += [(name, "mixed") for name in NAMES]


@pytest.mark.parametrize(("name", "form"), TYPED)
def test_state_is_abstract_and_params_shaped_and_types_stay(name, form):
    _, params, _, matrices = network("dense", form)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tx = oialr.freeze_bases(recipes(matrices)[name])
    abstract, state = jax.eval_shape(tx.init, half), tx.init(half)
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, state)
    updates, after = jax.eval_shape(
        tx.update, oialr.transform.trainable(half), state, half
    )
    assert jax.tree.structure(updates) == jax.tree.structure(half)
    assert dtypes(updates) == dtypes(half)
    assert dtypes(after) == dtypes(state)
    ones = optax.tree.map_params(tx, jnp.ones_like, state)
    assert jax.tree.structure(ones) == jax.tree.structure(state)


@pytest.mark.parametrize("name", [x for x in NAMES if "svd" not in x])
def test_on_a_mesh_as_on_one_device_with_the_state_where_it_was(name):
    _, params, _, matrices = network("dense", "mixed")
    tx = oialr.freeze_bases(recipes(matrices)[name])
    grads = oialr.transform.trainable(params)
    expected = jax.jit(tx.update)(grads, tx.init(params), params)
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh("data=2,fsdp=4"))
    params = jax.device_put(params, layout(params))
    state = tx.init(params)
    state = jax.device_put(state, layout.of_optimizer(params, state))
    new, after = jax.jit(tx.update)(grads, state, params)
    actual, desired = jax.tree.leaves((new, after)), jax.tree.leaves(expected)
    for a, b in zip(actual, desired, strict=True):
        np.testing.assert_allclose(a, b, atol=EXACT)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)


@pytest.mark.parametrize(
    "name", ["dense_general", "conv2d_strided_dilated", "scan_remat"]
)
def test_adams_steps_of_a_core_move_w_as_far_as_those_of_a_dense_w(name):
    """Root mean square of the step of W: one, where every entry of an update is one."""
    fn, params, x = BY_NAME[name].build()
    matrices = oialr.find_matrices(fn, params, x)
    low = in_low_rank(params, matrices)
    scale = oialr.orthogonal.scale_by_core_rank(matrices)
    cores = jax.tree.map(jnp.ones_like, oialr.transform.trainable(low))
    updates, _ = scale.update(cores, scale.init(cores))
    flat, nodes = named_leaves(updates), named_leaves(low)
    assert matrices
    for matrix in matrices:
        node = nodes[matrix.path]
        core = flat[matrix.path]
        step = np.asarray(node.u @ core @ node.vt)
        rms = np.sqrt(np.mean(step**2, axis=(-2, -1)))
        np.testing.assert_allclose(rms, 1.0, rtol=1e-4)
    dense = jax.tree.map(jnp.ones_like, params)
    same, _ = scale.update(dense, scale.init(dense))
    jax.tree.map(np.testing.assert_array_equal, same, dense)
    bounded = oialr.orthogonal.scale_by_core_rank(matrices, most=1.5)
    updates, _ = bounded.update(cores, bounded.init(cores))
    largest = {float(jnp.max(x)) for x in jax.tree.leaves(updates)}
    assert max(largest) == pytest.approx(1.5)
