"""
Settings: the plain globals of a script, overridden by config files and the command line.

    python train.py config/train_gpt2.py --batch_size=32 --compile=False

A script calls `config = configure(globals())` right below its settings. Arguments apply from left
to right and later ones win. A path is a config file: Python code that assigns settings and can
read the ones made so far. `--key=value` sets one setting, `--help` lists them all.
"""

import ast
import builtins
import contextlib
import difflib
import math
import numbers
import os
import re
import sys
import tokenize
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PLAIN_TYPES = (bool, int, float, str)
given_settings = set()  # names that a config file or the command line has set
config_files = []  # paths of the config files that have run


def configure(settings, paths=None):
    """
    Overrides `settings`, a script's globals, from sys.argv and returns all settings as a dict.
    A setting is a global of type bool, int, float or str without a leading underscore. A list
    `paths` collects the arguments that are not options, which are then no config files.
    """
    sys.excepthook = excepthook
    if sys.stderr is None:  # closed, as by 2>&-
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    with contextlib.suppress(AttributeError):  # a stream of a notebook or a test
        sys.stdout.reconfigure(errors="replace")  # characters that a terminal cannot show
    given_settings.clear()
    plain = {key: value for key, value in settings.items() if type(value) in PLAIN_TYPES}
    defaults = {key: value for key, value in plain.items() if not key.startswith("_")}
    config = dict(defaults)
    for argument in sys.argv[1:]:
        if argument in ("--help", "-h"):
            print(help_text(settings, defaults))
            sys.exit()
        if argument.startswith("--") and "=" in argument:
            key, text = argument[2:].split("=", 1)
            changes = {key: parse_value(text, defaults.get(key))}
        elif argument.startswith("-"):
            raise ValueError(f"cannot read the argument {argument!r}; write --key=value")
        elif paths is not None:
            paths.append(argument)
            continue
        else:
            changes = run_config_file(argument, config)
        for key, value in changes.items():
            if key not in defaults:
                nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0)
                hint = "--help lists all settings"
                if not argument.startswith("-"):
                    hint = f"a helper variable needs a leading underscore: _{key}"
                raise ValueError(f"unknown setting {key!r} in {argument!r}; did you mean "
                                 f"{', '.join(nearest)}? ({hint})")
            config[key] = check_type(key, value, defaults[key])
            given_settings.add(key)
    settings.update(config)
    return config


def run_config_file(path, config):
    """Runs a config file and returns what it assigns: settings, and names that may be typos."""
    try:
        with tokenize.open(path) as file:  # like import, this honors an encoding declaration
            source = file.read()
    except (OSError, SyntaxError, UnicodeError) as error:  # the last two: not a text file
        hint = "arguments are config files or --key=value"
        if os.path.exists(path + ".py"):
            hint = f"did you mean {path + '.py'!r}?"
        raise ValueError(f"cannot read the config file {path!r}; {hint} ({error})") from None
    config_files.append(path)
    # Settings are passed as builtins: the file can read them, and its globals are what it assigns.
    names = {"__name__": "__config__", "__file__": path, "__builtins__": vars(builtins) | config}
    exec(compile(source, path, "exec"), names)
    changes = {}
    for key, value in names.items():
        if key in config or (isinstance(value, PLAIN_TYPES) and not key.startswith("_")):
            changes[key] = value
    return changes


def parse_value(text, default):
    """
    The value of `text` from the command line, for a setting with this default:
    ("true", False) -> True; ("1e-3", 0.1) -> 0.001; ("7", "x") -> "7"; ("False", "auto") -> False
    """
    if isinstance(default, str) and default != "auto":
        return text
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except Exception:  # not a literal, so it is a name such as cuda:1
        return text


def check_type(key, value, default):
    """`value` in the type of `default`: 1 -> 1.0, 2.0 -> 2; any plain type if that is 'auto'."""
    kind = type(default)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)  # NumPy's included
    if kind is int and is_number and value % 1 == 0:
        return int(value)
    if kind is float and is_number and math.isfinite(value):
        return float(value)
    if kind in (bool, str) and type(value) is kind:
        return value
    if default == "auto" and type(value) in PLAIN_TYPES:
        return value
    name = kind.__name__
    raise ValueError(f"setting {key!r} must be of type {name} (default {default!r}), got {value!r}")


def help_text(settings, defaults):
    """The script's docstring, then each setting with its default and its comment in the source."""
    lines = [(settings["__doc__"] or "").strip(), "", "settings (--key=value):"]
    section = []  # comment lines that belong to the next setting
    with tokenize.open(settings["__file__"]) as file:
        source = file.read().split("configure(globals()")[0]
    for line in source.splitlines():
        name = line.split(" =")[0]
        if name in defaults:
            option = f"{name}={defaults[name]!r}"
            comment = line.partition("  # ")[2]
            lines += section + [f"  --{option:<36} {comment}".rstrip()]
            section = []
        elif line.startswith("#"):
            section.append(line)
        elif line:
            section = []
    return "\n".join(lines)


def excepthook(kind, error, trace):
    """
    Prints an uncaught exception: in one line if the user can act on it, else with its traceback.
    A ValueError raised in this project's files is a mistake of the user.
    """
    files = [frame.filename for frame in traceback.extract_tb(trace)]
    from_config = any(file in config_files for file in files)
    folder = Path(files[-1]).resolve().parent
    is_ours = folder in (ROOT, ROOT / "data") or folder.parent == ROOT / "data"
    message = " ".join(str(error).split())
    distributed = os.environ.get("WORLD_SIZE", "1") != "1"
    peer_lost = re.search("^Dist|gloo|NCCL|Connection|Broken pipe", f"{kind.__name__} {message}")
    text = "".join(traceback.format_exception(kind, error, trace))
    if kind is KeyboardInterrupt:
        text = "stopped"
    elif from_config:
        pass  # the traceback names the line
    elif isinstance(error, OSError) or (kind is ValueError and is_ours):
        text = f"error: {message}"
    elif isinstance(error, MemoryError) or "tried to allocate" in message.lower():
        text = f"error: out of memory; try a smaller batch_size, num_samples or model ({message})"
    elif distributed and peer_lost:
        rank = os.environ.get("RANK")
        text = f"error: process {rank} cannot reach the others; see their errors ({message})"
    # control characters, as in text quoted from a file, must not reach the terminal
    text = re.sub(r"[^\n -~\u00a0-\U0010ffff]", "?", text.strip())
    print(text, file=sys.stderr)


if __name__ == "__main__":  # exec'd by a script, as nanoGPT's scripts do
    sys.exit("error: import the configurator instead: from configurator import configure, "
             "then config = configure(globals()) below the settings")
