import math
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, assert_same_state, finish, newest, read_log, spawn, world

from model import GPT, load_checkpoint, save_checkpoint


def interrupt_at(monkeypatch, update, number=signal.SIGTERM):
    """A real signal to this process in the middle of update `update`, counted from 1."""
    total_norm, count = torch.nn.utils.get_total_norm, [0]

    def patched(*args, **kwargs):
        count[0] += 1
        if count[0] == update:
            signal.raise_signal(number)
        return total_norm(*args, **kwargs)
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", patched)


def test_a_run_learns_and_leaves_its_files(train, run, tmp_path):
    result = train("a", "--max_iters=60", "--lr_decay_iters=60", "--eval_interval=20", "--log_interval=10")
    steps = re.findall(r"^step (\d+): train loss ([\d.]+), val loss ([\d.]+)$", run.out, re.M)
    assert [int(step) for step, _, _ in steps] == [0, 20, 40, 60]
    assert float(steps[0][2]) == pytest.approx(math.log(28), abs=0.1) and float(steps[-1][2]) < 2.8
    lines = re.findall(r"^iter (\d+): loss [\d.]+, time [\d.]+ms, [\d,]+ tokens/s, 0h00m\d\ds left$", run.out, re.M)
    assert [int(i) for i in lines] == [0, 10, 20, 30, 40, 50]
    assert sorted(os.listdir(tmp_path / "a")) == ["ckpt.pt", "log.csv"]
    assert [(row["iter"], bool(row["val_loss"])) for row in read_log(tmp_path / "a")] == [
        ("0", True), ("0", False), ("10", False), ("20", True), ("20", False), ("30", False), ("40", True), ("40", False), ("50", False), ("60", True)]
    checkpoint = load_checkpoint(str(tmp_path / "a" / "ckpt.pt"))
    assert checkpoint["iter_num"] == 60 and checkpoint["best_val_loss"] == min(float(row["val_loss"] or 9) for row in read_log(tmp_path / "a"))
    assert all(state["step"] == 60 for state in checkpoint["optimizer"]["state"].values())  # exactly max_iters updates
    assert set(checkpoint["model_args"]) == {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert torch.equal(checkpoint["model"]["lm_head.weight"], result["model"].lm_head.weight)


def test_learning_rate_by_hand(train):
    get_lr = train("a", "--max_iters=0", "--warmup_iters=4", "--lr_decay_iters=12", "--learning_rate=1.0", "--min_lr=0.2")["get_lr"]
    expected = {0: 0.2, 3: 0.8, 4: 1.0, 8: 0.6, 12: 0.2, 1000: 0.2}  # 6: a quarter of the half cosine
    assert {i: get_lr(i) for i in expected} == pytest.approx(expected)
    assert get_lr(6) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)


def test_a_decay_that_ends_before_the_warmup(train):
    get_lr = train("a", "--max_iters=0", "--warmup_iters=4", "--lr_decay_iters=2", "--learning_rate=1.0", "--min_lr=0.2")["get_lr"]
    assert [get_lr(i) for i in (3, 4, 5)] == pytest.approx([0.8, 0.2, 0.2])
    assert train("b", "--max_iters=0", "--decay_lr=False")["get_lr"](0) == 0.01


def test_wsd_by_hand(train):
    options = "--warmup_iters=4 --lr_decay_iters=20 --learning_rate=1.0 --min_lr=0.2 --lr_schedule=wsd".split()
    get_lr = train("a", "--max_iters=0", "--decay_share=0.5", *options)["get_lr"]
    expected = {0: 0.2, 3: 0.8, 4: 1.0, 10: 1.0, 15: 0.6, 19: 0.28, 20: 0.2, 1000: 0.2}
    assert {i: get_lr(i) for i in expected} == pytest.approx(expected)
    get_lr = train("b", "--max_iters=0", "--decay_share=0.0", *options)["get_lr"]
    assert [get_lr(i) for i in (19, 20)] == pytest.approx([1.0, 0.2])
    get_lr = train("c", "--max_iters=0", "--decay_share=1.0", *options)["get_lr"]  # all that the warm-up leaves
    assert [get_lr(i) for i in (3, 4, 12, 20)] == pytest.approx([0.8, 1.0, 0.6, 0.2])


