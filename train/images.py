"""Train an image classifier in low rank: python -m train.images PRESET.

Command:   python -m train.images digits            (--method dense for the same, dense)
Hardware:  two CPU cores, jax 0.10.2
Wall time: 38 s (dense 28 s), compilation included
Result:    mean ± standard deviation of the test accuracy over seeds 2, 3 and 4
           oialr  97.7 ± 0.3 %, 28 % of the dense weights stored, 4 % trained
           dense  98.3 ± 0.3 %

Command:   python -m train.images fashion --data-dir data     (train.data.prepare first)
Hardware:  the same
Wall time: 102 s (dense 91 s)
Result:    over seeds 0, 1 and 2
           oialr  90.3 ± 0.1 %, 21 % of the dense weights stored, 2 % trained
           dense  91.5 ± 0.2 %

A run writes metrics.jsonl (the record), checkpoints/, summary.json and plots/ into
runs/NAME. After SIGTERM, a kill or a crash the same command with --resume goes on, bit
for bit. Several devices share each batch (--mesh); for several hosts see train/tpu/.
"""

import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

import oialr_jax as oialr
from train import loop, names, optimizers, process, report
from train.data.arrays import Batch, Images, batches, standardize
from train.models.lenet5 import LeNet5
from train.models.vit import VisionTransformer
from train.tracking import Tracking


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run. Times are fractions of it, so that a short run meets every event."""

    dataset: str
    """digits, fashion_mnist or mnist."""
    model: str
    """vit-digits, mini-vit-digits or lenet5."""
    method: Literal["oialr", "dense"] = "oialr"
    """Low rank, or the same recipe with every matrix dense."""
    seed: int = 0
    """Of the weights and of the order of the data."""
    steps: int = 1000
    """Length of the run in batches."""
    batch: int = 64
    """Images in a batch."""
    optimizer: str = "adamw"
    """adamw, sgd, orthogonal_sgd, swan, spectral_trust_region or muon; rates and decays
    of the presets are for adamw, swan and muon, see train/optimizers.py."""
    learning_rate: float = 4e-3
    """Peak of the rate: linear warm-up, then cosine to zero."""
    warmup: float = 0.1
    """When the peak is reached."""
    weight_decay: float = 1.0
    """On matrices only; sgd, orthogonal_sgd and spectral_trust_region decay all."""
    smoothing: float = 0.1
    """Part of each training label that is spread over all classes."""
    delay: float = 1 / 3
    """When the dense warm-up ends; a third is the paper's rule of thumb."""
    every: float = 0.1
    """Time between rank events."""
    layer_step: float = 0.5
    """Share of the layers, last executed first, that each event treats in addition."""
    cutoff: float = 0.3
    """Singular values below this fraction of the largest go."""
    multiple: int = 4
    """Ranks are rounded up to this, so that layers share shapes."""
    stop: float = 0.7
    """When the ranks are final."""
    when: Literal["delay", "stable"] = "delay"
    """Convert all matrices after `delay`; or from then on each one when its basis has
    turned little between two events, and cut it only then."""
    threshold: float = 0.98
    """The least stability of a basis that counts as little; 1 is none."""
    lag: int = 0
    """Steps between the choice of ranks and the event; meanwhile its step compiles."""
    min_aspect: float = 0.1
    """Matrices narrower than this, short over long side, stay dense."""
    rate: Literal["cosine", "constant"] = "cosine"
    """What the learning rate does after its warm-up."""
    log_every: int = 25
    """Steps between training records."""
    eval_every: int = 100
    """Steps between evaluations on the whole test set."""
    save_every: int = 200
    """Steps between checkpoints; the latest two and the most accurate are kept."""
    track_every: int | None = None
    """Steps between records of how far every basis has moved; by default none."""
    resume: bool = False
    """Go on from the last checkpoint, if there is one."""
    mesh: str = "data=-1"
    """Axes and sizes, -1 for the rest of the devices: `data` divides batches, `fsdp`
    batches, weights and optimizer state, `model` the wide side of each block."""
    distributed: bool = False
    """One of several processes: found out from Cloud TPU, Slurm or Open MPI, or from
    the next three."""
    coordinator: str | None = None
    """HOST:PORT of process 0."""
    processes: int | None = None
    """How many there are."""
    process_id: int | None = None
    """Which one this is, from 0."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Where `python -m train.data.prepare` put the dataset."""
    out: pathlib.Path = pathlib.Path("runs")
    """Runs go to folders in here."""
    compilation_cache: pathlib.Path | None = None
    """Folder in which JAX keeps compiled programs for the next run."""
    name: str | None = None
    """Folder of this run; by default from preset, method, optimizer and seed."""


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
}

