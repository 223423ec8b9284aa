"""
Kills a small training run with SIGKILL at random moments, half of them while it saves, and restarts it with
--init_from=auto until it ends. At every moment a loadable checkpoint must be there, and the end must be bitwise that of
an undisturbed run.

    python tests/kill.py 100      at least 100 kills
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import TINY, assert_same_state, fork, newest, read_log

def ended(pid):
    """None while the process runs, then its exit status."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def hunt(dataset, folder, kills, seed=0):
    """At least `kills` kills, over as many runs as it takes. Returns the counts of kills, of those while saving, and of runs."""
    chance = random.Random(seed)
    options = [*TINY, f"--dataset={dataset}", "--dropout=0.1", "--n_embd=64", "--gradient_accumulation_steps=2", "--max_iters=40", "--eval_interval=4"]
    begun = time.monotonic()
    os.waitpid(fork(*options, f"--out_dir={folder / 'undisturbed'}"), 0)
    length = time.monotonic() - begun
    killed = saving = runs = 0
    while killed < kills:
        out_dir, scrap, runs, seen = folder / f"run{runs}", folder / f"run{runs}/checkpoint.tmp", runs + 1, False
        while True:
            pid = fork(*options, f"--out_dir={out_dir}", "--init_from=auto")
            at_save, deadline, status = chance.random() < 0.5, time.monotonic() + chance.uniform(0, length), None
            skip = chance.randrange(6)  # this many saves are left alone
            while status is None and time.monotonic() < deadline + 2 * at_save:
                time.sleep(0.0003)
                status = ended(pid)
                if at_save and scrap.exists():
                    if skip == 0:
                        time.sleep(chance.uniform(0, 0.01))
                        break
                    skip -= 1
                    while scrap.exists() and (status := ended(pid)) is None:
                        time.sleep(0.0003)
            if status is None:
                os.kill(pid, signal.SIGKILL)
                killed, saving = killed + 1, saving + scrap.exists()
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert status in (0, -signal.SIGKILL), status
            there = [path for path in (out_dir / "ckpt.pt", out_dir / "last.pt") if path.exists()]
            assert there or not seen, "the checkpoint is gone"
            seen = bool(there)
            if there:
                newest(out_dir)  # raises if any is damaged
            if status == 0:
                break
        assert_same_state(newest(out_dir), newest(folder / "undisturbed"))
        assert read_log(out_dir) == read_log(folder / "undisturbed")
        assert sorted(os.listdir(out_dir)) == ["ckpt.pt", "log.csv"]
    return killed, saving, runs


if __name__ == "__main__":
    from conftest import make_dataset
    with tempfile.TemporaryDirectory() as name:
        make_dataset(Path(name))
        print("%d kills, %d of them while saving, in %d runs: each ended as the undisturbed one, bit for bit" %
              hunt(name, Path(name), int(sys.argv[1]) if len(sys.argv) > 1 else 100))
