"""What a run shows and logs: its lines, log.csv, time left, wandb."""

import math
import os
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_run, newest, on_forward, read_log

from model import GPT


def test_a_run_learns_and_leaves_its_files(train, run, tmp_path):
    train("a", "--max_iters=60", "--lr_decay_iters=60", "--eval_interval=20", "--log_interval=10")
    pattern = r"^step (\d+): train loss ([\d.]+), val loss ([\d.]+)(?:, saved ckpt.pt)?$"
    steps = re.findall(pattern, run.out, re.M)
    assert [int(step) for step, _, _ in steps] == [0, 20, 40, 60]
    assert float(steps[0][2]) == pytest.approx(math.log(28), abs=0.1)
    assert float(steps[-1][2]) < 2.8
    pattern = r"^iter (\d+): loss [\d.]+, time [\d.]+ms, [\d,]+ tokens/s(?:, [\d:]+ left)?$"
    assert re.findall(pattern, run.out, re.M) == ["0", "10", "20", "30", "40", "50"]
    assert sorted(os.listdir(tmp_path / "a")) == [".lock", "ckpt.pt", "log.csv"]

    rows = [(row["iter"], bool(row["val_loss"])) for row in read_log(tmp_path / "a")]
    assert rows == [("0", True), ("0", False), ("10", False), ("20", True), ("20", False),
                    ("30", False), ("40", True), ("40", False), ("50", False), ("60", True)]
    losses = [float(row["val_loss"]) for row in read_log(tmp_path / "a") if row["val_loss"]]
    assert newest(tmp_path / "a")["best_val_loss"] == min(losses)
    assert f"best val loss {min(losses):.4f}, time " in run.out


def test_time_and_time_left_by_hand(train, run, monkeypatch):
    """By a clock on which an update takes 2 seconds and an evaluation 30."""
    now = 0.0

    def pass_time(owner, name, seconds):
        function = getattr(owner, name)

        def slower(*args, **kwargs):
            nonlocal now
            now += seconds
            return function(*args, **kwargs)
        monkeypatch.setattr(owner, name, slower)
    pass_time(torch.nn.utils, "get_total_norm", 2)
    pass_time(GPT, "eval", 30)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    train("a", "--max_iters=6")  # evaluations before every third update
    train_out = run.out
    train("a", "--max_iters=8", "--init_from=resume")
    pattern = r"^iter (\d): loss [\d.]+, time 2000.00ms, 48 tokens/s(?:, ([\d:]+) left)?$"
    # the first update is slower than the others
    assert re.findall(pattern, train_out, re.M) == [
        ("0", ""), ("1", "0:00:08"), ("2", "0:00:06"), ("3", "0:00:04"), ("4", "0:00:02"),
        ("5", "0:00:00")]
    assert re.findall(pattern, run.out, re.M) == [("6", ""), ("7", "0:00:00")]


def test_resume_replaces_the_rows_that_it_writes_again(train, tmp_path):
    """Among them a line that a crash has cut short."""
    train("a")
    train("b", "--max_iters=6")
    with open(tmp_path / "b/log.csv", "a") as file:
        file.write("6,,,9.9,0.01,1.0,1,1,\n7,,,9.9")
    train("b", "--init_from=resume")
    assert read_log(tmp_path / "b") == read_log(tmp_path / "a")


def test_the_run_goes_on_when_log_csv_cannot_be_written(train, run, tmp_path, monkeypatch):
    log_path = tmp_path / "a/log.csv"

    def replace_log(loss, training, number):
        if training and number == 4 * 5:
            log_path.unlink()
            log_path.mkdir()
        return loss
    on_forward(monkeypatch, replace_log)
    train("a")
    assert f"note: cannot write {log_path}: " in run.out
    assert newest(tmp_path / "a")["iter_num"] == 8
    assert "to sample: " in run.out


def test_wandb_gets_evaluations_and_iterations_with_iter_as_their_axis(
        train, tmp_path, monkeypatch):
    def init(**options):
        if options["name"] == "fails":
            raise RuntimeError("no API key")
        all_options.append(options)
        return SimpleNamespace(id="run1", define_metric=define_metric, log=rows.append,
                               finish=exit_codes.append)

    def define_metric(name, step_metric):
        assert (name, step_metric) == ("*", "iter")
    all_options, rows, exit_codes = [], [], []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=RuntimeError))
    train("a", "--wandb_log=True", "--wandb_project=p", "--wandb_run_name=n", "--max_iters=1")
    train("a", "--wandb_log=True", "--init_from=resume", "--max_iters=2")
    first, second = all_options
    assert (first["project"], first["name"], first["id"]) == ("p", "n", None)
    assert (second["resume"], second["id"]) == ("allow", "run1")
    assert first["config"]["n_layer"] == 2
    evaluation = {"iter", "train/loss", "val/loss", "lr"}
    iteration = {"iter", "loss", "lr", "grad_norm", "tokens_per_s", "time_ms", "mfu"}
    assert [set(row) for row in rows[:3]] == [evaluation, iteration, evaluation]
    assert [row["iter"] for row in rows[:3]] == [0, 0, 1]
    assert exit_codes == [0, 0]
    with pytest.raises(ValueError, match="wandb: no API key .*WANDB_MODE=offline"):
        train("a", "--wandb_log=True", "--wandb_run_name=fails")
    assert set(os.listdir(tmp_path / "a")) == {".lock", "ckpt.pt", "log.csv"}


def test_wandb_itself_changes_nothing_and_continues_its_run(train, tmp_path, monkeypatch):
    import wandb
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train("plain", "--dropout=0.2")
    train("a", "--dropout=0.2", "--wandb_log=True", "--max_iters=3")
    wandb.teardown()
    train("a", "--dropout=0.2", "--wandb_log=True", "--init_from=resume")
    wandb.teardown()
    wandb_id = newest(tmp_path / "a")["wandb_id"]
    assert wandb_id
    assert_same_run(tmp_path / "a", tmp_path / "plain")
    files = [path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert files == [f"run-{wandb_id}.wandb"] * 2
