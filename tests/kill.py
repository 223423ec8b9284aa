"""
Ends small training runs in every way, goes on with --init_from=auto until they are complete, and
compares: the end must be that of a run that nobody disturbed, bit for bit.

    python tests/kill.py 100     SIGKILL, at least 100 times, at random moments and while saving
    python tests/kill.py lines   an error, then SIGTERM, at every line of the loop of train.py
"""

import ast
import atexit
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

from conftest import (
    ROOT,
    TINY,
    assert_same_run,
    assert_same_state,
    fork,
    fork_world,
    load,
    make_dataset,
    newest,
    wait,
    world,
)

from checkpoint import load_checkpoint
from model import GPT

OPTIONS = [*TINY, "--dropout=0.1", "--n_embd=64", "--gradient_accumulation_steps=2",
           "--max_iters=40", "--eval_interval=4"]


def is_saving(out_dir, start_time):
    """Whether a checkpoint is being written; older temporary files are leftovers of a kill."""
    with contextlib.suppress(FileNotFoundError):  # just renamed
        return any(path.stat().st_mtime > start_time for path in out_dir.glob("*.tmp"))
    return False


def run_and_kill(options, out_dir, seconds, rng):
    """
    Starts a run and kills it within `seconds`, or in the first save after that. Returns its exit
    code, and whether it was killed while it saved.
    """
    start_time = time.time()
    pid = fork(*options, f"--out_dir={out_dir}", "--init_from=auto")
    end_time = start_time + rng.uniform(0, seconds)
    in_a_save = rng.random() < 0.5
    while time.time() < end_time or (in_a_save and not is_saving(out_dir, start_time)):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:  # before it could be killed
            return os.waitstatus_to_exitcode(status), False
        time.sleep(0.0003)
    time.sleep(rng.uniform(0, 0.002))
    os.kill(pid, signal.SIGKILL)
    return wait(pid), is_saving(out_dir, start_time)


def hunt(dataset, folder, num_kills, seed=0):
    """At least `num_kills` kills. Returns the numbers of kills, of those in a save, and of runs."""
    rng = random.Random(seed)
    options = [*OPTIONS, f"--dataset={dataset}"]
    undisturbed = folder / "undisturbed"
    start_time = time.monotonic()
    wait(fork(*options, f"--out_dir={undisturbed}"))
    seconds = time.monotonic() - start_time

    kills = kills_while_saving = runs = 0
    while kills < num_kills:
        out_dir = folder / f"run{runs}"
        runs += 1
        code = None
        had_checkpoint = False
        while code != 0:
            code, was_saving = run_and_kill(options, out_dir, seconds, rng)
            assert code in (0, -signal.SIGKILL), code
            kills += code != 0
            kills_while_saving += was_saving
            paths = list(out_dir.glob("*.pt"))
            assert paths or not had_checkpoint, "the checkpoint is gone"
            had_checkpoint = bool(paths)
            for path in paths:
                load_checkpoint(str(path))  # raises ValueError if it is damaged
        assert_same_run(out_dir, undisturbed)
        assert list(out_dir.glob("*.tmp")) == []
    return kills, kills_while_saving, runs


MAX_ITERS = 3  # with evaluations before updates 0 and 2 and at the end
LINES = [f"--max_iters={MAX_ITERS}", "--eval_interval=2", "--eval_iters=1", "--dropout=0.1",
         "--gradient_accumulation_steps=2"]

# A line of train.py that is about to run in the loop or after it, and what holds there.
Position = namedtuple("Position", "function line iter_num saved_iter updating")


def call_at_lines(function):
    """From the loop on, function(Position) is called before each line of train.py that runs."""
    script = str(ROOT / "train.py")
    names = {}  # the globals of train.py

    def trace(frame, event, argument):
        code = frame.f_code
        if code.co_filename != script and code is not GPT.forward.__code__:
            return None
        if event == "line":
            function(Position(code.co_name, frame.f_lineno, names["state"]["iter_num"],
                              names["saved_iter"], not names["is_good"]))
        return trace

    register = atexit.register

    def register_and_trace(function):  # train.py's last call before the loop
        nonlocal names
        register(function)
        frame = sys._getframe(1)
        if frame.f_code.co_filename == script:
            names = frame.f_globals
            frame.f_trace = trace
            sys.settrace(trace)
    atexit.register = register_and_trace


