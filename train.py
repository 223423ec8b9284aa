"""
Trains a GPT, in one process or in many. A run is exact: its batches, dropout and learning rates are a function of its
settings alone, however often it is stopped and resumed, and on however many processes.

    python train.py config/train_shakespeare_char_cpu.py                     on a laptop
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py   on 8 GPUs
    python train.py config/train_gpt2.py --init_from=resume                  from the last checkpoint on
"""

import contextlib
import csv
import math
import os
import re
import signal
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

from configurator import configure
from data.common import open_ids, read_meta, remedy, whole
from data.plot import draw_losses
from model import GPT, GPTConfig, load_checkpoint, load_optimizer, save_checkpoint, setup_device

# where it goes, and how often
out_dir = 'out'  # folder of ckpt.pt, last.pt, log.csv and loss.png
eval_interval = 2000  # updates between evaluations
log_interval = 1  # updates between log lines
eval_iters = 200  # batches of each split in an evaluation; 0: all of val, once and in order, and as much of train
eval_only = False  # evaluate once, write nothing
always_save_checkpoint = True  # at each evaluation; False: only when the validation loss improved
init_from = 'scratch'  # 'scratch', 'resume', 'auto' (resume if there is a checkpoint), 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl', a folder
# wandb
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data: an iteration takes gradient_accumulation_steps * batch_size rows of block_size tokens, over all processes
dataset = 'openwebtext'  # a folder under data/
gradient_accumulation_steps = 5 * 8  # micro-batches an iteration, shared by all processes
batch_size = 12  # rows in a micro-batch
block_size = 1024  # tokens in a row
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining, 0.1 or more for finetuning
bias = False  # in linear layers and layer norms
# optimizer
optimizer_type = 'adamw'  # 'muon': Muon on the blocks' matrices, AdamW on all else
muon_scale = 2.0  # Muon's learning rate is so many times learning_rate
learning_rate = 6e-4  # the highest
max_iters = 600000  # updates in all
weight_decay = 1e-1  # of matrices and embeddings
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # largest norm of the gradient; 0: no limit
# learning rate
decay_lr = True  # False: constant, without a warm-up
warmup_iters = 2000  # updates
lr_decay_iters = 600000  # about max_iters (Hoffmann et al. 2022)
min_lr = 6e-5  # from lr_decay_iters on, about learning_rate / 10
lr_schedule = 'cosine'  # 'wsd': warm-up, stable, decay in a line
decay_share = 0.2  # of lr_decay_iters, for wsd's decay
# machine
backend = 'auto'  # of the processes: 'nccl' (GPUs), 'gloo' (CPUs)
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'bfloat16' where native, 'float16', 'float32'
compile = 'auto'  # True, False; 'auto': on CUDA
# exactness
seed = 1337
deterministic = False  # on CUDA, bit for bit: slower, and not needed on a CPU with fewer than four processes

config = configure(globals())

POSITIVE = "eval_interval log_interval gradient_accumulation_steps batch_size block_size n_layer n_head n_embd".split()
for key, value in config.items():
    least = 1 if key in POSITIVE else 0
    limit = {"dropout": 1, "beta1": 1, "beta2": 1, "n_layer": 10 ** 4, "seed": 2 ** 62}.get(key, 2 ** 31)
    if type(value) in (int, float) and not least <= value < limit:
        raise ValueError(f"{key}={value} is out of range: it must be at least {least} and below {limit}")
for key, choices in (("optimizer_type", ("adamw", "muon")), ("lr_schedule", ("cosine", "wsd"))):
    if config[key] not in choices:
        raise ValueError(f"{key}={config[key]!r} is none of {', '.join(map(repr, choices))}")
COLUMNS = "iter train_loss val_loss loss lr grad_norm tokens_per_s time_ms mfu".split()
TRAIN, EVAL_TRAIN, EVAL_VAL, DROPOUT = range(4)  # streams of random numbers

# ---- processes ----

rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
master = rank == 0  # the one that prints, logs and writes
stop_signal = 0


def on_signal(number, frame):
    """Asks the loop to stop after this update. A second Ctrl-C stops at once; torchrun passes on each one twice."""
    global stop_signal
    if number == stop_signal == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise KeyboardInterrupt
    stop_signal = number


if not eval_only:  # there is something to save
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
if gradient_accumulation_steps % world_size:
    raise ValueError(f"gradient_accumulation_steps={gradient_accumulation_steps} cannot be shared by {world_size} processes: "
                     f"choose a multiple of {world_size}")
