"""The image program end to end, as a user starts it, and its one loop."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import oialr_jax as oialr
from oialr_jax.lowrank import Axes, factor
from train import command, files, images, loop, report
from train import settings as common
from train.data import digits
from train.data.arrays import standardize
from train.models.vit import VisionTransformer

STEPS, DEPTH = 12, 1
SHORT = [
    "--steps",
    str(STEPS),
    "--log-every",
    "4",
    "--eval-every",
    "6",
    "--batch",
    "16",
]
LOW_RANK = ["--cutoff", "0.9", "--every", "0.25", "--layer-step", "1"]
COUNTED = """
import sys, jax
from train import images
model, small = images.MODELS["vit-digits"]
images.MODELS["vit-digits"] = model.clone(depth=1), small  # tracing takes the time
found = []
jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
images.main(sys.argv[1:])
print(found)
"""
SUMMARY_KEYS = {
    "dataset",
    "model",
    "method",
    "seed",
    "steps",
    "test_accuracy",
    "dense_weights",
    "stored_weights",
    "trainable_weights",
    "stored_fraction",
    "trainable_fraction",
    "wall_seconds",
    "compilations",
    "ranks",
}


@pytest.fixture(scope="module", autouse=True)
def _shallow():
    """The model of the preset with fewer blocks: what takes long is compiling them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(
            images.MODELS,
            "vit-digits",
            (
                VisionTransformer(patch=2, depth=DEPTH, heads=4, width=64, classes=10),
                {},
            ),
        )
        yield


def start(out, *arguments):
    images.main(["digits", *SHORT, "--mesh", "data=1", "--out", str(out), *arguments])


def records(folder, *, timed=False):
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines if timed else [strip(x) for x in lines]


def strip(record):
    return {name: value for name, value in record.items() if name != "seconds"}


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory):
    """Folder of one short low-rank run; high cutoff, so that ranks surely fall."""
    out = tmp_path_factory.mktemp("low_rank")
    start(out, *LOW_RANK)
    return out / "digits-oialr-seed0"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    out = tmp_path_factory.mktemp("dense")
    start(out, "--method", "dense", "--seed", "3")
    return out / "digits-dense-seed3"


