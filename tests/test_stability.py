"""Stability: numbers of dense numpy definitions, laws of each, trackers along runs."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from flax.training.train_state import TrainState
from helpers import in_low_rank
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import NamedSharding, PartitionSpec

import oialr_jax as oialr
from oialr_jax import bases, linalg
from oialr_jax.linalg import singular_values
from oialr_jax.lowrank import Axes, factor
from oialr_jax.matrices import Matrix
from oialr_jax.orthogonal.polar import polar
from oialr_jax.stability.comparison import sigmas
from oialr_jax.stability.singular import _gathered as gathered

CLOSE = 1e-5
NUMBERS = ("basis", "mixing", "cosine", "change")

SHAPES = {
    "tall": ((24, 10), (), (0,), (1,)),
    "wide": ((10, 24), (), (0,), (1,)),
    "square": ((12, 12), (), (0,), (1,)),
    "row": ((1, 8), (), (0,), (1,)),
    "conv": ((3, 3, 4, 6), (), (0, 1, 2), (3,)),
    "query": ((12, 3, 5), (), (0,), (1, 2)),
    "stacked": ((12, 4, 8), (1,), (0,), (2,)),
    "stacked_wide": ((2, 3, 6, 11), (0, 1), (2,), (3,)),
}
CASES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def matrix_of(shape, path="w"):
    return Matrix(path, Axes(*shape), rows=1, kind="dot")


def normal(seed, *shape, dtype=np.float32):
    """Gaussian, so well-conditioned enough for five digits in float32."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def tall(axes, array):
    """Matrices of a leaf, float64, tall; the stack flattened."""
    views = np.asarray(axes.to_matrix(array), np.float64).reshape(-1, axes.m, axes.n)
    return views if axes.m >= axes.n else views.swapaxes(-1, -2)


def upright(w):
    r = np.linalg.qr(w)[1]
    r = r * np.where(np.diag(r) < 0, -1, 1)[:, None]
    return r / np.linalg.norm(r)


def partial_isometry(w):
    u, sigma, vt = np.linalg.svd(w, full_matrices=False)
    r = int(np.sum(sigma > 1e-4 * sigma[0]))
    return u[:, :r] @ vt[:r]


def dense_reference(w1, w2):
    """The definitions, of two tall float64 matrices."""
    p1, p2 = partial_isometry(w1), partial_isometry(w2)
    size = np.linalg.norm(p1) * np.linalg.norm(p2)
    return {
        "basis": np.trace(p1.T @ p2) / size,
        "mixing": 1 - np.linalg.norm(upright(w1) - upright(w2)) / 2,
        "cosine": np.sum(w1 * w2) / (np.linalg.norm(w1) * np.linalg.norm(w2)),
        "change": np.linalg.norm(w2 - w1) / np.linalg.norm(w1),
    }


def assert_numbers(found, w1, w2, atol=CLOSE):
    for i, pair in enumerate(zip(w1, w2, strict=True)):
        for name, value in dense_reference(*pair).items():
            actual = np.asarray(getattr(found, name)).reshape(-1)[i]
            np.testing.assert_allclose(actual, value, atol=atol, err_msg=name)


@CASES
def test_equals_the_dense_definitions(shape):
    matrix = matrix_of(shape)
    before = normal(0, *shape[0])
    after = before + 0.4 * normal(1, *shape[0])
    found = oialr.stability.compare({"w": before}, {"w": after}, [matrix])["w"]
    assert found.basis.shape == matrix.axes.l
    w1, w2 = tall(matrix.axes, before), tall(matrix.axes, after)
    assert_numbers(found, w1, w2)
    columns = [partial_isometry(a) * partial_isometry(b) for a, b in zip(w1, w2)]  # noqa: B905
    cosines = [np.mean(np.sum(x, axis=0)) for x in columns]
    np.testing.assert_allclose(np.reshape(found.basis, -1), cosines, atol=CLOSE)


