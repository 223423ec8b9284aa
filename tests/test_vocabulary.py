"""
Tokens on their way: from a data set into checkpoints, samples, exported folders and the next run,
and bits per byte, by which losses of different tokens can be compared.
"""

import math
import re

import numpy as np
import pytest
import torch
import transformers
from conftest import newest

from data import common
from model import load_model

TEXT = "Es war einmal ein König — Ἐν ἀρχῇ ἦν ὁ λόγος. हिन्दी 日本語 🙂 the end.\n" * 60


@pytest.fixture(params=["characters", "bpe", "gpt2"])
def tokens(request):
    return request.param


@pytest.fixture
def prepared(run, tmp_path, tokens):
    """A data set of TEXT in tokens of each kind, made by data/text/prepare.py."""
    (tmp_path / "my.txt").write_text(TEXT, encoding="utf-8")
    run("data/text/prepare.py", tmp_path / "my.txt", f"--tokens={tokens}", "--vocab_size=300",
        f"--out_dir={tmp_path / 'data'}")
    return tmp_path / "data"


@pytest.fixture
def out_dir(train, tmp_path, prepared):
    """The folder of a run on that data set. What the run printed is in run.out."""
    train("run", f"--dataset={prepared}", "--max_iters=3", "--eval_iters=0", "--batch_size=7")
    return tmp_path / "run"


def test_bits_per_byte_are_the_nats_of_val_over_its_bytes(run, prepared, out_dir):
    """Computed from the decoded text, and the plain forward pass of one sequence after another."""
    printed = float(re.findall(r"step 3: .*, ([\d.]+) bits per byte", run.out)[0])
    vocabulary = common.read_vocabulary(prepared, common.GPT2)
    _, decode, _, end_token = common.make_tokenizer(vocabulary["tokenizer"], 50304)
    ids = np.fromfile(prepared / "val.bin", "<u2").astype(int)
    model, _ = load_model("resume", str(out_dir))
    num_sequences = (min(len(ids), (prepared / "train.bin").stat().st_size // 2) - 1) // 8
    nats = 0.0
    for k in range(num_sequences):
        window = torch.tensor(ids[8 * k : 8 * k + 9])[None]
        nats += 8 * model(window[:, :-1], window[:, 1:])[1].item()
    # bytes by differences, as a token may end within a character
    before, until = ([i for i in ids[:n].tolist() if i != end_token]
                     for n in (1, 8 * num_sequences + 1))
    raw = decode(until).encode()
    num_bytes = len(raw) - len(decode(before).encode())
    assert printed == pytest.approx(nats / math.log(2) / num_bytes, abs=2e-4 + 4 / num_bytes)


def test_a_checkpoint_carries_its_tokens(run, tmp_path, prepared, out_dir):
    """Sampling and preparing new text need no data folder."""
    vocabulary = common.read_vocabulary(prepared, common.GPT2)
    assert newest(out_dir)["tokenizer"] == vocabulary["tokenizer"]
    for path in prepared.iterdir():
        path.unlink()
    arguments = ["--start=the end", "--max_new_tokens=5", "--num_samples=2", "--device=cpu"]
    run("sample.py", f"--out_dir={out_dir}", *arguments)
    assert run.out.count("the end") >= 2
    first = run.out
    run("sample.py", f"--init_from={out_dir}", *arguments)
    assert run.out == first
    (tmp_path / "new.txt").write_text(TEXT[::-1], encoding="utf-8")
    for folder in (out_dir, prepared):
        run("data/text/prepare.py", tmp_path / "new.txt", f"--tokens={folder}",
            f"--out_dir={prepared}")
        assert common.read_vocabulary(prepared) == vocabulary


def test_a_run_starts_from_another_one(train, run, tmp_path, prepared, out_dir):
    """With its weights and tokens, from iteration 0."""
    before = newest(out_dir)
    train("next", f"--dataset={prepared}", f"--init_from={out_dir}", "--max_iters=0")
    assert "from iteration 0\n" in run.out
    after = newest(tmp_path / "next")
    for name, weight in before["model"].items():
        assert torch.equal(after["model"][name], weight)
    assert after["optimizer"]["state"] == {}


@pytest.mark.parametrize("tokens", ["characters", "bpe"])
def test_other_tokens_than_the_models_are_an_error(train, run, tmp_path, tokens, out_dir):
    """Those of a run, or of an exported folder."""
    with pytest.raises(SystemExit):
        run("sample.py", f"--out_dir={out_dir}", f"--export={tmp_path / 'exported'}")
    (tmp_path / "other.txt").write_text(TEXT.replace("w", "W"))
    run("data/text/prepare.py", tmp_path / "other.txt", f"--tokens={tokens}", "--vocab_size=300",
        f"--out_dir={tmp_path / 'other'}")
    for folder in (out_dir, tmp_path / "exported"):
        with pytest.raises(ValueError, match="has other tokens than the data set .*--tokens="):
            train("next", f"--dataset={tmp_path / 'other'}", f"--init_from={folder}")


def test_an_exported_folder_opens_in_transformers_with_its_tokens(run, tmp_path, tokens, out_dir):
    """The same ids and the same greedy text, by AutoTokenizer and pipeline."""
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("of another export")
    for source in (f"--out_dir={out_dir}", f"--init_from={folder}"):  # once more from the export
        with pytest.raises(SystemExit) as stopped:
            run("sample.py", source, f"--export={folder}")
        assert not stopped.value.code and f" to {folder}\n" in run.out
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    encode, decode, num_ids, end_token = common.make_tokenizer(newest(out_dir)["tokenizer"], 50304)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT[:200])["input_ids"]
    assert ids == encode(TEXT[:200]) and tokenizer.decode(ids) == TEXT[:200]
    assert (len(tokenizer), tokenizer.eos_token_id) == (num_ids, end_token)
    assert tokenizer.model_max_length == 8
    pipeline = transformers.pipeline("text-generation", str(folder), device="cpu")
    theirs = pipeline("the", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    model, _ = load_model("resume", str(out_dir))
    idx = torch.tensor([encode("the")])
    ours = model.generate(idx, 4, temperature=0, vocab_limit=50257)[0].tolist()
    assert decode(ours) == theirs
    text = pipeline("the")[0]["generated_text"]  # with default arguments it stays in the context
    assert text.startswith("the") and len(text) < 8 * 10
    # and here
    run("sample.py", f"--init_from={folder}", "--start=the", "--max_new_tokens=4",
        "--num_samples=1", "--temperature=0", "--device=cpu", "--dtype=float32")
    assert run.out.startswith(theirs)
