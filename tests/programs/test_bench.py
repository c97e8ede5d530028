"""The benchmark measures what it says, on models too small to be timed in earnest."""

import dataclasses
import json
import math
import os
import pathlib
import sys
import time

import jax
import numpy as np
import pytest
from helpers import assert_close

import oialr_jax as oialr
from oialr_jax import cost
from train import files, process
from train.bench import __main__ as program
from train.bench import events, layers, peers, problem, steps, timing
from train.bench.settings import Settings, read_rates
from train.models.mlp import MLP
from train.models.resnet import ResNet
from train.models.vit import VisionTransformer

TINY_VIT = (
    VisionTransformer(patch=8, depth=1, heads=2, width=32, classes=10, qkv_bias=False),
    (16, 16, 3),
)
TINY_RESNET = (ResNet(widths=(8, 16), blocks=(1, 1), classes=10), (8, 8, 3))
TINY_MLP = (MLP((32, 32), classes=10), (4, 4, 1))
LARGE = ("mini-vit", "resnet18")  # and slow to trace
TINY = Settings(batch=4, fractions=(0.5,), repeats=1)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    cases = {"mini-vit": TINY_VIT, "resnet18": TINY_RESNET, "mlp": TINY_MLP}
    monkeypatch.setattr(problem, "CASES", cases)
    monkeypatch.setattr(timing, "SAMPLE", 1e-4)
    small = (layers.Layer(8, 12, 16), layers.Layer(32, 36, 8, side=4))
    monkeypatch.setattr(layers, "LAYERS", small)


