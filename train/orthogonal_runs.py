"""Orthogonal gradients beside their controls: python -m train.orthogonal_runs.

Every arm has the same grid of learning rates and the same seeds; the rate is chosen by
the accuracy on held-out training images, reported is that on the test set. Prints one
Markdown table for each study. Runs that are in the file already are not repeated.

digits      BasicCNN, batch 256, 24 steps, a constant rate: the paper's naive recipe
cosine      the same for 120 steps, the rate falling to zero: the tuned one
batch-N     BasicCNN on digits, batches of 4, 16, 64 and 256, the same epochs
depth-N     ResNet-8 and ResNet-20 on digits, batch 256, 40 steps
fashion     BasicCNN on 20,000 images of Fashion-MNIST, batch 256, 156 steps
cores       the vision transformer on digits, 400 steps, after a third in low rank
dense       the same without low rank
cores-time  as cores, each optimizer for as long as AdamW takes, at its best rate
text        a transformer on characters, 200 steps of 16 passages of 64
selfsup     Barlow Twins on digits, batch 256, 67 steps; `test` is a linear classifier,
            `loss` that of the last tenth of the training, by which the rate is chosen
quadratic   momentum before or after, on a noisy quadratic of a 16x16 matrix

A run is a loop around one compiled step with the whole dataset on the device: no
augmentation, no checkpoints, no schedule of ranks.

Command:   python -m train.orthogonal_runs --data-dir data
Results:   train/results/orthogonal.md
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn
from jaxtyping import Array
from tqdm import tqdm

import oialr_jax as oialr
from oialr_jax.matrices import Matrix
from train import bench, files, names, optimizers, process, recipe, selfsup
from train.models.basic_cnn import BasicCNN
from train.models.resnet import ResNet
from train.models.transformer import Transformer
from train.models.vit import VisionTransformer

RATES = tuple(float(f"{x:.0e}") for x in np.logspace(-3, 0, 7))
"""1e-3 to 1 in half decades, the grid of every arm."""
FEWER = {
    "selfsup": RATES[:6],
    "dense": RATES[:5],
    "fashion": RATES[2:6],
    "text": RATES[:4],
    "depth-20": RATES[:5],
}
"""The grid of every arm in studies that take long."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Which runs."""

    studies: tuple[str, ...] = ()
    """Of the list above; by default all."""
    seeds: int = 3
    """Runs of each kind, from seed 0 on."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where `python -m train.data.prepare` put Fashion-MNIST."""
    out: pathlib.Path = pathlib.Path("runs/orthogonal.jsonl")
    """The record, one line for each run."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """What is compiled once: a run without its rate and seed."""

    data: str
    model: str
    arm: str
    batch: int
    steps: int
    cosine: bool = False
    """Five per cent of warm-up and a fall to zero, instead of a constant rate."""
    named: bool = False
    """The arm is an optimizer of `train.optimizers`, with gradients clipped."""
    rank: float | None = None
    """Of the small side, in which matrices are held after a third of the run."""


class Run(NamedTuple):
    """One training run."""

    study: str
    kind: Kind
    rate: float
    seed: int


# What is trained


class Part(NamedTuple):
    """Images of mean 0 and deviation 1, and their classes; or passages of characters
    and those that follow each."""

    image: Array
    label: Array


class Data(NamedTuple):
    """What to train on, to choose the rate by, and to report."""

    train: Part
    validation: Part
    test: Part


SIZES: Mapping[str, tuple[int, int]] = {"digits": (1149, 288), "fashion": (20000, 5000)}
"""Images to train on and to choose by, both of the publisher's training set."""


