"""
Kills small training runs with SIGKILL at random moments, half of them while they save, and restarts
them with --init_from=auto until they end. A checkpoint must be there at every moment, and the end
must be that of a run that nobody killed, bit for bit.

    python tests/kill.py 100      at least 100 kills
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import TINY, assert_same_state, fork, make_dataset, newest, read_log

from checkpoint import load_checkpoint

OPTIONS = [*TINY, "--dropout=0.1", "--n_embd=64", "--gradient_accumulation_steps=2",
           "--max_iters=40", "--eval_interval=4"]


def is_saving(out_dir, start_time):
    """Whether a checkpoint is being written; older temporary files are leftovers of a kill."""
    for path in out_dir.glob("*.pt.tmp"):
        try:
            if path.stat().st_mtime > start_time:
                return True
        except FileNotFoundError:  # just renamed
            pass
    return False


def exit_code(pid):
    """None while the process runs."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait_until(pid, condition, deadline):
    """Waits for condition() or the deadline. Returns the exit code if the process ends first."""
    while not condition() and time.monotonic() < deadline:
        code = exit_code(pid)
        if code is not None:
            return code
        time.sleep(0.0003)
    return None


def run_and_kill(options, out_dir, seconds, rng):
    """
    Starts a run, and kills it within `seconds` or in one of its first saves. Returns its exit code,
    and whether it was killed while it saved.
    """
    start_time = time.time()
    pid = fork(*options, "--init_from=auto")
    deadline = time.monotonic() + rng.uniform(0, seconds)

    def saving():
        return is_saving(out_dir, start_time)

    def not_saving():
        return not saving()

    if rng.random() < 0.5:
        code = wait_until(pid, lambda: False, deadline)
    else:
        conditions = [saving, not_saving] * rng.randrange(6) + [saving]
        for condition in conditions:
            code = wait_until(pid, condition, deadline + 2)
            if code is not None:
                break
        time.sleep(rng.uniform(0, 0.01))
    if code is not None:
        return code, False
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, saving()


def hunt(dataset, folder, num_kills, seed=0):
    """At least `num_kills` kills. Returns the numbers of kills, of those in a save, and of runs."""
    rng = random.Random(seed)
    options = [*OPTIONS, f"--dataset={dataset}"]
    undisturbed = folder / "undisturbed"
    start_time = time.monotonic()
    os.waitpid(fork(*options, f"--out_dir={undisturbed}"), 0)
    seconds = time.monotonic() - start_time

    kills = kills_while_saving = runs = 0
    while kills < num_kills:
        out_dir = folder / f"run{runs}"
        runs += 1
        code = None
        had_checkpoint = False
        while code != 0:
            out_dir_option = f"--out_dir={out_dir}"
            code, saving = run_and_kill([*options, out_dir_option], out_dir, seconds, rng)
            assert code in (0, -signal.SIGKILL), code
            if code != 0:
                kills += 1
                kills_while_saving += saving
            paths = list(out_dir.glob("*.pt"))
            assert paths or not had_checkpoint, "the checkpoint is gone"
            had_checkpoint = bool(paths)
            for path in paths:
                load_checkpoint(str(path))  # raises ValueError if it is damaged
        assert_same_state(newest(out_dir), newest(undisturbed))
        assert read_log(out_dir) == read_log(undisturbed)
        assert list(out_dir.glob("*.tmp")) == []
    return kills, kills_while_saving, runs


if __name__ == "__main__":
    num_kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as name:
        make_dataset(Path(name))
        kills, kills_while_saving, runs = hunt(name, Path(name), num_kills)
    print(f"{kills} kills, {kills_while_saving} of them while saving, in {runs} runs: "
          "each ended as the undisturbed one, bit for bit")
