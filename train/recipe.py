"""One run of any task: the settings, the state, the step, events, saves, the record.

A program (`train.images`, `train.forecast`, ...) says what it trains by a `Task`, gives
its presets to `command`, and has the rest from here.
"""

import dataclasses
import functools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
import tyro
from flax.training import train_state
from jaxtyping import Array

import oialr_jax as oialr
from oialr_jax import cost
from oialr_jax.adaptive import Timing
from oialr_jax.lowrank import without_identity
from oialr_jax.matrices import Matrices, Matrix
from oialr_jax.reports import Report
from train import files, loop, names, optimizers, rates, report
from train.tracking import Tracking


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One run. Times are fractions of it, so that a short run meets every event."""

    method: Literal["oialr", "dense"] = "oialr"
    """Low rank, or the same recipe with every matrix dense."""
    seed: int = 0
    """Of the weights, of noise in the model and of the order of the data."""
    steps: int = 1000
    """Length of the run in batches."""
    batch: int = 64
    """Examples in a batch."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one update of the weights."""
    optimizer: str = "adamw"
    """adamw, adamw_core, adam, sgd, lars, orthogonal_sgd, orthogonal_lars, swan, muon
    or spectral_trust_region; image presets are for adamw, swan and muon."""
    learning_rate: float = 4e-3
    """Peak of the rate: linear warm-up, then what `rate` says."""
    rate: Literal["cosine", "constant", "halving"] = "cosine"
    """What the learning rate does after its warm-up; `halving` is constant for a fifth
    of the run, without warm-up, and halved after each tenth from then on."""
    warmup: float = 0.1
    """When the peak is reached."""
    lowest_rate: float = 0.0
    """Where the cosine ends; above the peak it rises, as in the authors' runs."""
    k_decay: float = 1.0
    """Below one the cosine falls early."""
    rewarm: int = 0
    """Updates over which the rate is warmed up again after each rank event."""
    weight_decay: float = 1.0
    """On matrices only; sgd, orthogonal_sgd and spectral_trust_region decay all."""
    clip: float | None = 1.0
    """Largest norm of all gradients together."""
    ema: float | None = None
    """Decay of a running average of the weights, which is then what is evaluated."""
    delay: float = 1 / 3
    """When the dense warm-up ends; a third is the paper's rule of thumb."""
    every: float = 0.1
    """Time between rank events."""
    layer_step: float = 0.5
    """Share of the layers, last executed first, that each event treats in addition."""
    cutoff: float = 0.3
    """Singular values below this fraction of the largest go."""
    min_rank_share: float = 0.01
    """No rank falls below this part of the short side."""
    max_drop: float = 0.5
    """Part of a rank that one event may drop."""
    multiple: int = 4
    """Ranks are rounded up to this, so that layers share shapes."""
    stop: float = 0.7
    """When the ranks are final."""
    budget: float | None = None
    """Part of all weights that is stored after the conversion, then the only event:
    `every`, `stop`, `layer_step`, `cutoff` and `max_drop` have no meaning."""
    weigh: int = 0
    """Batches before each cut of which the curvature is measured: directions then count
    by what they are worth in loss, and share a `budget` by that. 0 for none."""
    projections: tuple[float, float] | None = None
    """When projections of the dense warm-up begin and the time between them: matrices
    are cut to the ranks that the rule gives them then, and train on, dense."""
    settled: float | None = None
    """Convert and cut a matrix only at events between which the stability of its basis
    was at least this; 1 is a basis that stands still."""
    lag: int = 0
    """Steps between the choice of ranks and the event; meanwhile its step compiles."""
    min_aspect: float = 0.1
    """Matrices narrower than this, short over long side, stay dense."""
    dense_first: int = 0
    """How many of the matrices that run first stay dense."""
    dense_last: int = 1
    """How many of those that run last stay dense."""
    among_eligible: bool = False
    """Count them among the matrices that are wide enough, as the authors' code does."""
    log_every: int = 25
    """Steps between training records."""
    eval_every: int = 100
    """Steps between evaluations on the whole test set."""
    save_every: int = 200
    """Steps between checkpoints; the latest two and the best are kept."""
    patience: int | None = None
    """Evaluations without a better one after which the run ends early."""
    track_every: int | None = None
    """Steps between records of how far every basis has moved; by default none."""
    smoke: bool = False
    """A few steps of a small form on random data: only shows that the program works."""
    resume: bool = False
    """Go on from the last checkpoint, if there is one."""
    overwrite: bool = False
    """Delete what an older run of this name has left."""
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
    """Folder in which JAX keeps compiled programs for the next run. On some CPUs jaxlib
    0.10.1 logs an error for each that it loads, "Target machine feature
    +prefer-no-gather is not supported" (jax issue 38445): a hint for tuning, no missing
    instruction. Where that was tried the program was loaded, computed the same, and
    nothing was compiled anew."""
    name: str | None = None
    """Folder of this run; by default from preset, method, optimizer and seed."""


