"""Settings of train.py: mistakes are named and cost nothing; anything else ends in a run."""

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
    "--batch_size=" + "9" * 5000: "'batch_size' must be of type int",
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
    "--dtype=fp32": "'fp32'",
    "--compile=maybe": "'maybe'",
    "--backend=mpi": "'mpi'",
}


@pytest.mark.parametrize("argument", MISTAKES, ids=lambda argument: argument[:30])
def test_a_mistake_is_named_and_leaves_nothing(train, run, tmp_path, argument):
    with pytest.raises(UserError, match=re.escape(MISTAKES[argument])):
        train("a", argument)
    assert run.err.startswith("error: ") and run.err.count("\n") == 1
    assert {path.name for path in tmp_path.glob("a/*")} <= {".lock"}


def test_a_mistake_leaves_an_earlier_run_alone(train, tmp_path):
    train("a")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("a/*")}
    for argument in MISTAKES:
        if argument != "--init_from=resume":
            with pytest.raises(UserError):
                train("a", argument)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("a/*")} == before


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