def test_summary_of_a_low_rank_run(low_rank):
    summary = json.loads((low_rank / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["dataset"] == "digits"
    assert summary["method"] == "oialr"
    assert (summary["seed"], summary["steps"]) == (0, STEPS)
    assert 0 <= summary["test_accuracy"] <= 1
    assert summary["trainable_weights"] < summary["stored_weights"]
    assert summary["stored_weights"] < summary["dense_weights"]
    for part in ("stored", "trainable"):
        fraction = summary[f"{part}_weights"] / summary["dense_weights"]
        assert summary[f"{part}_fraction"] == fraction
    assert len(summary["ranks"]) == 4 * DEPTH
    for m, n, rank in summary["ranks"].values():
        assert 1 <= rank < min(m, n)
    events = common.schedule(images.PRESETS["digits"][1]).events(1000)
    assert summary["compilations"] <= 1 + len(events)


def test_record_of_a_low_rank_run(low_rank):
    lines = records(low_rank, timed=True)
    train = [x for x in lines if x["kind"] == "train"]
    assert [x["step"] for x in train] == [4, 8, 12]
    assert [x["step"] for x in lines if x["kind"] == "eval"] == [6, 12]
    events = [x for x in lines if x["kind"] == "event"]
    kinds = [x["event"]["kind"] for x in events]
    assert kinds[0] == "conversion"
    assert kinds.count("truncation") >= 2
    assert events[0]["step"] == STEPS // 3
    assert events[-1]["stored_fraction"] == train[-1]["stored_fraction"]
    assert train[0]["stored_fraction"] == 1.0
    assert train[-1]["stored_fraction"] < 1.0
    seconds = [x["seconds"] for x in lines]
    assert seconds == sorted(seconds)


def test_plots_of_a_low_rank_run(low_rank):
    names = {"accuracy", "loss", "fractions", "ranks", "spectra"}
    plots = {path.stem: path for path in (low_rank / "plots").iterdir()}
    assert plots.keys() == names
    assert all(path.stat().st_size > 5000 for path in plots.values())


def test_plots_are_redrawn_from_the_record(low_rank, capsys):
    target = low_rank / "plots" / "ranks.png"
    before = target.read_bytes()
    target.unlink()
    report.main([str(low_rank)])
    assert target.read_bytes() == before
    assert str(target) in capsys.readouterr().out


def test_layers_that_were_never_finite_have_an_empty_panel(low_rank, tmp_path):
    lines = records(low_rank, timed=True)
    for event in (x["event"] for x in lines if x["kind"] == "event"):
        for layer in event["layers"]:
            layer |= {"finite": False, "after": None}
    text = "\n".join(map(json.dumps, lines))
    (tmp_path / files.METRICS).write_text(text + "\n")
    assert tmp_path / "plots" / "spectra.png" in report.draw(tmp_path)


def test_report_of_no_run_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="is no folder of a run"):
        report.main([str(tmp_path)])


def test_a_dense_run_holds_no_low_rank(dense):
    summary = json.loads((dense / "summary.json").read_text())
    assert summary["method"] == "dense"
    assert summary["stored_fraction"] == summary["trainable_fraction"] == 1.0
    assert summary["compilations"] == 1
    assert summary["train_flops"] == summary["dense_flops"] > 0
    assert summary["ranks"] == {}
    assert not [x for x in records(dense) if x["kind"] == "event"]
    plots = {path.stem for path in (dense / "plots").iterdir()}
    assert plots == {"accuracy", "loss", "fractions"}


def test_the_same_seed_gives_the_same_record(low_rank, tmp_path):
    start(tmp_path, *LOW_RANK, "--name", "again")
    assert records(tmp_path / "again") == records(low_rank)


def test_a_restart_finds_its_programs_compiled_and_does_the_same(tmp_path):
    """Two processes: the second finds every program that the first one kept.

    jaxlib 0.10.1 logs an error when it loads one on a CPU for which LLVM prefers not
    to gather (jax issue 38445): a hint for tuning, no instruction that is missing. It
    loads it all the same, so that is the one error that may be said.
    """
    cache = tmp_path / "cache"
    harmless = re.compile(r".*cpu_aot_loader.* feature \+prefer-no-(gather|scatter) ")
    kept, hits = [], []
    for name in ("first", "second"):
        command = [sys.executable, "-c", COUNTED, "digits", *SHORT, *LOW_RANK]
        command += ["--lag", "2", "--out", str(tmp_path), "--name", name]
        command += ["--compilation-cache", str(cache), "--mesh", "data=1"]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        )
        said = [x for x in done.stderr.splitlines() if not harmless.match(x)]
        assert not [x for x in said if "rror" in x]
        kept.append(len([x for x in cache.iterdir() if "cache" in x.name]))
        hits.append(done.stdout.splitlines()[-1].count("cache_hits"))
    assert kept[0] > 3
    assert hits == [0, kept[0]]
    assert records(tmp_path / "first") == records(tmp_path / "second")


def test_another_seed_gives_another_record(dense, low_rank):
    assert records(low_rank)[0]["loss"] != records(dense)[0]["loss"]


def test_until_the_conversion_both_methods_are_the_same(low_rank, tmp_path):
    start(tmp_path, "--method", "dense", "--name", "dense")
    expected = records(tmp_path / "dense")[0]
    found = records(low_rank)[0]
    assert found["step"] == expected["step"] == 4
    assert math.isclose(found["loss"], expected["loss"], rel_tol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "unknown preset 'digit', did you mean 'digits'?"),
        (
            ["digits", "--model", "lenet"],
            "unknown model 'lenet', did you mean 'lenet5'",
        ),
        (
            ["digits", "--dataset", "digitz"],
            "unknown dataset 'digitz', did you mean 'dig",
        ),
        (["digits", "--steps", "0"], "`steps` must be at least 1, got 0"),
        (["digits", "--batch", "0"], "`batch` must be at least 1, got 0"),
        (["digits", "--delay", "1.5"], "`delay` must be in (0, 1], part of the run"),
        (
            ["digits", "--delay", "0.5", "--stop", "0.4"],
            "no step is left for low rank: `delay` 0.5 and `stop` 0.4 are steps 500 "
            "and 400 of 1000",
        ),
        (["fashion", "--data-dir", "no/such"], "python -m train.data.prepare fashion"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(arguments, message, tmp_path):
    with pytest.raises(SystemExit) as caught:
        images.main([*arguments, "--out", str(tmp_path)])
    text = str(caught.value)
    assert text.startswith("error: ")
    assert message in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["digits", "--sed", "1"], []], ids=["flag", "nothing"]
)
def test_a_wrong_command_line_says_what_there_is(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        images.main(arguments)
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert ("--seed" if arguments else "digits") in text


def toy(losses):
    """A step whose loss at t is losses[t], and a state for it."""
    tx = optax.sgd(0.1)
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)

    def step(state, batch):
        state = state.replace(step=state.step + 1)
        return state, {"loss": jnp.asarray(losses[batch], jnp.float32)}

    return step, state


