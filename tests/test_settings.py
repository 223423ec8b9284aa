"""Settings of train.py: mistakes are named and cost nothing; anything else ends in a run."""

import re
import shutil

import numpy as np
import pytest

from configurator import UserError

# argument -> what the error names
MISTAKES = {
    "--lerning_rate=1": "learning_rate",
    "--batch_size=0": "batch_size=0",
    "--block_size=1000000": "train.bin",
    "--eval_interval=0": "eval_interval=0",
    "--max_iters=-1": "max_iters=-1",
    "--learning_rate=-1.0": "learning_rate=-1.0",
    "--dropout=1.5": "dropout=1.5",
    "--n_head=3": "n_head=3",
    "--seed=-1": "seed=-1",
    "--optimizer_type=sgd": "'sgd'",
    "--lr_schedule=step": "'step'",
    "--init_from=gpt3": "'gpt3'",
    "--dataset=nowhere": "nowhere/train.bin' is missing",
    "--device=tpu": "'tpu'",
    "--dtype=fp32": "'fp32'",
    "--compile=maybe": "'maybe'",
}


def test_a_mistake_is_named_in_one_line_and_leaves_an_earlier_run_alone(train, run, tmp_path):
    train("a")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("a/*")}
    for argument, named in MISTAKES.items():
        with pytest.raises(UserError, match=re.escape(named)):
            train("a", argument)
        assert run.err.startswith("error: ") and run.err.count("\n") == 1
        with pytest.raises(UserError):
            train("new", argument)
    assert not (tmp_path / "new").exists()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("a/*")} == before


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_token_id_beyond_the_vocabulary_is_named(train, dataset, tmp_path, split):
    folder = shutil.copytree(dataset, tmp_path / "data")
    np.full(100, 28, dtype=np.uint16).tofile(folder / f"{split}.bin")
    with pytest.raises(UserError, match=f"{split}.bin has the token id 28, .*vocabulary of 28"):
        train("a", f"--dataset={folder}")
