"""Meshes and layouts: every way of spreading a run over devices is the same run."""

import contextlib
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax.training.train_state import TrainState
from helpers import assert_close
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import oialr_jax as oialr
from oialr_jax import decompose
from oialr_jax.lowrank import Axes, factor, named_leaves
from oialr_jax.matrices import Matrix
from oialr_jax.projection import project_to_rank
from oialr_jax.transform import with_trainable
from train.models.vit import VisionTransformer

STEPS = 30
P = PartitionSpec()
SCHEDULE = oialr.Schedule(delay=6, every=7, layer_step=1.0, lag=3, stop=21)
RULE = oialr.RankRule(cutoff=0.35, multiple=8)
WIDTH, BATCH = 64, 32
LOSS = 1e-5  # relative, over all steps: the order of float32 sums differs
RULES = ((r"in/kernel$", PartitionSpec(None, "model")),)


def fn(params, x):
    for name in ("first_in", "second", "third_in"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"].reshape(1, -1))
    return x @ params["head"]


def create(tx):
    params = {
        name: {"kernel": normal(i, WIDTH, WIDTH), "bias": jnp.zeros(WIDTH)}
        for i, name in enumerate(("first_in", "second", "third_in"))
    }
    params["head"] = normal(7, WIDTH, 4)
    state = TrainState.create(apply_fn=fn, params=params, tx=tx)
    return state.replace(step=jnp.zeros((), jnp.int32))


def batch(t):
    x = normal(100 + t, BATCH, WIDTH)
    return np.asarray(x), np.asarray(jnp.sin(3 * x[:, :4]))


@functools.cache
def parts():
    tx = oialr.freeze_bases(
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.3, momentum=0.9))
    )
    shapes = jax.eval_shape(functools.partial(create, tx))
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    matrices = oialr.select(oialr.find_matrices(fn, shapes.params, x))
    forward = oialr.factored(fn)

    def train_step(state, batch, axis_name=None):
        def loss(params, x, y):
            return jnp.mean((forward(params, x) - y) ** 2)

        grad = oialr.value_and_grad(loss, axis_name=axis_name)
        value, grads = grad(state.params, *batch)
        return state.apply_gradients(grads=grads), {"loss": value}

    return tx, matrices, train_step


def run(step, state, put):
    losses = []
    for t in range(STEPS):
        state, metrics = step(state, put(batch(t)))
        losses.append(float(metrics["loss"]))
    return state, step, np.array(losses)


def mesh_of_kinds(spec, kinds):
    """A mesh whose axes are Explicit (E), as `jax.make_mesh` makes them, or Auto."""
    mesh, of = (
        oialr.sharding.make_mesh(spec),
        {"E": AxisType.Explicit, "A": AxisType.Auto},
    )
    return Mesh(mesh.devices, mesh.axis_names, axis_types=tuple(of[k] for k in kinds))


def run_jit(spec, rules=(), kinds=None):
    tx, matrices, train_step = parts()
    mesh = (
        oialr.sharding.make_mesh(spec) if kinds is None else mesh_of_kinds(spec, kinds)
    )
    layout = oialr.sharding.Layout(mesh, rules, min_size=512)
    state = layout.initialize(functools.partial(create, tx))
    step = oialr.adaptive(train_step, tx, matrices, SCHEDULE, RULE, layout=layout)
    return run(step, state, lambda x: layout.put_batch(x, BATCH))


def run_pmap(devices):
    tx, matrices, train_step = parts()
    step = oialr.adaptive(
        functools.partial(train_step, axis_name="batch"),
        tx,
        matrices,
        SCHEDULE,
        RULE,
        jit=jax.pmap,
        axis_name="batch",
        in_axes=(None, 0),
        out_axes=None,
    )

    def put(pair):
        return tuple(x.reshape(devices, -1, x.shape[-1]) for x in pair)

    return run(step, create(tx), put)