def half(state):
    """An evaluation."""
    return {"accuracy": 0.5}


def toy_run(
    folder,
    losses,
    pace,
    state=None,
    evaluate=half,
    keep=9,
    best=None,
    step=None,
    batch=lambda t: t,
    **options,
):
    """The loop over a step that does nothing but name these losses, or over another."""
    named, first = toy(losses)
    with (
        loop.Interrupts() as interrupts,
        oialr.Checkpoints(
            folder / files.CHECKPOINTS, keep=keep, best=best
        ) as checkpoints,
    ):
        return loop.train(
            first if state is None else state,
            step or named,
            batch,
            evaluate,
            pace=pace,
            folder=folder,
            checkpoints=checkpoints,
            settings={},
            interrupts=interrupts,
            **options,
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("save", [10, 7], ids=["at_a_log", "at_a_save"])
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(
    tmp_path, bad, save
):
    losses = [1.0] * 10
    losses[6] = bad
    files.begin(tmp_path)
    with pytest.raises(FloatingPointError, match=f"the loss is {bad} at step 6;"):
        toy_run(tmp_path, losses, loop.Pace(10, 5, 10, save))
    assert [x["step"] for x in records(tmp_path)] == [5]
    with oialr.Checkpoints(tmp_path / files.CHECKPOINTS) as checkpoints:
        assert checkpoints.steps == ()  # what is broken is not saved


def test_records_hold_means_since_the_last_one_and_the_last_step(tmp_path):
    files.begin(tmp_path)
    state, progress = toy_run(tmp_path, list(range(7)), loop.Pace(7, 3, 5, 7))
    assert int(state.step) == 7
    assert progress.evaluation == {"accuracy": 0.5}
    lines = records(tmp_path)
    losses = [(x["step"], x["loss"]) for x in lines if x["kind"] == "train"]
    assert losses == [(3, 1.0), (6, 4.0), (7, 6.0)]
    assert [x["step"] for x in lines if x["kind"] == "eval"] == [5, 7]


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=["nan", "inf"])
def test_an_evaluation_that_is_not_finite_is_recorded_saved_and_not_the_best(
    tmp_path, capsys, bad
):
    scores = {2: bad, 4: 0.6, 6: bad, 8: bad}

    def score(state):
        return {"accuracy": scores[int(state.step)], "other": 1.0}

    files.begin(tmp_path)
    state, progress = toy_run(
        tmp_path, [1.0] * 8, loop.Pace(8, 5, 2, 2), evaluate=score, keep=1, best="max"
    )
    assert int(state.step) == 8
    assert progress.best == {"step": 4, "accuracy": 0.6, "other": 1.0}
    lines = [x for x in records(tmp_path) if x["kind"] == "eval"]
    assert [x["accuracy"] for x in lines] == [None, 0.6, None, None]
    assert "step 6: accuracy of the evaluation not finite" in capsys.readouterr().out
    with oialr.Checkpoints(tmp_path / files.CHECKPOINTS) as checkpoints:
        assert checkpoints.steps == (4, 8)
        found = checkpoints.restore(state, state.tx)
    assert found.extra["progress"]["evaluation"] == {"accuracy": None, "other": 1.0}
    files.finish(tmp_path, {"test": progress.evaluation})
    assert report.draw(tmp_path)


