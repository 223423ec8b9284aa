"""
Settings: the plain globals of a script, overridden by config files and the command line.

    python train.py config/train_gpt2.py --batch_size=32 --compile=False

Arguments apply from left to right, and later ones win. A path is a config file: Python code that
assigns settings and can read the ones made so far. `--help` lists all settings.
"""

import ast
import builtins
import difflib
import math
import numbers
import os
import re
import sys
import traceback
from pathlib import Path

PLAIN_TYPES = (bool, int, float, str)
given_settings = set()  # names that a config file or the command line has set


class UserError(ValueError):
    """A mistake of the user: shown in one line, without a traceback. Say how to fix it."""


def set_environment():
    """Sets variables that torch and tqdm read when imported, unless the user has set them."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # threads that spin at OpenMP's barriers would slow a run many times beside a busy process
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if "WORLD_SIZE" in os.environ:  # DDP warns of find_unused_parameters, which we want
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if os.environ.get("RANK", "0") != "0":
        os.environ.setdefault("TQDM_DISABLE", "1")


def configure(settings, paths=None):
    """
    Overrides `settings`, a script's globals, from sys.argv and returns all settings as a dict.
    With a list `paths`, arguments that do not begin with - are appended to it, not run as configs.
    """
    sys.excepthook = excepthook
    # for errors in atexit functions, such as saving after an error
    sys.unraisablehook = lambda args: excepthook(args.exc_type, args.exc_value, args.exc_traceback)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in a notebook, nor after 2>&-
            # Any text can be printed: replaced on a terminal, UTF-8 in files and pipes.
            encoding = None if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="replace", line_buffering=True)
    given_settings.clear()
    defaults = plain_values(settings)
    config = dict(defaults)
    for argument in sys.argv[1:]:
        if argument in ("--help", "-h"):
            print(help_text(settings))
            sys.exit()
        if argument.startswith("--") and "=" in argument:
            key, text = argument[2:].split("=", 1)
            changes = {key: parse_value(text, defaults.get(key))}
        elif paths is not None and not argument.startswith("-"):
            paths.append(argument)
            continue
        else:
            changes = run_config_file(argument, config)
        for key, value in changes.items():
            if key not in defaults:
                nearest = ", ".join(difflib.get_close_matches(key, defaults, n=1, cutoff=0))
                raise UserError(f"unknown setting {key!r} in {argument!r}; did you mean {nearest}? "
                                "(--help lists all; helper variables in configs begin with _)")
            config[key] = check_type(key, value, defaults[key])
            if isinstance(value, str) and value.startswith("~/"):  # a path
                config[key] = os.path.expanduser(value)
            given_settings.add(key)
    settings.update(config)
    return config


def plain_values(names):
    """Those of a module's globals that are settings, or look like them."""
    return {key: value for key, value in names.items()
            if type(value) in PLAIN_TYPES and not key.startswith("_")}


def run_config_file(path, config):
    """Runs a config file and returns what it assigns: settings, and names that may be typos."""
    try:
        source = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot read the config file {path!r} ({error}); arguments are config "
                        "files or --key=value") from None
    # Settings are passed as builtins: the file can read them, and its globals are what it assigns.
    names = {"__name__": "__config__", "__file__": path, "__builtins__": vars(builtins) | config}
    exec(builtins.compile(source, path, "exec"), names)  # a script may have a global `compile`
    return plain_values(names) | {key: names[key] for key in config.keys() & names.keys()}


def parse_value(text, default):
    """
    The value of `text` from the command line, for a setting with this default:
    ("true", False) -> True; ("1e-3", 0.1) -> 0.001; ("7", "x") -> "7"; ("False", "auto") -> False
    """
    if isinstance(default, str) and default != "auto":
        return text
    try:
        return ast.literal_eval(text.title() if text in ("true", "false") else text)
    except Exception:  # not a literal, so it is a name such as cuda:1
        return text


def check_type(key, value, default):
    """`value` in the type of `default`: 1 -> 1.0, 2.0 -> 2; any plain type if that is 'auto'."""
    kind = type(default)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)  # NumPy's included
    if kind in (int, float) and is_number and -2**63 < value < 2**63 and kind(value) == value:
        return kind(value)
    if type(value) is kind and kind in (bool, str):
        return value
    if default == "auto" and type(value) in PLAIN_TYPES:
        return value
    raise UserError(f"setting {key!r} must be of type {kind.__name__} (default {default!r}), "
                    f"got {value!r}")


def check_ranges(config, names, minimum, maximum=math.inf):
    """Raises UserError if the value of one of these settings is not from `minimum` to `maximum`."""
    for name in names.split():
        if not minimum <= config[name] <= maximum:
            raise UserError(f"{name}={config[name]} must be from {minimum} to {maximum}")


def check_choice(key, value, choices):
    """Raises UserError if a setting's value is none of `choices`."""
    if value not in choices:
        raise UserError(f"{key}={value!r} is none of {', '.join(map(repr, choices))}")


def restore_settings(config, checkpoint, not_restored):
    """
    Updates `config` on resume: settings not given now, but for `not_restored`, and the model's
    shape come from the checkpoint. Prints a note for each given setting that differs.
    """
    shape = checkpoint["model_args"].keys() - {"dropout"}
    for key, old_value in (checkpoint["config"] | checkpoint["model_args"]).items():
        if key not in config or key in not_restored:
            continue
        if key in given_settings and config[key] != old_value:
            if key not in shape:
                print(f"note: {key} was {old_value!r} and is {config[key]!r} from here on")
                continue
            print(f"note: {key} stays {old_value!r}: the model's shape is the checkpoint's")
        config[key] = old_value


def help_text(settings):
    """The script's docstring, then its settings as the source has them, with their comments."""
    script = Path(settings["__file__"]).read_text(encoding="utf-8")
    source = script.split("configure(globals()")[0]
    found = re.findall(r"^(?:[a-z]\w* = |# ).+", source, re.MULTILINE)  # settings and headings
    lines = [re.sub(r"^(\w+) = ", r"  --\1=", line) for line in found]
    return "\n".join([settings["__doc__"].strip(), "", "settings (--key=value):", *lines])


def printable(text):
    """`text` without control characters, which a stranger's file could send to a terminal."""
    return re.sub(r"[^\n\t -~\u00a0-\U0010ffff]", "?", text)


def excepthook(kind, error, trace):
    """
    Prints an uncaught exception: a UserError, a missing file, too little memory or a lost process
    in one line, others with their traceback.
    """
    message = " ".join(str(error).split())[:1000]
    text = "".join(traceback.format_exception(kind, error, trace)).strip()
    modules = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(trace)]
    names_file = isinstance(error, OSError) and error.filename is not None
    peer_lost = re.search("^Dist|gloo|NCCL|Connection|Broken pipe", f"{kind.__name__} {message}")
    if kind is BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would try to flush it at the end
    if kind in (KeyboardInterrupt, BrokenPipeError):
        text = "stopped"
    elif isinstance(error, UserError) or (names_file and "__config__" not in modules):
        text = f"error: {message}"
    elif isinstance(error, MemoryError) or "tried to allocate" in message.lower():
        text = f"error: out of memory; try a smaller batch_size, num_samples or model ({message})"
    elif peer_lost and isinstance(error, RuntimeError) and "RANK" in os.environ:
        text = f"error: cannot reach the other processes; see their errors ({message})"
    print(printable(text), file=sys.stderr)


if __name__ == "__main__":  # exec'd in a script, as nanoGPT's are
    configure(globals())