@functools.cache
def on_one_device():
    tx, matrices, train_step = parts()
    step = oialr.adaptive(train_step, tx, matrices, SCHEDULE, RULE)
    return run(step, create(tx), lambda x: x)


@pytest.mark.parametrize(
    "start",
    [
        functools.partial(run_jit, "data=8"),
        functools.partial(run_jit, "fsdp=8"),
        functools.partial(run_jit, "data=4,model=2", RULES),
        functools.partial(run_jit, "fsdp=2,data=2,model=2", RULES),
        functools.partial(run_pmap, 8),
        functools.partial(run_jit, "data=4,model=2", RULES, "EE"),
    ],
    ids=[
        "data",
        "fsdp",
        "data-model",
        "fsdp-data-model",
        "pmap",
        "explicit",
    ],
)
def test_every_way_over_eight_devices_is_the_run_on_one(start):
    one, one_step, expected = on_one_device()
    state, step, losses = start()
    np.testing.assert_allclose(losses, expected, rtol=LOSS)
    assert expected[-1] < expected[0]
    kinds = [(x.step, x.kind) for x in step.reports]
    assert kinds == [(x.step, x.kind) for x in one_step.reports]
    assert [k for _, k in kinds].count("truncation") >= 2
    assert kinds[0] == (9, "conversion")
    assert oialr.ranks(state.params) == oialr.ranks(one.params)
    assert all(rank < WIDTH for _, _, rank in oialr.ranks(state.params).values())
    moved = jax.device_get(oialr.materialize(state.params))
    assert_close(moved, jax.device_get(oialr.materialize(one.params)), 1e-4)


@pytest.mark.parametrize(
    ("spec", "rules"),
    [("fsdp=8", ()), ("data=4,model=2", RULES)],
    ids=["fsdp", "model"],
)
def test_a_state_stays_where_the_layout_wants_it(spec, rules):
    state, _, _ = run_jit(spec, rules)
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh(spec), rules, min_size=512)
    wanted = jax.tree.leaves(layout(state))
    for array, where in zip(jax.tree.leaves(state), wanted, strict=True):
        assert array.sharding.is_equivalent_to(where, array.ndim)
    u = state.params["first_in"]["kernel"].u
    divided = PartitionSpec("fsdp", None) if spec == "fsdp=8" else PartitionSpec()
    assert u.sharding.is_equivalent_to(NamedSharding(layout.mesh, divided), 2)


@pytest.mark.parametrize(
    ("spec", "rules"),
    [("fsdp=8", ()), ("data=4,model=2", RULES)],
    ids=["fsdp", "model"],
)
def test_an_event_leaves_every_leaf_in_its_place(spec, rules):
    """No step has come since to put it there."""
    tx, matrices, _ = parts()
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh(spec), rules, min_size=512)
    state = layout.initialize(functools.partial(create, tx))
    pair, options = (state.params, state.opt_state), {"tx": tx, "layout": layout}
    for verb, what in ((oialr.factorize, matrices), (oialr.truncate, RULE)):
        *pair, _ = verb(*pair, what, **options)
        now = state.replace(params=pair[0], opt_state=pair[1])
        wanted = jax.tree.leaves(layout(now))
        for array, where in zip(jax.tree.leaves(now), wanted, strict=True):
            assert array.sharding.is_equivalent_to(where, array.ndim)


