"""Ordinary edits, each on a copy of the code: runs stay exact, and a slip loses nothing."""

import itertools
import os
import runpy
import shutil
import signal
import sys

import pytest
import torch
from conftest import ROOT, TINY, assert_same, fork_world, load, newest, read_log

import model


class Copy:
    """A copy of the code, to be edited, and run in forks of this process."""

    def __init__(self, folder, dataset):
        self.folder, self.dataset = folder, dataset
        (folder / "data").mkdir(parents=True)
        for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
            shutil.copy(path, folder / path.relative_to(ROOT))

    def edit(self, *replacements):
        for file, old, new in replacements:
            text = (self.folder / file).read_text()
            assert text.count(old) == 1, f"{old!r} is in {file} {text.count(old)} times"
            (self.folder / file).write_text(text.replace(old, new))

    def call(self, function, *arguments, processes=1, code=0):
        """Calls a function in forks that import the copy's modules; returns what they printed."""
        def before():
            os.chdir(self.folder)
            sys.path.insert(0, str(self.folder))
            for name in ["data", "data.common", *(path.stem for path in self.folder.glob("*.py"))]:
                sys.modules.pop(name, None)
            sys.stdout = sys.stderr = open("output", "a", buffering=1)
            function(*arguments)
            sys.exit(0)
        (self.folder / "output").write_text("")
        codes = fork_world(processes, before=before)
        output = (self.folder / "output").read_text()
        assert codes == [code] * processes, output
        return output

    def run(self, script, *arguments, stop_in=None, **options):
        """Runs a script; a real signal stops it in the backward pass number `stop_in`."""
        return self.call(run_script, script, arguments, stop_in, **options)

    def train(self, out_dir, *arguments, **options):
        return self.run("train.py", *TINY, f"--dataset={self.dataset}", f"--out_dir={out_dir}",
                        *arguments, **options)

    def resume(self, out_dir, *arguments, **options):
        return self.run("train.py", f"--out_dir={out_dir}", "--init_from=resume", *arguments,
                        **options)

    def newest(self, out_dir):
        return newest(self.folder / out_dir)

    def column(self, out_dir, name):
        """The numbers in a column of log.csv."""
        return [float(row[name]) for row in read_log(self.folder / out_dir) if row[name]]

    def check_exact(self, *arguments, processes=1):
        """A run in `a` without a break and one in `b` with a break are the same; both sample."""
        self.train("a", *arguments, processes=processes)
        self.train("b", *arguments, processes=processes, stop_in=14 // processes, code=128 + 15)
        assert len(self.column("b", "loss")) == self.newest("b")["iter_num"]  # no update is lost
        self.resume("b", processes=processes)
        assert_same_files(self.folder / "a", self.folder / "b")
        self.call(check_sampling)


def run_script(script, arguments, stop_in=None):
    backward, count = torch.Tensor.backward, itertools.count(1)

    def counted(*args, **kwargs):
        if next(count) == stop_in:
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
            signal.raise_signal(signal.SIGTERM)
        return backward(*args, **kwargs)
    torch.Tensor.backward = counted
    sys.argv = [script, *map(str, arguments)]
    return runpy.run_path(script, run_name="__main__")


def check_sampling():
    """In float32, greedy tokens and logits with the cache are those of the plain forward pass."""
    from model import KVCache, load_model
    gpt, _ = load_model("resume", "b")
    tokens = context = torch.arange(6).view(2, 3)
    sampled = gpt.generate(tokens, 20, temperature=0)
    for _ in range(20):
        if context.size(1) > 8:  # block_size: the later half is a new context
            context = context[:, -4:]
        next_tokens = gpt(context)[0][:, -1].argmax(-1, keepdim=True)
        context = torch.cat([context, next_tokens], dim=1)
        tokens = torch.cat([tokens, next_tokens], dim=1)
    assert torch.equal(sampled, tokens)
    caches = [KVCache(8) for _ in gpt.transformer.h]
    logits = [gpt(tokens[:, [t]], caches=caches)[0] for t in range(8)]
    torch.testing.assert_close(torch.cat(logits, dim=1), gpt(tokens[:, :8])[0])
    run_script("sample.py", ["--out_dir=b", "--max_new_tokens=20", "--num_samples=1"])


def assert_same_files(a, b):
    """The same log, the same newest checkpoint, and the same best and extra ones."""
    assert read_log(a) == read_log(b)
    assert_same(newest(a), newest(b))
    for path in a.glob("ckpt*.pt"):
        assert_same(load(a, path.name), load(b, path.name), path.name)


@pytest.fixture
def copy(tmp_path, dataset):
    return Copy(tmp_path / "copy", dataset)


@pytest.fixture(scope="session")
def unedited(tmp_path_factory, dataset):
    """A copy as it is, with a run in `a`."""
    copy = Copy(tmp_path_factory.mktemp("unedited") / "copy", dataset)
    copy.train("a")
    return copy


# ---- edits that train ----

TIED = "        self.lm_head.weight = self.transformer.wte.weight\n"
IN_LOOP = "    lr = get_lr(iter_num)\n"
UPDATE = "    # ---- the update: an error in here"
EDITS = {
    "buffers": ("model.py", TIED, TIED + """
        angles = torch.polar(torch.ones(4), torch.arange(4.0))
        self.register_buffer("not_saved", angles, persistent=False)
        self.register_buffer("angles", angles)
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.scale = torch.linspace(0, 1, 5)[2].item()
"""),
    "untied head": ("model.py", TIED, ""),
    "unused parameters": ("model.py", TIED, TIED + "        self.unused = nn.Linear(3, 3)\n"),
}


@pytest.mark.parametrize("optimizer", [  # their states differ in kind
    "ASGD", "Adafactor", "NAdam", "Rprop", "SGD, momentum=0.9", "AdamW, amsgrad=True"])
def test_any_optimizer_of_torch(copy, unedited, optimizer):
    name, _, options = optimizer.partition(",")
    copy.edit(("model.py", "torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)",
               f"torch.optim.{name}(groups, lr=learning_rate, {options})"))
    copy.check_exact()
    assert copy.column("a", "loss") != unedited.column("a", "loss")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_in_one_process_and_in_two(copy, edit, processes):
    copy.edit(EDITS[edit])
    copy.check_exact(processes=processes)
    if processes == 2:
        copy.train("one")
        assert copy.column("one", "loss") == pytest.approx(copy.column("a", "loss"), rel=1e-5)


def test_a_new_field_of_the_config_and_settings_of_any_value(copy, unedited):
    copy.edit(
        ("model.py", "    bias: bool = True", "    smoothing: float = 0.0\n    bias: bool = True"),
        ("model.py", "ignore_index=-1)", "ignore_index=-1, label_smoothing=self.config.smoothing)"),
        ("train.py", "bias = False  #", "smoothing = 0.1\noffset = -10 ** 10\nbias = False  #"),
        ("train.py", "bias=bias,", "bias=bias, smoothing=smoothing,"))
    copy.check_exact()
    assert copy.column("a", "loss") != unedited.column("a", "loss")
    output = unedited.resume(copy.folder / "a", code=1)
    assert output.startswith("error: the model has smoothing=0.1, and GPTConfig has no such field")
    output = copy.run("sample.py", f"--out_dir={unedited.folder / 'a'}", "--max_new_tokens=1")
    assert "made without smoothing: it has the default 0.0\n" in output


# ---- slips ----


@pytest.mark.parametrize("slip, message, before, saved_iter", [
    ("a, b, c = model(x, y)", "not enough values to unpack (expected 3, got 2)", IN_LOOP, 5),
    ("raise ValueError('mine')", "mine", "    is_good = False\n", 5),
    ("int('x')", "invalid literal for int() with base 10: 'x'", "    scaler.update()\n", 3),
])
def test_a_slip_shows_its_line_and_loses_nothing(copy, unedited, slip, message, before, saved_iter):
    """Before the weights change, the newest state is saved; after that, the latest one counts."""
    line = f"    if iter_num == 5: {slip}\n"
    copy.edit(("train.py", before, line + before))
    output = copy.train("a", code=1)
    number = (copy.folder / "train.py").read_text().split(line)[0].count("\n") + 1
    assert f'File "train.py", line {number}, in <module>' in output
    assert f"\nValueError: {message}\n" in output
    assert copy.newest("a")["iter_num"] == saved_iter
    unedited.resume(copy.folder / "a")
    assert_same_files(unedited.folder / "a", copy.folder / "a")


def test_a_block_alone_and_its_added_layers_are_initialized(monkeypatch):
    class Edited(model.Block):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Linear(64, 64)
            self.lora_b = torch.nn.Linear(4, 64)
            torch.nn.init.zeros_(self.lora_b.weight)
    config = model.GPTConfig(8, 28, n_layer=2, n_head=2, n_embd=64)
    monkeypatch.setattr(model, "Block", Edited)
    edited = model.GPT(config)
    for block in (Edited(config), edited.transformer.h[1]):
        assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4 ** 0.5, rel=0.05)
        assert 0.12 < block.extra.weight.abs().max() <= 1 / 8  # torch: up to 1 / sqrt(64)
        assert (block.lora_b.weight == 0).all()
    loaded = model.GPT.from_state(vars(config), edited.state_dict())
    assert_same(dict(loaded.state_dict()), dict(edited.state_dict()))