def test_a_run_without_progress_ends_early_and_stays_so(tmp_path):
    scores = {2: 0.4, 4: 0.6, 6: 0.5, 8: 0.6, 10: 0.9}
    pace, goal = loop.Pace(10, 5, 2, 10), loop.Goal("accuracy", "max", patience=2)

    def score(state):
        return {"accuracy": scores[int(state.step)]}

    files.begin(tmp_path)
    state, progress = toy_run(tmp_path, [1.0] * 10, pace, goal=goal, evaluate=score)
    assert int(state.step) == 8
    assert progress.best == {"step": 4, "accuracy": 0.6}
    with oialr.Checkpoints(tmp_path / files.CHECKPOINTS) as checkpoints:
        assert checkpoints.steps == (8,)
        found = checkpoints.restore(state, state.tx)
    progress = loop.Progress(**found.extra["progress"])
    again, _ = toy_run(
        tmp_path, [1.0] * 10, pace, state, goal=goal, evaluate=score, progress=progress
    )
    assert int(again.step) == 8


def test_evaluations_of_the_dense_warm_up_do_not_count(tmp_path):
    scores = {2: 0.9, 4: 0.9, 6: 0.9, 8: 0.5, 10: 0.6, 12: 0.4, 14: 0.4, 16: 0.9}
    pace = loop.Pace(16, 4, 2, 2)
    goal = loop.Goal("accuracy", "max", patience=2, since=6)

    def score(state):
        return {"accuracy": scores[int(state.step)]}

    files.begin(tmp_path)
    state, progress = toy_run(
        tmp_path, [1.0] * 16, pace, goal=goal, evaluate=score, keep=2, best="max"
    )
    assert int(state.step) == 14  # two after 10, none of those before 6
    assert progress.best == {"step": 10, "accuracy": 0.6}
    with oialr.Checkpoints(tmp_path / files.CHECKPOINTS) as checkpoints:
        assert checkpoints.steps == (10, 12, 14)


def test_flops_are_counted_anew_after_an_event_and_go_on_with_a_resumed_run(tmp_path):
    tx = oialr.freeze_bases(optax.sgd(0.1))
    params = {"w": factor(jnp.eye(4), Axes((4, 4), (), (0,), (1,)))}
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    reports = []

    def step(state, t):
        if t == 2:
            cut, opt, report = oialr.truncate(
                state.params, state.opt_state, {"w": 2}, tx=tx
            )
            state = state.replace(params=cut, opt_state=opt)
            reports.append(report)
        return state.replace(step=state.step + 1), {"loss": jnp.ones(())}

    def rank(params):
        return params["w"].s.shape[-1]

    files.begin(tmp_path)
    progress = loop.Progress()
    with (
        loop.Interrupts() as interrupts,
        oialr.Checkpoints(tmp_path / files.CHECKPOINTS) as checkpoints,
    ):
        for steps, total in ((5, 4 + 4 + 2 + 2 + 2), (6, 16)):
            state, progress = loop.train(
                state,
                step,
                lambda t: t,
                half,
                pace=loop.Pace(steps, 3, 5, 9),
                folder=tmp_path,
                checkpoints=checkpoints,
                settings={},
                interrupts=interrupts,
                progress=progress,
                reports=reports,
                flops=rank,
            )
            assert progress.flops == total


@pytest.mark.parametrize(("best", "kept"), [("max", 4), ("min", 2)])
def test_the_best_evaluation_is_kept(tmp_path, best, kept):
    scores = {2: 0.4, 4: 0.6, 6: 0.5}
    files.begin(tmp_path)
    _, progress = toy_run(
        tmp_path,
        [1.0] * 6,
        loop.Pace(6, 3, 2, 6),
        goal=loop.Goal("mse", best),
        evaluate=lambda state: {"mse": scores[int(state.step)]},
    )
    assert progress.best == {"step": kept, "mse": scores[kept]}
    assert progress.evaluation == {"mse": 0.5}


