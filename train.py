"""
Trains a GPT, in one process or many. A run is exact: its batches, dropout and learning rates depend
on the settings alone, not on interruptions, evaluations or the number of processes.

    python train.py config/train_shakespeare_char_cpu.py                     on a laptop
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py   on 8 GPUs
    python train.py --out_dir=out --init_from=resume                         after an interruption
"""

import configurator

configurator.set_environment()  # before torch is imported

import atexit
import csv
import dataclasses
import datetime
import math
import os
import shlex
import signal
import sys
import time

import numpy as np
import torch
from tqdm import tqdm

import runtime
from checkpoint import back_up, read_checkpoint, restore, save_checkpoint, trim_log
from configurator import UserError, check_choice, check_ranges, configure, restore_settings
from data import common
from model import GPT, GPTConfig, load_model

# output
out_dir = 'out'  # for ckpt.pt, last.pt, log.csv
eval_interval = 2000  # updates between evaluations
log_interval = 1  # updates between log lines
eval_iters = 200  # batches of each split in an evaluation; 0: all of val, and as much of train
eval_only = False  # evaluate once and write nothing
always_save_checkpoint = True  # save at every evaluation; False: only when the val loss improved
init_from = 'scratch'  # 'resume', 'auto' (resume if there is a checkpoint), 'gpt2*', a folder
# wandb
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data: the global batch is gradient_accumulation_steps * batch_size sequences of block_size tokens
dataset = 'openwebtext'  # a folder in data/, or a path
gradient_accumulation_steps = 5 * 8  # micro-steps per update, shared by all processes
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence
# model
n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0  # 0 for pretraining, 0.1 or more for finetuning
bias = False  # in linear layers and layer norms
# optimizer
optimizer_type = 'adamw'  # 'muon': Muon for the matrices of the blocks, AdamW for the rest
muon_lr_scale = 2.0  # Muon's learning rate, in multiples of learning_rate
learning_rate = 6e-4  # peak
max_iters = 600000  # updates in total
weight_decay = 1e-1  # of matrices and embeddings
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0  # clip gradients to this norm; 0: off
# learning rate
decay_lr = True  # False: constant, without warm-up
warmup_iters = 2000  # updates
lr_decay_iters = 600000  # about max_iters (Hoffmann et al. 2022)
min_lr = 6e-5  # from lr_decay_iters on, about learning_rate / 10
lr_schedule = 'cosine'  # 'wsd': warm-up, stable, linear decay
decay_frac = 0.2  # the decay of 'wsd', as a fraction of lr_decay_iters
# machine: 'auto' is the best that it offers
backend = 'auto'  # 'nccl' (GPUs) or 'gloo' (CPUs)
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'bfloat16' where it is native, 'float16', 'float32'
compile = 'auto'  # True, False; 'auto': on CUDA
gradient_checkpointing = False  # recompute blocks in the backward pass: less memory, slower
# exactness
seed = 1337
deterministic = False  # bitwise reproducible on CUDA, but slower

config = configure(globals())

# ---- processes, checkpoint, settings ----

rank, local_rank, world_size = runtime.process_ranks()
master_process = rank == 0  # the one that prints, logs and saves

run_lock, checkpoint = None, None
if master_process and not eval_only and os.path.isdir(out_dir):
    run_lock = common.lock_folder(out_dir)  # before the checkpoint is read
if init_from in ("resume", "auto"):
    checkpoint = read_checkpoint(out_dir, required=init_from == "resume")
if checkpoint:
    # Settings given now win; others come from the checkpoint, except this command's own.
    not_restored = ("out_dir", "init_from", "eval_only", "device", "compile", "backend")
    restore_settings(config, checkpoint, not_restored)
    globals().update(config)

check_ranges(config, "eval_interval log_interval gradient_accumulation_steps batch_size", 1)
check_ranges(config, "eval_iters max_iters learning_rate muon_lr_scale weight_decay grad_clip "
             "warmup_iters lr_decay_iters min_lr decay_frac seed", 0)
check_ranges(config, "beta1 beta2", 0, 0.999999)
check_choice("optimizer_type", optimizer_type, ("adamw", "muon"))
check_choice("lr_schedule", lr_schedule, ("cosine", "wsd"))
if gradient_accumulation_steps % world_size != 0:
    raise UserError(f"{gradient_accumulation_steps=} is not divisible by {world_size} processes: "
                    "choose a multiple")

