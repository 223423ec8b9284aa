"""
Checkpoints: what they contain, that saving is atomic, what is refused on reading, which one a
resume takes, and that runs do not mix. That a resumed run is exact is in test_resume.py.
"""

import os
import pickle
import random
import re
import resource
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import assert_same_state, newest, read_log

import checkpoint as checkpoint_module
from checkpoint import back_up, load_checkpoint, load_optimizer, save_checkpoint
from data.common import lock_folder
from model import GPT, GPTConfig

SHAPE = dict(n_layer=1, n_head=2, n_embd=8, block_size=8, bias=True, vocab_size=28, dropout=0.0)


@pytest.fixture
def out_dir(train, tmp_path):
    """The folder of a run of 3 updates, with ckpt.pt only."""
    train("a", "--max_iters=3")
    return tmp_path / "a"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5000])


def flip_bit(path):
    """Flips a bit in the middle of the largest tensor; torch.load alone does not notice."""
    with zipfile.ZipFile(path) as archive:
        tensors = [archive.read(name) for name in archive.namelist() if "/data/" in name]
    tensor = max(tensors, key=len)
    content = bytearray(path.read_bytes())
    content[content.index(tensor) + len(tensor) // 2] ^= 1
    path.write_bytes(content)


def compress(path):
    """The same archive, with its members compressed and their checksums right."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


# ---- content ----


def test_content_is_what_readers_of_nanogpts_checkpoints_expect(train, tmp_path):
    train("a", "--max_iters=3", "--bias=True", "--n_layer=1")
    checkpoint = torch.load(tmp_path / "a/ckpt.pt", weights_only=True)
    keys = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    assert keys <= checkpoint.keys()
    assert set(checkpoint["model_args"]) == set(SHAPE)
    names = ["transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight",
             "transformer.ln_f.weight", "transformer.ln_f.bias"]
    for layer in "ln_1 attn.c_attn attn.c_proj ln_2 mlp.c_fc mlp.c_proj".split():
        names += [f"transformer.h.0.{layer}.weight", f"transformer.h.0.{layer}.bias"]
    assert set(checkpoint["model"]) == set(names)
    # matrices, with weight decay, then vectors
    group_sizes = [len(group["params"]) for group in checkpoint["optimizer"]["param_groups"]]
    assert group_sizes == [2 + 4, 2 + 8]


def test_versions_data_and_characters_are_recorded(out_dir, dataset):
    checkpoint = torch.load(out_dir / "ckpt.pt", weights_only=True)
    assert checkpoint["version"] == checkpoint_module.VERSION
    assert checkpoint["torch_version"] == torch.__version__
    assert checkpoint["data"]["val_tokens"] == 2000
    assert checkpoint["itos"] == pickle.loads((dataset / "meta.pkl").read_bytes())["itos"]


def test_checkpoint_of_nanogpt_resumes(train, tmp_path):
    """Compiled names, masks, a tensor for the best loss, and no keys but nanoGPT's own."""
    train("a", "--max_iters=3")
    ours = load_checkpoint(str(tmp_path / "a/ckpt.pt"))
    theirs = {key: ours[key] for key in ("optimizer", "model_args", "iter_num")}
    theirs["best_val_loss"] = torch.tensor(ours["best_val_loss"])
    theirs["model"] = {"_orig_mod." + name: p for name, p in ours["model"].items()}
    theirs["model"]["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    theirs["config"] = dict(ours["config"], dtype="float16")  # its default, unused on a CPU
    for key in ("seed", "deterministic", "optimizer_type", "muon_lr_scale", "lr_schedule"):
        del theirs["config"][key]
    (tmp_path / "b").mkdir()
    torch.save(theirs, tmp_path / "b/ckpt.pt")
    assert "dtype" not in load_checkpoint(str(tmp_path / "b/ckpt.pt"))["config"]
    train("b", "--init_from=resume")
    train("c")
    assert_same_state(newest(tmp_path / "b"), newest(tmp_path / "c"))


# ---- saving ----


def test_saving_replaces_the_old_checkpoint_by_a_rename(tmp_path):
    path = str(tmp_path / "new/ckpt.pt")
    save_checkpoint({"a": 1}, path)
    with open(path, "rb") as old_file:  # a reader, or a crash, is left with all of the old one
        old_content = old_file.read()
        old_file.seek(0)
        save_checkpoint({"a": [0] * 1000}, path)
        assert old_file.read() == old_content
    assert len(torch.load(path, weights_only=True)["a"]) == 1000


def test_failed_save_leaves_the_old_checkpoint_and_no_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    save_checkpoint({"a": 1}, str(path))
    old_content = path.read_bytes()

    def disk_full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(ValueError, match="ckpt.pt.*earlier checkpoints are intact.*No space left"):
        save_checkpoint({"a": 2}, str(path))
    assert path.read_bytes() == old_content
    assert os.listdir(tmp_path) == ["ckpt.pt"]


def test_full_disk_leaves_the_old_checkpoint(out_dir, train):
    old_content = (out_dir / "ckpt.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # a limit on the size of files stands for the disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old_content) // 2, limits[1]))
    try:
        with pytest.raises(ValueError, match="cannot save .*earlier checkpoints are intact"):
            train("a", "--init_from=resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out_dir / "ckpt.pt").read_bytes() == old_content
    assert set(os.listdir(out_dir)) == {".lock", "ckpt.pt", "log.csv"}


# ---- reading ----


class MakesFolder:
    """Pickles as a call of os.mkdir, as a hostile file would."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_code_in_a_checkpoint_is_not_run(out_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"config": MakesFolder()}, out_dir / "ckpt.pt")
    with pytest.raises(ValueError, match="cannot use the checkpoint .*ckpt.pt.*mkdir"):
        load_checkpoint(str(out_dir / "ckpt.pt"))
    assert not os.path.exists("owned")


def damaged_versions(content, chance):
    """Versions of a file: cut short, bits flipped, zeros in it, parts repeated, something else."""
    yield b""
    yield pickle.dumps(MakesFolder())
    for _ in range(60):
        damaged = bytearray(content)
        position = chance.randrange(len(content))
        kind = chance.choice(["cut", "zeros", "repeat", "bit", "bit of head", "bit of tail"])
        if kind == "cut":
            del damaged[position:]
        elif kind == "zeros":
            damaged[position:position + 64] = bytes(len(damaged[position:position + 64]))
        elif kind == "repeat":
            damaged[position:position] = damaged[position:position + 200]
        else:
            if kind == "bit of head":
                position %= 2000
            elif kind == "bit of tail":
                position = len(content) - 1 - position % 2000
            damaged[position] ^= 1 << chance.randrange(8)
        if damaged != content:
            yield bytes(damaged)


def test_damaged_checkpoints_are_refused(out_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = out_dir / "ckpt.pt"
    content = path.read_bytes()
    good = load_checkpoint(str(path))
    damaged_path = tmp_path / "damaged.pt"
    refused = 0
    for damaged in damaged_versions(content, random.Random(0)):
        damaged_path.write_bytes(damaged)
        try:
            assert_same_state(load_checkpoint(str(damaged_path)), good)  # an unused byte was hit
        except ValueError as error:
            refused += 1
            assert "cannot use the checkpoint" in str(error) and "damaged.pt" in str(error)
            assert "\n" not in str(error)
    assert refused > 40
    assert not os.path.exists("owned")


@pytest.mark.parametrize("damage, named", [
    (flip_bit, "checksum mismatch in .*data/"),
    (compress, "the archive is compressed"),
    (truncate, "BadZipFile"),
])
def test_damage_that_torch_does_not_notice_is_named(out_dir, damage, named):
    damage(out_dir / "ckpt.pt")
    with pytest.raises(ValueError, match=f"cannot use the checkpoint .*ckpt.pt.*{named}"):
        load_checkpoint(str(out_dir / "ckpt.pt"))


def without(key):
    def change(saved):
        del saved[key]
    return change


def change_weights(name, function):
    def change(saved):
        saved["model"][name] = function(saved["model"][name])
    return change


def change_moments(function):
    def change(saved):
        state = saved["optimizer"]["state"]
        state[1]["exp_avg"] = function(state[1]["exp_avg"])
    return change


def add_nan(tensor):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = float("nan")
    return tensor


def other_model_args(**changes):
    def change(saved):
        saved["model_args"].update(changes)
    return change


def drop_weights(saved):
    del saved["model"]["transformer.ln_f.weight"]


def add_weights(saved):
    saved["model"]["transformer.extra"] = torch.ones(1)


def drop_optimizer_state(saved):
    del saved["optimizer"]["state"][1]


def drop_step(saved):
    del saved["optimizer"]["state"][1]["step"]


def text_for_best_val_loss(saved):
    saved["best_val_loss"] = "low"


def list_for_optimizer(saved):
    saved["optimizer"] = []


def nan_for_best_val_loss(saved):
    saved["best_val_loss"] = float("nan")


def other_settings(**changes):
    def change(saved):
        saved["config"].update(changes)
    return change


UNUSABLE = [
    (without("model"), "ckpt.pt.*model"),
    (without("config"), "ckpt.pt.*config"),
    (without("optimizer"), "optimizer"),
    (text_for_best_val_loss, "ckpt.pt.*low"),
    (nan_for_best_val_loss, "best_val_loss is nan"),
    (other_settings(beta1=1.5), "beta1=1.5 must be at least 0 and below 1"),
    (other_settings(grad_clip="1"), "'grad_clip' must be of type float"),
    (other_settings(lr_schedule="step"), "lr_schedule='step' is none of"),
    (list_for_optimizer, "optimizer state"),
    (other_model_args(n_layer=3), "weights do not fit.*transformer.h.2"),
    (other_model_args(n_head="2"), "'n_head' must be of type int.*got '2'"),
    (other_model_args(n_embd=32), "weights do not fit"),
    (drop_weights, "weights do not fit.*transformer.ln_f.weight"),
    (add_weights, "weights do not fit.*transformer.extra"),
    (change_weights("transformer.ln_f.weight", add_nan), "ln_f.weight are not finite"),
    (change_weights("lm_head.weight", torch.zeros_like), "lm_head.weight is not transformer.wte"),
    (change_weights("transformer.wpe.weight", torch.Tensor.int), "wpe.weight are not finite float"),
    (change_moments(add_nan), "optimizer state.*exp_avg 1 .* not finite"),
    (change_moments(torch.flatten), "optimizer state.*exp_avg 1 has shape"),
    (drop_optimizer_state, "optimizer state.*8 states for 9|optimizer state"),
    (drop_step, "optimizer state.*step"),
]


@pytest.mark.parametrize("change, named", UNUSABLE)
def test_unusable_content_is_named_and_nothing_written(out_dir, train, change, named):
    path = out_dir / "ckpt.pt"
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    before = {file.name: file.read_bytes() for file in out_dir.iterdir()}
    with pytest.raises(ValueError, match=named):
        train("a", "--init_from=resume")
    assert {file.name: file.read_bytes() for file in out_dir.iterdir()} == before


def test_checkpoint_that_is_no_dict_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="cannot use the checkpoint .*ckpt.pt"):
        load_checkpoint(str(tmp_path / "ckpt.pt"))


@pytest.fixture
def optimizers():
    """(AdamW, its state dict after an update, Muon) of one small model."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE))
    model(torch.zeros(1, 8, dtype=torch.long), torch.ones(1, 8, dtype=torch.long))[1].backward()
    adamw = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    adamw.step()
    return adamw, adamw.state_dict(), model.configure_muon(0.1, 1e-3)


def test_moments_are_copied_to_contiguous_memory(optimizers):
    """A hostile file may map all elements to one; fused AdamW would write past its end."""
    adamw, saved, _ = optimizers
    shape = saved["state"][0]["exp_avg"].shape
    saved["state"][0]["exp_avg"] = torch.tensor(0.5, dtype=torch.float64).expand(shape)
    saved["state"][1]["exp_avg_sq"] = saved["state"][1]["exp_avg_sq"].t().contiguous().t()
    load_optimizer(adamw, saved)
    state = list(adamw.state.values())
    assert (state[0]["exp_avg"] == 0.5).all()
    assert torch.equal(state[1]["exp_avg_sq"], saved["state"][1]["exp_avg_sq"])
    for moments in state:
        for name in ("exp_avg", "exp_avg_sq"):
            assert moments[name].is_contiguous() and moments[name].dtype == torch.float32
    memory = {moments["exp_avg"].data_ptr() for moments in saved["state"].values()}
    assert not memory & {moments["exp_avg"].data_ptr() for moments in state}


def test_options_of_the_optimizer_are_those_set_now(optimizers):
    adamw, saved, _ = optimizers
    for group in saved["param_groups"]:
        group.update(weight_decay=0.5, betas=(0.1, 0.2))
    load_optimizer(adamw, saved)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0.0]
    assert adamw.param_groups[0]["betas"] == (0.9, 0.95)


def test_state_of_another_optimizer_is_refused(optimizers):
    adamw, saved, muon = optimizers
    with pytest.raises(ValueError, match="optimizer state.*optimizer_type"):
        load_optimizer(muon, saved)
    with pytest.raises(ValueError, match="optimizer state.*optimizer_type"):
        load_optimizer(adamw, None)  # the checkpoint has none


# ---- which one a resume takes ----


@pytest.fixture
def two_checkpoints(train, tmp_path):
    """A folder with ckpt.pt of iteration 3, and last.pt of iteration 5."""
    train("a", "--max_iters=3")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    train("b", "--max_iters=5", "--init_from=resume")
    newer = max(tmp_path.glob("b/*.pt"), key=os.path.getmtime)
    shutil.copy(newer, tmp_path / "a/last.pt")
    return tmp_path / "a"


def test_resume_takes_the_newer_of_best_and_latest(two_checkpoints, capfd):
    assert newest(two_checkpoints)["iter_num"] == 5
    (two_checkpoints / "ckpt.pt").rename(two_checkpoints / "older.pt")
    (two_checkpoints / "last.pt").rename(two_checkpoints / "ckpt.pt")
    (two_checkpoints / "older.pt").rename(two_checkpoints / "last.pt")
    assert newest(two_checkpoints)["iter_num"] == 5
    (two_checkpoints / "ckpt.pt").unlink()
    assert newest(two_checkpoints)["iter_num"] == 3
    (two_checkpoints / "last.pt").unlink()
    assert newest(two_checkpoints) is None
    assert capfd.readouterr().out == ""


def put_nan(path):
    saved = torch.load(path, weights_only=True)
    saved["model"]["transformer.ln_f.weight"][0] = float("nan")
    torch.save(saved, path)


@pytest.mark.parametrize("damage", [flip_bit, truncate, compress, put_nan])
@pytest.mark.parametrize("name, iter_num", [("last.pt", 3), ("ckpt.pt", 5)])
def test_resume_passes_over_a_damaged_checkpoint(two_checkpoints, capfd, damage, name, iter_num):
    damage(two_checkpoints / name)
    assert newest(two_checkpoints)["iter_num"] == iter_num
    note = capfd.readouterr().out
    if name == "last.pt":  # work is lost, which must be said
        assert re.match(r"note: .*last\.pt.*; resuming from .*ckpt\.pt' instead\n$", note)


def test_resume_from_two_damaged_checkpoints_is_an_error(two_checkpoints, train):
    truncate(two_checkpoints / "last.pt")
    flip_bit(two_checkpoints / "ckpt.pt")
    with pytest.raises(ValueError, match="cannot use the checkpoint"):
        train("a", "--init_from=auto")


def test_resume_without_a_checkpoint_is_an_error(train):
    with pytest.raises(ValueError, match="no ckpt.pt in out_dir=.*--init_from=scratch"):
        train("a", "--init_from=resume")


# ---- one run, one folder ----


def test_folder_is_locked_before_its_checkpoint_is_read(out_dir, train):
    truncate(out_dir / "ckpt.pt")
    with lock_folder(str(out_dir)):
        with pytest.raises(ValueError, match="out_dir=.* is in use by another process"):
            train("a", "--init_from=resume")
        with pytest.raises(ValueError, match="out_dir=.* is in use by another process"):
            train("a")
    assert not (out_dir / "ckpt.1.pt").exists()
    train("a")  # the lock ended with its file


def test_best_weights_are_kept_when_evaluations_change(out_dir, train):
    best = (out_dir / "ckpt.pt").read_bytes()
    train("a", "--init_from=resume", "--eval_iters=2", "--max_iters=4")
    assert (out_dir / "ckpt.pt").read_bytes() != best
    assert (out_dir / "ckpt.1.pt").read_bytes() == best
    train("a", "--init_from=resume", "--eval_iters=2", "--max_iters=5")  # evaluated as before
    assert not (out_dir / "ckpt.2.pt").exists()


def test_evaluation_only_needs_no_lock(out_dir, train, run):
    with lock_folder(str(out_dir)):
        train("a", "--init_from=resume", "--eval_only=True")
    assert run.out.count("step ") == 1


def test_new_run_backs_up_an_earlier_one(train, run, tmp_path):
    train("a", "--seed=1")
    first = load_checkpoint(str(tmp_path / "a/ckpt.pt"))
    first_log = read_log(tmp_path / "a")
    train("a", "--seed=2")
    assert re.search(r"backed up .*/ckpt\.pt of an earlier run as .*/ckpt\.1\.pt\n", run.out)
    train("a", "--seed=3")
    files = {path.name for path in (tmp_path / "a").iterdir()} - {".lock"}
    assert files == {"ckpt.pt", "ckpt.1.pt", "ckpt.2.pt", "log.csv", "log.1.csv", "log.2.csv"}
    assert_same_state(load_checkpoint(str(tmp_path / "a/ckpt.1.pt")), first)
    (tmp_path / "a/log.1.csv").rename(tmp_path / "a/log.csv")
    assert read_log(tmp_path / "a") == first_log


def test_files_of_one_run_get_one_number(tmp_path, capfd):
    for name in ("ckpt.pt", "last.pt", "log.csv", "loss.png", "log.1.csv", "last.2.pt", "notes"):
        (tmp_path / name).write_text(name)
    back_up(str(tmp_path), ("ckpt.pt", "last.pt", "log.csv", "loss.png"), os.rename)
    assert capfd.readouterr().out.count("backed up") == 4
    expected = {"ckpt.3.pt", "last.3.pt", "log.3.csv", "loss.3.png", "log.1.csv", "last.2.pt",
                "notes"}
    assert set(os.listdir(tmp_path)) == expected
    assert (tmp_path / "last.3.pt").read_text() == "last.pt"
    back_up(str(tmp_path), ("ckpt.pt", "last.pt", "log.csv", "loss.png"), os.rename)
    assert set(os.listdir(tmp_path)) == expected
    assert capfd.readouterr().out == ""


def test_new_run_that_dies_before_it_saves_cannot_be_mixed_with_the_old_one(out_dir, train,
                                                                           monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", killed)
        with pytest.raises(KeyboardInterrupt):
            train("a")
    with pytest.raises(ValueError, match="no ckpt.pt"):
        train("a", "--init_from=resume")


# ---- data ----


@pytest.fixture
def other_dataset(dataset, tmp_path):
    """A copy of the data set, to be changed."""
    shutil.copytree(dataset, tmp_path / "other")
    return tmp_path / "other"


def test_resume_on_the_same_data_says_nothing(out_dir, train, run):
    train("a", "--init_from=resume")
    assert "data set" not in run.out


def test_resume_on_other_data_says_so(out_dir, other_dataset, train, run):
    tokens = np.fromfile(other_dataset / "train.bin", np.uint16)
    tokens[:-10].tofile(other_dataset / "train.bin")
    train("a", f"--dataset={other_dataset}", "--init_from=resume")
    assert f"note: the data set '{other_dataset}' is not the one that" in run.out


def test_resume_on_other_characters_is_an_error(out_dir, other_dataset, train):
    meta = pickle.loads((other_dataset / "meta.pkl").read_bytes())
    meta["itos"][5] = "é"
    (other_dataset / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match="data set .*other' has other characters"):
        train("a", f"--dataset={other_dataset}", "--init_from=resume")


def test_vocabularies_of_model_and_data_must_agree(out_dir, other_dataset, train, tmp_path):
    GPT(GPTConfig(**dict(SHAPE, vocab_size=50257))).save_pretrained(str(tmp_path / "gpt2"))
    with pytest.raises(ValueError, match="a vocabulary of 50257, the data set .* one of 28: use a"):
        train("b", f"--init_from={tmp_path / 'gpt2'}")
    (other_dataset / "meta.pkl").unlink()  # GPT-2's tokens
    with pytest.raises(ValueError, match="a vocabulary of 28, the data set .* one of 50257"):
        train("a", f"--dataset={other_dataset}", "--init_from=resume")
    meta = dict(vocab_size=20)
    (other_dataset / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match="a vocabulary of 28, the data set .* one of 20"):
        train("a", f"--dataset={other_dataset}", "--init_from=resume")