def test_no_event_gathers_the_bases_of_a_divided_matrix(monkeypatch):
    """What cores give is the largest array that any device holds whole."""
    seen = []
    real = decompose._returned

    def watched(batch, where):
        out = real(batch, where=where)
        seen.extend((x.shape, x.sharding.shard_shape(x.shape)) for x in out)
        return out

    monkeypatch.setattr(decompose, "_returned", watched)
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh("fsdp=8"), min_size=512)
    params = {"w": normal(0, 256, 64), "v": normal(1, 64, 64)}
    axes = Axes((256, 64), (), (0,), (1,))
    tx = oialr.freeze_bases(optax.sgd(0.1))
    params = jax.device_put(params, layout(params))
    matrices = oialr.find_matrices(
        lambda p, x: x @ p["w"] @ p["v"], params, jnp.ones((2, 256))
    )
    params, opt_state, _ = oialr.factorize(
        params, tx.init(params), matrices, tx=tx, layout=layout
    )
    assert ((8, 256, 64), (8, 32, 64)) in seen  # the left vectors of w, in eighths
    assert params["w"].axes == axes
    assert params["w"].u.sharding.shard_shape((256, 64)) == (32, 64)
    seen.clear()
    params, _, _ = oialr.truncate(
        params, opt_state, {"w": 16, "v": 16}, tx=tx, layout=layout
    )
    assert seen
    assert all(max(shape[1:]) <= 64 for shape, _ in seen)  # cores alone
    assert params["w"].u.sharding.shard_shape((256, 16)) == (32, 16)


@pytest.mark.parametrize("counts", [[1], [3, 1, 1], [8, 2, 5], [17, 9, 1]], ids=str)
def test_decompositions_are_divided_by_cost(counts):
    costs = [1000 // (i + 1) for i in range(len(counts))]
    load = [0] * 8
    for count, cost in zip(counts, costs, strict=True):
        share = decompose._share(count, cost, load)
        assert share.first + share.used <= 8
        assert share.each * share.used >= count > share.each * (share.used - 1)
        assert share.each == math.ceil(count / 8)
    best = max(sum(n * c for n, c in zip(counts, costs, strict=True)) / 8, max(costs))
    assert max(load) <= 2 * best


def vit():
    model = VisionTransformer(
        patch=8, depth=6, heads=6, width=768, classes=10, qkv_bias=False
    )
    image = jax.ShapeDtypeStruct((64, 32, 32, 3), jnp.float32)

    def forward(params, x):
        return model.apply({"params": params}, x)

    key = jax.random.key(0)
    shapes = jax.eval_shape(
        lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)))["params"], key
    )
    matrices = oialr.select(oialr.find_matrices(forward, shapes, image))
    return forward, shapes, matrices, image


def in_ranks(shapes, matrices, fraction):
    """Shapes of the params with every matrix at a fraction of its full rank."""
    ranks = {x.path: max(1, int(fraction * min(x.m, x.n))) for x in matrices}
    axes = {x.path: x.axes for x in matrices}

    def convert(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in ranks:
            return leaf
        return jax.eval_shape(
            lambda: oialr.LowRank(
                jnp.zeros((axes[name].m, ranks[name])),
                jnp.zeros((ranks[name], ranks[name])),
                jnp.zeros((ranks[name], axes[name].n)),
                axes[name],
            )
        )

    return jax.tree_util.tree_map_with_path(convert, shapes)


DTYPES = {"f32": 4, "s32": 4, "pred": 1, "u32": 4}


def reduced_bytes(hlo):
    """Bytes of the results of all all-reduces in a compiled program."""
    total = 0
    for line in hlo.splitlines():
        match = re.search(r"= (\(?.*?\)?) all-reduce(-start)?\(", line)
        if match:
            for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                total += DTYPES[dtype] * math.prod(
                    map(int, filter(None, sizes.split(",")))
                )
    return total


def test_what_is_averaged_over_devices_falls_with_the_square_of_the_rank():
    forward, shapes, matrices, image = vit()
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh("data=8"))
    factored = oialr.factored(forward)
    tx = oialr.freeze_bases(optax.adamw(1e-3))

    def train_step(params, opt_state, x):
        def loss(params):
            return jnp.mean(factored(params, x) ** 2)

        _, grads = oialr.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return with_trainable(
            params,
            jax.tree.map(
                jnp.add,
                oialr.transform.trainable(params),
                oialr.transform.trainable(updates),
            ),
        ), opt_state

    def compiled(params):
        def placed(tree):
            return jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                tree,
                layout(tree),
            )

        opt_state = jax.eval_shape(tx.init, params)
        x = jax.ShapeDtypeStruct(image.shape, image.dtype, sharding=layout.batch)
        lowered = jax.jit(train_step).lower(placed(params), placed(opt_state), x)
        return reduced_bytes(lowered.compile().as_text())

    dense = compiled(shapes)
    weights = oialr.counts(shapes).dense
    assert dense >= 4 * weights  # every gradient: the measure sees what it should
    low = compiled(in_ranks(shapes, matrices, 1 / 8))
    print(f"all-reduced bytes: dense {dense}, rank 1/8 {low}, {low / dense:.2%}")
    assert low <= 0.05 * dense