@CASES
@pytest.mark.parametrize("kinds", ["low_low", "low_dense", "dense_low"])
def test_a_low_rank_leaf_is_its_dense_matrix(shape, kinds):
    matrix = matrix_of(shape)
    rank = max(1, min(matrix.m, matrix.n) // 2)
    before = {"w": factor(normal(0, *shape[0]), matrix.axes, rank)}
    moved = before["w"].materialize() + 0.3 * normal(1, *shape[0])
    after = {"w": factor(moved, matrix.axes, max(1, rank - 1))}
    pair = [
        tree if kind == "low" else oialr.materialize(tree)
        for tree, kind in zip((before, after), kinds.split("_"), strict=True)
    ]
    found = oialr.stability.compare(*pair, [matrix])["w"]
    views = [tall(matrix.axes, oialr.materialize(tree)["w"]) for tree in pair]
    # rounding gives a dense matrix a trace of every direction that it lacks
    assert_numbers(found, *views, atol=CLOSE if kinds == "low_low" else 1e-3)


def test_no_dense_matrix_is_formed_of_low_rank_leaves():
    axes = Axes((60, 50), (), (0,), (1,))
    low = {"w": factor(normal(0, 60, 50), axes, 4)}
    key = jax.random.key(0)

    def numbers(a, b, key):
        matrix = matrix_of(SHAPES["tall"])._replace(axes=axes)
        return oialr.stability.compare(a, b, [matrix], key=key)

    text = str(jax.make_jaxpr(numbers)(low, low, key))
    assert "[60,50]" not in text
    assert "[60,4]" in text


@CASES
@pytest.mark.parametrize("low", [False, True], ids=["dense", "low"])
def test_the_same_tree_is_stable(shape, low):
    matrix = matrix_of(shape)
    params = {"w": normal(0, *shape[0])}
    if low:
        params = in_low_rank(params, [matrix])
    found = oialr.stability.compare(params, params, [matrix])["w"]
    for name, value in {"basis": 1, "mixing": 1, "cosine": 1, "change": 0}.items():
        np.testing.assert_allclose(getattr(found, name), value, atol=CLOSE)


def test_independent_square_matrices_share_nothing():
    shape = ((8, 100, 100), (0,), (1,), (2,))
    found = oialr.stability.compare(
        {"w": normal(0, *shape[0])}, {"w": normal(1, *shape[0])}, [matrix_of(shape)]
    )["w"]
    assert np.max(np.abs(found.basis)) < 0.04  # deviation 1 / n
    assert abs(float(np.mean(found.cosine))) < 0.01


def test_no_number_sees_the_scale_but_change():
    matrix = matrix_of(SHAPES["tall"])
    before = normal(0, 24, 10)
    after = before + 0.4 * normal(1, 24, 10)
    plain = oialr.stability.compare({"w": before}, {"w": after}, [matrix])["w"]
    scaled = oialr.stability.compare(
        {"w": 1e-12 * before}, {"w": 1e9 * after}, [matrix]
    )["w"]
    for name in ("basis", "mixing", "cosine"):
        expected = getattr(plain, name)
        np.testing.assert_allclose(getattr(scaled, name), expected, atol=CLOSE)


@pytest.mark.parametrize(
    "shape", [SHAPES["tall"], SHAPES["wide"]], ids=["tall", "wide"]
)
def test_no_number_sees_signs_and_order_of_singular_vectors(shape):
    matrix = matrix_of(shape)
    low = factor(normal(0, *shape[0]), matrix.axes, 6)
    order = np.array([3, 0, 5, 1, 4, 2])
    sign = jnp.asarray([1.0, -1, 1, -1, -1, 1])
    core = low.s[order][:, order]
    other = oialr.LowRank(
        low.u[:, order] * sign.reshape(1, -1),
        core,
        low.vt[order] * sign.reshape(-1, 1),
        low.axes,
    )
    found = oialr.stability.compare({"w": low}, {"w": other}, [matrix])["w"]
    for name, value in {"basis": 1, "mixing": 1, "cosine": 1, "change": 0}.items():
        np.testing.assert_allclose(getattr(found, name), value, atol=CLOSE)
    third = {"w": low.materialize() + 0.3 * normal(2, *shape[0])}
    one, two = (
        oialr.stability.compare({"w": x}, third, [matrix])["w"] for x in (low, other)
    )
    for name in NUMBERS:
        np.testing.assert_allclose(
            getattr(one, name), getattr(two, name), atol=CLOSE, err_msg=name
        )


def entries(shape):
    return hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32))


