"""The forms of inference: every one is the function that was trained."""

import dataclasses
import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import BY_NAME, KINDS
from flax.training.train_state import TrainState
from helpers import TOLERANCE, assert_close, in_low_rank

import oialr_jax as oialr
from oialr_jax import cost
from oialr_jax.adapters import attached
from oialr_jax.export.identity import BOUND, chosen_columns
from oialr_jax.forms import TwoFactors, narrowed
from oialr_jax.lowrank import Axes, factor
from oialr_jax.projection import project_to_rank
from oialr_jax.training import TrainingState

SHAPES = {
    "tall": ((12, 7), (), (0,), (1,)),
    "wide": ((7, 12), (), (0,), (1,)),
    "square": ((9, 9), (), (0,), (1,)),
    "stack": ((3, 6, 8), (0,), (1,), (2,)),
    "stack_last": ((6, 8, 3), (2,), (0,), (1,)),
    "conv": ((3, 3, 4, 6), (), (0, 1, 2), (3,)),
    "heads": ((8, 2, 4), (), (0,), (1, 2)),
    "turned": ((6, 8), (), (1,), (0,)),
}


def drawn(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def node(name, rank=4, dtype=None):
    axes = Axes(*SHAPES[name])
    found = factor(drawn(0, *axes.shape), axes, rank)
    if dtype is not None:
        found = jax.tree.map(lambda x: x.astype(dtype), found)
    return found


def worst(actual, desired):
    actual, desired = (np.asarray(x, np.float64) for x in (actual, desired))
    return np.max(np.abs(actual - desired)) / np.max(np.abs(desired))


EVERY = [  # one of the two forms in a push, in turn
    pytest.param(
        case,
        form,
        id=f"{case}-{form}",
        marks=[pytest.mark.long] if (i + j) % 2 else [],
    )
    for i, case in enumerate(KINDS)
    for j, form in enumerate(("identity", "factors"))
]


@pytest.mark.parametrize(("case", "form"), EVERY)
@pytest.mark.filterwarnings("ignore:.*is materialised:UserWarning")
def test_every_form_runs_as_the_dense_function(case, form):
    fn, params, x = case.build()
    low = in_low_rank(params, oialr.find_matrices(fn, params, x))
    merged = oialr.merge(low, form=form)
    actual = eqx.filter_jit(oialr.factored(fn))(merged, x)
    desired = eqx.filter_jit(fn)(oialr.materialize(low), x)
    assert_close(actual, desired, TOLERANCE[jnp.dtype(case.dtype)])


@pytest.mark.parametrize("form", ["factors", "identity", "core", "dense"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_merged_matrix_is_the_matrix(shape, form):
    low = node(shape)
    merged = oialr.merge({"w": low, "b": jnp.ones(3)}, form=form)
    assert merged["b"].shape == (3,)
    dense = oialr.materialize(merged)["w"]
    assert dense.dtype == jnp.float32
    assert worst(dense, low.materialize()) < 1e-6


USES = {
    "rows": (lambda w, x: x @ w, (6, 8), (2, 6)),
    "first": (lambda w, x: jnp.einsum("mn,bm->nb", w, x), (6, 8), (2, 6)),
    "heads": (lambda w, x: jnp.einsum("bm,mhd->bhd", x, w), (6, 2, 4), (2, 6)),
    "turned_heads": (lambda w, x: jnp.einsum("bm,mhd->bdh", x, w), (6, 2, 4), (2, 6)),
    "columns": (lambda w, x: x @ w.T, (6, 8), (2, 8)),
    "cut": (lambda w, x: x @ w[:, 2:7], (6, 8), (2, 6)),
    "scaled": (lambda w, x: x @ (w * jnp.arange(8.0)[None]), (6, 8), (2, 6)),
}


@pytest.mark.parametrize("rows", [1, 40], ids=["few", "many"])
@pytest.mark.parametrize("use", USES)
def test_a_permutation_is_undone_on_the_result_or_in_a_factor(use, rows):
    fn, shape, (_, m) = USES[use]
    axes = Axes(shape, (), (0,), tuple(range(1, len(shape))))
    low = factor(drawn(0, *shape), axes, 3)
    x = drawn(1, rows, m)
    merged = oialr.merge({"w": low}, form="identity")
    run = oialr.factored(lambda p, x: fn(p["w"], x))
    assert worst(run(merged, x), fn(low.materialize(), x)) < 1e-5
    eqns = jax.make_jaxpr(run)(merged, x).eqns
    joined = [
        e.outvars[0].aval.shape for e in eqns if e.primitive.name == "concatenate"
    ]
    if use in ("rows", "first", "heads"):
        assert ((rows, 8) in joined) == (rows == 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_numbers_of_each_form_are_as_promised(shape):
    low = node(shape)
    m, n, r = low.axes.m, low.axes.n, low.rank
    stack = int(np.prod(low.axes.l))
    wanted = {
        "factors": r * (m + n),
        "identity": r * (m + n - r),
        "core": r * (m + n + r),
        "dense": m * n,
    }
    for form, numbers in wanted.items():
        merged = oialr.merge({"w": low}, form=form)
        assert oialr.counts(merged).stored == stack * numbers
        assert oialr.counts(merged).dense == stack * m * n
        held = {} if form == "dense" else {"w": (m, n, r)}
        assert oialr.ranks(merged) == held
    identity = oialr.merge({"w": low}, form="identity")["w"]
    assert sum(x.size for x in (identity.c, identity.z)) == stack * wanted["identity"]


@pytest.mark.parametrize("rank", range(1, 8))
def test_identity_is_never_above_dense(rank):
    low = node("wide", rank)
    merged = oialr.merge({"w": low}, form="identity")
    assert oialr.counts(merged).stored <= 7 * 12
    assert worst(merged["w"].materialize(), low.materialize()) < 2e-6


@pytest.mark.parametrize("side", ["wide", "tall"])
def test_the_core_goes_into_the_smaller_side(side):
    low = node(side)
    two = oialr.merge({"w": low}, form="factors")["w"]
    kept, turned = (two.b, low.vt) if side == "wide" else (two.a, low.u)
    np.testing.assert_array_equal(kept, turned)


@pytest.mark.parametrize("seed", range(20))
def test_columns_are_chosen_so_that_no_entry_is_large(seed):
    rng = np.random.default_rng(seed)
    r, n = sorted(rng.integers(1, 40, 2))
    # close to dependent, where a pivoted QR alone does badly
    right = rng.normal(size=(r, n)) * np.geomspace(1, 1e-6, r)[:, None]
    right = np.linalg.qr(right.T + 1.0)[0].T
    order, z = chosen_columns(right)
    assert sorted(order) == list(range(n))
    assert np.max(np.abs(z), initial=0) <= BOUND * (1 + 1e-9)
    np.testing.assert_allclose(right[:, order[:r]] @ z, right[:, order[r:]], atol=1e-10)


def test_swaps_do_what_pivots_leave():
    """Kahan's matrix, whose pivoted QR is as it stands and whose Z grows as 2ʳ."""
    r, s = 24, np.sin(1.2)
    kahan = np.triu(-np.cos(1.2) * np.ones((r, r)), 1) + np.eye(r)
    kahan = (s ** np.arange(r))[:, None] * kahan * (1 - 1e-10) ** np.arange(r)
    last = np.linalg.solve(kahan[:-1, :-1], kahan[:-1, -1:])
    assert np.max(np.abs(last)) > 10
    _, z = chosen_columns(kahan[:-1])
    assert np.max(np.abs(z)) <= BOUND


def test_auto_takes_dense_where_that_is_smaller():
    small, large = (node("square", r) for r in (4, 5))  # 72 and 90 of 81 numbers
    merged = oialr.merge({"small": small, "large": large})
    assert isinstance(merged["small"], TwoFactors)
    assert isinstance(merged["large"], jax.Array)


def test_auto_takes_dense_where_that_is_faster():
    fn, low = (lambda p, x: x @ p["w"]), node("square", 4)
    slow = cost.Rates(1e9, 1e9, 1e9, 1e9, 1e9, 1e9, overhead=1.0)  # a call is all
    fast = dataclasses.replace(slow, overhead=0.0, bandwidth=1e15)
    found = oialr.find_matrices(fn, {"w": low}, jnp.ones((64, 9)))
    assert found[0].rows == 64
    merged = [oialr.merge({"w": low}, matrices=found, rates=x) for x in (slow, fast)]
    assert isinstance(merged[0]["w"], jax.Array)
    assert isinstance(merged[1]["w"], TwoFactors)


@pytest.mark.parametrize(
    ("dtype", "form", "bound"),
    [
        ("bfloat16", "factors", 8e-3),
        ("bfloat16", "identity", 2e-2),
        ("float16", "factors", 1e-3),
        ("bfloat16", "core", 8e-3),
        ("int8", "core", 2e-2),
        ("int8", "auto", 2e-2),
    ],
)
def test_narrow_factors_are_near_and_meet_wide_arrays(dtype, form, bound):
    low = node("wide", 4 if form != "auto" else 2)
    merged = oialr.merge({"w": low}, form=form, dtype=dtype)
    factors = jax.tree.leaves(merged["w"])
    assert sum(x.dtype == dtype for x in factors) == 2
    if isinstance(merged["w"], oialr.LowRank):
        assert merged["w"].s.dtype == jnp.float32
    x = drawn(1, 3, 7)
    out = oialr.factored(lambda p, x: x @ p["w"])(merged, x)
    assert out.dtype == jnp.float32
    assert 1e-6 < worst(out, x @ low.materialize()) < bound
    assert worst(out, x @ merged["w"].materialize()) < 1e-5


def test_the_core_is_the_best_for_rounded_bases():
    low = node("square", 4)
    best = oialr.merge({"w": low}, form="core", dtype="int8")["w"]
    (u, su), (vt, sv) = narrowed(low.u, "int8", (-2,)), narrowed(low.vt, "int8", (-1,))
    scaled = oialr.LowRank(u, su.mT * low.s * sv.mT, vt, low.axes)
    dense = low.materialize()
    errors = [float(jnp.linalg.norm(x.materialize() - dense)) for x in (best, scaled)]
    assert errors[0] < errors[1]


def test_a_norm_of_a_weight_knows_that_factors_are_not_orthonormal():
    case = BY_NAME["weight_normed"]
    fn, params, x = case.build()
    low = in_low_rank(params, oialr.find_matrices(fn, params, x))
    for form, dtype in (("factors", None), ("identity", None), ("core", "int8")):
        merged = oialr.merge(low, form=form, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # no leaf is materialised
            actual = oialr.factored(fn)(merged, x)
        assert_close(actual, fn(oialr.materialize(merged), x), 2e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"form": "svd"}, "`form` must be one of auto, factors, .*, got 'svd'"),
        ({"dtype": "int4"}, "`dtype` must be one of float32, .*, got 'int4'"),
        ({"form": "identity", "dtype": "int8"}, "int8' is for frozen bases and form="),
        ({"form": "dense", "dtype": "int8"}, "int8' is for frozen bases and form="),
    ],
    ids=["form", "dtype", "int8", "int8_dense"],
)
def test_bad_options_are_refused(options, error):
    with pytest.raises(ValueError, match=error):
        oialr.merge({"w": node("wide")}, **options)


def test_what_is_not_finite_is_named():
    low = node("wide")
    broken = dataclasses.replace(low, s=low.s.at[0, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="layer/w is not finite"):
        oialr.merge({"layer": {"w": broken}})


def test_what_overflows_is_refused():
    low = node("wide")
    huge = dataclasses.replace(low, s=low.s * 1e6)
    with pytest.raises(ValueError, match="too large for float16"):
        oialr.merge({"w": huge}, form="factors", dtype="float16")
    assert oialr.merge({"w": huge}, form="factors", dtype="bfloat16")


def two_layers(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


@pytest.fixture(scope="module")
def forms():
    """Dense params, their matrices, and them in every form but LowRank."""
    params = {"a": drawn(0, 6, 8), "b": drawn(1, 8, 5)}
    found = oialr.find_matrices(two_layers, params, drawn(2, 3, 6))
    low = in_low_rank(params, found)
    trees = {x: oialr.merge(low, form=x) for x in ("factors", "identity")}
    cores, base = oialr.adapters(params, found, 2)
    return params, found, trees | {"base": attached(cores, base)}


NOT_LOW_RANK = ("factors", "identity", "base")


@pytest.mark.parametrize("form", NOT_LOW_RANK)
def test_matrices_are_found_in_every_form(forms, form):
    _, found, trees = forms
    again = oialr.find_matrices(two_layers, trees[form], drawn(2, 3, 6))
    assert again == found
    assert again.skipped == ()


REFUSING = {
    "explain": lambda p, m, x: oialr.explain(two_layers, p, x),
    "curvature": lambda p, m, x: oialr.curvature(lambda *_: 0.0, m)(p, x),
    "factorize": lambda p, m, x: oialr.factorize(p, None, m),
    "truncate": lambda p, m, x: oialr.truncate(p, None, oialr.RankRule()),
    "densify": lambda p, m, x: oialr.densify(p, None),
    "project": lambda p, m, x: project_to_rank(p, oialr.RankRule(), m),
    "adapters": lambda p, m, x: oialr.adapters(p, m, 2),
    "training": lambda p, m, x: oialr.training(
        lambda p, x: jnp.mean(two_layers(p, x)), optax.sgd(0.1), delay=3
    ).init(p, x),
    "adaptive": lambda p, m, x: oialr.adaptive(
        lambda state, x: state,
        oialr.freeze_bases(optax.sgd(0.1)),
        m,
        oialr.Schedule(delay=1, every=1),
    ).check(TrainingState(jnp.zeros((), jnp.int32), p, ()), x),
    "wrap": lambda p, m, x: oialr.wrap(
        TrainState(jnp.zeros((), jnp.int32), two_layers, p, optax.sgd(0.1), ()),
        lambda state, x: state,
        x,
        delay=2,
    ),
    "compress": lambda p, m, x: oialr.compress(
        p,
        m,
        oialr.curvature(lambda p, x: jnp.mean(two_layers(p, x)), m)(
            oialr.materialize(p), x
        ),
        {"a": 2, "b": 2},
    ),
    "freeze_bases": lambda p, m, x: oialr.freeze_bases(optax.sgd(0.1)).init(p),
    "spectra": lambda p, m, x: oialr.stability.spectra(p, m),
    "tracker": lambda p, m, x: oialr.stability.tracker(m).init(p),
}


@pytest.mark.parametrize("call", REFUSING)
@pytest.mark.parametrize("form", NOT_LOW_RANK)
def test_what_changes_params_takes_no_other_form(forms, form, call):
    _, found, trees = forms
    kind = {"factors": "TwoFactors", "identity": "Identity", "base": "Adapted"}[form]
    with pytest.raises(ValueError, match=f"^a is held as {kind}, and .* alone: give"):
        REFUSING[call](trees[form], found, drawn(2, 3, 6))


@pytest.mark.parametrize("form", NOT_LOW_RANK)
def test_a_use_as_an_array_says_what_to_call(forms, form):
    node = forms[2][form]["a"]
    with pytest.raises(TypeError, match=rf"^a {type(node).__name__} node is no array"):
        drawn(2, 3, 6) @ node
    with pytest.raises(AttributeError, match=r"call the function as `factored\(fn\)`"):
        node.astype(jnp.float32)


@pytest.mark.parametrize("form", ["core", "factors", "identity"])
def test_every_form_runs_where_the_batch_size_is_a_symbol(forms, form):
    """As `jax.export` and converters to other formats trace."""
    params, found, _ = forms
    merged = oialr.merge(in_low_rank(params, found), form=form)
    (size,) = jax.export.symbolic_shape("b")
    spec = jax.ShapeDtypeStruct((size, 6), jnp.float32)
    run = jax.jit(lambda x: oialr.factored(two_layers)(merged, x))
    program = jax.export.export(run)(spec)
    for rows in (1, 20):
        x = drawn(3, rows, 6)
        assert worst(program.call(x), two_layers(oialr.materialize(merged), x)) < 1e-5


@pytest.mark.parametrize("form", NOT_LOW_RANK)
def test_a_checkpoint_keeps_every_form(forms, form, tmp_path):
    tree = forms[2][form]
    tx = optax.identity()
    state = TrainingState(jnp.zeros((), jnp.int32), tree, tx.init(tree))
    with oialr.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        checkpoints.wait()
        found = checkpoints.restore(state, tx).state
    jax.tree.map(np.testing.assert_array_equal, found, state)
