"""
Measures a training step, sampling and tokenizing on this machine; ends with one line of JSON.

    python bench.py                                                    GPT-2 (124M), as in training
    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=8 --vocab_size=65 --compare=True
    python bench.py --profile=True                                     and a trace for chrome://tracing or Perfetto

`compare` alternates with the plain way in the same run: a float32 step with unfused AdamW (on CUDA: in `dtype`, fused), all
logits returned, in a process with torch's own handling of memory; sampling that reads everything again for each token;
transformers, if installed. Quote its ratios: times on a shared machine drift.
"""

import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from configurator import configure
from data.common import gpt2_bpe
from model import GPT, GPTConfig, setup_device

# model
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304
bias = False
# measurement
batch_size = 12  # rows in a training step
steps = 10  # timed training steps of each kind, after 3 that are not
tokens = 100  # sampled by each sample; 0: no sampling
num_samples = 1  # at once
tokenize_mb = 10  # megabytes of text to tokenize; 0: none
compare = False  # with the plain way, and transformers
profile = False  # writes trace.json, of three training steps
# machine
device = 'auto'
dtype = 'auto'
compile = 'auto'

config = configure(globals())

if min(steps, batch_size, num_samples) < 1 or min(tokens, tokenize_mb) < 0:
    raise ValueError(f"{steps=}, {batch_size=} and {num_samples=} must be at least 1, {tokens=} and {tokenize_mb=} at least 0")
device, dtype, compile = setup_device(device, dtype, compile)
device_type = device.split(":")[0]
on_cuda = device_type == "cuda"
half = getattr(torch, dtype)
if on_cuda:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for the deterministic step, but read at the first product
    torch.utils.deterministic.fill_uninitialized_memory = False
results = dict(config, device=torch.cuda.get_device_name(device) if on_cuda else device, dtype=dtype, compile=compile, torch=torch.__version__)
shape = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, 0.0, bias)


def seconds(function):
    """How long `function` takes, to the device's end of it."""
    begin = time.perf_counter()
    function()
    if on_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def alternate(functions, rounds, warm_up):
    """{name: median seconds} of functions called in turn."""
    times = {name: [] for name in functions}
    for i in range(rounds + warm_up):
        for name, function in functions.items():
            time.sleep(0.05)  # until the threads of the one before, perhaps of another process, have ceased to spin
            times[name].append(seconds(function))
    return {name: statistics.median(values[warm_up:]) for name, values in times.items()}


def show(title, medians, amount, unit):
    """Prints a row for each variant: time, rate, and its ratio to the first one's."""
    first = next(iter(medians))
    for name, median in medians.items():
        ratio = "" if name == first else f"   {first} is {median / medians[first]:.2f} x as fast"
        print(f"{title:10} {name:14} {median * 1000:10.1f} ms {amount / median:14,.1f} {unit}{ratio}", flush=True)
        results[f"{title}_{name}_ms"] = round(median * 1000, 3)


def train_step(plain=False, deterministic=False):
    """A function that makes one update, as train.py does, or the plain way."""
    torch.manual_seed(0)
    model = GPT(shape).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "" if plain and not on_cuda else device_type)  # "": unfused
    lower = contextlib.nullcontext() if dtype == "float32" or (plain and not on_cuda) else torch.autocast(device_type, dtype=half)
    options = {}
    if deterministic:
        from torch._inductor import config as inductor
        options = {"deterministic": True} if hasattr(inductor, "deterministic") else {}  # from torch 2.10 on
    run = torch.compile(model, options=options) if compile and (on_cuda or not plain) else model
    ids = torch.randint(vocab_size, (batch_size, block_size + 1), device=device)
    x, y = ids[:, :-1], ids[:, 1:]

    def step():
        torch.use_deterministic_algorithms(deterministic)
        with lower:
            loss = F.cross_entropy(run(x)[0].view(-1, vocab_size), y.reshape(-1)) if plain else run(x, y)[1]
        loss.backward()
        if plain:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            if torch.isfinite(loss.detach() + norm):
                if norm > 1:
                    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
                optimizer.step()
        optimizer.zero_grad()
        torch.use_deterministic_algorithms(False)
    return step