@given(
    pair=st.sampled_from([(1, 1), (1, 5), (4, 4), (6, 3), (2, 5)]).flatmap(
        lambda shape: st.tuples(*[entries(shape), entries(shape)])
    )
)
@settings(max_examples=60, deadline=None)
def test_numbers_are_bounded_for_all_matrices(pair):
    before, after = map(jnp.asarray, pair)
    matrix = matrix_of((before.shape, (), (0,), (1,)))
    found = oialr.stability.compare({"w": before}, {"w": after}, [matrix])["w"]
    assert abs(float(found.basis)) <= 1 + CLOSE
    assert abs(float(found.cosine)) <= 1 + CLOSE
    assert -CLOSE <= float(found.mixing) <= 1 + CLOSE
    assert float(found.change) >= 0


@pytest.mark.parametrize("condition", [1.0, 30.0, 1e3])
def test_the_polar_factor_is_that_of_the_svd(condition):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 40)))[0] for n in (90, 40))
    w = (u * np.geomspace(1, 1 / condition, 40)) @ v.T
    found = polar(jnp.asarray(w, jnp.float32))
    # a polar factor is as sensitive as the smallest singular value says
    np.testing.assert_allclose(found, u @ v.T, atol=max(CLOSE, 1e-6 * condition))


def test_missing_directions_are_no_part_of_the_polar_factor():
    w = normal(0, 30, 5) @ normal(1, 5, 20)
    found = polar(w)
    np.testing.assert_allclose(found, partial_isometry(np.float64(w)), atol=5e-3)
    np.testing.assert_allclose(jnp.sum(found**2), 5, atol=1e-3)
    assert float(jnp.max(singular_values(found))) <= 1 + CLOSE
    assert float(jnp.max(jnp.abs(polar(jnp.zeros((4, 3)))))) == 0


def test_a_cut_alone_is_the_root_of_the_share_that_stays():
    matrix = matrix_of(SHAPES["tall"])
    w = normal(0, 24, 10)
    cut = {"w": factor(w, matrix.axes, 4)}
    found = oialr.stability.compare({"w": w}, cut, [matrix])["w"]
    np.testing.assert_allclose(found.basis, np.sqrt(4 / 10), atol=CLOSE)


def test_zeros_have_no_basis_and_other_matrices_do_not_suffer():
    shape = ((2, 6, 4), (0,), (1,), (2,))
    w = normal(0, 2, 6, 4).at[1].set(0)
    bad = normal(1, 2, 6, 4).at[1].set(jnp.nan)
    zeros = oialr.stability.compare({"w": w}, {"w": w}, [matrix_of(shape)])["w"]
    np.testing.assert_allclose(zeros.basis, [1, 0], atol=CLOSE)
    np.testing.assert_allclose(zeros.cosine, [1, 0], atol=CLOSE)
    lost = oialr.stability.compare({"w": w}, {"w": bad}, [matrix_of(shape)])["w"]
    np.testing.assert_array_equal(np.isfinite(lost.basis), [True, False])


@pytest.mark.parametrize("low", [False, True], ids=["dense", "low"])
def test_the_null_is_a_random_change_of_equal_size(low):
    shape = ((4, 80, 40), (0,), (1,), (2,))
    matrix = matrix_of(shape)
    before = {"w": normal(0, *shape[0])}
    if low:
        before = in_low_rank(before, [matrix])
    rng = np.random.default_rng(5)
    if low:  # within the span, as training a core is
        core = before["w"].s
        noise = jnp.asarray(rng.normal(size=core.shape), jnp.float32)
        after = {"w": oialr.LowRank(before["w"].u, core + noise, before["w"].vt,
                                    matrix.axes)}  # fmt: skip
    else:
        after = {"w": before["w"] + jnp.asarray(rng.normal(size=shape[0]), jnp.float32)}
    found = oialr.stability.compare(before, after, [matrix], key=jax.random.key(0))["w"]
    np.testing.assert_allclose(found.null.change, found.change, rtol=1e-4)
    for name in ("basis", "mixing", "cosine"):  # what happened here was random too
        np.testing.assert_allclose(
            np.mean(getattr(found.null, name)),
            np.mean(getattr(found, name)),
            atol=0.03,
            err_msg=name,
        )
    assert not np.allclose(found.null.basis, found.basis, atol=1e-6)
    again = oialr.stability.compare(before, after, [matrix], key=jax.random.key(0))["w"]
    np.testing.assert_array_equal(again.null.basis, found.null.basis)


