"""Settings of train.py: mistakes are named and cost nothing; anything else ends in a run."""

import os
import random
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_same_state, newest

from configurator import UserError

# argument -> what the error names
MISTAKES = {
    "--lerning_rate=1": "learning_rate",
    "--batch_size=0": "batch_size=0",
    "--block_size=1000000": "train.bin",
    "--eval_interval=0": "eval_interval=0",
    "--eval_iters=-1": "eval_iters=-1",
    "--max_iters=-1": "max_iters=-1",
    "--learning_rate=-1.0": "learning_rate=-1.0",
    "--dropout=1.5": "dropout=1.5",
    "--n_head=3": "n_head=3",
    "--seed=-1": "seed=-1",
    "--decay_frac=-0.5": "decay_frac=-0.5",
    "--muon_lr_scale=-1.0": "muon_lr_scale=-1.0",
    "--optimizer_type=sgd": "'sgd'",
    "--lr_schedule=step": "'step'",
    "--init_from=gpt3": "'gpt3'",
    "--init_from=resume": "ckpt.pt",
    "--dataset=nowhere": "nowhere/train.bin' is missing",
    "--device=tpu": "'tpu'",
    "--device=cuda": "'cuda:0'",
    "--dtype=fp32": "'fp32'",
    "--compile=maybe": "'maybe'",
    "--backend=mpi": "'mpi'",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_is_named_and_leaves_nothing(train, run, tmp_path, argument):
    with pytest.raises(UserError, match=re.escape(MISTAKES[argument])):
        train("a", argument)
    assert run.err.startswith("error: ") and run.err.count("\n") == 1
    left = os.listdir(tmp_path / "a") if (tmp_path / "a").exists() else []
    assert left in ([], [".lock"])


def test_a_mistake_leaves_an_earlier_run_alone(train, tmp_path):
    train("a")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("a/*")}
    for argument in MISTAKES:
        if argument != "--init_from=resume":
            with pytest.raises(UserError):
                train("a", argument)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("a/*")} == before


def test_accumulation_steps_that_the_processes_do_not_divide(train, monkeypatch):
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="3", MASTER_ADDR="127.0.0.1",
                            MASTER_PORT="1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="4 is not divisible by 3 processes"):
        train("a")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_id_beyond_the_vocabulary_is_named(train, dataset, tmp_path, split):
    folder = shutil.copytree(dataset, tmp_path / "data")
    np.full(100, 28, dtype=np.uint16).tofile(folder / f"{split}.bin")
    with pytest.raises(UserError, match=f"{split}.bin has the token id 28, .*vocabulary of 28"):
        train("a", f"--dataset={folder}")


def test_a_compiler_that_fails_is_named_and_the_run_goes_on(train, run, tmp_path, monkeypatch):
    def compile(function):
        raise RuntimeError("no C++ compiler")
    train("a")
    monkeypatch.setattr(torch, "compile", compile)
    train("b", "--compile=True")
    assert "torch.compile fails here, continuing without it: no C++ compiler" in run.err
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))


# ---- random arguments ----

KEYS = """
    n_layer n_head n_embd block_size dropout bias beta1 grad_clip eval_iters log_interval
    warmup_iters init_from dataset device dtype backend seed decay_lr min_lr eval_only nonsense
    max_iters learning_rate
""".split()
VALUES = ["", "0", "1", "-1", "2", "1e9", "nan", "None", "[]", "True", "x" * 1000, "9" * 30, "0.5",
          "auto", "../..", "\x01", "é", "(" * 500, "--", "=", " 3 "]


def random_arguments(rng):
    arguments = [f"--{rng.choice(KEYS)}={rng.choice(VALUES)}" for _ in range(rng.choice([1, 1, 2]))]
    if rng.random() < 0.1:
        arguments.append(rng.choice(VALUES))
    if "--max_iters=1e9" in arguments:  # is legal, and takes a while
        arguments.remove("--max_iters=1e9")
    return arguments


def test_random_arguments_end_in_an_error_of_one_line_or_a_run(train, run):
    rng = random.Random(0)
    runs = errors = 0
    for _ in range(150):
        try:
            train("a", "--max_iters=1", "--eval_iters=1", *random_arguments(rng))
            runs += 1
        except (UserError, OSError, SystemExit):  # the last one: the loss was not finite
            errors += 1
            assert run.err.startswith("error: ") and run.err.count("\n") == 1
    assert runs > 10 and errors > 20
