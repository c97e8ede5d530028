"""A run is exported by its folder alone, and what was exported predicts from files."""

import dataclasses
import pickle

import jax
import numpy as np
import pytest

import oialr_jax as oialr
from train import (
    compress,
    export,
    finetune,
    forecast,
    images,
    predict,
    recipe,
    selfsup,
    text,
)
from train import settings as common


def written(folder, program, preset, rank=3):
    """The folder of a run that was never trained, with a checkpoint in low rank."""
    settings = dataclasses.replace(common.small(program.PRESETS[preset][1]), smoke=True)
    begun = recipe.begun(settings, program.task(settings))
    state = begun.create(begun.key)
    ranks = {x.path: min(rank, x.m, x.n) for x in begun.matrices}
    params, opt_state, _ = oialr.factorize(
        state.params, state.opt_state, begun.matrices, tx=begun.tx, rank=ranks
    )
    state = state.replace(params=params, opt_state=opt_state)
    with oialr.Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(state, {"settings": common.stored(settings)})
    return params


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    written(folder, images, "digits")
    return folder


@pytest.fixture(scope="module")
def exported(run):
    export.main([str(run), "--form", "factors"])
    return run / "export"


def test_both_are_evaluated(run, tmp_path, capsys):
    options = ["--out", str(tmp_path / "x"), "--form", "identity", "--evaluate"]
    export.main([str(run), *options])
    said = dict(line.split(": ") for line in capsys.readouterr().out.splitlines()[-2:])
    assert said.keys() == {"run", "export"}
    assert said["run"].startswith("accuracy ")
    assert said["run"].split(",")[0] == said["export"].split(",")[0]


def test_the_program_gives_the_logits_of_the_run(run, exported, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 1), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    out = tmp_path / "y.npz"
    predict.main([str(exported), str(tmp_path / "x.npy"), "--out", str(out)])
    assert "output float32[5, 10]" in capsys.readouterr().out
    _, task, _, variables = export.opened(run, run)
    desired = oialr.factored(task.forward)(variables["params"], {}, pixels)
    found = np.load(out)["output"]
    assert np.max(np.abs(found - desired)) <= 1e-5 * np.max(np.abs(desired))
    ranks = oialr.ranks(variables["params"])
    leaves = oialr.load(exported).manifest["leaves"]
    found = {x["path"]: x["rank"] for x in leaves if "rank" in x}
    assert ranks
    assert found == {f"params/{name}": x[2] for name, x in ranks.items()}


def test_names_of_several_inputs_are_those_of_the_manifest(exported, tmp_path):
    pixels = np.zeros((2, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "x.npz", **{"0": pixels})
    out = tmp_path / "y.npz"
    predict.main([str(exported), str(tmp_path / "x.npz"), "--out", str(out)])
    assert np.load(out)["output"].shape == (2, 10)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "x.npy is missing: name a .npy or .npz file"),
        (b"no array", r"x.npy is no .npy or .npz file"),
        (np.zeros((2, 8, 8, 1)), r"expected uint8\[b, 8, 8, 1\], found float64\[2, 8"),
        (np.zeros((2, 8), np.uint8), r"found uint8\[2, 8\]"),
        (np.array([None]), "is no .npy or .npz file"),  # would be unpickled
        (pickle.dumps([1]), "is no .npy or .npz file"),
        (b"", "is no .npy or .npz file"),
        (b"PK\x03\x04 cut off", "is no .npy or .npz file"),
    ],
    ids=["missing", "bytes", "dtype", "shape", "objects", "pickle", "empty", "zip"],
)
def test_an_input_that_does_not_fit_is_one_line(exported, tmp_path, content, error):
    if isinstance(content, bytes):
        (tmp_path / "x.npy").write_bytes(content)
    elif content is not None:
        np.save(tmp_path / "x.npy", content)
    with pytest.raises(SystemExit, match=f"^error: .*{error}"):
        predict.main([str(exported), str(tmp_path / "x.npy")])


def test_outputs_go_to_the_file_that_is_named(exported, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "x.npy", np.zeros((2, 8, 8, 1), np.uint8))
    given = [str(exported), str(tmp_path / "x.npy"), "--out"]
    with pytest.raises(SystemExit, match=r"`out` must end in \.npz, got .*y\.npy"):
        predict.main([*given, str(tmp_path / "y.npy")])
    with pytest.raises(SystemExit, match=r"x\.npy is a file: name another folder"):
        predict.main([*given, str(tmp_path / "x.npy" / "y.npz")])
    with pytest.raises(SystemExit, match="is a URL"):
        predict.main([*given, "gs://bucket/y.npz"])
    assert [x.name for x in tmp_path.iterdir()] == ["x.npy"]
    predict.main([*given, "~/new/y.npz"])
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["y.npz"]


def test_other_names_than_the_inputs_are_one_line(exported, tmp_path):
    np.savez(tmp_path / "x.npz", image=np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(SystemExit, match="expected the arrays 0, found image"):
        predict.main([str(exported), str(tmp_path / "x.npz")])


def test_what_is_no_run_is_one_line(run, exported, tmp_path):
    with pytest.raises(SystemExit, match="is no run: it has no checkpoints"):
        export.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="exists: name a new folder"):
        export.main([str(run)])
    with pytest.raises(SystemExit, match="`batch` must be at least 1, got 0"):
        export.main([str(run), "--batch", "0", "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="is a URL"):
        export.main([str(run), "--out", "gs://bucket/new"])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file is a file: name another folder"):
        export.main([str(run), "--out", str(tmp_path / "file" / "new")])
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit, match="no checkpoint that can be read"):
        export.main([str(empty)])


@pytest.mark.parametrize(
    "given",
    [
        (export, "~/none"),
        (compress, "run", "~/none"),
        (finetune, "mnist", "--data-dir", "~/none"),
    ],
    ids=["export", "compress", "finetune"],
)
def test_a_tilde_is_the_home_folder(given, tmp_path, monkeypatch):
    program, *arguments = given
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: .*{tmp_path}/none"):
        program.main(arguments)


def test_the_settings_name_the_program(run, tmp_path):
    stored = {"dataset": "digits"}
    with pytest.raises(ValueError, match="was made by another version"):
        export._settings(stored, tmp_path, run)


EVERY = [
    (text, "sonnets"),
    (selfsup, "digits"),
    (forecast, "etth2-192-short"),
]


@pytest.mark.parametrize(
    ("program", "preset"), EVERY, ids=["text", "selfsup", "forecast"]
)
@pytest.mark.long
def test_every_program_is_exported(program, preset, tmp_path):
    params = written(tmp_path / "small", program, preset)
    export.main([str(tmp_path / "small"), "--form", "identity"])
    _, task, _, variables = export.opened(tmp_path / "small", tmp_path)
    inputs = [np.ones((3, *x.shape[1:]), x.dtype) for x in task.inputs]
    extra = {name: x for name, x in variables.items() if name != "params"}
    desired = oialr.factored(task.forward)(params, extra, *inputs)
    found = oialr.load(tmp_path / "small" / "export")(*inputs)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(desired), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-4 * np.max(np.abs(b))
