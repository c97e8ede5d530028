"""Train features without labels, Barlow Twins: python -m train.selfsup PRESET.

Two random views of each image shall have embeddings whose components agree between the
views and do not depend on one another. What the features are worth tells a linear
classifier on them, which is fitted anew at each evaluation.

Command:   python -m train.selfsup digits --optimizer orthogonal_sgd
           (or sgd, lars, orthogonal_lars, or others of train/optimizers.py)
           python -m train.selfsup fashion --data-dir data  (train.data.prepare first)

The convolutions are what is orthogonalised or, with --method oialr, held in low rank;
the projector is left as it is, as in the paper on orthogonal gradients.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Key, UInt8
from sklearn.linear_model import LogisticRegression

import oialr_jax as oialr
from train import command, images, loop, process, recipe
from train import settings as common
from train.data import augment
from train.data.arrays import Images, standardize
from train.evaluate import pieces
from train.models.barlow_twins import BarlowTwins


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(common.Settings):
    """One run without labels."""

    dataset: str
    """digits, fashion_mnist, mnist, cifar10 or cifar100."""
    width: int = 128
    """Of the projector and the embedding."""
    redundancy: float = 5e-3
    """Weight of what components share, against one that they do not agree."""
    flips: bool = False
    """Whether views are turned left to right."""


_DIGITS = Settings(
    dataset="digits",
    method="dense",
    optimizer="orthogonal_sgd",
    steps=100,
    batch=256,
    learning_rate=1e-2,
    weight_decay=1e-6,
    clip=None,
    dense_last=2,  # the projector
    log_every=10,
    eval_every=50,
    save_every=100,
)
PRESETS: Mapping[str, tuple[str, Settings]] = {
    "digits": ("a small network on scikit-learn's handwritten digits", _DIGITS),
    "fashion": (
        "the same on Fashion-MNIST",
        dataclasses.replace(
            _DIGITS, dataset="fashion_mnist", steps=1000, width=256, eval_every=250
        ),
    ),
    "cifar10": (
        "the same on CIFAR-10",
        dataclasses.replace(
            _DIGITS,
            dataset="cifar10",
            steps=2000,
            width=256,
            flips=True,
            eval_every=500,
        ),
    ),
}

EVALUATION_BATCH = 500
"""Images in one piece of an evaluation."""
PROBED = 10_000
"""Training images that the linear classifier sees at most."""


def task(settings: Settings) -> recipe.Task:
    """Host side: the network and views that the settings describe.

    Raises:   ValueError: an unknown dataset, or one that is read from disk.
              FileNotFoundError: it is not prepared.
    """
    data = images.dataset(
        images.Settings(
            dataset=settings.dataset,
            model="",  # has its own
            smoke=settings.smoke,
            data_dir=settings.data_dir,
        )
    )
    if not isinstance(data, Images):
        raise ValueError(f"{settings.dataset} does not fit into memory, as it must")
    layout = oialr.sharding.Layout(oialr.sharding.make_mesh(settings.mesh))
    model = BarlowTwins(width=settings.width)
    of_pixels = functools.partial(standardize, mean=data.mean, deviation=data.deviation)

    def init(key: Array) -> Mapping[str, Any]:
        return model.init(key, jnp.zeros((1, *data.shape)))

    def loss(params: Any, extra: Any, batch: Mapping[str, Array], key: Array) -> Any:
        embeddings = []
        for view_key in jax.random.split(key):
            image = moved(view_key, batch["image"], flips=settings.flips)
            image = shaded(view_key, of_pixels(image))
            (_, z), extra = model.apply(
                {"params": params, **extra}, image, train=True, mutable=["batch_stats"]
            )
            embeddings.append(z)
        agreement, redundancy = barlow_twins(embeddings[0], embeddings[1])
        value = agreement + settings.redundancy * redundancy
        return value, (extra, {"agreement": agreement})

    def features(params: Any, extra: Any, image: Array) -> Array:
        return model.apply({"params": params, **extra}, of_pixels(image))[0]

    forward = jax.jit(oialr.factored(features))

    def evaluated(state: recipe.State) -> dict[str, float]:
        of_image = functools.partial(forward, state.averaged, state.extra)
        train, test = (
            every(of_image, layout, image)
            for image in (data.train_image[:PROBED], data.test_image)
        )
        label = data.train_label[:PROBED]
        return {"accuracy": probe(train, label, test, data.test_label)}

    return recipe.Task(
        init=init,
        loss=loss,
        batch=data.batches(
            batch=settings.batch, seed=settings.seed, part=layout.rows(settings.batch)
        ),
        evaluate=evaluated,
        goal=loop.Goal("accuracy", "max"),
        epoch=data.counts["train"] / settings.batch,
        layout=layout,
        forward=features,
        inputs=(jax.ShapeDtypeStruct((1, *data.shape), jnp.uint8),),
        described={"dataset": settings.dataset},
    )


def moved(
    key: Key[Array, ""], image: UInt8[Array, "b h w c"], *, flips: bool = False
) -> UInt8[Array, "b h w c"]:
    """Each image moved by up to an eighth, and half of them turned where `flips`."""
    first, second = jax.random.split(jax.random.fold_in(key, 0))
    image = augment.crop(first, image, pad=max(1, image.shape[1] // 8))
    return augment.flip(second, image) if flips else image


def shaded(
    key: Key[Array, ""], image: Float[Array, "b h w c"]
) -> Float[Array, "b h w c"]:
    """Standardised images, each times a factor in [0.6, 1.4], with noise of 0.2."""
    first, second = jax.random.split(jax.random.fold_in(key, 1))
    shape = (len(image), 1, 1, 1)
    factor = jax.random.uniform(first, shape, minval=0.6, maxval=1.4)
    return factor * image + 0.2 * jax.random.normal(second, image.shape)


def barlow_twins(
    first: Float[Array, "b d"], second: Float[Array, "b d"], eps: float = 1e-5
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """How far components do not agree between views, and how much they share.

    Of the correlations C of the components, over the batch: the sum of (1 - C_ii)^2,
    and that of C_ij^2 for i != j.

    Args:     eps: added to each variance.
    Source:   Zbontar et al. 2021, equations 1 and 2.
    """

    def normalized(z: Array) -> Array:
        deviation = jnp.sqrt(jnp.var(z, 0, keepdims=True) + eps)
        return (z - jnp.mean(z, 0, keepdims=True)) / deviation

    c = normalized(first).T @ normalized(second) / len(first)
    own = jnp.diagonal(c)
    return jnp.sum((1 - own) ** 2), jnp.sum(c**2) - jnp.sum(own**2)


def every(
    features: Callable[[Any], Array], layout: oialr.sharding.Layout, image: np.ndarray
) -> np.ndarray:
    """Host side: the features of all images, in every process."""
    found = [
        multihost_utils.process_allgather(features(piece), tiled=True)
        for piece, _ in pieces(image.__getitem__, len(image), EVALUATION_BATCH, layout)
    ]
    return np.concatenate(found)[: len(image)]


def probe(
    train: np.ndarray, train_label: np.ndarray, test: np.ndarray, label: np.ndarray
) -> float:
    """Host side: test accuracy of logistic regression on standardised features.

    NaN where a feature is not finite.
    """
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        return float("nan")
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    classifier = LogisticRegression(max_iter=2000)
    classifier.fit((train - mean) / deviation, train_label)
    return float(classifier.score((test - mean) / deviation, label))


run = functools.partial(recipe.run, build=task)
"""Host side: (settings, name=) -> the summary that was written."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    command.main("python -m train.selfsup", PRESETS, run, arguments)


if __name__ == "__main__":
    process.use_huge_pages()
    main()
