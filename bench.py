"""
Measures a training step, sampling and tokenizing on this machine.

    python bench.py                                      GPT-2 (124M)
    python bench.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --compare=True

With `compare`, baselines take turns with our variants. Training: unfused AdamW, all logits
returned, float32 on a CPU. Sampling: a full forward pass for each token, and transformers. Quote
the ratios of medians: times drift on a shared machine.

The last line is JSON: the settings, torch, gpu, matmul_tflops, train_tflops, mfu (null if the peak
is unknown) and, for each measurement, PART_VARIANT_ms (the median), PART_VARIANT_rate (tokens or
megabytes per second) and PART_VARIANT_ratio (its time / our time). PART is train, sample or
tokenize; VARIANT is ours, baseline or transformers. train_ours_gib is the peak memory of our
training step on CUDA.
"""

import contextlib
import importlib.util
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import runtime
from configurator import UserError, configure
from data.common import gpt2_bpe
from model import GPT, GPTConfig

# model
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
vocab_size = 50304
bias = False
optimizer_type = 'adamw'  # 'muon': Muon for the matrices of the blocks, AdamW for the rest
# measurement
batch_size = 12  # sequences in a training step
steps = 10  # timed training steps, after 3 for warm-up
tokens = 100  # per sample; 0: no sampling
num_samples = 1  # drawn in one batch
tokenize_mb = 10  # megabytes of text to tokenize, roughly; 0: none
compare = False  # measure baselines as well
# machine
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'bfloat16' where it is native, 'float16', 'float32'
compile = 'auto'  # True, False; 'auto': on CUDA

results = configure(globals())

for key in ("steps", "batch_size", "num_samples", "tokens", "tokenize_mb"):
    minimum = 0 if key in ("tokens", "tokenize_mb") else 1
    if results[key] < minimum:
        raise UserError(f"{key}={results[key]} must be at least {minimum}")
if optimizer_type not in ("adamw", "muon"):
    raise UserError(f"optimizer_type={optimizer_type!r} is none of 'adamw', 'muon'")

device, dtype, compile = runtime.setup_device(device, dtype, compile)
device_type = device.split(":")[0]
on_cuda = device_type == "cuda"
autocast = runtime.make_autocast(device, dtype)
amp_dtype = getattr(torch, dtype)
gpu = torch.cuda.get_device_name(device) if on_cuda else None
results.update(device=device, dtype=dtype, compile=compile, torch=torch.__version__, gpu=gpu)
model_config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, 0.0, bias)
ids = torch.randint(vocab_size, (batch_size, block_size + 1), device=device)
x, y = ids[:, :-1], ids[:, 1:]  # (B, T)


def median_times(variants, rounds, warm_up):
    """{name: median seconds} of functions {name: function}, called in turn."""
    times = {name: [] for name in variants}
    for _ in range(warm_up + rounds):
        for name, function in variants.items():
            runtime.synchronize(device)
            t0 = time.perf_counter()
            function()
            runtime.synchronize(device)
            times[name].append(time.perf_counter() - t0)
    return {name: statistics.median(times[name][warm_up:]) for name in variants}


def report(part, medians, amount, unit):
    """Prints a line of the table for each variant, and adds its figures to the results."""
    for name, seconds in medians.items():
        rate, ratio = amount / seconds, seconds / medians["ours"]
        line = f"{part:9} {name:14} {seconds * 1000:10.1f} ms {rate:14,.1f} {unit}"
        if name != "ours":
            line += f", ours is {ratio:.2f} x as fast"
        print(line, flush=True)
        results[f"{part}_{name}_ms"] = round(seconds * 1000, 3)
        results[f"{part}_{name}_rate"] = round(rate, 1)
        results[f"{part}_{name}_ratio"] = round(ratio, 3)


# ---- training ----


