"""Real processes: killed at any moment, stopped by a signal, or two of them as one."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise

import jax
import numpy as np
import pytest

import oialr_jax as oialr
from train import files

STEPS = 60  # decisions at 20, 32 and 44, their events four steps later
RUN = [
    *("digits", "--steps", str(STEPS), "--batch", "32", "--cutoff", "0.6"),
    *("--delay", "0.334", "--every", "0.2", "--layer-step", "1", "--stop", "0.9"),
    *("--lag", "4", "--log-every", "4", "--eval-every", "20", "--save-every", "3"),
]
SHALLOW = """
from train import images
model, small = images.MODELS["vit-digits"]
images.MODELS["vit-digits"] = model.clone(depth=1), small
"""  # of four layers a process traces for most of its time
PROGRAM = SHALLOW + "images.main()"
# Kills itself at a moment of which no other process could know: argv[1] is a function
# by module and name, argv[2] the number of its call, argv[3] how long after its end
# (before its beginning, if negative).
KILLED = f"""
{SHALLOW}
import importlib, os, signal, sys, threading, time
place, count, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
del sys.argv[1:4]
module, name = place.split(":")
owner = importlib.import_module(module)
*parents, name = name.split(".")
for parent in parents:
    owner = getattr(owner, parent)
real, calls = getattr(owner, name), [0]
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def watched(*args, **options):
    calls[0] += 1
    if calls[0] == count and delay < 0:
        die()
    out = real(*args, **options)
    if calls[0] == count:
        threading.Timer(delay, die).start() if delay else die()
    return out
setattr(owner, name, watched)
images.main()
"""
ASLEEP = """
import time
from oialr_jax.adaptive import AdaptiveStep
real = AdaptiveStep.__call__
def slow(*args):
    out = real(*args)
    print("asleep", flush=True)
    time.sleep(600)
    return out
AdaptiveStep.__call__ = slow
"""
SLOW = ASLEEP.replace("600", "0.3")
STEP = "oialr_jax.adaptive:AdaptiveStep.__call__"


OLDER_PYTHON = os.environ.get("OLDER_PYTHON")
"""An interpreter with this library on an older JAX; .ci/run sets it."""


def environment():
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags = [x for x in flags if "device_count" not in x]
    clean = os.environ | {"XLA_FLAGS": " ".join(flags)}
    clean["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # which take longer than the runs
    return clean | {"JAX_PLATFORMS": "cpu"}  # one device for each process


def start(code, *arguments, python=sys.executable):
    return subprocess.Popen(
        [python, "-c", code, *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process, code=0):
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err[-3000:]
    return out, err


def wait_for(record, *processes):
    """Until there is a line; meanwhile what they say is read, or their pipes fill."""
    while not record.exists() or not record.read_text():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=0.05)


def records(folder):
    lines = (folder / files.METRICS).read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines
    ]


def final(folder):
    """Step, shapes and checksums of every array of the last checkpoint."""
    with oialr.Checkpoints(folder / files.CHECKPOINTS) as checkpoints:
        step = checkpoints.steps[-1]
        return step, checkpoints._contents(step)["arrays"]


def assert_same_run(some, others):
    """The same events with the same ranks, and the same losses to rounding."""
    assert len(some) == len(others)
    for a, b in zip(some, others, strict=True):
        assert a.keys() == b.keys()
        if a["kind"] == "event":
            ranks = [[x["after"] for x in y["event"]["layers"]] for y in (a, b)]
            assert ranks[0] == ranks[1]
        else:
            np.testing.assert_allclose(
                [a[k] for k in a if k not in ("kind", "accuracy")],
                [b[k] for k in b if k not in ("kind", "accuracy")],
                rtol=1e-5,
            )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run, and a folder of compiled programs for the others."""
    out = tmp_path_factory.mktemp("whole")
    arguments = [*RUN, "--out", out, "--compilation-cache", out / "cache"]
    end(start(PROGRAM, *arguments))
    folder = out / "digits-oialr-seed0"
    kinds = [(x["step"], x["event"]["kind"]) for x in records(folder) if "event" in x]
    assert kinds == [(24, "conversion"), (36, "truncation"), (48, "truncation")]
    return folder


def kills(*, full):
    """Where processes die one after the other: function, call, seconds after it."""
    chance = random.Random(time.time_ns())

    def somewhere():
        return STEP, chance.randint(1, 5), round(chance.uniform(0, 0.5), 3)

    if not full:
        return [
            (
                "oialr_jax.checkpoint:Checkpoints.save",
                2,
                0.0,
            ),  # files are being written
            ("oialr_jax.adaptive:choose", 1, chance.uniform(0.3, 0.6)),  # ranks wait
            somewhere(),
        ]
    return [
        somewhere(),
        ("oialr_jax.checkpoint:Checkpoints.save", 2, 0.0),
        ("orbax.checkpoint:CheckpointManager.save", 1, chance.uniform(0.0, 0.05)),
        ("oialr_jax.adaptive:choose", 1, -1),
        ("oialr_jax.adaptive:choose", 1, chance.uniform(0.3, 0.6)),
        ("oialr_jax.adaptive:compile_ahead", 1, -1),
        ("oialr_jax.adaptive:apply_ranks", 1, 0.0),  # its result is lost
        somewhere(),
        ("oialr_jax.adaptive:apply_ranks", 1, -1),
        ("train.loop:_fractions", 3, 0.0),
        somewhere(),
        ("train.files:finish", 1, -1),
    ]


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.long)])
def test_after_every_kill_a_run_goes_on_bit_for_bit(full, whole, tmp_path):
    arguments = [*RUN, "--out", tmp_path, "--resume"]
    arguments += ["--compilation-cache", whole.parent / "cache"]
    reached = []
    for kill in kills(full=full):
        end(start(KILLED, *kill, *arguments), -signal.SIGKILL)
        found = [x.name for x in (tmp_path / whole.name / files.CHECKPOINTS).iterdir()]
        reached.append((kill, sorted(found)))
    end(start(PROGRAM, *arguments))
    print(*reached, sep="\n")
    folder = tmp_path / whole.name
    assert records(folder) == records(whole), reached
    assert final(folder) == final(whole), reached


