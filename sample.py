"""
Continues a text with a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=3
    python sample.py --out_dir=out --start=FILE:prompt.txt --temperature=0 --num_samples=1
    python sample.py --out_dir=out --export=folder
"""

import os
import signal
import sys

import torch
from tqdm import tqdm

from configurator import UserError, configure
from data.common import gpt2_files, read_meta, tokenizer
from model import load_model
from runtime import setup_device

# model
init_from = 'resume'  # from out_dir; or 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', a folder
out_dir = 'out'  # of the training run
# text
start = "\n"  # the prompt, or FILE:path for the content of a file (FILE:- for standard input)
num_samples = 10  # drawn in one batch; a single one is shown while it is drawn
max_new_tokens = 500  # per sample
temperature = 0.8  # 1: the model's distribution; lower: safer, higher: bolder; 0: greedy
top_k = 200  # draw from the k most probable tokens; 0: off
top_p = 1.0  # draw from the most probable tokens that add up to this probability; 1: off
seed = 1337
export = ''  # a folder: write the model there in Hugging Face's format instead of sampling
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'bfloat16' where it is native, 'float16', 'float32'
compile = False  # pays off for very long texts only

config = configure(globals())

LIMITS = {"num_samples": (1, 1e5), "max_new_tokens": (1, 1e9), "temperature": (0, 1e9),
          "top_k": (0, 1e9), "top_p": (1e-9, 1), "seed": (0, 2 ** 63)}
for key, (minimum, maximum) in LIMITS.items():
    if not minimum <= config[key] <= maximum:
        raise UserError(f"{key}={config[key]} must be from {minimum} to {maximum:g}")

# ---- model and tokenizer ----

device, dtype, compile = setup_device(device, dtype, compile)
torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper it compiles attention for each length
model, checkpoint = load_model(init_from, out_dir)
itos = checkpoint["itos"] if checkpoint else None
if checkpoint and not checkpoint["data"]:  # nanoGPT's: the characters are in the data folder
    meta = read_meta(checkpoint["config"].get("dataset", ""))
    itos = meta.get("itos", {}) if meta else None

if export:
    model.save_pretrained(export)
    if itos is None and model.config.vocab_size >= 50257:
        for name, content in gpt2_files(model.config.block_size).items():
            with open(os.path.join(export, name), "wb") as file:
                file.write(content)
    print(f"wrote {', '.join(sorted(os.listdir(export)))} to {export}")
    sys.exit()
encode, decode, vocab_limit, end_token = tokenizer(itos, model.config.vocab_size)
model.eval().to(device, getattr(torch, dtype))
if compile:
    model.hidden = torch.compile(model.hidden, dynamic=True)

# ---- prompt ----

if start.startswith("FILE:"):
    path = start.removeprefix("FILE:")
    try:
        with open(0 if path == "-" else path, encoding="utf-8-sig") as file:
            start = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompt {path!r}: {error}") from None
ids = encode(start)
if not ids and end_token is not None:
    ids = [end_token]
prompt = torch.tensor([ids], device=device).expand(num_samples, -1)  # (B, T)

# ---- samples ----

if hasattr(signal, "SIGPIPE"):  # Windows has none
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this quietly
torch.manual_seed(seed)
stream = model.generate_stream(prompt, max_new_tokens, temperature, top_k, top_p, vocab_limit,
                               end_token)
if num_samples == 1:
    print(start, end="", flush=True)
    pending = []  # tokens whose bytes are not whole characters yet
    for tensor in stream:
        token = tensor.item()
        if token == end_token:
            break
        pending.append(token)
        text = decode(pending)
        if not text.endswith("\ufffd"):
            print(text, end="", flush=True)
            pending = []
    print(decode(pending))
    print("-" * 15)
else:
    tokens = list(tqdm(stream, "sampling", max_new_tokens, leave=False, delay=2,
                       disable=None))
    for sample in torch.cat(tokens, dim=1).tolist():
        if end_token in sample:
            sample = sample[:sample.index(end_token)]
        print(start + decode(sample))
        print("-" * 15)
