"""
Continues a text with a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=3
    python sample.py --start=FILE:prompt.txt --temperature=0 --num_samples=1     one alone is shown as it is made
    python sample.py --out_dir=out --export=folder                               for transformers, and ends
"""

import os
import sys

import torch

from configurator import configure
from data.common import gpt2_files, tokenizer
from model import load_model, setup_device

# model
init_from = 'resume'  # 'resume' (the checkpoint in out_dir), 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', or a folder
out_dir = 'out'  # folder of ckpt.pt
# text
start = "\n"  # the prompt, or FILE:path for a file's content (FILE:- reads standard input)
num_samples = 10  # drawn together, in one batch; 1: shown while it is drawn
max_new_tokens = 500  # in each sample
temperature = 0.8  # 1: the model's own distribution; below: safer, above: bolder; 0: always the likeliest
top_k = 200  # only the k likeliest tokens; 0: all
top_p = 1.0  # only the likeliest tokens that together hold this probability; 1: all
seed = 1337
export = ''  # a folder: write the model there in Hugging Face's format, and end
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'bfloat16' where native, 'float16', 'float32'
compile = False  # True pays for very long texts only, and compiles once more when the context is full

config = configure(globals())

for key, least, most in (("num_samples", 1, 1e5), ("max_new_tokens", 1, 1e9), ("temperature", 0, 1e9), ("top_k", 0, 1e9),
                         ("top_p", 1e-9, 1), ("seed", 0, 2 ** 62)):
    if not least <= config[key] <= most:
        raise ValueError(f"{key}={config[key]} is out of range: it must be from {least} to {most:g}")

# ---- model ----

device, dtype, compile = setup_device(device, dtype, compile)
torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper GPUs it would compile attention anew for each length of the text
model, dataset = load_model(init_from, out_dir)
encode, decode, vocab_limit, end = tokenizer(dataset, model.config.vocab_size)
if export:
    model.save_pretrained(export)
    files = gpt2_files(model.config.block_size) if end is not None else {}  # characters have no such files
    for name, content in files.items():
        with open(os.path.join(export, name), "wb") as file:
            file.write(content)
    print(f"wrote {', '.join(['config.json', 'model.safetensors', *files])} to {export}")
    sys.exit()
model.eval().to(device, getattr(torch, dtype))  # weights are cast once, here

# ---- prompt ----

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

prompt = torch.tensor([ids], device=device).expand(num_samples, -1)
options = dict(temperature=temperature, top_k=top_k, top_p=top_p, vocab_limit=vocab_limit, stop_token=end)
if compile:
    plain, model.hidden = model.hidden, torch.compile(model.hidden, dynamic=True)
    try:
        model.generate(prompt, 2)
    except Exception as error:  # whatever a compiler may raise
        print(f"compiling failed, going on without: {str(error).splitlines()[:1]}", file=sys.stderr)
        model.hidden = plain

torch.manual_seed(seed)
if num_samples == 1:
    print(start, end="", flush=True)
    pending = []  # ids whose bytes don't make whole characters yet
    for new in model.stream(prompt, max_new_tokens, **options):
        if new.item() == end:
            break
        pending.append(new.item())
        text = decode(pending)
        if not text.endswith("\ufffd"):
            print(text, end="", flush=True)
            pending = []
    print(decode(pending))
    print("-" * 15)
else:
    for row in model.generate(prompt, max_new_tokens, **options).tolist():
        new = row[len(ids):]
        print(start + decode(new[:new.index(end)] if end in new else new))
        print("-" * 15)
