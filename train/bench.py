"""What low rank costs and saves: python -m train.bench --suite SUITE [--json FILE].

steps    time of a training step: dense, low rank in every order, GaLore and LoRA
events   what conversion and truncations cost, and for how long training stalls
layers   one matrix at a time against the cost model; --calibrate measures its rates
run      the same training run dense and in low rank, wall time in its parts
orthogonal  polar factors by every method, and what they add to a step of a small
         convolutional network; with OPENBLAS_NUM_THREADS=1, or SVDs are slower
tracking  an epoch of the digits preset with and without a record of its bases
decompositions  singular values and vectors of matrices to be converted, by every route

No data is needed. Everything runs in one process; whatever is compared is timed in
turn, once per round, after one untimed step, and the medians are reported.

Results:   train/results/; a suite takes minutes on two CPU cores
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import linen as nn
from flax.training.train_state import TrainState
from jaxtyping import Array

import oialr_jax as oialr
from oialr_jax import cost, linalg, surgery
from oialr_jax.cost import Rates
from oialr_jax.lowrank import Axes, factor
from oialr_jax.transform import with_trainable
from train import files, images, names, peers, process
from train import settings as common
from train.models.basic_cnn import BasicCNN
from train.models.mlp import MLP
from train.models.resnet import ResNet
from train.models.vit import VisionTransformer
from train.tracking import Tracking

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    suite: Literal[
        "steps",
        "events",
        "layers",
        "run",
        "orthogonal",
        "tracking",
        "decompositions",
    ] = "steps"
    """Which table."""
    models: tuple[str, ...] = ("mini-vit", "resnet18", "mlp")
    """Of the suite steps; events takes the first."""
    batch: int = 64
    """Inputs in a batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; weights are float32."""
    fractions: tuple[float, ...] = (1, 1 / 2, 1 / 4, 1 / 8, 1 / 20)
    """Ranks over the small side of each matrix."""
    orders: tuple[str, ...] = ("auto", "chain", "merged", "rebuilt")
    """Of contraction; "rebuilt" is the authors' way."""
    peers: tuple[str, ...] = ("galore", "lora")
    """Other methods at the same ranks, of galore, lora and, with the extra `peers`, the
    authors' scheme in PyTorch (torch) and its dense model (torch-dense), both for the
    vision transformers only."""
    repeats: int = 7
    """Rounds; each times one sample of every row."""
    lag: int = 8
    """Steps between the decision and the event, in the suites events and run."""
    rates: pathlib.Path | None = None
    """Rates of this device, from --calibrate, instead of those of the library."""
    calibrate: bool = False
    """In the suite layers: measure the rates and print them as JSON."""
    json: pathlib.Path | None = None
    """Where the rows go, with device, versions and date."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to time: how to build it, and the shape of one input."""

    build: Callable[[Any], nn.Module]
    image: tuple[int, ...]
    classes: int = 10
    train: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CASES: Mapping[str, Case] = {
    "mini-vit": Case(
        lambda dtype: VisionTransformer(
            patch=8,
            depth=6,
            heads=6,
            width=768,
            classes=10,
            qkv_bias=False,
            dtype=dtype,
        ),
        (32, 32, 3),
    ),
    "vit-b16": Case(
        lambda dtype: VisionTransformer(
            patch=16, depth=12, heads=12, width=768, classes=1000, dtype=dtype
        ),
        (224, 224, 3),
        classes=1000,
    ),
    "resnet18": Case(
        lambda dtype: ResNet(
            widths=(64, 128, 256, 512), blocks=(2, 2, 2, 2), classes=10, dtype=dtype
        ),
        (32, 32, 3),
        train={"train": True, "mutable": ["batch_stats"]},
    ),
    "basic-cnn": Case(
        lambda dtype: BasicCNN(dtype=dtype),
        (32, 32, 3),
        train={"train": True, "mutable": ["batch_stats"]},
    ),
    "mlp": Case(
        lambda dtype: MLP(hidden=(1024, 1024, 1024), classes=10, dtype=dtype),
        (28, 28, 1),
    ),
}


class State(TrainState):
    """What a step passes on: params, optimizer state and batch statistics."""

    rest: Any = None


