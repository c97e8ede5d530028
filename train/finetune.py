"""Fine-tune a network on other classes in six ways: python -m train.finetune mnist.

Command:   python -m train.finetune mnist --data-dir data --json finetune.json

LeNet5 is trained on the first half of the classes, and tuned on the other half with a
new head: `full` trains every weight; `head` the new head alone; `cores` the head and
cores on a frozen base, whose bases are those of the weights, `gradients` those of the
gradients of ten batches, `curvature` those of the weights weighed by curvature; `lora`
the head and two factors a matrix, as many weights as `cores`. Every way has its own
learning rate, chosen on a seed that is not reported and images that are held back.

For each way: the test accuracy over the seeds, the weights that train, and what the
state of Adam takes.
"""

import dataclasses
import functools
import json
import math
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array

import oialr_jax as oialr
from oialr_jax.adapters import attached, on_base
from oialr_jax.curvature import of_outputs
from oialr_jax.lowrank import named_leaves, with_leaves
from oialr_jax.matrices import Matrix
from train import files, images, markdown
from train.data.arrays import Images, standardize
from train.models.lenet5 import LeNet5
from train.tuning import tuned

WAYS = ("full", "head", "cores", "gradients", "curvature", "lora")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is tuned, for how long and at which rates."""

    dataset: tyro.conf.Positional[str]
    """mnist or fashion_mnist."""
    ways: tuple[str, ...] = WAYS
    """Which of them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights before training, the order of the images and the new head."""
    pretrain: int = 800
    """Updates on the first half of the classes."""
    steps: int = 400
    """Updates on the other half."""
    batch: int = 128
    """Images in a batch."""
    ranks: tuple[int, ...] = (14, 20, 33)
    """Of the cores on both convolutions and the hidden layer."""
    rates: tuple[float, ...] = (5e-3, 2e-2)
    """Of Adam at its highest, of which each way takes its best."""
    full_rates: tuple[float, ...] = (1e-3, 3e-3)
    """The same of `full`."""
    held_back: int = 2000
    """Images of the other half to choose the rate by."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where `python -m train.data.prepare` put the dataset."""
    json: pathlib.Path | None = None
    """Where the results go."""


class Half(NamedTuple):
    """The images of some classes, these numbered from 0."""

    image: np.ndarray
    label: np.ndarray
    test_image: np.ndarray
    test_label: np.ndarray


def half(data: Images, classes: Sequence[int]) -> Half:
    """Host side: the images of these classes, standardised."""
    place = np.full(len(data.classes), -1)
    place[list(classes)] = np.arange(len(classes))

    def of(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = place[label] >= 0
        pixels = np.asarray(standardize(image[found], data.mean, data.deviation))
        return pixels, place[label[found]].astype(np.int32)

    return Half(
        *of(data.train_image, data.train_label), *of(data.test_image, data.test_label)
    )


def forward(params: Any, image: Array) -> Array:
    """Logits."""
    count = params["head"]["bias"].shape[0]
    return LeNet5(classes=count).apply({"params": params}, image)


def loss(params: Any, image: Array, label: Array) -> Array:
    """The mean cross entropy."""
    logits = forward(params, image)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, label))


