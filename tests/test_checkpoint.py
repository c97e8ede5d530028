"""Checkpoints: whole or not there, on any mesh, and never silently wrong."""

import functools
import gc
import json
import math
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax import struct
from flax.training.train_state import TrainState

import oialr_jax as oialr
from oialr_jax import checkpoint
from oialr_jax.lowrank import Axes, factor
from oialr_jax.transform import pending_ranks

# Of several arrays that cannot be read Orbax reports the first; asyncio grumbles about
# the others when they are collected, which must not be in the middle of another test.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True, scope="module")
def collected():
    yield
    gc.collect()


TX = oialr.freeze_bases(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)))
SCHEDULE = oialr.Schedule(delay=3, every=4, layer_step=1.0, lag=2)
RULE = oialr.RankRule(cutoff=0.4)


class State(TrainState):
    key: jax.Array
    ema: dict = struct.field(default_factory=dict)


def fn(params, x):
    x = jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"].reshape(1, -1))
    return x @ params["b"]["kernel"]


def create(width=16):
    params = {
        "a": {"kernel": normal(0, 16, width), "bias": jnp.zeros(width)},
        "b": {"kernel": normal(1, width, 8)},
    }
    state = State.create(apply_fn=fn, params=params, tx=TX, key=jax.random.key(3))
    return state.replace(step=jnp.zeros((), jnp.int32))


def batch(t):
    return normal(100 + t, 32, 16)


@functools.cache
def matrices():
    params = jax.eval_shape(create).params
    return oialr.find_matrices(fn, params, batch(0))


def stepper(layout=None):
    forward = oialr.factored(fn)

    def train_step(state, x):
        key, noise = jax.random.split(state.key)

        def loss(params):
            y = x[:, :8] + 0.01 * jax.random.normal(noise, (len(x), 8))
            return jnp.mean((forward(params, x) - y) ** 2)

        value, grads = oialr.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads).replace(key=key), {"loss": value}

    return oialr.adaptive(train_step, TX, matrices(), SCHEDULE, RULE, layout=layout)


def advance(state, step, end):
    while int(state.step) < end:
        state, _ = step(state, batch(int(state.step)))
    return state


def values(state):
    return [
        np.asarray(jax.random.key_data(x) if checkpoint._is_key(x) else x)
        for x in jax.tree.leaves(state)
    ]


def assert_same(a, b):
    assert jax.tree.structure(a.params) == jax.tree.structure(b.params)
    for x, y in zip(values(a), values(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def filled(folder, *steps, keep=9, **options):
    """Checkpoints of one run at these steps, and its states."""
    states = {}
    state, step = create(), stepper()
    with oialr.Checkpoints(folder, keep=keep) as saved:
        for end in steps:
            state = advance(state, step, end)
            saved.save(state, {"at": end}, **options)
            states[end] = jax.tree.map(jnp.copy, state)
    return states


def last(folder, layout=None, template=None):
    template = jax.eval_shape(create) if template is None else template
    with oialr.Checkpoints(folder) as saved:
        return saved.restore(template, TX, layout)


@pytest.mark.parametrize(
    "at",  # dense; ranks wait; low rank. The others in full
    [2, 5, 8, *(pytest.param(x, marks=pytest.mark.long) for x in (4, 6, 9, 12))],
)
def test_a_run_goes_on_bit_for_bit(at, tmp_path):
    """Dense, between choice and event, at the conversion, at and after truncations."""
    state = filled(tmp_path, at)[at]
    waiting = pending_ranks(state.params, state.opt_state)
    assert bool(waiting) == (at in (4, 5, 8, 9, 12))
    found = last(tmp_path)
    assert found.extra == {"at": at}
    assert_same(found.state, state)
    end = advance(found.state, stepper(), 16)
    assert_same(end, advance(create(), stepper(), 16))


def test_what_is_saved_may_be_donated_at_once(tmp_path):
    state, step = create(), stepper()
    state = advance(state, step, 6)
    expected = jax.tree.map(jnp.copy, state)
    with oialr.Checkpoints(tmp_path) as saved:
        saved.save(state)
        advance(state, step, 12)  # writes over the buffers while the disk is busy
    assert_same(last(tmp_path).state, expected)


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("fsdp=8", "data=2"),
        (None, "fsdp=4,model=2"),
        pytest.param("data=2", None, marks=pytest.mark.long),
        pytest.param("fsdp=8", None, marks=pytest.mark.long),
    ],
)
def test_onto_another_mesh(first, then, tmp_path):
    def layout(spec):
        return spec and oialr.sharding.Layout(
            oialr.sharding.make_mesh(spec), min_size=16
        )

    before, after = layout(first), layout(then)
    state = create() if before is None else before.initialize(create)
    state = advance(state, stepper(before), 9)
    with oialr.Checkpoints(tmp_path) as saved:
        saved.save(state)
    found = last(tmp_path, after).state
    assert_same(found, state)
    if after is not None:
        for x, where in zip(
            jax.tree.leaves(found), jax.tree.leaves(after(found)), strict=True
        ):
            assert x.sharding.is_equivalent_to(where, x.ndim)
    end = advance(found, stepper(after), 12)
    one = advance(create(), stepper(), 12)
    assert oialr.ranks(end.params) == oialr.ranks(one.params)
    for x, y in zip(values(end), values(one), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)