micros = range(rank, gradient_accumulation_steps, world_size)  # the micro-batches of this process
rows_per_iter = gradient_accumulation_steps * batch_size

# ---- what to start from ----

paths = {name: os.path.join(out_dir, name) for name in ("ckpt.pt", "last.pt")}
found = [path for path in paths.values() if os.path.exists(path)]
checkpoint = None
if init_from == "resume" and not found:
    raise ValueError(f"init_from='resume', but {out_dir!r} holds no ckpt.pt: start with --init_from=scratch, or name its --out_dir")
if init_from in ("resume", "auto") and found:
    checkpoint = max(map(load_checkpoint, found), key=lambda checkpoint: checkpoint["iter_num"])
    if dtype == "auto":
        dtype = checkpoint["config"].get("dtype", "auto")

# ---- device ----

device, dtype, compile = setup_device(device, dtype, compile, deterministic)
device_type = device.split(":")[0]
torch.set_float32_matmul_precision("high" if device_type == "cuda" else "highest")  # TF32 where float32 matrices are left
autocast = contextlib.nullcontext() if dtype == "float32" else torch.autocast(device_type, dtype=getattr(torch, dtype))
if backend == "auto":
    backend = "nccl" if device_type == "cuda" else "gloo"
if backend not in ("gloo", "nccl") or (backend == "nccl" and device_type != "cuda" and world_size > 1):
    raise ValueError(f"backend={backend!r} does not fit device={device!r}: choose 'gloo' for CPUs, 'nccl' for GPUs")
if world_size > 1:
    store, _, _ = next(dist.rendezvous("env://"))
    # note: torchrun's own store outlives a restart of the workers, who would find the addresses of the dead in it
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT") if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
    # CPU tensors, which carry the flags of each iteration, always go by gloo
    dist.init_process_group(f"cpu:gloo,cuda:{backend}" if device_type == "cuda" else "gloo", rank=rank, world_size=world_size,
                            store=dist.PrefixStore(f"attempt{attempt}", store))

# ---- data ----

meta = read_meta(dataset)
if checkpoint:
    block_size = checkpoint["model_args"]["block_size"]
for split in ("train", "val"):
    open_ids(dataset, split, block_size)  # fails before the model is built, not after


def draw(stream, i, count, micro=0):
    """`count` random 64-bit numbers, a pure function of (seed, stream, i, micro): Philox is counter-based (Salmon et al. 2011)."""
    return np.random.Philox(key=(seed, stream), counter=(0, 0, micro, i)).random_raw(count)


def get_batch(split, stream, i, rows=batch_size, micro=0):
    """
    Micro-batch `micro` of the `rows` rows of iteration `i` in `stream` (by default there is one): ids and the ids one
    position on, each (batch_size, block_size), on the device. The map is made anew each time: an old one keeps all it has read in memory.
    """
    data = open_ids(dataset, split, block_size)
    # the modulo favours low offsets by under 1e-9; unlike numpy's integers(), it stays the same in every version
    offsets = draw(stream, i, rows)[micro * batch_size:(micro + 1) * batch_size] % (len(data) - block_size)
    ids = to_device(data, data[offsets.astype(np.int64)[:, None] + np.arange(block_size + 1)].astype(np.int64))
    return ids[:, :-1], ids[:, 1:]


def get_stretch(split, k, tokens):
    """
    Micro-batch `k` of the first `tokens` ids of a split, one block after the other, as from `get_batch`; past the end the
    ids are 0, and those to predict -1.
    """
    data = open_ids(dataset, split, block_size)
    places = (np.arange(batch_size)[:, None] + k * batch_size) * block_size + np.arange(block_size + 1)
    ids = to_device(data, np.where(places < tokens, data[np.minimum(places, tokens - 1)].astype(np.int64), -1))
    return ids.clamp(min=0)[:, :-1], ids[:, 1:]  # strides as above: the compiler goes by them


def to_device(data, ids):
    """Rows of block_size + 1 ids read from `data`, checked against the vocabulary, on the device."""
    if ids.max() >= model.config.vocab_size:
        raise ValueError(f"{data.filename} has the id {ids.max()}, the model a vocabulary of {model.config.vocab_size}: {remedy(dataset)}")
    ids = torch.from_numpy(ids)
    return ids.pin_memory().to(device, non_blocking=True) if device_type == "cuda" else ids.to(device)


def agree(*flags):
    """The highest of each flag over all processes."""
    flags = torch.tensor(flags, dtype=torch.int32)  # on the CPU, so by gloo
    if world_size > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags.tolist()