def peak():
    """The most memory that this process has held so far, in GiB: of the GPU's, or of RAM."""
    if on_cuda:
        return round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    import resource  # here: Windows has none
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20), 2)


def plain_steps(pipe):
    """Makes a plain step whenever `pipe` asks for one, and answers with its memory: the other process of `compare`."""
    step = train_step(plain=True)
    while pipe.recv():
        seconds(step)
        pipe.send(peak())


def main():
    if compare:
        os.environ["THP_MEM_ALLOC_ENABLE"] = "0"  # for the child, see setup_device
        spawn = multiprocessing.get_context("spawn")
        pipe, end = spawn.Pipe()
        child = spawn.Process(target=plain_steps, args=(end,), daemon=True)
        child.start()  # now: on Linux a process begins with its parent's peak

    size = 8192 if on_cuda else 2048  # a GPU takes less for 2048 than for being asked
    a = torch.randn(size, size, device=device, dtype=half)
    rate = 2 * size ** 3 / alternate({"product": lambda: torch.mm(a, a)}, 10, 3)["product"]
    del a
    print(f"{results['device']}, {dtype}, matrix product {rate / 1e9:,.0f} GFLOP/s", flush=True)

    variants = {"ours": train_step()}
    for _ in range(2):  # the optimizer's state comes in the first step, and counts from the second on
        variants["ours"]()
    results["train_ours_gib"] = peak()
    if on_cuda:
        variants["deterministic"] = train_step(deterministic=True)
    if compare:
        variants["plain"] = lambda: pipe.send(True) or pipe.recv()
    medians = alternate(variants, steps, 3)
    show("train", medians, batch_size * block_size, "tokens/s")
    torch.manual_seed(0)
    model = GPT(shape).eval().to(device, half)
    flops = model.flops_per_token() * batch_size * block_size / medians["ours"]
    results["mfu"] = model.estimate_mfu(batch_size, medians["ours"])
    if compare:
        results["train_plain_gib"] = variants["plain"]()
        child.terminate()
    results["train_share_of_product"] = round(flops / rate, 4)
    mfu = f", mfu {results['mfu']:.1%}" if results["mfu"] else ""
    plain = f", plain {results['train_plain_gib']}" if compare else ""
    print(f"           {flops / 1e9:,.0f} GFLOP/s, {flops / rate:.1%} of the matrix product{mfu}, {results['train_ours_gib']} GiB at most{plain}")
    if profile:
        with torch.profiler.profile() as trace:
            for _ in range(3):
                variants["ours"]()
        trace.export_chrome_trace("trace.json")
    del variants

    torch.backends.cuda.enable_cudnn_sdp(False)  # as in sample.py
    prompt = torch.randint(vocab_size, (1, 8), device=device).expand(num_samples, -1)

    @torch.no_grad()
    def plainly():
        ids = prompt
        for _ in range(tokens):
            ids = torch.cat([ids, model(ids[:, -block_size:])[0][:, -1:].argmax(-1)], dim=1)

    variants = {"ours": lambda: model.generate(prompt, tokens, 0.8, 200)}
    if compare:
        variants["no cache"] = plainly
    if compare and prompt.size(1) + tokens <= block_size:  # theirs reads no further than its positions
        with contextlib.suppress(ImportError):
            import transformers
            theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
                vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd, n_layer=n_layer, n_head=n_head,
                bos_token_id=None, eos_token_id=None)).eval().to(device)
            variants["transformers"] = lambda: theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True,
                                                               max_new_tokens=tokens, temperature=0.8, top_k=200)
    if tokens:
        show("sample", alternate(variants, 3, 1), tokens * num_samples, "tokens/s")

    if tokenize_mb:
        bpe = gpt2_bpe()
        with open(__file__, encoding="utf-8") as file:
            text = file.read()
        text *= tokenize_mb * 10 ** 6 // len(text) + 1
        show("tokenize", alternate({"one thread": lambda: bpe.encode_ordinary(text)}, 3, 1), len(text) / 1e6, "MB/s")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
