"""What nobody can lose by a program: folders in use, finished, cut short or no folder.

Each of these rules has been taken away once, to see its test fail.
"""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import numpy as np
import pytest

from train import files, report, table

HOLDS = """
import pathlib, sys, time
from train import files
with files.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def write(folder, *lines, end="\n"):
    folder.mkdir(exist_ok=True)
    text = "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    (folder / files.METRICS).write_text(text + end)
    return folder


def line(step, **values):
    return {"kind": "eval", "step": step, "seconds": 1.0, **values}


# Folders in use


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        said = f"process {process.pid} writes in .* now: wait for it, or name another"
        with pytest.raises(FileExistsError, match=said), files.held(tmp_path):
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with files.held(tmp_path):
        assert int((tmp_path / files.LOCK).read_text()) == os.getpid()


def test_other_processes_of_the_same_run_need_no_lock(tmp_path, monkeypatch):
    with files.held(tmp_path):
        monkeypatch.setattr("jax.process_index", lambda: 1)
        with files.held(tmp_path):
            pass


# Folders of other runs


@pytest.mark.parametrize("left", ["5", "5.damaged", None], ids=str)
@pytest.mark.parametrize("ended", [True, False], ids=["ended", "not ended"])
def test_a_run_is_deleted_only_to_be_overwritten(left, ended, tmp_path):
    write(tmp_path, line(1))
    if left is not None:
        (tmp_path / files.CHECKPOINTS / left).mkdir(parents=True)
    if ended:
        files.finish(tmp_path, {"test_accuracy": 1.0})
    if left is not None or ended:
        said = "has ended: choose another" if ended else "go on with it by --resume"
        with pytest.raises(FileExistsError, match=said):
            files.begin(tmp_path)
        assert len(files.read(tmp_path)) == 1
    files.begin(tmp_path, overwrite=True)
    assert files.read(tmp_path) == []
    assert not (tmp_path / files.CHECKPOINTS).exists()
    assert not (tmp_path / files.SUMMARY).exists()


# Folders that are none


@pytest.mark.parametrize("url", ["gs://bucket/runs", "s3://x", "HTTP://x/y"])
def test_a_url_is_refused(url):
    with pytest.raises(ValueError, match="is a URL: name a folder, as of a mounted"):
        files.writable(pathlib.Path(url))


@pytest.mark.parametrize("below", ["", "x", "x/y"])
def test_a_file_as_a_folder_is_refused(below, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: name another folder"):
        files.writable(tmp_path / "file" / below)


def test_a_folder_that_is_read_only_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match="is not writable: name another folder"):
        files.writable(tmp_path / "x" / "y")


def test_a_file_that_can_be_written_is_left_as_it_is(tmp_path):
    new = tmp_path / "a" / "b" / "new.json"
    assert files.writable_file(new) == new
    assert list(new.parent.iterdir()) == []
    old = tmp_path / "old.json"
    old.write_text("kept")
    files.writable_file(old)
    assert old.read_text() == "kept"
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "to-come.json")
    files.writable_file(link)
    assert link.is_symlink()


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be written \(Is a directory\): name"):
        files.writable_file(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file: name another folder"):
        files.writable_file(tmp_path / "file" / "x.json")
    with pytest.raises(ValueError, match=r"File name too long\): name another file"):
        files.writable_file(tmp_path / ("x" * 300))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.writable(pathlib.Path("~/runs")) == tmp_path / "runs"
    with pytest.raises(ValueError, match="~nobody-of-this-name"):
        files.writable(pathlib.Path("~nobody-of-this-name/x"))


# Records that were cut short


@pytest.mark.parametrize("cut", ['{"kind": "tr', "\0\0\0", "{", '{"kind": 1}\xff'])
def test_a_half_line_is_dropped_before_a_run_goes_on(cut, tmp_path, capsys):
    write(tmp_path, line(1), cut, end="")
    files.resume(tmp_path, 10_000)
    files.append(tmp_path / files.METRICS, line(2))
    said = capsys.readouterr().err
    assert "lines of the record are lost" in said
    assert "the last line was cut short and is dropped: " in said
    assert [x["step"] for x in files.read(tmp_path)] == [1, 2]
    assert capsys.readouterr().err == ""


def test_a_record_that_is_whole_is_resumed_in_silence(tmp_path, capsys):
    write(tmp_path, line(1), line(2))
    files.resume(tmp_path, len(json.dumps(line(1))) + 1)
    assert [x["step"] for x in files.read(tmp_path)] == [1]
    assert capsys.readouterr().err == ""


def test_a_record_that_is_gone_is_begun_again(tmp_path, capsys):
    files.resume(tmp_path, 7)
    assert "has 0 bytes and had 7 at the checkpoint" in capsys.readouterr().err
    assert files.read(tmp_path) == []


@pytest.mark.parametrize("bad", ["", "{", "[1]", "null", '{"kind": "x"}', "\0", "\xff"])
def test_lines_that_are_no_records_are_named_and_skipped(bad, tmp_path, capsys):
    write(tmp_path, line(1), bad, line(2))
    assert [x["step"] for x in files.read(tmp_path)] == [1, 2]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "metrics.jsonl, line 2 is no record and is skipped: " in said[0]


# Numbers that are not finite


def test_what_is_not_finite_is_null_in_every_file(tmp_path):
    values = {"a": math.nan, "b": [1.0, -math.inf], "c": {"d": np.float64("inf")}}
    files.append(tmp_path / "x", values)
    files.finish(tmp_path, values)
    expected = {"a": None, "b": [1.0, None], "c": {"d": None}}
    assert json.loads((tmp_path / "x").read_text()) == expected
    assert files.summary(tmp_path) == expected


def test_a_summary_is_written_whole_or_not(tmp_path, monkeypatch):
    files.finish(tmp_path, {"a": 1})

    def killed(path, text):
        with path.open("w") as stream:
            stream.write(text[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(pathlib.Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        files.finish(tmp_path, {"a": 2})
    assert files.summary(tmp_path) == {"a": 1}


# Reports


SUMMARY = {key: 1.0 for key in table.NEEDED} | {"seed": 0, "ranks": {}}


def reported(folders, capsys):
    report.main([str(x) for x in folders])
    return capsys.readouterr()


def test_a_report_draws_what_is_left_of_a_record(tmp_path, capsys):
    stability = {"kind": "stability", "step": 2, "since": 0, "epoch": 1}
    stability["layers"] = {"a": {"basis": None}}
    lines = [line(2, accuracy=0.5), stability, '{"kind": "ev']
    said = reported([write(tmp_path / "run", *lines, end="")], capsys)
    assert "line 3 is no record and is skipped" in said.err
    assert "accuracy.png" in said.out
    assert "stability.png" in said.out


def test_a_report_of_an_empty_record_is_a_report(tmp_path, capsys):
    assert "loss.png" in reported([write(tmp_path / "run", end="")], capsys).out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"seed": 0', "summary.json is broken"),
        ("[]", "summary.json is broken"),
        ('{"seed": 0}', "is no training run: no dense_flops"),
        (None, "the run in there did not end"),
    ],
    ids=["cut", "list", "other", "none"],
)
def test_a_summary_that_cannot_be_compared_is_named_and_left_out(
    text, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(report, "draw", lambda folder: [])
    runs = [write(tmp_path / f"x-seed{i}", line(1, accuracy=0.5)) for i in range(3)]
    for i, run in enumerate(runs[:2]):
        files.finish(run, SUMMARY | {"seed": i, "test_accuracy": 0.5})
    if text is not None:
        (runs[2] / files.SUMMARY).write_text(text)
    found = reported(runs, capsys)
    assert "| x | 0, 1 | 0.5 ± 0.0 |" in found.out
    (line_,) = found.err.splitlines()
    assert said in line_
    with pytest.raises(SystemExit, match="error: none of these runs has a summary"):
        reported([runs[2], runs[2]], capsys)


def test_runs_without_a_common_metric_are_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda folder: [])
    runs = [write(tmp_path / f"x-seed{i}", line(1, accuracy=0.5)) for i in range(2)]
    files.finish(runs[0], SUMMARY | {"test_accuracy": 0.5, "dense_flops": 0})
    files.finish(runs[1], SUMMARY | {"test_mse": 0.5, "seed": 1})
    found = reported(runs, capsys)
    assert "have no metric in common" in found.err
    assert "| x | 0, 1 | 100.0 ± 0.0 % |" in found.out
    assert not (tmp_path / "comparison.png").exists()