def make_step():
    """A function that makes one update as train.py does, with a single micro-step."""
    model = GPT(model_config).to(device)
    optimizers = [model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device_type, optimizer_type)]
    if optimizer_type == "muon":
        optimizers.append(model.configure_muon(0.1, 2e-4))
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
    compiled_model = torch.compile(model) if compile else model

    def step():
        with autocast:
            loss = compiled_model(x, y)[1]
        scaler.scale(loss).backward()
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        total_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        loss, grad_norm = torch.stack([loss.detach(), total_norm]).tolist()
        if math.isfinite(loss + grad_norm):
            if grad_norm > 1:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, total_norm)
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
    return step


def make_baseline_step():
    """A function that makes one update of a plain training script."""
    model = GPT(model_config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1)
    compiled_model = torch.compile(model) if compile else model

    def step():
        with autocast if on_cuda else contextlib.nullcontext():
            logits = compiled_model(x)[0]  # (B, T, V)
            loss = F.cross_entropy(logits.view(-1, vocab_size), y.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


size = 1024 if device == "cpu" else 8192
matrix = torch.randn(size, size, device=device, dtype=amp_dtype)
matmul_seconds = median_times({"matmul": lambda: torch.mm(matrix, matrix)}, 10, 3)["matmul"]
matrix = None  # frees it
matmul_tflops = 2 * size**3 / matmul_seconds / 1e12
print(f"{gpu or device}, {dtype}, matrix product {matmul_tflops:.2f} TFLOP/s", flush=True)

variants = {"ours": make_step()}
if on_cuda:
    for _ in range(2):  # the first one allocates the optimizer's state
        torch.cuda.reset_peak_memory_stats()
        variants["ours"]()
    results["train_ours_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(f"memory    ours {results['train_ours_gib']} GiB", flush=True)
if compare:
    variants["baseline"] = make_baseline_step()
times = median_times(variants, steps, 3)
report("train", times, batch_size * block_size, "tokens/s")
variants = None  # frees the models

model = GPT(model_config).eval().to(device, amp_dtype)
train_tflops = model.flops_per_token() * batch_size * block_size / times["ours"] / 1e12
mfu = model.estimate_mfu(batch_size, times["ours"])
results.update(matmul_tflops=matmul_tflops, train_tflops=train_tflops, mfu=mfu)
line = f"train     {train_tflops:.2f} TFLOP/s, {train_tflops / matmul_tflops:.0%} of the product's"
if mfu is not None:
    line += f", mfu {mfu:.1%}"
print(line, flush=True)

# ---- sampling ----

torch.backends.cuda.enable_cudnn_sdp(False)  # as in sample.py
prompt = torch.randint(vocab_size, (1, 8), device=device).expand(num_samples, -1)  # (B, T)


@torch.no_grad()
def sample_without_cache():
    sequences = prompt
    for _ in range(tokens):
        logits = model(sequences[:, -block_size:])[0][:, -1]  # (B, V)
        sequences = torch.cat([sequences, logits.argmax(-1, keepdim=True)], dim=1)


if tokens > 0:
    variants = {"ours": lambda: model.generate(prompt, tokens, temperature=0.8, top_k=200)}
    if compare:
        variants["baseline"] = sample_without_cache
    fits_context = prompt.size(1) + tokens <= block_size
    if compare and fits_context and importlib.util.find_spec("transformers"):
        import transformers
        their_config = transformers.GPT2Config(
            vocab_size=vocab_size, n_positions=block_size, n_embd=n_embd, n_layer=n_layer,
            n_head=n_head, bos_token_id=None, eos_token_id=None)
        their_model = transformers.GPT2LMHeadModel(their_config).eval().to(device, amp_dtype)
        options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=tokens,
                       do_sample=True, temperature=0.8, top_k=200)
        variants["transformers"] = lambda: their_model.generate(prompt, **options)
    report("sample", median_times(variants, 3, 1), num_samples * tokens, "tokens/s")

# ---- tokenizing ----

if tokenize_mb > 0:
    bpe = gpt2_bpe()
    path = Path(__file__).parent / "data" / "tinyshakespeare.txt"
    text = path.read_text(encoding="utf-8") * tokenize_mb  # 1.1 MB each
    times = median_times({"ours": lambda: bpe.encode_ordinary(text)}, 3, 1)
    report("tokenize", times, len(text) / 1e6, "MB/s")

print(json.dumps(results))