@pytest.mark.long
def test_a_signal_from_outside_saves_and_the_run_goes_on(whole, tmp_path):
    arguments = [*RUN, "--out", tmp_path, "--resume"]
    arguments += ["--compilation-cache", whole.parent / "cache"]
    process = start(PROGRAM, *arguments)
    record = tmp_path / whole.name / files.METRICS
    wait_for(record, process)
    process.terminate()
    out, _ = end(process)
    assert "it is saved. Go on with the same command and --resume" in out
    assert not (record.parent / files.SUMMARY).exists()
    end(start(PROGRAM, *arguments))
    assert records(record.parent) == records(whole)
    assert final(record.parent) == final(whole)


@pytest.mark.long
def test_a_second_interrupt_quits_at_once(tmp_path):
    process = start(ASLEEP + PROGRAM, *RUN, "--out", tmp_path)
    assert process.stdout.readline() == "asleep\n"
    process.send_signal(signal.SIGINT)
    said = ""
    while "stopping after this step" not in said:
        said = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    began = time.monotonic()
    end(process, 128 + signal.SIGINT)
    assert time.monotonic() - began < 60


@pytest.mark.long
@pytest.mark.skipif(not OLDER_PYTHON, reason="OLDER_PYTHON is not set")
@pytest.mark.parametrize("event", [1, 3], ids=["dense", "low-rank"])
def test_a_checkpoint_of_an_older_jax_restores(event, whole, tmp_path):
    """Killed just before an event, with ranks waiting for it."""
    version = "import jax; print(jax.__version__)"
    older = end(start(version, python=OLDER_PYTHON))[0].strip()
    assert older != jax.__version__
    arguments = [*RUN, "--out", tmp_path, "--resume"]
    kill = ("oialr_jax.adaptive:apply_ranks", event, -1)
    killed = start(KILLED, *kill, *arguments, python=OLDER_PYTHON)
    end(killed, -signal.SIGKILL)
    step = final(tmp_path / whole.name)[0]
    assert step in ((21, 24), (45, 48))[event == 3]
    before = records(tmp_path / whole.name)
    end(start(PROGRAM, *arguments))
    after = records(tmp_path / whole.name)
    kept = [x for x in before if x["step"] < step]
    assert after[: len(kept)] == kept
    assert_same_run(after, records(whole))


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.long
def test_two_processes_are_one(whole, tmp_path):
    arguments = [*RUN, "--out", tmp_path, "--distributed", "--processes", 2]
    arguments += ["--coordinator", f"127.0.0.1:{free_port()}"]
    both = [start(PROGRAM, *arguments, "--process-id", i) for i in range(2)]
    said = [end(process)[0] for process in both]
    assert "on the test set, " in said[0]
    assert [x for x in said[1].splitlines() if not x.startswith("[Gloo]")] == []
    two = records(tmp_path / whole.name)
    assert_same_run(two, records(whole))
    # one goes on with what two have saved
    arguments = [*RUN, "--out", tmp_path, "--resume"]
    end(start(PROGRAM, *arguments))
    assert records(tmp_path / whole.name) == two


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_of_two_processes_is_asked_and_both_stop(number, whole, tmp_path):
    arguments = [*RUN, "--out", tmp_path, "--distributed", "--processes", 2]
    arguments += ["--coordinator", f"127.0.0.1:{free_port()}"]
    both = [start(SLOW + PROGRAM, *arguments, "--process-id", i) for i in range(2)]
    record = tmp_path / whole.name / files.METRICS
    wait_for(record, *both)
    both[1].send_signal(number)
    said = [end(process)[0] for process in both]
    assert all("it is saved. Go on with the same command" in x for x in said)
    assert not (record.parent / files.SUMMARY).exists()
    end(start(PROGRAM, *RUN, "--out", tmp_path, "--resume"))
    assert_same_run(records(record.parent), records(whole))


@pytest.mark.long
def test_processes_that_do_not_agree_say_so(tmp_path):
    """Other ranks in one of them would have all wait for each other for ever."""
    lazy = ["0" if x == "4" and y == "--lag" else x for y, x in pairwise(["", *RUN])]
    arguments = [*lazy, "--out", tmp_path, "--distributed", "--processes", 2]
    arguments += ["--coordinator", f"127.0.0.1:{free_port()}"]
    other = ["0.01" if x == "0.6" else x for x in arguments]
    both = [
        start(PROGRAM, *each, "--process-id", i)
        for i, each in enumerate((arguments, other))
    ]
    errors = [process.communicate(timeout=240)[1] for process in both]
    assert all(process.returncode != 0 for process in both)
    assert any("the processes of this run do not agree" in x for x in errors)