class Problem:
    """Model, batch and optimizer of one case; everything but the order of products."""

    def __init__(self, name: str, batch: int, dtype: str) -> None:
        """The case called `name`, with random inputs."""
        case = names.find("model", name, CASES)
        model = case.build(jnp.dtype(dtype))
        key = jax.random.key(0)
        self.name = name
        self.model = model
        self.image = jax.random.normal(key, (batch, *case.image))
        self.label = jnp.arange(batch) % case.classes
        variables = dict(jax.jit(model.init)(key, self.image[:1]))
        self.params = variables.pop("params")
        self.rest = variables
        options = case.train

        def forward(params: Any, rest: Any, image: Array) -> tuple[Array, Any]:
            out = model.apply({"params": params, **rest}, image, **options)
            return out if "mutable" in options else (out, rest)

        self.forward = forward
        abstract = jax.ShapeDtypeStruct(self.image.shape, self.image.dtype)
        self.matrices = oialr.select(
            oialr.find_matrices(forward, self.params, self.rest, abstract)
        )
        self.optimizer = optax.adamw(3e-4)

    def ranks(self, fraction: float) -> dict[str, int]:
        """Of every selected matrix, at least 1."""
        return {x.path: max(1, int(fraction * min(x.m, x.n))) for x in self.matrices}

    def low_rank(self, fraction: float) -> Any:
        """Params with random bases: only their shapes matter here."""
        bases: dict[tuple[int, int], Array] = {}

        def base(side: int, rank: int) -> Array:
            if (side, rank) not in bases:
                random = jax.random.normal(jax.random.key(side), (side, rank))
                bases[side, rank] = jnp.linalg.qr(random)[0]
            return jnp.array(bases[side, rank])

        params = self.params
        found = {x.path: x.axes for x in self.matrices}
        ranks = self.ranks(fraction)

        def convert(path: Any, leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            if name not in found:
                return leaf
            axes, r = found[name], ranks[name]
            core = jnp.eye(r) * 0.5
            return oialr.LowRank(base(axes.m, r), core, base(axes.n, r).T, axes)

        return jax.tree_util.tree_map_with_path(convert, params)

    def state(self, params: Any, tx: optax.GradientTransformation) -> State:
        """A state of its own: steps use up what they are given."""
        params, rest = jax.tree.map(jnp.array, (params, self.rest))
        return State.create(apply_fn=None, params=params, tx=tx, rest=rest)

    def train_step(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A step on cores and dense leaves, the same for dense params."""

        def loss(params: Any, rest: Any, image: Array, label: Array) -> Any:
            logits, rest = forward(params, rest, image)
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, label)
            return jnp.mean(entropy), rest

        def step(state: State, image: Array, label: Array) -> tuple[State, Any]:
            grad = oialr.value_and_grad(loss, has_aux=True)
            (value, rest), grads = grad(state.params, state.rest, image, label)
            return state.apply_gradients(grads=grads, rest=rest), {"loss": value}

        return step


class Program:
    """One compiled step with the state that it moves on; rows of equal shapes share."""

    def __init__(
        self, step: Callable[..., Any], holder: dict[str, Any], *batch: Array
    ) -> None:
        """Compile `step` for holder["state"]; the state is donated."""
        jitted = jax.jit(step, donate_argnums=0)
        self.compiled = jitted.lower(holder["state"], *batch).compile()
        self.holder = holder
        self.batch = batch

    def run(self) -> None:
        """Host side: one step, waited for."""
        state, metrics = self.compiled(self.holder["state"], *self.batch)
        self.holder["state"] = jax.block_until_ready(state)
        if not np.isfinite(metrics["loss"]):
            raise FloatingPointError(f"the loss is {metrics['loss']} in a benchmark")

    @property
    def temp_bytes(self) -> int:
        """Memory of the program beside its arguments and results."""
        analysis: Any = self.compiled.memory_analysis()
        return int(analysis.temp_size_in_bytes)

    @property
    def state_bytes(self) -> int:
        """Memory of the optimizer's state."""
        leaves = jax.tree.leaves(self.holder["state"].opt_state)
        return sum(leaf.nbytes for leaf in leaves)


SAMPLE = 0.1
"""Seconds that one sample takes at least: short runs are repeated to fill it."""


def interleaved(
    runs: Sequence[Callable[[], Any]], repeats: int
) -> list[tuple[float, float, float]]:
    """Host side: (median, least, most) seconds of each run, all in turn every round.

    Before each sample the run goes once unmeasured, because the run before it has
    filled caches and allocator with its own.
    """
    counts = []
    for run in runs:
        run()
        start = time.perf_counter()
        run()
        counts.append(max(1, round(SAMPLE / (time.perf_counter() - start))))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, count, taken in zip(runs, counts, times, strict=True):
            run()
            start = time.perf_counter()
            for _ in range(count):
                run()
            taken.append((time.perf_counter() - start) / count)
    return [(statistics.median(taken), min(taken), max(taken)) for taken in times]


# Suite: steps


def steps(settings: Settings) -> list[Row]:
    """Host side: a row for each model, rank fraction and order or peer.

    Where two orders give the same program (auto and the order that it picked for every
    matrix) it is timed once and has two rows.

    Raises:   ValueError: an unknown model or peer, or a peer for none of the models.
    """
    for peer in settings.peers:
        names.find("peer", peer, PEERS)
        if not any(_compares(peer, name) for name in settings.models):
            raise ValueError(
                f"{peer} is for vision transformers alone, not {settings.models}"
            )
    return [row for name in settings.models for row in _steps(name, settings)]


def _steps(name: str, settings: Settings) -> list[Row]:
    problem = Problem(name, settings.batch, settings.dtype)
    rates = read_rates(settings.rates)
    batch = (problem.image, problem.label)
    tx = oialr.freeze_bases(problem.optimizer)
    dense = {"state": problem.state(problem.params, tx)}
    programs = {"dense": Program(problem.train_step(problem.forward), dense, *batch)}
    labels: list[tuple[float, str, float | None, str]] = [(1.0, "dense", 1.0, "dense")]
    for fraction in settings.fractions:
        params = problem.low_rank(fraction)
        holder = {"state": problem.state(params, tx)}
        for order in settings.orders:
            options: Any = {"order": None if order == "auto" else order, "rates": rates}
            told = oialr.explain(
                problem.forward, params, problem.rest, problem.image, **options
            )
            key = f"{fraction} {[line.order for line in told.lines]}"
            if key not in programs:
                forward = oialr.factored(problem.forward, **options)
                step = problem.train_step(forward)
                programs[key] = Program(step, holder, *batch)
            labels.append((fraction, order, told.flops / told.dense_flops, key))
        for peer in settings.peers:
            if not _compares(peer, name):
                continue
            key = f"{fraction} {peer}"
            programs[key] = PEERS[peer](problem, fraction)
            labels.append((fraction, peer, None, key))
    times = interleaved([x.run for x in programs.values()], settings.repeats)
    by_key = dict(zip(programs, times, strict=True))
    base, *_ = by_key["dense"]
    rows = []
    for fraction, order, share, key in labels:
        middle, least, most = by_key[key]
        rows.append(
            {
                "model": name,
                "batch": settings.batch,
                "dtype": settings.dtype,
                "rank_fraction": fraction,
                "order": order,
                "step_ms": 1e3 * middle,
                "step_ms_min": 1e3 * least,
                "step_ms_max": 1e3 * most,
                "ratio_to_dense": middle / base,
                "flops_ratio": share,
                "temp_bytes": programs[key].temp_bytes,
                "state_bytes": programs[key].state_bytes,
                "backend": jax.default_backend(),
            }
        )
    return rows


def _galore(problem: Problem, fraction: float) -> Program:
    """The dense model under Optax's GaLore, its one rank that of the median layer."""
    ranks = sorted(problem.ranks(fraction).values())
    tx = optax.contrib.galore(
        3e-4,
        rank=ranks[len(ranks) // 2],
        update_proj_gap=200,
        base_optimizer=optax.scale_by_adam(),
        weight_decay=1e-4,
    )
    holder = {"state": problem.state(problem.params, tx)}
    step = problem.train_step(problem.forward)
    return Program(step, holder, problem.image, problem.label)


def _lora(problem: Problem, fraction: float) -> Program:
    """The dense model, frozen, with trained adapters of the same ranks."""
    pairs = peers.adapters(problem.params, problem.ranks(fraction), jax.random.key(1))
    base = problem.params

    def forward(pairs: Any, rest: Any, image: Array) -> Any:
        base, rest = rest["base"], rest["rest"]
        apply = peers.lora(problem.forward, pairs)
        out, rest = apply(base, rest, image)
        return out, {"base": base, "rest": rest}

    params, rest = jax.tree.map(
        jnp.array, (pairs, {"base": base, "rest": problem.rest})
    )
    tx = problem.optimizer
    state = State.create(apply_fn=None, params=params, tx=tx, rest=rest)
    step = problem.train_step(forward)
    return Program(step, {"state": state}, problem.image, problem.label)


def _compares(peer: str, name: str) -> bool:
    """Whether the peer has this model: PyTorch has the vision transformers."""
    model = names.find("model", name, CASES).build(jnp.float32)
    return not peer.startswith("torch") or isinstance(model, VisionTransformer)


def _torch(problem: Problem, ranks: Mapping[str, int]) -> Any:
    return peers.TorchViT(problem.model, ranks, problem.image, problem.label)


PEERS: Mapping[str, Callable[[Problem, float], Any]] = {
    "galore": _galore,
    "lora": _lora,
    "torch": lambda problem, fraction: _torch(problem, problem.ranks(fraction)),
    "torch-dense": lambda problem, fraction: _torch(problem, {}),
}


# Suite: layers


@dataclasses.dataclass(frozen=True)
class Layer:
    """One matrix in use: a product of `rows` rows, or a 3x3 convolution."""

    rows: int
    m: int
    n: int
    side: int | None = None
    """Height and width of the image that a convolution sees; none for a product."""

    @property
    def name(self) -> str:
        """As it stands in the table."""
        if self.side is None:
            return f"dot {self.rows}x{self.m}x{self.n}"
        return f"conv 3x3 {self.m // 9}-{self.n} on {self.side}x{self.side}"

    def call(self, params: Any, x: Array) -> Array:
        """x W, or the convolution of x with the kernel W."""
        if self.side is None:
            return x @ params["w"]
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, params["w"], (1, 1), "SAME", dimension_numbers=numbers
        )

    def arrays(self, dtype: Any) -> tuple[Array, Array, Axes]:
        """x, W and its axes."""
        key = jax.random.key(0)
        x: tuple[int, ...] = (self.rows, self.m)
        w: tuple[int, ...] = (self.m, self.n)
        axes = Axes(w, (), (0,), (1,))
        if self.side is not None:
            channels, count = self.m // 9, self.rows // self.side**2
            x = (count, self.side, self.side, channels)
            w = (3, 3, channels, self.n)
            axes = Axes(w, (), (0, 1, 2), (3,))
        return (
            jax.random.normal(key, x, dtype),
            jax.random.normal(key, w, dtype) * self.m**-0.5,
            axes,
        )


LAYERS = (
    Layer(1088, 768, 768),
    Layer(1088, 768, 3072),
    Layer(1088, 3072, 768),
    Layer(64, 1024, 1024),
    Layer(16384, 768, 768),
    Layer(65536, 576, 64, side=32),
    Layer(16384, 1152, 128, side=16),
    Layer(4096, 2304, 256, side=8),
    Layer(1024, 4608, 512, side=4),
)


def layers(settings: Settings) -> list[Row]:
    """Host side: rows of single matrices, forward and backward, with the estimate."""
    rates = read_rates(settings.rates) or cost.RATES.get(jax.default_backend())
    return [row for layer in LAYERS for row in _layer(layer, settings, rates)]


def _layer(layer: Layer, settings: Settings, rates: Rates | None) -> list[Row]:
    dtype = jnp.dtype(settings.dtype)
    x, w, axes = layer.arrays(dtype)

    def pulled(forward: Callable[..., Any], params: Any) -> Callable[[], Any]:
        def step(trained: Any, rest: Any, x: Array) -> Any:
            def use(trained: Any, x: Array) -> Array:
                return forward({"w": with_trainable(rest, trained)}, x)

            y, pullback = jax.vjp(use, trained, x)
            return pullback(y)

        trained = oialr.trainable(params)
        compiled = jax.jit(step).lower(trained, params, x).compile()
        return lambda: jax.block_until_ready(compiled(trained, params, x))

    dense = (1.0, cost.Order.DENSE)
    programs = {dense: pulled(layer.call, w)}
    labels: list[tuple[float, str, cost.Order, cost.Workload]] = []
    full = min(layer.m, layer.n)
    window = 0 if layer.side is None else 9
    for fraction in settings.fractions:
        rank = max(1, int(fraction * full))
        load = cost.Workload(layer.rows, layer.m, layer.n, rank, window=window)
        node = factor(w.astype(jnp.float32), axes, rank)
        node = jax.tree.map(lambda a: a.astype(dtype), node)
        for name in settings.orders:
            order = (
                cost.cheapest(load, rates, dtype.itemsize)
                if name == "auto"
                else cost.Order(name)
            )
            if (fraction, order) not in programs:
                forward = oialr.factored(layer.call, order=order)
                programs[fraction, order] = pulled(forward, node)
            labels.append((fraction, name, order, load))
    times = interleaved(list(programs.values()), settings.repeats)
    each = {key: middle for key, (middle, *_) in zip(programs, times, strict=True)}
    rows = []
    for fraction, name, order, load in labels:
        taken = each[fraction, order]
        row = {
            "model": layer.name,
            "batch": layer.rows,
            "dtype": settings.dtype,
            "rank_fraction": fraction,
            "order": name,
            "picked": order.value,
            "step_ms": 1e3 * taken,
            "ratio_to_dense": taken / each[dense],
            "flops_ratio": cost.flops(order, load).total
            / cost.flops(cost.Order.DENSE, load).total,
            "bytes_ratio": cost.traffic(order, load).total
            / cost.traffic(cost.Order.DENSE, load).total,
            "backend": jax.default_backend(),
        }
        if rates is not None:
            low, base = (
                cost.seconds(x, load, rates, dtype.itemsize)
                for x in (order, cost.Order.DENSE)
            )
            row["estimated_ratio"] = low / base
        rows.append(row)
    return rows


def calibrate(settings: Settings) -> Rates:
    """Host side: the rates of JAX's default device, medians over the rounds."""
    dtype = jnp.dtype(settings.dtype)
    shapes = [layer for layer in LAYERS if layer.side is not None]

    def normal(*shape: int) -> Array:
        return jax.random.normal(jax.random.key(0), shape, dtype)

    def timed(fn: Callable[..., Any], *arrays: Array) -> Callable[[], Any]:
        compiled = jax.jit(fn).lower(*arrays).compile()
        return lambda: jax.block_until_ready(compiled(*arrays))

    def chain(x: Array) -> Array:
        for _ in range(100):
            x = x @ x
        return x

    runs = [
        timed(jnp.matmul, normal(4096, 1024), normal(1024, 1024)),
        timed(lambda x, y: x.T @ y, normal(4096, 512), normal(4096, 512)),
        timed(jnp.matmul, normal(16384, 1024), normal(1024, 8)),
        timed(chain, jnp.eye(8, dtype=dtype)),
    ]
    for layer in shapes:
        x, w, _ = layer.arrays(dtype)

        def conv(x: Array, w: Array, layer: Layer = layer) -> Array:
            return layer.call({"w": w}, x)

        y = conv(x, w)
        runs += [
            timed(conv, x, w),
            timed(lambda y, x, w, f=conv: jax.vjp(f, x, w)[1](y)[0], y, x, w),
            timed(lambda y, x, w, f=conv: jax.vjp(f, x, w)[1](y)[1], y, x, w),
        ]
    dot, kernel, skinny, small, *convolutions = (
        middle for middle, *_ in interleaved(runs, settings.repeats)
    )
    work = [2 * layer.rows * layer.m * layer.n for layer in shapes]
    forward, to_input, to_kernel = (
        sum(work) / sum(convolutions[kind::3]) for kind in range(3)
    )
    return Rates(
        dot=2 * 4096 * 1024 * 1024 / dot,
        dot_kernel=2 * 512 * 4096 * 512 / kernel,
        conv=forward,
        conv_input=to_input,
        conv_kernel=to_kernel,
        bandwidth=dtype.itemsize * (16384 * 1024 + 1024 * 8 + 16384 * 8) / skinny,
        overhead=small / 100,
        conv_merging=_merging_pays(settings),
    )


def _merging_pays(settings: Settings) -> bool:
    """Whether a whole convolutional network is faster merged than as chains."""
    orders = ("chain", "merged")
    options: Any = {"fractions": (1.0,), "orders": orders, "peers": ()}
    rows = _steps("resnet18", dataclasses.replace(settings, **options))
    took = {row["order"]: row["step_ms"] for row in rows}
    return bool(took["merged"] < took["chain"])


def read_rates(path: pathlib.Path | None) -> Rates | None:
    """Host side: rates from a file of --calibrate, None for no path.

    Raises:   ValueError: the file has other names or values than `Rates`.
    """
    if path is None:
        return None
    try:
        return Rates(**json.loads(path.read_text()))
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} does not hold the rates of a device: {error}"
        ) from None