# ---- model ----

iter_num, best_val_loss, skipped, skipped_in_a_row, wandb_id = 0, 1e9, 0, 0, None
torch.manual_seed(seed)
if checkpoint:
    model = GPT.from_checkpoint(checkpoint, dropout)
    iter_num, best_val_loss = checkpoint["iter_num"], checkpoint["best_val_loss"]
    (skipped, skipped_in_a_row), wandb_id = checkpoint["skipped"], checkpoint.get("wandb_id")
    skipped_in_a_row %= 10  # a run that stopped for it gets as many again
elif init_from in ("scratch", "auto"):
    vocab_size = meta["vocab_size"] if meta else 50304
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias))
else:
    model = GPT.from_pretrained(init_from, dict(dropout=dropout))
    model.crop_block_size(block_size)
saved_at = iter_num if checkpoint else None  # the iteration that this run's newest checkpoint holds, None before the first
config.update({key: value for key, value in vars(model.config).items() if key in config},
              device=device, dtype=dtype, compile=compile, backend=backend)
model.to(device)

# ---- optimizer ----

optimizers = {"optimizer": model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, optimizer_type)}
if optimizer_type == "muon":
    optimizers["muon"] = model.configure_muon(weight_decay, learning_rate)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
if checkpoint:
    for name, optimizer in optimizers.items():
        load_optimizer(optimizer, checkpoint.get(name))
    scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())
    for key, old in checkpoint["config"].items():
        if master and key in config and config[key] != old and key not in ("init_from", "eval_only", "device", "compile", "backend"):
            print(f"note: {key} was {old!r}, and is {config[key]!r} from here on")
    checkpoint = None  # frees it

if world_size > 1:  # say so now, not by a hang later
    mine = (iter_num, {key: value for key, value in config.items() if not key.startswith(("device", "wandb"))})
    theirs = [None] * world_size
    dist.all_gather_object(theirs, mine)
    for other, its in enumerate(theirs):
        if its != mine:
            raise ValueError(f"process {other} starts at iteration {its[0]} with other settings or files than process "
                             f"{rank} (iteration {iter_num}): start all alike, with out_dir on storage that all share")


def wrap(module):
    """`module` for several processes, if there are."""
    return DDP(module, gradient_as_bucket_view=True, find_unused_parameters=deterministic) if world_size > 1 else module


if dropout > 0:
    torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper GPUs it may round dropout to sixteenths
    if compile:
        torch._dynamo.config.optimize_ddp = False  # its parts of the graph would draw other masks than the whole in one process
compiled = torch.compile(model) if compile else model
wrapped = wrap(compiled)  # `model` stays the bare one, which is saved
if compile:  # the first passes compile: they are tried here, on a batch that counts for nothing
    failure, trial = "", get_batch("train", TRAIN, 0)
    try:
        with autocast, torch.no_grad():
            compiled.eval()(*trial)
        compiled.train()
        with wrapped.no_sync() if world_size > 1 else contextlib.nullcontext(), autocast:
            wrapped(*trial)[1].backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler may raise
        failure = f"{type(error).__name__}: {error}".strip().split("\n")[0]
    config["compile"] = not agree(bool(failure))[0]
    if not config["compile"]:
        if master or failure:
            print(f"compiling failed, going on without, as --compile=False does: {failure}", file=sys.stderr)
        compiled, wrapped = model.train(), wrap(model)
    model.zero_grad()

# ---- evaluation, logging, saving ----


@torch.no_grad()
def estimate_loss():
    """Mean loss of the same batches each time, shared by all processes: {'train': loss, 'val': loss}."""
    means = {}
    compiled.eval()
    for split, stream in (("train", EVAL_TRAIN), ("val", EVAL_VAL)):
        tokens = min(len(open_ids(dataset, name, block_size)) for name in (split, "val"))
        batches = eval_iters or (tokens - 1) / (batch_size * block_size)  # of which the last is a part of one
        losses = torch.zeros(math.ceil(batches), device=device)
        for k in tqdm(range(rank, len(losses), world_size), f"evaluating on {split}", leave=False, delay=2,
                      disable=not (master and sys.stderr.isatty())):
            x, y = get_batch(split, stream, k) if eval_iters else get_stretch(split, k, tokens)
            with autocast:
                losses[k] = compiled(x, y)[1] * (y >= 0).float().mean()  # a short batch counts by its share
        if world_size > 1:
            dist.all_reduce(losses)  # each one plus zeros: the mean is bitwise that of one process
        means[split] = losses.cpu().double().sum().item() / batches
    compiled.train()
    return means