PLACE_ONLY = frozenset(
    {"data_dir", "out", "name", "compilation_cache", "resume", "overwrite", "mesh"}
    | {"distributed", "coordinator", "processes", "process_id"}
)
"""Settings that do not change what a run computes: a resumed one may have others."""

SMOKE: Mapping[str, Any] = {
    "steps": 12,
    "batch": 8,
    "delay": 1 / 3,
    "every": 0.25,
    "stop": 0.75,
    "layer_step": 1.0,
    "cutoff": 0.9,  # so that ranks surely fall
    "multiple": 1,
    "dense_last": 0,
    "log_every": 4,
    "eval_every": 6,
    "save_every": 4,
}
"""Of every small form: it meets a conversion, a truncation and a checkpoint."""

S = TypeVar("S", bound=Settings)


def small(settings: S, form: Mapping[str, Any] = SMOKE) -> S:
    """The small form of a preset; what it has of weights may lie outside matrices."""
    budget = None if settings.budget is None else 0.7
    return dataclasses.replace(settings, **form, budget=budget)


class State(train_state.TrainState):
    """Params, optimizer state, step, and what else the model keeps."""

    extra: Any = ()
    """Other collections of the model, as batch statistics: what `Task.loss` returns."""
    curvature: Any = None
    """Sums of the batches before a cut."""

    @property
    def averaged(self) -> Any:
        """The params to evaluate: their running average where there is one."""
        averaged = optimizers.averaged(self.params, self.opt_state)
        return without_identity(averaged)  # one program for all bases


@dataclasses.dataclass(frozen=True)
class Task:
    """What a program trains: all that differs between one program and the next.

    Attributes:
        init: key -> {"params": ..., and other collections of the model}, arrays.
        loss: (params, extra, batch, key) -> (mean loss, (new extra, metrics)), pure;
            the model in it knows nothing of low rank.
        batch: the batch of step t, of which this process has `layout.rows`.
        evaluate: state -> numbers over the whole test set.
        goal: the metric among them that counts.
        epoch: steps in one pass through the data.
        layout: where params and batches live.
        forward: (params, extra, *inputs) -> outputs, of a trained model.
        inputs: shapes of one example of these, with a batch axis of size one.
        described: what the summary says beside the settings and results, as the model.
        drawn: like `loss`, a mean whose labels are drawn from the prediction: its
            curvature is the true Fisher. None: that of `loss`, the empirical one.
        terms: of the mean that the loss of a batch is; None: one for each example.
    """

    init: Callable[[Array], Mapping[str, Any]]
    loss: Callable[[Any, Any, Any, Array], tuple[Array, tuple[Any, Mapping[str, Any]]]]
    batch: Callable[[int], Any]
    evaluate: Callable[[State], Mapping[str, float]]
    goal: loop.Goal
    epoch: float
    layout: oialr.Layout
    forward: Callable[..., Any]
    inputs: tuple[jax.ShapeDtypeStruct, ...]
    described: Mapping[str, Any]
    drawn: Callable[[Any, Any, Any, Array], Array] | None = None
    terms: Callable[[Any], int] | None = None