# Suite: events

LADDER = 0.95
"""Cutoff at which random cores halve at every event, which `max_drop` allows."""
AROUND = 3
"""Steps after an event that still count as its stall."""


def events(settings: Settings) -> list[Row]:
    """Host side: a row for each event of a run that halves all ranks again and again.

    `stall_ms` is what the steps from the choice of ranks to `AROUND` steps after the
    event took beyond as many ordinary ones (medians of the steps before and after);
    `event_ms` the part of the host in it (singular values, SVDs, turning the state),
    `compile_ms` what tracing and compiling took meanwhile, in any thread and not
    counted in `event_ms`. Once without a lag, where the step waits for the compiler,
    and once with it.
    """
    rows = []
    for lag in dict.fromkeys((0, settings.lag)):
        rows += _events(settings, lag)
    return rows


def _events(settings: Settings, lag: int) -> list[Row]:
    problem = Problem(settings.models[0], settings.batch, settings.dtype)
    tx = oialr.freeze_bases(problem.optimizer)
    every = max(20, 2 * lag)
    schedule = oialr.Schedule(delay=every // 2, every=every, layer_step=1.0, lag=lag)
    forward = oialr.factored(problem.forward, rates=read_rates(settings.rates))
    step = oialr.adaptive(
        problem.train_step(forward),
        tx,
        problem.matrices,
        schedule,
        oialr.RankRule(cutoff=LADDER, multiple=8),
    )
    state = problem.state(problem.params, tx)
    steps = schedule.delay + LADDER_EVENTS * every
    times, compiling, counts = [], [], []
    with compile_times() as log:
        for _ in range(steps):
            before = covered(log, main=True) + covered(log, main=False)
            start = time.perf_counter()
            state, metrics = step(state, problem.image, problem.label)
            jax.block_until_ready((state, metrics))
            times.append(time.perf_counter() - start)
            after_step = covered(log, main=True) + covered(log, main=False)
            compiling.append(after_step - before)
            counts.append(step.compilations)
    bound = schedule.compilations(steps)
    if step.compilations > bound:
        raise ValueError(f"{step.compilations} compilations, more than {bound}")
    rows = []
    for chosen in range(schedule.delay, steps, every):
        event = chosen + lag
        end = event + AROUND
        before = statistics.median(times[max(2, chosen - every // 3) : chosen])
        after = statistics.median(times[end : chosen + every])
        usual = (event - chosen) * before + (end - event) * after
        mine = [x for x in step.timings if chosen <= x.step <= event]
        host = sum(x.choosing + x.surgery for x in mine)
        stall = sum(times[chosen:end]) - usual
        rows.append(
            {
                "model": settings.models[0],
                "batch": settings.batch,
                "lag": lag,
                "step": event,
                "step_ms": 1e3 * before,
                "step_after_ms": 1e3 * after,
                "choosing_ms": 1e3 * sum(x.choosing for x in mine),
                "waiting_ms": 1e3 * sum(x.waiting for x in mine),
                "event_ms": 1e3 * host,
                "stall_ms": 1e3 * stall,
                "stall_steps": stall / before,
                "compile_ms": 1e3 * sum(compiling[chosen:end]),
                "compilations": counts[end - 1] - counts[chosen - 1],
                "share_of_500_steps": host / (500 * after),
                "backend": jax.default_backend(),
            }
        )
    return rows


LADDER_EVENTS = 4
"""Conversion to half the ranks, then three more halvings."""


class Span(NamedTuple):
    """When one tracing, lowering or compilation ran, and who waited for it.

    `main`: the main thread, outside of rank events, whose time is counted with them.
    """

    start: float
    end: float
    main: bool


@contextlib.contextmanager
def compile_times() -> Iterator[list[Span]]:
    """Host side: a list that grows by every tracing, lowering and compilation."""
    log: list[Span] = []
    main = threading.get_ident()

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if not event.startswith("/jax/core/compile/"):
            return
        in_main = threading.get_ident() == main
        for frame, _line in traceback.walk_stack(None):
            if in_main and frame.f_code.co_filename == surgery.__file__:
                return
        now = time.perf_counter()
        log.append(Span(now - duration_secs, now, in_main))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield log
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def covered(log: Sequence[Span], *, main: bool) -> float:
    """Seconds in which the main thread, or another one, was at it; nested ones once."""
    total, until = 0.0, 0.0
    for span in sorted(x for x in log if x.main == main):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


# Suite: run

RECIPE = images.Settings(
    dataset="digits",
    model="mini-vit-digits",
    steps=160,
    learning_rate=3e-4,
    weight_decay=0.1,
    delay=0.25,
    every=0.125,
    stop=0.75,
    cutoff=0.2,
    multiple=16,
    layer_step=1.0,
    eval_every=160,
    log_every=40,
)
"""The paper's mini-ViT, in patches of 2x2, on the digits that scikit-learn has."""


def run(settings: Settings) -> list[Row]:
    """Host side: the same recipe dense and in low rank, wall time in its parts."""
    rows = []
    for method in ("dense", "oialr"):
        recipe = dataclasses.replace(
            RECIPE,
            method=method,
            batch=settings.batch,
            lag=settings.lag,
            mesh="data=1",  # every suite measures one device
        )
        with tempfile.TemporaryDirectory() as folder, compile_times() as log:
            recipe = dataclasses.replace(recipe, out=pathlib.Path(folder))
            summary = images.run(recipe, name=method)
        blocking = covered(log, main=True)
        waited = blocking + summary["event_seconds"] + summary["waiting_seconds"]
        rows.append(
            {
                "model": recipe.model,
                "batch": settings.batch,
                "method": method,
                "steps": recipe.steps,
                "wall_s": summary["wall_seconds"],
                "steps_s": summary["wall_seconds"] - waited,
                "compiling_s": blocking,
                "compiling_behind_s": covered(log, main=False),
                "waiting_s": summary["waiting_seconds"],
                "svd_s": summary["event_seconds"],
                "compilations": summary["compilations"],
                "test_accuracy": summary["test_accuracy"],
                "stored_fraction": summary["stored_fraction"],
                "trainable_fraction": summary["trainable_fraction"],
                "backend": jax.default_backend(),
            }
        )
    for row in rows:
        row["ratio_to_dense"] = row["wall_s"] / rows[0]["wall_s"]
    return rows


# Suite: orthogonal

SIDES = (32, 64, 128, 256, 512)
COUNTS = (1, 4)
"""Of matrices of a shape: a network has several, and they are one stack."""
POLAR: Mapping[str, Mapping[str, Any]] = {
    "svd": {"method": "svd"},
    "qdwh": {"method": "qdwh"},
    "polar_express, 7 steps": {"method": "polar_express"},
    "polar_express, 3 steps": {"method": "polar_express", "steps": 3},
    "newton_schulz, 5 steps": {"method": "newton_schulz"},
}


def orthogonal(settings: Settings) -> list[Row]:
    """Host side: a row for each method on each gradient, then for each step.

    Gradients are square matrices, one or four of a shape, and that of BasicCNN; steps
    are those of BasicCNN with momentum and coupled decay. `ratio` is the time over that
    of the SVD, or of the step of plain SGD, median over median.
    """
    rows = []
    problem = Problem("basic-cnn", settings.batch, settings.dtype)
    gradients: dict[str, Any] = {}
    for count, side in ((count, side) for count in COUNTS for side in SIDES):
        keys = jax.random.split(jax.random.key(side), count)
        name = f"{side}x{side}" if count == 1 else f"{count} of {side}x{side}"
        gradients[name] = [jax.random.normal(key, (side, side)) for key in keys]
    gradients["BasicCNN's gradient"] = problem.params
    for name, g in gradients.items():
        runs = {x: _polar_of({"w": g}, options) for x, options in POLAR.items()}
        rows += _compared(name, runs, settings.repeats)
    sgd = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(1e-2, momentum=0.9))
    optimizers = {"sgd": sgd} | {
        x: oialr.orthogonal.orthogonal_sgd(1e-2, weight_decay=5e-4, **options)
        for x, options in POLAR.items()
    }
    steps = {}
    for name, tx in optimizers.items():
        holder = {"state": problem.state(problem.params, tx)}
        step = problem.train_step(problem.forward)
        steps[name] = Program(step, holder, problem.image, problem.label).run
    return rows + _compared(
        f"BasicCNN, batch {settings.batch}", steps, settings.repeats
    )


def _polar_of(g: Any, options: Mapping[str, Any]) -> Callable[[], Any]:
    tx = oialr.orthogonal.orthogonalize(**options)
    update = jax.jit(tx.update).lower(g, tx.init(g)).compile()
    return lambda: jax.block_until_ready(update(g, tx.init(g)))


def _compared(
    what: str, runs: Mapping[str, Callable[[], Any]], repeats: int
) -> list[Row]:
    times = interleaved(list(runs.values()), repeats)
    base, *_ = times[0]
    return [
        {
            "what": what,
            "method": name,
            "ms": 1e3 * middle,
            "ms_min": 1e3 * least,
            "ms_max": 1e3 * most,
            "ratio": middle / base,
            "backend": jax.default_backend(),
        }
        for name, (middle, least, most) in zip(runs, times, strict=True)
    ]


# Suite: tracking

STRETCH = 5
"""Steps that are timed with and without a record: a longer time varies by more."""


def tracking(settings: Settings) -> list[Row]:
    """Host side: what a record every epoch costs the preset `digits`, by its kind.

    The run is dense, or at a quarter of all ranks. `record_ms` is what `STRETCH` steps
    with a record take beyond those before them without, the median over the rounds, and
    `share` its part of an epoch; the kind "all" is the mean over the records of a run,
    of which few are detailed.
    """
    return [row for low in (False, True) for row in _tracking(settings, low)]


def _tracking(settings: Settings, low: bool) -> list[Row]:
    preset = images.PRESETS["digits"][1]
    task = images.task(preset)
    noise = jax.random.key(1)
    params = task.init(jax.random.key(0))["params"]
    found = oialr.find_matrices(task.loss, params, {}, task.batch(0), noise)
    tx = oialr.freeze_bases(common.optimizer(preset, found))
    opt_state = tx.init(params)
    if low:
        ranks = {x.path: max(1, min(x.m, x.n) // 4) for x in found}
        params, opt_state, _ = oialr.factorize(
            params, opt_state, found, tx=tx, rank=ranks
        )
    loss = oialr.factored(task.loss)

    def step(state: State, image: Array, label: Array) -> tuple[State, Any]:
        grad = oialr.value_and_grad(loss, has_aux=True)
        batch = {"image": image, "label": label}
        (value, _), grads = grad(state.params, {}, batch, noise)
        return state.apply_gradients(grads=grads), {"loss": value}

    state = State.create(apply_fn=None, params=params, tx=tx, rest=None)
    holder = {"state": state.replace(opt_state=opt_state)}
    first = task.batch(0)
    program = Program(step, holder, first["image"], first["label"])
    steps = round(task.epoch)
    follow = Tracking(found, every=steps, steps=preset.steps, epoch=task.epoch)
    held = {"followed": follow.start(params, 0), "t": 0}

    def train(record: int | None = None) -> None:
        """Write the record after that many epochs, if any, while training a while."""
        numbers = None
        if record is not None:
            held["followed"], numbers = follow.compare(
                held["followed"], holder["state"].params, record * steps
            )
        for _ in range(STRETCH):
            batch = task.batch(held["t"])
            held["t"] += 1
            holder["state"], metrics = program.compiled(
                holder["state"], batch["image"], batch["label"]
            )
        if numbers is not None:
            numbers()
        jax.block_until_ready(metrics)

    points = range(1, preset.steps // steps + 1)
    detailed = [x for x in points if follow.is_detailed(x * steps)]
    plain = next(x for x in points if x not in detailed)
    kinds = {"usual": plain, "detailed": detailed[0]}
    extra: dict[str, list[float]] = {kind: [] for kind in kinds}
    without = []
    for i in range(settings.repeats + 1):  # the first round compiles
        for kind, record in kinds.items():
            start = time.perf_counter()
            train()
            between = time.perf_counter()
            train(record)
            end = time.perf_counter()
            if i:
                without.append(between - start)
                extra[kind].append(end - 2 * between + start)
    often = len(detailed) / len(points)
    took = {kind: statistics.median(values) for kind, values in extra.items()}
    took["all"] = (1 - often) * took["usual"] + often * took["detailed"]
    base = statistics.median(without) * steps / STRETCH
    return [
        {
            "what": "digits, a quarter of the ranks" if low else "digits, dense",
            "record": kind,
            "epoch_ms": 1e3 * base,
            "record_ms": 1e3 * taken,
            "share": taken / base,
            "backend": jax.default_backend(),
        }
        for kind, taken in took.items()
    ]


# The command


# Suite: decompositions

SHAPES = ((4, 768, 768), (4, 768, 1152), (4, 768, 3072), (4, 4608, 512), (24, 192, 192))
"""Matrices of a shape, as a vision transformer, ResNet-18 and cores have them."""
SPREAD = 1e-4
"""The least singular value of those matrices over the largest, evenly in logarithms."""


def decompositions(settings: Settings) -> list[Row]:
    """Host side: a row for each route to the values, or to the vectors to keep.

    `values_error` is the largest relative error of the singular values above
    `linalg.RESOLVED` of the largest; `excess` what the matrix of the kept vectors is
    farther from W than the best one of its rank, over the norm of W.
    """
    rows = []
    for count, m, n in SHAPES:
        k = min(m, n)
        sigma = np.geomspace(1, SPREAD, k)
        w = _of_spectrum(count, m, n, sigma)
        routes: dict[str, tuple[int, Callable[[Array], Any]]] = {
            "svd": (k, linalg.svd),
            "qdwh": (k, _qdwh_svd),
            "values: svd": (0, lambda x: (linalg.singular_values(x),)),
            "values: gram": (0, lambda x: (linalg.gram_singular_values(x),)),
        }
        for part in (2, 8):
            r = k // part
            name = f"gram, 1/{part} of the vectors"
            routes[name] = r, functools.partial(linalg.gram_svd, rank=r)
        compiled = {x: jax.jit(fn).lower(w).compile() for x, (_, fn) in routes.items()}
        runs = {
            x: functools.partial(lambda fn, w: jax.block_until_ready(fn(w)), fn, w)
            for x, fn in compiled.items()
        }
        found = _compared(f"{count} of {m}x{n}", runs, settings.repeats)
        for row, (r, _) in zip(found, routes.values(), strict=True):
            parts = [np.asarray(x, np.float64) for x in compiled[row["method"]](w)]
            values, clear = parts[len(parts) // 2], sigma >= linalg.RESOLVED
            row["values_error"] = float(np.max(abs(values / sigma - 1)[:, clear]))
            if r:
                left, _, right = parts
                kept = (left[..., :r] * values[:, None, :r]) @ right[:, :r]
                error = np.linalg.norm(np.asarray(w, np.float64) - kept, axis=(1, 2))
                best, norm = np.linalg.norm(sigma[r:]), np.linalg.norm(sigma)
                row["excess"] = float(np.max(error - best) / norm)
        rows += found
    return rows


def _of_spectrum(count: int, m: int, n: int, sigma: np.ndarray) -> Array:
    """Matrices with these singular values in float64, and random vectors."""
    rng = np.random.default_rng(0)

    def basis(side: int) -> np.ndarray:
        return np.linalg.qr(rng.standard_normal((count, side, len(sigma))))[0]

    return jnp.asarray((basis(m) * sigma) @ basis(n).swapaxes(1, 2), jnp.float32)


def _qdwh_svd(w: Array) -> tuple[Array, Array, Array]:
    """W = U H by polar iterations, and H = V Σ Vᵀ."""
    tall = w if w.shape[-2] >= w.shape[-1] else w.mT
    with jax.default_matmul_precision("highest"):
        u, h = jax.vmap(lambda x: jax.lax.linalg.qdwh(x)[:2])(tall)
        values, v = jnp.linalg.eigh(h)
        values, v = values[:, ::-1], v[..., ::-1]
        left = u @ v
    return (left, values, v.mT) if tall is w else (v, values, left.mT)


SUITES: Mapping[str, Callable[[Settings], list[Row]]] = {
    "steps": steps,
    "events": events,
    "layers": layers,
    "run": run,
    "orthogonal": orthogonal,
    "tracking": tracking,
    "decompositions": decompositions,
}


def table(rows: Sequence[Row]) -> str:
    """Rows as a GitHub table, one column for every name in any of them."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def text(value: Any) -> str:
        if value is None:
            return ""
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [columns, ["---"] * len(columns)]
    lines += [[text(row.get(name)) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(
    program: str, arguments: Sequence[str] | None, rows: list[Row], path: pathlib.Path
) -> None:
    """Host side: the rows, with the command, device, versions and date."""
    record = {
        "command": ["python", "-m", program, *(arguments or sys.argv[1:])],
        "device": jax.devices()[0].device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "huge_pages": process.has_huge_pages(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(files.nulled(record), indent=1, allow_nan=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: read the command line, measure, print a table, write the rows."""
    try:
        settings = tyro.cli(Settings, args=arguments, prog="python -m train.bench")
        settings = files.with_paths_expanded(settings)
        if settings.json is not None:
            files.writable(settings.json.parent)
        if settings.calibrate:
            rates = dataclasses.asdict(calibrate(settings))
            text = json.dumps(rates, indent=2)
            print(text)
            if settings.json is not None:
                settings.json.write_text(text + "\n")
            return
        rows = SUITES[settings.suite](settings)
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    print(table(rows))
    if settings.json is not None:
        write("train.bench", arguments, rows, settings.json)


if __name__ == "__main__":
    process.use_huge_pages()
    main()