@pytest.mark.parametrize("fraction", [None, 0.5], ids=["dense", "low_rank"])
def test_sigmas_of_portraits_are_those_of_their_matrices(fraction):
    """Of all shapes at once, some of which share one of R."""
    matrices = [matrix_of(shape, path) for path, shape in SHAPES.items()]
    params = {path: normal(i, *SHAPES[path][0]) for i, path in enumerate(SHAPES)}
    if fraction is not None:
        params = in_low_rank(params, matrices, fraction=fraction)
    found = jax.jit(sigmas)(oialr.stability.tracker(matrices).init(params))
    assert found.keys() == SHAPES.keys()
    for path, leaf in params.items():
        axes = SHAPES[path]
        dense = leaf.materialize() if fraction is not None else leaf
        whole = Axes(*axes).to_matrix(dense)
        wanted = np.linalg.svd(np.asarray(whole, np.float64), compute_uv=False)
        wanted = wanted[..., : found[path].shape[-1]]
        assert found[path].shape == wanted.shape
        np.testing.assert_allclose(found[path], wanted, rtol=CLOSE, atol=CLOSE)
        if fraction is not None:
            assert found[path].shape[-1] == leaf.rank


def test_spectra_and_ranks():
    matrix = matrix_of(SHAPES["stacked"])
    w = normal(0, 12, 4, 8)
    low = {"w": factor(w, matrix.axes, 5)}
    for params, kept in (({"w": w}, 8), (low, 5)):
        found = oialr.stability.spectra(params, [matrix])["w"]
        dense = tall(matrix.axes, oialr.materialize(params)["w"])
        sigma = np.linalg.svd(dense, compute_uv=False)[:, :kept]
        share = sigma / sigma.sum(-1, keepdims=True)
        np.testing.assert_allclose(found.sigma, sigma, rtol=1e-4)
        np.testing.assert_allclose(
            found.effective_rank, np.exp(-(share * np.log(share)).sum(-1)), rtol=1e-4
        )
        np.testing.assert_allclose(
            found.stable_rank, (sigma**2).sum(-1) / sigma[:, 0] ** 2, rtol=1e-4
        )
    empty = oialr.stability.spectra({"w": 0 * w}, [matrix])["w"]
    assert empty.effective_rank.tolist() == empty.stable_rank.tolist() == [0] * 4


def test_leading_subspaces():
    matrix = matrix_of(SHAPES["conv"])
    before = normal(0, 3, 3, 4, 6)
    after = before + 0.3 * normal(1, 3, 3, 4, 6)
    low = {"w": factor(after, matrix.axes, 5)}
    views = [np.linalg.svd(tall(matrix.axes, x)[0]) for x in (before, after)]
    (u1, _, v1), (u2, _, v2) = views
    for tree in ({"w": after}, low):
        found = oialr.stability.subspaces({"w": before}, tree, [matrix], 3)["w"]
        expected = scipy.linalg.subspace_angles(u1[:, :3], u2[:, :3])
        np.testing.assert_allclose(found.input_angles, expected, atol=1e-4)
        overlap = np.sum((v1[:3] @ v2[:3].T) ** 2) / 3
        np.testing.assert_allclose(found.outputs, overlap, atol=1e-4)
    with pytest.raises(ValueError, match=r"\[1, 5\] for w, got 6"):
        oialr.stability.subspaces({"w": before}, low, [matrix], 6)


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ({"v": jnp.zeros((24, 10))}, "no leaf at w; there are: v"),
        (
            {"w": jnp.zeros((24, 11))},
            r"w has shape \(24, 11\), the matrix has \(24, 10\)",
        ),
    ],
    ids=["missing", "shape"],
)
def test_refuses_trees_that_lack_a_matrix(params, error):
    with pytest.raises(ValueError, match=error):
        oialr.stability.compare(params, params, [matrix_of(SHAPES["tall"])])