class Begun(NamedTuple):
    """What a run has before its first step; `weights` and `extra` are shapes."""

    weights: Any
    extra: Any
    found: Matrices
    matrices: tuple[Matrix, ...]
    tx: optax.GradientTransformation
    create: Callable[[Array], State]
    loss: Callable[..., Any]
    noise: Array
    key: Array


def begun(settings: Settings, task: Task) -> Begun:
    """Host side: the matrices, the optimizer and the state of a run, not yet computed.

    Raises:   ValueError: a setting out of range, an unknown optimizer.
    """
    key = jax.random.key(settings.seed)
    noise = jax.random.fold_in(key, 1)
    extra, weights = _split(jax.eval_shape(task.init, key))
    given = (_whole(task.batch(0), settings.batch), jax.eval_shape(lambda: noise))
    found = oialr.find_matrices(task.loss, weights, extra, *given)
    matrices = oialr.select(
        found,
        min_aspect=settings.min_aspect,
        dense_first=settings.dense_first,
        dense_last=settings.dense_last,
        among_eligible=settings.among_eligible,
    )
    tx = optimizer(settings, matrices)
    if settings.method == "oialr" and settings.settled is not None:
        tx = optax.chain(tx, oialr.stability.keep_reference())
    tx = oialr.freeze_bases(tx)
    loss = oialr.factored(task.loss)

    def create(key: Array) -> State:
        extra, params = _split(task.init(key))
        state = State.create(apply_fn=loss, params=params, tx=tx, extra=extra)
        return state.replace(step=jnp.zeros((), jnp.int32))

    return Begun(weights, extra, found, matrices, tx, create, loss, noise, key)


def run(settings: S, build: Callable[[S], Task], *, name: str) -> dict[str, Any]:
    """Host side: train, record, plot; the summary that was written.

    Raises:   ValueError: a setting out of range, an unknown name, a run too short for
              its schedule. FileNotFoundError: the dataset is not prepared.
              FileExistsError: `name` is another run's, or of one that goes on now.
              FloatingPointError: the loss is no longer finite.
    """
    started = time.perf_counter()
    if settings.resume and settings.overwrite:
        raise ValueError("`resume` goes on and `overwrite` deletes: give one of them")
    folder = files.writable(settings.out / files.expanded(pathlib.Path(name)))
    if settings.compilation_cache is not None:
        keep_compiled(settings.compilation_cache)
    pace = loop.Pace(
        settings.steps, settings.log_every, settings.eval_every, settings.save_every
    )
    plan = schedule(settings) if settings.method == "oialr" else None
    task = build(settings)
    parts = begun(settings, task)
    rule = rank_rule(settings, parts.weights, parts.matrices)
    tracking = _tracking(settings, task, parts, plan)

    def batch(t: int) -> Any:
        return task.layout.put_batch(task.batch(t), settings.batch)

    with files.held(folder):
        found, progress = _restored(settings, task, parts, folder)
        started -= progress.seconds
        saved = folder / files.CHECKPOINTS
        with (
            loop.Interrupts() as interrupts,
            oialr.Checkpoints(saved, best=task.goal.best) as checkpoints,
        ):
            state = found
            if state is None:
                state = task.layout.initialize(parts.create, parts.key)
            step: Any = _step(parts)
            reports: Sequence[Report] = []
            timings: Sequence[Timing] = []
            if plan is not None:
                step = _adaptive(settings, task, parts, plan, rule)
                reports, timings = step.reports, step.timings
            else:
                places = (task.layout(state), None)
                jitted = jax.jit(step, donate_argnums=0, out_shardings=places)
                step = jitted.lower(state, batch(0)).compile()  # once, for all
            since = 0 if plan is None else plan.delay + plan.lag
            state, progress = loop.train(
                state,
                step,
                batch,
                task.evaluate,
                pace=pace,
                goal=dataclasses.replace(
                    task.goal, patience=settings.patience, since=since
                ),
                folder=folder,
                checkpoints=checkpoints,
                settings=_stored(settings),
                interrupts=interrupts,
                progress=progress,
                reports=reports,
                tracking=tracking,
                flops=functools.partial(_flops, parts.found),
            )
        summary = {
            **_result(settings, task, parts, state, progress),
            **_times(time.perf_counter() - started, progress, timings),
            "compilations": getattr(step, "compilations", 1),
        }
        files.finish(folder, summary)
        if jax.process_index() == 0:
            report.draw(folder)
    return summary