@pytest.mark.parametrize("fraction", [None, 1, 1 / 8], ids=["dense", "full", "eighth"])
def test_under_fsdp_a_device_holds_an_eighth(fraction):
    _, shapes, matrices, _ = vit()
    params = shapes if fraction is None else in_ranks(shapes, matrices, fraction)
    tx = oialr.freeze_bases(optax.adamw(1e-3))
    opt_state = jax.eval_shape(tx.init, params)
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh("fsdp=8"))
    whole = part = 0
    for tree, places in (
        (params, layout(params)),
        (opt_state, layout.of_optimizer(params, opt_state)),
    ):
        for x, where in zip(
            jax.tree.leaves(tree), jax.tree.leaves(places), strict=True
        ):
            whole += math.prod(x.shape)
            part += math.prod(where.shard_shape(x.shape))
    print(f"a device of 8 holds {part / whole:.3f} of params and optimizer state")
    assert part <= 0.2 * whole


def test_a_model_starts_without_being_whole_on_any_device():
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh("fsdp=8"))
    before = {id(x) for x in jax.live_arrays()}

    def create(key):
        return {"w": jax.random.normal(key, (1024, 512)), "b": jnp.zeros(512)}

    params = layout.initialize(create, jax.random.key(0))
    held = [
        shard.data.nbytes
        for x in jax.live_arrays()
        if id(x) not in before and x.size > 1
        for shard in x.addressable_shards
    ]
    assert max(held) == 1024 * 512 * 4 // 8
    whole = create(jax.random.key(0))
    np.testing.assert_array_equal(params["w"], whole["w"])


def test_the_optimizer_state_lies_like_its_params():
    layout = oialr.sharding.Layout(
        oialr.sharding.make_mesh("data=4,model=2"),
        (("w$", PartitionSpec(None, "model")),),
    )
    axes = Axes((16, 8), (), (0,), (1,))
    params = {"w": normal(0, 16, 8), "v": factor(normal(1, 16, 8), axes, 4)}
    tx = oialr.freeze_bases(
        optax.chain(optax.adamw(1e-3), optax.add_noise(0.1, 0.1, 0))
    )
    places = layout.of_optimizer(params, tx.init(params))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): where.spec
        for path, where in jax.tree_util.tree_leaves_with_path(places)
    }
    moments = {k: x for k, x in found.items() if "/mu/" in k or "/nu/" in k}
    assert len(moments) == 4
    for name, spec in found.items():
        wanted = (
            PartitionSpec(None, "model") if name.endswith("/w") else PartitionSpec()
        )
        assert spec == wanted, name