def small_run():
    """A regression with three matrices: forward, matrices, a TrainState, a loss."""
    params = {"a": normal(0, 16, 12), "b": normal(1, 12, 12), "c": normal(2, 12, 3)}
    x = normal(3, 40, 16)
    y = normal(4, 40, 3)

    def fn(params, x):
        return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]

    matrices = oialr.find_matrices(fn, params, x)
    factored = oialr.factored(fn)
    tx = oialr.freeze_bases(optax.adam(1e-2))
    state = TrainState.create(apply_fn=factored, params=params, tx=tx)

    def step(state, batch):
        grad = oialr.value_and_grad(lambda p: jnp.mean((factored(p, x) - y) ** 2))
        loss, grads = grad(state.params)
        return state.apply_gradients(grads=grads), {"loss": loss}

    return matrices, tx, state, step


def test_a_tracker_follows_a_run_across_conversion_and_cuts():
    matrices, tx, state, train_step = small_run()
    chosen = oialr.select(matrices)
    schedule = oialr.Schedule(delay=2, every=2, layer_step=1.0)
    step = oialr.adaptive(train_step, tx, chosen, schedule, oialr.RankRule(cutoff=0.4))
    track = oialr.stability.tracker(matrices)
    followed = track.init(state.params)
    kinds = set()
    before = jax.tree.map(np.array, oialr.materialize(state.params))
    for _ in range(7):
        state, _ = step(state, None)  # uses the old state up, buffers and all
        followed, values = track.update(followed, state.params)
        after = jax.tree.map(np.array, oialr.materialize(state.params))
        for matrix in matrices:
            assert_numbers(
                values[matrix.path],
                tall(matrix.axes, jnp.asarray(before[matrix.path])),
                tall(matrix.axes, jnp.asarray(after[matrix.path])),
                atol=1e-3,  # the conditions of trained matrices
            )
        before = after
        kinds.add(str(oialr.ranks(state.params)))
    assert len(kinds) >= 3, "dense, low-rank and cut"
    assert list(values) == ["a", "b", "c"]


def test_a_tracker_within_a_compiled_loop_is_that_on_the_host():
    matrices, _, state, train_step = small_run()
    track = oialr.stability.tracker(matrices)

    @jax.jit
    def run(state):
        def body(carry, _):
            state, followed = carry
            state, _ = train_step(state, None)
            followed, values = track.update(followed, state.params)
            return (state, followed), values

        return jax.lax.scan(body, (state, track.init(state.params)), None, length=3)[1]

    inside = run(state)
    followed = track.init(state.params)
    for i in range(3):
        state, _ = jax.jit(train_step)(state, None)
        followed, values = track.update(followed, state.params)
        for path, found in values.items():
            for name in NUMBERS:
                np.testing.assert_allclose(
                    getattr(inside[path], name)[i], getattr(found, name), atol=CLOSE
                )


def calls(text):
    """The LAPACK calls in the text of a compiled program, each with all it waits for.

    They are in the entry computation, where a line says what one value is made of.
    """
    waits, found = {}, []
    for line in text[text.index("\nENTRY ") :].splitlines():
        name, equals, made = line.strip().removeprefix("ROOT ").partition(" = ")
        if equals:
            uses = set(re.findall(r"%[\w.-]+", made))
            waits[name] = uses.union(*(waits.get(x, ()) for x in uses))
            if "lapack" in made:
                found.append(name)
    return {name: waits[name] for name in found}


