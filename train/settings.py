"""What every program lets a user set, and what follows from it alone.

Times are fractions of a run; here they become steps, ranks, rates and optimizers.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import optax

import oialr_jax as oialr
from oialr_jax.matrices import Matrix
from train import optimizers, rates


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


def scaled(width: int, scale: float, multiple: int = 1) -> int:
    """A width times `scale`, rounded to a multiple, of which it has one at least.

    Raises:   ValueError: `scale` is not positive.
    """
    if not scale > 0:
        raise ValueError(f"`scale` must be positive, got {scale}")
    return max(1, round(scale * width / multiple)) * multiple


def small(settings: S) -> S:
    """The small form of a preset; what it has of weights may lie outside matrices."""
    budget = None if settings.budget is None else 0.7
    return dataclasses.replace(settings, **SMOKE, budget=budget)


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


def stored(settings: Settings) -> dict[str, Any]:
    """Settings that a resumed run must share, as JSON holds them."""
    values = dataclasses.asdict(settings)
    kept = {name: x for name, x in values.items() if name not in PLACE_ONLY}
    return {k: list(x) if isinstance(x, tuple) else x for k, x in kept.items()}


def same(settings: Settings, before: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Raise ValueError if the run in `folder` had other settings, each named."""
    given = stored(settings)
    different = [
        f"{name.replace('_', '-')} was {before.get(name)} and is {given.get(name)}"
        for name in sorted(given.keys() | before.keys())
        if given.get(name) != before.get(name)
    ]
    if different:
        raise ValueError(f"{folder} is another run: {'; '.join(different)}")
