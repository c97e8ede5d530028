"""Models: weight counts of the papers, shapes, dtypes, and no trace of low rank."""

import ast
import functools
import importlib
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import oialr_jax as oialr
from tests.helpers import assert_close
from train.models import autoformer
from train.models.autoformer import Autoformer
from train.models.basic_cnn import BasicCNN
from train.models.lenet5 import LeNet5
from train.models.mlp import MLP
from train.models.pooling import halved
from train.models.resnet import ResNet
from train.models.resnet_rs import ResNetRS
from train.models.transformer import Transformer
from train.models.vgg import VGG, VGG16
from train.models.vit import VisionTransformer, gelu

VIT_B16 = VisionTransformer(patch=16, depth=12, heads=12, width=768, classes=1000)
MINI_VIT = VisionTransformer(
    patch=8, depth=6, heads=6, width=768, classes=10, qkv_bias=False
)
RESNET18 = ResNet(widths=(64, 128, 256, 512), blocks=(2, 2, 2, 2), classes=10)
RESNET18_LARGE = ResNet(
    (64, 128, 256, 512), (2, 2, 2, 2), classes=1000, large_stem=True
)
RESNET20 = ResNet(widths=(16, 32, 64), blocks=(3, 3, 3), classes=10)
RESNET50 = ResNet(
    (64, 128, 256, 512), (3, 4, 6, 3), classes=1000, bottleneck=True, large_stem=True
)
RESNET_RS101 = ResNetRS((3, 4, 23, 3), classes=1000)
VGG16_CIFAR = VGG(VGG16, classes=10, batch_norm=True)
VGG16_LARGE = VGG(VGG16, classes=1000, hidden=(4096, 4096))
GPT = Transformer(tokens=65, context=256, depth=6, heads=6, width=384)
TINY_FORECAST = {"horizon": 8, "label": 6, "width": 16, "hidden": 32, "window": 5}
TINY_RESNET = {"widths": (8, 16), "blocks": (1, 2), "classes": 10}
TINY_TEXT = {"tokens": 11, "context": 8, "depth": 2, "heads": 2, "width": 16}
SMALL = {"patch": 2, "depth": 2, "heads": 4, "width": 32, "classes": 10}

# Compiled three times as fast; what runs a few times does not earn back more.
quick = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


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
        (RESNET18_LARGE, (224, 224, 3), 11_689_512),
        (RESNET20, (32, 32, 3), 272_474),
        (RESNET50, (224, 224, 3), 25_557_032),
        (RESNET_RS101, (160, 160, 3), 63_618_696),
        (VGG16_CIFAR, (32, 32, 3), 14_728_266),
        (VGG16_LARGE, (224, 224, 3), 138_357_544),
        (BasicCNN(), (32, 32, 3), 24_618),
    ],
    ids=[
        "vit-b16",
        "mini-vit",
        "lenet5",
        "resnet18",
        "mlp",
        "resnet18-large",
        "resnet20",
        "resnet50",
        "resnet-rs101",
        "vgg16-bn-cifar",
        "vgg16",
        "basic-cnn",
    ],
)
def test_weight_counts_are_those_of_the_papers(model, image, weights):
    assert size(shapes(model, *image)) == weights


def test_lenet5_has_430500_weights_without_biases():
    kernels = [x for x in jax.tree.leaves(shapes(LeNet5(), 28, 28, 1)) if x.ndim > 1]
    assert size(kernels) == 430_500


def test_the_transformer_has_the_weights_of_its_parts():
    tokens = jax.ShapeDtypeStruct((1, 256), jnp.int32)
    found = jax.eval_shape(GPT.init, jax.random.key(0), tokens)["params"]
    d, block = 384, 12 * 384**2 + 13 * 384  # 4 + 8 squares, 9 biases, 4 of the norms
    assert size(found) == 2 * 65 * d + 256 * d + 6 * block + 2 * d


def forecast_shapes(marks, horizon=96):
    model = Autoformer(horizon=horizon)
    values = jax.ShapeDtypeStruct((1, 96, 7), jnp.float32)
    times = jax.ShapeDtypeStruct((1, 96 + horizon, marks), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), values, times)["params"]
    return model, params, values, times


@pytest.mark.parametrize(
    ("marks", "horizon", "weights"),
    [(5, 96, 10_536_967), (4, 96, 10_535_943), (5, 720, 10_536_967)],
    ids=["freq-t", "freq-h", "freq-t-720"],
)
def test_the_autoformer_has_the_weights_of_the_paper(marks, horizon, weights):
    assert size(forecast_shapes(marks, horizon)[1]) == weights


