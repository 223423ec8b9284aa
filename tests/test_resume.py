"""Resuming: an interrupted run ends bit for bit as one that was never interrupted."""

import shutil

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
    """interrupt(update, *arguments of `train`): a run that a signal stops in this update."""
    def interrupt(update, *arguments):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            interrupt_at(patch, update)
            train(*arguments)
    return interrupt


# ---- exactness ----


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(train, interrupt, tmp_path):
    train("a", *DROPOUT)
    for update in range(1, 8):
        name = f"stopped{update}"
        interrupt(update, name, *DROPOUT)
        assert newest(tmp_path / name)["iter_num"] == update
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


# ---- settings ----


def test_resume_without_settings_goes_on_as_before(run, train, interrupt, tmp_path):
    options = ["--dropout=0.2", "--weight_decay=0.3", "--beta2=0.9", "--seed=5", "--bias=True"]
    train("a", *options)
    interrupt(4, "b", *options)
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
    assert "note: n_layer stays 2: the model's shape is the checkpoint's\n" in run.out


def test_auto_starts_and_then_resumes(train, run, tmp_path):
    train("a", "--max_iters=4", "--init_from=auto")
    assert "from iteration 0\n" in run.out and newest(tmp_path / "a")["iter_num"] == 4
    train("a", "--init_from=auto")
    assert "from iteration 4\n" in run.out
    train("b")
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))


def test_a_completed_run_says_so_when_resumed(train, run, tmp_path):
    train("a")
    shutil.copytree(tmp_path / "a", tmp_path / "before")
    train("a", "--init_from=resume")
    assert ("this run is complete: give larger --max_iters and --lr_decay_iters than 8\n"
            in run.out)
    assert "iter " not in run.out.replace("iteration", "")
    assert_same_run(tmp_path / "a", tmp_path / "before")


def test_finetuning_starts_from_a_folder_and_crops_it(train, tmp_path):
    torch.manual_seed(0)
    GPT(GPTConfig(32, 28, 1, 2, 8, 0.0, True)).save_pretrained(str(tmp_path / "hf"))
    train("a", f"--init_from={tmp_path / 'hf'}", "--dropout=0.1")
    assert newest(tmp_path / "a")["model_args"] == dict(
        n_layer=1, n_head=2, n_embd=8, block_size=8, bias=True, vocab_size=28, dropout=0.1)
    with pytest.raises(ValueError, match="block_size=64"):
        train("b", f"--init_from={tmp_path / 'hf'}", "--block_size=64")


def test_finetuning_starts_from_another_run(train, run, dataset, tmp_path):
    """From its best weights, at iteration 0, and only on data with the same characters."""
    train("a", "--max_iters=3")
    result = train("b", f"--init_from={tmp_path / 'a'}", "--max_iters=0", "--dropout=0.1")
    assert "from iteration 0\n" in run.out and result["model"].training
    for name, p in load(tmp_path / "a", "ckpt.pt")["model"].items():
        assert torch.equal(result["model"].state_dict()[name], p)
    folder = shutil.copytree(dataset, tmp_path / "other")
    meta = (folder / "meta.pkl").read_bytes()
    (folder / "meta.pkl").write_bytes(meta.replace(b"x", b"X"))
    with pytest.raises(ValueError, match="other characters"):
        train("c", f"--init_from={tmp_path / 'a'}", f"--dataset={folder}")


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
    assert best["best_val_loss"] == latest["best_val_loss"] == losses[best_iter]
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


def test_step_0_saves_nothing_and_the_end_only_what_is_not_saved(train, run, tmp_path):
    train("a", "--max_iters=0")
    assert "saved" not in run.out and list(tmp_path.glob("a/ckpt*")) == []
    train("b")
    assert load(tmp_path / "b", "ckpt.pt")["iter_num"] == 8
    assert not (tmp_path / "b/last.pt").exists()


def test_resume_takes_the_later_checkpoint_and_keeps_the_best(train, run, tmp_path):
    train("a", *DIVERGING)
    best = load(tmp_path / "a", "ckpt.pt")
    train("a", *DIVERGING, "--init_from=resume", "--max_iters=9", "--learning_rate=0.0001")
    assert "from iteration 8\n" in run.out
    assert newest(tmp_path / "a")["iter_num"] == 9
    assert_same_state(load(tmp_path / "a", "ckpt.pt"), best)