@pytest.mark.parametrize("what", ["stability", "update"])
def test_no_two_lapack_calls_can_run_at_once(what):
    """On a CPU they may deadlock: each waits for all that come before it."""
    shapes = {"tall": (24, 10), "square": (12, 12), "narrow": (12, 3)}
    params = {path: normal(0, *shape) for path, shape in shapes.items()}
    matrices = [
        Matrix(path, Axes(shape, (), (0,), (1,)), rows=1, kind="dot")
        for path, shape in shapes.items()
    ]
    track = oialr.stability.tracker(matrices)

    def twice(before, after, key):
        if what == "stability":
            return oialr.stability.compare(before, after, matrices, key=key)
        state, first = track.update(track.init(before), after, key)
        return first, track.update(state, before, key)

    compiled = jax.jit(twice).lower(params, params, jax.random.key(0)).compile()
    found = sorted(calls(compiled.as_text()).items(), key=lambda x: len(x[1]))
    assert len(found) >= 3 * len(shapes)
    for (before, _), (after, waits) in itertools.pairwise(found):
        assert before in waits, f"{after} does not wait for {before}"


@pytest.mark.parametrize("what", ["repair", "orthogonalize"])
def test_nor_can_those_of_a_repair_or_an_optimizer(what):
    if what == "repair":
        node = factor(normal(0, 24, 10), Axes((24, 10), (), (0,), (1,)))
        compiled = bases.repaired.lower(node).compile()
    else:
        grads = {"a": normal(0, 24, 10), "b": normal(1, 12, 12), "c": normal(2, 12, 3)}
        tx = oialr.orthogonal.orthogonalize("svd")
        update = jax.jit(lambda g: tx.update(g, tx.init(g))[0])
        compiled = update.lower(grads).compile()
    found = sorted(calls(compiled.as_text()).items(), key=lambda x: len(x[1]))
    assert len(found) >= 2
    for (before, _), (after, waits) in itertools.pairwise(found):
        assert before in waits, f"{after} does not wait for {before}"


def test_on_a_cpu_a_program_with_lapack_calls_is_waited_for():
    @jax.jit
    def slow(x):
        return jax.lax.fori_loop(0, 500, lambda _, y: jnp.tanh(y @ y), x)

    x = jnp.eye(256)
    slow(x).block_until_ready()
    assert linalg.alone({"x": slow(x + 1)})["x"].is_ready()
    assert linalg.alone(jax.ShapeDtypeStruct((2,), jnp.float32)).shape == (2,)


def test_params_on_a_mesh_are_gathered_by_one_program():
    mesh = oialr.sharding.make_mesh("fsdp=8")
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    track = oialr.stability.tracker([matrix_of(SHAPES["tall"])])
    followed = track.init({"w": jax.device_put(normal(0, 24, 10), place)})
    program = gathered(mesh)
    params = [{"w": jax.device_put(normal(seed, 24, 10), place)} for seed in (1, 2, 3)]
    followed, _ = track.update(followed, params[0])
    compiled = []

    def listen(event, *_, **__):
        compiled.extend([event] * ("backend_compile" in event))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for later in params[1:]:
            followed, _ = track.update(followed, later)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert gathered(mesh) is program
    assert compiled == []


def test_params_on_a_mesh_give_the_same_numbers():
    matrix = matrix_of(SHAPES["tall"])
    mesh = oialr.sharding.make_mesh("fsdp=8")
    before, after = normal(0, 24, 10), normal(1, 24, 10)
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    spread = [{"w": jax.device_put(x, place)} for x in (before, after)]
    key = jax.random.key(0)
    found = oialr.stability.compare(*spread, [matrix], key=key)["w"]
    plain = oialr.stability.compare({"w": before}, {"w": after}, [matrix], key=key)["w"]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=CLOSE)
    left, right = (
        oialr.stability.spectra(x, [matrix])["w"] for x in (spread[0], {"w": before})
    )
    np.testing.assert_allclose(left.sigma, right.sigma, rtol=1e-5)


def test_a_threshold_that_no_stability_has_is_refused():
    with pytest.raises(ValueError, match=r"^`threshold` must be in \[-1, 1\], got 1.1"):
        oialr.stability.when_settled(1.1)