def test_a_batch_is_a_pure_function(train, dataset):
    one = train("a", "--max_iters=0")
    other = train("b", "--max_iters=0", "--batch_size=6", "--gradient_accumulation_steps=2")  # the same 12 rows an iteration
    rows = [torch.cat([r["get_batch"]("train", 0, 5, 12, m)[0] for m in range(n)]) for r, n in ((one, 4), (other, 2))]
    assert torch.equal(*rows) and len(rows[0]) == 12
    assert not torch.equal(one["get_batch"]("train", 0, 5, 12, 0)[0], one["get_batch"]("train", 1, 5, 12, 0)[0])
    assert not torch.equal(one["get_batch"]("train", 0, 5, 12, 0)[0], one["get_batch"]("train", 0, 6, 12, 0)[0])
    x, y = one["get_batch"]("train", 0, 5, 12, 3)
    assert torch.equal(x[:, 1:], y[:, :-1]) and x.shape == y.shape == (3, 8)
    text = np.fromfile(dataset / "train.bin", dtype="<u2").tobytes()
    assert all(torch.cat([a[:1], b]).numpy().astype("<u2").tobytes() in text for a, b in zip(x, y))


def test_offsets_are_uniform_and_reach_both_ends(train, tmp_path):
    np.arange(20, dtype=np.uint16).tofile(tmp_path / "train.bin")
    np.arange(20, dtype=np.uint16).tofile(tmp_path / "val.bin")
    result = train("a", "--max_iters=0", f"--dataset={tmp_path}", "--n_embd=2", "--n_layer=1")
    first = torch.cat([result["get_batch"]("train", 0, i)[0][:, 0] for i in range(2000)])
    counts = torch.bincount(first)
    assert len(counts) == 20 - 8 and counts.min() > 400 and counts.max() < 600  # 6000 draws of 12 offsets


def test_the_first_gradient_is_that_of_the_whole_batch(train, monkeypatch):
    """Against one plain pass over all rows of iteration 0 at once."""
    seen = {}

    def no_step(self, *args, **kwargs):
        seen.setdefault("grads", [p.grad.clone() for group in self.param_groups for p in group["params"]])
    monkeypatch.setattr(torch.optim.AdamW, "step", no_step)
    result = train("a", "--max_iters=1", "--grad_clip=0.0")
    model = result["model"]
    rows = [result["get_batch"]("train", 0, 0, 12, micro) for micro in range(4)]
    loss = model(torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows]))[1]
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.dim() > 1] + [p.grad for p in model.parameters() if p.dim() == 1]
    for ours, expected in zip(seen["grads"], grads):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


DROPOUT = ["--dropout=0.2"]


@pytest.mark.parametrize("stop", range(1, 8))
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(train, tmp_path, monkeypatch, stop):
    train("a", *DROPOUT)
    with monkeypatch.context() as patch:
        interrupt_at(patch, stop)
        with pytest.raises(SystemExit) as stopped:
            train("b", *DROPOUT)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert newest(tmp_path / "b")["iter_num"] == stop
    train("b", *DROPOUT, "--init_from=resume")
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")


def test_how_often_one_looks_changes_nothing(train, tmp_path):
    plain = train("a", *DROPOUT)["model"].state_dict()
    for options in (["--eval_interval=1"], ["--eval_iters=7"], ["--log_interval=5"], ["--always_save_checkpoint=False"], ["--wandb_log=True"]):
        if options == ["--wandb_log=True"]:
            os.environ["WANDB_DIR"] = str(tmp_path)
        other = train("b", *DROPOUT, *options)["model"].state_dict()
        assert all(torch.equal(plain[name], other[name]) for name in plain), options
    assert list(tmp_path.glob("wandb/offline-run-*"))
    __import__("wandb").teardown()


