"""Resuming: an interrupted run ends bit for bit as one that was never interrupted."""

import re

import pytest
import torch
from conftest import (
    assert_same_run,
    assert_same_state,
    interrupt_at,
    load,
    newest,
    read_log,
    read_losses,
)

from model import GPT, GPTConfig

DROPOUT = ["--dropout=0.2"]
MUON = ["--optimizer_type=muon", "--lr_schedule=wsd", *DROPOUT]


@pytest.fixture
def interrupt(train, monkeypatch):
    """interrupt(updates, *arguments of `train`): a run that a signal stops after some updates."""
    def interrupt(updates, *arguments):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            interrupt_at(patch, 4 * updates - 1)  # each has 4 micro-batches
            train(*arguments)
    return interrupt


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(train, interrupt, tmp_path):
    train("a", *DROPOUT)
    for updates in range(1, 8):
        name = f"stopped{updates}"
        interrupt(updates, name, *DROPOUT)
        assert newest(tmp_path / name)["iter_num"] == updates
        train(name, *DROPOUT, "--init_from=resume")
        assert_same_run(tmp_path / "a", tmp_path / name)


@pytest.mark.parametrize("options", [
    ["--dtype=bfloat16", "--gradient_checkpointing=True", *DROPOUT],
    ["--dtype=float16"],
    MUON,
    [*MUON, "--dtype=float16"],
])
def test_resume_is_bitwise_with_other_dtypes_and_muon(train, interrupt, tmp_path, options):
    train("a", *options)
    interrupt(3, "b", *options)
    train("b", *options, "--init_from=resume")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert ("muon" in newest(tmp_path / "b")) == ("--optimizer_type=muon" in options)
    assert bool(newest(tmp_path / "b")["scaler"]) == ("--dtype=float16" in options)


@pytest.mark.parametrize("options", [[], MUON])
def test_other_dtypes_train_like_float32(train, tmp_path, options):
    """Their gradient norms too: float16's are those of gradients without its scale."""
    train("float32", *options)
    expected = float(read_log(tmp_path / "float32")[1]["grad_norm"])
    for dtype in ("bfloat16", "float16"):
        train(dtype, f"--dtype={dtype}", *options)
        losses = read_losses(tmp_path / dtype)
        assert losses == pytest.approx(read_losses(tmp_path / "float32"), rel=0.02)
        grad_norm = float(read_log(tmp_path / dtype)[1]["grad_norm"])
        assert grad_norm == pytest.approx(expected, rel=0.01)


def test_resume_without_settings_goes_on_as_before(run, train, interrupt, tmp_path):
    options = ["--dropout=0.2", "--weight_decay=0.3", "--beta2=0.9", "--seed=5", "--bias=True"]
    train("a", *options)
    interrupt(4, "b", *options)
    run("train.py", f"--out_dir={tmp_path / 'b'}", "--init_from=resume", "--device=cpu")
    assert "from here on" not in run.out
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_given_settings_win_on_resume_but_for_the_models_shape(run, train, tmp_path):
    train("a", "--max_iters=4", "--lr_decay_iters=4")
    train("a", "--init_from=resume", "--n_layer=3", "--block_size=4", "--dropout=0.1")
    for note in ("max_iters was 4 and is 8 from here on", "dropout was 0.0 and is 0.1 from here on",
                 "lr_decay_iters was 4 and is 8 from here on",
                 "n_layer stays 2: the model's shape is the checkpoint's"):
        assert f"note: {note}\n" in run.out
    assert "learning_rate was" not in run.out
    saved = newest(tmp_path / "a")
    assert saved["iter_num"] == saved["config"]["max_iters"] == 8
    assert saved["config"]["n_layer"] == 2
    assert saved["model_args"] == dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=False,
                                       vocab_size=28, dropout=0.1)


def test_auto_starts_resumes_and_finds_a_complete_run(train, run, tmp_path):
    train("a", "--max_iters=4", "--init_from=auto")
    assert "from iteration 0\n" in run.out and newest(tmp_path / "a")["iter_num"] == 4
    train("a", "--init_from=auto")
    assert "from iteration 4\n" in run.out
    train("b")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    train("a", "--init_from=auto")
    assert "iter " not in run.out.replace("iteration", "")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_finetuning_starts_from_a_folder_and_crops_it(train, tmp_path):
    torch.manual_seed(0)
    GPT(GPTConfig(32, 28, 1, 2, 8, 0.0, True)).save_pretrained(str(tmp_path / "hf"))
    train("a", f"--init_from={tmp_path / 'hf'}", "--dropout=0.1")
    assert newest(tmp_path / "a")["model_args"] == dict(
        n_layer=1, n_head=2, n_embd=8, block_size=8, bias=True, vocab_size=28, dropout=0.1)
    with pytest.raises(ValueError, match="block_size=64"):
        train("b", f"--init_from={tmp_path / 'hf'}", "--block_size=64")


DIVERGING = ["--eval_interval=1", "--min_lr=3.0"]  # a learning rate that rises


@pytest.mark.parametrize("always", [True, False])
def test_ckpt_is_the_best_checkpoint_and_last_the_latest(train, run, tmp_path, always):
    train("a", *DIVERGING, f"--always_save_checkpoint={always}")
    lowest, best_iter = 9.0, 0
    for row in read_log(tmp_path / "a"):
        if row["val_loss"] == "" or row["iter"] == "0":
            continue
        loss, saved = float(row["val_loss"]), ""
        if loss < lowest:
            lowest, best_iter, saved = loss, int(row["iter"]), ", saved ckpt.pt"
        elif always:
            saved = ", saved last.pt"  # else it waits for the end
        line = rf"^step {row['iter']}: train loss [\d.]+, val loss {loss:.4f}{saved}$"
        assert re.search(line, run.out, re.M)
    assert 1 < best_iter < 8  # otherwise this shows nothing
    best, latest = load(tmp_path / "a", "ckpt.pt"), load(tmp_path / "a", "last.pt")
    assert best["iter_num"] == best_iter and latest["iter_num"] == 8
    assert best["best_val_loss"] == latest["best_val_loss"] == lowest
    # a resume takes the latest, and keeps the best
    train("a", *DIVERGING, "--init_from=resume", "--max_iters=9", "--learning_rate=0.0001")
    assert "from iteration 8\n" in run.out
    assert newest(tmp_path / "a")["iter_num"] == 9
    assert_same_state(load(tmp_path / "a", "ckpt.pt"), best)
