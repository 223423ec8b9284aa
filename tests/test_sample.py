"""sample.py: prompts, options, what is shown and when, and where the tokenizer comes from."""

import io
import os
import re
import signal
import sys

import pytest
import torch
from conftest import newest, spawn

from data.common import character_tokenizer, gpt2_bpe, make_tokenizer
from model import GPT, GPTConfig

RULE = "-" * 15 + "\n"  # after each sample
SHORT = ("--device=cpu", "--dtype=float32", "--num_samples=2", "--max_new_tokens=20")


@pytest.fixture
def out_dir(train, tmp_path):
    """The folder of a character model."""
    train("a", "--max_iters=3")
    return tmp_path / "a"


@pytest.fixture
def sample(run, out_dir):
    """sample(*arguments) -> what sample.py prints, for the character model by default."""
    def sample(*arguments):
        run("sample.py", f"--out_dir={out_dir}", *SHORT, *arguments)
        return run.out
    return sample


@pytest.fixture
def sample_gpt2(sample, tmp_path):
    """sample_gpt2(*arguments) -> what sample.py prints for a model with GPT-2's vocabulary."""
    GPT(GPTConfig(32, 50304, 1, 2, 8)).save_pretrained(str(tmp_path / "gpt2"))
    return lambda *arguments: sample(f"--init_from={tmp_path / 'gpt2'}", *arguments)


def always_generate(monkeypatch, *sequences):
    """Makes every model continue its prompts with these token ids."""
    def generate_stream(self, idx, *args, **kwargs):
        for tokens in zip(*sequences, strict=True):
            yield torch.tensor(tokens)[:, None]  # (B, 1)
    monkeypatch.setattr("model.GPT.generate_stream", generate_stream)


def test_samples_differ_and_repeat_with_their_seed(sample):
    out = sample("--start=the quick")
    first, second, rest = out.split(RULE)
    assert rest == "" and first != second
    for text in (first, second):
        assert text.startswith("the quick") and len(text) == len("the quick") + 20 + 1
    assert sample("--start=the quick") == out
    assert sample("--start=the quick", "--seed=2") != out


def test_greedy_samples_and_off_values(sample, out_dir):
    """Against a plain forward pass."""
    saved = newest(out_dir)
    model = GPT.from_state(saved["model_args"], saved["model"]).eval()
    encode, decode, _, _ = make_tokenizer(saved["tokenizer"], 28)
    ids = encode("the")
    for _ in range(5):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0]
        ids.append(logits[0, -1].argmax().item())
    short = ["--start=the", "--max_new_tokens=5"]
    for option in ("--temperature=0", "--top_k=1", "--top_p=0.000001"):
        assert sample(*short, option) == 2 * f"{decode(ids)}\n{RULE}"
    everything = sample(*short, "--top_k=0", "--top_p=1.0")
    assert everything == sample(*short, "--top_k=28") != sample(*short, "--top_k=1")


def test_bytes_of_one_character_are_shown_together(sample_gpt2, monkeypatch):
    ids = gpt2_bpe().encode("a🙂日本b")
    assert len(ids) > 6  # several tokens a character
    always_generate(monkeypatch, ids)
    assert sample_gpt2("--start=x", "--num_samples=1") == "xa🙂日本b\n" + RULE


def test_end_of_text_ends_a_sample(sample_gpt2, monkeypatch):
    abc, = gpt2_bpe().encode("abc")
    always_generate(monkeypatch, [abc, 50256, abc], [abc, abc, abc])
    assert sample_gpt2("--start=x") == f"xabc\n{RULE}xabcabcabc\n{RULE}"
    always_generate(monkeypatch, [abc, 50256, abc])
    assert sample_gpt2("--start=x", "--num_samples=1") == f"xabc\n{RULE}"


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_what_it_can_show_and_a_pipe_utf8(
        sample, out_dir, monkeypatch, num_samples, is_terminal):
    """On a computer whose encoding is ASCII. Control characters reach neither."""
    saved = torch.load(out_dir / "ckpt.pt", weights_only=True)
    saved["tokenizer"] = character_tokenizer({i: "β\x1b"[i % 2] for i in range(28)})
    torch.save(saved, out_dir / "ckpt.pt")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stdout.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", stdout)
    sample("--start=β", f"--num_samples={num_samples}")
    stdout.flush()
    out = stdout.buffer.getvalue().decode()
    assert out.count(RULE) == num_samples
    assert set(out) - set(RULE) == ({"?"} if is_terminal else {"β", "?"})


def test_prompts_from_files(sample, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("the lazy dog")
    monkeypatch.setenv("HOME", str(tmp_path))
    stdin = os.dup(0)
    os.dup2(os.open(tmp_path / "prompt.txt", os.O_RDONLY), 0)
    try:
        for path in (tmp_path / "prompt.txt", "~/prompt.txt", "/dev/stdin"):
            assert sample(f"--start=FILE:{path}").startswith("the lazy dog")
    finally:
        os.dup2(stdin, 0)


def test_long_and_empty_prompts(sample, sample_gpt2):
    prompt = "the quick brown fox jumps over a lazy dog"  # longer than the context
    assert sample(f"--start={prompt}").count(prompt) == 2
    assert sample_gpt2("--start=").count(RULE) == 2  # from end-of-text


@pytest.mark.parametrize("argument, named", [
    ("--start=Q", "the character 'Q'"), ("--start=", "the prompt is empty"),
    ("--start=FILE:nowhere.txt", "nowhere.txt"), ("--temperature=-1.0", "temperature=-1.0"),
    ("--top_p=0.0", "top_p=0.0"), ("--top_k=-1", "top_k=-1"), ("--num_samples=0", "num_samples=0"),
    ("--out_dir=nowhere", "no ckpt.pt or last.pt in out_dir"), ("--init_from=gpt3", "'gpt3'"),
    ("--dtype=int8", "dtype='int8'"),
])
def test_mistake_is_named(sample, argument, named):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(named)):
        sample("--start=a", argument)


def test_the_best_checkpoint_is_sampled(sample, out_dir):
    expected = sample("--start=the")
    (out_dir / "last.pt").write_bytes(b"not read")
    assert sample("--start=the") == expected
    (out_dir / "ckpt.pt").rename(out_dir / "last.pt")  # the only one
    assert sample("--start=the") == expected


def test_characters_of_nanogpts_checkpoint_come_from_its_data(sample, out_dir):
    saved = torch.load(out_dir / "ckpt.pt", weights_only=True)
    for key in ("tokenizer", "data", "version"):
        del saved[key]
    torch.save(saved, out_dir / "ckpt.pt")
    assert sample("--start=the").count("the") >= 2
    saved["config"]["dataset"] = "nowhere"
    torch.save(saved, out_dir / "ckpt.pt")
    with pytest.raises(ValueError, match="tokenizer is not known"):
        sample("--start=the")


def test_apples_gpus_are_refused_where_they_sample_wrong_text(sample, monkeypatch):
    monkeypatch.setattr("runtime.setup_device", lambda *args: ("mps", "float32", False))
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.11.0"))
    with pytest.raises(ValueError, match="install torch 2.12 or later, or use --device=cpu"):
        sample()


def test_a_closed_pipe_ends_sampling_quietly(out_dir):
    """As in `python sample.py ... | head -1`."""
    process = spawn("sample.py", f"--out_dir={out_dir}", "--max_new_tokens=100000",
                    "--num_samples=1", "--device=cpu")
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=100) == -signal.SIGPIPE and err == ""