device, dtype, compile = runtime.setup_device(device, dtype, compile, local_rank, deterministic)
device_type = device.split(":")[0]
# With recomputed blocks, a cache of cast weights would stay in memory.
autocast = runtime.make_autocast(device, dtype, cache_enabled=not gradient_checkpointing)
backend = runtime.init_processes(rank, world_size, backend, device_type)

# ---- data ----

TRAIN, EVAL_TRAIN, EVAL_VAL, MODEL = range(4)  # streams of random bits
token_files, num_tokens = {}, {}  # by split
for split in ("train", "val"):
    # Keep the files open, so that rerunning prepare.py cannot change this run.
    token_files[split], num_tokens[split] = common.open_tokens(dataset, split, block_size)
vocabulary = common.read_vocabulary(common.dataset_folder(dataset))
data_fingerprint = common.fingerprint(dataset)
num_eval_sequences = eval_iters * batch_size  # of each split
if eval_iters == 0:
    num_eval_sequences = (min(num_tokens.values()) - 1) // block_size
micro_steps = range(rank, gradient_accumulation_steps, world_size)  # those of this process
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size


def random_bits(stream, iteration, count, micro_step=0):
    """`count` random 64-bit integers, a function of the arguments and the seed alone."""
    counter = (0, 0, micro_step, iteration)  # of a counter-based generator (Salmon et al. 2011)
    return np.random.Philox(key=(seed, stream), counter=counter).random_raw(count)


def seed_torch(stream, iteration, micro_step=0):
    """Seeds torch's generator, for dropout and whatever else a forward pass draws."""
    bits = random_bits(stream, iteration, 1, micro_step)
    torch.manual_seed(int(bits[0]) >> 1)


def load_sequences(split, offsets):
    """x, the token ids at `offsets` (B,) of a split, and y, those that follow: (B, T) each."""
    # A new map each time: an old one keeps every page that it has read in memory.
    tokens = np.memmap(token_files[split], dtype="<u2", mode="r")
    if len(tokens) < num_tokens[split]:
        raise UserError(f"{tokens.filename} was cut short: {common.prepare_hint(dataset)}")
    windows = offsets[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    ids = tokens[windows].astype(np.int64)
    if ids.max() >= vocabulary["vocab_size"]:
        raise UserError(f"{tokens.filename} has the token id {ids.max()}, but a vocabulary of "
                        f"{vocabulary['vocab_size']}: {common.prepare_hint(dataset)}")
    ids = torch.from_numpy(ids)
    if device_type == "cuda":  # elsewhere an asynchronous copy may outlive its source
        ids = ids.pin_memory().to(device, non_blocking=True)
    ids = ids.to(device)
    return ids[:, :-1], ids[:, 1:]


def get_batch(split, stream, iteration, micro_step=0):
    """A micro-batch of an iteration: x and y (batch_size, block_size)."""
    # Random bits are those of the global batch, so any process can load any part of it.
    first = micro_step * batch_size
    bits = random_bits(stream, iteration, first + batch_size)[first:]  # (B,)
    # Modulo favours low offsets by less than 1e-9; all versions of numpy agree on it.
    offsets = (bits % (num_tokens[split] - block_size)).astype(np.int64)
    return load_sequences(split, offsets)


# ---- model and optimizers ----

torch.manual_seed(seed)
if checkpoint:
    model_tokenizer = common.run_tokenizer(checkpoint)
    model_args = dict(checkpoint["model_args"], dropout=dropout)
    model = GPT.from_state(model_args, checkpoint["model"])
elif init_from in ("scratch", "auto"):
    vocab_size = 50304 if vocabulary == common.GPT2 else vocabulary["vocab_size"]
    model_args = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size,
                      bias=bias, vocab_size=vocab_size, dropout=dropout)
    model = GPT(GPTConfig(**model_args))
    model_tokenizer = vocabulary["tokenizer"]
else:
    model, _ = load_model(init_from, out_dir, dropout=dropout)
    model.train().crop_block_size(block_size)
    model_tokenizer = common.read_vocabulary(init_from, common.UNKNOWN)["tokenizer"]
model.to(device)
model.gradient_checkpointing = gradient_checkpointing
model_args = dataclasses.asdict(model.config)
config.update(model_args, device=device, dtype=dtype, compile=compile, backend=backend)
common.check_vocabulary(dataset, vocabulary, model.config.vocab_size, model_tokenizer)

