"""What all scripts share on the command line."""

import os

import pytest
from conftest import ROOT, TINY, finish, spawn

SCRIPTS = ["train.py", "sample.py", "bench.py", "plot.py"]
SCRIPTS += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("data/*/prepare.py"))]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_an_unknown_setting(run, tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run(script, "--help")
    assert run.err == "" and f"python {script}" in run.out
    assert "\nsettings (--key=value):\n" in run.out
    if script == "train.py":
        assert "\n  --batch_size=12  # sequences per micro-batch\n" in run.out
    with pytest.raises(ValueError):
        run(script, "--tempreture=1")
    assert run.out == "" and os.listdir() == []
    assert run.err.startswith("error: unknown setting 'tempreture'") and run.err.count("\n") == 1


@pytest.mark.parametrize("script", ["train.py", "data/shakespeare_char/prepare.py"])
def test_scripts_run_from_any_folder(script, tmp_path):
    assert finish(spawn(script, "--help", cwd=tmp_path))[1] == ""
    out, err = finish(spawn(script, "--x=1", cwd=tmp_path), code=1)
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_a_pipe_gets_utf8_whatever_the_locale_is(dataset, tmp_path):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    options = [*TINY, f"--dataset={dataset}", "--out_dir=日本 1", "--max_iters=1"]
    out, err = finish(spawn("train.py", *options, env=environment, cwd=tmp_path))
    assert err == "" and out.endswith("--out_dir='日本 1'\n")
    assert (tmp_path / "日本 1/log.csv").exists()