@functools.cache
def load(name: str, data_dir: pathlib.Path) -> Data:
    """Host side: the dataset, the same split in every run."""
    if name == "shakespeare":
        return _passages(data_dir)
    if name == "digits":
        from train.data import digits  # scikit-learn takes a second to import

        images = digits.load()
    else:
        from train.data import prepared  # needs tensorflow-datasets

        images = prepared.images(data_dir, "fashion_mnist")
    few, more = SIZES[name]
    order = np.random.default_rng(0).permutation(len(images.train_label))

    def part(image: np.ndarray, label: np.ndarray) -> Part:
        scaled = (image.astype(np.float32) - images.mean) / images.deviation
        return Part(jnp.asarray(scaled), jnp.asarray(label))

    first, second = order[:few], order[few : few + more]
    return Data(
        part(images.train_image[first], images.train_label[first]),
        part(images.train_image[second], images.train_label[second]),
        part(images.test_image, images.test_label),
    )


def _passages(data_dir: pathlib.Path) -> Data:
    from train.data import prepared, text

    parts = text.encode(prepared.text(data_dir)).parts
    found = []
    for name in ("train", "validation", "test"):
        passages = text.passages(parts[name], context=CONTEXT)
        found.append(Part(*map(jnp.asarray, passages.values())))
    return Data(*found)


CONTEXT = 64
MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "BasicCNN": BasicCNN,
    "ResNet-8": lambda: ResNet((16, 32, 64), (1, 1, 1), classes=10),
    "ResNet-20": lambda: ResNet((16, 32, 64), (3, 3, 3), classes=10),
    "vit-digits": lambda: VisionTransformer(
        patch=2, depth=4, heads=4, width=64, classes=10
    ),
    "transformer": lambda: Transformer(
        tokens=65, context=CONTEXT, depth=2, heads=4, width=64
    ),
}

Matrices = Sequence[Matrix]
Arm = Callable[[Any, Matrices], optax.GradientTransformation]


def _then_sgd(first: Callable[[Matrices], optax.GradientTransformation]) -> Arm:
    """The paper's order: a direction, coupled decay, momentum."""
    return lambda rate, matrices: optax.chain(
        first(matrices),
        optax.add_decayed_weights(5e-4),
        optax.sgd(rate, momentum=0.9),
    )


def _momentum_first(rate: Any, matrices: Matrices) -> optax.GradientTransformation:
    return optax.chain(
        optax.trace(0.9),
        oialr.orthogonal.orthogonalize(matrices=matrices),
        optax.add_decayed_weights(5e-4),
        optax.scale_by_learning_rate(rate),
    )


ARMS: Mapping[str, Arm] = {
    "sgd": _then_sgd(lambda _: optax.identity()),
    "normalize_tensor": _then_sgd(
        lambda x: oialr.orthogonal.normalize_tensor(matrices=x)
    ),
    "normalize_components": _then_sgd(
        lambda x: oialr.orthogonal.normalize_components(matrices=x)
    ),
    "orthogonal": _then_sgd(lambda x: oialr.orthogonal.orthogonalize(matrices=x)),
    "orthogonal, svd": _then_sgd(
        lambda x: oialr.orthogonal.orthogonalize("svd", matrices=x)
    ),
    "orthogonal, svd filled": _then_sgd(
        lambda x: oialr.orthogonal.orthogonalize("svd", fill=True, matrices=x)
    ),
    "orthogonal but the head": _then_sgd(
        lambda x: oialr.orthogonal.orthogonalize(matrices=x[:-1])
    ),
    "momentum, then orthogonal": _momentum_first,
    "swan": lambda rate, x: oialr.orthogonal.swan(rate, x[:-1], rms=optimizers.RMS),
    "muon": lambda rate, x: oialr.orthogonal.core_muon(
        rate, x[:-1], rms=optimizers.RMS
    ),
    "adam": lambda rate, _: optax.adam(rate),
}


DECAYS: Mapping[str, float] = {
    "adamw": 1.0,
    "adam": 0.0,
    "sgd": 5e-4,
    "orthogonal_sgd": 5e-4,
    "muon": 1.0,
    "swan": 1.0,
    "spectral_trust_region": 0.1,
}
"""Of each optimizer by name, on digits; there is none on characters."""


