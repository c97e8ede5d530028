"""The tables of train/results: each number is in the row and column that names it."""

import pytest

from train.results import __main__ as results


def step(order, rank, ratio, flops=1.0, memory=200, state=10):
    times = {"step_ms": 1886.4 * ratio, "ratio_to_dense": ratio, "flops_ratio": flops}
    sizes = {"temp_bytes": memory, "state_bytes": state}
    return {"model": "net", "order": order, "rank_fraction": rank, **times, **sizes}


STEPS = [
    step("dense", 1, 1.0),
    step("auto", 1, 0.9, 0.8, 100, 5),
    step("lora", 1, 1.2, None),
    step("auto", 0.25, 0.3, 0.2, 50, 1),
    step("galore", 0.25, 0.7, None),
]


def layer(order, rank, ratio, estimated):
    more = {"ratio_to_dense": ratio, "estimated_ratio": estimated}
    return {"model": "dot", "order": order, "rank_fraction": rank, **more}


LAYERS = [
    layer("chain", 1, 9.0, 9.0),
    {**layer("auto", 1, 2.0, 1.5), "picked": "merged"},
    {**layer("auto", 0.5, 0.5, 0.4), "picked": "chain"},
]


def route(what, method, ms, ratio, error, **more):
    took = {"ms": ms, "ratio": ratio, "values_error": error}
    return {"what": what, "method": method, **took, **more}


ROUTES = [
    route("a", "svd", 40, 1.0, 1e-6, excess=1e-7),
    route("a", "gram", 10, 0.25, 2e-4),
    route("b", "svd", 80, 1.0, 3e-6, excess=2e-7),
    route("b", "gram", 60, 0.75, 1e-4),
]


def compressed(keep, **ways):
    found = {way: {"cosine": x, "neighbours": x / 2} for way, x in ways.items()}
    told = {"predicted": 0.99, "stored_weights": 2e6, "seconds": 30}
    return {"keep": keep, **found, **told}


RUNS = [
    compressed(0.7, plain=0.2, activations=0.4, curvature=0.6),
    compressed(0.5, plain=0.1, activations=0.3, curvature=0.5),
    {**compressed(0.7, tuned=0.8), "seconds": 90},
]


def look(rank, step, look, sums):
    times = {"step_ms": step, "look_ms": look, "ratio": look / step}
    return {"model": "net", "rank_fraction": rank, **times, "sums_bytes": sums}


LOOKS = [
    {**look(None, 10.0, 15.0, 300), "weights_bytes": 100},
    {**look(0.25, 4.0, 5.0, 20), "weights_bytes": 80},
]


def stored(seed, form, before, lost, size):
    told = {"form": form, "dtype": "int8", "of_run": before, "lost": lost}
    return {"run": f"net-seed{seed}", **told, "bytes": size}


STORED = [
    stored(1, "core", 0.9, 0.01, 1000),
    stored(1, "dense", 0.9, 0.0, 5000),
    stored(20, "core", 0.8, -0.02, 3000),
]


