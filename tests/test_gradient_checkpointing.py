"""Blocks that are recomputed in the backward pass: the same numbers in less memory."""

import pytest
import torch
from conftest import assert_same_state, newest, read_log, world

from model import GPT, GPTConfig

ON = "--gradient_checkpointing=True"


@pytest.mark.parametrize("options", [
    ["--dropout=0.2"],
    ["--dropout=0.2", "--dtype=bfloat16"],
    ["--dropout=0.2", "--dtype=float16", "--optimizer_type=muon"],
])
def test_weights_and_losses_are_bit_for_bit_those_without_it(train, tmp_path, options):
    train("a", *options)
    train("b", *options, ON)
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")
    assert newest(tmp_path / "b")["config"]["gradient_checkpointing"]
    assert "gradient_checkpointing" not in newest(tmp_path / "b")["model_args"]  # as nanoGPT reads


def test_in_two_processes_too(dataset, tmp_path):
    options = [f"--dataset={dataset}", "--dropout=0.2", "--dtype=bfloat16"]
    world(2, *options, f"--out_dir={tmp_path / 'a'}")
    world(2, *options, ON, f"--out_dir={tmp_path / 'b'}")
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))


def test_blocks_keep_their_input_only(monkeypatch):
    """The tensors that a backward pass waits for shrink to a few for each block."""
    idx = torch.zeros(2, 16, dtype=torch.long)
    elements = {}
    for checkpointing in (False, True):
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor
        model = GPT(GPTConfig(16, 61, 3, 4, 32))
        model.gradient_checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(idx, idx)
        elements[checkpointing] = sum(saved)
    assert elements[True] < 0.6 * elements[False]