class Program:
    """Everything of one kind that is compiled, for any rate and seed."""

    def __init__(self, kind: Kind, data: Data) -> None:
        """Find the matrices; compile when first run."""
        self.kind, self.data = kind, data
        self.model = names.find("model", kind.model, MODELS)()
        variables = jax.eval_shape(
            self.model.init, jax.random.key(0), data.train.image[:1]
        )
        params, rest = _split(variables)
        found = oialr.find_matrices(
            self.forward, params, rest, data.train.image[: kind.batch]
        )
        self.matrices = tuple(found)
        if kind.named:
            self.matrices = oialr.select(found)
        self.initial = jax.jit(self.created)
        self.stepped = jax.jit(self.step, donate_argnums=0)
        self.compiled: dict[Any, Any] = {}
        self.predicted = jax.jit(
            lambda params, rest, image: oialr.factored(self.forward)(
                params, rest, image, False
            )[0]
        )

    def forward(
        self, params: Any, rest: Any, image: Array, train: bool = True
    ) -> tuple[Array, Any]:
        """Logits and batch statistics."""
        variables = {"params": params, **rest}
        if not (train and rest):
            return self.model.apply(variables, image), rest
        return self.model.apply(variables, image, train=True, mutable=list(rest))

    def optimizer(self, rate: Any) -> optax.GradientTransformation:
        """The arm at this rate, which may be traced."""
        kind = self.kind
        scheduled = rate
        if kind.cosine:
            shape = optax.warmup_cosine_decay_schedule(
                0.0, 1.0, kind.steps // 20, decay_steps=kind.steps
            )
            scheduled = lambda count: rate * shape(count)  # noqa: E731
        if kind.named:
            decay = DECAYS[kind.arm] if kind.data == "digits" else 0.0
            inner = optimizers.build(kind.arm, scheduled, decay, self.matrices)
        else:
            inner = names.find("arm", kind.arm, ARMS)(scheduled, self.matrices)
        return oialr.freeze_bases(inner)

    def created(self, key: Array) -> Any:
        """Params, statistics and optimizer state of a new run."""
        params, rest = _split(self.model.init(key, self.data.train.image[:1]))
        return params, rest, self.optimizer(0.0).init(params)

    def step(self, carry: Any, rate: Array, rows: Array, train: Part) -> Any:
        """The same after one batch, the images with these numbers."""
        tx = self.optimizer(rate)
        forward = oialr.factored(self.forward)

        def loss(params: Any, rest: Any) -> Any:
            logits, rest = forward(params, rest, train.image[rows])
            entropy = optax.softmax_cross_entropy_with_integer_labels(
                logits, train.label[rows]
            )
            return jnp.mean(entropy), rest

        params, rest, state = carry
        (_, rest), grads = oialr.value_and_grad(loss, has_aux=True)(params, rest)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), rest, state

    def phase(self, carry: Any, rate: float, order: np.ndarray) -> tuple[Any, float]:
        """Host side: all steps in `order`, and their seconds, compiling apart."""
        shapes = jax.tree.structure(carry), str(jax.tree.map(jnp.shape, carry))
        traced, train = jnp.float32(rate), self.data.train
        if shapes not in self.compiled:
            lowered = self.stepped.lower(carry, traced, order[0], train)
            self.compiled[shapes] = lowered.compile()
        step = self.compiled[shapes]
        start = time.perf_counter()
        for rows in order:
            carry = step(carry, traced, rows, train)
        carry = jax.block_until_ready(carry)
        return carry, time.perf_counter() - start

    def run(self, rate: float, seed: int) -> dict[str, Any]:
        """Host side: train, in two phases if there is a rank, and evaluate."""
        kind = self.kind
        carry = self.initial(jax.random.key(seed))
        order = batches(seed, len(self.data.train.label), kind.batch, kind.steps)
        seconds = 0.0
        if kind.rank is not None:
            dense = kind.steps // 3
            carry, seconds = self.phase(carry, rate, order[:dense])
            carry, order = self.converted(carry, kind.rank), order[dense:]
        (params, rest, _), more = self.phase(carry, rate, order)
        accuracy, loss = self.evaluated(params, rest, self.data.test)
        return {
            "validation": self.evaluated(params, rest, self.data.validation)[0],
            "accuracy": accuracy,
            "loss": loss,
            "seconds": seconds + more,
            "ms_per_step": 1e3 * more / len(order),
        }

    def converted(self, carry: Any, rank: float) -> Any:
        """Host side: the same with every matrix at this part of its full rank."""
        params, rest, state = carry
        ranks = {x.path: max(1, round(rank * min(x.m, x.n))) for x in self.matrices}
        params, state, _ = oialr.factorize(
            params, state, self.matrices, tx=self.optimizer(0.0), rank=ranks
        )
        return params, rest, state

    def evaluated(self, params: Any, rest: Any, part: Part) -> tuple[float, float]:
        """Host side: accuracy and mean loss; the loss of what diverged is infinite."""
        starts = range(0, len(part.label), 1000)
        pieces = [
            self.predicted(params, rest, part.image[i : i + 1000]) for i in starts
        ]
        logits = np.concatenate(pieces)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, part.label)
        loss = float(jnp.mean(entropy))
        accuracy = float(np.mean(np.argmax(logits, -1) == np.asarray(part.label)))
        finite = bool(np.isfinite(loss))
        return (accuracy, loss) if finite else (0.0, float("inf"))


