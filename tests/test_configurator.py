"""Settings: values, config files, and how uncaught errors are printed."""

import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

import configurator
from configurator import UserError, check_type, configure, excepthook, given_settings, parse_value

DEFAULTS = dict(learning_rate=1e-3, batch_size=12, compile="auto", decay_lr=True, out_dir="out")
TRAIN_SETTINGS = """
    out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from
    wandb_log wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size
    n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip
    decay_lr warmup_iters lr_decay_iters min_lr backend device dtype compile seed deterministic
    optimizer_type muon_lr_scale lr_schedule decay_frac
""".split()


@pytest.fixture
def configured(monkeypatch, tmp_path):
    """configured(*arguments) -> the settings. An argument of several lines is a config file."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

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


# ---- order and names ----


def test_later_arguments_win(configured):
    assert configured() == DEFAULTS
    assert configured("--batch_size=1", "batch_size = 2\n")["batch_size"] == 2
    assert configured("batch_size = 2\n", "--batch_size=3", "--batch_size=4")["batch_size"] == 4


def test_given_settings_are_those_of_files_and_command_line(configured):
    config_file = "_rate = learning_rate\nbatch_size = 12\n"  # reads one, assigns one its default
    configured(config_file, "--out_dir=out")
    assert given_settings == {"batch_size", "out_dir"}
    configured()
    assert given_settings == set()


def test_unknown_settings_name_the_nearest(configured):
    for argument in ("--batchsize=3", "batchsize = 3\n"):
        with pytest.raises(UserError, match="'batchsize'.*batch_size"):
            configured(argument)
    for argument in ("--_hidden=2", "--function=2", "--folders=2"):  # neither are lists
        with pytest.raises(UserError, match="unknown setting"):
            configured(argument)
    with pytest.raises(UserError, match="unknown setting 'x'"):
        configured("--x=1", defaults={})
    with pytest.raises(UserError, match="unknown setting 'base'.*begin with an underscore"):
        configured("base = 4\nbatch_size = 2 * base\n")


@pytest.mark.parametrize("argument", ["nowhere.py", "batch_size=4", ".", "--batch_size", "-b=3"])
def test_unreadable_arguments(configured, argument):
    with pytest.raises(UserError, match="cannot read .*--key=value"):
        configured(argument)


def test_paths_are_collected_where_a_script_wants_them(configured):
    paths = []
    assert configured("a.txt", "--batch_size=3", "b", paths=paths)["batch_size"] == 3
    assert paths == ["a.txt", "b"]
    with pytest.raises(UserError, match="cannot read .*--batch_size"):
        configured("--batch_size", paths=paths)


def test_paths_may_begin_with_a_tilde(configured, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    for argument in ("--out_dir=~/run", "out_dir = '~/run'\n"):
        assert configured(argument)["out_dir"] == "/home/somebody/run"


# ---- config files ----


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


def test_config_file_can_include_another(configured, tmp_path):
    (tmp_path / "base.py").write_text("batch_size = 3\nout_dir = 'base'\n")
    config_file = f"exec(open({str(tmp_path / 'base.py')!r}).read())\nbatch_size *= 2\n"
    config = configured(config_file)
    assert (config["batch_size"], config["out_dir"]) == (6, "base")


def test_binary_config_file_is_an_error(configured, tmp_path):
    (tmp_path / "train.bin").write_bytes(b"\xff\x00\x81\x9f")
    with pytest.raises(UserError, match="cannot read the config file .*train.bin"):
        configured(str(tmp_path / "train.bin"))


@pytest.mark.parametrize("line, error", [
    ("learning_rate = 1 / 0", "ZeroDivisionError"),
    ("raise ValueError('odd')", "ValueError: odd"),
    ("open('nowhere')", "FileNotFoundError"),
    ("learning_rate = = 1", "SyntaxError"),
])
def test_error_in_config_file_shows_its_name_and_line(tmp_path, line, error):
    (tmp_path / "broken.py").write_text(f"batch_size = 1\n{line}\n")
    script = ("from configurator import configure\n"
              "batch_size, learning_rate = 2, 0.1\n"
              "configure(globals())")
    command = [sys.executable, "-c", script, str(tmp_path / "broken.py")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert 'broken.py", line 2' in result.stderr and error in result.stderr


@pytest.fixture
def train_defaults(run, monkeypatch):
    """The settings of train.py."""
    def capture(settings):
        for key, value in settings.items():
            if type(value) in configurator.PLAIN_TYPES and not key.startswith("_"):
                defaults[key] = value
        raise SystemExit

    defaults = {}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(configurator, "configure", capture)
        run("train.py")
    assert defaults.keys() >= set(TRAIN_SETTINGS)
    return defaults


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda path: path.stem)
def test_config_files_fit_train(train_defaults, configured, path):
    config = configured(str(path), defaults=train_defaults)
    assert config["n_embd"] % config["n_head"] == 0
    assert config["lr_decay_iters"] >= config["warmup_iters"]


# ---- types ----


@pytest.mark.parametrize("text, default, expected", [
    ("true", False, True), ("False", True, False),
    ("7", 1, 7), ("-7", 1, -7), ("2e0", 1, 2),
    ("1e-4", 0.1, 1e-4), ("1", 0.1, 1.0),
    ("a=b", "x", "a=b"), ("123", "x", "123"), ("true", "x", "true"), ("", "x", ""),
    ("False", "auto", False), ("true", "auto", True), ("3", "auto", 3),
    ("cuda:1", "auto", "cuda:1"),
])
def test_values_from_the_command_line(text, default, expected):
    value = check_type("key", parse_value(text, default), default)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("text, default", [
    ("1", True), ("yes", True), ("", True),
    ("1.5", 1), ("x", 1), ("", 1), ("True", 1), ("1e999", 1), ("9" * 5000, 1),
    ("nan", 0.1), ("inf", 0.1), ("1e999", 0.1), ("x", 0.1), ("True", 0.1),
    ("[1]", "auto"),
])
def test_wrong_values_from_the_command_line(text, default):
    with pytest.raises(UserError, match=f"'key' must be of type {type(default).__name__}"):
        check_type("key", parse_value(text, default), default)


@pytest.mark.parametrize("value, default, expected", [
    (1, 0.1, 1.0), (2.0, 1, 2), (np.int64(3), 1, 3), (np.int64(3), 0.1, 3.0),
    (np.float32(0.5), 0.1, 0.5),
])
def test_numbers_from_a_config_file_become_the_type_of_the_default(value, default, expected):
    value = check_type("key", value, default)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("value, default", [
    (True, 1), (1, True), (1.5, 1), ("7", 1), (1, "x"), (None, 1), (True, 0.1),
    (float("nan"), 0.1), (float("nan"), 1), ([1], "auto"), (None, "auto"),
])
def test_wrong_values_from_a_config_file(value, default):
    with pytest.raises(UserError, match=f"'key' must be of type {type(default).__name__}"):
        check_type("key", value, default)


# ---- printing errors ----


@pytest.fixture
def printed(capsys):
    """printed(action) -> what excepthook prints to stderr for the error that `action()` raises."""
    def printed(action):
        try:
            action()
        except BaseException as error:
            excepthook(type(error), error, error.__traceback__)
        out, err = capsys.readouterr()
        assert out == ""
        return err
    return printed


def raising(error):
    """A function that raises `error`, from this file, which is not part of the program."""
    def action():
        raise error
    return action


def test_mistakes_and_system_errors_are_one_line(printed):
    mistake = printed(lambda: check_type("batch_size", 1.5, 12))
    assert mistake == "error: setting 'batch_size' must be of type int (default 12), got 1.5\n"
    assert printed(lambda: open("nowhere.txt")).startswith("error: [Errno 2] No such file")
    for stop in (KeyboardInterrupt(), BrokenPipeError()):
        assert printed(raising(stop)) == "stopped\n"
    two_lines = raising(OSError(2, "two\nlines", "nowhere.txt"))
    assert printed(two_lines) == "error: [Errno 2] two lines: 'nowhere.txt'\n"


@pytest.mark.parametrize("slip", [
    lambda: [1, 2].index(3),
    lambda: 1 / 0,
    lambda: {}["x"],
    raising(ValueError("of a library")),
    raising(OSError("no file name")),
    raising(RuntimeError("Connection lost")),  # but not in a world of processes
])
def test_any_other_error_keeps_its_traceback(printed, slip):
    text = printed(slip)
    assert text.startswith("Traceback") and "test_configurator.py" in text


def test_out_of_memory_is_one_line_with_a_remedy(printed):
    cuda = RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
    cpu = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")
    for error in (MemoryError(), cuda, cpu):
        text = printed(raising(error))
        assert text.startswith("error: out of memory; try a smaller batch_size")
        assert text.count("\n") == 1


def test_lost_peers_are_one_line(printed, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    lost = type("DistStoreError", (RuntimeError,), {})("Timed out\nafter 4 seconds")
    messages = ("gloo: read error", "NCCL error", "Connection closed by peer", "Broken pipe")
    for error in (lost, *map(RuntimeError, messages)):
        text = printed(raising(error))
        assert text.startswith("error: cannot reach the other processes; see their errors")
        assert text.count("\n") == 1
    assert printed(raising(RuntimeError("shapes differ"))).startswith("Traceback")


def test_control_characters_never_reach_the_terminal(printed):
    hostile = "title \x1b]0;owned\x07 red \x1b[31m \x9b31m \x00 end é 日本"
    for error in (UserError(hostile), RuntimeError(hostile)):
        text = printed(raising(error))
        assert re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", text) is None
        assert text.endswith("end é 日本\n")


def test_closed_stderr_is_no_further_error(printed, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "stderr", None)
    configure({"batch_size": 12})
    assert printed(raising(OSError("unseen"))) == ""


def test_script_that_execs_the_configurator_is_told_to_import_it():
    script = "batch_size = 4\nexec(open('configurator.py').read())\nprint(batch_size)"
    command = [sys.executable, "-", "--batch_size=8"]
    result = subprocess.run(command, input=script, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and result.stdout == ""
    assert "from configurator import configure" in result.stderr