PLACE_ONLY = frozenset(
    {"data_dir", "out", "name", "compilation_cache", "resume", "mesh", "distributed"}
    | {"coordinator", "processes", "process_id"}
)
"""Settings that do not change what a run computes: a resumed one may have others."""

MODELS: Mapping[str, Callable[[int], nn.Module]] = {
    "vit-digits": lambda classes: VisionTransformer(
        patch=2, depth=4, heads=4, width=64, classes=classes
    ),
    "mini-vit-digits": lambda classes: VisionTransformer(
        patch=2, depth=6, heads=6, width=768, classes=classes, qkv_bias=False
    ),
    "lenet5": lambda classes: LeNet5(classes=classes),
}


def _digits(data_dir: pathlib.Path) -> Images:
    from train.data import digits  # scikit-learn takes a second to import

    del data_dir  # embedded
    return digits.load()


def _idx(name: str, data_dir: pathlib.Path) -> Images:
    from train.data import fashion_mnist  # needs tensorflow-datasets, digits do not

    return fashion_mnist.load(data_dir, name)


DATASETS: Mapping[str, Callable[[pathlib.Path], Images]] = {
    "digits": _digits,
    "fashion_mnist": functools.partial(_idx, "fashion_mnist"),
    "mnist": functools.partial(_idx, "mnist"),
}

EVALUATION_BATCH = 500
"""One piece of the digits, a divisor of the others: one shape is compiled per ranks."""


