"""Checkpoints: content, atomic saving, what is refused, which one a resume takes, backups."""

import os
import pickle
import re
import resource
import shutil

import numpy as np
import pytest
import torch
from conftest import MakesFolder, assert_same_state, interrupt_at, load, newest

import checkpoint as checkpoint_module
from checkpoint import back_up, load_optimizer, read_checkpoint, save_checkpoint
from data.common import lock_folder, read_vocabulary
from model import GPT, GPTConfig

SHAPE = dict(n_layer=1, n_head=2, n_embd=8, block_size=8, bias=True, vocab_size=28, dropout=0.0)


@pytest.fixture
def out_dir(train, tmp_path):
    """The folder of a run of 3 updates, with ckpt.pt only."""
    train("a", "--max_iters=3")
    return tmp_path / "a"


def contents(folder):
    """{name: bytes} of the files in a folder, but for the lock, which is empty."""
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.name != ".lock"}


def test_content_is_what_readers_of_nanogpts_checkpoints_expect(train, dataset, tmp_path):
    train("a", "--max_iters=3", "--bias=True", "--n_layer=1")
    saved = torch.load(tmp_path / "a/ckpt.pt", weights_only=True)
    assert saved.keys() >= {"model", "optimizer", "iter_num", "best_val_loss", "config"}
    assert saved["model_args"] == dict(SHAPE, n_embd=16)
    names = ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight",
             "transformer.ln_f.weight", "transformer.ln_f.bias"]
    for layer in "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj".split():
        names += [f"transformer.h.0.{layer}.weight", f"transformer.h.0.{layer}.bias"]
    assert set(saved["model"]) == set(names)
    # what nanoGPT's do not have
    assert saved["version"] == checkpoint_module.VERSION
    assert saved["torch_version"] == torch.__version__
    assert saved["data"]["val_tokens"] == 2000
    assert saved["tokenizer"] == read_vocabulary(dataset)["tokenizer"]