def test_parameters_without_a_gradient_in_some_updates_keep_none(copy):
    """Zeros would be decayed, and a resumed run has none."""
    attention = "        x = x + self.attn(self.ln_1(x), cache)\n"
    skip = "        if self.training and torch.rand(()) < 0.6:\n            return x\n"
    copy.edit(("model.py", attention, skip + attention))
    copy.check_exact("--n_layer=3", "--eval_interval=100", "--seed=4", processes=2)


def test_running_statistics_are_rank_0s_in_evaluations(copy):
    seen = "        self.seen += self.training * idx.float().mean()\n        x *= self.seen\n"
    copy.edit(
        ("model.py", TIED, TIED + "        self.register_buffer('seen', torch.zeros(()))\n"),
        ("model.py", "        x = self.transformer.drop(x)\n", seen))
    copy.check_exact("--eval_interval=2", processes=2)


def test_buffers_are_saved_as_they_were_before_the_update_under_way(copy):
    start = "        start = max("
    copy.edit(
        ("model.py", TIED, TIED + "        self.register_buffer('steps', torch.zeros(()))\n"),
        ("model.py", start, "        self.steps += self.training\n" + start),
        ("train.py", UPDATE, "    assert iter_num < 5\n" + UPDATE),
        ("train.py", "    model.zero_grad()\n", "    assert iter_num != seed\n"))
    for seed, iter_num in (9, 5), (3, 4):  # before the update, and after it
        copy.train("a", f"--seed={seed}", code=1)
        saved = copy.newest("a")
        assert saved["iter_num"] == iter_num and saved["model"]["steps"] == iter_num * 4


def test_a_checkpoint_that_nothing_could_read_is_named_when_it_is_written(copy):
    best = 'state["best_val_loss"] = losses["val"]'
    copy.edit(("train.py", best, best.replace('losses["val"]', 'np.float64(losses["val"])')))
    output = copy.train("a", code=1)
    assert "could not be read again: `state`, settings and GPTConfig may hold tensors" in output
    assert list(copy.folder.glob("a/*.pt*")) == []