def test_auto_starts_and_then_resumes(train, run, tmp_path):
    train("a", "--max_iters=4", "--init_from=auto")
    assert newest(tmp_path / "a")["iter_num"] == 4
    train("a", "--init_from=auto")
    assert "max_iters was 4, and is 8" in run.out and "from iteration 4" in run.out
    train("b")
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))


def test_an_earlier_run_is_kept(train, run, tmp_path):
    train("a", "--seed=1")
    first = load_checkpoint(str(tmp_path / "a/ckpt.pt"))
    train("a", "--seed=2", "--eval_only=True")
    train("a", "--seed=2")
    assert_same_state(load_checkpoint(str(tmp_path / "a/ckpt.1.pt")), first)
    train("a", "--seed=3")
    assert_same_state(load_checkpoint(str(tmp_path / "a/ckpt.1.pt")), first)
    assert {"ckpt.pt", "ckpt.1.pt", "ckpt.2.pt", "log.csv", "log.1.csv", "log.2.csv"} <= set(os.listdir(tmp_path / "a"))
    assert "ckpt.2.pt" in run.out


@pytest.mark.parametrize("how", ["scratch", "resume"])
def test_eval_only_evaluates_once_and_writes_nothing(train, run, tmp_path, how):
    if how == "resume":
        train("a")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("a/*")}
    train("a", "--eval_only=True", f"--init_from={how}")
    assert run.out.count("step ") == 1 and "iter 0:" not in run.out
    assert {path.name: path.read_bytes() for path in tmp_path.glob("a/*")} == before
    assert (tmp_path / "a").exists() == (how == "resume")


def test_the_best_checkpoint_stays(train, tmp_path, monkeypatch):
    """With always_save_checkpoint off, a worse loss leaves ckpt.pt alone, and the minimum is what is remembered."""
    train("a", "--always_save_checkpoint=False", "--eval_interval=1", "--min_lr=3.0")  # a rate that rises
    losses = [float(row["val_loss"]) for row in read_log(tmp_path / "a") if row["val_loss"]]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert 0 < best < 8  # otherwise this shows nothing
    checkpoint, last = (load_checkpoint(str(tmp_path / "a" / name)) for name in ("ckpt.pt", "last.pt"))
    assert checkpoint["iter_num"] == best and last["iter_num"] == 8
    assert checkpoint["best_val_loss"] == last["best_val_loss"] == losses[best]


def test_finetuning_starts_from_a_folder_and_crops_it(train, tmp_path, run):
    torch.manual_seed(0)
    from model import GPTConfig
    GPT(GPTConfig(32, 28, 1, 2, 8, 0.0, True)).save_pretrained(str(tmp_path / "hf"))
    train("a", f"--init_from={tmp_path / 'hf'}", "--dropout=0.1")
    checkpoint = newest(tmp_path / "a")
    assert checkpoint["model_args"] == dict(n_layer=1, n_head=2, n_embd=8, block_size=8, bias=True, vocab_size=28, dropout=0.1)
    with pytest.raises(ValueError, match="block_size=64"):
        train("b", f"--init_from={tmp_path / 'hf'}", "--block_size=64")


