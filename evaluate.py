"""
Zero-shot scores on HellaSwag (Zellers et al. 2019) and LAMBADA (Paperno et al. 2016).

    python evaluate.py --init_from=gpt2                      HellaSwag, 10,042 items from the hub
    python evaluate.py --task=lambada --out_dir=out          LAMBADA, 5,153 passages, your model
    torchrun --standalone --nproc_per_node=8 evaluate.py --files=hellaswag_val.jsonl

HellaSwag: which of four endings continues the context? acc chooses the ending with the highest
logprob, acc_norm the one with the highest mean logprob of its tokens. LAMBADA: the last word of a
passage, given everything before it. accuracy is the fraction of greedy matches, words whose every
token is the most probable one; perplexity is exp(-mean logprob) of the words.
"""

import os
import sys
import time

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import runtime
from configurator import configure
from data.common import tokenizer
from model import load_model

task = 'hellaswag'  # 'lambada'
files = ''  # local JSON lines with ctx, endings, label (HellaSwag) or text (LAMBADA); '': the hub
limit = 0  # only the first items; 0: all
# model
init_from = 'resume'  # the checkpoint in out_dir; 'gpt2' to 'gpt2-xl'; a folder
out_dir = 'out'  # of the training run
# machine
batch_size = 32  # sequences in a batch; an item of HellaSwag has four
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'bfloat16' where it is native, 'float16', 'float32'

configure(globals())

SOURCES = {  # task: repository on the hub, commit, split, number of items
    "hellaswag": ("Rowan/hellaswag", "218ec52e09a7e7462a5400043bb9a69a41d06b76",
                  "validation", 10_042),
    "lambada": ("EleutherAI/lambada_openai", "900124bf3b8235c6daf21033af9948b3f07346c4",
                "test", 5_153),
}
if task not in SOURCES:
    raise ValueError(f"task={task!r} is none of 'hellaswag', 'lambada'")
if batch_size < 1 or limit < 0:
    raise ValueError(f"batch_size={batch_size} must be at least 1, limit={limit} at least 0")

# ---- processes, device, model ----

rank, local_rank, world_size = runtime.process_ranks()
on_terminal = rank == 0 and sys.stderr.isatty()
if rank > 0:
    sys.stdout = open(os.devnull, "w")
device, dtype, _ = runtime.setup_device(device, dtype, False, local_rank)
autocast = runtime.make_autocast(device, dtype)
torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper it compiles attention for each length
runtime.init_processes(rank, world_size, "gloo")  # the results are on the CPU

model, checkpoint = load_model(init_from, out_dir)
model.eval().to(device)
itos = checkpoint["itos"] if checkpoint else None
encode, _, vocab_limit, end_token = tokenizer(itos, model.config.vocab_size)
if end_token is None:
    raise ValueError(f"the model in {out_dir!r} was trained on characters, and {task} needs "
                     "GPT-2's tokens: use another --out_dir or --init_from=gpt2")

# ---- items ----


def load_items():
    path, revision, split, num_items = SOURCES[task]
    if not on_terminal:
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the error below has the cause
    try:
        if files:
            return datasets.load_dataset("json", data_files=files, split="train")
        # note: without its name, a cached German LAMBADA may be found when the hub cannot be
        items = datasets.load_dataset(path, "default", split=split, revision=revision)
    except Exception as error:  # offline, unknown, damaged: many kinds
        error = error.__cause__ or error
        hint = "" if files else "; if you are offline, give JSON lines with --files"
        raise ValueError(f"cannot load {files or path}: {type(error).__name__}: {error}{hint}"
                         ) from None
    # note: if the hub fails, `datasets` falls back to any revision in its cache
    cache_path = items.cache_files[0]["filename"]
    if revision not in cache_path or len(items) != num_items:
        raise ValueError(f"{cache_path} has {len(items):,} items, not the {num_items:,} of commit "
                         f"{revision}: remove it, and {path} from the hub's cache, and try again")
    return items