def test_a_rule_about_dense_axes_places_the_bases():
    mesh = oialr.sharding.make_mesh("fsdp=4,model=2")
    rules = (("w", PartitionSpec(None, ("fsdp",), None, "model")),)
    axes = Axes((3, 8, 16, 32), (0,), (1, 2), (3,))
    node = factor(normal(0, 3, 8, 16, 32), axes, 8)
    where = oialr.sharding.Layout(mesh, rules)({"w": node})["w"]
    assert where.u.spec == PartitionSpec(None, ("fsdp",), None)
    assert where.vt.spec == PartitionSpec(None, None, ("model",))
    assert where.s.spec == PartitionSpec()
    assert where.u.shard_shape(node.u.shape) == (3, 32, 8)
    # the same rows of the matrix view as those of the dense array, divided alike
    dense = jax.device_put(
        node.materialize(), NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    )
    u = jax.device_put(node.u, where.u)
    for a, b in zip(dense.addressable_shards, u.addressable_shards, strict=True):
        start = a.index[1].start or 0
        assert (b.index[1].start or 0) == start * 16


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("data=8", {"data": 8}),
        ("data=4, model=2", {"data": 4, "model": 2}),
        ("data=-1,model=4", {"data": 2, "model": 4}),
        ("fsdp=2", {"fsdp": 2}),
    ],
)
def test_meshes(spec, sizes):
    assert dict(oialr.sharding.make_mesh(spec).shape) == sizes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "'' is no axis"),
        ("data", "'data' is no axis"),
        ("data=two", "'data=two' is no axis"),
        ("data=4,data=2", "has the axis data twice"),
        ("data=0", "size of data must be at least 1"),
        ("data=-1,model=-1", "more than one -1"),
        ("data=16", "does not fit 8 devices"),
        ("data=-1,model=3", "does not fit 8 devices"),
    ],
)
def test_a_mesh_that_cannot_be(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        oialr.sharding.make_mesh(spec)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            (("x", PartitionSpec()),),
            "the rule 'x' is the first to match no leaf",
        ),
        (
            ((".", PartitionSpec()), ("w", PartitionSpec())),
            "the rule 'w' is the first to match no leaf",
        ),
        ((("w", PartitionSpec("model")),), "names 'model', which the mesh {'data': 8}"),
        ((("w", PartitionSpec("data")),), "does not divide a/w of shape (12, 8)"),
        (
            (("w", PartitionSpec(None, None, "data")),),
            "has more entries than a/w of shape (12, 8)",
        ),
    ],
)
def test_rules_that_do_not_fit(rules, message):
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh("data=8"), rules)
    with pytest.raises(ValueError, match=re.escape(message)):
        layout({"a": {"w": jnp.zeros((12, 8))}})


def test_a_batch_that_cannot_be_divided():
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh("data=4,fsdp=2"))
    assert layout.shards == 8
    assert layout.rows(16) == slice(0, 16)
    with pytest.raises(ValueError, match="a batch of 12 cannot be divided over 8"):
        layout.rows(12)


def test_every_leaf_has_a_place():
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh("fsdp=8"), min_size=64)
    axes = Axes((16, 8), (), (0,), (1,))
    params = {
        "w": normal(0, 16, 8),
        "odd": normal(1, 15, 9),
        "small": jnp.zeros(8),
        "low": factor(normal(2, 16, 8), axes, 8),
        "cut": factor(normal(2, 16, 8), axes, 3),
    }
    found = {
        k: x.spec for k, x in named_leaves(layout(params)).items() if k[0] in "wos"
    }
    assert found == {
        "w": PartitionSpec("fsdp", None),
        "odd": PartitionSpec(),
        "small": PartitionSpec(),
    }
    where = layout(params)
    assert where["low"].u.spec == PartitionSpec("fsdp", None)
    assert where["low"].s.spec == PartitionSpec("fsdp", None)
    assert where["low"].vt.spec == PartitionSpec("fsdp", None)
    assert where["cut"].s.spec == PartitionSpec()


