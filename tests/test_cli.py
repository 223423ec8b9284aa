"""What all scripts share on the command line."""

import os

import pytest
from conftest import ROOT

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