def get_lr(i):
    """
    Learning rate of update `i`: up in a line, then down to min_lr by half a cosine (Loshchilov & Hutter 2017), or constant
    and, over the last decay_share of lr_decay_iters, down in a line (Hu et al. 2024, MiniCPM).
    """
    if not decay_lr:
        return learning_rate
    if i < warmup_iters:
        return learning_rate * ((i + 1) / (warmup_iters + 1))
    decay = lr_decay_iters - warmup_iters
    if lr_schedule == "wsd":
        decay = min(decay, decay_share * lr_decay_iters)
    left = min(1, max(0, lr_decay_iters - i) / max(1, decay))  # of the decay: from 1 to 0
    return min_lr + (learning_rate - min_lr) * (left if lr_schedule == "wsd" else (1 - math.cos(math.pi * left)) / 2)


def set_aside(path, stem, ending):
    """Renames `path`, a file of an earlier run, to the next free name stem.1.ending, stem.2.ending, …"""
    k = 1
    while os.path.exists(new := os.path.join(out_dir, f"{stem}.{k}.{ending}")):
        k += 1
    os.rename(path, new)
    print(f"kept {path}, of an earlier run, as {new}")


def save(name):
    """The master writes the state of the run as it is before update `iter_num`; 'model' and 'optimizer' above restore it."""
    global saved_at
    if not master:
        return
    log_file.flush()
    os.fsync(log_file.fileno())
    for old in ("last.pt", "ckpt.pt"):
        if saved_at is None and os.path.exists(paths[old]):
            set_aside(paths[old], "ckpt", "pt")
    saved_at = iter_num
    save_checkpoint(dict(model=model.state_dict(), model_args=vars(model.config), iter_num=iter_num,
                         best_val_loss=best_val_loss, config=config, scaler=scaler.state_dict(),
                         skipped=(skipped, skipped_in_a_row), wandb_id=wandb_id,
                         **{key: optimizer.state_dict() for key, optimizer in optimizers.items()}), paths[name])


