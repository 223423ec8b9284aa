"""
Times a training step and sampling. With `compare`, in turns with a baseline: unfused AdamW, all
logits returned, float32 on a CPU, no cache. Quote the ratios: times drift on a shared machine.

    python bench.py                                      GPT-2 (124M)
    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --compare=True

The last line is JSON: settings, train_ours_ms, train_ours_rate (tokens per second), train_ours_gib
(peak memory, on CUDA without `compare`), train_baseline_ratio (its time / ours) and so on.
"""

from configurator import check_choice, configure, set_environment

set_environment()  # before torch is imported

import json
import statistics
import time

import torch

import runtime
from model import GPT, GPTConfig

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304
optimizer_type = 'adamw'  # 'muon': Muon for the matrices of the blocks, AdamW for the rest
batch_size = 12  # sequences in a training step
steps = 10  # timed training steps, after 3 for warm-up
tokens = 100  # in the sample; 0: no sampling
compare = False  # measure the baseline as well
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'bfloat16' where it is native, 'float16', 'float32'
compile = 'auto'  # True, False; 'auto': on CUDA

results = configure(globals())
check_choice("optimizer_type", optimizer_type, ("adamw", "muon"))
device, dtype, compile = runtime.setup_device(device, dtype, compile)
device_type = device.split(":")[0]
gpu = torch.cuda.get_device_name() if device_type == "cuda" else None
results.update(device=device, dtype=dtype, compile=compile, torch=torch.__version__, gpu=gpu)
config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, bias=False)
x, y = torch.randint(vocab_size, (2, batch_size, block_size), device=device)  # (B, T) each


def measure(part, ours, baseline, rounds, num_tokens):
    """Calls `ours` and `baseline` in turn, and reports the medians of their times."""
    variants = {"ours": ours, "baseline": baseline} if compare else {"ours": ours}
    times = {name: [] for name in variants}  # in ms
    for _ in range(3 + rounds):
        for name, function in variants.items():
            t0 = time.perf_counter()
            function()
            runtime.synchronize(device)
            times[name].append(1000 * (time.perf_counter() - t0))
    for name in variants:
        ms = statistics.median(times[name][3:])
        rate = num_tokens / ms * 1000
        ratio = ms / statistics.median(times["ours"][3:])
        print(f"{part} {name}: {ms:.1f} ms, {rate:,.1f} tokens/s, {ratio:.2f} x ours")
        key = f"{part}_{name}"
        results.update({f"{key}_ms": ms, f"{key}_rate": rate, f"{key}_ratio": ratio})


def make_step(is_baseline):
    """A function that makes one update as train.py does, but without scaling float16's losses."""
    model = GPT(config).to(device)
    compiled_model = torch.compile(model) if compile else model
    in_float32 = is_baseline and device == "cpu"
    autocast = runtime.make_autocast(device, "float32" if in_float32 else dtype)
    optimizers = [model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device_type, optimizer_type)]
    if optimizer_type == "muon":
        optimizers.append(model.configure_muon(0.1, 1e-4))
    if is_baseline:
        optimizers = [torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.1)]

    def step():
        with autocast:
            logits, loss = compiled_model(x, None if is_baseline else y)
            if is_baseline:
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()  # waits for the device
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    return step


def sample(num_tokens):
    """Draws `tokens` tokens, `num_tokens` in each call, which reads all before them anew."""
    sequence = torch.randint(vocab_size, (1, 8), device=device)  # (B, T)
    for _ in range(0, tokens, num_tokens):
        sequence = model.generate(sequence, num_tokens, temperature=0.8, top_k=200)


baseline_step = make_step(is_baseline=True) if compare else None
measure("train", make_step(is_baseline=False), baseline_step, steps, batch_size * block_size)
if gpu and not compare:
    results["train_ours_gib"] = torch.cuda.max_memory_allocated() / 2**30
if tokens > 0:
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in sample.py
    model = GPT(config).eval().to(device, getattr(torch, dtype))
    measure("sample", lambda: sample(tokens), lambda: sample(1), 3, tokens)
print(json.dumps(results))