def test_the_autoformer_has_the_22_matrices_of_the_paper():
    """At the rank floor of 5 the authors train 313,876 of the weights, 2.98 %."""
    model, params, values, times = forecast_shapes(5)
    matrices = oialr.find_matrices(
        lambda params, *x: model.apply({"params": params}, *x), params, values, times
    )
    eligible = oialr.select(matrices, dense_first=0, dense_last=0)
    shapes = sorted((x.m, x.n) for x in eligible)
    assert shapes == [(512, 512)] * 16 + [(512, 2048)] * 3 + [(2048, 512)] * 3
    assert eligible[0].path.endswith("encoder0/self_query/kernel")
    in_matrices = sum(m * n for m, n in shapes)
    dense = size(params) - in_matrices
    assert dense == 51_207
    assert dense + 512 * 512 + 21 * 5**2 == 313_876


MODELS = {
    "vit": (VisionTransformer, SMALL, (8, 8, 1)),
    "vit-scan": (VisionTransformer, SMALL | {"remat": True, "scan": True}, (8, 8, 1)),
    "lenet5": (LeNet5, {}, (28, 28, 1)),
    "mlp": (MLP, {"hidden": (16, 8), "classes": 10}, (4, 4)),
    "resnet": (ResNet, TINY_RESNET, (8, 8, 3)),
    "resnet50": (
        ResNet,
        TINY_RESNET | {"bottleneck": True, "large_stem": True, "remat": True},
        (32, 32, 3),
    ),
    "resnet-rs": (ResNetRS, {"blocks": (1, 2), "classes": 10}, (30, 30, 3)),
    "vgg": (
        VGG,
        {"groups": ((4,), (8,)), "classes": 10, "hidden": (16,), "batch_norm": True},
        (8, 8, 3),
    ),
    "basic-cnn": (BasicCNN, {}, (8, 8, 1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_finite_float32_of_the_right_shape_in_both_dtypes(name):
    build, fields, image = MODELS[name]
    x = jax.random.normal(jax.random.key(1), (3, *image))
    narrow = build(**fields, dtype=jnp.bfloat16)
    variables = quick(narrow.init)(jax.random.key(0), x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    found = []
    for model in (narrow, build(**fields)):
        logits = quick(model.apply)(variables, x)
        assert logits.shape == (3, 10)
        assert logits.dtype == jnp.float32
        assert bool(jnp.all(jnp.isfinite(logits)))
        found.append(logits)
    assert_close(*found, 0.1)
    assert np.any(found[0] != found[1])  # not in float32 behind the back


def test_resnet_normalises_by_the_batch_in_training_and_halves_by_stage():
    model = ResNet(**TINY_RESNET)
    x = jax.random.normal(jax.random.key(1), (3, 8, 8, 3))
    variables = quick(model.init)(jax.random.key(0), x)

    def train(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    logits, changed = quick(train)(variables, x)
    assert np.any(np.abs(logits - quick(model.apply)(variables, x)) > 1e-3)
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
    params = quick(model.init)(jax.random.key(0), x)["params"]
    # Kernels from normal(0.02) leave attention uniform: larger ones test the softmax.
    params = jax.tree.map(lambda leaf: 8 * leaf, params)
    expected = reference_vit(jax.tree.map(np.float64, params), np.float64(x))
    found = quick(model.apply)({"params": params}, x)
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
    ("build", "remat"),
    [
        pytest.param(VisionTransformer, True, id="vit-remat"),
        pytest.param(Transformer, False, id="text-kept"),
        pytest.param(VisionTransformer, False, id="vit-kept", marks=pytest.mark.long),
        pytest.param(Transformer, True, id="text-remat", marks=pytest.mark.long),
    ],
)
def test_scanned_blocks_are_the_same_network(build, remat):
    fields, x = SMALL, jax.random.normal(jax.random.key(1), (2, 8, 8, 1))
    if build is Transformer:
        fields, x = TINY_TEXT, jax.random.randint(jax.random.key(1), (2, 8), 0, 11)
    plain = build(**fields)
    params = quick(plain.init)(jax.random.key(0), x)["params"]
    blocks = [params[f"block{i}"] for i in range(2)]
    stacked = {k: v for k, v in params.items() if not k.startswith("block")}
    stacked["blocks"] = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
    scanned = build(**fields, scan=True, remat=remat)

    def loss(model, params):
        return jnp.sum(jnp.sin(model.apply({"params": params}, x)))

    value_and_grad = quick(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    expected, slopes = value_and_grad(plain, params)
    found, stacked_slopes = value_and_grad(scanned, stacked)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    for i in range(2):
        for a, b in zip(
            jax.tree.leaves(stacked_slopes["blocks"]),
            jax.tree.leaves(slopes[f"block{i}"]),
            strict=True,
        ):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


def plain_correlation(query, key, value, *, factor, shared):
    """The definition in float64, one delay and one channel at a time."""
    b, length, d = query.shape
    sized = []
    for x in (key, value):
        full = np.zeros((b, length, d))
        full[:, : x.shape[1]] = x[:, :length]
        sized.append(full)
    key, value = sized
    curve = np.array(
        [
            np.mean(np.sum(np.roll(query, -n, axis=1) * key, axis=1), axis=-1)
            for n in range(length)
        ]
    ).T
    result = np.zeros((b, length, d))
    for i in range(b):
        ranked = curve.mean(axis=0) if shared else curve[i]
        delays = np.argsort(-ranked)[: int(factor * math.log(length))]
        weights = np.exp(curve[i][delays] - curve[i][delays].max())
        for weight, n in zip(weights / weights.sum(), delays, strict=True):
            result[i] += weight * np.roll(value[i], -n, axis=0)
    return result


@pytest.mark.parametrize("shared", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("memory", [24, 17, 31], ids=["self", "shorter", "longer"])
def test_correlation_by_frequency_is_the_plain_definition(shared, memory):
    rng = np.random.default_rng(memory)
    query, key, value = (rng.normal(size=(4, n, 8)) for n in (24, memory, memory))
    expected = plain_correlation(query, key, value, factor=1.0, shared=shared)
    arrays = [jnp.asarray(x, jnp.float32) for x in (query, key, value)]
    found = autoformer.correlate(*arrays, factor=1.0, shared=shared)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    other = autoformer.correlate(*arrays, factor=1.0, shared=not shared)
    assert np.max(np.abs(other - expected)) > 1e-2


def test_the_decomposition_is_a_moving_average_with_repeated_edges():
    x = np.random.default_rng(0).normal(size=(2, 9, 3))
    padded = np.concatenate([x[:, :1]] * 2 + [x] + [x[:, -1:]] * 2, axis=1)
    trend = np.stack([padded[:, i : i + 5].mean(axis=1) for i in range(9)], axis=1)
    found = autoformer.decompose(jnp.asarray(x, jnp.float32), 5)
    np.testing.assert_allclose(found[1], trend, atol=1e-6)
    np.testing.assert_allclose(found[0], x - trend, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "train"),
    [
        pytest.param(jnp.float32, True, id="f32-training"),
        pytest.param(jnp.bfloat16, False, id="bf16-inference"),
        pytest.param(jnp.float32, False, id="f32-inference", marks=pytest.mark.long),
        pytest.param(jnp.bfloat16, True, id="bf16-training", marks=pytest.mark.long),
    ],
)
def test_forecasts_are_finite_float32_of_the_right_shape(dtype, train):
    model = Autoformer(**TINY_FORECAST, dtype=dtype, remat=train)
    values = jax.random.normal(jax.random.key(1), (3, 12, 7))
    marks = jax.random.uniform(jax.random.key(2), (3, 20, 4)) - 0.5
    params = quick(model.init)(jax.random.key(0), values, marks)

    def forecast(params, values):
        rngs = {"dropout": jax.random.key(3)} if train else {}
        return model.apply(params, values, marks, train, rngs=rngs)

    def total(params):
        found = forecast(params, values)
        return jnp.sum(jnp.sin(found)), found

    slopes, found = quick(jax.grad(total, has_aux=True))(params)
    assert found.shape == (3, 8, 7)
    assert found.dtype == jnp.float32
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((found, slopes)))
    # The bias of a norm whose mean over time is taken out has no effect; all else has.
    idle = {"encoder_norm", "decoder_norm"}
    for name, part in slopes["params"].items():
        for key, x in jax.tree_util.tree_leaves_with_path(part):
            if not (name in idle and "bias" in str(key)):
                assert float(jnp.max(jnp.abs(x))) > 0, (name, key)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_the_transformer_sees_nothing_of_what_comes(dtype):
    model = Transformer(**TINY_TEXT, dtype=dtype)
    text = jax.random.randint(jax.random.key(1), (2, 8), 0, 11)
    params = quick(model.init)(jax.random.key(0), text)
    apply = quick(model.apply)
    logits = apply(params, text)
    assert logits.shape == (2, 8, 11)
    assert logits.dtype == jnp.float32
    assert bool(jnp.all(jnp.isfinite(logits)))
    changed = apply(params, text.at[:, 5].add(1) % 11)
    np.testing.assert_array_equal(logits[:, :5], changed[:, :5])
    assert bool(jnp.all(jnp.any(logits[:, 5:] != changed[:, 5:], axis=-1)))


def test_dropout_is_for_training_alone():
    model = VGG(((4,),), 10, hidden=(64,))
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 3))
    params = model.init(jax.random.key(0), x)
    still = [model.apply(params, x) for _ in range(2)]
    np.testing.assert_array_equal(*still)
    keys = jax.random.split(jax.random.key(2))
    dropped = [model.apply(params, x, train=True, rngs={"dropout": k}) for k in keys]
    assert np.any(dropped[0] != dropped[1])


TIMM = {
    "vit": [
        (r"^block(\d+)", r"blocks.\1"),
        ("attention_in", "attn.qkv"),
        ("attention_out", "attn.proj"),
        ("mlp_in", "mlp.fc1"),
        ("mlp_out", "mlp.fc2"),
        ("^patch", "patch_embed.proj"),
        ("^class_token", "cls_token"),
        ("^position", "pos_embed"),
    ],
    "resnet": [
        (r"^stage0_block(\d)", r"layer1.\1"),
        (r"^stage1_block(\d)", r"layer2.\1"),
        (r"^stage2_block(\d)", r"layer3.\1"),
        (r"^stage3_block(\d)", r"layer4.\1"),
        ("shortcut_norm", "downsample.1"),
        ("shortcut", "downsample.0"),
        (r"norm(\d)", r"bn\1"),
        ("^norm", "bn1"),
        ("^stem", "conv1"),
        ("^head", "fc"),
    ],
}
TIMM["resnet-rs"] = [
    ("shortcut_norm", "downsample.2"),
    ("shortcut", "downsample.1"),
    ("squeeze", "se.fc1"),
    ("excite", "se.fc2"),
    ("stem_norm0", "conv1.1"),
    ("stem_norm1", "conv1.4"),
    ("stem_norm2", "bn1"),
    ("stem_norm3", "maxpool.1"),
    ("stem0", "conv1.0"),
    ("stem1", "conv1.3"),
    ("stem2", "conv1.6"),
    ("stem3", "maxpool.0"),
    *TIMM["resnet"],
]
ENDS = {"kernel": "weight", "scale": "weight", "mean": "running_mean"}
ENDS |= {"var": "running_var", "bias": "bias"}


def carried(variables, state, table):
    """Our variables with the values that timm's network has in their places."""

    def value(path, leaf):
        *parts, end = (x.key for x in path[1:])
        name = ".".join(parts) if parts else end
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        found = state.pop(f"{name}.{ENDS[end]}" if parts else name)
        axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(found.ndim, range(found.ndim))
        found = found.transpose(*axes).reshape(leaf.shape)
        return jnp.asarray(found)

    found = jax.tree_util.tree_map_with_path(value, variables)
    assert all("num_batches_tracked" in x for x in state), state.keys()
    return found


@pytest.mark.peers
@pytest.mark.parametrize("name", ["vit", "resnet", "resnet-rs"])
def test_logits_are_those_of_timm(name):
    """A network of timm's with random weights, carried over."""
    timm = importlib.import_module("timm")
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    if name == "vit":
        theirs = timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4, num_classes=9
        )
        model = VisionTransformer(patch=8, depth=2, heads=4, width=48, classes=9)
    elif name == "resnet":
        theirs = timm.create_model("resnet50", num_classes=9)
        model = RESNET50.clone(classes=9)
    else:
        theirs = timm.create_model("resnetrs50", num_classes=9)
        model = ResNetRS((3, 4, 6, 3), classes=9)
    theirs = theirs.eval()
    with torch.no_grad():
        for key, x in theirs.state_dict().items():
            if key.endswith(("running_var", "bn3.weight")):
                x.uniform_(0.5, 1.5)
            elif name == "vit" or key.endswith("running_mean"):
                x.add_(0.1 * torch.randn_like(x))
    state = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    empty = jax.eval_shape(model.init, jax.random.key(0), images)
    variables = carried(empty, state, TIMM[name])
    with torch.no_grad():
        expected = theirs(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    found = quick(model.apply)(variables, images)
    scale = np.max(np.abs(expected))
    np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)


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
    folder = pathlib.Path(__file__).parents[2] / "train" / "models"
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


@pytest.mark.parametrize("size", [(6, 8), (7, 5)], ids=str)
def test_halving_is_max_pooling_with_its_gradient(size):
    """Of distinct numbers: where a maximum is shared, the two share it differently."""
    x = jax.random.permutation(jax.random.key(0), 2 * math.prod(size) * 3)
    x = x.reshape(2, *size, 3).astype(jnp.float32)

    def pooled(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2))

    expected, pull = jax.vjp(pooled, x)
    out, pull_halved = jax.vjp(halved, x)
    np.testing.assert_array_equal(out, expected)
    weights = jax.random.normal(jax.random.key(1), out.shape)
    np.testing.assert_array_equal(pull_halved(weights)[0], pull(weights)[0])
