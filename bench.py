"""
Times a training step and sampling. With `compare`, in turns with a baseline: unfused AdamW, all
logits returned, float32 on a CPU, no cache. Quote the ratios: times drift on a shared machine.

    python bench.py                                      GPT-2 (124M)
    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --compare=True

The last line is JSON: settings, train_ours_ms, train_ours_rate (tokens per second), train_ours_gib
(peak memory, on CUDA without `compare`), train_baseline_ratio (its time / ours), mfu and so on.
"""

from configurator import check_choice, check_ranges, configure, set_environment

set_environment()  # before torch is imported

import json
import math
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
bias = False
optimizer_type = 'adamw'  # 'muon': Muon for the matrices of the blocks, AdamW for the rest
batch_size = 12  # sequences in a training step
steps = 10  # timed training steps, after 3 for warm-up
tokens = 100  # per sample; 0: no sampling
num_samples = 1  # drawn in one batch
compare = False  # measure the baseline as well
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'bfloat16' where it is native, 'float16', 'float32'
compile = 'auto'  # True, False; 'auto': on CUDA

results = configure(globals())
check_ranges(results, "batch_size steps num_samples", 1)
check_choice("optimizer_type", optimizer_type, ("adamw", "muon"))
device, dtype, compile = runtime.setup_device(device, dtype, compile)
device_type = device.split(":")[0]
gpu = torch.cuda.get_device_name(device) if device_type == "cuda" else None
results.update(device=device, dtype=dtype, compile=compile, torch=torch.__version__, gpu=gpu)
config = GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size,
                   vocab_size=vocab_size, bias=bias)
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
        ratio = ms / statistics.median(times["ours"][3:])
        rate = num_tokens / ms * 1000
        print(f"{part} {name}: {ms:.1f} ms, {rate:,.1f} tokens/s, {ratio:.2f} x ours")
        figures = dict(ms=ms, rate=rate, ratio=ratio)
        results.update({f"{part}_{name}_{key}": value for key, value in figures.items()})


def make_step(is_baseline):
    """A function that makes one update as train.py does, with a single micro-step."""
    model = GPT(config).to(device)
    in_float32 = is_baseline and device == "cpu"
    autocast = runtime.make_autocast(device, "float32" if in_float32 else dtype)
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
    compiled_model = torch.compile(model) if compile else model
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
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        total_norm = torch.nn.utils.get_total_norm(grads)
        loss, grad_norm = torch.stack([loss.detach(), total_norm]).tolist()
        if math.isfinite(loss + grad_norm):
            if grad_norm > 1:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, total_norm)
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
    return step


def sample(model, num_tokens):
    """Draws `tokens` tokens, `num_tokens` in each call, which reads all before them anew."""
    sequences = torch.randint(vocab_size, (num_samples, 8), device=device)  # (B, T)
    for _ in range(0, tokens, num_tokens):
        sequences = model.generate(sequences, num_tokens, temperature=0.8, top_k=200)


baseline_step = make_step(is_baseline=True) if compare else None
measure("train", make_step(is_baseline=False), baseline_step, steps, batch_size * block_size)
if gpu and not compare:
    results["train_ours_gib"] = torch.cuda.max_memory_allocated() / 2**30
model = GPT(config).eval().to(device, getattr(torch, dtype))
mfu = model.estimate_mfu(batch_size, results["train_ours_ms"] / 1000)
results["mfu"] = None if math.isnan(mfu) else mfu  # JSON has no nan
results["train_tflops"] = model.flops_per_token() * results["train_ours_rate"] / 1e12
if tokens > 0:
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in sample.py
    measure("sample", lambda: sample(model, tokens), lambda: sample(model, 1), 3,
            num_samples * tokens)
print(json.dumps(results))
