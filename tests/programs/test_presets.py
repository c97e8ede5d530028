"""Every preset, in its small form: run through all events, or checked by its shapes."""

import dataclasses
import json

import jax
import pytest

import oialr_jax as oialr
from train import forecast, images, loop, selfsup, text

PROGRAMS = {"images": images, "text": text, "selfsup": selfsup, "forecast": forecast}
PRESETS = [
    (program, name) for program, module in PROGRAMS.items() for name in module.PRESETS
]
RUN = {  # one of each architecture and each way through the program
    ("images", "digits"),
    ("images", "fashion-cnn"),  # a budget, projections
    ("images", "cifar10-resnet20"),
    ("text", "sonnets"),
}  # test_forecast.py and test_selfsup.py have runs of their own


def presets(chosen, *, marks=()):
    return [
        pytest.param(*x, id="-".join(x), marks=() if x in chosen else marks)
        for x in PRESETS
    ]


def records(folder):
    lines = (folder / loop.METRICS).read_text().splitlines()
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
    module = PROGRAMS[program]
    settings = dataclasses.replace(
        module.PRESETS[preset][1],
        method="oialr",
        smoke=True,
        mesh="data=1",
        out=tmp_path,
    )
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


@pytest.mark.parametrize(("program", "preset"), presets(RUN, marks=pytest.mark.long))
def test_the_dense_twin_of_the_small_form_runs(program, preset, tmp_path):
    module = PROGRAMS[program]
    settings = dataclasses.replace(
        module.PRESETS[preset][1],
        smoke=True,
        method="dense",
        mesh="data=1",
        out=tmp_path,
    )
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
    """By shapes: everything up to the first step is built and nothing is compiled."""

    def reached(state, step, batch, evaluate, **options):
        new, metrics = jax.eval_shape(step._jitted, state, batch(0))
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), y) for y in (new, state)]
        assert shapes[0] == shapes[1]
        assert metrics["loss"].shape == ()
        raise ReachedError

    module = PROGRAMS[program]
    settings = dataclasses.replace(
        module.PRESETS[preset][1],
        smoke=True,
        method="oialr",
        mesh="data=1",
        out=tmp_path,
    )
    monkeypatch.setattr(loop, "train", reached)
    monkeypatch.setattr(
        oialr.Layout,
        "initialize",
        lambda layout, create, *args: jax.eval_shape(create, *args),
    )
    with pytest.raises(ReachedError):
        module.run(settings, name="run")