@pytest.mark.parametrize(
    ("table", "rows", "lines"),
    [
        (
            results.steps,
            STEPS,
            [
                "| model, dense step | rank | auto | lora | galore | FLOPs "
                "| temporary memory | optimizer state |",
                "| net, 1890 ms | 1 | 0.90 | 1.20 |  | 0.8 | 0.5 | 0.5 |",
                "| net, 1890 ms | 1/4 | 0.30 |  | 0.70 | 0.2 | 0.25 | 0.1 |",
            ],
        ),
        (
            results.layers,
            LAYERS,
            [
                "| layer | 1 | 1/2 |",
                "| dot | merged 2.00 (1.50) | chain 0.50 (0.40) |",
            ],
        ),
        (
            results.decompositions,
            ROUTES,
            [
                "| matrices | svd | gram |",
                "| a | 40 ms | 0.25 |",
                "| b | 80 ms | 0.75 |",
                "| largest values error | 3e-06 | 2e-04 |",
                "| largest excess | 2e-07 |  |",
            ],
        ),
        (
            results.compression,
            RUNS,
            [
                "| keep | plain SVD | activations | curvature, ranks by loss | tuned "
                "| predicted | stored | time without tuning |",
                "| 0.70 | 0.200 / 0.10 | 0.400 / 0.20 | 0.600 / 0.30 | 0.800 / 0.40 "
                "| 0.990 | 2.0 M | 30 s |",
                "| 0.50 | 0.100 / 0.05 | 0.300 / 0.15 | 0.500 / 0.25 |  "
                "| 0.990 | 2.0 M | 30 s |",
            ],
        ),
        (
            results.looking,
            LOOKS,
            [
                "| model | rank | step, ms | look, ms | ratio | sums over weights |",
                "| net | dense | 10.0 | 15.0 | 1.50 | 3.00 |",
                "| net | 0.25 | 4.0 | 5.0 | 1.25 | 0.25 |",
            ],
        ),
        (
            results.front_door,
            [
                {"what": "wrap", "ms": 2.0, "by_hand_ms": 1.0}
                | {"ratio": 1.5, "low": 1.25, "high": 1.75}
            ],
            [
                "| front door | ms a step | by hand | ratio | middle half |",
                "| wrap | 2.000 | 1.000 | 1.5000 | 1.250 to 1.750 |",
            ],
        ),
        (
            results.events,
            [
                {"lag": 8, "step": 18, "step_ms": 40.0, "step_after_ms": 30.0}
                | {"event_ms": 1500.0, "stall_ms": 2500.0, "stall_steps": 62.5}
            ],
            [
                "| lag | event at step | step before | step after | host part | stall "
                "| stall in steps before |",
                "| 8 | 18 | 40 ms | 30 ms | 1.50 s | 2.5 s | 62.5 |",
            ],
        ),
        (
            results.orthogonal,
            [
                {"what": "8x8", "method": "svd", "ms": 12.0},
                {"what": "8x8", "method": "polar_express, 3 steps", "ms": 2.0},
                {"what": "8x8", "method": "newton_schulz, 5 steps", "ms": 3.0},
            ],
            [
                "|  | svd | polar_express, 3 steps | newton_schulz, 5 steps "
                "| times faster |",
                "| 8x8 | 12 | 2 | 3 | 6.0, 4.0 |",
            ],
        ),
        (
            results.tracking,
            [
                {"what": "a", "record": x, "epoch_ms": 200.0, "record_ms": y}
                | {"share": y / 200}
                for x, y in (("usual", 4.0), ("detailed", 12.0), ("all", 5.0))
            ],
            [
                "| run | an epoch | a record | with null and spectra "
                "| share of training, all |",
                "| a | 200 ms | 4.0 ms (2.0%) | 12 ms | 2.5% |",
            ],
        ),
        (
            results.evaluations,
            [
                {"run": "dense", "epoch": 2, "mse": 0.25, "mae": 0.5, "seconds": 150.0}
                | {"validation_mse": 0.125, "stored_fraction": 0.75}
                | {"trainable_fraction": 0.071}
            ],
            [
                "| run | epoch | test MSE | MAE | validation MSE | trained | stored "
                "| minutes |",
                "| dense | 2 | 0.2500 | 0.5000 | 0.1250 | 7.1% | 75.0% | 2 |",
            ],
        ),
        (
            results.storage,
            STORED,
            [
                "| runs | form | of the runs | lost, mean | lost, most | bytes, mean |",
                "| 2 net | core, int8 | 85.00 | -0.50 | 1.00 | 2,000 |",
                "| 1 net | dense, int8 | 90.00 | 0.00 | 0.00 | 5,000 |",
            ],
        ),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_every_number_is_where_its_names_are(table, rows, lines):
    head, _, *found = table(rows).splitlines()
    assert [head, *found] == lines


@pytest.mark.parametrize("printed", ["| {} |", "| {} |\n\n| more |"])
def test_tables_are_put_below_their_comment_and_the_text_is_kept(printed, monkeypatch):
    monkeypatch.setattr(results, "printed", printed.format)
    text = "Before\n\n<!-- a-cpu.json -->\n{}\n\nAfter | x |\n"
    new = text.format(printed.format("a-cpu"))
    assert results.marked(text.format("| old |\n| row |")) == new
    assert results.marked(text.format("| old |\n\n| other |\n| row |")) == new
