"""Batches: a pure function of seed, stream and iteration, whatever else a run does."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import newest, read_log, world

from configurator import UserError
from model import GPT

TRAIN, EVAL_TRAIN, EVAL_VAL = range(3)  # streams


def all_sequences(get_batch, stream, iteration, num_micro_steps):
    """The x of all micro-batches of an iteration, together."""
    micro_batches = [get_batch("train", stream, iteration, k) for k in range(num_micro_steps)]
    return torch.cat([x for x, _ in micro_batches])


def test_a_batch_depends_on_seed_stream_and_iteration_alone(train):
    get_batch = train("a", "--max_iters=0")["get_batch"]
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    sequences = all_sequences(get_batch, TRAIN, 5, 4)
    assert sequences.shape == (12, 8)
    get_batch("val", EVAL_VAL, 0)  # as in an evaluation
    assert torch.equal(all_sequences(get_batch, TRAIN, 5, 4), sequences)
    assert not torch.equal(all_sequences(get_batch, TRAIN, 6, 4), sequences)
    assert not torch.equal(all_sequences(get_batch, EVAL_TRAIN, 5, 4), sequences)
    assert torch.equal(torch.get_rng_state(), torch_state)  # batches draw from neither
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    other_seed = train("b", "--max_iters=0", "--seed=2")["get_batch"]
    assert not torch.equal(all_sequences(other_seed, TRAIN, 5, 4), sequences)
    # the split into micro-batches changes nothing
    other = train("c", "--max_iters=0", "--batch_size=6", "--gradient_accumulation_steps=2")
    assert torch.equal(all_sequences(other["get_batch"], TRAIN, 5, 2), sequences)


def test_targets_are_the_next_tokens_of_the_data(train, dataset):
    x, y = train("a", "--max_iters=0")["get_batch"]("train", TRAIN, 5, 3)
    assert x.shape == y.shape == (3, 8)
    assert torch.equal(x[:, 1:], y[:, :-1])
    data = (dataset / "train.bin").read_bytes()
    for row in range(3):
        window = torch.cat([x[row], y[row, -1:]]).numpy().astype("<u2")
        assert window.tobytes() in data


def test_offsets_are_uniform_and_reach_both_ends(train, tmp_path):
    for split in ("train", "val"):
        np.arange(20, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    options = ["--max_iters=0", f"--dataset={tmp_path}", "--n_embd=2", "--n_layer=1"]
    get_batch = train("a", *options)["get_batch"]
    offsets = torch.cat([get_batch("train", TRAIN, i)[0][:, 0] for i in range(2000)])
    counts = torch.bincount(offsets)
    assert len(counts) == 20 - 8
    assert counts.min() > 400 and counts.max() < 600  # 6000 draws of 12 offsets


def test_the_gradient_is_that_of_the_mean_loss_over_the_global_batch(train, monkeypatch):
    """Against one pass over all sequences of iteration 0."""
    grads = {}

    def record_grads(optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                grads[parameter] = parameter.grad.clone()
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", record_grads)  # the weights stay
        result = train("a", "--max_iters=1", "--grad_clip=0.0")
    model = result["model"]
    micro_batches = [result["get_batch"]("train", TRAIN, 0, k) for k in range(4)]
    x = torch.cat([x for x, _ in micro_batches])
    y = torch.cat([y for _, y in micro_batches])
    loss = model(x, y)[1]
    loss.backward()
    assert float(read_log(result["out_dir"])[1]["loss"]) == pytest.approx(loss.item(), abs=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[parameter], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


# val has 2000 tokens: 285 sequences of 7, which is 95 batches of 3, or 71 of 4 and one of 1
@pytest.mark.parametrize("processes, batch_size", [(1, 3), (2, 4), (3, 8)])
def test_with_eval_iters_0_every_sequence_of_val_counts_once(
        dataset, tmp_path, processes, batch_size):
    """And as many of train, which begin at the start of the file."""
    world(processes, f"--dataset={dataset}", f"--out_dir={tmp_path}", "--eval_iters=0",
          "--block_size=7", "--max_iters=1", "--gradient_accumulation_steps=6",
          f"--batch_size={batch_size}")
    saved = newest(tmp_path)
    model = GPT.from_state(saved["model_args"], saved["model"]).eval()
    for split in ("train", "val"):
        ids = np.fromfile(dataset / f"{split}.bin", np.uint16)[:285 * 7 + 1].astype(np.int64)
        ids = torch.from_numpy(ids)
        with torch.no_grad():
            expected = model(ids[:-1].view(285, 7), ids[1:].view(285, 7))[1].item()
        assert float(read_log(tmp_path)[-1][f"{split}_loss"]) == pytest.approx(expected, abs=1e-5)


def test_a_run_keeps_the_data_it_started_with(train, dataset, tmp_path):
    """If a data set is made anew while a run is under way."""
    folder = shutil.copytree(dataset, tmp_path / "data")
    get_batch = train("a", f"--dataset={folder}", "--max_iters=0")["get_batch"]
    before = get_batch("train", TRAIN, 3)
    os.truncate(folder / "val.bin", 1000)
    with pytest.raises(UserError, match="val.bin was cut short"):
        get_batch("val", EVAL_VAL, 0)
    for path in folder.glob("*.bin"):
        size = path.stat().st_size
        path.unlink()
        path.write_bytes(bytes(size))
    assert all(map(torch.equal, before, get_batch("train", TRAIN, 3)))
