"""Exports: the same numbers without us, whole or not at all, refused when not whole."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from cases import BY_NAME
from helpers import in_low_rank

import oialr_jax as oialr
from oialr_jax.export import folder as writing
from oialr_jax.export import manifest
from oialr_jax.lowrank import Axes, factor

WORST = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2, "int8": 4e-2}
"""Largest difference over the largest output, of a network of three layers."""


class Net(nn.Module):
    """A convolution, a scanned stack, a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(12, (3, 3))(x)).reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(24)(x))
        step = nn.scan(
            lambda layer, x, _: (x + nn.relu(layer(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        x, _ = step(nn.Dense(24, name="stack"), x, None)
        return nn.Dense(10)(x)


def forward(params, x):
    return Net().apply({"params": params}, x)


def images(count=3, seed=0):
    drawn = np.random.default_rng(seed).normal(size=(count, 4, 4, 2))
    return jnp.asarray(drawn, jnp.float32)


@pytest.fixture(scope="module")
def low():
    params = Net().init(jax.random.key(0), images())["params"]
    matrices = oialr.find_matrices(forward, params, images())
    assert len(matrices) == 4
    return in_low_rank(params, matrices, 0.3)


@pytest.fixture(scope="module")
def exported(low, tmp_path_factory):
    place = tmp_path_factory.mktemp("exports") / "net"
    return oialr.export(place, forward, low, images(), form="factors")


@pytest.fixture
def copied(exported, tmp_path):
    """A copy of an export, to be damaged."""
    return pathlib.Path(shutil.copytree(exported.folder, tmp_path / "copy"))


def worst(actual, desired):
    actual, desired = (np.asarray(x, np.float64) for x in (actual, desired))
    assert actual.shape == desired.shape
    return np.max(np.abs(actual - desired)) / np.max(np.abs(desired))


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("factors", None),
        ("identity", "float32"),
        ("dense", "float16"),
        ("core", "int8"),
        pytest.param("identity", "bfloat16", marks=pytest.mark.long),
        pytest.param("core", "float16", marks=pytest.mark.long),
        pytest.param("auto", "bfloat16", marks=pytest.mark.long),
    ],
)
def test_every_form_gives_what_the_training_form_gives(low, tmp_path, form, dtype):
    found = oialr.export(
        tmp_path / "net", forward, low, images(), form=form, dtype=dtype
    )
    for count in (1, 5):  # not the batch of the example
        desired = oialr.factored(forward)(low, images(count, 1))
        assert worst(found(images(count, 1)), desired) < WORST[dtype or "float32"]
    again = oialr.factored(forward)(found.params, images())
    assert worst(found(images()), again) < 1e-5
    entries = [jnp.dtype(x.dtype).itemsize * x.size for x in found.arrays.values()]
    header = 200 * len(entries)  # 2 % of what is not as small as this
    size = (found.folder / manifest.WEIGHTS).stat().st_size
    assert size <= 1.02 * sum(entries) + header
    assert found.manifest["numbers"]["stored"] == sum(
        x.size for name, x in found.arrays.items() if not name.endswith(".order")
    )
    assert {x.name for x in found.folder.iterdir()} == {
        manifest.WEIGHTS,
        manifest.PROGRAM,
        manifest.MANIFEST,
    }


ALONE = """
import sys

class Blocked:
    names = ["oialr_jax", "flax", "optax", "orbax", "tests", "train"]
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError(f"{name} is blocked")

block = Blocked()
sys.meta_path.insert(0, block)
block.names = [*block.names, "jax"]
import numpy as np
from safetensors import safe_open
with safe_open(sys.argv[1] + "/weights.safetensors", framework="numpy") as file:
    weights = {name: file.get_tensor(name) for name in file.keys()}
block.names.remove("jax")
import jax
with open(sys.argv[1] + "/program.stablehlo", "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
assert program.platforms == ("cpu", "cuda", "tpu"), program.platforms
np.save(sys.argv[3], program.call(weights, np.load(sys.argv[2])))
for name in ("oialr_jax", "flax"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise AssertionError(f"{name} is not blocked")
"""


def test_it_runs_where_nothing_of_ours_can_be_imported(exported, low, tmp_path):
    np.save(tmp_path / "x.npy", images(4, 2))
    command = [sys.executable, "-c", ALONE, str(exported.folder)]
    command += [str(tmp_path / "x.npy"), str(tmp_path / "y.npy")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    desired = oialr.factored(forward)(low, images(4, 2))
    assert worst(np.load(tmp_path / "y.npy"), desired) < WORST["float32"]


def test_arrays_have_clear_names(exported):
    assert {name for name in exported.arrays if name.startswith("stack")} == {
        "stack/kernel.a",
        "stack/kernel.b",
        "stack/bias",
    }
    entry = next(x for x in exported.manifest["leaves"] if x["path"] == "stack/kernel")
    assert entry["form"] == "factors"
    assert entry["rank"] == exported.arrays["stack/kernel.a"].shape[-1]
    assert entry["axes"] == {"stack": [0], "inputs": [1], "outputs": [2]}
    assert entry["shape"] == [2, 24, 24]


def test_flax_loads_the_dense_file_under_its_own_names(low, tmp_path):
    found = oialr.export(tmp_path / "net", forward, low, images(), form="dense")
    flat = safetensors.numpy.load_file(found.folder / manifest.WEIGHTS)
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    desired = oialr.factored(forward)(low, images())
    assert worst(forward(params, images()), desired) < WORST["float32"]


def linear(params, x):
    return jnp.tanh(x @ params["first"]["kernel"]) @ params["last"]["kernel"]


def linear_params():
    rng = np.random.default_rng(0)
    shapes = {"first": (6, 8), "last": (8, 3)}
    return {
        name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for name, shape in shapes.items()
    }


TORCH = {
    "first/kernel": ("0.weight", (1, 0)),
    "last/kernel": ("2.weight", (1, 0)),
}


def test_dense_arrays_are_stored_as_another_library_has_them(tmp_path):
    params, x = linear_params(), jnp.ones((2, 6))
    found = oialr.export(tmp_path / "net", linear, params, x, form="dense", names=TORCH)
    assert set(found.arrays) == {"0.weight", "2.weight"}
    np.testing.assert_array_equal(found.arrays["0.weight"], params["first"]["kernel"].T)
    assert worst(found(x), linear(params, x)) < 1e-6
    assert worst(linear(found.params, x), linear(params, x)) < 1e-6


@pytest.mark.peers
def test_pytorch_loads_the_dense_file(tmp_path):
    import torch
    from safetensors.torch import load_file

    params, x = linear_params(), np.ones((2, 6), np.float32)
    found = oialr.export(tmp_path / "net", linear, params, x, form="dense", names=TORCH)
    layers = [torch.nn.Linear(6, 8, bias=False), torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 3, bias=False))
    model.load_state_dict(load_file(found.folder / manifest.WEIGHTS))
    with torch.no_grad():
        there = model(torch.from_numpy(x)).numpy()
    assert worst(there, linear(params, x)) < 1e-6


def test_inputs_and_outputs_may_be_containers(tmp_path):
    def fn(params, batch, scale):
        hidden = batch["x"] @ params["first"]["kernel"]
        return {"hidden": hidden, "rest": (hidden * batch["mask"] * scale, [None])}

    params = linear_params()
    batch = {"x": jnp.ones((2, 6)), "mask": jnp.ones((1, 2)).T}
    scale = jnp.float32(2)
    found = oialr.export(tmp_path / "net", fn, params, batch, scale)
    assert [x["path"] for x in found.manifest["inputs"]] == ["0/mask", "0/x", "1"]
    larger = {"x": jnp.ones((5, 6)), "mask": jnp.ones((5, 1))}
    out, desired = found(larger, scale), fn(params, larger, scale)
    assert jax.tree.structure(out) == jax.tree.structure(desired)
    assert worst(out["rest"][0], desired["rest"][0]) < 1e-6


def test_batch_axes_are_those_of_vmap(tmp_path):
    def fn(params, x, other):
        return params["first"]["kernel"].T @ x + other

    x, other = jnp.ones((6, 4)), jnp.ones((8, 1))
    found = oialr.export(
        tmp_path / "net", fn, linear_params(), x, other, batch_axes=(1, None)
    )
    assert [x["shape"] for x in found.manifest["inputs"]] == [[6, "b"], [8, 1]]
    assert found(jnp.ones((6, 7)), other).shape == (8, 7)


def test_a_frozen_base_is_merged_back(tmp_path):
    from oialr_jax.forms import Adapted, frozen

    low = factor(jnp.ones((6, 8)), Axes((6, 8), (), (0,), (1,)), 2)
    base = frozen(linear_params()["first"]["kernel"], "bfloat16", low.axes)
    params = linear_params() | {"first": {"kernel": Adapted(base, low)}}
    x = jnp.ones((2, 6))
    found = oialr.export(tmp_path / "net", linear, params, x)
    assert set(found.arrays) == {"first/kernel", "last/kernel"}
    assert worst(found(x), oialr.factored(linear)(params, x)) < 1e-5


def test_functions_among_the_params_are_part_of_the_program(tmp_path):
    fn, params, x = BY_NAME["equinox"].build()
    found = oialr.export(tmp_path / "net", fn, params, x)
    assert worst(found(x[:1]), fn(params, x[:1])) < 1e-5


def test_what_was_loaded_is_called_under_jit_too(exported, low):
    again = oialr.load(exported.folder)
    inside = jax.jit(lambda x: again(x) + 1)(images())
    assert worst(inside - 1, exported(images())) < 1e-5
    assert worst(again(images()), exported(images())) < 1e-6  # no tracer was kept


def test_one_array_may_be_all_params(tmp_path):
    w, x = linear_params()["first"]["kernel"], jnp.ones((2, 6))
    found = oialr.export(tmp_path / "net", lambda w, x: x @ w, w, x)
    assert worst(found(x), x @ w) < 1e-6
    np.testing.assert_array_equal(found.params, w)


@pytest.mark.parametrize(
    "leaf",
    [jax.random.key(0), np.zeros(3, np.complex64)],
    ids=["key", "complex"],
)
def test_a_leaf_that_cannot_be_stored_is_named(tmp_path, leaf):
    params = linear_params() | {"other": {"leaf": leaf}}
    with pytest.raises(TypeError, match=r"^other/leaf is .*, which safetensors"):
        oialr.export(tmp_path / "net", linear, params, jnp.ones((2, 6)))
    assert list(tmp_path.iterdir()) == []


def test_an_example_of_numpy_has_the_dtypes_that_jax_has(tmp_path):
    x = np.ones((2, 6))
    found = oialr.export(tmp_path / "net", linear, linear_params(), x)
    assert found.manifest["inputs"][0]["dtype"] == "float32"
    assert found(jnp.asarray(x)).shape == (2, 3)


def test_a_leaf_with_nan_is_named(tmp_path):
    params = linear_params()
    params["last"]["kernel"] = params["last"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="last/kernel has NaN: restore"):
        oialr.export(tmp_path / "net", linear, params, jnp.ones((2, 6)))
    assert list(tmp_path.iterdir()) == []


# What is refused


def rewritten(place, change):
    """The manifest changed as by a program that knows how to sign it."""
    content = json.loads((place / manifest.MANIFEST).read_text())
    content.pop("sha256")
    change(content)
    content["sha256"] = manifest.sum_of(manifest._canonical(content))
    (place / manifest.MANIFEST).write_text(json.dumps(content))


def arrays_changed(place, change):
    arrays = safetensors.numpy.load_file(place / manifest.WEIGHTS)
    change(arrays)
    safetensors.numpy.save_file(arrays, place / manifest.WEIGHTS)


def cut(name):
    def damage(place):
        data = (place / name).read_bytes()
        (place / name).write_bytes(data[: len(data) // 2])

    return damage


def flip(name):
    def damage(place):
        data = bytearray((place / name).read_bytes())
        data[-5] ^= 1
        (place / name).write_bytes(bytes(data))

    return damage


def of_another_version(place):
    program = b"what no JAX reads"
    (place / manifest.PROGRAM).write_bytes(program)
    entry = {"bytes": len(program), "sha256": manifest.sum_of(program)}
    rewritten(place, lambda x: x["files"].update({manifest.PROGRAM: entry}))


def other_shape(content):
    entry = next(x for x in content["leaves"] if x["form"] == "factors")
    entry["rank"] += 1


DAMAGES = {
    "weights_cut": (cut(manifest.WEIGHTS), "weights.safetensors is damaged"),
    "weights_flipped": (flip(manifest.WEIGHTS), "damaged: expected .* with checksum"),
    "program_cut": (cut(manifest.PROGRAM), r"program.stablehlo is damaged: expected"),
    "program_flipped": (flip(manifest.PROGRAM), "program.stablehlo is damaged"),
    "manifest_cut": (cut(manifest.MANIFEST), "manifest.json is damaged"),
    "manifest_edited": (
        lambda place: (place / manifest.MANIFEST).write_text(
            (place / manifest.MANIFEST).read_text().replace('"rank": 7', '"rank": 6')
        ),
        "manifest.json is damaged: its contents do not have the checksum",
    ),
    "foreign": (
        lambda place: (place / manifest.MANIFEST).write_text('{"format": "onnx"}'),
        "expected the format 'oialr_jax.export', found 'onnx'",
    ),
    "foreign_list": (
        lambda place: (place / manifest.MANIFEST).write_text("[1]"),
        "expected the format 'oialr_jax.export', found None",
    ),
    "newer": (
        lambda place: rewritten(place, lambda x: x.update(version=2)),
        "has version 2, expected 1",
    ),
    "weights_empty": (
        lambda place: (place / manifest.WEIGHTS).write_bytes(b""),
        "weights.safetensors is damaged",
    ),
    "program_of_another_version": (
        of_another_version,
        rf"expected a program that jax {re.escape(jax.__version__)} reads, found one",
    ),
    "missing_factor": (
        lambda place: arrays_changed(place, lambda x: x.pop("Dense_0/kernel.a")),
        "Dense_0/kernel.a is missing",
    ),
    "unknown_array": (
        lambda place: arrays_changed(place, lambda x: x.update(new=np.zeros(2))),
        "new is not in the manifest",
    ),
    "wrong_dtype": (
        lambda place: arrays_changed(
            place, lambda x: x.update({"Dense_0/bias": np.zeros(24, np.float16)})
        ),
        re.escape("expected Dense_0/bias as float32[24], found float16[24]"),
    ),
    "wrong_rank": (
        lambda place: rewritten(place, other_shape),
        r"is factors of rank \d+: expected .* of shape .*, found",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_refused(copied, damage):
    change, error = DAMAGES[damage]
    before = {x.name: x.read_bytes() for x in copied.iterdir()}
    change(copied)
    assert before != {x.name: x.read_bytes() for x in copied.iterdir()}
    with pytest.raises(ValueError, match=error):
        oialr.load(copied)


def test_what_is_no_export_is_refused(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no manifest\.json"):
        oialr.load(tmp_path / "nowhere")
    (copied / manifest.PROGRAM).unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no program\.stablehlo"):
        oialr.load(copied)


@pytest.mark.parametrize(
    ("inputs", "error"),
    [
        ((), "expected the inputs 0, found $"),
        ((images(), images()), "expected the inputs 0, found 0, 1"),
        (({"x": images()},), "expected the inputs 0, found 0/x"),
        ((images()[:, :3],), r"float32\[b, 4, 4, 2\].*, found float32\[3, 3, 4, 2\]"),
        ((images()[0],), r"expected float32\[b, 4, 4, 2\], found float32\[4, 4, 2\]"),
        ((np.zeros((3, 4, 4, 2)),), r"found float64\[3, 4, 4, 2\]"),
        ((images()[:0],), r"found float32\[0, 4, 4, 2\]"),
        (([[1.0]],), "expected the inputs 0, found 0/0/0"),
    ],
    ids=["none", "two", "dict", "shape", "axes", "dtype", "empty", "list"],
)
def test_inputs_of_another_kind_are_refused(exported, inputs, error):
    with pytest.raises(ValueError, match=error):
        exported(*inputs)


def test_batches_have_one_size(tmp_path):
    def fn(params, x, y):
        return x @ params["first"]["kernel"] + jnp.sum(y)

    def run(*counts):
        return [jnp.ones((count, 6)) for count in counts]

    with pytest.raises(ValueError, match="differ in their batch size: input 0 has 2"):
        oialr.export(tmp_path / "net", fn, linear_params(), *run(2, 3))
    found = oialr.export(tmp_path / "net", fn, linear_params(), *run(2, 2))
    with pytest.raises(ValueError, match=r"input 1: expected .*, b = 4, found .*5, 6"):
        found(*run(4, 5))


def of_one_batch(params, x):
    return (x @ params["first"]["kernel"]).reshape(2, 4, 2)


class Pair(tuple):
    """A container of its own class."""


jax.tree_util.register_pytree_node(
    Pair, lambda x: (list(x), None), lambda _, x: Pair(x)
)


@pytest.mark.parametrize(
    ("fn", "options", "error"),
    [
        (of_one_batch, {}, "cannot be traced with a symbolic batch size"),
        (linear, {"form": "svd"}, "`form` must be one of"),
        (linear, {"dtype": "int4"}, "`dtype` must be one of"),
        (linear, {"dtype": "int8", "form": "dense"}, "is for frozen bases"),
        (linear, {"names": {"first": "x"}}, "`names` has first; there are: first/k"),
        (linear, {"names": {"first/kernel": "last/kernel"}}, "two arrays are called"),
        (linear, {"names": {"first/kernel": ("x", (0, 0))}}, "orders the axes of"),
        (linear, {"batch_axes": (0, 0)}, "`batch_axes` has 2 entries and the example"),
        (linear, {"batch_axes": 2}, r"input 0 of shape \(2, 6\) has no batch axis 2"),
        (lambda p, x: Pair([linear(p, x)]), {}, "an output is a Pair"),
    ],
    ids=[
        "symbol",
        "form",
        "dtype",
        "int8",
        "unknown",
        "twice",
        "order",
        "axes",
        "axis",
        "container",
    ],
)
def test_what_cannot_be_exported_leaves_nothing(tmp_path, fn, options, error):
    with pytest.raises((ValueError, TypeError), match=error):
        oialr.export(tmp_path / "net", fn, linear_params(), jnp.ones((2, 6)), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_function_of_one_batch_size_is_exported_for_that(tmp_path):
    x = jnp.ones((2, 6))
    found = oialr.export(
        tmp_path / "net", of_one_batch, linear_params(), x, batch_axes=None
    )
    assert found(x).shape == (2, 4, 2)
    with pytest.raises(ValueError, match=r"expected float32\[2, 6\]"):
        found(jnp.ones((3, 6)))


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        oialr.export(tmp_path / "net", linear, linear_params(), jnp.ones((2, 6)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_kept(copied):
    before = {x.name: x.read_bytes() for x in copied.iterdir()}
    with pytest.raises(FileExistsError, match="name a new folder"):
        oialr.export(copied, linear, linear_params(), jnp.ones((2, 6)))
    assert before == {x.name: x.read_bytes() for x in copied.iterdir()}


def test_without_safetensors_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"oialr_jax\[export\]"):
        oialr.export(tmp_path / "net", linear, linear_params(), jnp.ones((2, 6)))
    with pytest.raises(ImportError, match="pip install safetensors"):
        oialr.load(tmp_path)