class Unlabelled:
    """The same for a task of `train.selfsup`."""

    def __init__(self, kind: Kind, data_dir: pathlib.Path) -> None:
        """Find the convolutions; compile when first run."""
        preset = selfsup.PRESETS[kind.data][1]
        self.kind = kind
        self.settings = dataclasses.replace(
            preset, batch=kind.batch, steps=kind.steps, data_dir=data_dir, mesh="data=1"
        )
        self.task = selfsup.task(self.settings)
        key = jax.random.key(0)
        extra = dict(jax.eval_shape(self.task.init, key))
        params = extra.pop("params")
        found = oialr.find_matrices(
            self.task.loss, params, extra, self.task.batch(0), key
        )
        self.matrices = oialr.select(found, dense_last=preset.dense_last)
        self.initial = jax.jit(self.created)
        self.stepped = jax.jit(self.step, donate_argnums=0)

    def created(self, key: Array) -> Any:
        """Params, statistics and optimizer state of a new run."""
        params, rest = _split(self.task.init(key))
        return params, rest, self.optimizer(0.0).init(params)

    def optimizer(self, rate: Any) -> optax.GradientTransformation:
        """The arm at this rate, which may be traced."""
        return names.find("arm", self.kind.arm, ARMS)(rate, self.matrices)

    def step(self, carry: Any, rate: Array, batch: Any, key: Array) -> Any:
        """The same after one batch, and its loss."""
        params, rest, state = carry
        grad = jax.value_and_grad(self.task.loss, has_aux=True)
        (value, (rest, _)), grads = grad(params, rest, batch, key)
        updates, state = self.optimizer(rate).update(grads, state, params)
        return (optax.apply_updates(params, updates), rest, state), value

    def run(self, rate: float, seed: int) -> dict[str, Any]:
        """Host side: train and evaluate."""
        key = jax.random.key(seed)
        batch = selfsup.task(dataclasses.replace(self.settings, seed=seed)).batch
        carry, losses = self.initial(key), []
        start = time.perf_counter()
        for t in range(self.kind.steps):
            noise = jax.random.fold_in(key, t)
            carry, value = self.stepped(carry, jnp.float32(rate), batch(t), noise)
            losses.append(float(value))
        seconds = time.perf_counter() - start
        late = float(np.mean(losses[-max(1, self.kind.steps // 10) :]))
        params, rest, _ = carry
        tx = self.optimizer(0.0)
        state = recipe.State.create(apply_fn=None, params=params, tx=tx, extra=rest)
        diverged = not np.isfinite(late)
        return {
            "validation": -np.inf if diverged else -late,
            "accuracy": 0.0 if diverged else self.task.evaluate(state)["accuracy"],
            "loss": late,
            "seconds": seconds,
            "ms_per_step": 1e3 * seconds / self.kind.steps,
        }


def _split(variables: Mapping[str, Any]) -> tuple[Any, Any]:
    rest = dict(variables)
    return rest.pop("params"), rest


def batches(seed: int, count: int, batch: int, steps: int) -> np.ndarray:
    """Rows of each step: every epoch a new order, without what is left at its end."""
    if not 1 <= batch <= count:
        raise ValueError(f"`batch` must be in [1, {count}], got {batch}")
    random, whole = np.random.default_rng(seed), count // batch
    orders = [random.permutation(count) for _ in range(-(-steps // whole))]
    rows = [order[: whole * batch].reshape(-1, batch) for order in orders]
    return np.concatenate(rows)[:steps]


# Which runs


MAIN = ("sgd", "normalize_tensor", "normalize_components", "orthogonal")


def kinds(study: str) -> list[Kind]:
    """What a study compares.

    Raises:   ValueError: there is no study of this name.
    """
    cnn = functools.partial(Kind, "digits", "BasicCNN")
    deep = functools.partial(Kind, "digits", batch=256, steps=40)
    controlled = ("sgd", "normalize_components", "orthogonal")
    epochs = {4: 1, 16: 1, 64: 4, 256: 6}
    table: dict[str, list[Kind]] = {
        "digits": [cnn(x, 256, 24) for x in ARMS],
        "cosine": [cnn(x, 256, 120, cosine=True) for x in ARMS],
        "fashion": [
            Kind("fashion", "BasicCNN", x, 256, 156)
            for x in (*MAIN, "orthogonal but the head")
        ],
        "cores": [
            Kind("digits", "vit-digits", x, 64, 400, cosine=True, named=True, rank=0.25)
            for x in DECAYS
        ],
        "dense": [
            Kind("digits", "vit-digits", x, 64, 400, cosine=True, named=True)
            for x in ("adamw", "adam", "orthogonal_sgd", "muon")
        ],
        "text": [
            Kind("shakespeare", "transformer", x, 16, 200, cosine=True, named=True)
            for x in ("adamw", "muon", "swan")
        ],
        "selfsup": [Kind("digits", "barlow-twins", x, 256, 67) for x in MAIN],
    }
    table |= {
        f"batch-{b}": [
            cnn(x, b, n * 1149 // b) for x in (*MAIN, "momentum, then orthogonal")
        ]
        for b, n in epochs.items()
    }
    table |= {
        f"depth-{n}": [deep(f"ResNet-{n}", arm=x) for x in controlled] for n in (8, 20)
    }
    return names.find("study", study, table)


STUDIES = (
    "digits",
    *(f"batch-{b}" for b in (4, 16, 64, 256)),
    "cores",
    "cores-time",
    "cosine",
    "quadratic",
    "depth-8",
    "selfsup",
    "dense",
    "fashion",
    "text",
    "depth-20",
)


def missing(record: pathlib.Path, runs: Iterable[Run]) -> Iterator[Run]:
    """Host side: those of the runs that the file does not have, kinds together."""
    done = {identity(row) for row in read(record)}
    return (x for x in runs if identity(as_row(x)) not in done)


def as_row(run: Run) -> dict[str, Any]:
    """What a line of the record says of the run itself."""
    own = {"study": run.study, "rate": run.rate, "seed": run.seed}
    return own | dataclasses.asdict(run.kind)


OWN = ("study", "rate", "seed", *(x.name for x in dataclasses.fields(Kind)))
"""What a line of the record says of the run itself."""


def identity(row: Mapping[str, Any]) -> str:
    """The same for lines of the same run."""
    return json.dumps([row[x] for x in OWN])


def read(record: pathlib.Path) -> list[dict[str, Any]]:
    """Host side: the lines of the record, none if there is no file."""
    if not record.exists():
        return []
    return [
        {**row, "validation": _or(row["validation"], -np.inf)}
        | {"loss": _or(row["loss"], np.inf)}
        for row in files.lines(record, {*OWN, "validation", "accuracy", "loss"})
    ]


def _or(x: float | None, infinite: float) -> float:
    """What was not finite is null in the record."""
    return infinite if x is None else x


def perform(runs: Sequence[Run], settings: Settings) -> None:
    """Host side: train what is missing; every run is a line when it has ended."""
    if settings.out.exists():
        files.mend(settings.out)
    todo = list(missing(settings.out, runs))
    program: Program | Unlabelled | None = None
    for run in tqdm(todo, runs[0].study, leave=False):
        if program is None or program.kind != run.kind:
            if run.kind.model == "barlow-twins":
                program = Unlabelled(run.kind, settings.data_dir)
            else:
                program = Program(run.kind, load(run.kind.data, settings.data_dir))
        row = as_row(run) | program.run(run.rate, run.seed)
        files.append(settings.out, row)


def swept(study: str, seeds: int) -> list[Run]:
    """Every kind at every rate."""
    return [
        Run(study, kind, rate, seed)
        for kind in kinds(study)
        for rate in FEWER.get(study, RATES)
        for seed in range(seeds)
    ]


def as_long(
    rows: Sequence[Mapping[str, Any]], took: Mapping[str, float], seeds: int
) -> list[Run]:
    """The study of cores again, each for as many steps as the time of AdamW allows."""
    best = chosen(rows)
    return [
        Run(
            "cores-time",
            dataclasses.replace(x, steps=round(x.steps * took["adamw"] / took[x.arm])),
            best[x.arm],
            seed,
        )
        for x in kinds("cores")
        for seed in range(seeds)
    ]


def times(data_dir: pathlib.Path, rounds: int = 15) -> dict[str, float]:
    """Host side: seconds of the cores' runs by arm, a third of them dense.

    All take five steps in turn, medians over the rounds.
    """
    timed: list[Callable[[], Any]] = []

    def add(program: Program, carry: Any) -> None:
        order = batches(0, len(program.data.train.label), program.kind.batch, 5)
        holder = [carry]

        def run() -> None:
            holder[0], _ = program.phase(holder[0], 1e-3, order)

        timed.append(run)

    for kind in kinds("cores"):
        program = Program(kind, load(kind.data, data_dir))
        for low in (False, True):
            carry = program.initial(jax.random.key(0))
            add(program, program.converted(carry, kind.rank or 1.0) if low else carry)
    middle = [x for x, *_ in bench.interleaved(timed, rounds)]
    return {
        kind.arm: kind.steps / 5 * (dense + 2 * low) / 3
        for kind, dense, low in zip(
            kinds("cores"), middle[::2], middle[1::2], strict=True
        )
    }


# Tables


def chosen(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The rate of each arm with the best mean accuracy on held-out training images."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        by_rate = found.setdefault(row["arm"], {})
        by_rate.setdefault(row["rate"], []).append(row["validation"])
    return {
        arm: max(by_rate, key=lambda x: float(np.mean(by_rate[x])))
        for arm, by_rate in found.items()
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Test accuracy in per cent by arm and rate, mean ± std over seeds; Markdown.

    The column `plateau` counts the rates within one point of the best of the arm.
    """
    rates = sorted({row["rate"] for row in rows})
    best = chosen(rows)
    head = ["arm", *(f"{x:g}" for x in rates), "plateau", "rate", "test", "loss"]
    lines = [[*head, "ms a step"], ["---"] * (len(head) + 1)]
    for arm, rate in best.items():
        mine = [row for row in rows if row["arm"] == arm]

        def values(x: float, name: str, mine: Any = mine) -> list[float]:
            return [row[name] for row in mine if row["rate"] == x]

        means = [float(np.mean(values(x, "accuracy") or [np.nan])) for x in rates]
        wide = sum(x > max(means) - 0.01 for x in means)
        cells = [arm, *(f"{1e2 * x:.1f}" for x in means), str(wide), f"{rate:g}"]
        cells.append(_spread(values(rate, "accuracy"), 1e2, 1))
        cells.append(_spread(values(rate, "loss"), 1, 3))
        cells.append(f"{min(row['ms_per_step'] for row in mine):.1f}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _spread(values: Sequence[float], scale: float, digits: int) -> str:
    mean, deviation = scale * np.mean(values), scale * np.std(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


# The study that trains no network


NOISES = (0.1, 0.5, 2.0, 5.0)
QUADRATIC: Mapping[str, optax.GradientTransformation] = {
    "sgd": optax.trace(0.9),
    "normalize_components": optax.chain(
        oialr.orthogonal.normalize_components(), optax.trace(0.9)
    ),
    "orthogonal": optax.chain(oialr.orthogonal.orthogonalize(), optax.trace(0.9)),
    "momentum, then orthogonal": optax.chain(
        optax.trace(0.9), oialr.orthogonal.orthogonalize()
    ),
}


def quadratic(seeds: int = 16, steps: int = 300, side: int = 16) -> str:
    """The last loss of each order by noise, each at its own rate; Markdown.

    The loss is half the trace of (W - A)ᵀ H (W - A), H with eigenvalues from 0.01 to 1;
    the entries of a gradient have noise of deviation sigma. The rate falls as a cosine
    from one of 13 values; the best by the mean over seeds is shown in brackets.
    """
    rates = jnp.logspace(-4, 0, 13)
    h = jnp.logspace(-2, 0, side)[:, None]
    fall = optax.cosine_decay_schedule(1.0, steps)

    def last(tx: optax.GradientTransformation, sigma: Any, rate: Any, key: Any) -> Any:
        first, *keys = jax.random.split(key, steps + 1)
        target = jax.random.normal(first, (side, side))

        def step(carry: Any, x: Any) -> Any:
            w, state = carry
            t, key = x
            g = h * (w - target) + sigma * jax.random.normal(key, w.shape)
            updates, state = tx.update({"w": g}, state)
            return (w - rate * fall(t) * updates["w"], state), None

        start = jnp.zeros((side, side))
        carry = (start, tx.init({"w": start}))
        (w, _), _ = jax.lax.scan(step, carry, (jnp.arange(steps), jnp.stack(keys)))
        return 0.5 * jnp.sum(h * (w - target) ** 2)

    lines = [["arm", *(f"sigma {x:g}" for x in NOISES)], ["---"] * (1 + len(NOISES))]
    for name, tx in QUADRATIC.items():
        of_seeds = jax.vmap(functools.partial(last, tx), (None, None, 0))
        run = jax.jit(jax.vmap(of_seeds, (None, 0, None)))
        cells = [name]
        for sigma in NOISES:
            losses = run(sigma, rates, jax.random.split(jax.random.key(0), seeds))
            best = int(jnp.argmin(jnp.nan_to_num(jnp.mean(losses, 1), nan=jnp.inf)))
            cells.append(f"{_spread(losses[best], 1, 4)} ({rates[best]:.2g})")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: train what is missing, print the tables."""
    settings = tyro.cli(
        Settings, args=arguments, prog="python -m train.orthogonal_runs"
    )
    try:
        settings = files.with_paths_expanded(settings)
        with files.held(files.writable(settings.out.parent)):
            _main(settings)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _main(settings: Settings) -> None:
    for study in settings.studies or STUDIES:
        if study == "quadratic":
            print(f"\n{study}\n\n{quadratic()}", flush=True)
            continue
        if study == "cores-time":
            rows = [x for x in read(settings.out) if x["study"] == "cores"]
            if not rows:
                raise ValueError("`cores-time` needs the runs of `cores` first")
            took = times(settings.data_dir)
            print({arm: f"{x:.2f} s" for arm, x in took.items()})
            runs = as_long(rows, took, settings.seeds)
        else:
            runs = swept(study, settings.seeds)
        perform(runs, settings)
        wanted = {identity(as_row(x)) for x in runs}
        rows = [x for x in read(settings.out) if identity(x) in wanted]
        print(f"\n{study}\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    process.use_huge_pages()
    main()
