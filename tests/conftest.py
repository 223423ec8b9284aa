"""
What the tests share: a small data set, and ways to run the scripts on it. `run` and `train` run
them in this process, which is quickest; `fork` and `world` in forks of it; `spawn` as a user would.
"""

import atexit
import csv
import gc
import os
import pickle
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # the first update imports it; forks of this process need not

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint
import runtime
from data import common
from model import GPT


def find_gpu():
    """Asks in another process: asking starts CUDA, and then no fork of this one could train."""
    if not torch.backends.cuda.is_built():
        return False
    question = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", question]).returncode == 0


signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it,
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one under nohup this
torch.set_num_threads(1)  # so that runs in this process, its forks and others round alike
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it warns about forks
os.environ["HF_HOME"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
ON_GPU = dict(os.environ)  # for the tests marked `cuda`, in processes of their own
HAS_GPU = find_gpu()
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # autograd starts a thread per GPU, and forks have none

TINY = """
    --n_layer=2 --n_head=2 --n_embd=16 --block_size=8 --batch_size=3 --gradient_accumulation_steps=4
    --max_iters=8 --eval_interval=3 --eval_iters=3 --learning_rate=0.01 --lr_decay_iters=8
    --warmup_iters=2 --device=cpu --dtype=float32
""".split()
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2,
           signal.SIGPIPE)  # that scripts handle
TIME_COLUMNS = ("tokens_per_s", "time_ms", "mfu")
VOCAB = "\n abcdefghijklmnopqrstuvwxyz"


def pytest_collection_finish(session):
    """All modules are imported now, and need no garbage collection."""
    gc.freeze()
    # runs that fail in this process leave their data files open
    session.config.addinivalue_line("filterwarnings", "ignore:unclosed file:ResourceWarning")


def make_dataset(folder):
    """Writes a data set of 28 characters that can be learned: words in a random order."""
    words = "the quick brown fox jumps over a lazy dog\n".split(" ")
    text = " ".join(np.random.default_rng(0).choice(words, 4000))
    ids = np.array([VOCAB.index(character) for character in text], dtype=np.uint16)
    ids[:-2000].tofile(folder / "train.bin")
    ids[-2000:].tofile(folder / "val.bin")
    itos = dict(enumerate(VOCAB))
    stoi = {character: i for i, character in itos.items()}
    meta = dict(vocab_size=len(VOCAB), itos=itos, stoi=stoi)
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


