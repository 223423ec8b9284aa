"""
Continues a text with a trained model.

    python sample.py --out_dir=out-shakespeare-char --start="ROMEO:"
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=3
    python sample.py --out_dir=out --start=FILE:prompt.txt --temperature=0 --num_samples=1
    python sample.py --out_dir=out --export=folder
"""

from configurator import UserError, check_ranges, configure, printable, set_environment

set_environment()  # before torch is imported

import os
import signal
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data import common
from model import load_model
from runtime import make_autocast, setup_device

# model
init_from = 'resume'  # from out_dir; or 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', a folder
out_dir = 'out'  # of the training run
# text
start = "\n"  # the prompt, or FILE:path for the content of a file (also FILE:/dev/stdin)
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
check_ranges(config, "num_samples max_new_tokens", 1)
check_ranges(config, "temperature top_k", 0)
check_ranges(config, "top_p", 1e-9, 1)

# ---- model and tokenizer ----

device, dtype, compile = setup_device(device, dtype, compile)
if device == "mps" and torch.__version__ < (2, 12):  # pytorch issues 169222 and 181133
    raise UserError("to sample on Apple's GPU, install torch 2.12 or later, or use --device=cpu")
torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper it compiles attention for each length
model, checkpoint = load_model(init_from, out_dir)
vocab_size = model.config.vocab_size
if checkpoint and checkpoint["data"]:
    tokenizer = common.run_tokenizer(checkpoint)
else:  # nanoGPT's checkpoints leave the characters in the data folder
    folder = common.dataset_folder(checkpoint["config"]["dataset"]) if checkpoint else init_from
    default = common.GPT2 if vocab_size >= common.GPT2["vocab_size"] else common.UNKNOWN
    tokenizer = common.read_vocabulary(folder, default)["tokenizer"]

if export:
    model.save_pretrained(export)
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        Path(export, name).unlink(missing_ok=True)  # of another export
    for name, content in common.export_files(tokenizer, model.config.block_size).items():
        Path(export, name).write_bytes(content)
    print(f"wrote {', '.join(sorted(os.listdir(export)))} to {export}")
    sys.exit()
encode, decode, num_ids, end_token = common.make_tokenizer(tokenizer, vocab_size)
model.to(device)
if compile:
    model.forward = torch.compile(model.forward, dynamic=True)

# ---- the prompt, and what follows it ----

if start.startswith("FILE:"):
    path = Path(start.removeprefix("FILE:")).expanduser()
    start = path.read_text(encoding="utf-8-sig", errors="replace")
ids = encode(start)
if not ids and end_token is None:
    raise UserError("the prompt is empty: give --start=TEXT")
ids = ids or [end_token]
prompt = torch.tensor([ids], device=device).expand(num_samples, -1)  # (B, T)

if hasattr(signal, "SIGPIPE"):  # Windows has none
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this quietly
torch.manual_seed(seed)
stream = model.generate_stream(prompt, max_new_tokens, temperature, top_k, top_p, num_ids)


def continuation(context, new_ids):
    """The text of `new_ids`, which may depend on the ids before them."""
    return printable(decode(context + new_ids)[len(decode(context)):])


with make_autocast(device, dtype):
    if num_samples == 1:
        print(start, end="", flush=True)
        pending = []  # ids whose bytes are not complete characters yet
        for token in stream:
            if token.item() == end_token:
                break
            pending.append(token.item())
            text = continuation(ids, pending)
            if not text.endswith("\ufffd"):
                print(text, end="", flush=True)
                ids, pending = pending, []
        print(continuation(ids, pending))
        print("-" * 15)
    else:
        bar = tqdm(stream, "sampling", max_new_tokens, leave=False, delay=2, disable=None)
        for sample in torch.cat(list(bar), dim=1).tolist():
            if end_token in sample:
                sample = sample[:sample.index(end_token)]
            print(start + continuation(ids, sample))
            print("-" * 15)
