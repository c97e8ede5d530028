"""Models: weight counts of the papers, shapes, dtypes, and no trace of low rank."""

import ast
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.models.lenet5 import LeNet5
from train.models.mlp import MLP
from train.models.resnet import ResNet
from train.models.vit import VisionTransformer, gelu

VIT_B16 = VisionTransformer(patch=16, depth=12, heads=12, width=768, classes=1000)
MINI_VIT = VisionTransformer(
    patch=8, depth=6, heads=6, width=768, classes=10, qkv_bias=False
)
RESNET18 = ResNet(widths=(64, 128, 256, 512), blocks=(2, 2, 2, 2), classes=10)
SMALL = {"patch": 2, "depth": 2, "heads": 4, "width": 32, "classes": 10}


def shapes(model, *image):
    x = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)["params"]


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("model", "image", "weights"),
    [
        (VIT_B16, (224, 224, 3), 86_567_656),
        (MINI_VIT, (32, 32, 3), 42_684_682),
        (LeNet5(), (28, 28, 1), 431_080),
        (RESNET18, (32, 32, 3), 11_173_962),
        (MLP(hidden=(300, 100), classes=10), (28, 28, 1), 266_610),
    ],
    ids=["vit-b16", "mini-vit", "lenet5", "resnet18", "mlp"],
)
def test_weight_counts_are_those_of_the_papers(model, image, weights):
    assert size(shapes(model, *image)) == weights


def test_lenet5_has_430500_weights_without_biases():
    kernels = [x for x in jax.tree.leaves(shapes(LeNet5(), 28, 28, 1)) if x.ndim > 1]
    assert size(kernels) == 430_500


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    ("build", "image"),
    [
        (lambda dtype: VisionTransformer(**SMALL, dtype=dtype), (8, 8, 1)),
        (lambda dtype: LeNet5(dtype=dtype), (28, 28, 1)),
        (lambda dtype: ResNet((8, 16), (1, 2), classes=10, dtype=dtype), (8, 8, 3)),
        (lambda dtype: MLP((16, 8), classes=10, dtype=dtype), (4, 4)),
    ],
    ids=["vit", "lenet5", "resnet", "mlp"],
)
def test_logits_are_finite_float32_of_the_right_shape(build, image, dtype):
    model, x = build(dtype), jax.random.normal(jax.random.key(1), (3, *image))
    variables = model.init(jax.random.key(0), x)
    logits = jax.jit(model.apply)(variables, x)
    assert logits.shape == (3, 10)
    assert logits.dtype == jnp.float32
    assert bool(jnp.all(jnp.isfinite(logits)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_resnet_normalises_by_the_batch_in_training_and_halves_by_stage():
    model = ResNet((8, 16), (1, 2), classes=10)
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    variables = model.init(jax.random.key(0), x)
    logits, changed = model.apply(variables, x, train=True, mutable=["batch_stats"])
    assert np.any(np.abs(logits - model.apply(variables, x)) > 1e-3)
    old, new = variables["batch_stats"], changed["batch_stats"]
    assert all(map(np.any, jax.tree.leaves(jax.tree.map(jnp.subtract, new, old))))
    shapes = jax.eval_shape(
        lambda v, x: model.apply(v, x, capture_intermediates=True, mutable=True)[1],
        variables,
        x,
    )["intermediates"]
    found = {k: v["__call__"][0].shape[1:] for k, v in shapes.items() if "stage" in k}
    assert found == {
        "stage0_block0": (8, 8, 8),
        "stage1_block0": (4, 4, 16),
        "stage1_block1": (4, 4, 16),
    }
    assert "shortcut" not in variables["params"]["stage0_block0"]


def test_gelu_is_exact_and_so_is_its_derivative():
    x = np.linspace(-6, 6, 101)
    phi = 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))
    slope = phi + x * np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)
    y, pullback = jax.vjp(gelu, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, x * phi, atol=2e-6)
    np.testing.assert_allclose(pullback(jnp.ones_like(y))[0], slope, atol=2e-6)
    assert len(jax.tree.leaves(pullback)) == 1  # the derivative is all that is kept


def test_vit_equals_a_slow_float64_transformer():
    model = VisionTransformer(**SMALL)
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    params = model.init(jax.random.key(0), x)["params"]
    # Kernels from normal(0.02) leave attention uniform: larger ones test the softmax.
    params = jax.tree.map(lambda leaf: 8 * leaf, params)
    expected = reference_vit(jax.tree.map(np.float64, params), np.float64(x))
    found = model.apply({"params": params}, x)
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


def reference_vit(params, images):
    patches = images.reshape(2, 4, 2, 4, 2, 1).transpose(0, 1, 3, 2, 4, 5)
    kernel = params["patch"]["kernel"].reshape(4, 32)
    x = patches.reshape(2, 16, 4) @ kernel + params["patch"]["bias"]
    token = np.tile(params["class_token"], (2, 1, 1))
    x = np.concatenate([token, x], axis=1) + params["position"]
    for i in range(2):
        p = params[f"block{i}"]
        x = x + reference_attention(p, norm(p["norm1"], x))
        y = dense(p["mlp_in"], norm(p["norm2"], x))
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / np.sqrt(2)))
        x = x + dense(p["mlp_out"], y)
    return dense(params["head"], norm(params["norm"], x)[:, 0])


def reference_attention(p, x):
    query, key, value = np.split(dense(p["attention_in"], x), 3, axis=-1)
    heads = []
    for h in range(4):
        part = slice(8 * h, 8 * (h + 1))
        scores = query[..., part] @ key[..., part].transpose(0, 2, 1) / np.sqrt(8)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        heads.append(weights @ value[..., part])
    return dense(p["attention_out"], np.concatenate(heads, axis=-1))


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def norm(p, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * p["scale"] + p["bias"]


@pytest.mark.parametrize(
    ("change", "image", "message"),
    [
        ({"patch": 3}, (8, 8, 1), "`patch` must divide the image, got patch 3 for 8x8"),
        ({"heads": 5}, (8, 8, 1), "`heads` must divide the width, got 5 for 32"),
    ],
    ids=["patch", "heads"],
)
def test_a_size_that_does_not_divide_is_an_error(change, image, message):
    with pytest.raises(ValueError, match=message):
        shapes(VisionTransformer(**(SMALL | change)), *image)


def test_models_import_nothing_of_the_library():
    folder = pathlib.Path(__file__).parent.parent / "train" / "models"
    files = sorted(folder.glob("*.py"))
    assert len(files) > 2
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(n.startswith("oialr_jax") for n in names), file