@pytest.mark.parametrize("save", range(1, 8))
def test_a_record_goes_on_where_its_checkpoint_was(tmp_path, save):
    """Whatever was written after it, and between two lines about training."""
    losses, pace = [x / 3 for x in range(8)], loop.Pace(8, 3, 4, save)
    files.begin(tmp_path)
    toy_run(tmp_path, losses, pace)
    whole = records(tmp_path)
    path = tmp_path / files.CHECKPOINTS
    for step in sorted((int(x.name) for x in path.iterdir()), reverse=True)[:-1]:
        shutil.rmtree(path / str(step))
    _, state = toy(losses)
    with oialr.Checkpoints(path) as checkpoints:
        found = checkpoints.restore(state, state.tx)
    assert int(found.state.step) == save
    progress = loop.Progress(**found.extra["progress"])
    files.resume(tmp_path, progress.bytes)
    assert len(records(tmp_path)) == sum(x["step"] <= save for x in whole)
    toy_run(tmp_path, losses, pace, found.state, progress=progress)
    assert records(tmp_path) == whole
    seconds = [x["seconds"] for x in records(tmp_path, timed=True)]
    assert seconds == sorted(seconds)


def test_the_host_is_two_steps_before_the_device_at_most(tmp_path):
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 40, lambda _, y: jnp.tanh(y @ x), x))
    losses, waiting = [], []

    def step(state, t):
        losses.append(slow(jnp.full((400, 400), float(t)))[0, 0])
        return state.replace(step=state.step + 1), {"loss": losses[-1]}

    def batch(t):
        waiting.append(sum(not x.is_ready() for x in losses))
        return t

    files.begin(tmp_path)
    toy_run(tmp_path, [], loop.Pace(12, 12, 12, 12), step=step, batch=batch)
    assert 1 <= max(waiting) <= loop.AHEAD == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_after_the_step(tmp_path, number, capsys):
    before = signal.getsignal(number)
    step, state = toy([1.0] * 9)

    def interrupted(state, t):
        if t == 4:
            signal.raise_signal(number)
        return step(state, t)

    files.begin(tmp_path)
    with pytest.raises(loop.StoppedError, match="before step 5 of 9; it is saved"):
        toy_run(tmp_path, [], loop.Pace(9, 3, 9, 9), step=interrupted)
    assert "stopping after this step" in capsys.readouterr().err
    assert signal.getsignal(number) == before
    with oialr.Checkpoints(tmp_path / files.CHECKPOINTS) as checkpoints:
        assert checkpoints.steps == (5,)
        found = checkpoints.restore(state, state.tx)
    assert found.extra["progress"]["window"] == [{"loss": 1.0}] * 2


def test_several_processes_are_stopped_by_the_service_of_jax(monkeypatch, capsys):
    """SIGTERM is the service's, SIGINT becomes one, and the service says when."""
    terms, asked = [], []
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        loop.multihost_utils,
        "reached_preemption_sync_point",
        lambda step: asked.append(step) or step == 5,
    )
    before = signal.signal(signal.SIGTERM, lambda *_: terms.append(1))
    try:
        with loop.Interrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            assert [interrupts.reached(t) for t in (4, 5)] == [False, True]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (terms, asked) == ([1], [4, 5])
    assert "stopping after this step" in capsys.readouterr().err


def stopped(out, at, *arguments):
    """The program, asked to stop by SIGTERM after the step `at`."""
    real = loop.train

    def train(state, step, *args, **options):
        def watched(state, batch):
            if int(state.step) == at:
                signal.raise_signal(signal.SIGTERM)
            return step(state, batch)

        return real(state, watched, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train", train)
        start(out, *arguments)


@pytest.mark.parametrize(
    ("at", "arguments"),
    [
        pytest.param(1, LOW_RANK, marks=pytest.mark.long),
        (4, LOW_RANK),
        (7, [*LOW_RANK, "--lag", "2"]),
    ],
    ids=["dense", "after_the_conversion", "ranks_wait"],
)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    low_rank, tmp_path, at, arguments, capsys
):
    whole = low_rank
    if arguments != LOW_RANK:
        start(tmp_path / "whole", *arguments)
        whole = tmp_path / "whole" / low_rank.name
    capsys.readouterr()
    stopped(tmp_path / "parts", at, *arguments)
    said = capsys.readouterr().out
    assert f"stopped before step {at + 1} of {STEPS}; it is saved" in said
    assert "--resume" in said
    folder = tmp_path / "parts" / "digits-oialr-seed0"
    assert not (folder / "summary.json").exists()
    with pytest.raises(SystemExit, match="go on with it by --resume"):
        start(tmp_path / "parts", *arguments)
    start(tmp_path / "parts", "--resume", *arguments)
    assert records(folder) == records(whole)
    assert final(folder) == final(whole)
    summaries = [json.loads((x / "summary.json").read_text()) for x in (folder, whole)]
    for name in ("test_accuracy", "test_loss", "ranks", "stored_weights"):
        assert summaries[0][name] == summaries[1][name]
    assert (folder / "plots" / "ranks.png").exists()