def test_a_checkpoint_of_nanogpt_resumes(train, out_dir, tmp_path):
    """Compiled names, masks, a tensor for the best loss, and no keys but nanoGPT's own."""
    ours = load(out_dir, "ckpt.pt")
    theirs = {key: ours[key] for key in ("optimizer", "model_args", "iter_num")}
    theirs["best_val_loss"] = torch.tensor(ours["best_val_loss"])
    theirs["model"] = {"_orig_mod." + name: p for name, p in ours["model"].items()}
    theirs["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    theirs["config"] = dict(ours["config"], dtype="float16")  # its default, unused on a CPU
    for key in ("seed", "deterministic", "optimizer_type", "muon_lr_scale", "lr_schedule"):
        del theirs["config"][key]
    (tmp_path / "b").mkdir()
    torch.save(theirs, tmp_path / "b/ckpt.pt")
    assert "dtype" not in load(tmp_path / "b", "ckpt.pt")["config"]
    train("b", "--init_from=resume")
    train("c")
    assert_same_state(newest(tmp_path / "b"), newest(tmp_path / "c"))


def test_saving_replaces_the_old_checkpoint_by_a_rename(tmp_path):
    path = str(tmp_path / "ckpt.pt")
    save_checkpoint(path, {}, a=1)
    with open(path, "rb") as old_file:  # a reader, or a crash, is left with all of the old one
        save_checkpoint(path, {}, a=2)
        assert torch.load(old_file, weights_only=True)["a"] == 1
    assert torch.load(path, weights_only=True)["a"] == 2


def test_a_full_disk_ends_the_run_and_leaves_the_old_checkpoint(out_dir, train, run):
    old_content = (out_dir / "ckpt.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a limit on the size of files stands for the disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old_content) // 2, limits[1]))
    try:
        with pytest.raises(ValueError, match="cannot save .*earlier checkpoints are intact"):
            train("a", "--init_from=resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(line.startswith("error: cannot save") for line in run.err.splitlines())
    assert set(contents(out_dir)) == {"ckpt.pt", "log.csv"}
    assert (out_dir / "ckpt.pt").read_bytes() == old_content


def flip_bit(path):
    """Flips a bit of the token embedding; torch.load alone does not notice."""
    weight = torch.load(path, weights_only=True)["model"]["transformer.wte.weight"]
    content = bytearray(path.read_bytes())
    content[content.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage, named", [
    (flip_bit, "checksum mismatch in .*data/"),
    (lambda path: os.truncate(path, 5000), "BadZipFile"),
    (lambda path: torch.save({"config": MakesFolder()}, path), "mkdir"),
    (lambda path: path.write_bytes(pickle.dumps(MakesFolder())), "BadZipFile"),
    (lambda path: torch.save([1, 2], path), "TypeError"),
])
def test_damage_is_named_and_no_code_is_run(out_dir, tmp_path, monkeypatch, damage, named):
    monkeypatch.chdir(tmp_path)
    damage(out_dir / "ckpt.pt")
    with pytest.raises(ValueError, match=f"cannot use the checkpoint .*ckpt.pt.*{named}"):
        load(out_dir, "ckpt.pt")
    assert not os.path.exists("owned")


# what is done to the content `saved` of a checkpoint, and what the error names
UNUSABLE = {
    "del saved['model']": "ckpt.pt.*model",
    "saved['best_val_loss'] = 'low'": "ckpt.pt.*low",
    "saved['config']['beta1'] = 1.5": "beta1=1.5 must be from 0 to 0.999999",
    "saved['model_args']['n_layer'] = 3": "(?s)weights do not fit.*transformer.h.2",
    "saved['model_args']['rope'] = True": "rope=True, and GPTConfig has no such field",
    "del saved['model']['transformer.ln_f.weight']": "(?s)do not fit.*transformer.ln_f",
    "saved['model']['extra'] = torch.ones(1)": "(?s)weights do not fit.*extra",
    "saved['model']['lm_head.weight'][0, 0] = torch.nan": "wte.weight has values .* not finite",
    "saved['optimizer']['param_groups'] = []": "optimizer state",
    # fused AdamW would write past the end of moments of another shape
    "moments = saved['optimizer']['state'][1]; moments['exp_avg'] = moments['exp_avg'][:1]":
        "optimizer state .*exp_avg has shape",
}


@pytest.mark.parametrize("change", UNUSABLE)
def test_unusable_content_is_named_and_nothing_is_written(out_dir, train, change):
    saved = torch.load(out_dir / "ckpt.pt", weights_only=True)
    exec(change, dict(saved=saved, torch=torch))
    torch.save(saved, out_dir / "ckpt.pt")
    before = contents(out_dir)
    with pytest.raises(ValueError, match=UNUSABLE[change]):
        train("a", "--init_from=resume")
    assert contents(out_dir) == before


def test_an_optimizers_state_is_copied_and_its_options_are_those_set_now():
    """A hostile file may map all elements to one; fused AdamW would write past its end."""
    model = GPT(GPTConfig(**SHAPE))
    model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))[1].backward()
    adamw = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    adamw.step()
    saved = adamw.state_dict()
    moments = saved["state"][0]
    moments["exp_avg"] = torch.tensor(0.5, dtype=torch.float64).expand(moments["exp_avg"].shape)
    moments["exp_avg_sq"] = moments["exp_avg_sq"].t().contiguous().t()
    for group in saved["param_groups"]:
        group.update(weight_decay=0.5, betas=(0.1, 0.2), lr=7.0)
    load_optimizer(adamw, saved)
    loaded = next(iter(adamw.state.values()))
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(loaded[name], moments[name].float())
        assert loaded[name].is_contiguous() and loaded[name].dtype == torch.float32
        assert loaded[name].data_ptr() != moments[name].data_ptr()
    assert [(g["weight_decay"], g["lr"]) for g in adamw.param_groups] == [(0.1, 7.0), (0.0, 7.0)]
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)
    with pytest.raises(ValueError, match="optimizer state .*resume with the optimizer"):
        load_optimizer(model.configure_muon(0.1, 1e-3), saved)


@pytest.fixture
def two_checkpoints(train, out_dir, tmp_path):
    """A folder with ckpt.pt of iteration 3, and last.pt of iteration 5."""
    train("b", "--max_iters=5")
    shutil.copy(tmp_path / "b/ckpt.pt", out_dir / "last.pt")
    return out_dir


def test_resume_takes_the_newer_of_best_and_latest(two_checkpoints, capfd):
    ckpt, last = two_checkpoints / "ckpt.pt", two_checkpoints / "last.pt"
    older, newer = ckpt.read_bytes(), last.read_bytes()
    assert newest(two_checkpoints)["iter_num"] == 5
    ckpt.write_bytes(newer)
    last.write_bytes(older)
    assert newest(two_checkpoints)["iter_num"] == 5
    # On a tie ckpt.pt is newer: an evaluation wrote it after a stop had written last.pt.
    torch.save(dict(torch.load(ckpt, weights_only=True), best_val_loss=9.0), last)
    assert newest(two_checkpoints)["best_val_loss"] < 9.0
    ckpt.unlink()
    assert newest(two_checkpoints)["best_val_loss"] == 9.0
    last.unlink()
    assert newest(two_checkpoints) is None
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name, iter_num", [("last.pt", 3), ("ckpt.pt", 5)])
def test_resume_passes_over_a_damaged_checkpoint(two_checkpoints, train, capfd, name, iter_num):
    flip_bit(two_checkpoints / name)
    assert newest(two_checkpoints)["iter_num"] == iter_num
    note = capfd.readouterr().out
    if name == "last.pt":  # work is lost, which must be said
        assert re.match(r"note: .*last\.pt.*; using the other one\n$", note)
    os.truncate(two_checkpoints / name, 5000)
    train("b", f"--init_from={two_checkpoints}", "--max_iters=0")
    for path in two_checkpoints.glob("*.pt"):
        os.truncate(path, 5000)
    with pytest.raises(ValueError, match="cannot use the checkpoint"):
        train("a", "--init_from=auto")


