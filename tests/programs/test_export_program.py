"""A run is exported by its folder alone, and what was exported predicts from files."""

import json
import shutil

import jax
import numpy as np
import pytest

import oialr_jax as oialr
from train import export, images, predict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    images.main(["digits", "--smoke", "--out", str(out), "--name", "small"])
    return out / "small"


@pytest.fixture(scope="module")
def exported(run):
    export.main([str(run), "--form", "factors"])
    return run / "export"


def test_the_program_gives_the_logits_of_the_run(run, exported, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 1), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    out = tmp_path / "y.npz"
    predict.main([str(exported), str(tmp_path / "x.npy"), "--out", str(out)])
    assert "output float32[5, 10]" in capsys.readouterr().out
    task, variables = export.restored(run, run)
    desired = oialr.factored(task.forward)(variables["params"], {}, pixels)
    found = np.load(out)["output"]
    assert np.max(np.abs(found - desired)) <= 1e-5 * np.max(np.abs(desired))
    summary = json.loads((run / "summary.json").read_text())
    ranks = {
        x["path"]: x["rank"]
        for x in oialr.load(exported).manifest["leaves"]
        if "rank" in x
    }
    assert ranks == {f"params/{k}": x[2] for k, x in summary["ranks"].items()}
    assert ranks


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
    ],
    ids=["missing", "bytes", "dtype", "shape", "objects"],
)
def test_an_input_that_does_not_fit_is_one_line(exported, tmp_path, content, error):
    if isinstance(content, bytes):
        (tmp_path / "x.npy").write_bytes(content)
    elif content is not None:
        np.save(tmp_path / "x.npy", content)
    with pytest.raises(SystemExit, match=f"^error: .*{error}"):
        predict.main([str(exported), str(tmp_path / "x.npy")])


def test_other_names_than_the_inputs_are_one_line(exported, tmp_path):
    np.savez(tmp_path / "x.npz", image=np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(SystemExit, match="expected the arrays 0, found image"):
        predict.main([str(exported), str(tmp_path / "x.npz")])


def test_what_is_no_run_is_one_line(run, exported, tmp_path):
    with pytest.raises(SystemExit, match="is no run: it has no checkpoints"):
        export.main([str(tmp_path)])
    with pytest.raises(SystemExit, match="exists: name a new folder"):
        export.main([str(run)])
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    with pytest.raises(SystemExit, match="no checkpoint that can be read"):
        export.main([str(empty)])


def test_the_settings_name_the_program(run, tmp_path):
    stored = {"dataset": "digits"}
    with pytest.raises(ValueError, match="was made by another version"):
        export._settings(stored, tmp_path, run)


@pytest.mark.long
@pytest.mark.parametrize(
    ("program", "preset"),
    [("text", "sonnets"), ("forecast", "etth2-192-short"), ("selfsup", "digits")],
)
def test_every_program_is_exported(program, preset, tmp_path):
    module = {x.__name__.split(".")[-1]: x for x in export.PROGRAMS}[program]
    module.main([preset, "--smoke", "--out", str(tmp_path), "--name", "small"])
    folder = tmp_path / "small"
    export.main([str(folder), "--form", "identity"])
    task, variables = export.restored(folder, folder)
    inputs = [np.ones((3, *x.shape[1:]), x.dtype) for x in task.inputs]
    extra = {name: x for name, x in variables.items() if name != "params"}
    desired = oialr.factored(task.forward)(variables["params"], extra, *inputs)
    found = oialr.load(folder / "export")(*inputs)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(desired), strict=True):
        assert np.max(np.abs(a - b)) <= 1e-4 * np.max(np.abs(b))
    shutil.rmtree(folder)
