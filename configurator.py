"""
Settings are a script's plain globals; this overrides them from Python files and from the command line.

    python train.py config/train_gpt2.py --batch_size=32 --compile=False

A script calls `config = configure(globals())` right below its settings. Arguments apply in order, later ones win:
a path is a config file, which runs as Python with the settings so far as its globals; `--key=value` sets one.
"""

import ast
import difflib
import math
import os
import re
import sys
import tokenize
import traceback

PLAIN = (bool, int, float, str)
CONFIG_FILES = []  # that have been run
HERE = os.path.dirname(os.path.abspath(__file__))


def configure(settings):
    """
    Overrides `settings`, the globals of a script, in place by sys.argv, and returns all of them as a dict.
    A setting is a global of a plain type (bool, int, float, str) without a leading underscore.
    Raises ValueError for an unknown key, a wrong type or a config file that isn't there. `--help` prints and exits.
    """
    sys.excepthook = report
    defaults = {key: value for key, value in settings.items() if type(value) in PLAIN and not key.startswith("_")}
    for argument in sys.argv[1:]:
        if argument in ("--help", "-h"):
            print(describe(settings, defaults))
            sys.exit()
        config = {key: settings[key] for key in defaults}
        if not argument.startswith("-"):
            new = run_file(argument, config)
        elif argument.startswith("--") and "=" in argument:
            new = dict([argument[2:].split("=", 1)])
        else:
            raise ValueError(f"cannot read the argument {argument!r}: write --key=value, or the path of a config file")
        for key, value in new.items():
            if key not in defaults:
                nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0) or ["none: there are no settings"]
                raise ValueError(f"unknown setting {key!r} in {argument!r}; the nearest is {nearest[0]!r} (--help lists all)")
            settings[key] = convert(key, value, defaults[key], literal=argument.startswith("--"))
    return {key: settings[key] for key in defaults}


def run_file(path, config):
    """Runs a config file over a copy of the settings `config`; returns the plain globals that it set or changed."""
    try:
        with tokenize.open(path) as file:  # honours an encoding line, as import does
            source = file.read()
    except OSError as error:
        raise ValueError(f"cannot read the config file {path!r}: {error.strerror}") from None
    CONFIG_FILES.append(path)
    after = dict(config, __name__="__config__", __file__=path)
    exec(compile(source, path, "exec"), after)
    return {key: value for key, value in after.items() if not key.startswith("_")
            and (key in config or isinstance(value, PLAIN))}


def convert(key, value, default, literal):
    """
    `value` in the type of `default`, or ValueError; `literal` says that it is text from the command line.
    ('eval_only', 'true', False, True) -> True; ('dropout', 0, 0.1, False) -> 0.0; ('compile', 'False', 'auto', True) -> False
    A default of 'auto' takes any Python literal or name: its script knows which ones are good.
    """
    kind, result = type(default), value
    try:
        if literal and (kind is bool or default == "auto"):
            result = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        elif literal or kind is float and isinstance(value, (int, float)) and type(value) is not bool:
            result = kind(value)
    except (ValueError, TypeError, SyntaxError, OverflowError, MemoryError, RecursionError):
        pass  # left as it is: a name, or of the wrong type
    good = type(result) in PLAIN if default == "auto" else type(result) is kind
    if type(result) is str and ("\0" in result or result != result.encode(errors="replace").decode()):
        good = False  # no file system, terminal or checkpoint takes such text
    if not good or kind is float and not math.isfinite(result):
        raise ValueError(f"the setting {key!r} takes {kind.__name__} (its default is {default!r}), got {value!r}")
    return result


def describe(settings, defaults):
    """The help text: the script's docstring, then its settings with defaults and comments, as its source has them."""
    lines = [(settings.get("__doc__") or "").strip(), "", "settings (--key=value, or in a config file):"]
    with tokenize.open(settings["__file__"]) as file:
        source = file.read().split("configure(globals())")[0].splitlines()
    first = next((i for i, line in enumerate(source) if line.split(" =")[0] in defaults), len(source))
    for line in source[first - 1:]:
        name = line.split(" =")[0]
        if name in defaults:
            lines.append(f"  --{name + '=' + repr(defaults[name]):<36} {line.partition('  # ')[2]}")
        elif line.startswith("#"):
            lines.append(line)
    return "\n".join(lines)


def report(kind, error, trace):
    """
    Shows an uncaught exception. By this project's rule a ValueError that our own files raise is a mistake of the user and
    an assert a bug of ours: the one ends in a line, the other in a traceback, like all that comes from elsewhere.
    """
    frames = traceback.extract_tb(trace)
    folder = os.path.dirname(os.path.abspath(frames[-1].filename)) if frames else ""
    ours = folder == HERE or os.path.join(HERE, "data") in (folder, os.path.dirname(folder))
    text = " ".join(str(error).split())
    if any(frame.filename in CONFIG_FILES for frame in frames):
        sys.__excepthook__(kind, error, trace)
    elif kind is KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    elif kind is ValueError and ours or isinstance(error, OSError):  # the system's own words name the file
        print(f"error: {text}", file=sys.stderr)
    elif kind.__name__ in ("MemoryError", "OutOfMemoryError") or "can't allocate memory" in text:
        print(f"error: out of memory: take less at once (batch_size, num_samples) or a smaller model ({text})", file=sys.stderr)
    elif os.environ.get("WORLD_SIZE", "1") != "1" and re.search("gloo|NCCL|Connection|Broken pipe", f"{kind} {text}"):
        print(f"error: process {os.environ.get('RANK')} lost another one, whose own error tells why ({text})", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