def lock(file):
    """Keeps other runs away from `file` until it is closed, or this process ends. ValueError if one has it already."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"out_dir={out_dir!r} is in use by another run: wait for its end, or choose another folder") from None
    except (ImportError, OSError):
        pass  # Windows, and file systems without locks


# ---- ready ----

tokens_per_iter = rows_per_iter * block_size
if master:
    print(f"{model.get_num_params(False) / 1e6:.2f}M parameters, {tokens_per_iter:,} tokens an iteration, "
          f"{world_size} x {device_type} in {dtype}{', compiled' if compiled is not model else ''}, from iteration {iter_num}")
if master and not eval_only:
    log_path = os.path.join(out_dir, "log.csv")
    lines = [",".join(COLUMNS) + "\n"]
    try:
        os.makedirs(out_dir, exist_ok=True)
        if os.path.exists(log_path):
            with open(log_path, "r+", errors="replace") as file:
                lock(file)  # a row that a crash cut short, or that is to come again, goes
                lines += [line for line in file if re.match(r"\d{1,18},.*\n", line) and int(line.split(",")[0]) < iter_num]
            if saved_at is None and found:
                set_aside(log_path, "log", "csv")
        with whole(log_path) as scrap, open(scrap, "w", newline="") as file:
            file.writelines(lines)
        log_file = open(log_path, "a", newline="")
        lock(log_file)
    except OSError as error:
        raise ValueError(f"cannot write to out_dir={out_dir!r}: {error}") from None
    log = csv.DictWriter(log_file, COLUMNS, lineterminator="\n")
    if wandb_log:
        import wandb
        try:
            wandb_id = wandb.init(project=wandb_project, name=wandb_run_name, config=config, id=wandb_id, resume="allow").id
        except wandb.Error as error:
            raise ValueError(f"wandb: {error} (WANDB_MODE=offline needs no account)") from None


def record(**row):
    """Adds a row to log.csv, and to wandb, where train_loss is called train/loss, and an iteration is a step."""
    log.writerow(row)
    log_file.flush()
    if wandb_log:
        wandb.log({key.replace("_loss", "/loss"): value for key, value in row.items() if value is not None}, step=row["iter"])


# ---- the loop ----

started, first_iter = time.perf_counter(), iter_num
seconds, updates = 0.0, 0  # in updates alone, since the last log line
batches = (get_batch("train", TRAIN, i, rows_per_iter, micro) for i in range(iter_num, max_iters) for micro in micros)
batch = next(batches, None)
stop = 0
while True:
    last_step = iter_num >= max_iters
    lr = get_lr(iter_num)

    if eval_only or last_step or iter_num % eval_interval == 0:
        losses = estimate_loss()
        if master:
            print(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}", flush=True)
        if eval_only:
            break
        if master:
            record(iter=iter_num, train_loss=losses["train"], val_loss=losses["val"], lr=lr)
        improved = losses["val"] < best_val_loss
        best_val_loss = min(best_val_loss, losses["val"])
        if iter_num > 0 and (improved or always_save_checkpoint and math.isfinite(losses["val"])):
            save("ckpt.pt")
        stop, = agree(stop_signal)
    if last_step or stop:
        break

    # ---- timed from here ----
    clock = time.perf_counter()
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = lr * muon_scale if name == "muon" else lr
    total = torch.zeros((), device=device)  # stays on the device
    for micro in micros:
        if dropout > 0:
            torch.manual_seed(int(draw(DROPOUT, iter_num, 1, micro)[0]) >> 1)
        # gradients are summed over the processes once, in the backward pass of the last micro-batch
        with wrapped.no_sync() if world_size > 1 and micro != micros[-1] else contextlib.nullcontext():
            with autocast:
                loss = wrapped(*batch)[1] / len(micros)
            batch = next(batches, None)  # the next one is read while the device is at work
            scaler.scale(loss).backward()
        total += loss.detach()
    for optimizer in optimizers.values():
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    # the one wait for the device: nothing that is not finite may reach the weights, those of no process
    bad, stop = agree(not torch.isfinite(total + norm), stop_signal)
    if not bad:
        if 0 < grad_clip < norm:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, norm)
        for optimizer in optimizers.values():
            scaler.step(optimizer)
    scale = scaler.get_scale() if bad else 0
    scaler.update()
    settling = bad and scaler.get_scale() < scale >= 1  # float16's scale is still being found
    model.zero_grad()
    seconds, updates = seconds + time.perf_counter() - clock, updates + 1
    # ---- to here ----

    skipped += bad
    skipped_in_a_row = 0 if not bad else skipped_in_a_row + (not settling)
    if bad and master:
        print(f"iter {iter_num}: loss or gradient is not finite, update skipped ({skipped} so far)", flush=True)
    if iter_num % log_interval == 0:
        if world_size > 1:
            dist.all_reduce(total)
            total /= world_size
        dt, mfu = seconds / updates, model.estimate_mfu(len(micros) * batch_size, seconds / updates)
        if master:
            left = int((time.perf_counter() - started) / (iter_num + 1 - first_iter) * (max_iters - iter_num - 1))  # seconds
            print(f"iter {iter_num}: loss {total.item():.4f}, time {dt * 1000:.2f}ms, {f'mfu {mfu:.2%}, ' if mfu else ''}"
                  f"{tokens_per_iter / dt:,.0f} tokens/s, {left // 3600}h{left // 60 % 60:02}m{left % 60:02}s left", flush=True)
            record(iter=iter_num, loss=total.item(), lr=lr, grad_norm=norm.item(), tokens_per_s=tokens_per_iter / dt,
                   time_ms=dt * 1000, mfu=mfu)
        seconds, updates = 0.0, 0
    iter_num += 1
    if stop or skipped_in_a_row == 10:
        break

# ---- the end ----

if not eval_only and saved_at != iter_num:
    save("last.pt")
if master and not eval_only:
    log_file.close()
    if stop and not last_step:
        print(f"stopped by {signal.Signals(stop).name} before iteration {iter_num}; to go on, repeat the command with --init_from=resume", flush=True)
    try:
        draw_losses([out_dir], os.path.join(out_dir, "loss.png"))
    except Exception as error:  # a picture is no reason to fail
        print(f"loss.png was not drawn: {error}", file=sys.stderr)
if world_size > 1:
    agree(0)  # none leaves before the checkpoint is written: torchrun would end the others
    dist.destroy_process_group()
if skipped_in_a_row == 10 and not master:
    sys.exit(1)
if skipped_in_a_row == 10:
    raise ValueError(f"10 updates in a row were not finite, the last at iteration {iter_num - 1}; the weights from before are in "
                     f"{paths['last.pt']!r}: go on with --init_from=resume and another learning_rate, dtype or dataset")
if stop and not last_step:
    sys.exit(128 + stop)
