"""
An exported model in lm-evaluation-harness, where that is installed. A task of HellaSwag's kind, on
data made here, gives what our own forward pass gives; LAMBADA's asks for greedy matches as well.
"""

import json

import numpy as np
import pytest
import torch

from data.common import gpt2_bpe
from model import GPT, GPTConfig

pytest.importorskip("accelerate", reason="needs lm_eval[hf]")
lm_eval = pytest.importorskip("lm_eval")
tasks = pytest.importorskip("lm_eval.tasks")

CHOICES = [
    dict(query="A dog:", choices=["runs to the sea.", "sings.", "reads and reads."], gold=0),
    dict(query="Rain falls", choices=["up.", "down on the roof of", "nowhere"], gold=1),
    dict(query="Two and two", choices=["are four.", "the", "Seven, or so they say."], gold=1),
    dict(query="\u00dcn\u00efcode \u2603:", choices=["\u00e9t\u00e9", "\u2603\u2603", "a"], gold=2),
]
TASK = """
    task: choices
    dataset_path: json
    dataset_kwargs: {data_files: {test: FOLDER/docs.jsonl}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{query}}"
    doc_to_target: "{{gold}}"
    doc_to_choice: choices
    metric_list: [{metric: acc}, {metric: acc_norm}]
"""


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


def test_choices_are_scored_by_our_logprobs_and_greedy_matches(model, run, tmp_path):
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit):
        run("sample.py", f"--init_from={tmp_path}/model", f"--export={tmp_path}/export")
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, CHOICES)))
    (tmp_path / "task.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    output = lm_eval.simple_evaluate(
        model="hf", model_args=f"pretrained={tmp_path}/export,dtype=float32", tasks=["choices"],
        task_manager=tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu", batch_size=2, bootstrap_iters=0)
    samples = sorted(output["samples"]["choices"], key=lambda sample: sample["doc_id"])
    hits, hits_norm, matches = [], [], []
    for doc, sample in zip(CHOICES, samples, strict=True):
        scores = [score(model, doc["query"], " " + choice) for choice in doc["choices"]]
        for theirs, (logprob, is_match) in zip(sample["filtered_resps"], scores, strict=True):
            assert theirs == (pytest.approx(logprob, rel=1e-4), is_match)
            matches.append(is_match)
        logprobs = [logprob for logprob, _ in scores]
        lengths = [len(choice) for choice in doc["choices"]]
        hits.append(np.argmax(logprobs) == doc["gold"])
        hits_norm.append(np.argmax(np.divide(logprobs, lengths)) == doc["gold"])
    assert matches.count(True) == 1
    results = output["results"]["choices"]
    assert results["acc,none"] == np.mean(hits)
    assert results["acc_norm,none"] == np.mean(hits_norm)