def _step(parts: Begun) -> Callable[[State, Any], tuple[State, Any]]:
    def train_step(state: State, batch: Any) -> tuple[State, Any]:
        grad = oialr.value_and_grad(parts.loss, has_aux=True)
        drawn = jax.random.fold_in(parts.noise, state.step)
        (value, (extra, metrics)), grads = grad(state.params, state.extra, batch, drawn)
        state = state.apply_gradients(grads=grads, extra=extra)
        return state, {"loss": value, **metrics}

    return train_step


def _adaptive(
    settings: Settings,
    task: Task,
    parts: Begun,
    plan: oialr.Schedule,
    rule: oialr.RankRule,
) -> Any:
    due = None
    if settings.settled is not None:
        due = oialr.stability.when_settled(settings.settled)
    return oialr.adaptive(
        _step(parts),
        parts.tx,
        parts.matrices,
        plan,
        rule,
        due=due,
        weighing=weighing(settings, task, parts.noise),
        layout=task.layout,
    )


def _tracking(
    settings: Settings, task: Task, parts: Begun, plan: oialr.Schedule | None
) -> Tracking | None:
    if settings.track_every is None:
        return None
    return Tracking(
        parts.found,
        every=settings.track_every,
        steps=settings.steps,
        epoch=task.epoch,
        seed=settings.seed,
        alone=lambda t: plan is not None and plan.acts(t),
    )


def _restored(
    settings: Settings, task: Task, parts: Begun, folder: pathlib.Path
) -> tuple[State | None, loop.Progress]:
    """Host side: the state to go on from, if any, with the record as it was then."""
    found = None
    if settings.resume:
        template = jax.eval_shape(parts.create, parts.key)
        with oialr.Checkpoints(folder / files.CHECKPOINTS) as checkpoints:
            found = checkpoints.restore(template, parts.tx, task.layout)
    if found is None:
        files.begin(folder, overwrite=settings.overwrite)
        return None, loop.Progress()
    known = {x.name for x in dataclasses.fields(loop.Progress)}
    stored = found.extra.get("progress", {})
    if stored.keys() != known or "settings" not in found.extra:
        raise ValueError(
            f"{folder} is no run of this version: choose another --name, or delete it "
            "by --overwrite"
        )
    _same(settings, found.extra["settings"], folder)
    progress = loop.Progress(**stored)
    files.resume(folder, progress.bytes)
    return found.state, progress


def _flops(matrices: Sequence[Matrix], params: Any) -> int:
    """Of a step with these params, in the matrices."""
    rates, held = cost.RATES.get(jax.default_backend()), oialr.ranks(params)
    ranks = [held[x.path][2] if x.path in held else None for x in matrices]
    each = zip(matrices, ranks, strict=True)
    return sum(matrix.flops(rank, rates) for matrix, rank in each)


def _result(
    settings: Settings, task: Task, parts: Begun, state: Any, progress: loop.Progress
) -> dict[str, Any]:
    """What a run came to, for its summary."""
    count = oialr.counts(state.params)
    return {
        **task.described,
        "method": settings.method,
        "optimizer": settings.optimizer,
        "seed": settings.seed,
        "steps": int(state.step),
        **{f"test_{name}": value for name, value in progress.evaluation.items()},
        "metric": task.goal.metric,
        "best": dict(progress.best),
        "dense_weights": count.dense,
        "stored_weights": count.stored,
        "trainable_weights": count.trainable,
        "stored_fraction": count.stored / count.dense,
        "trainable_fraction": count.trainable / count.dense,
        "train_flops": progress.flops,
        "dense_flops": _flops(parts.found, parts.weights) * int(state.step),
        "ranks": oialr.ranks(state.params),
    }


