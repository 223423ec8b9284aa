"""
Zero-shot evaluation: HellaSwag (Zellers et al. 2019) and LAMBADA (Paperno et al. 2016), in the variants told beside GPT-2's losses.

    python data/zeroshot.py --init_from=gpt2                                          HellaSwag, 10,042 items from the hub
    python data/zeroshot.py --task=lambada --out_dir=out                              LAMBADA, 5,153 passages, your model
    torchrun --standalone --nproc_per_node=8 data/zeroshot.py --files=hellaswag_val.jsonl

HellaSwag: which of four endings continues `ctx`? acc_norm takes the one whose tokens have the highest mean log-probability,
acc that with the highest sum. LAMBADA: the last word of `text`, given all before it: accuracy counts words of which every
token is the likeliest, perplexity is exp of the words' mean negative log-likelihood.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from configurator import configure
from data.common import tokenizer
from model import load_model, setup_device

task = 'hellaswag'  # 'lambada'
files = ''  # local json lines instead of the hub's: ctx, endings, label; or text
limit = 0  # only the first items; 0: all
# model
init_from = 'resume'  # 'resume' (the checkpoint in out_dir), 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder
out_dir = 'out'  # folder of ckpt.pt
# machine
batch_size = 32  # rows at once; an item of HellaSwag has four
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'bfloat16' where native, 'float16', 'float32'

configure(globals())

SOURCES = {"hellaswag": ("Rowan/hellaswag", "validation"), "lambada": ("EleutherAI/lambada_openai", "test")}
if task not in SOURCES:
    raise ValueError(f"task={task!r} is none of {', '.join(map(repr, SOURCES))}")
if batch_size < 1 or limit < 0:
    raise ValueError(f"{batch_size=} must be at least 1, {limit=} at least 0")
rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
if world_size > 1:
    dist.init_process_group("gloo")

# ---- items ----

if rank > 0 or not sys.stderr.isatty():
    datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it has to say comes in the error
try:
    if files:
        items = datasets.load_dataset("json", data_files=files, split="train")
    else:
        name, split = SOURCES[task]
        items = datasets.load_dataset(name, split=split)
except Exception as error:  # offline, unknown, damaged: many kinds
    cause = error.__cause__ or error
    raise ValueError(f"cannot load {files or SOURCES[task][0]!r}: {type(cause).__name__}: {cause} ("
                     + ("it takes json lines)" if files else "offline? --files takes local json lines)")) from None
needed = {"hellaswag": {"ctx", "endings", "label"}, "lambada": {"text"}}[task]
if not needed <= set(items.column_names) or not len(items):
    raise ValueError(f"{task} takes rows with {', '.join(sorted(needed))}; got {len(items)} with {', '.join(items.column_names)}")
items = items.select(range(min(limit or len(items), len(items))))

device, dtype, _ = setup_device(device, dtype, False)
torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper GPUs it would compile attention anew for each length of a batch
model, dataset = load_model(init_from, out_dir)
model.eval().to(device)
autocast = contextlib.nullcontext() if dtype == "float32" else torch.autocast(device.split(":")[0], dtype=getattr(torch, dtype))  # as in training
encode, _, vocab_size, end = tokenizer(dataset, model.config.vocab_size)
if end is None:
    raise ValueError(f"the model was trained on characters of {dataset!r}: these tasks take GPT-2's tokens")
texts = [[item["ctx"], *(item["endings"] or [])] if task == "hellaswag" else [item["text"]] for item in items]
for number, (item, text) in enumerate(zip(items, texts)):
    if not all(type(part) is str for part in text) or task == "hellaswag" and (len(text) != 5 or str(item["label"]) not in list("0123")):
        raise ValueError(f"row {number} is not one of {task}: it needs " + ("a text" if task == "lambada" else "a ctx, four endings, and a "
                         "label from 0 to 3 (the test split's are not public)"))
if task == "hellaswag":
    pairs = [(item["ctx"], " " + ending) for item in items for ending in item["endings"]]
    labels = torch.tensor([int(label) for label in items["label"]])
else:
    pairs = [(before, " " + word) for before, _, word in (item["text"].strip().rpartition(" ") for item in items)]
rows = [(encode(before) or [end], encode(after)) for before, after in pairs]

# ---- log-likelihoods ----


@torch.no_grad()
def score(rows):
    """Sum of the log-probabilities of each row's second part given its first, and whether it is the likeliest: (rows,) each."""
    size = model.config.block_size + 1
    texts = [(before + after)[-size:] for before, after in rows]
    ids = torch.zeros(len(rows), max(map(len, texts)), dtype=torch.long)
    counted = torch.zeros_like(ids, dtype=torch.bool)
    for row, (text, (_, after)) in enumerate(zip(texts, rows)):
        ids[row, :len(text)] = torch.tensor(text)
        counted[row, max(1, len(text) - len(after)):len(text)] = True
    ids, counted = ids.to(device), counted[:, 1:].to(device)
    logits = model.lm_head(model.hidden(ids[:, :-1])[counted])[:, :vocab_size].float()  # (tokens counted, V)
    targets = ids[:, 1:][counted]
    loss = F.cross_entropy(logits, targets, reduction="none")
    wrong = (logits.argmax(-1) != targets).float()
    row = counted.nonzero()[:, 0]
    total = torch.zeros(2, len(rows), device=device).index_add_(1, row, torch.stack([-loss, wrong])).cpu()
    return total[0], total[1] == 0


likelihood, likeliest = torch.zeros(2, len(rows), dtype=torch.float64)
order = sorted(range(len(rows)), key=lambda i: -sum(map(len, rows[i])))  # alike in length: little padding
mine = order[rank::world_size]
began = time.perf_counter()
for start in tqdm(range(0, len(mine), batch_size), task, disable=rank > 0 or not sys.stderr.isatty()):
    some = mine[start:start + batch_size]
    with autocast:
        sums, whole = score([rows[i] for i in some])
    likelihood[some], likeliest[some] = sums.double(), whole.double()
if world_size > 1:
    for part in (likelihood, likeliest):
        dist.all_reduce(part)
    dist.destroy_process_group()

if rank == 0:
    if task == "hellaswag":
        lengths = torch.tensor([min(len(after), model.config.block_size) for _, after in rows])
        acc, acc_norm = ((value.view(-1, 4).argmax(-1) == labels).double().mean() for value in (likelihood, likelihood / lengths))
        print(f"hellaswag: acc_norm {acc_norm:.4f}, acc {acc:.4f}", end="")
    else:
        print(f"lambada: accuracy {likeliest.mean():.4f}, perplexity {(-likelihood.mean()).exp():.2f}", end="")
    print(f" ({len(items):,} items, {len(items) / (time.perf_counter() - began):.1f} a second)")