def final(folder):
    """The checksums and shapes of every array of the last checkpoint."""
    with oialr.Checkpoints(folder / files.CHECKPOINTS) as checkpoints:
        step = checkpoints.steps[-1]
        return step, checkpoints._contents(step)["arrays"]


def test_a_resumed_run_that_is_over_says_its_result_again(low_rank, capsys):
    before = (low_rank / "summary.json").read_text()
    lines = records(low_rank, timed=True)
    start(low_rank.parent, "--resume", *LOW_RANK)
    assert "on the test set, " in capsys.readouterr().out
    after = json.loads((low_rank / "summary.json").read_text())
    for name in ("test_accuracy", "test_loss", "ranks", "stored_weights"):
        assert after[name] == json.loads(before)[name]
    assert records(low_rank, timed=True) == lines


def test_another_run_is_not_resumed(low_rank, tmp_path):
    copy = shutil.copytree(low_rank.parent, tmp_path / "copy")
    with pytest.raises(SystemExit, match=r"cutoff was 0\.9 and is 0\.8; every was"):
        start(copy, "--resume", "--cutoff", "0.8")
    assert records(copy / low_rank.name) == records(low_rank)


def test_resume_without_a_checkpoint_begins(tmp_path):
    start(tmp_path, "--resume", "--method", "dense", "--seed", "3")
    assert (tmp_path / "digits-dense-seed3" / "summary.json").exists()


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    folder = tmp_path / "run"
    files.begin(folder)
    files.append(folder / files.METRICS, {"kind": "train"})
    files.finish(folder, {})
    assert report.draw(folder) == []
    assert not folder.exists()


def test_a_run_that_has_ended_is_not_begun_again(low_rank, tmp_path):
    copy = shutil.copytree(low_rank, tmp_path / low_rank.name)
    before = records(copy)
    for more in ([], ["--weight-decay", "0.5"]):
        with pytest.raises(SystemExit, match=r"^error: .* has ended: choose another"):
            start(tmp_path, *LOW_RANK, *more)
        assert records(copy) == before
        assert (copy / files.SUMMARY).exists()
    both = ["--resume", "--overwrite"]
    with pytest.raises(SystemExit, match="give one of them"):
        start(tmp_path, *LOW_RANK, *both)
    start(tmp_path, "--method", "dense", "--name", low_rank.name, "--overwrite")
    stored = [x["stored_fraction"] for x in records(copy) if "stored_fraction" in x]
    assert set(stored) == {1}


def test_a_run_in_a_folder_that_another_one_holds_is_refused(tmp_path):
    folder = tmp_path / "digits-dense-seed0"
    with (
        files.held(folder),
        pytest.raises(SystemExit, match=rf"^error: process {os.getpid()} writes in"),
    ):
        start(tmp_path, "--method", "dense", "--resume")
    assert [x.name for x in folder.iterdir()] == [files.LOCK]


