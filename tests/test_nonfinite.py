"""A loss or gradient that is not finite reaches neither the weights nor a checkpoint."""

import math
import os
import re
import signal

import pytest
import torch
from conftest import interrupt_at, newest, on_forward, world


def poison(monkeypatch, micro_batches, where, rank="0"):
    """
    In training, the micro-batches numbered in `micro_batches` (from 0) have an infinite loss with
    finite gradients (where='loss'), or a finite loss with gradients of NaN (where='gradients').
    """
    def poisoned(loss, training, number):
        if not training or number not in micro_batches or os.environ.get("RANK", "0") != rank:
            return loss
        if where == "loss":
            return loss + (math.inf - loss.detach())
        loss.register_hook(lambda grad: grad * math.nan)
        return loss
    on_forward(monkeypatch, poisoned)


def updates_made(saved):
    """By each parameter's count in AdamW; checks that all weights are finite."""
    assert all(p.isfinite().all() for p in saved["model"].values())
    steps, = {int(state["step"]) for state in saved["optimizer"]["state"].values()}
    return steps


@pytest.mark.parametrize("where", ["loss", "gradients"])
@pytest.mark.parametrize("options", [[], ["--optimizer_type=muon"], ["--dtype=float16"]])
def test_nonfinite_updates_are_skipped_and_counted(
        train, run, tmp_path, monkeypatch, where, options):
    poison(monkeypatch, {4 * 2 + 1, 4 * 4, 4 * 5}, where)  # one micro-batch of updates 2, 4 and 5
    train("a", *options)
    pattern = r"iter (\d+): gradient not finite, update skipped \((\d) in a row\)"
    assert re.findall(pattern, run.out) == [("2", "1"), ("4", "1"), ("5", "2")]
    saved = newest(tmp_path / "a")
    assert saved["iter_num"] == 8 and updates_made(saved) == 5


def test_a_nonfinite_loss_on_one_process_skips_the_update_on_all(dataset, tmp_path, monkeypatch):
    poison(monkeypatch, {2}, "loss", rank="1")
    world(2, f"--dataset={dataset}", f"--out_dir={tmp_path}")
    assert newest(tmp_path)["iter_num"] == 8 and updates_made(newest(tmp_path)) == 7


def test_25_in_a_row_end_the_run_and_nothing_is_written(train, tmp_path, monkeypatch):
    options = ["--max_iters=29", "--eval_interval=2"]
    with monkeypatch.context() as patch:
        poison(patch, range(4 * 3, 10000), "gradients")  # from update 3 on
        named = "not finite at iteration 27; to go on from iteration 2 with .*--init_from=resume"
        with pytest.raises(ValueError, match=named):
            train("a", *options)
    assert newest(tmp_path / "a")["iter_num"] == 2 and not (tmp_path / "a/last.pt").exists()
    train("a", *options, "--init_from=resume")
    assert newest(tmp_path / "a")["iter_num"] == 29


def test_a_model_that_has_exploded_is_not_saved(train, tmp_path):
    with pytest.raises(ValueError, match="at iteration 25; to go on from iteration 0 with"):
        # the first update multiplies the weights by 1e18
        train("a", "--learning_rate=1e9", "--weight_decay=1e9", "--warmup_iters=0",
              "--grad_clip=0.0", "--max_iters=40", "--eval_interval=2")
    assert list(tmp_path.glob("a/*.pt")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, None])
def test_a_stop_while_updates_are_skipped_writes_nothing(train, run, tmp_path, monkeypatch, number):
    """The weights may have exploded, and would hide an earlier checkpoint."""
    poison(monkeypatch, range(4 * 3, 10000), "loss")
    interrupt_at(monkeypatch, 4 * 6, number)
    with pytest.raises((SystemExit, RuntimeError)):
        train("a", "--eval_interval=2")
    assert {path.name for path in tmp_path.glob("a/*.pt")} == {"ckpt.pt"}
    assert newest(tmp_path / "a")["iter_num"] == 2
    if number:
        assert "stopped by SIGTERM; to go on from iteration 2: " in run.out


def test_float16_finds_its_scale(train, tmp_path, monkeypatch):
    """From a scale so high that 17 updates overflow, as they may from 65536."""
    make_scaler = torch.amp.GradScaler

    def make_high_scaler(device, enabled=True):
        return make_scaler(device, init_scale=2.0 ** 35, enabled=enabled)
    monkeypatch.setattr(torch.amp, "GradScaler", make_high_scaler)
    train("a", "--dtype=float16", "--max_iters=60", "--eval_interval=100")
    saved = newest(tmp_path / "a")
    assert saved["iter_num"] == 60 and 30 < updates_made(saved) < 50