def test_what_is_compared_runs_in_turn_and_once_unmeasured(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE", 0.0)
    calls = []
    runs = [lambda: calls.append("a"), lambda: calls.append("b")]
    times = timing.interleaved(runs, repeats=3)
    assert (
        "".join(calls) == "aabb" + 3 * "aabb"
    )  # to see how long a run is, then thrice
    assert all(least <= middle <= most for middle, least, most in times)


def test_a_short_run_is_repeated_to_fill_a_sample(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE", 0.05)
    calls = []

    def run():
        calls.append(0)
        time.sleep(0.005)

    ((middle, *_),) = timing.interleaved([run], repeats=1)
    assert 2 + 1 + 5 <= len(calls) <= 2 + 1 + 10
    assert 0.005 <= middle <= 0.05


@pytest.mark.parametrize(
    "model", [*(pytest.param(x, marks=pytest.mark.long) for x in LARGE), "mlp"]
)
def test_steps_has_a_row_for_every_order_and_peer(model):
    rows = steps.steps(dataclasses.replace(TINY, models=(model,)))
    assert [row["order"] for row in rows] == [
        "dense",
        "auto",
        "chain",
        "merged",
        "rebuilt",
        "galore",
        "lora",
    ]
    wanted = "model batch rank_fraction order step_ms ratio_to_dense flops_ratio"
    wanted += " temp_bytes state_bytes backend"
    for row in rows:
        assert set(wanted.split()) <= set(row)
        assert row["step_ms_min"] <= row["step_ms"] <= row["step_ms_max"]
        assert row["ratio_to_dense"] == pytest.approx(
            row["step_ms"] / rows[0]["step_ms"]
        )
    by_order = {row["order"]: row for row in rows}
    assert by_order["dense"]["ratio_to_dense"] == 1
    low = [by_order[x]["flops_ratio"] for x in ("chain", "merged", "rebuilt")]
    assert by_order["auto"]["flops_ratio"] <= max(low)
    assert by_order["rebuilt"]["flops_ratio"] > 1
    assert by_order["chain"]["state_bytes"] < by_order["dense"]["state_bytes"]


def test_orders_of_the_same_program_are_one_measurement():
    """Here auto picks the chain for every matrix."""
    settings = dataclasses.replace(TINY, models=("mlp",), fractions=(0.1,), peers=())
    rows = {row["order"]: row for row in steps.steps(settings)}
    assert rows["auto"]["step_ms"] == rows["chain"]["step_ms"]
    assert rows["merged"]["step_ms"] != rows["rebuilt"]["step_ms"]


def test_events_tell_what_stalls(monkeypatch):
    monkeypatch.setattr(events, "LADDER_EVENTS", 2)
    rows = events.events(dataclasses.replace(TINY, lag=4))
    assert [(row["lag"], row["step"]) for row in rows] == [
        (0, 10),
        (0, 30),
        (4, 14),
        (4, 34),
    ]
    for row in rows:
        assert row["compilations"] == 1
        assert row["event_ms"] > 0
        assert row["compile_ms"] > 0
        assert row["stall_steps"] == pytest.approx(row["stall_ms"] / row["step_ms"])
        assert row["waiting_ms"] >= 0


def test_layers_compare_every_order_with_the_estimate():
    rows = layers.layers(dataclasses.replace(TINY, fractions=(1.0, 0.25)))
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        layer = next(x for x in layers.LAYERS if x.name == row["model"])
        rank = max(1, int(row["rank_fraction"] * min(layer.m, layer.n)))
        window = 0 if layer.side is None else 9
        load = cost.Workload(layer.rows, layer.m, layer.n, rank, window=window)
        order, dense = cost.Order(row["picked"]), cost.Order.DENSE
        assert row["picked"] == row["order"] or row["order"] == "auto"
        share = cost.flops(order, load).total / cost.flops(dense, load).total
        assert row["flops_ratio"] == pytest.approx(share)
        rates = cost.RATES["cpu"]
        estimate = cost.seconds(order, load, rates) / cost.seconds(dense, load, rates)
        assert row["estimated_ratio"] == pytest.approx(estimate)


def test_nested_compilations_count_once():
    spans = [(1.0, 2.0), (1.2, 1.5), (1.8, 2.5), (4.0, 5.0)]
    log = [timing.Span(*x, main=True) for x in spans]
    log.append(timing.Span(0.0, 10.0, main=False))
    assert timing.covered(log, main=True) == pytest.approx(2.5)
    assert timing.covered(log, main=False) == pytest.approx(10)


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    file = tmp_path / "steps.json"
    command = ["--suite", "steps", "--models", "mlp", "--batch", "4", "--repeats", "1"]
    command += ["--fractions", "0.5", "--peers", "lora", "--json", str(file)]
    program.main(command)
    printed = capsys.readouterr().out.splitlines()
    record = json.loads(file.read_text())
    assert printed[0].startswith("| model | batch |")
    assert len(printed) == 2 + len(record["rows"]) == 2 + 6
    assert record["command"][-len(command) :] == command
    assert {"device", "cores", "jax", "date", "huge_pages"} <= set(record)


def test_a_result_that_cannot_be_written_is_not_measured(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(program, "SUITES", {"steps": lambda _: pytest.fail("measured")})
    with pytest.raises(SystemExit, match="file is a file: name another folder"):
        program.main(["--json", str(tmp_path / "file" / "x.json")])
    with pytest.raises(SystemExit, match="cannot be written"):
        program.main(["--json", str(tmp_path)])


@dataclasses.dataclass(frozen=True)
class _Place:
    json: pathlib.Path


def test_what_cannot_be_written_any_more_has_been_printed(
    tmp_path, monkeypatch, capsys
):
    given = "train.x", _Place, lambda _: [{"ms": 1.0}], str, ["--json", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(files, "writable_file", lambda path: path)  # as it was before
        with pytest.raises(SystemExit, match=f"^error: {tmp_path} is not written: "):
            timing.command(*given)
    assert "{'ms': 1.0}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="cannot be written"):
        timing.command(*given)
    assert capsys.readouterr().out == ""


@pytest.mark.long
def test_calibration_writes_rates_that_can_be_read(tmp_path, capsys):
    file = tmp_path / "rates.json"
    program.main(["--suite", "layers", "--calibrate", "--repeats", "1", "--batch", "4",
                "--json", str(file)])  # fmt: skip
    rates = read_rates(file)
    assert dataclasses.asdict(rates) == json.loads(capsys.readouterr().out)
    assert all(math.isfinite(x) for x in dataclasses.asdict(rates).values())


@pytest.mark.parametrize("text", ["{}", "{", '{"dot": 1.0, "speed": 2.0}'])
def test_rates_of_the_wrong_form_are_an_error(text, tmp_path):
    file = tmp_path / "rates.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"rates\.json does not hold the rates"):
        read_rates(file)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["--models", "mini-vitt"], "unknown model 'mini-vitt', did you mean"),
        (["--peers", "galor"], "unknown peer 'galor', did you mean 'galore'?"),
        (
            ["--models", "mlp", "--peers", "torch"],
            "torch is for vision transformers alone, not",
        ),
        (["--rates", "none.json"], "none.json"),
    ],
)
def test_bad_settings_are_said_in_one_line(command, message):
    tail = ["--batch", "2", "--repeats", "1", "--fractions", "0.5", "--orders", "auto"]
    with pytest.raises(SystemExit, match=message):
        program.main([*command, *tail])


def test_without_pytorch_its_peer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    made = problem.Problem("mini-vit", 2, "float32")
    with pytest.raises(ValueError, match=r'pip install -e "\.\[peers\]"'):
        peers.PEERS["torch"](made, 0.5)


# Peers


@pytest.mark.parametrize("case", [TINY_VIT, TINY_RESNET, TINY_MLP])
def test_an_adapter_adds_its_product_to_the_kernel(case):
    """x W + (x A) B = x (W + A B), for convolutions as well."""
    model, image = case
    x = jax.random.normal(jax.random.key(0), (2, *image))
    variables = model.init(jax.random.key(1), x)
    params = variables["params"]
    rest = {k: v for k, v in variables.items() if k != "params"}

    def apply(params, x):
        return model.apply({"params": params, **rest}, x)

    found = oialr.select(oialr.find_matrices(apply, params, x))
    ranks = {matrix.path: 3 for matrix in found}
    pairs = peers.adapters(params, ranks, jax.random.key(2))
    assert_close(peers.lora(apply, pairs)(params, x), apply(params, x), 0)
    pairs = jax.tree.map(
        lambda leaf: 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape),
        pairs,
    )

    def merged(path, leaf):
        name = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
        if name not in pairs or path[-1].key != "kernel":
            return leaf
        a, b = pairs[name]
        return leaf + a @ b.reshape((1,) * (a.ndim - 2) + b.shape)

    expected = apply(jax.tree_util.tree_map_with_path(merged, params), x)
    assert len(pairs) == len(found) > 1
    assert_close(peers.lora(apply, pairs)(params, x), expected, 1e-4)
    assert np.max(np.abs(expected - apply(params, x))) > 1e-3


# The process


def test_a_program_starts_again_with_huge_pages_once(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *args: started.append(args))
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.39"))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert not process.has_huge_pages()
    process.use_huge_pages()
    ((program, arguments, environment),) = started
    assert (program, arguments) == (sys.executable, sys.orig_argv)
    assert environment["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    monkeypatch.setenv("GLIBC_TUNABLES", environment["GLIBC_TUNABLES"])
    assert process.has_huge_pages()
    process.use_huge_pages()
    monkeypatch.delenv("GLIBC_TUNABLES")
    monkeypatch.setattr("platform.libc_ver", lambda: ("", ""))
    process.use_huge_pages()
    assert len(started) == 1
