"""Settings: values, config files, and how uncaught errors are printed."""

import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from configurator import UserError, check_type, configure, excepthook, parse_value, set_environment

DEFAULTS = dict(learning_rate=1e-3, batch_size=12, compile="auto", decay_lr=True, out_dir="out")


@pytest.fixture
def configured(monkeypatch, tmp_path):
    """configured(*arguments) -> the settings. An argument of several lines is a config file."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def configured(*arguments, defaults=DEFAULTS, **options):
        argv = ["script.py"]
        for number, argument in enumerate(arguments):
            if "\n" in argument:
                path = tmp_path / f"{number}.py"
                path.write_text(argument)
                argument = str(path)
            argv.append(argument)
        monkeypatch.setattr(sys, "argv", argv)
        script = dict(defaults, __doc__="", _hidden=1, function=print, folders=[])
        config = configure(script, **options)
        assert config == {key: script[key] for key in defaults}
        return config
    return configured


def test_later_arguments_win(configured):
    assert configured() == DEFAULTS
    assert configured("--batch_size=1", "batch_size = 2\n")["batch_size"] == 2
    assert configured("batch_size = 2\n", "--batch_size=3", "--batch_size=4")["batch_size"] == 4


def test_scripts_can_exec_the_file_as_nanogpts_do(configured, monkeypatch, tmp_path):
    path = tmp_path / "config.py"
    path.write_text("compile = False")
    monkeypatch.setattr(sys, "argv", ["script.py", str(path), "--batch_size=3"])
    script = dict(DEFAULTS, __name__="__main__")
    exec((ROOT / "configurator.py").read_text(), script)
    assert {key: script[key] for key in DEFAULTS} == DEFAULTS | dict(batch_size=3, compile=False)


def test_unknown_settings_name_the_nearest(configured):
    for argument in ("--batchsize=3", "batchsize = 3\n"):
        with pytest.raises(UserError, match="'batchsize'.*batch_size"):
            configured(argument)
    for argument in ("--_hidden=2", "--function=2", "--folders=2"):  # neither are lists
        with pytest.raises(UserError, match="unknown setting"):
            configured(argument)
    with pytest.raises(UserError, match="unknown setting 'x'"):
        configured("--x=1", defaults={})
    with pytest.raises(UserError, match="unknown setting 'base'.*in configs begin with _"):
        configured("base = 4\nbatch_size = 2 * base\n")


@pytest.mark.parametrize("argument", ["nowhere.py", "batch_size=4", ".", "--batch_size", "-b=3",
                                      sys.executable])  # no text
def test_unreadable_arguments(configured, argument):
    with pytest.raises(UserError, match="cannot read .*--key=value"):
        configured(argument, **(dict(paths=[]) if argument[0] == "-" else {}))


def test_paths_may_begin_with_a_tilde(configured, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for argument in ("--out_dir=~/run", "out_dir = '~/run'\n"):
        assert configured(argument)["out_dir"] == "/home/somebody/run"


def test_config_file_is_python_and_reads_earlier_settings(configured):
    config_file = """
