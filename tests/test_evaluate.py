"""Zero-shot scores: cases worked by hand, and a slow scorer on top of transformers as an oracle."""

import json
import math
import re

import datasets
import pytest
import torch
import transformers
from conftest import finish, spawn

from checkpoint import save_checkpoint
from data.common import gpt2_bpe
from model import GPT, GPTConfig

OPTIONS = ("--device=cpu", "--dtype=float32")
LAMBADA_REVISION = "900124bf3b8235c6daf21033af9948b3f07346c4"


def write_items(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


@pytest.fixture
def yes_model(tmp_path):
    """
    The folder of a model whose logits are 10 for ' yes' and 0 for all other tokens, everywhere: the
    logprob of ' yes' is -1.19, that of any other token -11.19.
    """
    model = GPT(GPTConfig(block_size=64, vocab_size=50257, n_layer=1, n_head=1, n_embd=4))
    for p in model.parameters():
        p.data.zero_()
    model.transformer.wte.weight.data[gpt2_bpe().encode(" yes")[0], 0] = 10
    model.transformer.ln_f.bias.data[0] = 1
    model.save_pretrained(str(tmp_path / "yes"))
    return tmp_path / "yes"


@pytest.fixture
def evaluate(run, tmp_path):
    """evaluate(model_folder, items, *arguments) -> the script's globals."""
    def evaluate(model_folder, items, *arguments):
        path = write_items(tmp_path / "items.jsonl", items)
        arguments = (f"--init_from={model_folder}", f"--files={path}", *OPTIONS, *arguments)
        return run("evaluate.py", *arguments)
    return evaluate


def test_lambada_by_hand(run, evaluate, yes_model):
    texts = ("Did he say yes", "Or did he say no", "She said yes ", "yes")
    items = [dict(text=text) for text in texts]
    evaluate(yes_model, items, "--task=lambada", "--batch_size=2")
    normalizer = math.log(math.exp(10) + 50256)
    perplexity = math.exp((3 * (normalizer - 10) + normalizer) / 4)
    expected = f"lambada: accuracy 0.7500, perplexity {perplexity:.2f} (4 items, "
    assert run.out.startswith(expected)


def test_hellaswag_by_hand(run, evaluate, yes_model):
    items = [
        # the sum and the mean both choose ending 0
        dict(ctx="Will you", endings=["yes", "no", "no no", "no no no"], label="0"),
        # the sum chooses ending 1, the mean ending 2
        dict(ctx="Will you", endings=["no no", "no", "yes no", "no no no"], label="2"),
        # the sum chooses ending 1, the mean ending 0
        dict(ctx="Will you", endings=["no yes no no no no", "no", "no no", "no no"], label="0"),
    ]
    result = evaluate(yes_model, items)
    assert result["logprobs"][:2].tolist() == pytest.approx([-1.1883, -11.1883], abs=1e-3)
    assert run.out.startswith("hellaswag: acc_norm 1.0000, acc 0.3333 (3 items, ")


def test_limit_scores_only_the_first_items(run, evaluate, yes_model):
    items = [dict(text="Did he say yes"), dict(text="Did he say no")]
    evaluate(yes_model, items, "--task=lambada", "--limit=1")
    assert "accuracy 1.0000" in run.out and "(1 items, " in run.out


def test_padding_of_the_vocabulary_is_ignored(run, evaluate, yes_model, tmp_path):
    """A checkpoint with 50304 tokens, the padding by far the most probable, scores as without."""
    items = [dict(text="Did he say yes")]
    expected = evaluate(yes_model, items, "--task=lambada")["logprobs"]
    model = GPT.from_pretrained(str(yes_model))
    weights = model.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.full((47, 4), 30.0)])
    checkpoint = dict(model=weights, model_args=dict(vars(model.config), vocab_size=50304),
                      iter_num=1, best_val_loss=1.0, config={}, itos=None, data={})
    save_checkpoint(checkpoint, str(tmp_path / "out" / "ckpt.pt"))
    result = evaluate("resume", items, "--task=lambada", f"--out_dir={tmp_path / 'out'}")
    assert torch.equal(result["logprobs"], expected)


def slow_score(model, context, continuation):
    """(logprob, greedy match) of a continuation, by one forward pass for each of its tokens."""
    logprob, greedy_match = 0.0, True
    sequence = (context + continuation)[-model.config.n_positions - 1:]
    for k in range(len(sequence) - len(continuation), len(sequence)):
        with torch.no_grad():
            logprobs = model(torch.tensor([sequence[:k]])).logits[0, -1].log_softmax(-1)
        logprob += logprobs[sequence[k]].item()
        greedy_match = greedy_match and logprobs.argmax().item() == sequence[k]
    return logprob, greedy_match