def _times(
    wall: float, progress: loop.Progress, timings: Sequence[Timing]
) -> dict[str, float]:
    """Where the time of a run went, in seconds, for its summary."""
    return {
        "wall_seconds": round(wall, 2),
        "event_seconds": round(sum(x.choosing + x.surgery for x in timings), 3),
        "looking_seconds": round(sum(x.looking for x in timings), 3),
        "waiting_seconds": round(sum(x.waiting for x in timings), 3),
        "fetching_seconds": round(progress.fetching, 3),
    }


def weighing(settings: Settings, task: Task, key: Array) -> oialr.Weighing | None:
    """What cuts are weighed by, if they are.

    Raises:   ValueError: a negative number of batches.
    """
    if not settings.weigh:
        return None
    terms = task.terms

    def loss(state: State, batch: Any) -> Array:
        drawn = jax.random.fold_in(key, state.step)
        if task.drawn is not None:
            return task.drawn(state.params, state.extra, batch, drawn)
        return task.loss(state.params, state.extra, batch, drawn)[0]

    return oialr.Weighing(loss, batches=settings.weigh, terms=terms)


def optimizer(
    settings: Settings, matrices: Sequence[Matrix] = ()
) -> optax.GradientTransformation:
    """The optimizer that was asked for, with its rate, clipping and running average.

    Raises:   ValueError: there is none of this name, or a setting out of range.
    """
    if settings.accumulate < 1:
        raise ValueError(f"`accumulate` must be at least 1, got {settings.accumulate}")
    return optimizers.build(
        settings.optimizer,
        learning_rate(settings),
        settings.weight_decay,
        matrices,
        clip=settings.clip,
        ema=settings.ema,
        accumulate=settings.accumulate,
    )


