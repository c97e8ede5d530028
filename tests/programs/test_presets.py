"""Every preset, in its small form: run through all events, or checked by its shapes."""

import dataclasses
import json

import chex
import jax
import pytest

import oialr_jax as oialr
from oialr_jax.lowrank import abstract_low_rank
from train import files, forecast, images, loop, selfsup, text

PROGRAMS = {"images": images, "text": text, "selfsup": selfsup, "forecast": forecast}
PRESETS = [
    (program, name) for program, module in PROGRAMS.items() for name in module.PRESETS
]
RUN = {("images", "digits"), ("images", "fashion-cnn")}  # the other: a budget, cuts
# The tests of the other programs have runs of their own.


def presets(chosen, *, marks=()):
    return [
        pytest.param(*x, id="-".join(x), marks=() if x in chosen else marks)
        for x in PRESETS
    ]


def small(program, preset, out, method="oialr"):
    """The program of a preset, and its settings for the small form."""
    module = PROGRAMS[program]
    changes = {"smoke": True, "method": method, "mesh": "data=1", "out": out}
    return module, dataclasses.replace(module.PRESETS[preset][1], **changes)


def records(folder):
    lines = (folder / files.METRICS).read_text().splitlines()
    lines = [json.loads(x) for x in lines]
    return [{k: v for k, v in x.items() if k != "seconds"} for x in lines]


def stop_after(monkeypatch, step):
    """Runs are asked to stop once `step` steps are done."""
    train = loop.train

    def stopped(state, run, *rest, interrupts, **options):
        def asking(state, batch):
            interrupts.asked = int(state.step) == step - 1
            return run(state, batch)

        return train(state, asking, *rest, interrupts=interrupts, **options)

    monkeypatch.setattr(loop, "train", stopped)


@pytest.mark.parametrize(("program", "preset"), presets(RUN, marks=pytest.mark.long))
def test_the_small_form_meets_every_event_stops_and_resumes(
    program, preset, tmp_path, monkeypatch
):
    module, settings = small(program, preset, tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(loop.StoppedError, match="before step 6 of 12; it is saved"):
            module.run(settings, name="run")
    resumed = dataclasses.replace(settings, resume=True)
    summary = module.run(resumed, name="run")
    lines = records(tmp_path / "run")
    events = [x["event"]["kind"] for x in lines if x["kind"] == "event"]
    assert events[0] == "conversion"
    assert "truncation" in events[1:]
    assert any(r < min(m, n) for m, n, r in summary["ranks"].values())
    assert [x["step"] for x in lines if x["kind"] == "train"] == [4, 8, 12]


@pytest.mark.parametrize(
    ("program", "preset"), presets({("images", "digits")}, marks=pytest.mark.long)
)
def test_the_dense_twin_of_the_small_form_runs(program, preset, tmp_path):
    module, settings = small(program, preset, tmp_path, method="dense")
    summary = module.run(settings, name="run")
    assert summary["stored_fraction"] == 1.0
    assert summary["ranks"] == {}
    assert jax.tree.leaves(summary["best"])


class ReachedError(Exception):
    """A run is about to take its first step."""


@pytest.mark.parametrize(("program", "preset"), presets(PRESETS))
def test_the_step_of_the_small_form_fits_its_state(
    program, preset, tmp_path, monkeypatch
):
    """By shapes, dense and at full rank: what is before the first step, and that."""

    def reached(state, step, batch, evaluate, **options):
        axes = {matrix.path: matrix.axes for matrix in step._matrices}
        params = abstract_low_rank(state.params, axes)
        opt_state = jax.eval_shape(state.tx.init, params)
        low = state.replace(params=params, opt_state=opt_state)
        assert len(oialr.ranks(params)) == len(axes) > 0
        for given in (state, low):
            new, metrics = jax.eval_shape(step._jitted, given, batch(0))
            chex.assert_trees_all_equal_shapes_and_dtypes(new, given)
            assert metrics["loss"].shape == ()
        raise ReachedError

    module, settings = small(program, preset, tmp_path)
    monkeypatch.setattr(loop, "train", reached)
    monkeypatch.setattr(
        oialr.sharding.Layout,
        "initialize",
        lambda layout, create, *args: jax.eval_shape(create, *args),
    )
    with pytest.raises(ReachedError):
        module.run(settings, name="run")


SCALED = [("images", "digits"), ("text", "sonnets"), ("forecast", "etth2-96")]


@pytest.mark.parametrize(("program", "preset"), SCALED)
def test_a_scale_makes_a_smaller_network_or_is_refused(program, preset, tmp_path):
    module, usual = small(program, preset, tmp_path)

    def weights(scale):
        task = module.task(dataclasses.replace(usual, scale=scale))
        return oialr.counts(jax.eval_shape(task.init, jax.random.key(0))).stored

    assert weights(0.5) < weights(1.0) < weights(2.0)
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"`scale` must be positive, got {scale}"):
            weights(scale)


@pytest.mark.parametrize(
    ("program", "preset", "widths"),
    [("text", "sonnets", ("width",)), ("forecast", "etth2-96", ("width", "hidden"))],
)
def test_a_scale_is_that_of_every_width(program, preset, widths, tmp_path, monkeypatch):
    module, usual = small(program, preset, tmp_path)
    usual = dataclasses.replace(usual, **{x: module.SMALL[x] for x in widths})
    rest = {name: x for name, x in module.SMALL.items() if name not in widths}
    monkeypatch.setattr(module, "SMALL", rest)

    def shapes(**changed):
        init = module.task(dataclasses.replace(usual, **changed)).init
        return jax.tree.map(lambda x: x.shape, jax.eval_shape(init, jax.random.key(0)))

    twice = {x: 2 * getattr(usual, x) for x in widths}
    assert shapes(scale=2.0) == shapes(**twice) != shapes()


@pytest.mark.parametrize(("program", "preset"), SCALED[1:])
def test_the_small_form_of_a_program_is_small(program, preset, tmp_path, monkeypatch):
    module, settings = small(program, preset, tmp_path)

    def weights():
        init = module.task(settings).init
        return oialr.counts(jax.eval_shape(init, jax.random.key(0))).stored

    few = weights()
    monkeypatch.setattr(module, "SMALL", {})
    assert 5 * few < weights()