def test_low_rank_leaves_elsewhere_in_a_state(tmp_path):
    state = advance(create(), stepper(), 6)
    state = state.replace(ema=jax.tree.map(jnp.copy, state.params))
    with oialr.Checkpoints(tmp_path) as saved:
        saved.save(state)
    template = jax.eval_shape(create)
    template = template.replace(ema=template.params)
    assert_same(last(tmp_path, template=template).state, state)


def test_the_latest_and_the_best_are_kept(tmp_path):
    state, step = create(), stepper()
    accuracies = {1: 0.2, 2: 0.9, 3: 0.5, 4: None, 5: 0.6}
    for end, metric in accuracies.items():  # every one by a process of its own
        state = advance(state, step, end)
        with oialr.Checkpoints(tmp_path, keep=2, best="max") as saved:
            saved.save(state, metric=metric)
    with oialr.Checkpoints(tmp_path, keep=2, best="max") as saved:
        assert saved.steps == (2, 4, 5)
    assert last(tmp_path).state.step == 5


@pytest.mark.parametrize(
    "metric",
    [
        2,
        2.0,
        np.float32(2),
        np.array(2),
        jnp.bfloat16(2),
        jnp.ones((), jnp.int8) * 2,
        jnp.float32(2),
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}",
)
def test_a_metric_is_a_scalar_of_any_kind(metric, tmp_path):
    with oialr.Checkpoints(tmp_path, best="max") as saved:
        saved.save(small({}), metric=metric)
        assert saved._contents(0)["metric"] == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, jnp.float32(math.nan)])
@pytest.mark.parametrize("best", ["max", "min"])
def test_a_metric_that_is_not_finite_is_saved_and_not_the_best(bad, best, tmp_path):
    metrics, state = {1: bad, 2: 0.5, 3: bad, 4: bad, 5: bad}, small({})
    for step, metric in metrics.items():  # every one by a process of its own
        with oialr.Checkpoints(tmp_path, keep=2, best=best) as saved:
            saved.save(state.replace(step=jnp.asarray(step)), metric=metric)
            assert step in saved.steps
    with oialr.Checkpoints(tmp_path, keep=2, best=best) as saved:
        assert saved.steps == (2, 4, 5)
        assert saved.restore(state, TX).state.step == 5