def test_scores_equal_those_of_transformers_token_by_token(run, evaluate, tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_positions=24, n_embd=16, n_layer=2, n_head=2,
                                     initializer_range=0.3)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "model")
    words = "the quick brown fox, jumps over a lazy dog's ünder <|endoftext|> it".split()
    items = []
    for i in range(9):
        context = " ".join(words[:3 + i]) * (1 + i // 5)  # the longest exceed the model's context
        endings = [" ".join(words[j:j + 1 + (i + j) % 4]) for j in range(4)]
        items.append(dict(ctx=context, endings=endings, label=str(i % 4)))
    result = evaluate(tmp_path / "model", items, "--batch_size=5")
    expected = [slow_score(model, *request) for request in result["requests"]]
    logprobs = [logprob for logprob, _ in expected]
    assert result["logprobs"].tolist() == pytest.approx(logprobs, abs=1e-3)
    assert result["greedy_matches"].tolist() == [match for _, match in expected]
    num_tokens = torch.tensor([len(ending) for _, ending in result["requests"]])
    choices = (torch.tensor(logprobs) / num_tokens).view(-1, 4).argmax(1)
    acc_norm = (choices == torch.arange(9) % 4).double().mean()
    assert f"acc_norm {acc_norm:.4f}" in run.out


def test_processes_share_the_items(run, evaluate, yes_model, tmp_path):
    items = []
    for word in ("so", "then", "later on"):
        items += [dict(text=f"He said {word} {answer}") for answer in ("yes", "no", "perhaps")]
    evaluate(yes_model, items, "--task=lambada")
    expected = re.findall(r"lambada: .*\(9 items", run.out)
    process = spawn("evaluate.py", "--task=lambada", f"--init_from={yes_model}",
                    f"--files={tmp_path / 'items.jsonl'}", *OPTIONS, processes=2)
    out, _ = finish(process)
    assert re.findall(r"lambada: .*\(9 items", out) == expected  # printed once


@pytest.mark.parametrize("items, message", [
    ([dict(words="a")], "item 0 .* ctx, four endings"),
    ([dict(ctx="a", endings=["b"] * 4, label="")], "label from 0 to 3"),
    ([dict(ctx="a", endings=["b"] * 4, label="4")], "label from 0 to 3"),
    ([dict(ctx="a", endings=["b"] * n, label="0") for n in (3, 5)], "item 0 .* four endings"),
    ([dict(ctx="a", endings=["b"] * 4, label="0"),
      dict(ctx="a", endings=["b", None, "c", "d"], label="0")], "item 1"),
])
def test_items_of_another_format_are_refused(evaluate, yes_model, items, message):
    with pytest.raises(ValueError, match=message):
        evaluate(yes_model, items)


def test_no_files_and_no_hub_is_an_error_in_one_line(run, yes_model, tmp_path):
    arguments = (f"--init_from={yes_model}", *OPTIONS)
    with pytest.raises(ValueError, match="cannot load .*missing.jsonl"):
        run("evaluate.py", f"--files={tmp_path / 'missing.jsonl'}", *arguments)
    with pytest.raises(ValueError, match="cannot load Rowan/hellaswag: .* --files"):
        run("evaluate.py", *arguments)  # tests are offline


def test_a_model_of_characters_is_refused(run, train):
    config = train("out", "--max_iters=1")
    with pytest.raises(ValueError, match="trained on characters"):
        run("evaluate.py", f"--out_dir={config['out_dir']}", *OPTIONS)


@pytest.mark.parametrize("revision, num_items, message", [
    (LAMBADA_REVISION, 5153, None),
    (LAMBADA_REVISION, 5152, "has 5,152 items, not the 5,153 .* remove it"),
    ("another-revision", 5153, "another-revision.* has 5,153 items, not .* 900124bf.*: remove"),
])
def test_only_the_pinned_data_set_is_scored(run, yes_model, tmp_path, monkeypatch, revision,
                                            num_items, message):
    """`datasets` falls back to what its cache has, under the same name, when the hub fails."""
    folder = tmp_path / revision
    texts = ["Did he say yes"] * num_items
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder)
    asked = {}

    def load_dataset(path, name, split, revision):
        asked.update(path=path, name=name, split=split, revision=revision)
        return datasets.load_from_disk(folder)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    arguments = (f"--init_from={yes_model}", "--task=lambada", "--limit=1", *OPTIONS)
    if message is None:
        run("evaluate.py", *arguments)
    else:
        with pytest.raises(ValueError, match=message):
            run("evaluate.py", *arguments)
    assert asked == dict(path="EleutherAI/lambada_openai", name="default", split="test",
                         revision=LAMBADA_REVISION)