def make_requests(item):
    """[(context, continuation), ...] of an item as token ids, and which of them is right."""
    if task == "lambada":
        context, _, word = item["text"].strip().rpartition(" ")
        continuations, label = [word], 0
    else:
        context, continuations, label = item["ctx"], item["endings"], int(item["label"])
        if len(continuations) != 4 or label not in range(4):
            raise ValueError(f"{len(continuations)} endings and the label {label}")
    context_ids = encode(context) or [end_token]
    return [(context_ids, encode(" " + text)) for text in continuations], label


items = load_items()
num_items = len(items)
if limit > 0:
    num_items = min(limit, num_items)
requests, labels = [], []
for number in range(num_items):
    try:
        pairs, label = make_requests(items[number])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"item {number} is not one of {task}: it needs a text, or (HellaSwag) "
                         f"ctx, four endings and a label from 0 to 3 ({error!r})") from None
    requests += pairs
    labels.append(label)

# ---- scores ----


@torch.no_grad()
def score(batch):
    """
    The logprob of each continuation given its context, and whether it is a greedy match (1 or 0):
    float64, (2, B). The beginning of a sequence that is too long is cut off.
    """
    # Indices are computed on the CPU, so that the results are the only wait for the device.
    sequences = [(context + continuation)[-model.config.block_size - 1:]
                 for context, continuation in batch]
    ids = torch.zeros(len(batch), max(map(len, sequences)), dtype=torch.long)
    is_target = torch.zeros(ids.shape, dtype=torch.bool)
    for i, token_ids in enumerate(sequences):
        first = max(1, len(token_ids) - len(batch[i][1]))
        ids[i, :len(token_ids)] = torch.tensor(token_ids)
        is_target[i, first:len(token_ids)] = True
    sequence, position = is_target.nonzero().unbind(1)  # of each token of a continuation
    targets = ids[sequence, position].to(device)
    places = sequence.to(device), position.to(device) - 1  # whose logits predict the targets
    inputs = ids[:, :-1].to(device)  # (B, T)
    with autocast:
        hidden = model.hidden(inputs)[places]  # (tokens of continuations, C)
        logits = model.lm_head(hidden)[:, :vocab_limit].float()
    logprobs = -F.cross_entropy(logits, targets, reduction="none")
    misses = logits.argmax(-1) != targets
    per_token = torch.stack([logprobs, misses]).cpu().double()
    sums = torch.zeros(2, len(batch), dtype=torch.float64).index_add_(1, sequence, per_token)
    logprob, num_misses = sums
    return torch.stack([logprob, num_misses == 0])


results = torch.zeros(2, len(requests), dtype=torch.float64)
lengths = [len(context) + len(continuation) for context, continuation in requests]
# The longest first: sequences of similar length need little padding.
order = sorted(range(len(requests)), key=lambda i: lengths[i], reverse=True)
my_requests = order[rank::world_size]
t0 = time.perf_counter()
for start in tqdm(range(0, len(my_requests), batch_size), task, disable=not on_terminal):
    indices = my_requests[start:start + batch_size]
    results[:, indices] = score([requests[i] for i in indices])
runtime.all_reduce_sum(results)  # each element is one process's value plus zeros
items_per_s = num_items / (time.perf_counter() - t0)
if world_size > 1:
    dist.destroy_process_group()

logprobs, greedy_matches = results
if task == "lambada":
    line = f"accuracy {greedy_matches.mean():.4f}, perplexity {(-logprobs.mean()).exp():.2f}"
else:
    num_tokens = torch.tensor([min(len(ids), model.config.block_size) for _, ids in requests])
    labels = torch.tensor(labels)
    acc = (logprobs.view(-1, 4).argmax(1) == labels).double().mean()
    acc_norm = ((logprobs / num_tokens).view(-1, 4).argmax(1) == labels).double().mean()
    line = f"acc_norm {acc_norm:.4f}, acc {acc:.4f}"
print(f"{task}: {line} ({num_items:,} items, {items_per_s:.1f} per second)")
