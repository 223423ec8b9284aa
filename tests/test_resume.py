"""Resuming: an interrupted run ends bit for bit as one that was never interrupted."""

import pytest
import torch
from conftest import (
    assert_same_state,
    interrupt_at,
    newest,
    read_log,
    read_losses,
    world,
)

from checkpoint import load_checkpoint
from model import GPT, GPTConfig

DROPOUT = ["--dropout=0.2"]
MUON = ["--optimizer_type=muon", "--lr_schedule=wsd", *DROPOUT]


def assert_same_run(a, b):
    assert_same_state(newest(a), newest(b))
    assert read_log(a) == read_log(b)


def load(out_dir, name):
    return load_checkpoint(str(out_dir / name))


# ---- exactness ----


@pytest.mark.parametrize("update", range(1, 8))
def test_resumed_run_is_bitwise_the_uninterrupted_one(train, tmp_path, monkeypatch, update):
    train("a", *DROPOUT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, update)
        with pytest.raises(SystemExit):
            train("b", *DROPOUT)
    assert newest(tmp_path / "b")["iter_num"] == update
    train("b", *DROPOUT, "--init_from=resume")
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("options", [
    ["--dtype=bfloat16"],
    ["--dtype=float16"],
    MUON,
    [*MUON, "--dtype=float16"],
])
def test_resume_is_bitwise_with_other_dtypes_and_muon(train, tmp_path, monkeypatch, options):
    train("a", *options)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(SystemExit):
            train("b", *options)
    train("b", *options, "--init_from=resume")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert ("muon" in newest(tmp_path / "b")) == ("--optimizer_type=muon" in options)
    assert bool(newest(tmp_path / "b")["scaler"]) == ("--dtype=float16" in options)


@pytest.mark.parametrize("options", [[], MUON])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_train_like_float32(train, tmp_path, dtype, options):
    """Their gradient norms too: float16's are those of gradients without its scale."""
    train("exact", *options)
    train("a", f"--dtype={dtype}", *options)
    losses = read_losses(tmp_path / "a")
    assert losses == pytest.approx(read_losses(tmp_path / "exact"), rel=0.02)
    norms = [float(read_log(tmp_path / name)[1]["grad_norm"]) for name in ("exact", "a")]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)


def test_two_interrupted_processes_with_muon_resume_bitwise(dataset, tmp_path):
    options = [f"--dataset={dataset}", *MUON]
    world(2, *options, f"--out_dir={tmp_path / 'a'}")
    world(2, *options, f"--out_dir={tmp_path / 'b'}", "--max_iters=3")
    world(2, *options, f"--out_dir={tmp_path / 'b'}", "--init_from=resume")
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))


# ---- settings ----


def test_resume_without_settings_goes_on_as_before(run, train, tmp_path, monkeypatch):
    options = ["--dropout=0.2", "--weight_decay=0.3", "--beta2=0.9", "--seed=5", "--bias=True"]
    train("a", *options)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(SystemExit):
            train("b", *options)
    run("train.py", f"--out_dir={tmp_path / 'b'}", "--init_from=resume", "--device=cpu")
    assert "from here on" not in run.out
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_given_settings_win_on_resume_and_are_printed(run, train, tmp_path):
    train("a", "--max_iters=4", "--lr_decay_iters=4")
    run("train.py", f"--out_dir={tmp_path / 'a'}", "--init_from=resume", "--max_iters=8",
        "--learning_rate=0.01", "--lr_decay_iters=8")
    assert "note: max_iters was 4 and is 8 from here on\n" in run.out
    assert "note: lr_decay_iters was 4 and is 8 from here on\n" in run.out
    assert "learning_rate was" not in run.out
    assert newest(tmp_path / "a")["iter_num"] == 8
    assert newest(tmp_path / "a")["config"]["max_iters"] == 8


def test_the_shape_of_the_model_comes_from_the_checkpoint(train, run, tmp_path):
    train("a", "--max_iters=2")
    result = train("a", "--init_from=resume", "--n_layer=3", "--block_size=4", "--dropout=0.1")
    shape = dict(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=False, vocab_size=28)
    assert result["model_args"] == dict(shape, dropout=0.1)
    assert newest(tmp_path / "a")["config"]["n_layer"] == 2
    assert "n_layer was" not in run.out and "block_size was" not in run.out


