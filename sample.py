"""
Continues a text with a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=3
    python sample.py --start=FILE:prompt.txt --temperature=0
"""

import os
import sys

import torch

from configurator import configure
from data.common import tokenizer
from model import GPT, load_checkpoint, setup_device

# model
init_from = 'resume'  # 'resume' (the checkpoint in out_dir), 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder
out_dir = 'out'  # folder of ckpt.pt
# text
start = "\n"  # the prompt, or FILE:path for a file's content (FILE:- reads standard input)
num_samples = 10  # drawn together, in one batch
max_new_tokens = 500  # in each sample
temperature = 0.8  # 1: the model's own distribution; below: safer, above: bolder; 0: always the likeliest
top_k = 200  # only the k likeliest tokens; 0: all
top_p = 1.0  # only the likeliest tokens that together hold this probability; 1: all
seed = 1337
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'bfloat16' where native, 'float16', 'float32'
compile = False  # True pays for very long texts only

config = configure(globals())

for key, least, most in (("num_samples", 1, 1e5), ("max_new_tokens", 1, 1e9), ("temperature", 0, 1e9), ("top_k", 0, 1e9),
                         ("top_p", 1e-9, 1), ("seed", 0, 2 ** 62)):
    if not least <= config[key] <= most:
        raise ValueError(f"{key}={config[key]} is out of range: it must be from {least} to {most:g}")

# ---- model ----

device, dtype, compile = setup_device(device, dtype, compile)
if init_from == "resume":
    paths = [os.path.join(out_dir, name) for name in ("ckpt.pt", "last.pt")]
    path = next(filter(os.path.exists, paths), None)
    if path is None:
        raise ValueError(f"{out_dir!r} holds no ckpt.pt: train first, name its --out_dir, or try --init_from=gpt2")
    checkpoint = load_checkpoint(path)
    model = GPT.from_checkpoint(checkpoint)
    dataset = checkpoint["config"].get("dataset")
else:
    if not init_from.startswith("gpt2") and not os.path.isdir(init_from):
        raise ValueError(f"init_from={init_from!r} is neither 'resume', nor 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', nor a folder")
    model = GPT.from_pretrained(init_from)
    dataset = None
model.eval().to(device, getattr(torch, dtype))  # weights are cast once, here

# ---- prompt ----

encode, decode, vocab_limit, end = tokenizer(dataset, model.config.vocab_size)
if start.startswith("FILE:"):
    path = start[len("FILE:"):]
    try:
        with open(0 if path == "-" else path, encoding="utf-8") as file:
            start = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompt {path!r}: {error}") from None
ids = encode(start) or ([end] if end is not None else [])
if not ids:
    raise ValueError("start='' leaves a character model nothing to continue: give at least one character, such as --start=$'\\n'")

# ---- samples ----

torch.manual_seed(seed)
prompt = torch.tensor([ids], device=device).expand(num_samples, -1)
options = dict(top_p=top_p, vocab_limit=vocab_limit, stop_token=end)
if compile:
    plain, model.hidden = model.hidden, torch.compile(model.hidden, dynamic=True)
    try:
        model.generate(prompt, 2)
    except Exception as error:  # whatever a compiler may raise
        print(f"compiling failed, going on without: {str(error).splitlines()[:1]}", file=sys.stderr)
        model.hidden = plain
    torch.manual_seed(seed)
for row in model.generate(prompt, max_new_tokens, temperature, top_k, **options).tolist():
    new = row[len(ids):]
    if end in new:
        new = new[:new.index(end)]
    print(start + decode(new))
    print("-" * 15)
