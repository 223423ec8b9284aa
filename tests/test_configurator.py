import os
import subprocess
import sys

import pytest
from conftest import ROOT

from configurator import configure, convert

SCRIPTS = ["train.py", "sample.py", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("data/*/prepare.py")))]


def settings():
    return dict(__doc__="", learning_rate=1e-3, batch_size=12, compile="auto", decay_lr=True, out_dir="out", _hidden=1, function=print)


@pytest.fixture
def configured(monkeypatch, tmp_path):
    """configured(*arguments): the settings above after configure. An argument with a newline is the text of a config file."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def configured(*arguments):
        paths = []
        for i, argument in enumerate(arguments):
            if "\n" in argument and not argument.startswith("--"):
                (tmp_path / f"{i}.py").write_text(argument)
                argument = str(tmp_path / f"{i}.py")
            paths.append(argument)
        monkeypatch.setattr(sys, "argv", ["script.py", *paths])
        values = settings()
        result = configure(values)
        assert result == {key: values[key] for key in ("learning_rate", "batch_size", "compile", "decay_lr", "out_dir")}
        return result
    return configured


def test_without_arguments_the_defaults_stay(configured):
    assert configured() == {key: value for key, value in settings().items() if key in configured()}


def test_the_last_one_wins(configured):
    assert configured("--batch_size=1", "batch_size = 2\n")["batch_size"] == 2
    assert configured("batch_size = 2\n", "--batch_size=3", "--batch_size=4")["batch_size"] == 4


def test_a_config_file_is_python_and_reads_the_settings_so_far(configured):
    text = "import math\n_half = batch_size // 2\nlearning_rate = _half * math.sqrt(4)\nnames = ['a list is no setting']\ndef f(): pass\n"
    assert configured("--batch_size=10", text)["learning_rate"] == 10.0


def test_the_traceback_of_a_config_file_shows_its_name_and_line(tmp_path):
    (tmp_path / "broken.py").write_text("batch_size = 1\nlearning_rate = 1 / 0\n")
    result = subprocess.run([sys.executable, "-c", "import sys; from configurator import configure\nbatch_size = 2\nlearning_rate = .1\n"
                             "configure(globals())", str(tmp_path / "broken.py")], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and "broken.py\", line 2" in result.stderr and "ZeroDivisionError" in result.stderr


@pytest.mark.parametrize("text, default, expected", [
    ("true", False, True), ("False", True, False), ("7", 1, 7), ("-7", 1, -7), ("1e-4", 0.1, 1e-4), ("1", 0.1, 1.0), ("a=b", "x", "a=b"),
    ("123", "x", "123"), ("", "x", ""), ("False", "auto", False), ("true", "auto", True), ("cuda:1", "auto", "cuda:1"), ("3", "auto", 3),
])
def test_values_from_the_command_line(text, default, expected):
    result = convert("key", text, default, literal=True)
    assert result == expected and type(result) is type(expected)


@pytest.mark.parametrize("text, default", [("1", True), ("yes", True), ("", True), ("1.5", 1), ("x", 1), ("", 1), ("True", 1), ("9" * 5000, 1),
                                           ("nan", 0.1), ("inf", 0.1), ("1e999", 0.1), ("x", 0.1), ("True", 0.1), ("[1]", "auto")])
def test_wrong_values_from_the_command_line(text, default):
    with pytest.raises(ValueError, match="'key' takes"):
        convert("key", text, default, literal=True)


@pytest.mark.parametrize("value, default", [(True, 1), (1, True), (1.0, 1), (1, "x"), (None, 1), ([1], "auto"), (None, "auto"), (10 ** 400, 0.1),
                                            (float("nan"), 0.1), (True, 0.1)])
def test_wrong_values_from_a_config_file(value, default):
    with pytest.raises(ValueError, match="'key' takes"):
        convert("key", value, default, literal=False)


def test_an_int_is_taken_for_a_float():
    assert type(convert("key", 1, 0.1, literal=False)) is float


@pytest.mark.parametrize("argument", ["--batchsize=3", "batchsize = 3\n"])
def test_an_unknown_key_is_named_with_the_nearest(configured, argument):
    with pytest.raises(ValueError, match="'batchsize'.*'batch_size'"):
        configured(argument)


@pytest.mark.parametrize("argument", ["nowhere.py", "--batch_size", "-b=3", "."])
def test_unreadable_arguments(configured, argument):
    with pytest.raises(ValueError, match="cannot read"):
        configured(argument)


def test_hidden_names_and_functions_are_no_settings(configured):
    for argument in ("--_hidden=2", "--function=2"):
        with pytest.raises(ValueError, match="unknown"):
            configured(argument)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_setting(script, tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / script), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    if script == "train.py":
        assert "--batch_size=12  " in result.stdout and "rows in a micro-batch" in result.stdout
        assert result.stdout.count("\n  --") == len(TRAIN)


TRAIN = """out_dir eval_interval log_interval eval_iters eval_only always_save_checkpoint init_from wandb_log wandb_project wandb_run_name
    dataset gradient_accumulation_steps batch_size block_size n_layer n_head n_embd dropout bias learning_rate max_iters weight_decay beta1
    beta2 grad_clip decay_lr warmup_iters lr_decay_iters min_lr backend device dtype compile seed deterministic
    optimizer_type muon_scale lr_schedule decay_share""".split()


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/*.py")), ids=lambda path: path.stem)
def test_every_config_file_fits_train(path, monkeypatch):
    source = open(ROOT / "train.py").read().split("config = configure")[0].split("setup_device\n")[1]
    values = {}
    exec(source, values)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["train.py", str(path)])
    config = configure(values)
    assert set(config) == set(TRAIN)
    assert config["n_embd"] % config["n_head"] == 0 and (config["gradient_accumulation_steps"] % 8 == 0 or "char" in path.stem)


def test_an_error_is_one_line(tmp_path):
    result = subprocess.run([sys.executable, str(ROOT / "sample.py"), "--tempreture=1"], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert result.stderr.startswith("error: unknown setting 'tempreture'") and os.listdir(tmp_path) == []