def test_checkpoints_of_nanogpt_resume(train, tmp_path, run):
    """By its layout: compiled names, a tensor for the best loss, no keys but its own."""
    train("a", "--max_iters=3", "--eval_interval=3")
    ours = load_checkpoint(str(tmp_path / "a/ckpt.pt"))
    theirs = {key: ours[key] for key in ("optimizer", "model_args", "iter_num", "config")}
    theirs["model"] = {"_orig_mod." + name: p for name, p in ours["model"].items()}
    theirs["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    theirs["best_val_loss"] = torch.tensor(ours["best_val_loss"])
    theirs["config"] = {key: value for key, value in ours["config"].items() if key not in ("seed", "deterministic")}
    (tmp_path / "b").mkdir()
    torch.save(theirs, tmp_path / "b/ckpt.pt")
    train("b", "--init_from=resume")
    train("c")
    assert_same_state(newest(tmp_path / "b"), newest(tmp_path / "c"))


def test_checkpoints_hold_what_nanogpts_readers_expect(train, tmp_path):
    train("a", "--max_iters=3", "--bias=True", "--n_layer=1")
    checkpoint = torch.load(tmp_path / "a/ckpt.pt", weights_only=True)
    layers = "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj".split()
    names = [f"transformer.h.0.{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    assert set(checkpoint["model"]) == {"lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias", *names}
    assert {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"} <= set(checkpoint)
    assert [len(group["params"]) for group in checkpoint["optimizer"]["param_groups"]] == [2 + 4, 2 + 8]  # decayed, then not


def test_a_train_split_shorter_than_val_is_evaluated_whole(train, dataset, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder)
    (folder / "train.bin").write_bytes((dataset / "val.bin").read_bytes()[:200])
    train("a", f"--dataset={folder}", "--eval_iters=0", "--max_iters=1", "--block_size=7")
    assert all(2 < float(read_log(tmp_path / "a")[0][key]) < 4 for key in ("train_loss", "val_loss"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_trains_alike_and_resumes_bitwise(train, tmp_path, monkeypatch, dtype):
    train("full")
    train("a", f"--dtype={dtype}")
    losses = [[float(row["loss"]) for row in read_log(tmp_path / name) if row["loss"]] for name in ("full", "a")]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(SystemExit):
            train("b", f"--dtype={dtype}")
    scale = newest(tmp_path / "b")["scaler"].get("scale")
    assert (scale is not None) == (dtype == "float16")
    train("b", "--init_from=resume", "--dtype=auto")  # the precision comes from the checkpoint
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")


def assert_agree(a, b, rel=1e-5):
    """Two logs agree to rounding."""
    assert len(a) == len(b)
    for ours, theirs in zip(a, b):
        assert ours["iter"] == theirs["iter"]
        for key in ("train_loss", "val_loss", "loss", "grad_norm"):
            assert (ours[key] == theirs[key] == "") or float(ours[key]) == pytest.approx(float(theirs[key]), rel=rel)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_do_what_one_does_and_take_over(train, dataset, tmp_path, processes):
    train("one", *DROPOUT)
    several = [f"--dataset={dataset}", f"--out_dir={tmp_path / 'several'}", *DROPOUT]
    world(processes, *several)
    assert_agree(read_log(tmp_path / "one"), read_log(tmp_path / "several"))
    train("several", *DROPOUT, "--max_iters=10", "--init_from=resume")
    world(processes, *several, f"--out_dir={tmp_path / 'one'}", "--max_iters=10", "--init_from=resume")
    assert_agree(read_log(tmp_path / "one"), read_log(tmp_path / "several"))


def test_the_same_weights_evaluate_bitwise_alike_on_any_number_of_processes(train, dataset, tmp_path):
    train("a", "--max_iters=3")
    for processes in (1, 2, 4):
        shutil.copytree(tmp_path / "a", tmp_path / str(processes))
        world(processes, f"--dataset={dataset}", f"--out_dir={tmp_path / str(processes)}", "--max_iters=3", "--eval_iters=7", "--init_from=resume")
    logs = [read_log(tmp_path / str(processes))[-1] for processes in (1, 2, 4)]
    assert logs[0] == logs[1] == logs[2] and logs[0]["val_loss"]


@pytest.mark.parametrize("processes", [1, 2])
def test_the_whole_of_a_split_is_evaluated_once_and_in_order(train, dataset, tmp_path, processes):
    options = ["--eval_iters=0", "--block_size=7", "--max_iters=2"]
    world(processes, f"--dataset={dataset}", f"--out_dir={tmp_path / 'a'}", *options)
    model = GPT.from_checkpoint(newest(tmp_path / "a")).eval()
    losses = {}
    for split in ("train", "val"):
        ids = torch.from_numpy(np.fromfile(dataset / f"{split}.bin", np.uint16)[:2000].astype(np.int64))  # val has 2000
        assert len(ids) == 2000 and (len(ids) - 1) % 7  # the last block is a short one
        with torch.no_grad():
            total = sum(model(ids[None, i:i + 7][:, :len(ids) - 1 - i], ids[None, i + 1:i + 8])[1].item() * len(ids[i + 1:i + 8]) for i in range(0, 1999, 7))
        losses[split] = total / 1999
    last = read_log(tmp_path / "a")[-1]
    assert {split: float(last[f"{split}_loss"]) for split in losses} == pytest.approx(losses, abs=1e-5)


MUON = ["--optimizer_type=muon", "--lr_schedule=wsd", *DROPOUT]


@pytest.mark.parametrize("dtype, processes", [("float32", 1), ("float16", 1), ("float32", 2)])
def test_muon_resumes_bitwise_in_any_setting(train, dataset, tmp_path, dtype, processes):
    options = [f"--dataset={dataset}", f"--dtype={dtype}", *MUON]
    world(processes, *options, f"--out_dir={tmp_path / 'a'}")
    world(processes, *options, f"--out_dir={tmp_path / 'b'}", "--max_iters=3")
    world(processes, *options, f"--out_dir={tmp_path / 'b'}", "--init_from=resume")
    assert "muon" in newest(tmp_path / "a")
    a, b = newest(tmp_path / "a"), newest(tmp_path / "b")
    assert_same_state(a, b)
    train("one", *MUON, f"--dtype={dtype}")
    train("exact", *MUON)
    norms = [float(read_log(tmp_path / name)[1]["grad_norm"]) for name in ("exact", "a")]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)  # of gradients without float16's scale
    assert_agree(read_log(tmp_path / "one"), read_log(tmp_path / "b"), rel=1e-3 if dtype == "float32" else 1e-2)  # Muon works in bfloat16


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest(train, tmp_path):
    before = {name: p.clone() for name, p in train("a", *MUON, "--max_iters=0")["model"].named_parameters()}
    result = train("b", *MUON, "--max_iters=1", "--muon_scale=3.0", "--weight_decay=0.0", "--warmup_iters=0")
    muon = {id(p) for group in result["optimizers"]["muon"].param_groups for p in group["params"]}
    adamw = [id(p) for group in result["optimizers"]["optimizer"].param_groups for p in group["params"]]
    assert muon | set(adamw) == {id(p) for p in result["model"].parameters()} and len(muon) == 8 and not muon & set(adamw)
    for name, p in result["model"].named_parameters():
        update = (p - before[name]).detach() / 0.01  # learning_rate
        if id(p) in muon:  # all singular values alike, within what five steps of Newton and Schulz leave
            values = torch.linalg.svdvals(update) / (3.0 * 0.2 * math.sqrt(max(p.shape)))
            assert values.max() < 1.3 and values.median() > 0.6, name
        elif "wte" in name:
            assert update.abs().max() < 1.01


def test_an_optimizer_is_resumed_by_its_own_kind(train, tmp_path):
    train("a", "--max_iters=2")
    train("b", *MUON, "--max_iters=2")
    for name, options in (("a", MUON), ("b", DROPOUT)):
        with pytest.raises(ValueError, match="optimizer_type"):
            train(name, *options, "--init_from=resume")


def test_wandb_goes_on_with_the_same_run(train, tmp_path, monkeypatch):
    import wandb
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    for more in (["--max_iters=3"], ["--init_from=resume"]):
        train("a", "--wandb_log=True", *more)
        wandb.teardown()
    files = [path.name for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert files == 2 * [f"run-{newest(tmp_path / 'a')['wandb_id']}.wandb"]


BAD = {  # arguments -> what the error names
    "--lerning_rate=1": "learning_rate", "--batch_size=0": "batch_size=0", "--max_iters=-1": "max_iters=-1", "--dropout=1.5": "dropout=1.5",
    "--n_head=3": "n_head=3", "--init_from=gpt3": "'gpt3'", "--dtype=fp32": "'fp32'", "--compile=maybe": "'maybe'", "--device=tpu": "'tpu'",
    "--dataset=nowhere": "shakespeare_char", "--init_from=resume": "ckpt.pt", "--backend=mpi": "'mpi'", "--seed=-1": "seed=-1",
    "--block_size=1000000": "train.bin", "--learning_rate=-1.0": "learning_rate", "--eval_interval=0": "eval_interval", "--eval_iters=-1": "eval_iters",
    "--optimizer_type=sgd": "'sgd'", "--lr_schedule=step": "'step'", "--decay_share=-0.5": "decay_share", "--muon_scale=-1.0": "muon_scale",
    "--device=cuda": "no CUDA GPU",
}


@pytest.mark.parametrize("argument", BAD)
def test_a_users_mistake_is_named_and_leaves_nothing(train, tmp_path, argument):
    with pytest.raises(ValueError, match=re.escape(BAD[argument])):
        train("a", argument)
    assert not (tmp_path / "a").exists() or os.listdir(tmp_path / "a") in ([], ["log.csv"])


def test_accumulation_that_the_processes_do_not_divide(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="4 cannot be shared by 3"):
        train("a")


def test_an_id_beyond_the_vocabulary_is_named(train, dataset, tmp_path):
    for name in ("meta.pkl", "val.bin"):
        (tmp_path / name).write_bytes((dataset / name).read_bytes())
    np.full(100, 28, dtype=np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(ValueError, match="train.bin.* 28"):
        train("a", f"--dataset={tmp_path}")


def test_a_compiler_that_fails_is_gone_without(train, run, tmp_path, monkeypatch):
    train("a")
    monkeypatch.setattr(torch, "compile", lambda model: lambda *args: 1 / 0)
    train("b", "--compile=True")
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))


def test_saving_is_whole_or_nothing(tmp_path, monkeypatch):
    path = str(tmp_path / "ckpt.pt")
    save_checkpoint({"a": 1}, path)
    with open(path, "rb") as old:  # a rename: whoever reads the old one, or is left with it by a crash, has all of it
        before = old.read()
        old.seek(0)
        save_checkpoint({"a": [0] * 1000}, path)
        assert old.read() == before
    before = open(path, "rb").read()

    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left"):
        save_checkpoint({"a": 2}, path)
    assert open(path, "rb").read() == before and os.listdir(tmp_path) == ["ckpt.pt"]


def test_it_runs_from_any_folder_and_names_errors_in_one_line(dataset, tmp_path):
    good = spawn("train.py", *TINY, f"--dataset={dataset}", "--out_dir=here", cwd=tmp_path)
    bad = spawn("train.py", *TINY, f"--dataset={dataset}", "--dtype=fp32", cwd=tmp_path)
    finish(good)
    assert (tmp_path / "here/ckpt.pt").exists()
    out, err = finish(bad, code=1)
    assert out == "" and err.startswith("error: dtype='fp32'") and err.count("\n") == 1


def test_an_error_under_torchrun_shows_its_line_and_no_traceback_of_ours(dataset, tmp_path):
    out, err = finish(spawn("train.py", *TINY, f"--dataset={dataset}", "--gradient_accumulation_steps=3", processes=2, cwd=tmp_path), code=1)
    assert "error: gradient_accumulation_steps=3" in err and str(ROOT / "train.py") + '", line' not in err