def list_positions(out_dir, *options, processes=1, rank="0"):
    """Trains an undisturbed run; returns the Position of every line that one process executes."""
    path = f"{out_dir}.positions"

    def write_positions():
        if os.environ.get("RANK", "0") == rank:
            file = open(path, "w", buffering=1)  # a line at a time
            call_at_lines(lambda position: print(tuple(position), file=file))
    world(processes, *options, f"--out_dir={out_dir}", before=write_positions)
    with open(path) as file:
        return [Position(*ast.literal_eval(line)) for line in file]


def disturb(index, what, rank="0"):
    """For `before` of `fork`: at line `index`, an error if `what` is None, else this signal."""
    def call_at_line():
        index_of_line = -1

        def disturb_once(position):
            nonlocal index_of_line
            index_of_line += 1
            if index_of_line == index:
                sys.settrace(None)
                if what is None:
                    raise RuntimeError("an error on purpose")
                os.kill(os.getpid(), what)
        if os.environ.get("RANK", "0") == rank:
            call_at_lines(disturb_once)
    return call_at_line


def check_line(index, position, what, undisturbed, out_dir, *options, processes=1, rank="0"):
    """
    Disturbs a run at a line, and compares what it leaves and the end of the resumed run. Returns
    the iteration it was resumed from, None without a checkpoint.
    """
    options = [*options, f"--out_dir={out_dir}"]
    codes = fork_world(processes, *options, before=disturb(index, what, rank))
    left = newest(out_dir)
    iter_num = left["iter_num"] if left else None
    if what is None:
        expected_code = 1
        if position.updating or position.iter_num == 0:
            assert iter_num == position.saved_iter, position
        else:  # the other processes may have made one more update
            assert 0 <= iter_num - position.iter_num < processes, (iter_num, position)
    else:
        expected_code = 128 + what
        # a signal that comes after the stop flag of an update is seen in the next one
        assert 0 <= iter_num - position.iter_num <= 2, (iter_num, position)
    is_too_late = position.iter_num == MAX_ITERS  # to stop, or in the picture
    assert all(code == expected_code or (code == 0 and is_too_late) for code in codes), position
    world(processes, *options, "--init_from=auto")
    assert_same_run(out_dir, undisturbed)
    assert_same_state(load(out_dir, "ckpt.pt"), load(undisturbed, "ckpt.pt"))
    return iter_num


def check_lines(dataset, folder, every=1):
    """An error, and in another run a signal, at every n-th line. Returns the number of runs."""
    options = [*LINES, f"--dataset={dataset}"]
    undisturbed = folder / "undisturbed"
    positions = list_positions(undisturbed, *options)
    first_index = {}  # a line may run more than once in an update
    for index, position in enumerate(positions):
        first_index.setdefault(position, index)
    runs = 0
    for what in (None, signal.SIGTERM):
        for position, index in list(first_index.items())[::every]:
            check_line(index, position, what, undisturbed, folder / f"run{runs}", *options)
            runs += 1
    return runs


if __name__ == "__main__":
    mode = sys.argv[1] if len(sys.argv) > 1 else "100"
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # of the runs
    try:
        with tempfile.TemporaryDirectory() as name:
            make_dataset(Path(name))
            if mode == "lines":
                summary = f"{check_lines(name, Path(name))} errors and signals"
            else:
                kills, kills_while_saving, runs = hunt(name, Path(name), int(mode))
                summary = f"{kills} kills, {kills_while_saving} while saving, in {runs} runs"
    finally:
        os.dup2(stderr, 2)
    print(f"{summary}: each ended as the undisturbed one, bit for bit")