@pytest.mark.parametrize("option, anew", [("--eval_iters=12", True), ("--seed=1337", False)])
def test_a_best_loss_counts_for_the_evaluation_it_was_measured_with(train, tmp_path, option, anew):
    train("a", "--max_iters=3")
    best_val_loss = newest(tmp_path / "a")["best_val_loss"]
    worse = ["--max_iters=6", "--learning_rate=9.0", "--min_lr=9.0"]
    train("a", *worse, option, "--init_from=resume")
    assert (newest(tmp_path / "a")["best_val_loss"] != best_val_loss) == anew


def test_auto_starts_and_then_resumes(train, run, tmp_path):
    train("a", "--max_iters=4", "--init_from=auto")
    assert "from iteration 0\n" in run.out and newest(tmp_path / "a")["iter_num"] == 4
    train("a", "--init_from=auto")
    assert "from iteration 4\n" in run.out
    train("b")
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))


def test_completed_run_says_so_when_resumed(train, run, tmp_path):
    train("a")
    before = newest(tmp_path / "a"), read_log(tmp_path / "a")
    train("a", "--init_from=resume")
    assert "this run is complete: give a larger --max_iters than 8 to continue\n" in run.out
    assert "iter " not in run.out.replace("iteration", "")
    assert_same_state(newest(tmp_path / "a"), before[0])
    assert read_log(tmp_path / "a") == before[1]


def test_finetuning_starts_from_a_folder_and_crops_it(train, tmp_path):
    torch.manual_seed(0)
    GPT(GPTConfig(32, 28, 1, 2, 8, 0.0, True)).save_pretrained(str(tmp_path / "hf"))
    train("a", f"--init_from={tmp_path / 'hf'}", "--dropout=0.1")
    assert newest(tmp_path / "a")["model_args"] == dict(
        n_layer=1, n_head=2, n_embd=8, block_size=8, bias=True, vocab_size=28, dropout=0.1)
    with pytest.raises(ValueError, match="block_size=64"):
        train("b", f"--init_from={tmp_path / 'hf'}", "--block_size=64")


# ---- the best checkpoint and the latest ----

DIVERGING = ["--eval_interval=1", "--min_lr=3.0"]  # a learning rate that rises


def val_losses(out_dir):
    """{iteration: val loss} of the evaluations that may save."""
    losses = {}
    for row in read_log(out_dir):
        if row["val_loss"] and row["iter"] != "0":
            losses[int(row["iter"])] = float(row["val_loss"])
    return losses


@pytest.mark.parametrize("always", [True, False])
def test_ckpt_is_the_best_checkpoint_and_last_the_latest(train, run, tmp_path, always):
    train("a", *DIVERGING, f"--always_save_checkpoint={always}")
    losses = val_losses(tmp_path / "a")
    best_iter = min(losses, key=losses.get)
    assert 1 < best_iter < 8  # otherwise this shows nothing
    best, latest = load(tmp_path / "a", "ckpt.pt"), load(tmp_path / "a", "last.pt")
    assert best["iter_num"] == best_iter and latest["iter_num"] == 8
    for checkpoint in (best, latest):
        assert checkpoint["best_val_loss"] == losses[best_iter]
        assert checkpoint["best_iter"] == best_iter
    # every step line says what it saved; with always off, last.pt waits for the end
    lowest = float("inf")
    for iteration, loss in losses.items():
        saved = ""
        if loss < lowest:
            saved = ", saved ckpt.pt"
        elif always:
            saved = ", saved last.pt"
        lowest = min(lowest, loss)
        line = next(x for x in run.out.splitlines() if x.startswith(f"step {iteration}:"))
        assert line.endswith(f"val loss {loss:.4f}{saved}")


def test_the_evaluation_at_step_0_saves_nothing(train, run, tmp_path):
    train("a", "--max_iters=0")
    assert "saved" not in run.out
    assert list(tmp_path.glob("a/ckpt*")) == []


def test_a_run_that_ends_on_its_best_checkpoint_writes_no_other(train, tmp_path):
    train("a")
    assert load(tmp_path / "a", "ckpt.pt")["iter_num"] == 8
    assert not (tmp_path / "a/last.pt").exists()


def test_resume_takes_the_later_checkpoint_and_keeps_the_best(train, run, tmp_path):
    train("a", *DIVERGING)
    best = load(tmp_path / "a", "ckpt.pt")
    train("a", *DIVERGING, "--init_from=resume", "--max_iters=9", "--learning_rate=0.0001")
    assert "from iteration 8\n" in run.out
    assert newest(tmp_path / "a")["iter_num"] == 9
    assert_same_state(load(tmp_path / "a", "ckpt.pt"), best)