class MakesFolder:
    """Pickles as a call of os.mkdir, as a hostile file would."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """The folder of the data set."""
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder)
    return folder


# ---- in this process ----


@pytest.fixture
def run(monkeypatch, capfd):
    """
    run(script, *arguments) runs a script and returns its globals. What it printed is in run.out and
    run.err, also after an exception; signal handlers and torch's switches are restored.
    """
    locks = []
    lock_folder = common.lock_folder

    def remember_lock(out_dir):
        locks.append(lock_folder(out_dir))
        return locks[-1]

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(common, "lock_folder", remember_lock)
        at_exit = []
        monkeypatch.setattr(atexit, "register", lambda function, *_: at_exit.append(function))
        hooks, stdout = (sys.excepthook, sys.unraisablehook), sys.stdout
        handlers = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            return runpy.run_path(str(ROOT / script), run_name="__main__")
        except Exception as error:  # what Python does when it ends with an error
            sys.excepthook(type(error), error, error.__traceback__)
            raise
        finally:
            for function in at_exit:
                if function.__module__ == "__main__":  # not wandb's
                    function()
            run.out, run.err = capfd.readouterr()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            (sys.excepthook, sys.unraisablehook), sys.stdout = hooks, stdout
            runtime.stop_signal = 0
            torch.use_deterministic_algorithms(False)
            torch.set_flush_denormal(False)
            while locks:
                locks.pop().close()  # the end of a process would do it
    return run


@pytest.fixture
def train(run, dataset, tmp_path):
    """train(name, *arguments) -> the globals of a tiny run whose out_dir is tmp_path / name."""
    def train(name, *arguments):
        options = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / name}"]
        return run("train.py", *options, *arguments)
    return train


def on_forward(monkeypatch, function):
    """
    From now on a forward pass with targets returns function(loss, training, number) as its loss;
    `number` counts those in training and those in evaluations, from 0, in each process.
    """
    forward = GPT.forward
    numbers = {True: 0, False: 0}

    def patched(self, idx, targets=None, caches=None):
        logits, loss = forward(self, idx, targets, caches)
        if loss is not None:
            number = numbers[self.training]
            numbers[self.training] += 1
            loss = function(loss, self.training, number)
        return logits, loss
    monkeypatch.setattr(GPT, "forward", patched)


def interrupt_at(monkeypatch, micro_batch, number=signal.SIGTERM, rank="0"):
    """A signal to the process of a rank, or an error (None), in the micro-batch of this number."""
    def interrupt(loss, training, count):
        if training and count == micro_batch and os.environ.get("RANK", "0") == rank:
            if number is None:
                raise RuntimeError("an error on purpose")
            assert signal.getsignal(number) != signal.SIG_DFL, "the signal would end the tests"
            signal.raise_signal(number)
        return loss
    on_forward(monkeypatch, interrupt)


# ---- in forks of this process, where torch is loaded already ----


def fork(*arguments, before=None, **env):
    """Starts train.py in a fork, which calls `before` first, without its stdout; returns its id."""
    pid = os.fork()
    if pid > 0:
        return pid
    gc.freeze()  # what the fork has from this process needs no garbage collection
    atexit._clear()  # what stands there is for the end of this process
    try:
        os.environ.update(env)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["train.py", *map(str, arguments)]
        if before is not None:
            before()
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    except BaseException as error:
        code = 1
        sys.excepthook(type(error), error, error.__traceback__)
    finally:
        atexit._run_exitfuncs()
        os._exit(code)


def wait(pid):
    """Waits for a fork; returns its exit code, -9 if SIGKILL has ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fork_world(processes, *arguments, before=None):
    """Trains a tiny run in several forks, as torchrun would start them; returns the exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    pids = []
    for rank in map(str, range(processes)):
        env = {}
        if processes > 1:
            env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(processes),
                       MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        pids.append(fork(*TINY, *arguments, before=before, **env))
    return [wait(pid) for pid in pids]


def world(processes, *arguments, before=None):
    """Trains a tiny run to its end in several forks."""
    assert fork_world(processes, *arguments, before=before) == [0] * processes


# ---- as a user would ----


def spawn(script, *arguments, processes=None, max_restarts=0, **options):
    """Starts a script in another process, or with torchrun in several; `options` are Popen's."""
    command = [sys.executable]
    if processes:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                    f"--max-restarts={max_restarts}"]
    command += [str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            **options)


def finish(process, code=0):
    """Waits for a process of `spawn`; returns its stdout and stderr."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, out + err
    return out, err


def wait_for(condition, seconds=120):
    """Waits until condition() is true. The time limit is only there for a test that fails."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


# ---- what a run left ----


def read_log(out_dir):
    """The rows of log.csv as dicts, without the columns that depend on the clock."""
    with open(Path(out_dir) / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for column in TIME_COLUMNS:
            del row[column]
    return rows


def read_losses(out_dir):
    """The training loss of every logged iteration."""
    return [float(row["loss"]) for row in read_log(out_dir) if row["loss"]]


def newest(out_dir):
    """The checkpoint that a resume would start from."""
    return checkpoint.read_checkpoint(str(out_dir))


def load(out_dir, name):
    return checkpoint.load_checkpoint(str(out_dir / name))


def assert_logs_agree(a, b, rel):
    """The logs in two folders are alike up to rounding."""
    rows, other_rows = read_log(a), read_log(b)
    for column in rows[0]:
        cells = [float(row[column] or "nan") for row in rows]
        other_cells = [float(row[column] or "nan") for row in other_rows]
        assert cells == pytest.approx(other_cells, rel=rel, nan_ok=True), column


def assert_same_run(a, b):
    """The runs in two folders have ended alike, bit for bit."""
    assert_same_state(newest(a), newest(b))
    assert read_log(a) == read_log(b)


def assert_same_state(a, b):
    """Two checkpoints have the same weights, optimizer states and counters, bit for bit."""
    assert a.keys() == b.keys()
    for key in ("iter_num", "best_val_loss", "scaler", "model"):
        assert_same(a[key], b[key], key)
    for key in ("optimizer", "muon"):
        if key in a:  # their options may differ, as a learning rate is set before an update
            assert_same(a[key]["state"], b[key]["state"], key)


def assert_same(a, b, path=""):
    """Two parts of checkpoints are equal, bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, list):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"out_dir", "init_from", "lr"}:  # lr: set anew by every update
            assert_same(a[key], b[key], f"{path} {key}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path
