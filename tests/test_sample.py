import re

import pytest
import torch
import transformers
from conftest import newest

from model import GPT, GPTConfig


@pytest.fixture
def trained(train, tmp_path):
    train("a", "--max_iters=3")
    return tmp_path / "a"


def sample(run, out_dir, *arguments):
    run("sample.py", f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32", "--num_samples=2", "--max_new_tokens=20", *arguments)
    return run.out


def test_samples_are_drawn_and_repeat_with_their_seed(run, trained):
    first = sample(run, trained, "--start=the quick")
    parts = first.split("-" * 15 + "\n")
    assert len(parts) == 3 and parts[2] == "" and all(part.startswith("the quick") and len(part) == len("the quick") + 21 for part in parts[:2])
    assert parts[0] != parts[1]
    assert sample(run, trained, "--start=the quick") == first
    assert sample(run, trained, "--start=the quick", "--seed=2") != first


def test_greedy_sampling_is_the_models_own(run, trained, dataset):
    from data.common import tokenizer
    model = GPT.from_checkpoint(newest(trained)).eval()
    encode, decode, limit, _ = tokenizer(str(dataset), 28)
    text = encode("the")
    for _ in range(5):
        with torch.no_grad():
            text.append(model(torch.tensor([text]))[0][0, -1].argmax().item())
    out = sample(run, trained, "--start=the", "--temperature=0", "--max_new_tokens=5")
    assert out.split("\n-")[0] == decode(text)


def test_a_prompt_from_a_file(run, trained, tmp_path):
    (tmp_path / "prompt.txt").write_text("the lazy dog")
    assert sample(run, trained, f"--start=FILE:{tmp_path / 'prompt.txt'}").startswith("the lazy dog")


def test_last_pt_serves_where_there_is_no_ckpt_pt(run, trained):
    (trained / "ckpt.pt").rename(trained / "last.pt")
    assert sample(run, trained, "--start=the").startswith("the")


@pytest.mark.parametrize("argument, named", [
    ("--start=Q", "'Q'"), ("--start=", "start=''"), ("--start=FILE:nowhere.txt", "nowhere.txt"), ("--temperature=-1.0", "temperature"), ("--top_p=0.0", "top_p"),
    ("--num_samples=0", "num_samples"), ("--out_dir=nowhere", "nowhere"), ("--init_from=gpt3", "gpt3"), ("--init_from=bert", "bert"), ("--dtype=int8", "int8"),
])
def test_mistakes_are_named(run, trained, argument, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        sample(run, trained, "--start=a", argument)


def test_off_values(run, trained):
    greedy = sample(run, trained, "--start=a", "--temperature=0")
    assert greedy == sample(run, trained, "--start=a", "--top_k=1") == sample(run, trained, "--start=a", "--top_p=0.000001")
    assert greedy != sample(run, trained, "--start=a", "--top_k=0", "--top_p=1.0")


def test_a_folder_from_transformers_with_gpt2s_tokenizer(run, tmp_path):
    torch.manual_seed(0)
    GPT(GPTConfig(32, 50304, 1, 2, 8)).save_pretrained(str(tmp_path))
    out = sample(run, "nowhere", f"--init_from={tmp_path}", "--start=Once upon a time", "--top_p=0.9")
    assert out.count("Once upon a time") == 2
    assert sample(run, "nowhere", f"--init_from={tmp_path}", "--start=").count("-" * 15) == 2  # starts from end-of-text


def test_one_sample_is_shown_while_it_is_drawn(run, trained, monkeypatch):
    import sys
    shown = []
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: shown.append(text) or write(text))
    out = sample(run, trained, "--start=the", "--num_samples=1")
    assert len([text for text in shown if len(text) == 1 and text != "\n"]) >= 10  # characters came one by one
    monkeypatch.undo()
    assert sample(run, trained, "--start=the", "--num_samples=1") == out and len(out) == len("the") + 20 + 1 + 15 + 1


def test_bytes_of_one_character_are_shown_together(run, tmp_path, monkeypatch):
    """A model that always continues with the tokens of a text whose characters take several of them."""
    from data.common import gpt2_bpe
    ids = gpt2_bpe().encode("a🙂日本b")
    assert len(ids) > 6
    torch.manual_seed(0)
    GPT(GPTConfig(32, 50304, 1, 2, 8)).save_pretrained(str(tmp_path))
    monkeypatch.setattr("model.GPT.stream", lambda *arguments, **options: (torch.tensor([[i]]) for i in ids))
    assert sample(run, "nowhere", f"--init_from={tmp_path}", "--start=x", "--num_samples=1").startswith("xa🙂日本b\n---")


def test_a_prompt_from_standard_input(run, trained, monkeypatch):
    import os
    reading, writing = os.pipe()
    os.write(writing, b"the fox")
    os.close(writing)
    before = os.dup(0)
    os.dup2(reading, 0)
    try:
        assert sample(run, trained, "--start=FILE:-").startswith("the fox")
    finally:
        os.dup2(before, 0)


def test_an_exported_model_serves_a_pipeline(run, tmp_path):
    torch.manual_seed(0)
    GPT(GPTConfig(32, 50304, 2, 2, 16, bias=False)).save_pretrained(str(tmp_path / "a"))
    with pytest.raises(SystemExit) as end:
        sample(run, "nowhere", f"--init_from={tmp_path / 'a'}", f"--export={tmp_path / 'b'}")
    assert not end.value.code and "vocab.json" in run.out
    generate = transformers.pipeline("text-generation", str(tmp_path / "b"))
    theirs = generate("Once upon a time", max_new_tokens=20, do_sample=False)[0]["generated_text"]
    ours = sample(run, "nowhere", f"--init_from={tmp_path / 'b'}", "--start=Once upon a time", "--temperature=0", "--num_samples=1")
    assert ours == theirs + "\n" + "-" * 15 + "\n"
    text = "It's <|endoftext|> zwölf 🙂\n\n  boxes"
    from data.common import gpt2_bpe
    assert generate.tokenizer(text)["input_ids"] == gpt2_bpe().encode(text, allowed_special="all")


def test_a_character_model_is_exported_without_a_tokenizer(run, trained, tmp_path):
    with pytest.raises(SystemExit):
        sample(run, trained, f"--export={tmp_path / 'b'}")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]
