"""Each diff of docs/recipes.md applies, does what it says, and leaves runs exact."""

import math
import re
import shutil
import subprocess

import numpy as np
import pytest
import test_edits
import torch
from conftest import ROOT, assert_same, load, make_dataset
from test_edits import Copy, run_script

unedited = test_edits.unedited  # a fixture
DIFFS = re.findall("```diff\n(.*?)```", (ROOT / "docs/recipes.md").read_text(), re.DOTALL)


@pytest.fixture
def apply(tmp_path, dataset):
    """apply(2, 3) -> a copy of the code with these recipes."""
    def apply(*numbers):
        copy = Copy(tmp_path / "copy", dataset)
        for number in numbers:
            diff = DIFFS[number - 1]
            assert diff.count("\n+") - diff.count("\n+++ ") <= 20
            subprocess.run(["git", "apply"], input=diff, text=True, check=True, cwd=copy.folder)
        return copy
    return apply


def test_label_smoothing(apply, unedited):
    copy = apply(1)
    copy.check_exact("--label_smoothing=0.1")
    assert copy.column("a", "loss")[0] > unedited.column("a", "loss")[0]
    assert copy.column("a", "val_loss")[0] == unedited.column("a", "val_loss")[0]
    unedited.resume(copy.folder / "a")


def test_rotary_embeddings(apply, unedited):
    copy = apply(2)
    copy.check_exact(processes=2)
    copy.call(check_rotation)
    for code, run in ((copy, unedited), (unedited, copy)):
        assert "transformer.wpe.weight" in code.resume(run.folder / "a", code=1)


def check_rotation():
    """Products of equal queries and equal keys depend on their distance, and on nothing else."""
    import model
    model.F.scaled_dot_product_attention = lambda q, k, v, **_: q @ k.mT  # (1, 1, 8, 8)
    attention = model.CausalSelfAttention(model.GPTConfig(8, 28, 1, 1, 8))
    attention.c_proj = torch.nn.Identity()
    products = attention(torch.randn(8).expand(1, 8, 8))[0]
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1])
    assert products[0].unique().numel() == 8


def test_rmsnorm_and_swiglu(apply, unedited):
    copy = apply(3)
    copy.check_exact("--bias=True")
    assert "transformer.ln_f.bias" not in copy.newest("a")["model"]
    assert "mlp.c_gate.weight" in unedited.resume(copy.folder / "a", code=1)


def test_adafactor(apply, unedited):
    copy = apply(4)
    copy.check_exact("--optimizer_type=adafactor")
    assert "row_var" in copy.newest("a")["optimizer"]["state"][0]


def test_two_data_sets(apply, unedited, tmp_path):
    make_dataset(tmp_path)
    np.full(999, 5, np.uint16).tofile(tmp_path / "train.bin")
    copy = apply(5)
    copy.check_exact(f"--second_dataset={tmp_path}", processes=2)
    copy.train("one", f"--second_dataset={tmp_path}")
    assert copy.column("a", "loss") == pytest.approx(copy.column("one", "loss"), rel=1e-5)
    assert copy.column("a", "val_loss")[0] == unedited.column("a", "val_loss")[0]
    copy.call(check_mixture)


def check_mixture():
    run = run_script("train.py", ["--out_dir=a", "--init_from=resume", "--eval_only=True"])
    micro_batches = [run["get_batch"]("train", run["TRAIN"], 7, i)[0] for i in range(500)]
    is_second = (torch.cat(micro_batches) == 5).all(1)
    assert 0.27 < is_second.float().mean() < 0.33
    run["get_batch"].__globals__["batch_size"] = 1500
    batch, _ = run["get_batch"]("train", run["TRAIN"], 7, 0)
    assert_same(sorted(batch.tolist()), sorted(torch.cat(micro_batches).tolist()))


def test_gradient_norms_by_layer(apply, unedited):
    copy = apply(6)
    copy.check_exact()
    assert_same(copy.newest("a"), unedited.newest("a"))
    columns = [copy.column("a", f"grad_norm{name}") for name in ("_0", "_1", "")]
    assert [len(column) for column in columns] == [8, 8, 8]
    for norm_0, norm_1, total_norm in zip(*columns, strict=True):
        assert 0 < math.hypot(norm_0, norm_1) < total_norm


def test_checkpoints_to_keep(apply, unedited):
    copy = apply(7)
    copy.check_exact("--keep_interval=3")
    names = {path.name for path in copy.folder.glob("a/*.pt")}
    assert names == {"ckpt.pt", "ckpt_0.pt", "ckpt_3.pt", "ckpt_6.pt"}
    assert_same(copy.newest("a")["optimizer"], unedited.newest("a")["optimizer"])
    (copy.folder / "c").mkdir()
    shutil.copy(copy.folder / "a/ckpt_6.pt", copy.folder / "c/ckpt.pt")
    copy.resume("c", "--keep_interval=0")
    assert_same(copy.newest("c")["optimizer"], unedited.newest("a")["optimizer"])
    copy.train("a", "--max_iters=0")  # a new run
    backups = {path.name for path in copy.folder.glob("a/*.1.pt")}
    assert backups == {name.replace(".pt", ".1.pt") for name in names}


def test_early_stopping(apply):
    copy = apply(8)
    rising_lr = ["--min_lr=2.0", "--max_iters=40", "--lr_decay_iters=9", "--eval_interval=1"]
    copy.check_exact("--patience=3", *rising_lr, processes=2)
    last = copy.newest("a")
    assert 3 < last["iter_num"] == last["best_iter"] + 3 < 40
    assert load(copy.folder / "a", "ckpt.pt")["iter_num"] == last["best_iter"]
    assert copy.resume("a", "--patience=4").count("\niter ") == 1


def test_a_growing_batch(apply, unedited):
    copy = apply(9)
    copy.check_exact("--growth_interval=3", "--max_growth=2", processes=2)
    larger = ["--gradient_accumulation_steps=8", "--max_iters=8"]
    unedited.train(copy.folder / "c", "--max_iters=3", processes=2)
    unedited.resume(copy.folder / "c", *larger, processes=2)
    assert_same(copy.newest("a")["model"], copy.newest("c")["model"])
    assert copy.column("a", "loss") == copy.column("c", "loss")


def test_an_average_of_the_weights(apply, unedited):
    copy = apply(7, 10)
    copy.check_exact("--ema_decay=0.7", "--keep_interval=1", processes=2)
    kept = [load(copy.folder / "a", f"ckpt_{i}.pt") for i in range(9)]
    average = {name: p.clone() for name, p in kept[0]["model"].items()}
    for i in range(8):
        for name, p in average.items():
            p.lerp_(kept[i + 1]["model"][name], 1 - min(0.7, (1 + i) / (10 + i)))
    torch.testing.assert_close(dict(kept[8]["ema"]), average)
    copy.call(check_average_is_sampled)
    losses, val_losses = copy.column("a", "loss"), copy.column("a", "val_loss")
    assert losses == pytest.approx(unedited.column("a", "loss"), rel=1e-5)
    assert val_losses[1] != pytest.approx(unedited.column("a", "val_loss")[1], rel=1e-4)


def check_average_is_sampled():
    from model import load_model
    model, checkpoint = load_model("resume", "a")
    assert_same(dict(model.state_dict()), dict(checkpoint["ema"]))


def test_all_of_them_together_in_one_process(apply, dataset):
    options = ["--label_smoothing=0.1", f"--second_dataset={dataset}", "--keep_interval=3",
               "--patience=100", "--growth_interval=3"]
    apply(*range(1, 11)).check_exact(*options, "--optimizer_type=adafactor")