@pytest.mark.parametrize(
    "metric", ["good", np.ones(1), jnp.ones((2, 2)), [1.0], 1j, {}, jax.random.key(0)]
)
def test_a_metric_of_another_kind(metric, tmp_path):
    with oialr.Checkpoints(tmp_path) as saved:
        with pytest.raises(
            TypeError, match=r"`metric` must be one real number, .* got"
        ):
            saved.save(small({}), metric=metric)
        assert list(tmp_path.iterdir()) == []


def test_nothing_to_restore(tmp_path):
    assert last(tmp_path / "new") is None


def test_a_save_that_never_finished_is_named_and_not_used(tmp_path):
    states = filled(tmp_path, 2, 6)
    (tmp_path / "6").rename(tmp_path / "6.orbax-checkpoint-tmp")
    with pytest.warns(
        UserWarning, match="6.orbax-checkpoint-tmp was never finished and is"
    ):
        found = last(tmp_path)
    assert_same(found.state, states[2])
    assert not (tmp_path / "6.orbax-checkpoint-tmp").exists()


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes())),
}


def flipped(data):
    """One bit in the middle, and one near the end, are others."""
    data = bytearray(data)
    for i in {len(data) // 2, len(data) - 3}:
        data[i] ^= 4
    return bytes(data)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder of two checkpoints, and the states in them."""
    folder = tmp_path_factory.mktemp("sound")
    return folder, filled(folder, 4, 9)


def kinds(folder):
    """The files of a checkpoint, one of each kind; those of array data all."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            kind = re.sub(r"[0-9a-f]{32}", "HASH", name)
            if "/d/" in name:
                kind = name
            found.setdefault(kind, path.relative_to(folder))
    return list(found.values())


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(x, marks=pytest.mark.long if i else ())
        for i, x in enumerate(DAMAGES)
    ],
)
@pytest.mark.filterwarnings("ignore:the checkpoint .* is set aside:UserWarning")
def test_a_damaged_checkpoint_is_never_used(damage, tmp_path, sound):
    """Each file in turn: the state is that of the last step, or of the one before."""
    folder, states = sound
    files = kinds(folder / "9")
    assert len(files) > 6
    used = []
    for i, name in enumerate(files):
        copy = tmp_path / str(i)
        shutil.copytree(folder, copy)
        DAMAGES[damage](copy / "9" / name)
        found = last(copy)
        used.append(int(found.state.step))
        assert_same(found.state, states[used[-1]])
        assert found.extra == {"at": used[-1]}
        assert (copy / "9.damaged").exists() == (used[-1] == 4)
        with oialr.Checkpoints(copy) as saved:  # the step can be saved again
            if used[-1] == 4:
                saved.save(advance(found.state, stepper(), 9), {"at": 9})
        assert_same(last(copy).state, states[9])
    assert 4 in used


def test_a_changed_number_in_the_contents_is_noticed(tmp_path):
    """It would still be read, as the settings of another run."""
    filled(tmp_path, 2, 6)
    changed = 0
    for path in (tmp_path / "6" / "contents").rglob("*"):
        if path.is_file() and r"\"at\": 6" in path.read_text():
            path.write_text(path.read_text().replace(r"\"at\": 6", r"\"at\": 7"))
            changed += 1
    assert changed == 1
    with pytest.warns(UserWarning, match="contents does not have its checksum"):
        assert last(tmp_path).extra == {"at": 2}


def test_damage_is_named(tmp_path):
    filled(tmp_path, 2, 6)
    folder = tmp_path / "6" / "contents"
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="the checkpoint .*/6: .* aside as 6.damaged"):
        assert last(tmp_path).state.step == 2


def test_no_whole_checkpoint_is_an_error(tmp_path):
    filled(tmp_path, 2)
    shutil.rmtree(tmp_path / "2" / "arrays")
    with (
        pytest.warns(UserWarning, match="is set aside"),
        pytest.raises(ValueError, match=r"no checkpoint is whole: .*/2: "),
    ):
        last(tmp_path)