def run(settings: Settings, *, name: str) -> dict[str, Any]:
    """Host side: train, record, plot; the summary that was written.

    Raises:   ValueError: a setting out of range, an unknown dataset or model, a run
              too short for its schedule. FileNotFoundError: the dataset is not
              prepared. FloatingPointError: the loss is no longer finite.
    """
    started = time.perf_counter()
    if settings.compilation_cache is not None:
        keep_compiled(settings.compilation_cache)
    pace = loop.Pace(
        settings.steps, settings.log_every, settings.eval_every, settings.save_every
    )
    if settings.method == "oialr":
        plan = schedule(settings)
    build = names.find("model", settings.model, MODELS)
    data = names.find("dataset", settings.dataset, DATASETS)(settings.data_dir)
    mesh = oialr.make_mesh(settings.mesh)
    layout = oialr.Layout(mesh, rules(mesh, settings.model))
    stream = batches(
        data.train_image,
        data.train_label,
        batch=settings.batch,
        seed=settings.seed,
        part=layout.rows(settings.batch),
    )
    model = build(len(data.classes))

    def forward(params: Any, image: Array) -> Array:
        x = standardize(image, data.mean, data.deviation)
        return model.apply({"params": params}, x)

    sample = standardize(jnp.asarray(data.train_image[:1]), data.mean, data.deviation)
    factored = oialr.factored(forward)
    weights = jax.eval_shape(model.init, jax.random.key(0), sample)["params"]
    abstract = jax.ShapeDtypeStruct(
        (settings.batch, *data.train_image.shape[1:]), jnp.uint8
    )
    found_matrices = oialr.find_matrices(forward, weights, abstract)
    matrices = oialr.select(found_matrices, min_aspect=settings.min_aspect)
    stable = settings.method == "oialr" and settings.when == "stable"
    tx = oialr.freeze_bases(optimizer(settings, matrices), reference=stable)

    def create(key: Array) -> TrainState:
        params = model.init(key, sample)["params"]
        state = TrainState.create(apply_fn=factored, params=params, tx=tx)
        return state.replace(step=jnp.zeros((), jnp.int32))

    key = jax.random.key(settings.seed)
    template = jax.eval_shape(create, key)
    tracking = None
    if settings.track_every is not None:
        tracking = Tracking(
            found_matrices,
            every=settings.track_every,
            steps=settings.steps,
            epoch=len(data.train_label) / settings.batch,
            seed=settings.seed,
        )

    def loss(params: Any, image: Array, label: Array) -> tuple[Array, Array]:
        logits = factored(params, image)
        entropy = cross_entropy(logits, label, settings.smoothing)
        return jnp.mean(entropy), jnp.mean(jnp.argmax(logits, -1) == label)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Any]:
        grad = oialr.value_and_grad(loss, has_aux=True)
        (value, accuracy), grads = grad(state.params, batch["image"], batch["label"])
        state = state.apply_gradients(grads=grads)
        return state, {"loss": value, "accuracy": accuracy}

    def batch(t: int) -> Batch:
        return layout.put_batch(stream[t], settings.batch)

    folder = settings.out / name
    found = None
    if settings.resume:
        with oialr.Checkpoints(folder / loop.CHECKPOINTS) as checkpoints:
            found = checkpoints.restore(template, tx, layout)
    if found is None:
        loop.begin(folder)
        progress = loop.Progress()
    else:
        _same(settings, found.extra["settings"], folder)
        progress = loop.Progress(**found.extra["progress"])
        loop.resume(folder, progress)
    before = progress.seconds
    with (
        loop.Interrupts() as interrupts,
        oialr.Checkpoints(folder / loop.CHECKPOINTS, best="max") as checkpoints,
    ):
        state = layout.initialize(create, key) if found is None else found.state
        step: Any
        reports: Sequence[oialr.Report] = []
        timings: Sequence[oialr.Timing] = []
        if settings.method == "oialr":
            rule = oialr.RankRule(cutoff=settings.cutoff, multiple=settings.multiple)
            step = oialr.adaptive(train_step, tx, matrices, plan, rule, layout=layout)
            reports, timings = step.reports, step.timings
        else:
            places = (layout(state), None)
            jitted = jax.jit(train_step, donate_argnums=0, out_shardings=places)
            step = jitted.lower(state, batch(0)).compile()  # once, for all
        state, progress = loop.train(
            state,
            step,
            batch,
            functools.partial(
                evaluate, jax.jit(factored), layout, data, settings.smoothing
            ),
            pace=pace,
            folder=folder,
            checkpoints=checkpoints,
            settings=_stored(settings),
            interrupts=interrupts,
            progress=progress,
            reports=reports,
            tracking=tracking,
        )
    count = oialr.counts(state.params)
    summary = {
        "dataset": settings.dataset,
        "model": settings.model,
        "method": settings.method,
        "optimizer": settings.optimizer,
        "seed": settings.seed,
        "steps": settings.steps,
        "test_accuracy": progress.evaluation["accuracy"],
        "test_loss": progress.evaluation["loss"],
        "dense_weights": count.dense,
        "stored_weights": count.stored,
        "trainable_weights": count.trainable,
        "stored_fraction": count.stored / count.dense,
        "trainable_fraction": count.trainable / count.dense,
        "wall_seconds": round(time.perf_counter() - started + before, 2),
        "event_seconds": round(sum(x.choosing + x.surgery for x in timings), 3),
        "waiting_seconds": round(sum(x.waiting for x in timings), 3),
        "compilations": getattr(step, "compilations", 1),
        "ranks": oialr.ranks(state.params),
    }
    loop.finish(folder, summary)
    if jax.process_index() == 0:
        report.draw(folder)
    return summary


def optimizer(
    settings: Settings, matrices: Sequence[oialr.Matrix] = ()
) -> optax.GradientTransformation:
    """The optimizer that was asked for, with warm-up.

    Raises:   ValueError: there is none of this name.
    """
    warmup = round(settings.warmup * settings.steps)
    if settings.rate == "constant":
        rate = optax.warmup_constant_schedule(0.0, settings.learning_rate, warmup)
    else:
        rate = optax.warmup_cosine_decay_schedule(
            0.0, settings.learning_rate, warmup, decay_steps=settings.steps
        )
    return optimizers.build(settings.optimizer, rate, settings.weight_decay, matrices)