@pytest.mark.parametrize(("kinds", "set_mesh"), [("EE", False), ("AE", True)])
def test_events_on_explicit_axes_are_those_on_auto_ones(kinds, set_mesh, tmp_path):
    """Each alone, without a layout: the same numbers, on the mesh of the params."""
    mesh = mesh_of_kinds("data=4,model=2", kinds)
    axes = Axes((16, 24), (), (0,), (1,))
    matrices = [Matrix("w", axes, 8, "dot")]
    tx, rule = oialr.freeze_bases(optax.adam(1e-2)), oialr.RankRule(cutoff=0.4)

    def events(params):
        state = TrainState.create(apply_fn=None, params=params, tx=tx)
        state = state.replace(step=jnp.zeros((), jnp.int32))
        low, opt_state, _ = oialr.factorize(
            params, state.opt_state, matrices, tx=tx, rank=12
        )
        cut, opt_state, _ = oialr.truncate(low, opt_state, rule, tx=tx)
        with oialr.Checkpoints(tmp_path / str(len(list(tmp_path.iterdir())))) as saved:
            saved.save(state.replace(params=cut, opt_state=opt_state))
            found = saved.restore(state, tx, oialr.sharding.Layout(mesh)).state
        assert_close(found.params, cut, 0)
        dense, _ = oialr.densify(cut, opt_state, tx=tx)
        return {
            "projected": project_to_rank(params, rule, matrices),
            "cut": oialr.materialize(cut),
            "dense": dense,
            "moments": opt_state.inner_state[0].nu,
        }, cut

    params = {"w": normal(0, 16, 24), "b": normal(1, 24)}
    expected, _ = events(params)
    where = {
        "w": NamedSharding(mesh, PartitionSpec(None, "model")),
        "b": NamedSharding(mesh, PartitionSpec()),
    }
    params = jax.device_put(params, where)
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        found, cut = events(params)
    assert_close(found, expected, 1e-5)
    for x in jax.tree.leaves((found, cut)):
        assert x.sharding.mesh == mesh
    assert found["projected"]["w"].sharding.spec == where["w"].spec


@pytest.mark.parametrize("kinds", ["EE", "EA", "AE", "AA"])
def test_constrained_and_initialized_on_axes_of_every_kind(kinds):
    mesh = mesh_of_kinds("data=4,model=2", kinds)
    layout = oialr.sharding.Layout(
        mesh, (("w", PartitionSpec("data", "model")), (".", P))
    )
    tree = {"w": normal(0, 8, 6), "b": jnp.ones(3), "key": jax.random.key(0)}
    places = layout(tree)
    made = layout.initialize(lambda x: {**tree, "w": x["w"] + 1}, tree)
    with jax.set_mesh(mesh):  # without it JAX asks for it
        compiled = jax.jit(layout.constrain)(tree)
    for new in (layout.constrain(tree), compiled, made):
        for x, place in zip(jax.tree.leaves(new), jax.tree.leaves(places), strict=True):
            assert x.sharding.is_equivalent_to(place, x.ndim)
    np.testing.assert_array_equal(made["w"], tree["w"] + 1)


def test_an_explicit_axis_of_large_leaves_is_refused():
    mesh = mesh_of_kinds("fsdp=8", "E")
    with pytest.raises(ValueError, match=r"'fsdp' of .* make the mesh by oialr_jax"):
        oialr.sharding.Layout(mesh)
    params = {"w": jax.device_put(normal(0, 16, 8), NamedSharding(mesh, P))}
    matrices = [Matrix("w", Axes((16, 8), (), (0,), (1,)), 8, "dot")]
    tx = oialr.freeze_bases(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"'fsdp' of .* AxisType.Auto for this"):
        oialr.factorize(params, tx.init(params), matrices, tx=tx)


@pytest.mark.parametrize("wrap", ["jit", "shard_map", "vmap"])
def test_events_inside_of_a_program_are_refused(wrap):
    mesh = oialr.sharding.make_mesh("data=8")
    matrices = [Matrix("w", Axes((16, 8), (), (0,), (1,)), 8, "dot")]
    tx = oialr.freeze_bases(optax.sgd(0.1))

    def inside(w):
        params = {"w": w}
        return oialr.factorize(params, tx.init(params), matrices, tx=tx)[0]["w"].u

    w = normal(0, 16, 8)
    if wrap == "jit":
        outside = jax.jit(inside)
    elif wrap == "vmap":
        outside, w = jax.vmap(inside), w[None]
    else:
        outside = jax.shard_map(inside, mesh=mesh, in_specs=P, out_specs=P)
    with pytest.raises(TypeError, match=r"on the host, .* outside of jax.jit"):
        outside(w)