def test_arrays_that_changed_and_can_be_read_are_noticed(tmp_path, monkeypatch):
    """Should the files have no checksums of their own."""
    filled(tmp_path, 2, 6)
    real, calls = checkpoint._sums, []

    def other(arrays):
        sums = real(arrays)
        calls.append(len(sums))
        return [sums[0] ^ 1, *sums[1:]] if len(calls) == 1 else sums

    monkeypatch.setattr(checkpoint, "_sums", other)
    with pytest.warns(UserWarning, match="6: .* does not have its checksum"):
        found = last(tmp_path)
    assert found.state.step == 2


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "int8", "uint32", "bool", "complex64"]
)
def test_checksums_notice_every_single_change(dtype):
    x = jnp.asarray(np.arange(24).reshape(2, 3, 4) % 5, dtype)
    sums = {int(checkpoint._checksum(x))}
    for i in np.ndindex(x.shape):
        other = x.at[i].set(~x[i] if dtype == "bool" else x[i] + 1)
        sums.add(int(checkpoint._checksum(other)))
    assert len(sums) == 25
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh("data=2"))
    divided = jax.device_put(x, layout.batch)
    assert int(jax.jit(checkpoint._checksum)(divided)) in sums
    assert int(checkpoint._checksum(divided)) == int(checkpoint._checksum(x))


def test_a_model_of_another_shape(tmp_path):
    filled(tmp_path, 2)
    template = jax.eval_shape(lambda: create(width=12))
    message = r"kernel is float32.16, 12. in the program and float32.16, 16. in"
    with pytest.raises(ValueError, match=message):
        last(tmp_path, template=template)
    assert last(tmp_path).state.step == 2  # nothing is lost


def test_a_model_of_another_precision(tmp_path):
    filled(tmp_path, 2)

    def cast(x):
        return x.astype(jnp.bfloat16) if x.shape == (16, 16) else x

    template = jax.eval_shape(create)
    template = template.replace(
        params=jax.eval_shape(lambda p: jax.tree.map(cast, p), template.params)
    )
    message = r"kernel is bfloat16.16, 16. in the program and float32.16, 16. in"
    with pytest.raises(ValueError, match=message):
        last(tmp_path, template=template)


def cast(params, dtype):
    return jax.eval_shape(lambda p: jax.tree.map(lambda x: x.astype(dtype), p), params)


def test_a_low_rank_leaf_of_another_precision(tmp_path):
    """Every one is named, and nothing becomes float32 without a word."""
    filled(tmp_path, 6)
    template = jax.eval_shape(create)
    dense = template.replace(params=cast(template.params, jnp.bfloat16))
    with pytest.raises(ValueError, match="does not fit") as error:
        last(tmp_path, template=dense)
    for leaf in ("a/kernel", "b/kernel"):
        assert f"params/{leaf} is bfloat16 in the program and float32 in the" in str(
            error.value
        )
    assert "params/a/bias is bfloat16(16,) in the program" in str(error.value)
    low = last(tmp_path).state
    node = low.params["a"]["kernel"]
    narrow = oialr.LowRank(
        *cast((node.u, node.s, node.vt), jnp.float16), axes=node.axes
    )
    low = low.replace(params=low.params | {"a": low.params["a"] | {"kernel": narrow}})
    with pytest.raises(ValueError, match=r"kernel/u is float16 .* float32 .*kernel/vt"):
        last(tmp_path, template=low)


def test_bases_narrower_than_their_core_fit_a_dense_program(tmp_path):
    axes = Axes((6, 4), (), (0,), (1,))
    node = factor(normal(0, 6, 4), axes, 2)
    u, vt = node.u.astype(jnp.bfloat16), node.vt.astype(jnp.bfloat16)
    state = small({"w": oialr.LowRank(u, node.s, vt, axes)})
    with oialr.Checkpoints(tmp_path) as saved:
        saved.save(state)
        found = saved.restore(small({"w": normal(0, 6, 4)}), TX).state
    assert found.params["w"].u.dtype == jnp.bfloat16
    assert_same(found, state)


