"""Evaluations: when they happen, that they disturb nothing, and what becomes of a loss of NaN."""

import math
import shutil

import pytest
import torch
from conftest import assert_same_state, newest, on_forward, read_log, world
from torch._dynamo.testing import CompileCounter


def test_evaluation_and_logging_do_not_change_training(train):
    weights = train("a", "--dropout=0.2")["model"].state_dict()
    for option in ("--eval_interval=1", "--eval_iters=7", "--log_interval=5",
                   "--always_save_checkpoint=False"):
        other_weights = train("b", "--dropout=0.2", option)["model"].state_dict()
        for name in weights:
            assert torch.equal(weights[name], other_weights[name]), (option, name)


def test_evaluations_come_every_eval_interval_and_at_the_end_with_the_same_batches(train, tmp_path):
    """With a learning rate of 0 the weights stay, and without dropout so must the losses."""
    train("a", "--dropout=0.5", "--learning_rate=0.0", "--min_lr=0.0")
    rows = [row for row in read_log(tmp_path / "a") if row["val_loss"]]
    assert [row["iter"] for row in rows] == ["0", "3", "6", "8"]
    for column in ("train_loss", "val_loss"):
        assert len({row[column] for row in rows}) == 1


def test_the_same_weights_give_bitwise_the_same_losses_on_any_number_of_processes(
        train, dataset, tmp_path):
    train("a", "--max_iters=3")
    last_rows = []
    for processes in (1, 2, 3, 5):
        out_dir = tmp_path / str(processes)
        shutil.copytree(tmp_path / "a", out_dir)
        world(processes, f"--dataset={dataset}", f"--out_dir={out_dir}", "--init_from=resume",
              "--max_iters=3", "--eval_iters=7", "--gradient_accumulation_steps=30")
        last_rows.append(read_log(out_dir)[-1])
    assert last_rows[0]["val_loss"]
    assert all(row == last_rows[0] for row in last_rows)


@pytest.mark.parametrize("init_from", ["scratch", "resume"])
def test_eval_only_evaluates_once_and_writes_nothing(train, run, tmp_path, init_from):
    if init_from == "resume":
        train("a")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("a/*")}
    train("a", "--eval_only=True", f"--init_from={init_from}")
    assert run.out.count("step ") == 1 and "iter 0:" not in run.out
    assert {path.name: path.read_bytes() for path in tmp_path.glob("a/*")} == before
    assert (tmp_path / "a").exists() == (init_from == "resume")


def test_losses_of_nan_save_nothing(train, run, tmp_path, monkeypatch):
    """Evaluations come before updates 0, 3, 6 and at the end; each has 2 x 3 batches."""
    def broken(loss, training, number):
        return loss * math.nan if not training and number // 6 in (1, 3) else loss
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        on_forward(patch, broken)
        train("a")
    assert stopped.value.code == 1
    assert "step 3: train loss nan, val loss nan\n" in run.out
    train("b", "--max_iters=6")
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))


def test_training_and_evaluating_need_one_graph_each(train, monkeypatch):
    """Also where the last batch of an evaluation is short."""
    graphs = CompileCounter()
    torch_compile = torch.compile

    def count(function, **options):
        return torch_compile(function, backend=graphs, **options)
    monkeypatch.setattr(torch, "compile", count)
    train("a", "--compile=True", "--eval_iters=0", "--batch_size=7", "--max_iters=2")
    assert graphs.frame_count == 3  # the first finds out whether there is a compiler