@pytest.mark.parametrize("name", ["--out", "--data-dir", "--compilation-cache"])
def test_a_url_is_refused_before_anything_is_read(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "task", lambda _: pytest.fail("data was read"))
    with pytest.raises(SystemExit, match=r"^error: gs:/b/x is a URL: name a folder"):
        images.main(["digits", name, "gs://b/x"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [["--out", "FILE"], ["--name", "FILE/x"]], ids=str)
def test_a_file_is_refused_before_anything_is_read(given, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(images, "task", lambda _: pytest.fail("data was read"))
    given = [x.replace("FILE", str(tmp_path / "file")) for x in given]
    with pytest.raises(SystemExit, match=r"^error: .*file is a file: name another"):
        images.main(["digits", *given])


def test_a_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = []
    given = ["digits", "--out", "~/x", "--data-dir=~/d"]
    command.main("x", images.PRESETS, _given(found), given)
    assert (found[0].out, found[0].data_dir) == (tmp_path / "x", tmp_path / "d")


def _given(found):
    """A program that only remembers its settings."""

    def run(settings, *, name):
        found.append(settings)
        fractions = {"stored_fraction": 1.0, "trainable_fraction": 1.0}
        return {**fractions, "wall_seconds": 0.0, "test_loss": math.nan}

    return run


def test_a_result_that_is_not_finite_is_said(capsys):
    command.main("x", images.PRESETS, _given([]), ["digits"])
    assert "loss not finite on the test set" in capsys.readouterr().out


def test_a_checkpoint_of_no_training_run_is_not_resumed(
    low_rank, tmp_path, monkeypatch
):
    """As that which train.compress writes."""
    shutil.copytree(low_rank, tmp_path / low_rank.name)
    real = oialr.Checkpoints.restore

    def without(self, *args):
        found = real(self, *args)
        return found._replace(extra={"settings": found.extra["settings"]})

    monkeypatch.setattr(oialr.Checkpoints, "restore", without)
    with pytest.raises(SystemExit, match="is no run of this version: choose"):
        start(tmp_path, *LOW_RANK, "--resume")


def test_events_scale_with_the_length_of_the_run():
    settings = images.PRESETS["digits"][1]
    for steps in (30, 300, 3000):
        short = dataclasses.replace(settings, steps=steps)
        events = np.array(common.schedule(short).events(steps))
        assert len(events) == len(common.schedule(settings).events(settings.steps))
        np.testing.assert_allclose(events[0] / steps, settings.delay, atol=0.02)


def test_presets_name_data_and_models_that_exist():
    for _, settings in images.PRESETS.values():
        assert settings.dataset in images.DATASETS
        assert settings.model in images.MODELS


def test_decay_spares_biases_and_scales():
    settings = dataclasses.replace(
        images.PRESETS["digits"][1], learning_rate=0.1, weight_decay=1.0, warmup=0.0
    )
    tx = common.optimizer(settings)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    zeros = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0.0)


@pytest.mark.parametrize("mesh", ["data=1", "data=8"])
def test_evaluation_counts_every_test_image_once(mesh):
    data = digits.load()
    repeated = dataclasses.replace(
        data,
        test_image=np.concatenate([data.test_image] * 2),
        test_label=np.concatenate([data.test_label] * 2),
    )
    truth = {
        x.tobytes(): y for x, y in zip(data.test_image, data.test_label, strict=True)
    }

    def oracle(image):
        labels = np.array([truth[x.tobytes()] for x in np.asarray(image)])
        wrong = np.arange(len(labels)) % 4 == 0
        return 50 * jnp.eye(10)[(labels + wrong) % 10]

    layout = oialr.sharding.Layout(oialr.sharding.make_mesh(mesh))
    found = images.evaluate(oracle, layout, repeated, 0.0)
    assert found["accuracy"] == pytest.approx(0.75)
    assert found["loss"] == pytest.approx(12.5, rel=1e-4)


CHANGES = {
    "crop_area": {"crop_area": 0.3},
    "pad": {"pad": 2},
    "flip": {"flip": True},
    "erase": {"erase": 1.0},
    "mix": {"mix": True},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_images_are_changed_as_the_settings_say_and_by_the_key_alone(change):
    data = digits.load()
    settings = images.PRESETS["digits"][1]
    batch = data.rows("test", np.arange(16))
    image, label = jnp.asarray(batch["image"]), jnp.asarray(batch["label"])

    def changed(settings, seed):
        return images.augmented(settings, data, jax.random.key(seed), image, label)

    plain, target = changed(settings, 0)
    expected = standardize(image, data.mean, data.deviation)
    np.testing.assert_array_equal(plain, expected)
    np.testing.assert_allclose(jnp.sum(target, -1), 1, rtol=1e-6)
    np.testing.assert_array_equal(jnp.argmax(target, -1), label)
    np.testing.assert_allclose(jnp.min(target), settings.smoothing / 10, rtol=1e-5)
    settings = dataclasses.replace(settings, **change)
    first, again, other = (
        changed(settings, 1),
        changed(settings, 1),
        changed(settings, 2),
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.any(first[0] != other[0])
    assert np.any(first[0] != plain)
    assert np.any(first[1] != target) == ("mix" in change)
