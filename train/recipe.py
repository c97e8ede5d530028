"""One run of any task: the state, the step, events, saves, the record.

A program (`train.images`, `train.forecast`, ...) says what it trains by a `Task`, gives
its presets to `train.command`, and has the rest from here.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.training import train_state
from jaxtyping import Array

import oialr_jax as oialr
from oialr_jax import cost
from oialr_jax.adaptive import Timing
from oialr_jax.lowrank import without_identity
from oialr_jax.matrices import Matrices, Matrix
from oialr_jax.reports import Report
from train import command, files, loop, optimizers, report
from train.settings import (
    S,
    Settings,
    optimizer,
    rank_rule,
    same,
    schedule,
    small,
    stored,
)
from train.tracking import Tracking


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
    layout: oialr.sharding.Layout
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
    if settings.smoke:
        settings = small(settings)
    if settings.resume and settings.overwrite:
        raise ValueError("`resume` goes on and `overwrite` deletes: give one of them")
    folder = files.writable(settings.out / files.expanded(pathlib.Path(name)))
    if settings.compilation_cache is not None:
        command.keep_compiled(settings.compilation_cache)
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
                settings=stored(settings),
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
    before = found.extra.get("progress", {})
    if before.keys() != known or "settings" not in found.extra:
        raise ValueError(
            f"{folder} is no run of this version: choose another --name, or delete it "
            "by --overwrite"
        )
    same(settings, found.extra["settings"], folder)
    progress = loop.Progress(**before)
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


def _split(variables: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any]:
    """Other collections than the params, and the params."""
    extra = {name: x for name, x in variables.items() if name != "params"}
    return extra, variables["params"]


def _whole(part: Any, batch: int) -> Any:
    """Shapes and dtypes of a whole batch, of which this process has a part."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), part
    )
