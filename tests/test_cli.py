"""What all scripts share on the command line. Each runs in its own process, in another folder."""

import os

import pytest
from conftest import ROOT, TINY, finish, spawn

SCRIPTS = ["train.py", "sample.py", "bench.py", "plot.py"]
SCRIPTS += [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("data/*/prepare.py"))]


@pytest.fixture(params=SCRIPTS)
def script(request):
    return request.param


def test_help_shows_usage_and_settings(script, tmp_path):
    out, err = finish(spawn(script, "--help", cwd=tmp_path))
    assert err == ""
    assert f"python {script}" in out
    assert "\nsettings (--key=value):" in out
    assert os.listdir(tmp_path) == []


def test_help_shows_default_and_comment(tmp_path):
    out, _ = finish(spawn("train.py", "--help", cwd=tmp_path))
    line = next(line for line in out.splitlines() if line.startswith("  --batch_size="))
    option, comment = line.split(maxsplit=1)
    assert option == "--batch_size=12" and "micro-batch" in comment


def test_unknown_setting_is_one_line_and_changes_nothing(script, tmp_path):
    out, err = finish(spawn(script, "--tempreture=1", cwd=tmp_path), code=1)
    assert out == ""
    assert err.startswith("error: unknown setting 'tempreture'") and err.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_error_in_a_script_is_one_line(tmp_path):
    for name, arguments in (("train.py", ["--batch_size=0"]), ("sample.py", ["--temperature=-1"])):
        out, err = finish(spawn(name, *arguments, cwd=tmp_path), code=1)
        assert out == ""
        assert err.startswith("error: ") and err.count("\n") == 1


def test_error_with_stderr_closed_still_exits_with_1(tmp_path):
    def close_stderr():
        os.close(2)
    process = spawn("plot.py", "nowhere", cwd=tmp_path, preexec_fn=close_stderr)
    assert finish(process, code=1) == ("", "")


def test_a_pipe_gets_utf8_whatever_the_locale_is(dataset, tmp_path):
    out_dir = tmp_path / "日本 1"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    options = [*TINY, f"--dataset={dataset}", f"--out_dir={out_dir}", "--max_iters=1"]
    out, err = finish(spawn("train.py", *options, env=environment))
    assert err == "" and out.endswith(f"--out_dir='{tmp_path}/日本 1'\n")