def schedule(settings: Settings) -> oialr.Schedule:
    """When to convert and to truncate, in steps.

    Raises:   ValueError: a fraction outside (0, 1], or none of the run between the
              conversion and the last event.
    """
    for name in ("delay", "every", "stop"):
        value = getattr(settings, name)
        if not 0 < value <= 1:
            raise ValueError(
                f"`{name}` must be in (0, 1], part of the run; got {value}"
            )
    delay, every, stop = (
        round(settings.steps * part)
        for part in (settings.delay, settings.every, settings.stop)
    )
    if stop <= delay:
        raise ValueError(
            f"no step is left for low rank: `delay` {settings.delay:.3g} and `stop` "
            f"{settings.stop:.3g} are steps {delay} and {stop} of {settings.steps}"
        )
    return oialr.Schedule(
        delay=delay,
        every=max(1, every),
        layer_step=settings.layer_step,
        lag=settings.lag,
        stop=stop,
        when=settings.when,
        threshold=settings.threshold,
    )


def keep_compiled(folder: pathlib.Path) -> None:
    """Host side: JAX keeps compiled programs in `folder`, for this run and the next."""
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def cross_entropy(
    logits: Float[Array, "b c"], label: Int[Array, " b"], smoothing: float
) -> Float[Array, " b"]:
    """Of each image, with a part `smoothing` of its label spread over all classes."""
    target = optax.smooth_labels(jax.nn.one_hot(label, logits.shape[-1]), smoothing)
    return optax.softmax_cross_entropy(logits, target)


def evaluate(
    forward: Callable[[Any, Any], Array],
    layout: oialr.Layout,
    data: Images,
    smoothing: float,
    params: Any,
) -> dict[str, float]:
    """Accuracy and mean loss, that of the training, over the whole test set."""
    correct, total = 0.0, 0.0
    count = len(data.test_label)
    size = -(-min(count, EVALUATION_BATCH) // layout.shards) * layout.shards
    part = layout.rows(size)
    for start in range(0, count, size):
        rows = np.arange(start, start + size)[part]
        inside = rows < count
        rows = np.where(inside, rows, 0)  # the last piece is filled up
        local = (data.test_image[rows], data.test_label[rows], inside)
        image, label, counted = layout.put_batch(local, size)
        logits = forward(params, image)
        right, entropy = _sums(logits, label, counted, smoothing)
        correct += float(right)
        total += float(entropy)
    return {"accuracy": correct / count, "loss": total / count}


@functools.partial(jax.jit, static_argnames="smoothing")
def _sums(
    logits: Array, label: Array, counted: Array, smoothing: float
) -> tuple[Array, Array]:
    """Of a batch: how many are right, and the sum of their losses."""
    right = (jnp.argmax(logits, -1) == label) & counted
    entropy = cross_entropy(logits, label, smoothing)
    return jnp.sum(right), jnp.sum(jnp.where(counted, entropy, 0))


def rules(mesh: Mesh, model: str) -> oialr.Rules:
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


def _stored(settings: Settings) -> dict[str, Any]:
    """Settings that a resumed run must share, as JSON holds them."""
    values = dataclasses.asdict(settings)
    return {name: x for name, x in values.items() if name not in PLACE_ONLY}


def _same(settings: Settings, stored: Mapping[str, Any], folder: pathlib.Path) -> None:
    given = _stored(settings)
    different = [
        f"{name.replace('_', '-')} was {stored.get(name)} and is {given.get(name)}"
        for name in sorted(given.keys() | stored.keys())
        if given.get(name) != stored.get(name)
    ]
    if different:
        raise ValueError(f"{folder} is another run: {'; '.join(different)}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: read the command line, run, say the result in one line."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments and not arguments[0].startswith("-"):
            names.find("preset", arguments[0], PRESETS)
        settings = tyro.extras.overridable_config_cli(
            dict(PRESETS), args=arguments, prog="python -m train.images"
        )
        usual = f"{arguments[0]}-{settings.method}-seed{settings.seed}"
        if settings.optimizer != "adamw":
            usual += f"-{settings.optimizer}"
        name = settings.name or usual
        if settings.distributed:
            jax.distributed.initialize(
                settings.coordinator, settings.processes, settings.process_id
            )
        summary = run(settings, name=name)
    except loop.StoppedError as stopped:
        print(f"{stopped}. Go on with the same command and --resume")
        return
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    if jax.process_index() == 0:
        print(
            f"{name}: {summary['test_accuracy']:.2%} of the test set right, "
            f"{summary['stored_fraction']:.1%} of the dense weights stored, "
            f"{summary['trainable_fraction']:.1%} trained, "
            f"{summary['wall_seconds']:.0f} s, {settings.out / name}"
        )


if __name__ == "__main__":
    process.use_huge_pages()
    main()
