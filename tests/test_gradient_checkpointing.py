"""Blocks that are recomputed in the backward pass: the same numbers in less memory."""

import pytest
import torch
from conftest import assert_same_run, newest, world

from model import GPT, GPTConfig


@pytest.mark.parametrize("processes, options", [
    (1, []),
    (1, ["--dtype=float16", "--optimizer_type=muon"]),
    (2, ["--dtype=bfloat16"]),
])
def test_a_run_is_bit_for_bit_that_without_it(dataset, tmp_path, processes, options):
    """With dropout, whose masks must be drawn again alike."""
    options = [*options, "--dropout=0.2", f"--dataset={dataset}"]
    world(processes, *options, f"--out_dir={tmp_path / 'a'}")
    world(processes, *options, f"--out_dir={tmp_path / 'b'}", "--gradient_checkpointing=True")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert newest(tmp_path / "b")["config"]["gradient_checkpointing"]
    assert "gradient_checkpointing" not in newest(tmp_path / "b")["model_args"]  # as nanoGPT reads


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