def test_a_folder_serves_one_run_at_a_time(out_dir, train, run, monkeypatch):
    def read_locked(*arguments, **options):
        with pytest.raises(ValueError, match="in use"):
            lock_folder(str(out_dir))
        return read_checkpoint(*arguments, **options)
    with monkeypatch.context() as patch:
        patch.setattr("checkpoint.read_checkpoint", read_locked)
        train("a", "--init_from=resume", "--max_iters=3")
    before = contents(out_dir)
    with lock_folder(str(out_dir)):
        train("a", "--init_from=resume", "--eval_only=True")  # writes nothing
        assert run.out.count("step ") == 1
        for init_from in ("resume", "scratch"):
            with pytest.raises(ValueError, match="out_dir=.* is in use by another process"):
                train("a", f"--init_from={init_from}")
    assert contents(out_dir) == before
    train("a")  # the lock ended with its file


def test_a_new_run_backs_up_an_earlier_one_before_its_first_update(
        out_dir, train, run, monkeypatch):
    """So that no resume mixes two runs, however early the second one ends."""
    first, first_log = newest(out_dir), (out_dir / "log.csv").read_text()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        interrupt_at(patch, 0, None)
        train("a")
    assert re.search(r"backed up .*/ckpt\.pt of an earlier run as .*/ckpt\.1\.pt\n", run.out)
    assert set(contents(out_dir)) == {"ckpt.1.pt", "log.1.csv", "log.csv"}
    assert_same_state(load(out_dir, "ckpt.1.pt"), first)
    assert (out_dir / "log.1.csv").read_text() == first_log
    with pytest.raises(ValueError, match="no ckpt.pt or last.pt in out_dir=.*--init_from"):
        train("a", "--init_from=resume")


def test_files_of_one_run_get_one_number(tmp_path, capfd):
    """Checkpoints of an editor's own as well; backups, and files that are no run's, stay."""
    for name in ("ckpt.pt", "last.pt", "ckpt_1000.pt", "log.csv", "loss.png", "log.1.csv",
                 "last.2.pt", "notes"):
        (tmp_path / name).write_text(name)
    for _ in range(2):  # the second time there is nothing left to do
        back_up(str(tmp_path))
        assert set(os.listdir(tmp_path)) == {
            "ckpt.3.pt", "last.3.pt", "ckpt_1000.3.pt", "log.3.csv", "loss.3.png", "log.1.csv",
            "last.2.pt", "notes"}
    assert (tmp_path / "last.3.pt").read_text() == "last.pt"
    assert capfd.readouterr().out.count("backed up") == 5


@pytest.fixture
def other_dataset(dataset, tmp_path):
    """A copy of the data set, to be changed."""
    return shutil.copytree(dataset, tmp_path / "other")


def test_resume_on_other_data_says_so(out_dir, other_dataset, train, run):
    train("a", f"--dataset={other_dataset}", "--init_from=resume", "--max_iters=4")
    assert "data set" not in run.out  # another path alone is not worth a note
    best_val_loss = newest(out_dir)["best_val_loss"]
    for split in ("train", "val"):
        tokens = np.fromfile(other_dataset / f"{split}.bin", np.uint16)
        np.roll(tokens, 5000).tofile(other_dataset / f"{split}.bin")  # in another order
    train("a", f"--dataset={other_dataset}", "--init_from=resume", "--max_iters=5",
          "--learning_rate=9.0", "--min_lr=9.0")
    assert f"note: '{other_dataset}' is not the checkpoint's data set" in run.out
    assert newest(out_dir)["best_val_loss"] > best_val_loss  # that of the old data counts no more


@pytest.mark.parametrize("meta", [
    None,  # GPT-2's tokens
    dict(vocab_size=28, itos=dict(enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ .")))
])
def test_resume_on_other_tokens_is_an_error(out_dir, other_dataset, train, meta):
    (other_dataset / "meta.pkl").unlink()
    if meta:
        (other_dataset / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match="a vocabulary of 28, has other tokens than the data set"):
        train("a", f"--dataset={other_dataset}", "--init_from=resume")


@pytest.mark.parametrize("vocab_size", [50257, 50258])  # the latter with a token added
def test_gpt2_is_finetuned_on_its_own_tokens_only(other_dataset, train, tmp_path, vocab_size):
    GPT(GPTConfig(**dict(SHAPE, vocab_size=vocab_size))).save_pretrained(str(tmp_path / "gpt2"))
    with pytest.raises(ValueError, match="has other tokens than the data set"):
        train("b", f"--init_from={tmp_path / 'gpt2'}")
    (other_dataset / "meta.pkl").unlink()
    train("b", f"--init_from={tmp_path / 'gpt2'}", f"--dataset={other_dataset}", "--max_iters=1")
    assert newest(tmp_path / "b")["model_args"]["vocab_size"] == vocab_size
