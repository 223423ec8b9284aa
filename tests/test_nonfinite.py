"""A loss or gradient that is not finite reaches neither the weights nor a checkpoint."""

import re

import pytest
import torch
from conftest import interrupt_at, newest, world

from model import GPT


def poison(monkeypatch, micro_batches, where):
    """
    In training, the micro-batches numbered in `micro_batches` (from 0) have an infinite loss with
    finite gradients (where='loss'), or a finite loss with gradients of NaN (where='gradients').
    """
    forward = GPT.forward
    count = -1

    def poisoned(self, idx, targets=None):
        nonlocal count
        logits, loss = forward(self, idx, targets)
        if loss is None or not loss.requires_grad:
            return logits, loss
        count += 1
        if count in micro_batches:
            if where == "loss":
                loss = loss + (float("inf") - loss.detach())
            else:
                loss.register_hook(lambda grad: grad * float("nan"))
        return logits, loss
    monkeypatch.setattr(GPT, "forward", poisoned)


def steps(checkpoint):
    """The updates that AdamW has made."""
    return {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()}


@pytest.mark.parametrize("where", ["loss", "gradients"])
@pytest.mark.parametrize("options", [[], ["--optimizer_type=muon"], ["--dtype=float16"]])
def test_nonfinite_updates_are_skipped_and_counted(
        train, run, tmp_path, monkeypatch, where, options):
    poison(monkeypatch, {4 * 2 + 1, 4 * 5}, where)  # one micro-batch of updates 2 and 5
    train("a", *options)
    pattern = r"iter (\d+): loss or gradient is not finite, update skipped \((\d) so far\)"
    assert re.findall(pattern, run.out) == [("2", "1"), ("5", "2")]
    checkpoint = newest(tmp_path / "a")
    assert checkpoint["iter_num"] == 8 and checkpoint["skipped"] == 2
    assert steps(checkpoint) == {6}
    assert all(p.isfinite().all() for p in checkpoint["model"].values())


def test_a_nonfinite_loss_on_one_process_skips_the_update_on_all(dataset, tmp_path, monkeypatch):
    """Each process counts its own micro-batches: number 2 of rank 1 is poisoned."""
    forward = GPT.forward
    count = -1

    def poisoned(self, idx, targets=None):
        nonlocal count
        logits, loss = forward(self, idx, targets)
        if self.training:
            count += 1
            if count == 2 and torch.distributed.get_rank() == 1:
                loss = loss * float("nan")
        return logits, loss
    monkeypatch.setattr(GPT, "forward", poisoned)
    world(2, f"--dataset={dataset}", f"--out_dir={tmp_path}")
    checkpoint = newest(tmp_path)
    assert checkpoint["skipped"] == 1 and steps(checkpoint) == {7}
    assert all(p.isfinite().all() for p in checkpoint["model"].values())


@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_ten_in_a_row_end_the_run_and_write_nothing(train, tmp_path, monkeypatch, where):
    options = ["--max_iters=20", "--eval_interval=2"]
    with monkeypatch.context() as patch:
        poison(patch, range(4 * 3, 1000), where)  # from update 3 on
        # update 12 is the tenth; the evaluation at 12 has saved the weights, which are finite
        with pytest.raises(ValueError, match=r"iteration 12\b.*resume.*at iteration 12\b"):
            train("a", *options)
    checkpoint = newest(tmp_path / "a")
    assert checkpoint["iter_num"] == 12 and steps(checkpoint) == {3}
    assert all(p.isfinite().all() for p in checkpoint["model"].values())
    train("a", *options, "--init_from=resume")
    assert newest(tmp_path / "a")["iter_num"] == 20


def test_ten_in_a_row_before_the_first_checkpoint_leave_none(train, tmp_path, monkeypatch):
    poison(monkeypatch, range(1000), "loss")
    with pytest.raises(ValueError, match=r"iteration 9\b.*--init_from=scratch"):
        train("a", "--max_iters=20", "--eval_interval=100")
    assert list(tmp_path.glob("a/*.pt")) == []


# The first update multiplies the weights by 1e18: finite, but no longer of any use.
EXPLODING = ["--learning_rate=1e9", "--weight_decay=1e9", "--warmup_iters=0", "--grad_clip=0.0",
             "--max_iters=40"]


def test_a_model_that_has_exploded_is_not_saved(train, tmp_path):
    with pytest.raises(ValueError, match=r"iteration 10\b.*--init_from=scratch"):
        train("a", *EXPLODING, "--eval_interval=2")
    assert list(tmp_path.glob("a/*.pt")) == []


def test_float16s_search_for_its_scale_does_not_end_the_run(train, tmp_path, monkeypatch):
    """From a scale so high that far more than ten updates overflow."""
    make_scaler = torch.amp.GradScaler

    def make_high_scaler(device, enabled=True):
        return make_scaler(device, init_scale=2.0 ** 60, enabled=enabled)
    monkeypatch.setattr(torch.amp, "GradScaler", make_high_scaler)
    train("a", "--dtype=float16", "--max_iters=60", "--eval_interval=100")
    checkpoint = newest(tmp_path / "a")
    assert checkpoint["iter_num"] == 60
    assert 20 < checkpoint["skipped"] < 60 and checkpoint["skipped_in_a_row"] == 0
    assert steps(checkpoint) == {60 - checkpoint["skipped"]}


def test_skipped_updates_in_a_row_are_counted_on_after_a_resume(train, tmp_path, monkeypatch):
    """Interrupted after 6 of them, and 4 more end the run."""
    options = ["--max_iters=60", "--eval_interval=100"]
    poison(monkeypatch, range(1000), "loss")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6)
        with pytest.raises(SystemExit):
            train("a", *options)
    assert newest(tmp_path / "a")["skipped_in_a_row"] == 6
    with pytest.raises(ValueError, match=r"iteration 9\b"):
        train("a", *options, "--init_from=resume")