def learning_rate(settings: Settings) -> optax.Schedule:
    """The rate of each update, of which there is one every `accumulate` steps."""
    updates = -(-settings.steps // settings.accumulate)
    warmup = round(settings.warmup * updates)
    base = settings.learning_rate
    if settings.rate == "constant":
        rate = optax.warmup_constant_schedule(0.0, base, warmup)
    elif settings.rate == "halving":
        rate = rates.halving(base, every=max(1, round(updates / 10)))
    else:
        rate = rates.cosine(
            base,
            length=max(1, updates - warmup),
            lowest=settings.lowest_rate,
            warmup=warmup,
            k=settings.k_decay,
        )
    if settings.rewarm and settings.method == "oialr":
        steps = schedule(settings).events(settings.steps)
        events = [t // settings.accumulate for t in steps]
        rate = rates.rewarmed(rate, events, length=settings.rewarm)
    return rate


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
    if settings.budget is not None:
        stop = delay + 1
    if stop <= delay:
        raise ValueError(
            f"no step is left for low rank: `delay` {settings.delay:.3g} and `stop` "
            f"{settings.stop:.3g} are steps {delay} and {stop} of {settings.steps}"
        )
    projections: Sequence[int] = ()
    if settings.projections is not None:
        first, between = settings.projections
        if not (0 <= first < settings.delay and 0 < between <= 1):
            raise ValueError(
                "`projections` must begin in [0, `delay` "
                f"{settings.delay:.3g}) and be (0, 1] apart, parts of the run; got "
                f"{first} {between}"
            )
        first, between = (round(settings.steps * x) for x in (first, between))
        projections = range(first, delay, max(1, between))
    return oialr.Schedule(
        delay=delay,
        every=max(1, every),
        projections=projections,
        layer_step=settings.layer_step,
        lag=settings.lag,
        stop=stop,
    )


def rank_rule(
    settings: Settings, params: Any, matrices: Sequence[Matrix]
) -> oialr.RankRule:
    """Which ranks stay; of a budget the weights outside the `matrices` are taken first.

    Raises:   ValueError: a setting out of range, or nothing left for the matrices.
    """
    budget = None
    if settings.budget is not None:
        if not 0 < settings.budget <= 1:
            raise ValueError(
                "`budget` must be in (0, 1], part of all weights; "
                f"got {settings.budget}"
            )
        whole = oialr.counts(params).dense
        other = whole - sum(math.prod(x.axes.shape) for x in matrices)
        budget = int(settings.budget * whole) - other
        if budget < 1:
            raise ValueError(
                f"`budget` {settings.budget} of {whole} weights leaves nothing for the "
                f"matrices: {other} weights stay dense"
            )
    return oialr.RankRule(
        cutoff=settings.cutoff,
        min_rank_share=settings.min_rank_share,
        max_drop=settings.max_drop,
        multiple=settings.multiple,
        budget=budget,
        by="loss" if settings.weigh and budget is not None else "value",
    )


def keep_compiled(folder: pathlib.Path) -> None:
    """Host side: JAX keeps compiled programs in `folder`, for this run and the next."""
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def command(
    program: str,
    presets: Mapping[str, tuple[str, S]],
    run: Callable[..., Mapping[str, Any]],
    arguments: Sequence[str] | None = None,
) -> None:
    """Host side: read the command line, run, say the result in one line.

    Args:     program: as it is called, "python -m train.images".
              run: (settings, name=) -> summary.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments and not arguments[0].startswith("-"):
            names.find("preset", arguments[0], presets)
        settings = tyro.extras.overridable_config_cli(
            dict(presets), args=arguments, prog=program
        )
        usual = f"{arguments[0]}-{settings.method}-seed{settings.seed}"
        if settings.optimizer != "adamw":
            usual += f"-{settings.optimizer}"
        settings = files.with_paths_expanded(settings)
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
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        sys.exit(f"error: {out_of_memory(settings, error)}")
    if jax.process_index() == 0:
        results = (
            f"{name[5:]} " + ("not finite" if value is None else f"{value:.4g}")
            for name, value in files.nulled(summary).items()
            if name.startswith("test_")
        )
        print(
            f"{name}: {', '.join(results)} on the test set, "
            f"{summary['stored_fraction']:.1%} of the dense weights stored, "
            f"{summary['trainable_fraction']:.1%} trained, "
            f"{summary['wall_seconds']:.0f} s, {settings.out / name}"
        )


def out_of_memory(settings: Settings, error: Exception) -> str:
    """What was too much: the batch, and the largest arrays that there are."""
    largest = sorted(jax.live_arrays(), key=lambda x: x.nbytes, reverse=True)[:3]
    arrays = ", ".join(
        f"{x.dtype}{list(x.shape)} of {x.nbytes / 2**20:.0f} MiB" for x in largest
    )
    reason = str(error).splitlines()[0]
    return (
        f"out of memory with --batch {settings.batch}: a smaller one, with "
        "--accumulate for the same updates, or --mesh fsdp=-1 need less. The largest "
        f"arrays: {arrays}. {reason}"
    )


def _split(variables: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any]:
    """Other collections than the params, and the params."""
    extra = {name: x for name, x in variables.items() if name != "params"}
    return extra, variables["params"]


def _whole(part: Any, batch: int) -> Any:
    """Shapes and dtypes of a whole batch, of which this process has a part."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), part
    )


def _stored(settings: Settings) -> dict[str, Any]:
    """Settings that a resumed run must share, as JSON holds them."""
    values = dataclasses.asdict(settings)
    kept = {name: x for name, x in values.items() if name not in PLACE_ONLY}
    return {k: list(x) if isinstance(x, tuple) else x for k, x in kept.items()}


def _same(settings: Settings, stored: Mapping[str, Any], folder: pathlib.Path) -> None:
    given = _stored(settings)
    different = [
        f"{name.replace('_', '-')} was {stored.get(name)} and is {given.get(name)}"
        for name in sorted(given.keys() | stored.keys())
        if given.get(name) != stored.get(name)
    ]
    if different:
        raise ValueError(f"{folder} is another run: {'; '.join(different)}")