@pytest.mark.parametrize(
    "other",
    [
        lambda: jax.random.key_data(jax.random.key(3)),
        lambda: jax.random.key(3, impl="rbg"),
        lambda: jax.random.key(3, impl="unsafe_rbg"),
    ],
    ids=["uint32", "rbg", "unsafe_rbg"],
)
def test_a_key_of_another_kind(other, tmp_path):
    saves = jax.random.key(3, impl="rbg") if "rbg" in str(other().dtype) else None
    state = small({"w": normal(0, 6, 4)}, saves)
    changed = jax.random.key(3) if other().dtype == state.key.dtype else other()
    with oialr.Checkpoints(tmp_path) as saved:
        saved.save(state)
        with pytest.raises(ValueError, match=r"key is .* in the program and key<"):
            saved.restore(state.replace(key=changed), TX)


def small(params, key=None):
    key = jax.random.key(3) if key is None else key
    state = State.create(apply_fn=fn, params=params, tx=TX, key=key)
    return state.replace(step=jnp.zeros((), jnp.int32))


LOW = factor(normal(0, 6, 4), Axes((6, 4), (), (0,), (1,)), 2)
COLLISIONS = {
    "slash": ({"a/b": jnp.ones(2), "a": {"b": jnp.zeros(2)}}, "['a/b']", "['a']['b']"),
    "list": ({"a/0": jnp.ones(2), "a": [jnp.zeros(2)]}, "['a/0']", "['a'][0]"),
    "attribute": ({"a/u": jnp.ones(2), "a": LOW}, "['a/u']", "['a'].u"),
    "node": ({"a/b": LOW, "a": {"b": jnp.zeros(2)}}, "['a/b']", "['a']['b']"),
    "empty": ({"a/": jnp.ones(2), "a": {"": jnp.zeros(2)}}, "['a/']", "['a']['']"),
}


@pytest.mark.parametrize("case", COLLISIONS)
def test_names_that_collide_are_refused(case, tmp_path):
    params, *paths = COLLISIONS[case]
    with oialr.Checkpoints(tmp_path) as saved:
        with pytest.raises(ValueError, match="rename one of them") as error:
            saved.save(State(0, fn, params, TX, (), jax.random.key(0)))
        assert all(f".params{path}" in str(error.value) for path in paths)
        assert list(tmp_path.iterdir()) == []
        saved.save(small({"x": jnp.ones(2)}))
        with pytest.raises(ValueError, match="rename one of them"):
            saved.restore(State(0, fn, params, TX, (), jax.random.key(0)), TX)


def test_names_of_any_kind(tmp_path):
    names = ["a/b", "", ".", "..", "ü ☃\n", "x" * 300, "%2F[0]'\"\\:*?", "a\0b", "/"]
    params = {name: jnp.full(3, i, float) for i, name in enumerate(names)}
    state = small({"odd": params, "number": {1: jnp.ones(2), 2: jnp.zeros((0, 3))}})
    with oialr.Checkpoints(tmp_path) as saved:
        saved.save(state)
    assert_same(last(tmp_path, template=state).state, state)


def test_a_low_rank_leaf_of_another_shape(tmp_path):
    filled(tmp_path, 6)
    template = jax.eval_shape(lambda: create(width=12))
    message = "params/a/kernel has shape .16, 12. in the model and .16, 16."
    with pytest.raises(ValueError, match=message):
        last(tmp_path, template=template)


def test_another_optimizer(tmp_path):
    filled(tmp_path, 2)
    template, tx = jax.eval_shape(create), oialr.freeze_bases(optax.sgd(0.1, 0.9))
    with (
        oialr.Checkpoints(tmp_path) as saved,
        pytest.raises(ValueError, match=r"opt_state/.*/mu/.* is nothing in"),
    ):
        saved.restore(template, tx)