import math
_half = batch_size // 2
names = ['a list is not a setting']
def rate(): return _half * math.sqrt(batch_size - 6)
learning_rate = rate()
out_dir += '-10'
"""
    config = configured("--batch_size=10", config_file)
    assert (config["learning_rate"], config["out_dir"]) == (10.0, "out-10")


@pytest.mark.parametrize("line, error", [
    ("learning_rate = 1 / 0", "ZeroDivisionError"),
    ("raise ValueError('odd')", "ValueError: odd"),
    ("open('nowhere')", "FileNotFoundError"),
    ("learning_rate = = 1", "SyntaxError"),
])
def test_error_in_config_file_shows_its_name_and_line(run, tmp_path, line, error):
    (tmp_path / "broken.py").write_text(f"batch_size = 1\n{line}\n")
    with pytest.raises((ArithmeticError, ValueError, OSError, SyntaxError)):
        run("train.py", tmp_path / "broken.py")
    assert 'broken.py", line 2' in run.err and error in run.err


@pytest.fixture
def train_defaults(run):
    """The settings of train.py, as its help lists them."""
    with pytest.raises(SystemExit):
        run("train.py", "--help")
    lines = re.findall(r"^  --(\w+)=(.+?)(?:  # .*)?$", run.out, re.MULTILINE)
    return {name: eval(value) for name, value in lines}


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda path: path.stem)
def test_config_files_fit_train(train_defaults, configured, path):
    config = configured(str(path), defaults=train_defaults)
    assert config["n_embd"] % config["n_head"] == 0
    assert config["lr_decay_iters"] >= config["warmup_iters"]


@pytest.mark.parametrize("value, default, expected", [
    ("true", False, True), ("False", True, False),
    ("-7", 1, -7), ("2e0", 1, 2), ("1e-4", 0.1, 1e-4), ("1", 0.1, 1.0),
    ("a=b", "x", "a=b"), ("123", "x", "123"), ("true", "x", "true"), ("", "x", ""),
    ("False", "auto", False), ("3", "auto", 3), ("cuda:1", "auto", "cuda:1"),
    (1, 0.1, 1.0), (2.0, 1, 2), (np.int64(3), 1, 3), (np.float32(0.5), 0.1, 0.5),
])
def test_values(value, default, expected):
    if isinstance(value, str):  # as from the command line
        value = parse_value(value, default)
    value = check_type("key", value, default)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("value, default", [
    ("1", True), ("yes", True), ("1.5", 1), ("", 1), ("True", 1), ("1e999", 1), ("9" * 5000, 1),
    ("nan", 0.1), ("inf", 0.1), ("x", 0.1), ("True", 0.1), ("[1]", "auto"),
    (True, 1), (1, True), (1.5, 1), (1, "x"), (None, 1), (math.nan, 0.1), ([1], "auto"),
])
def test_wrong_values(value, default):
    if isinstance(value, str):
        value = parse_value(value, default)
    with pytest.raises(UserError, match=f"'key' must be of type {type(default).__name__}"):
        check_type("key", value, default)


@pytest.fixture
def printed(capsys):
    """printed(error) -> what excepthook prints to stderr for an error that is raised here."""
    def printed(error):
        try:
            raise error
        except BaseException:
            excepthook(*sys.exc_info())
        out, err = capsys.readouterr()
        assert out == ""
        return err
    return printed


@pytest.mark.parametrize("error, line", [
    (UserError("batch_size=0:\nuse 1"), "error: batch_size=0: use 1\n"),
    (OSError(2, "two\nlines", "nowhere.txt"), "error: [Errno 2] two lines: 'nowhere.txt'\n"),
    (KeyboardInterrupt(), "stopped\n"),
    (BrokenPipeError(), "stopped\n"),
    (MemoryError(), "error: out of memory; try a smaller batch_size"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "error: out of memory;"),
    (RuntimeError("DefaultCPUAllocator: you tried to allocate 4 bytes"), "error: out of memory;"),
    # control characters could be a stranger's commands to the terminal
    (UserError("\x1b]0;owned\x07 \x9b31m \x00 é 日本"), "error: ?]0;owned? ?31m ? é 日本\n"),
])
def test_mistakes_and_system_errors_are_one_line(printed, error, line):
    text = printed(error)
    assert text.startswith(line) and text.count("\n") == 1


def test_lost_peers_are_one_line(printed, monkeypatch):
    lost = type("DistStoreError", (RuntimeError,), {})("Timed out\nafter 4 seconds")
    messages = ("gloo: read error", "NCCL error", "Connection closed by peer", "Broken pipe")
    for error in (lost, *map(RuntimeError, messages)):
        monkeypatch.setenv("RANK", "1")
        line = "error: cannot reach the other processes; see their errors .*\n"
        assert re.fullmatch(line, printed(error))
        monkeypatch.delenv("RANK")
        assert printed(error).startswith("Traceback")  # of something else


def test_errors_at_exit_are_printed_alike():
    script = "import atexit, configurator; configurator.configure({}); atexit.register(open, 'no')"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.stderr == "error: [Errno 2] No such file or directory: 'no'\n"


@pytest.mark.parametrize("error", [
    ValueError("3 is not in list"), OSError("no file name"), RuntimeError("\x1b[31mred"),
    ZeroDivisionError(), KeyError("x"),
])
def test_any_other_error_keeps_its_traceback(printed, error):
    text = printed(error)
    assert text.startswith("Traceback") and "test_configurator.py" in text and "\x1b" not in text


@pytest.mark.parametrize("given, spin_count", [
    ({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)])
def test_threads_of_openmp_do_not_spin_for_long_unless_the_user_wants_it(
        monkeypatch, given, spin_count):
    monkeypatch.setattr(os, "environ", dict(given))
    set_environment()
    assert os.environ.get("GOMP_SPINCOUNT") == spin_count
