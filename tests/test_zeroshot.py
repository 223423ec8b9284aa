import json
import math
import re

import pytest
import torch
import transformers
from conftest import finish, spawn

from data.common import gpt2_bpe
from model import GPT, GPTConfig


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def yes_man(tmp_path):
    """A model whose logits are 10 for ' yes' and 0 for everything else, at each position."""
    model = GPT(GPTConfig(64, 50304, 1, 1, 4))
    for p in model.parameters():
        p.data.zero_()
    model.transformer.wte.weight.data[gpt2_bpe().encode(" yes")[0], 0] = 10
    model.transformer.ln_f.bias.data[0] = 1
    model.save_pretrained(str(tmp_path / "yes"))
    return tmp_path / "yes"


def evaluate(run, model, path, *arguments):
    return run("data/zeroshot.py", f"--init_from={model}", f"--files={path}", "--device=cpu", "--dtype=float32", *arguments)


def test_lambada_by_hand(run, yes_man, tmp_path):
    path = write(tmp_path / "lambada.jsonl", [dict(text="Did he say yes"), dict(text="Or did he say no"), dict(text="She said yes ")])
    evaluate(run, yes_man, path, "--task=lambada", "--batch_size=2")
    every = math.log(math.exp(10) + 50256)  # minus the logit: the negative log-likelihood of any token
    perplexity = math.exp((2 * (every - 10) + every) / 3)
    assert run.out.startswith(f"lambada: accuracy {2 / 3:.4f}, perplexity {perplexity:.2f} (3 items")


def test_hellaswag_by_hand(run, yes_man, tmp_path):
    # a ' yes' has log-probability -1.19, any other token -11.19
    rows = [dict(ctx="Will you", endings=["yes", "no", "no no", "no no no"], label="0"),  # sum and mean take ending 0
            dict(ctx="Will you", endings=["no no", "no", "yes no", "no no no"], label="2"),  # the sum takes 1, the mean 2
            dict(ctx="Will you", endings=["no yes no no no no", "no", "no no", "no no"], label="0")]  # the sum takes 1, the mean 0
    result = evaluate(run, yes_man, write(tmp_path / "h.jsonl", rows))
    assert result["likelihood"][:2].tolist() == pytest.approx([-1.1883, -11.1883], abs=1e-3)
    assert run.out.startswith("hellaswag: acc_norm 1.0000, acc 0.3333 (3 items")


def test_padding_of_the_vocabulary_does_not_count(run, yes_man, tmp_path):
    """A checkpoint with 50304 ids, one of the padding far likelier than all else, scores as the 50257 alone do."""
    path = write(tmp_path / "lambada.jsonl", [dict(text="Did he say yes")])
    expected = evaluate(run, yes_man, path, "--task=lambada")["likelihood"]
    model, padded = GPT.from_pretrained(str(yes_man)), GPT(GPTConfig(64, 50304, 1, 1, 4))
    weights = model.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.full((47, 4), 30.0)])
    (tmp_path / "out").mkdir()
    torch.save(dict(model=weights, optimizer={"state": {}}, model_args=vars(padded.config), iter_num=1, best_val_loss=1.0, config={}), tmp_path / "out/ckpt.pt")
    result = run("data/zeroshot.py", f"--out_dir={tmp_path / 'out'}", f"--files={path}", "--task=lambada", "--device=cpu", "--dtype=float32")
    assert torch.equal(result["likelihood"], expected)


def slow(model, before, after):
    """Sum of log-probabilities of `after` given `before`, and whether each token is the likeliest: one token after the other."""
    size, total, best = model.config.n_positions, 0.0, True
    text = (before + after)[-size - 1:]
    for place in range(len(text) - len(after), len(text)):
        with torch.no_grad():
            logp = model(torch.tensor([text[:place]])).logits[0, -1].log_softmax(-1)
        total, best = total + logp[text[place]].item(), best and logp.argmax().item() == text[place]
    return total, best


def test_scores_are_those_of_a_plain_slow_scorer_over_transformers(run, tmp_path):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=24, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)).eval()
    model.save_pretrained(tmp_path / "model")
    words = "the quick brown fox, jumps over a lazy dog's ünder <|endoftext|> it".split()
    rows = [dict(ctx=" ".join(words[:3 + i]) * (1 + i // 5), endings=[" ".join(words[j:j + 1 + (i + j) % 4]) for j in range(4)], label=str(i % 4))
            for i in range(9)]
    result = evaluate(run, tmp_path / "model", write(tmp_path / "h.jsonl", rows), "--batch_size=5")
    expected = [slow(model, *row) for row in result["rows"]]
    assert result["likelihood"].tolist() == pytest.approx([total for total, _ in expected], abs=1e-3)
    assert result["likeliest"].bool().tolist() == [best for _, best in expected]
    means = torch.tensor([total / len(after) for (total, _), (_, after) in zip(expected, result["rows"])]).view(-1, 4)
    assert f"acc_norm {(means.argmax(-1) == torch.arange(9) % 4).double().mean():.4f}" in run.out


def test_processes_share_the_work(run, yes_man, tmp_path):
    path = write(tmp_path / "lambada.jsonl", [dict(text=f"He said {word} {answer}") for word in ("so", "then", "later on") for answer in ("yes", "no", "perhaps")])
    evaluate(run, yes_man, path, "--task=lambada")
    out, _ = finish(spawn("data/zeroshot.py", "--task=lambada", f"--init_from={yes_man}", f"--files={path}", "--device=cpu", "--dtype=float32", processes=2))
    result = re.findall(r"lambada: .*\(9 items", out)  # among what gloo says of itself
    assert result == re.findall(r"lambada: .*\(9 items", run.out) and len(result) == 1


@pytest.mark.parametrize("rows, named", [([dict(words="a")], "ctx, endings, label"), ([dict(ctx="a", endings=["b"] * 4, label="")], "label"),
                                         ([dict(ctx="a", endings=["b"] * n, label="0") for n in (3, 5)], "row 0 .* four endings"),
                                         ([dict(ctx="a", endings=["b"] * 4, label="0"), dict(ctx="a", endings=["b", None, "c", "d"], label="0")], "row 1")])
def test_other_files_are_refused(run, yes_man, tmp_path, rows, named):
    with pytest.raises(ValueError, match=named):
        evaluate(run, yes_man, write(tmp_path / "h.jsonl", rows))