def test_ranks_that_do_not_fit_their_arrays(tmp_path, monkeypatch):
    """A table of contents that promises other shapes than the files have."""
    filled(tmp_path, 2, 6)
    real = oialr.Checkpoints._contents

    def other(self, step):
        contents = real(self, step)
        if step == 6:
            for part, shape in (("u", [16, 5]), ("s", [5, 5]), ("vt", [5, 16])):
                contents["arrays"][f"params/a/kernel/{part}"]["shape"] = shape
        return contents

    monkeypatch.setattr(oialr.Checkpoints, "_contents", other)
    with pytest.raises(ValueError, match="does not fit") as error:
        last(tmp_path)
    assert "mu/a/kernel is float32(5, 5) in the program and" in str(error.value)


def test_a_step_twice(tmp_path):
    state = create()
    with oialr.Checkpoints(tmp_path) as saved:
        saved.save(state)
        with pytest.raises(ValueError, match="step 0 is saved already"):
            saved.save(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"keep": 0}, "`keep` must be at least 1"), ({"best": "most"}, "`best` must be")],
)
def test_settings_out_of_range(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        oialr.Checkpoints(tmp_path, **options)


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        (
            {"data": {"rng": jax.random.key(0)}},
            TypeError,
            "extra['data']['rng'] is key",
        ),
        ({"bad": [1, object()]}, TypeError, "extra['bad'][1] is <object"),
        ({"bad": {1, 2}}, TypeError, "extra['bad'] is {1, 2} of builtins.set"),
        ({"bad": b"x"}, TypeError, "extra['bad'] is b'x'"),
        ({"bad": np.array(["x"])}, TypeError, "extra['bad'] is <U1(1,)"),
        ({"a": {1: 2}}, TypeError, "extra['a'] has the key 1"),
        ({"a": [math.nan]}, ValueError, "extra['a'][0] is nan"),
        ({"a": jnp.array([1, math.inf])}, ValueError, "extra['a'][1] is inf"),
    ],
)
def test_contents_that_json_cannot_hold(extra, error, message, tmp_path):
    with oialr.Checkpoints(tmp_path) as saved:
        with pytest.raises(error, match=re.escape(message)):
            saved.save(small({}), extra)
        assert list(tmp_path.iterdir()) == []


def test_contents_of_jax_and_numpy(tmp_path):
    extra = {
        "good": json.loads("[1.5, null]"),
        "scalars": [jnp.bfloat16(1.5), np.int64(2), np.bool_(True), jnp.zeros(())],
        "arrays": {"ids": np.arange(3), "x": jnp.ones((1, 2))},
        "pair": (1, "a"),
    }
    with oialr.Checkpoints(tmp_path) as saved:
        saved.save(small({}), extra)
        assert saved.restore(small({}), TX).extra == {
            "good": [1.5, None],
            "scalars": [1.5, 2, True, 0.0],
            "arrays": {"ids": [0, 1, 2], "x": [[1.0, 1.0]]},
            "pair": [1, "a"],
        }


@pytest.mark.parametrize(
    "folder",
    ["gs://bucket/run", "s3://x", "file:///x", "HTTP://x/y", pathlib.Path("gs://x/y")],
    ids=str,
)
def test_a_folder_that_is_a_url(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="on a file system of this machine, got the U"):
        oialr.Checkpoints(folder)
    assert list(tmp_path.iterdir()) == []


def test_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder, place in (("~/x", "home/x"), ("a/b", "a/b"), (pathlib.Path("c"), "c")):
        with oialr.Checkpoints(folder) as saved:
            assert saved.folder == tmp_path / place
            saved.save(small({}))
        assert (tmp_path / place / "0").is_dir()
    (tmp_path / "file").write_text("")
    for folder in ("file", "file/x"):
        with pytest.raises(NotADirectoryError, match="/file is a file"):
            oialr.Checkpoints(folder)
