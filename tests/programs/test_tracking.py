"""Records of bases along a run: behind the steps, ahead of whatever cannot wait."""

import json
from collections.abc import Mapping
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import normal
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import oialr_jax as oialr
from oialr_jax.lowrank import Axes, factor
from oialr_jax.matrices import Matrix
from oialr_jax.stability.singular import Spectrum
from train import files, images, loop
from train.tracking import Tracking

SHAPES: Mapping[str, tuple[int, int]] = {"tall": (24, 10), "square": (12, 12)}
MATRICES = tuple(
    Matrix(path, Axes(shape, (), (0,), (1,)), rows=1, kind="dot")
    for path, shape in SHAPES.items()
)


def params(seed, low=False):
    found = {path: normal(seed, *shape) for path, shape in SHAPES.items()}
    if low:
        node = factor(found["tall"], MATRICES[0].axes, 4)
        found["tall"] = node
    return found


@pytest.mark.parametrize("detailed", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_numbers_outlive_the_params_they_are_of(low, detailed):
    """The next step uses them up; the numbers are those of `stability`."""
    track = Tracking(MATRICES, every=1, steps=20, epoch=2.0)
    step = next(t for t in range(1, 20) if track.is_detailed(t) == detailed)
    after = params(1, low)
    expected = oialr.stability.compare(params(0, low), after, MATRICES)
    spectra = oialr.stability.spectra(after, MATRICES)
    followed, numbers = track.compare(track.start(params(0, low), 0), after, step)
    for leaf in jax.tree.leaves(after):
        leaf.delete()
    line = numbers()
    assert (line["since"], line["epoch"]) == (0, step / 2)
    assert followed[1] == step
    for path, layer in line["layers"].items():
        for name in ("basis", "mixing", "cosine", "change"):
            want = float(getattr(expected[path], name))
            np.testing.assert_allclose(layer[name], want, rtol=2e-5, atol=1e-6)
        assert ("sigma" in layer) == ("null" in layer) == detailed
        for name in Spectrum._fields if detailed else ():
            want = getattr(spectra[path], name)
            np.testing.assert_allclose(layer[name], want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("fsdp")], ids=str)
def test_params_on_a_mesh_are_followed_on_one_device(spec):
    place = NamedSharding(oialr.sharding.make_mesh("fsdp=2"), spec)
    track = Tracking(MATRICES, every=1, steps=20, epoch=2.0)
    step = next(t for t in range(1, 20) if not track.is_detailed(t))
    before, after = (jax.device_put(params(seed), place) for seed in (0, 1))
    followed, numbers = track.compare(track.start(before, 0), after, step)
    for leaf in jax.tree.leaves(after):
        leaf.delete()
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(followed[0]))
    expected = oialr.stability.compare(params(0), params(1), MATRICES)
    for path, layer in numbers()["layers"].items():
        np.testing.assert_allclose(layer["basis"], expected[path].basis, rtol=2e-5)


@pytest.fixture
def trained(tmp_path):
    """Runs `loop.train` of twelve steps and gives what happened, in order."""

    def run(alone, **pace):
        order = []

        def step(state, batch):
            order.append(f"step {batch}")
            return state.replace(step=state.step + 1), {"loss": jnp.zeros(())}

        def compare(followed, params, done):
            def numbers():
                order.append(f"numbers {done}")
                return {"layers": {}}

            return followed, numbers

        tracking = SimpleNamespace(
            every=2, alone=alone, start=lambda *_: None, compare=compare
        )
        state = TrainState.create(
            apply_fn=None, params={"w": jnp.ones(2)}, tx=optax.sgd(0.1)
        )
        usual = {"steps": 12, "log_every": 12, "eval_every": 12, "save_every": 12}
        with (
            loop.Interrupts() as interrupts,
            oialr.Checkpoints(tmp_path / files.CHECKPOINTS) as checkpoints,
        ):
            loop.train(
                state,
                step,
                lambda t: t,
                lambda state: {"accuracy": 0.5},
                pace=loop.Pace(**usual | pace),
                folder=tmp_path,
                checkpoints=checkpoints,
                settings={},
                interrupts=interrupts,
                tracking=tracking,
            )
        lines = (tmp_path / files.METRICS).read_text().splitlines()
        return order, [json.loads(line) for line in lines]

    return run


def test_steps_go_on_while_numbers_are_computed(trained):
    order, lines = trained(lambda t: False)
    assert order[-6:] == [f"numbers {t}" for t in (2, 4, 6, 8, 10, 12)]
    assert [x["step"] for x in lines if x["kind"] == "stability"] == [*range(2, 13, 2)]


def test_a_step_that_calls_lapack_waits_for_the_numbers_before(trained):
    order, _ = trained(lambda t: t == 5)
    where = order.index("step 5")
    assert order[where - 2 : where] == ["numbers 2", "numbers 4"]
    assert order.index("numbers 6") > order.index("step 11")


@pytest.mark.parametrize("every", ["log_every", "eval_every", "save_every"])
def test_a_saved_record_lacks_no_line(trained, every):
    order, _ = trained(lambda t: False, **{every: 7})
    assert order.index("numbers 6") == order.index("step 6") + 3


def test_events_are_the_steps_that_call_lapack():
    schedule = oialr.Schedule(delay=10, every=5, lag=2, stop=21)
    acts = [t for t in range(40) if schedule.acts(t)]
    assert acts == [10, 12, 15, 17, 20, 22]


@pytest.mark.long
def test_a_run_records_its_bases_across_events(tmp_path):
    settings = {"smoke": True, "track_every": 2, "out": tmp_path, "mesh": "data=1"}
    preset = images.PRESETS["digits"][1].__class__(
        **{**vars(images.PRESETS["digits"][1]), **settings}
    )
    images.run(preset, name="run")
    lines = (tmp_path / "run" / files.METRICS).read_text().splitlines()
    found = [x for x in map(json.loads, lines) if x["kind"] == "stability"]
    assert [(x["since"], x["step"]) for x in found] == [
        (t - 2, t) for t in range(2, 13, 2)
    ]
    assert all(0 < y["basis"] <= 1 for x in found for y in x["layers"].values())