# What a run carries from one update to the next. Whatever is added, a thing with a state_dict or a
# plain value, is saved in checkpoints and restored.
state = dict(
    model=model,
    optimizer=model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type,
                                         optimizer_type),
    scaler=torch.amp.GradScaler(device_type, enabled=dtype == "float16"),
    iter_num=0,  # updates so far
    best_val_loss=math.inf,
    wandb_id=None,
)
if optimizer_type == "muon":
    state["muon"] = model.configure_muon(weight_decay, learning_rate, muon_lr_scale)
saved_iter = None  # of the latest ckpt.pt or last.pt
if checkpoint:
    restore(state, checkpoint)
    saved_iter = state["iter_num"]
    if not checkpoint["data"].items() <= data_fingerprint.items():
        print(f"note: {dataset!r} is not the checkpoint's data set; the best val loss starts anew")
        state["best_val_loss"] = math.inf
    checkpoint = None  # frees the memory
scaler = state["scaler"]
optimizers = [value for value in state.values() if isinstance(value, torch.optim.Optimizer)]

may_differ = ("out_dir", "dataset", "device", "wandb_run_name")  # paths, a time in a name
settings = {key: config[key] for key in config.keys() - may_differ}
runtime.check_same(iter_num=state["iter_num"], settings=settings, data=data_fingerprint)

compiled_model = torch.compile(model) if compile else model
ddp_model = compiled_model if eval_only else runtime.wrap_ddp(compiled_model, dropout)

# ---- evaluation and learning rate ----


@torch.no_grad()
def estimate_loss():
    """{'train': loss, 'val': loss}, means over the same batches each time; None after a signal."""
    num_batches = math.ceil(num_eval_sequences / batch_size)
    results = torch.zeros(3, num_batches, device=device)  # losses on train, on val, stop flag
    compiled_model.eval()
    runtime.sync_buffers(model)
    for row, (split, stream) in enumerate([("train", EVAL_TRAIN), ("val", EVAL_VAL)]):
        my_batches = range(rank, num_batches, world_size)
        for k in tqdm(my_batches, f"evaluating on {split}", leave=False, delay=2, disable=None):
            if runtime.stop_requested():
                break
            if eval_iters > 0:
                x, y = get_batch(split, stream, k)
            else:  # in order; what fills up the last batch has targets of -1, which don't count
                numbers = np.arange(k * batch_size, (k + 1) * batch_size)
                numbers = np.minimum(numbers, num_eval_sequences - 1)
                x, y = load_sequences(split, numbers * block_size)
                y = y.clone()  # x and y share memory
                y[num_eval_sequences - k * batch_size:] = -1
            seed_torch(stream, k)
            with autocast:
                _, loss = compiled_model(x, y)
            results[row, k] = loss * (y >= 0).float().mean()  # a filled-up batch counts for less
    compiled_model.train()
    results[2] = float(runtime.stop_requested())
    # Each batch has its loss from one process and zeros from the others: any number sums alike.
    sums = runtime.all_reduce_sum(results).cpu().double().sum(dim=1)
    train_loss, val_loss, stop_flag = (sums / (num_eval_sequences / batch_size)).tolist()
    return None if stop_flag > 0 else {"train": train_loss, "val": val_loss}


def get_lr(iteration):
    """
    Linear warm-up, then half a cosine down to min_lr (Loshchilov & Hutter 2017), or for 'wsd'
    constant, then a linear decay (Hu et al. 2024).
    """
    if not decay_lr:
        return learning_rate
    if iteration < warmup_iters:
        return learning_rate * ((iteration + 1) / (warmup_iters + 1))
    decay_iters = lr_decay_iters - warmup_iters
    if lr_schedule == "wsd":
        decay_iters = min(decay_iters, decay_frac * lr_decay_iters)
    iters_left = max(0, lr_decay_iters - iteration)
    remaining = min(1, iters_left / max(1, decay_iters))  # fraction of the decay, from 1 to 0
    if lr_schedule == "cosine":
        remaining = (1 - math.cos(math.pi * remaining)) / 2
    return min_lr + (learning_rate - min_lr) * remaining


# ---- logging and saving ----

