"""
An exported model in lm-evaluation-harness, where that is installed. Tasks of HellaSwag's and
LAMBADA's kinds, on data made here, give what our own forward pass gives.
"""

import json

import numpy as np
import pytest
import torch

from data.vocab import gpt2_bpe
from model import GPT, GPTConfig

pytest.importorskip("accelerate", reason="needs lm_eval[hf]")
lm_eval = pytest.importorskip("lm_eval")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

CHOICES = [
    dict(query="A dog:", choices=["runs to the sea.", "sings.", "reads and reads."], gold=0),
    dict(query="Rain falls", choices=["up.", "down on the roof of", "nowhere"], gold=1),
    dict(query="Two and two", choices=["are four.", "the", "Seven, or so they say."], gold=1),
    dict(query="\u00dcn\u00efcode \u2603:", choices=["\u00e9t\u00e9", "\u2603\u2603", "a"], gold=2),
]
TEXTS = ["It was a dark night in the", "All left but the king", "To be or not to be in Denmark"]
TASKS = {
    "choices": """
        output_type: multiple_choice
        doc_to_text: "{{query}}"
        doc_to_target: "{{gold}}"
        doc_to_choice: choices
        metric_list: [{metric: acc}, {metric: acc_norm}]
    """,
    "texts": """
        output_type: loglikelihood
        doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
        doc_to_target: "{{' '+text.split(' ')[-1]}}"
        metric_list: [{metric: acc}, {metric: perplexity}]
    """,
}


@pytest.fixture
def model():
    """Large random weights, and a strong bias towards the word "the"."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=128, n_layer=2, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)
        the = model.lm_head.weight[gpt2_bpe().encode_single_token(" the")]
        the.mul_(3)
        model.transformer.ln_f.bias.add_(the, alpha=50)
    return model


@pytest.fixture
def evaluate(model, run, tmp_path):
    """evaluate(task, docs) -> (lm_eval's results, its samples) of the exported model."""
    def evaluate(task, docs):
        model.save_pretrained(tmp_path / "model")
        with pytest.raises(SystemExit):
            run("sample.py", f"--init_from={tmp_path}/model", f"--export={tmp_path}/export")
        (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
        (tmp_path / "task.yaml").write_text(f"""
        task: {task}
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {tmp_path}/docs.jsonl}}}}
        test_split: test{TASKS[task]}""")
        manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
        output = lm_eval.simple_evaluate(
            model="hf", model_args=f"pretrained={tmp_path}/export,dtype=float32", tasks=[task],
            task_manager=manager, device="cpu", batch_size=2, bootstrap_iters=0)
        samples = sorted(output["samples"][task], key=lambda sample: sample["doc_id"])
        return output["results"][task], samples
    return evaluate


@torch.no_grad()
def score(model, context, continuation):
    """The logprob of a continuation, and whether it is a greedy match."""
    bpe = gpt2_bpe()
    ids = torch.tensor(bpe.encode_ordinary(context + continuation))
    start = len(bpe.encode_ordinary(context))
    logits, _ = model(ids[None, :-1])
    logits = logits[0, start - 1:, :bpe.n_vocab]  # (T, V), without the padding
    targets = ids[start:]
    logprobs = logits.log_softmax(-1)[range(len(targets)), targets]
    return logprobs.sum().item(), torch.equal(logits.argmax(-1), targets)


def test_multiple_choice_is_scored_by_our_logprobs(model, evaluate):
    results, samples = evaluate("choices", CHOICES)
    hits, hits_norm = [], []
    for doc, sample in zip(CHOICES, samples, strict=True):
        logprobs = [score(model, doc["query"], " " + choice)[0] for choice in doc["choices"]]
        assert [resp[0] for resp in sample["filtered_resps"]] == pytest.approx(logprobs, rel=1e-4)
        lengths = [len(choice) for choice in doc["choices"]]
        hits.append(np.argmax(logprobs) == doc["gold"])
        hits_norm.append(np.argmax(np.divide(logprobs, lengths)) == doc["gold"])
    assert results["acc,none"] == np.mean(hits)
    assert results["acc_norm,none"] == np.mean(hits_norm)


def test_last_word_is_scored_by_our_logprobs_and_greedy_match(model, evaluate):
    results, samples = evaluate("texts", [dict(text=text) for text in TEXTS])
    logprobs, matches = [], []
    for text, sample in zip(TEXTS, samples, strict=True):
        context, _, word = text.rpartition(" ")
        logprob, is_match = score(model, context, " " + word)
        assert sample["filtered_resps"][0] == (pytest.approx(logprob, rel=1e-4), is_match)
        logprobs.append(logprob)
        matches.append(is_match)
    assert matches == [True, False, False]
    assert results["acc,none"] == pytest.approx(1 / 3)
    perplexity = np.exp(-np.mean(logprobs))
    assert results["perplexity,none"] == pytest.approx(perplexity, rel=1e-3)
