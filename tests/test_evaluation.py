"""Evaluations: when they happen, that they disturb nothing, and what becomes of a loss of NaN."""

import shutil

import pytest
import torch
from conftest import assert_same_state, newest, read_log, world

from model import GPT

DROPOUT = ["--dropout=0.2"]


def evaluated(out_dir):
    """The iterations of the evaluations in log.csv."""
    return [int(row["iter"]) for row in read_log(out_dir) if row["val_loss"]]


@pytest.mark.parametrize("max_iters, expected", [(6, [0, 3, 6]), (8, [0, 3, 6, 8])])
def test_evaluations_come_every_eval_interval_and_at_the_end(train, tmp_path, max_iters, expected):
    train("a", f"--max_iters={max_iters}")
    assert evaluated(tmp_path / "a") == expected


@pytest.mark.parametrize("options", [
    ["--eval_interval=1"],
    ["--eval_iters=7"],
    ["--eval_iters=0"],
    ["--log_interval=5"],
    ["--always_save_checkpoint=False"],
])
def test_evaluation_and_logging_do_not_change_training(train, options):
    weights = train("a", *DROPOUT)["model"].state_dict()
    other_weights = train("b", *DROPOUT, *options)["model"].state_dict()
    for name in weights:
        assert torch.equal(weights[name], other_weights[name]), name


def test_every_evaluation_uses_the_same_batches_without_dropout(train, tmp_path):
    """With a learning rate of 0 the weights stay, and so must the losses."""
    train("a", "--dropout=0.5", "--learning_rate=0.0", "--min_lr=0.0")
    rows = [row for row in read_log(tmp_path / "a") if row["val_loss"]]
    assert len(rows) == 4
    for column in ("train_loss", "val_loss"):
        assert len({row[column] for row in rows}) == 1


def test_the_same_weights_give_bitwise_the_same_losses_on_any_number_of_processes(
        train, dataset, tmp_path):
    train("a", "--max_iters=3")
    last_rows = []
    for processes in (1, 2, 4):
        out_dir = tmp_path / str(processes)
        shutil.copytree(tmp_path / "a", out_dir)
        world(processes, f"--dataset={dataset}", f"--out_dir={out_dir}", "--init_from=resume",
              "--max_iters=3", "--eval_iters=7")
        last_rows.append(read_log(out_dir)[-1])
    assert last_rows[0]["val_loss"]
    assert last_rows[0] == last_rows[1] == last_rows[2]


@pytest.mark.parametrize("init_from", ["scratch", "resume"])
def test_eval_only_evaluates_once_and_writes_nothing(train, run, tmp_path, init_from):
    if init_from == "resume":
        train("a")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("a/*")}
    train("a", "--eval_only=True", f"--init_from={init_from}")
    assert run.out.count("step ") == 1 and "iter 0:" not in run.out
    assert {path.name: path.read_bytes() for path in tmp_path.glob("a/*")} == before
    assert (tmp_path / "a").exists() == (init_from == "resume")


# ---- losses that are not finite ----


def break_evaluation(monkeypatch, number):
    """Evaluation `number`, counted from 0, has a loss of NaN."""
    evaluations = 0
    set_eval, forward = GPT.eval, GPT.forward

    def counting_eval(self):
        nonlocal evaluations
        evaluations += 1
        return set_eval(self)

    def broken_forward(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        is_broken = not self.training and evaluations == number + 1
        return logits, loss * float("nan") if is_broken else loss
    monkeypatch.setattr(GPT, "eval", counting_eval)
    monkeypatch.setattr(GPT, "forward", broken_forward)


def test_nan_in_the_last_evaluation_is_an_error_and_saves_nothing(train, tmp_path, monkeypatch):
    break_evaluation(monkeypatch, 3)  # after those at 0, 3 and 6
    with pytest.raises(ValueError, match=r"not finite .*--init_from=resume .*iteration 6\b"):
        train("a")
    checkpoint = newest(tmp_path / "a")
    assert checkpoint["iter_num"] == checkpoint["best_iter"] == 6


def test_nan_in_an_earlier_evaluation_does_not_end_the_run(train, run, tmp_path, monkeypatch):
    train("a")
    with monkeypatch.context() as patch:
        break_evaluation(patch, 1)
        train("b")
    assert "step 3: train loss nan, val loss nan\n" in run.out
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))