COLUMNS = "iter train_loss val_loss loss lr grad_norm tokens_per_s time_ms mfu".split()
log_path = os.path.join(out_dir, "log.csv")
is_good = True  # the weights may be saved: not in mid-update, and losses are finite
skipped_in_a_row = 0  # updates that were not finite
# copies from before the update under way: a forward pass may change them
buffers = [buffer.clone() for buffer in model.buffers()]
wandb_run = None


def log_metrics(**row):
    """Adds a row to log.csv, and to wandb, with train_loss as train/loss."""
    if not master_process:
        return
    try:
        with open(log_path, "a") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
    except OSError as error:
        print(f"note: cannot write {log_path}: {error}")
    if wandb_run:
        wandb_run.log({key.replace("_loss", "/loss"): value for key, value in row.items()})


def save(name, on_any_process=False):
    """Writes the state of the run to `name` in out_dir. A resume reads ckpt.pt and last.pt only."""
    global saved_iter
    if master_process or on_any_process:
        save_checkpoint(os.path.join(out_dir, name), state, model_args=model_args, config=config,
                        tokenizer=vocabulary["tokenizer"], data=data_fingerprint)
        if name in ("ckpt.pt", "last.pt"):
            saved_iter = state["iter_num"]


def save_after_error():
    """Writes last.pt after an error in the loop, so that no finished update is lost."""
    if is_good and state["iter_num"] not in (0, saved_iter):
        for buffer, old in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(old)
        save("last.pt", on_any_process=True)  # rank 0 may be stuck
        print(f"saved last.pt before iteration {saved_iter}", file=sys.stderr)


# ---- start ----

print(f"{model.get_num_params(non_embedding=False) / 1e6:.2f}M parameters, {tokens_per_iter:,} "
      f"tokens per iteration, {world_size} x {device_type} in {dtype}, {compile=}, "
      f"{torch.get_num_threads()} threads, from iteration {state['iter_num']}")
if decay_lr and min_lr == 0 and lr_decay_iters < max_iters:
    print(f"note: max_iters={max_iters}, but the learning rate is 0 from {lr_decay_iters=} on")
if not eval_only:
    if master_process:
        run_lock = run_lock or common.lock_folder(out_dir)
        if wandb_log:
            wandb_run = runtime.start_wandb(wandb_project, wandb_run_name, config, state)
        if saved_iter is None:
            back_up(out_dir)
        trim_log(log_path, COLUMNS, state["iter_num"])
    state["wandb_id"] = runtime.broadcast(state["wandb_id"])
    runtime.catch_signals()
    atexit.register(save_after_error)  # does nothing at a normal end

# ---- the loop ----

