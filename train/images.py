"""Train an image classifier in low rank: python -m train.images PRESET.

Command:   python -m train.images digits            (--method dense for the same, dense)
           python -m train.images fashion --data-dir data     (train.data.prepare first)
Results:   accuracy, weights and wall time of the presets: train/results/experiments.md

A run writes metrics.jsonl (the record), checkpoints/, summary.json and plots/ into
runs/NAME. After SIGTERM, a kill or a crash the same command with --resume goes on, bit
for bit. Several devices share each batch (--mesh); for several hosts see train/tpu/.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

import oialr_jax as oialr
from oialr_jax.sharding import Rules
from train import command, loop, names, process, recipe
from train import settings as common
from train.data import augment
from train.data.arrays import Dataset, Images, drawn, standardize
from train.evaluate import total
from train.models.table import MODELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(common.Settings):
    """One run of an image classifier."""

    dataset: str
    """digits, mnist, fashion_mnist, cifar10, cifar100, or imagenet2012."""
    model: str
    """lenet5, vit-digits, mini-vit-digits, mini-vit, vit-b16, resnet20, resnet18,
    resnet50, resnet-rs101, vgg7-bn, vgg16-bn or vgg16."""
    scale: float = 1.0
    """By this the widths of the model are multiplied: a small dense network."""
    size: int = 224
    """Height and width to which images of ImageNet are cut."""
    validation: int = 0
    """Training images, of every class alike, that are held back to choose by."""
    smoothing: float = 0.1
    """Part of each training label that is spread over all classes."""
    crop_area: float | None = None
    """Least part of an image that a random crop has, which is then made as large."""
    pad: int = 0
    """Pixels by which images are moved at random."""
    flip: bool = False
    """Half of the images, left to right."""
    erase: float = 0.0
    """Share of the images of which a rectangle becomes noise."""
    mix: bool = False
    """Batches are mixed by mixup (0.1) or cutmix (1.0)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; weights are float32."""


_RESNET: dict[str, Any] = {
    "optimizer": "sgd",
    "learning_rate": 0.1,
    "warmup": 0.02,
    "weight_decay": 5e-4,
    "clip": None,
    "smoothing": 0.0,
    "pad": 4,
    "flip": True,
    "cutoff": 0.15,
    "multiple": 8,
    "log_every": 391,
    "eval_every": 3910,
    "save_every": 3910,
}
_IMAGENET: dict[str, Any] = {
    "dtype": "bfloat16",
    "warmup": 1 / 30,
    "mix": True,
    "erase": 0.25,
    "cutoff": 0.15,
    "every": 0.05,
    "multiple": 16,
    "among_eligible": True,
    "log_every": 100,
    "eval_every": 6255,
    "save_every": 1251,
}

PRESETS: Mapping[str, tuple[str, Settings]] = {
    "digits": (
        "a small vision transformer on scikit-learn's handwritten digits",
        Settings(dataset="digits", model="vit-digits"),
    ),
    "fashion": (
        "LeNet5 on Fashion-MNIST",
        Settings(
            dataset="fashion_mnist",
            model="lenet5",
            steps=2000,
            batch=128,  # 4.3 passes
            learning_rate=2e-3,
            weight_decay=0.3,
            layer_step=1.0,  # three matrices, of which one has 93 % of the weights
            min_aspect=0.05,  # takes the second convolution, 500x50
            log_every=50,
            eval_every=200,
        ),
    ),
    "fashion-cnn": (
        "a small VGG with one hidden dense layer on Fashion-MNIST",
        Settings(
            dataset="fashion_mnist",
            model="vgg7-bn",
            steps=2400,
            batch=128,  # 5.1 passes
            learning_rate=2e-3,
            weight_decay=0.3,
            delay=0.5,
            budget=0.248,
            projections=(0.15, 0.025),
            multiple=1,
            dense_first=4,  # the last convolution and the hidden layer have 85 %
            log_every=50,
            eval_every=600,
            save_every=1200,
        ),
    ),
    "mnist-lenet5": (
        "LeNet5 on MNIST, 50,000 images to train on and 10,000 to choose by",
        Settings(
            dataset="mnist",
            model="lenet5",
            validation=10_000,
            steps=3120,
            batch=128,  # 8 passes
            learning_rate=2e-3,
            weight_decay=0.3,
            smoothing=0.0,
            delay=0.7,
            budget=0.0317,  # 13,100 weights without biases
            projections=(0.2, 0.01),
            min_rank_share=0.002,
            multiple=1,
            min_aspect=0.01,
            dense_first=1,  # 25x20, which has fewer weights dense
            dense_last=0,
            log_every=100,
            eval_every=390,
            save_every=1560,
        ),
    ),
    "cifar10-vit-mini": (
        "the paper's mini vision transformer on CIFAR-10, 300 passes",
        Settings(
            dataset="cifar10",
            model="mini-vit",
            dtype="bfloat16",
            steps=14_700,
            batch=1024,
            learning_rate=3e-4,
            warmup=1 / 30,
            lowest_rate=1e-5,
            k_decay=0.34,
            weight_decay=0.01,
            clip=5.0,
            crop_area=0.8,
            flip=True,
            erase=0.25,
            delay=2500 / 14_700,
            every=500 / 14_700,
            cutoff=0.15,
            multiple=8,
            among_eligible=True,
            log_every=49,
            eval_every=490,
            save_every=1470,
        ),
    ),
    "cifar10-resnet20": (
        "ResNet-20 on CIFAR-10, 164 passes",
        Settings(
            dataset="cifar10",
            model="resnet20",
            steps=64_000,
            batch=128,
            **_RESNET,
        ),
    ),
    "cifar10-resnet20-short": (
        "the same, 15 passes: for CPUs",
        Settings(
            dataset="cifar10",
            model="resnet20",
            steps=5865,
            batch=128,
            validation=5000,
            delay=0.7,
            budget=0.3,
            projections=(0.2, 0.02),
            min_aspect=0.05,
            dense_first=1,
            **_RESNET
            | {
                "optimizer": "adamw",
                "learning_rate": 4e-3,
                "weight_decay": 0.1,
                "multiple": 1,
                "eval_every": 1173,
                "save_every": 391,
            },
        ),
    ),
    "cifar10-resnet18": (
        "ResNet-18 in its CIFAR form on CIFAR-10, 200 passes",
        Settings(
            dataset="cifar10",
            model="resnet18",
            steps=78_200,
            batch=128,
            dtype="bfloat16",
            **_RESNET,
        ),
    ),
    "cifar10-vgg16": (
        "VGG16 with batch normalisation and one dense layer on CIFAR-10, 200 passes",
        Settings(
            dataset="cifar10",
            model="vgg16-bn",
            steps=78_200,
            batch=128,
            dtype="bfloat16",
            **_RESNET | {"learning_rate": 0.05},
        ),
    ),
    "imagenet-vit-b16": (
        "ViT-B/16 on ImageNet, 300 passes",
        Settings(
            dataset="imagenet2012",
            model="vit-b16",
            steps=375_300,
            batch=1024,
            learning_rate=1e-3,
            weight_decay=0.05,
            ema=0.9999,
            **_IMAGENET,
        ),
    ),
    "imagenet-resnet-rs101": (
        "ResNet-RS 101 on ImageNet at 160 pixels, 300 passes",
        Settings(
            dataset="imagenet2012",
            model="resnet-rs101",
            size=160,
            steps=375_300,
            batch=1024,
            learning_rate=1e-3,
            weight_decay=1e-3,
            **_IMAGENET,
        ),
    ),
    "imagenet-resnet50": (
        "ResNet-50 on ImageNet, 90 passes",
        Settings(
            dataset="imagenet2012",
            model="resnet50",
            steps=112_590,
            batch=1024,
            optimizer="sgd",
            learning_rate=0.4,
            weight_decay=1e-4,
            clip=None,
            **_IMAGENET | {"mix": False, "erase": 0.0},
        ),
    ),
}


DATASETS: Mapping[str, tuple[tuple[int, int, int], int]] = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "imagenet2012": ((64, 64, 3), 1000),
}
"""Height, width and channels in the small form, and classes."""

EVALUATION_BATCH = 500
"""One piece of the digits, a divisor of the others: one shape is compiled per ranks."""


def dataset(settings: Settings) -> Dataset:
    """Host side: the images that the settings name.

    Raises:   ValueError: an unknown dataset, or validation images where there can be
              none. FileNotFoundError: the dataset is not prepared.
    """
    shape, classes = names.find("dataset", settings.dataset, DATASETS)
    data: Images
    if settings.smoke:
        data = drawn(shape, classes)
    elif settings.dataset == "imagenet2012":
        from train.data import imagenet  # needs tensorflow-datasets

        if settings.validation:
            raise ValueError("`validation` images cannot be taken from imagenet2012")
        return imagenet.ImageNet(settings.data_dir, settings.size)
    elif settings.dataset == "digits":
        from train.data import digits  # scikit-learn takes a second to import

        data = digits.load()
    else:
        from train.data import prepared  # needs tensorflow-datasets, digits do not

        data = prepared.images(settings.data_dir, settings.dataset)
    if settings.validation:
        data = data.validate(10 if settings.smoke else settings.validation)
    return data


def network(settings: Settings, classes: int) -> nn.Module:
    """The model that the settings name.

    Raises:   ValueError: there is none of this name.
    """
    model, small = names.find("model", settings.model, MODELS)
    fields = dict(small) if settings.smoke else {}
    model = model.clone(classes=classes, dtype=jnp.dtype(settings.dtype), **fields)
    return model if settings.scale == 1 else scaled(model, settings.scale)


def scaled(model: nn.Module, scale: float) -> nn.Module:
    """The model with all its widths multiplied, and rounded to what its heads divide.

    Raises:   ValueError: `scale` is not positive.
    """
    heads = getattr(model, "heads", 1)

    def times(width: Any) -> Any:
        if isinstance(width, tuple):
            return tuple(map(times, width))
        return common.scaled(width, scale, heads)

    widths = ("width", "widths", "groups", "channels", "hidden")
    known = {x.name for x in dataclasses.fields(model)}
    return model.clone(**{x: times(getattr(model, x)) for x in widths if x in known})


def task(settings: Settings) -> recipe.Task:
    """Host side: the classifier that the settings name.

    Raises:   as `dataset` and `network`.
    """
    data = dataset(settings)
    model = network(settings, len(data.classes))
    mesh = oialr.sharding.make_mesh(settings.mesh)
    layout = oialr.sharding.Layout(mesh, rules(mesh, settings.model))
    trains = "train" in inspect.signature(type(model).__call__).parameters

    def init(key: Array) -> Mapping[str, Any]:
        return model.init(key, jnp.zeros((1, *data.shape)))

    def loss(params: Any, extra: Any, batch: Mapping[str, Array], key: Array) -> Any:
        drop, change = jax.random.split(key)
        image, target = augmented(
            settings, data, change, batch["image"], batch["label"]
        )
        options: dict[str, Any] = {"train": True} if trains else {}
        logits, extra = model.apply(
            {"params": params, **extra},
            image,
            mutable=list(extra),
            rngs={"dropout": drop},
            **options,
        )
        entropy = optax.softmax_cross_entropy(logits, target)
        right = jnp.mean(jnp.argmax(logits, -1) == batch["label"])
        return jnp.mean(entropy), (extra, {"accuracy": right})

    def drawn(params: Any, extra: Any, batch: Mapping[str, Array], key: Array) -> Array:
        change, draw = jax.random.split(key)
        image, _ = augmented(settings, data, change, batch["image"], batch["label"])
        output = model.apply({"params": params, **extra}, image)
        label = jax.random.categorical(draw, jax.lax.stop_gradient(output))
        entropy = optax.softmax_cross_entropy_with_integer_labels(output, label)
        return jnp.mean(entropy)

    def logits(params: Any, extra: Any, image: Array) -> Array:
        image = standardize(image, data.mean, data.deviation)
        return model.apply({"params": params, **extra}, image)

    forward = jax.jit(oialr.factored(logits))

    def evaluated(state: recipe.State) -> dict[str, float]:
        of_image = functools.partial(forward, state.averaged, state.extra)
        found = evaluate(of_image, layout, data, settings.smoothing)
        if settings.validation:
            other = evaluate(of_image, layout, data, settings.smoothing, "validation")
            found |= {f"validation_{name}": x for name, x in other.items()}
        return found

    counted = "validation_accuracy" if settings.validation else "accuracy"
    return recipe.Task(
        init=init,
        loss=loss,
        batch=data.batches(
            batch=settings.batch, seed=settings.seed, part=layout.rows(settings.batch)
        ),
        evaluate=evaluated,
        goal=loop.Goal(counted, "max"),
        epoch=data.counts["train"] / settings.batch,
        layout=layout,
        forward=logits,
        inputs=(jax.ShapeDtypeStruct((1, *data.shape), jnp.uint8),),
        described={"dataset": settings.dataset, "model": settings.model},
        drawn=drawn,
    )


def augmented(
    settings: Settings,
    data: Dataset,
    key: Array,
    image: UInt8[Array, "b h w c"],
    label: Int[Array, " b"],
) -> tuple[Float[Array, "b h w c"], Float[Array, "b k"]]:
    """Standardised images and targets of a training batch, changed as was asked."""
    keys = jax.random.split(key, 5)
    if settings.crop_area is not None:
        area = (settings.crop_area, 1.0)
        image = augment.resized_crop(keys[0], image, area=area)
    if settings.pad:
        image = augment.crop(keys[1], image, pad=settings.pad)
    if settings.flip:
        image = augment.flip(keys[2], image)
    pixels = standardize(image, data.mean, data.deviation)
    if settings.erase:
        pixels = augment.erase(keys[3], pixels, probability=settings.erase)
    target = augment.targets(label, len(data.classes), settings.smoothing)
    if settings.mix:
        pixels, target = augment.mix(keys[4], pixels, target)
    return pixels, target


def evaluate(
    forward: Callable[[Any], Array],
    layout: oialr.sharding.Layout,
    data: Dataset,
    smoothing: float,
    split: str = "test",
) -> dict[str, float]:
    """Accuracy and mean loss, that of the training, over the whole of a split."""

    def sums(piece: Mapping[str, Array], counted: Array) -> tuple[Array, Array]:
        logits = forward(piece["image"])
        return _sums(logits, piece["label"], counted, smoothing)

    count, rows = data.counts[split], functools.partial(data.rows, split)
    right, loss = total(sums, rows, count, EVALUATION_BATCH, layout) / count
    return {"accuracy": float(right), "loss": float(loss)}


@functools.partial(jax.jit, static_argnames="smoothing")
def _sums(
    logits: Array, label: Array, counted: Array, smoothing: float
) -> tuple[Array, Array]:
    """Of a batch: how many are right, and the sum of their losses."""
    right = (jnp.argmax(logits, -1) == label) & counted
    target = augment.targets(label, logits.shape[-1], smoothing)
    entropy = optax.softmax_cross_entropy(logits, target)
    return jnp.sum(right), jnp.sum(jnp.where(counted, entropy, 0))


def rules(mesh: Mesh, model: str) -> Rules:
    """Which side of which matrix the axis `model` divides, if the mesh has it.

    Raises:   ValueError: no rules are known for this model.
    """
    if "model" not in mesh.shape:
        return ()
    if "vit" not in model:
        raise ValueError(f"an axis `model` is of no use for {model}: use data or fsdp")
    other = "fsdp" if "fsdp" in mesh.shape else None
    return (
        (r"(attention_in|mlp_in)/kernel$", PartitionSpec(other, "model")),
        (r"(attention_out|mlp_out)/kernel$", PartitionSpec("model", other)),
    )


run = functools.partial(recipe.run, build=task)
"""Host side: (settings, name=) -> the summary that was written."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    command.main("python -m train.images", PRESETS, run, arguments)


if __name__ == "__main__":
    process.use_huge_pages()
    main()
