"""What the tests share: the scripts run on a tiny data set, in this process (quick) or in others (signals, torchrun)."""

import atexit
import csv
import os
import socket
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # so that runs in this process, forked and spawned ones are alike; and a process with threads can't be forked
os.environ.update(OMP_NUM_THREADS="1", WANDB_MODE="offline", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false",
                  PYTORCH_NVML_BASED_CUDA_CHECK="1")  # so that asking for a GPU doesn't start CUDA
os.environ["HF_HOME"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
HAS_GPU, ON_GPU = torch.cuda.is_available(), dict(os.environ)  # for the tests that want one
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the others: with a GPU in sight autograd starts threads, and forks can't train
sys.modules["matplotlib"] = None  # not installed, for runs in this process and its forks: a picture for each would take minutes

TINY = ("--n_layer=2 --n_head=2 --n_embd=16 --block_size=8 --batch_size=3 --gradient_accumulation_steps=4 --max_iters=8 --eval_interval=3 "
        "--eval_iters=3 --learning_rate=0.01 --lr_decay_iters=8 --warmup_iters=2 --device=cpu --dtype=float32").split()
TIMES = {"tokens_per_s", "time_ms", "mfu"}
VOCAB = "\n abcdefghijklmnopqrstuvwxyz"


def make_dataset(folder):
    """A data set of 28 characters that can be learnt: words in a random order."""
    words = np.random.default_rng(0).choice("the quick brown fox jumps over a lazy dog\n".split(" "), 4000)
    ids = np.array([VOCAB.index(c) for c in " ".join(words)], dtype=np.uint16)
    ids[:-2000].tofile(folder / "train.bin")
    ids[-2000:].tofile(folder / "val.bin")
    itos = dict(enumerate(VOCAB))
    (folder / "meta.pkl").write_bytes(pickle.dumps(dict(vocab_size=len(itos), itos=itos, stoi={c: i for i, c in itos.items()})))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_dataset(folder)
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    """run(script, *arguments) -> the script's globals at its end. What it printed is in run.out; torch is left as it was."""
    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), sys.excepthook
        try:
            return runpy.run_path(str(ROOT / script), run_name="__main__")
        finally:
            run.out = capfd.readouterr().out
            signal.signal(signal.SIGTERM, handlers[0])
            signal.signal(signal.SIGINT, handlers[1])
            sys.excepthook = handlers[2]
            torch.use_deterministic_algorithms(False)
            torch.set_flush_denormal(False)
    return run


def fork(*arguments, **env):
    """Trains in a fork of this process, where torch is loaded already; returns its id. It inherits no handlers but Python's."""
    pid = os.fork()
    if pid == 0:
        try:
            os.environ.update(env)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.argv = ["train.py", *map(str, arguments)]
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
            os._exit(0)
        except SystemExit as stop:
            os._exit(stop.code)
        except BaseException as error:
            os.write(2, f"the run failed: {error!r}\n".encode())
        finally:
            os._exit(1)
    return pid


def world(processes, *arguments):
    """Trains in `processes` forks that work together, as torchrun would start them, and waits for them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = [fork(*TINY, *arguments, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            for rank in range(processes)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0] * processes


@pytest.fixture
def train(run, dataset, tmp_path):
    """train('name', *arguments) -> globals of a tiny run whose out_dir is tmp_path / name."""
    def train(name, *arguments):
        return run("train.py", *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / name}", *arguments)
    return train


def spawn(script, *arguments, processes=None, **options):
    """Starts a script in a process of its own, or under torchrun in several; returns the Popen object, output captured."""
    command = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else [])
    return subprocess.Popen(command + [str(ROOT / script), *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def finish(process, code=0):
    """Waits for a process of `spawn`; returns what it printed, and its errors."""
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, out + err
    return out, err


def read_log(out_dir):
    """log.csv as a list of rows, without the columns that measure time."""
    with open(Path(out_dir) / "log.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def newest(out_dir):
    """The checkpoint that a resume would take."""
    from model import load_checkpoint
    return max((load_checkpoint(str(path)) for path in Path(out_dir).glob("*t.pt")), key=lambda checkpoint: checkpoint["iter_num"])


def assert_same_state(a, b):
    """Two checkpoints hold bitwise the same model, optimizer, scaler and counters."""
    for key in ("iter_num", "best_val_loss", "scaler", "skipped"):
        assert a[key] == b[key], key
    assert a["model"].keys() == b["model"].keys()
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    assert a.keys() == b.keys()
    for name in a.keys() & {"optimizer", "muon"}:
        assert a[name]["state"].keys() == b[name]["state"].keys()
        for i, state in a[name]["state"].items():
            for key in state:
                assert torch.equal(torch.as_tensor(state[key]), torch.as_tensor(b[name]["state"][i][key])), (name, i, key)