first_iter = state["iter_num"]
resume_command = f"python train.py --out_dir={shlex.quote(out_dir)} --init_from=resume"
num_updates = 0  # since the last log line
start_time = t0 = time.perf_counter()  # t0: of the last log line, without evaluations
x, y = get_batch("train", TRAIN, first_iter, micro_steps[0])
while True:
    iter_num = state["iter_num"]
    last_step = iter_num >= max_iters
    lr = get_lr(iter_num)

    # Evaluate, and save the best model or the latest.
    if eval_only or last_step or iter_num % eval_interval == 0:
        runtime.synchronize(device)  # the optimizer's work is part of the update
        eval_start = time.perf_counter()
        losses = estimate_loss()
        stopping = losses is None
        if stopping:  # the evaluation is repeated on resume
            break
        line = f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
        if eval_iters == 0:
            bpb = common.bits_per_byte(losses["val"], vocabulary["tokenizer"], token_files["val"],
                                       num_eval_sequences * block_size)
            line += f", {bpb:.4f} bits per byte" if bpb else ""
        if eval_only:
            print(line)
            break
        is_good = math.isfinite(losses["val"]) and skipped_in_a_row == 0
        # <=, not <: if saving ckpt.pt fails, the resumed run meets the same loss again.
        is_best = is_good and losses["val"] <= state["best_val_loss"]
        if is_best:
            state["best_val_loss"] = losses["val"]
        if is_best and iter_num > 0:
            save("ckpt.pt")
            line += ", saved ckpt.pt"
        elif always_save_checkpoint and is_good and iter_num > 0 and saved_iter != iter_num:
            save("last.pt")
            line += ", saved last.pt"
        print(line)
        log_metrics(iter=iter_num, train_loss=losses["train"], val_loss=losses["val"], lr=lr)
        t0 += time.perf_counter() - eval_start
    if last_step:
        break

    # ---- forward and backward ----
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
    loss_sum = torch.zeros((), device=device)
    for micro_step in micro_steps:
        is_last_micro_step = micro_step == micro_steps[-1]
        if world_size > 1:  # gradients are averaged once, in the last backward pass
            ddp_model.require_backward_grad_sync = is_last_micro_step
        seed_torch(MODEL, iter_num, micro_step)
        with autocast:
            _, micro_loss = ddp_model(x, y)
            micro_loss = micro_loss / len(micro_steps)
        # Fetch the next batch while the device is busy with this one.
        if is_last_micro_step:
            x, y = get_batch("train", TRAIN, iter_num + 1, micro_steps[0])
        else:
            x, y = get_batch("train", TRAIN, iter_num, micro_step + world_size)
        scaler.scale(micro_loss).backward()
        loss_sum += micro_loss.detach()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    total_norm = torch.nn.utils.get_total_norm(
        [p.grad for p in model.parameters() if p.grad is not None])

    # The one collective besides the gradients', and the one wait for the device.
    stop_flag = torch.full((), float(runtime.stop_signal > 0), device=device)
    stats = runtime.all_reduce_sum(torch.stack([loss_sum, total_norm, stop_flag]))
    loss, grad_norm, stop_share = (stats / world_size).tolist()
    stopping = stop_share > 0
    num_updates += 1

    # Log before the weights change: log.csv then has the rows of all updates in a checkpoint.
    if iter_num % log_interval == 0:
        t1 = time.perf_counter()
        dt = (t1 - t0) / num_updates  # seconds per update
        t0, num_updates = t1, 0
        tokens_per_s = tokens_per_iter / dt
        mfu = model.estimate_mfu(len(micro_steps) * batch_size, dt)
        line = f"iter {iter_num}: loss {loss:.4f}, time {dt * 1000:.2f}ms"
        if not math.isnan(mfu):
            line += f", mfu {mfu:.2%}"
        line += f", {tokens_per_s:,.0f} tokens/s"
        if iter_num > first_iter:  # the first is slow
            eta = datetime.timedelta(seconds=int((max_iters - iter_num - 1) * dt))
            line += f", {eta} left"
        log_metrics(iter=iter_num, loss=loss, lr=lr, grad_norm=grad_norm,
                    tokens_per_s=tokens_per_s, time_ms=dt * 1000, mfu=mfu)
        print(line)

    # ---- the update: an error in here leaves weights that belong to no iteration ----
    is_good = False
    if math.isfinite(loss + grad_norm):
        if grad_clip > 0 and grad_norm > grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, total_norm)
        for optimizer in optimizers:
            scaler.step(optimizer)
        skipped_in_a_row = 0
    else:  # on all processes: what is not finite must not reach the weights
        skipped_in_a_row += 1
        print(f"iter {iter_num}: gradient not finite, update skipped ({skipped_in_a_row} in a row)")
    scaler.update()
    state["iter_num"] += 1
    buffers = [buffer.clone() for buffer in model.buffers()]
    is_good = skipped_in_a_row == 0
    # ---- to here ----
    model.zero_grad()
    if skipped_in_a_row == 25 and master_process:  # float16 skips up to 17 to find its scale
        raise UserError(f"not finite at iteration {iter_num}; to go on from iteration "
                        f"{saved_iter or 0} with a lower rate or in float32: {resume_command}")
    if stopping:
        break

# ---- the end ----

exit_code = 0 if stopping or math.isfinite(losses["val"]) else 1
if not eval_only:
    if is_good and saved_iter != state["iter_num"]:
        save("last.pt")
    print(f"best val loss {state['best_val_loss']:.4f}, "
          f"time {datetime.timedelta(seconds=int(time.perf_counter() - start_time))}")
    if stopping:
        number = runtime.stop_signal or signal.SIGTERM  # another process may have got it
        exit_code = 128 + number
        print(f"stopped by {signal.Signals(number).name}; to go on from iteration "
              f"{saved_iter or 0}: {resume_command}")
    elif is_good:
        print(f"to sample: python sample.py --out_dir={shlex.quote(out_dir)}")
if wandb_run:
    wandb_run.finish(exit_code)
runtime.close(exit_code, device)