def batches(
    image: np.ndarray, label: np.ndarray, settings: Settings, steps: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """As many batches as steps, each pass in another order."""
    rng, left = np.random.default_rng(seed), np.zeros(0, np.int64)
    for _ in range(steps):
        if len(left) < settings.batch:
            left = rng.permutation(len(label))
        rows, left = left[: settings.batch], left[settings.batch :]
        yield image[rows], label[rows]


class Tuned(NamedTuple):
    """A network after its tuning: dense params, and what trained."""

    params: Any
    weights: int
    state_bytes: int
    seconds: float


def trained(
    of_trained: Callable[..., Array],
    start: Any,
    fixed: Any,
    data: Iterable[tuple[np.ndarray, np.ndarray]],
    rate: float,
    steps: int,
) -> Any:
    """Host side: Adam on what is in `start`; what it became, its size, its state's."""
    begun = time.perf_counter()
    batches = ((fixed, *batch) for batch in data)
    params, state = tuned(of_trained, start, batches, rate, steps, b2=0.999)
    moments = jax.tree.leaves((state.inner_state[0].mu, state.inner_state[0].nu))
    weights = oialr.counts(params).trainable
    taken = time.perf_counter() - begun
    return params, weights, sum(x.nbytes for x in moments), taken


def network(
    way: str,
    dense: Any,
    matrices: Sequence[Matrix],
    data: Half,
    rate: float,
    settings: Settings,
    seed: int,
) -> Tuned:
    """Host side: the network tuned in one way."""
    stream = batches(data.image, data.label, settings, settings.steps, seed)
    run = functools.partial(trained, data=stream, rate=rate, steps=settings.steps)
    if way == "full":
        params, *rest = run(lambda p, _, x, y: loss(p, x, y), dense, None)
        return Tuned(params, *rest)
    if way == "lora":
        factors = lora(dense, matrices, settings, seed)

        def merged(trained: Any, dense: Any) -> Any:
            leaves = named_leaves(dense)
            new = {
                x.path: leaves[x.path] + x.axes.to_array(a @ b)
                for x, (a, b) in zip(matrices, trained["factors"], strict=True)
            }
            return with_leaves(dense, new) | {"head": trained["head"]}

        start = {"factors": factors, "head": dense["head"]}
        params, *rest = run(
            lambda p, fixed, x, y: loss(merged(p, fixed), x, y), start, dense
        )
        return Tuned(merged(params, dense), *rest)
    ranks = dict(zip([x.path for x in matrices], settings.ranks, strict=True))
    cores, base = oialr.adapters(
        dense,
        () if way == "head" else matrices,
        ranks if way != "head" else 1,
        train="head",
        of=origin(way, dense, matrices, data, settings, seed),
    )
    based = on_base(loss)
    cores, *rest = run(based, cores, base)
    return Tuned(oialr.materialize(attached(cores, base)), *rest)


def lora(
    dense: Any, matrices: Sequence[Matrix], settings: Settings, seed: int
) -> list[tuple[Array, Array]]:
    """Two factors a matrix, the second of zeros; about as many weights as cores."""
    rng = np.random.default_rng(seed)
    wanted = sum(r * r for r in settings.ranks)
    each = sum(x.m + x.n for x in matrices)
    rank = max(1, round(wanted / each))
    return [
        (
            jnp.asarray(rng.normal(size=(x.m, rank)) / math.sqrt(x.m), jnp.float32),
            jnp.zeros((rank, x.n)),
        )
        for x in matrices
    ]


def origin(
    way: str,
    dense: Any,
    matrices: Sequence[Matrix],
    data: Half,
    settings: Settings,
    seed: int,
) -> Any:
    """Host side: what the bases come from, None for the weights."""
    if way not in ("gradients", "curvature"):
        return None
    stream = batches(data.image, data.label, settings, 10, seed + 1000)
    if way == "gradients":
        grads = [jax.jit(jax.grad(loss))(dense, *x) for x in stream]
        return jax.tree.map(lambda *x: sum(x), *grads)
    sums = jax.jit(oialr.curvature(of_outputs(forward), matrices))
    total = None
    for i, (image, _) in enumerate(stream):
        new = sums(dense, image, key=jax.random.key(i))
        total = new if total is None else total.add(new)
    return total


def accuracy(params: Any, image: np.ndarray, label: np.ndarray) -> float:
    """Host side: the percentage that is right."""
    right = 0
    for start in range(0, len(label), 1000):
        logits = _logits(params, image[start : start + 1000])
        right += int(np.sum(np.argmax(logits, -1) == label[start : start + 1000]))
    return 100 * right / len(label)


_logits = jax.jit(forward)


def pretrained(data: Half, settings: Settings, seed: int, classes: int) -> Any:
    """Host side: LeNet5 trained on one half, with a new head for the other."""
    model = LeNet5(classes=int(data.label.max()) + 1)
    key = jax.random.key(seed)
    params = model.init(key, jnp.zeros((1, 28, 28, 1)))["params"]
    stream = batches(data.image, data.label, settings, settings.pretrain, seed)
    params, *_ = trained(
        lambda p, _, x, y: loss(p, x, y), params, None, stream, 2e-3, settings.pretrain
    )
    print(
        f"seed {seed}: {accuracy(params, data.test_image, data.test_label):.2f} % on "
        "the first half",
        flush=True,
    )
    head = LeNet5(classes=classes).init(
        jax.random.fold_in(key, 1), jnp.zeros((1, 28, 28, 1))
    )
    return dict(params) | {"head": head["params"]["head"]}


def run(settings: Settings) -> dict[str, Any]:
    """Host side: the results of every way.

    Raises:   ValueError: an unknown dataset or way. FileNotFoundError: the dataset is
              not prepared.
    """
    for way in settings.ways:
        if way not in WAYS:
            raise ValueError(f"unknown way {way!r}; there are: {', '.join(WAYS)}")
    data = images.dataset(
        images.Settings(dataset=settings.dataset, model="", data_dir=settings.data_dir)
    )
    if not isinstance(data, Images):
        raise ValueError(f"{settings.dataset} does not fit into memory, as it must")
    middle = len(data.classes) // 2
    first = half(data, range(middle))
    other = half(data, range(middle, len(data.classes)))
    cut = settings.held_back
    held = Half(
        other.image[cut:], other.label[cut:], other.image[:cut], other.label[:cut]
    )
    chooser = max(settings.seeds) + 1
    networks = {
        seed: pretrained(first, settings, seed, len(data.classes) - middle)
        for seed in (*settings.seeds, chooser)
    }
    found = oialr.find_matrices(forward, networks[chooser], first.image[:1])
    matrices = [x for x in found if not x.path.startswith("head")]
    results: dict[str, Any] = {}
    for way in settings.ways:
        tune = functools.partial(network, way, matrices=matrices, settings=settings)
        rates = settings.full_rates if way == "full" else settings.rates
        scores = {}
        for rate in rates:
            new = tune(networks[chooser], data=held, rate=rate, seed=chooser)
            scores[rate] = accuracy(new.params, held.test_image, held.test_label)
        best = max(scores, key=lambda rate: scores[rate])
        each = [
            tune(networks[x], data=other, rate=best, seed=x) for x in settings.seeds
        ]
        right = [accuracy(x.params, other.test_image, other.test_label) for x in each]
        whole = oialr.counts(networks[chooser]).dense
        results[way] = {
            "accuracy": right,
            "rate": best,
            "rates": {str(rate): score for rate, score in scores.items()},
            "trained_weights": each[0].weights,
            "trained_share": each[0].weights / whole,
            "state_mb": each[0].state_bytes / 1e6,
            "seconds": [round(x.seconds, 1) for x in each],
        }
        print(f"{way}: {json.dumps(results[way])}", flush=True)
    return {
        "command": " ".join(["python -m train.finetune", *sys.argv[1:]]),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "settings": files.without_places(settings),
        "ways": results,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    settings = tyro.cli(Settings, args=arguments, prog="python -m train.finetune")
    try:
        settings = files.with_paths_expanded(settings)
        if settings.json is not None:
            files.writable_file(settings.json)
        results = run(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(results["ways"]))
    if settings.json is not None:
        settings.json.write_text(json.dumps(files.nulled(results), indent=2) + "\n")


def table(ways: Mapping[str, Any]) -> str:
    """The results as rows of Markdown."""
    head = ["way", "test accuracy", "trained weights", "state of Adam", "rate"]
    rows = [
        [
            *(way, f"{markdown.spread(x['accuracy'], '.2f')} %"),
            f"{x['trained_weights']:,} ({x['trained_share']:.2%})",
            *(f"{x['state_mb']:.3f} MB", f"{x['rate']:g}"),
        ]
        for way, x in ways.items()
    ]
    return markdown.table(head, rows)


if __name__ == "__main__":
    main()
