"""
Trains a GPT, in one process or many. A run is exact: its batches, dropout and learning rates depend
on the settings alone, not on interruptions, evaluations or the number of processes.

    python train.py config/train_shakespeare_char_cpu.py                     on a laptop
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py   on 8 GPUs
    python train.py --out_dir=out --init_from=resume                         after an interruption
"""

import contextlib
import csv
import datetime
import math
import os
import shlex
import shutil
import signal
import sys
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from tqdm import tqdm

import runtime
from checkpoint import back_up, load_optimizer, newest_checkpoint, save_checkpoint
from configurator import UserError, check_type, configure, given_settings
from data.common import fingerprint, lock_folder, open_tokens, prepare_hint, read_meta
from model import GPT, GPTConfig
from plot import draw_losses

# output
out_dir = 'out'  # for ckpt.pt, last.pt, log.csv, loss.png
eval_interval = 2000  # updates between evaluations
log_interval = 1  # updates between log lines
eval_iters = 200  # batches of each split in an evaluation; 0: all of val, and as much of train
eval_only = False  # evaluate once and write nothing
always_save_checkpoint = True  # save at every evaluation; False: only when the val loss improved
init_from = 'scratch'  # 'resume', 'auto' (resume if there is a checkpoint), 'gpt2*', or a folder
# wandb
wandb_log = False
wandb_project = 'owt'
wandb_run_name = 'gpt2'
# data: the global batch is gradient_accumulation_steps * batch_size sequences of block_size tokens
dataset = 'openwebtext'  # a folder in data/, or an absolute path
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
# machine
backend = 'auto'  # 'nccl' (GPUs) or 'gloo' (CPUs)
device = 'auto'  # 'cpu', 'cuda', 'cuda:1', 'mps'
dtype = 'auto'  # 'bfloat16' where it is native, 'float16', 'float32'
compile = 'auto'  # True, False; 'auto': on CUDA
# exactness
seed = 1337
deterministic = False  # bitwise on CUDA, slower; on CPUs needed only from four processes on

config = configure(globals())

# ---- starting point ----

rank, local_rank, world_size = runtime.process_ranks()
master_process = rank == 0  # the one that prints, logs and saves
if not master_process:
    sys.stdout = open(os.devnull, "w")
    warnings.simplefilter("ignore")
on_terminal = master_process and sys.stderr.isatty()
if master_process and not eval_only:
    run_lock = lock_folder(out_dir)  # before the checkpoint is read

checkpoint = None
if init_from in ("resume", "auto"):
    checkpoint = newest_checkpoint(out_dir)
    if checkpoint is None and init_from == "resume":
        raise UserError(f"there is no ckpt.pt in out_dir={out_dir!r} to resume from: name another "
                         "--out_dir, or start with --init_from=scratch")
if checkpoint:
    # Given settings win, the others come from the checkpoint, except those of this machine.
    machine_settings = ("out_dir", "init_from", "eval_only", "device", "compile", "backend")
    for key, old_value in (checkpoint["config"] | checkpoint["model_args"]).items():
        if key not in config or key in machine_settings:
            continue
        is_shape = key in checkpoint["model_args"] and key != "dropout"
        is_changed = key in given_settings and config[key] != old_value
        if is_changed and is_shape:
            print(f"note: {key} stays {old_value!r}: the model's shape is the checkpoint's")
        elif is_changed:
            print(f"note: {key} was {old_value!r} and is {config[key]!r} from here on")
            continue
        config[key] = check_type(key, old_value, config[key])
    globals().update(config)

AT_LEAST_1 = "eval_interval log_interval gradient_accumulation_steps batch_size block_size".split()
for key, value in config.items():
    if type(value) in (int, float):
        minimum = 1 if key in AT_LEAST_1 else 0
        maximum = 1 if key in ("dropout", "beta1", "beta2") else 2 ** 31
        if not minimum <= value < maximum:
            raise UserError(f"{key}={value} must be at least {minimum} and below {maximum}")
if optimizer_type not in ("adamw", "muon"):
    raise UserError(f"optimizer_type={optimizer_type!r} is none of 'adamw', 'muon'")
if lr_schedule not in ("cosine", "wsd"):
    raise UserError(f"lr_schedule={lr_schedule!r} is none of 'cosine', 'wsd'")

# ---- processes and device ----

if gradient_accumulation_steps % world_size != 0:
    raise UserError(f"gradient_accumulation_steps={gradient_accumulation_steps} is not divisible "
                     f"by {world_size} processes: choose a multiple of {world_size}")
device, dtype, compile = runtime.setup_device(device, dtype, compile, local_rank, deterministic)
device_type = device.split(":")[0]
autocast = runtime.make_autocast(device, dtype)
backends = ("nccl", "gloo") if device_type == "cuda" else ("gloo",)
if backend == "auto":
    backend = backends[0]
if backend not in backends:
    raise UserError(f"backend={backend!r} must be 'gloo', or 'nccl' with GPUs")
runtime.init_processes(rank, world_size, backend)

# ---- signals ----

stop_signal = 0


def on_signal(number, frame):
    """Asks the loop to stop after this update. A second Ctrl-C ends the process."""
    global stop_signal
    is_second_ctrl_c = number == signal.SIGINT and stop_signal == signal.SIGINT
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # it passes every Ctrl-C on twice
    if is_second_ctrl_c and not under_torchrun:
        raise KeyboardInterrupt
    stop_signal = number
    if master_process:
        with contextlib.suppress(OSError):
            os.write(2, b"finishing the current update, then saving (Ctrl-C again: quit now)\n")


def say(text):
    """Prints a line. A closed pipe saves and stops the run: Ctrl-C also ends `| tee log`."""
    try:
        print(text, flush=True)
    except OSError:
        if stop_signal == 0:
            on_signal(signal.SIGTERM, None)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if not eval_only:
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    # Windows has no SIGHUP, and under nohup it stays ignored
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, on_signal)

# ---- data ----

TRAIN, EVAL_TRAIN, EVAL_VAL, DROPOUT = range(4)  # streams of random bits
meta = read_meta(dataset)
itos = meta.get("itos", {}) if meta else None  # the characters; {}: an unknown tokenizer's tokens
data_vocab_size = meta["vocab_size"] if meta else 50257  # without meta.pkl, GPT-2's tokens
splits = {split: open_tokens(dataset, split, block_size) for split in ("train", "val")}
# Kept open: a run goes on with its own data if the data set is made anew under it.
token_files = {split: open(tokens.filename, "rb") for split, tokens in splits.items()}
data_fingerprint = fingerprint(dataset)
num_eval_sequences = eval_iters * batch_size  # of each split
if eval_iters == 0:
    num_eval_sequences = (min(map(len, splits.values())) - 1) // block_size
micro_steps = range(rank, gradient_accumulation_steps, world_size)  # those of this process
tokens_per_iter = gradient_accumulation_steps * batch_size * block_size


def random_bits(stream, iteration, count, micro_step=0):
    """`count` random 64-bit integers, a function of the arguments and the seed alone."""
    counter = (0, 0, micro_step, iteration)  # of a counter-based generator (Salmon et al. 2011)
    return np.random.Philox(key=(seed, stream), counter=counter).random_raw(count)


def load_sequences(split, offsets):
    """x, the token ids at `offsets` (B,) of a split, and y, those that follow: (B, T) each."""
    # A new memory map each time: an old one keeps every page that it has read in memory.
    tokens = np.memmap(token_files[split], dtype="<u2", mode="r")
    windows = offsets[:, None] + np.arange(block_size + 1)  # (B, T + 1)
    ids = tokens[windows].astype(np.int64)
    if ids.max() >= data_vocab_size:
        raise UserError(f"{tokens.filename} has the token id {ids.max()}, but a vocabulary of "
                         f"{data_vocab_size}: {prepare_hint(dataset)}")
    ids = torch.from_numpy(ids)
    on_cuda = device_type == "cuda"
    if on_cuda:
        ids = ids.pin_memory()
    # note: MPS would read memory that is not pinned too late, after it was freed
    ids = ids.to(device, non_blocking=on_cuda)
    return ids[:, :-1], ids[:, 1:]


def get_batch(split, stream, iteration, micro_step=0):
    """A micro-batch of an iteration: x and y (batch_size, block_size)."""
    # The global batch has one sequence of random bits, so any process can load any part of it.
    first = micro_step * batch_size
    bits = random_bits(stream, iteration, first + batch_size)[first:]  # (B,)
    # Modulo favours low offsets by less than 1e-9, and is the same in every version of numpy.
    offsets = (bits % (len(splits[split]) - block_size)).astype(np.int64)
    return load_sequences(split, offsets)


def get_sequential_batch(split, k):
    """Batch `k` of a split, read in order; the last one may have fewer sequences."""
    first = k * batch_size
    sequences = np.arange(first, min(first + batch_size, num_eval_sequences))
    return load_sequences(split, sequences * block_size)


# ---- model and optimizers ----

torch.manual_seed(seed)
if checkpoint:
    model_args = dict(checkpoint["model_args"], dropout=dropout)
    model = GPT.from_state(model_args, checkpoint["model"])
elif init_from in ("scratch", "auto"):
    vocab_size = meta["vocab_size"] if meta else 50304  # 50257, padded to a multiple of 64
    model_args = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size,
                      bias=bias, vocab_size=vocab_size, dropout=dropout)
    model = GPT(GPTConfig(**model_args))
else:
    model = GPT.from_pretrained(init_from, dict(dropout=dropout))
    model.crop_block_size(block_size)
model.to(device)
model_args = vars(model.config)
is_padded_gpt2 = meta is None and model.config.vocab_size == 50304
if model.config.vocab_size != data_vocab_size and not is_padded_gpt2:
    raise UserError(f"the model has a vocabulary of {model.config.vocab_size}, the data set "
                     f"{dataset!r} one of {data_vocab_size}: use a data set of the same tokenizer")
config.update(model_args, device=device, dtype=dtype, compile=compile, backend=backend)

betas = (beta1, beta2)
adamw = model.configure_optimizers(weight_decay, learning_rate, betas, device_type, optimizer_type)
optimizers = {"optimizer": adamw}  # by their keys in a checkpoint
if optimizer_type == "muon":
    optimizers["muon"] = model.configure_muon(weight_decay, learning_rate)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")

# What a run carries from one update to the next, besides the weights; `save` writes it.
new_run = dict(iter_num=0, best_val_loss=1e9, best_iter=None, skipped=0, skipped_in_a_row=0,
               wandb_id=None)
start = checkpoint or new_run
iter_num = start["iter_num"]  # updates so far
best_val_loss = start["best_val_loss"]
best_iter = start["best_iter"]
skipped = start["skipped"]  # updates that were not finite
skipped_in_a_row = start["skipped_in_a_row"]
wandb_id = start["wandb_id"]
saved_iter = iter_num if checkpoint else None  # the iteration of the latest checkpoint
evaluations_changed = False  # since the checkpoint, so that losses cannot be compared
if checkpoint:
    for key, optimizer in optimizers.items():
        load_optimizer(optimizer, checkpoint.get(key))
    if checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])
    if checkpoint["data"] and checkpoint["itos"] != itos:
        raise UserError(f"the data set {dataset!r} has other characters than the checkpoint: "
                         "resume with its own data set, or start anew")
    is_same_data = checkpoint["data"] in (None, data_fingerprint)
    if not is_same_data:
        print(f"note: the data set {dataset!r} is not the one that the checkpoint was trained on")
    old = config | checkpoint["config"]
    changed = [key for key in ("eval_iters", "batch_size", "seed") if old[key] != config[key]]
    evaluations_changed = not is_same_data or len(changed) > 0
    if evaluations_changed:
        print("note: evaluations change, so the best val loss starts anew")
        best_val_loss, best_iter = 1e9, None
    checkpoint = start = None  # frees it

if world_size > 1:
    may_differ = ("out_dir", "dataset", "device", "wandb_run_name")  # paths, a time in a name
    settings = {key: value for key, value in config.items() if key not in may_differ}
    states = [None] * world_size
    dist.all_gather_object(states, (iter_num, model_args, settings, data_fingerprint))
    if any(state != states[0] for state in states):
        raise UserError("the processes differ in their checkpoints, settings or data: give all "
                         "of them the same ones, and an out_dir on shared storage")

if dropout > 0:
    torch.backends.cuda.enable_cudnn_sdp(False)  # on Hopper it may round dropout to sixteenths
    if compile:
        torch._dynamo.config.optimize_ddp = False  # splitting the graph would change dropout masks
# dynamic=False: a shorter batch in an evaluation must not change the graph for training
compiled_model = torch.compile(model, dynamic=False) if compile else model
ddp_model = compiled_model
if world_size > 1 and not eval_only:
    # note: find_unused_parameters keeps DDP from changing its buckets, and so the order of sums
    ddp_model = DDP(compiled_model, gradient_as_bucket_view=True,
                    find_unused_parameters=deterministic)

# ---- evaluation ----


@torch.no_grad()
def estimate_loss():
    """{'train': loss, 'val': loss}, each the mean over the same batches every time."""
    num_batches = math.ceil(num_eval_sequences / batch_size)
    next_report = time.perf_counter() + 60  # seconds
    means = {}
    my_batches = range(rank, num_batches, world_size)
    compiled_model.eval()
    for split, stream in (("train", EVAL_TRAIN), ("val", EVAL_VAL)):
        batch_losses = torch.zeros(num_batches, device=device)
        for k in tqdm(my_batches, f"evaluating on {split}", leave=False, delay=2,
                      disable=not on_terminal):
            x, y = get_batch(split, stream, k) if eval_iters > 0 else get_sequential_batch(split, k)
            with autocast:
                _, loss = compiled_model(x, y)
            batch_losses[k] = loss * (len(x) / batch_size)  # a short last batch counts for less
            if time.perf_counter() > next_report and not on_terminal:
                say(f"evaluating on {split}, batch {k} of {num_batches}")
                next_report += 60
        # One process's value plus zeros for each batch: no sum depends on the number of processes.
        runtime.all_reduce_sum(batch_losses)
        means[split] = batch_losses.cpu().double().sum().item() / (num_eval_sequences / batch_size)
    compiled_model.train()
    return means


def get_lr(iteration):
    """
    Learning rate of an update: linear warm-up, then half a cosine down to min_lr (Loshchilov &
    Hutter 2017), or for 'wsd' constant, then a linear decay (Hu et al. 2024, MiniCPM).
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
picture_path = os.path.join(out_dir, "loss.png")


def trim_log():
    """Starts log.csv, or keeps those lines that a resumed run is not going to write again."""
    lines = [",".join(COLUMNS) + "\n"]
    if os.path.exists(log_path):
        with open(log_path, errors="replace") as file:
            for line in file:
                iteration = line.split(",")[0]
                is_complete = line.endswith("\n") and iteration.isdecimal()
                if is_complete and int(iteration) < iter_num:
                    lines.append(line)
    with open(log_path + ".tmp", "w", newline="") as file:
        file.writelines(lines)
    os.replace(log_path + ".tmp", log_path)


compiled = ", compiled" if compile else ""
say(f"{model.get_num_params(False) / 1e6:.2f}M parameters, "
    f"{tokens_per_iter:,} tokens per iteration, "
    f"{world_size} x {device_type} in {dtype}{compiled}, from iteration {iter_num}")
is_complete = max_iters > 0 and iter_num >= max_iters
if is_complete and not eval_only:
    say(f"this run is complete: give a larger --max_iters than {max_iters} to continue")
if master_process and not eval_only:
    if wandb_log:
        import wandb
        try:
            wandb_run = wandb.init(project=wandb_project, name=wandb_run_name, config=config,
                                   id=wandb_id, resume="allow")
        except wandb.Error as error:
            raise UserError(f"wandb: {error} (WANDB_MODE=offline needs no account)") from None
        wandb_id = wandb_run.id
        wandb_run.define_metric("*", step_metric="iter")
    if saved_iter is None:
        back_up(out_dir, ("ckpt.pt", "last.pt", "log.csv", "loss.png"), os.rename)
    elif evaluations_changed:  # a copy, as it may be the one to resume from
        back_up(out_dir, ("ckpt.pt",), shutil.copyfile)
    trim_log()


def log_metrics(**row):
    """Adds a row to log.csv, and to wandb, where train_loss is called train/loss."""
    if not master_process:
        return
    log_size = None
    try:
        with open(log_path, "a", newline="") as file:
            log_size = file.tell()
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if log_size == 0:  # a new file: somebody removed the old one
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        say(f"note: cannot write {log_path}: {error}")
        if log_size is not None:
            with contextlib.suppress(OSError):
                os.truncate(log_path, log_size)  # leaves no part of a row
    if wandb_log:
        wandb_run.log({key.replace("_loss", "/loss"): value for key, value in row.items()})


def save(name):
    """Writes the state of the run before update `iter_num` to `name` in out_dir."""
    global saved_iter
    saved_iter = iter_num
    if not master_process:
        return
    state = {key: optimizer.state_dict() for key, optimizer in optimizers.items()}
    state.update(model=model.state_dict(), model_args=model_args, config=config, iter_num=iter_num,
                 best_val_loss=best_val_loss, best_iter=best_iter, scaler=scaler.state_dict(),
                 skipped=skipped, skipped_in_a_row=skipped_in_a_row, wandb_id=wandb_id,
                 itos=itos, data=data_fingerprint)
    save_checkpoint(state, os.path.join(out_dir, name))


# ---- the loop ----

stopping = False
first_iter = iter_num
num_updates = 0  # since the last log line
eval_seconds = None  # of the latest evaluation
start_time = time.perf_counter()
x, y = get_batch("train", TRAIN, iter_num, micro_steps[0])
t0 = time.perf_counter()  # time of the last log line; evaluations move it on
while True:
    last_step = iter_num >= max_iters
    lr = get_lr(iter_num)

    # Evaluate, and save the best model or the latest.
    if eval_only or last_step or iter_num % eval_interval == 0:
        runtime.synchronize(device)  # the optimizer's work is part of the update
        eval_start = time.perf_counter()
        losses = estimate_loss()
        line = f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}"
        if eval_only:
            say(line)
            break
        if losses["val"] < best_val_loss:
            best_val_loss, best_iter = losses["val"], iter_num
            if iter_num > 0:
                save("ckpt.pt")
                line += ", saved ckpt.pt"
        elif always_save_checkpoint and math.isfinite(losses["val"]):
            if iter_num > 0 and saved_iter != iter_num:
                save("last.pt")
                line += ", saved last.pt"
        say(line)
        log_metrics(iter=iter_num, train_loss=losses["train"], val_loss=losses["val"], lr=lr)
        eval_seconds = time.perf_counter() - eval_start
        t0 += eval_seconds
    if last_step:
        break

    # ---- the update, from here ----
    for key, optimizer in optimizers.items():
        lr_scale = muon_lr_scale if key == "muon" else 1.0
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_scale
    loss_sum = torch.zeros((), device=device)
    for micro_step in micro_steps:
        if dropout > 0:
            dropout_seed = int(random_bits(DROPOUT, iter_num, 1, micro_step)[0])
            torch.manual_seed(dropout_seed >> 1)
        # Gradients are averaged over the processes once, in the last backward pass.
        is_last_micro_step = micro_step == micro_steps[-1]
        accumulating = world_size > 1 and not is_last_micro_step
        with ddp_model.no_sync() if accumulating else contextlib.nullcontext():
            with autocast:
                _, micro_loss = ddp_model(x, y)
                micro_loss = micro_loss / len(micro_steps)
            # Fetch the next micro-batch while the device is busy with this one.
            if is_last_micro_step:
                x, y = get_batch("train", TRAIN, iter_num + 1, micro_steps[0])
            else:
                x, y = get_batch("train", TRAIN, iter_num, micro_step + world_size)
            scaler.scale(micro_loss).backward()
        loss_sum += micro_loss.detach()
    for optimizer in optimizers.values():
        scaler.unscale_(optimizer)
    total_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])

    # The one collective besides the gradients', and the one wait for the device.
    stop_flag = torch.full((), float(stop_signal > 0), device=device)
    stats = runtime.all_reduce_sum(torch.stack([loss_sum, total_norm, stop_flag]))
    loss, grad_norm, stop_frac = (stats / world_size).tolist()
    stopping = stop_frac > 0

    # Nothing that is not finite may reach the weights, on any process.
    nonfinite = not math.isfinite(loss + grad_norm)
    if nonfinite:
        scale = scaler.get_scale()
        scaler.update()
        finding_scale = scale >= 1 and scaler.get_scale() < scale  # float16's scaler is starting
        skipped += 1
        if not finding_scale:
            skipped_in_a_row += 1
    else:
        if grad_clip > 0 and grad_norm > grad_clip:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, total_norm)
        for optimizer in optimizers.values():
            scaler.step(optimizer)
        scaler.update()
        skipped_in_a_row = 0
    model.zero_grad(set_to_none=world_size == 1)  # in DDP, gradients stay in its buckets
    num_updates += 1
    # ---- to here ----

    if nonfinite:
        say(f"iter {iter_num}: loss or gradient is not finite, update skipped ({skipped} so far)")
    if iter_num % log_interval == 0:
        t1 = time.perf_counter()
        dt = (t1 - t0) / num_updates  # seconds per update
        t0, num_updates = t1, 0
        tokens_per_s = tokens_per_iter / dt
        mfu = model.estimate_mfu(len(micro_steps) * batch_size, dt)
        line = f"iter {iter_num}: loss {loss:.4f}, time {dt * 1000:.2f}ms"
        if mfu is not None:
            line += f", mfu {mfu:.2%}"
        line += f", {tokens_per_s:,.0f} tokens/s"
        if iter_num > first_iter and eval_seconds is not None:  # the first update is a slow one
            evals_left = math.ceil(max_iters / eval_interval) - iter_num // eval_interval
            eta = (max_iters - iter_num - 1) * dt + evals_left * eval_seconds
            line += f", {datetime.timedelta(seconds=int(eta))} left"
        say(line)
        log_metrics(iter=iter_num, loss=loss, lr=lr, grad_norm=grad_norm,
                    tokens_per_s=tokens_per_s, time_ms=dt * 1000, mfu=mfu)
    iter_num += 1
    if skipped_in_a_row == 10 or stopping:
        break

# ---- the end ----

last_eval_failed = last_step and not math.isfinite(losses["val"])
diverged = not eval_only and (skipped_in_a_row == 10 or last_eval_failed)
if not (eval_only or diverged or saved_iter == iter_num):
    save("last.pt")
exit_code = int(diverged)
if stopping:
    exit_code = 128 + (stop_signal or signal.SIGTERM)
if master_process and not eval_only:
    seconds = int(time.perf_counter() - start_time)
    summary = f"time {datetime.timedelta(seconds=seconds)}"
    if best_iter is not None:
        summary = f"best val loss {best_val_loss:.4f} at iteration {best_iter}, {summary}"
    say(summary)
    try:
        draw_losses([out_dir], picture_path)
        say(f"losses drawn in {picture_path}")
    except Exception as error:  # a picture is no reason to fail
        say(f"note: {picture_path} was not drawn: {error}")
    if stopping:
        name = signal.Signals(stop_signal or signal.SIGTERM).name
        say(f"stopped by {name} before iteration {iter_num}; to go on: "
            f"python train.py --out_dir={shlex.quote(out_dir)} --init_from=resume")
    elif not diverged:
        say(f"to sample: python sample.py --out_dir={shlex.quote(out_dir)}")
    if wandb_log:
        wandb_run.finish(exit_code)
if world_size > 1:
    # Wait until rank 0 has written: torchrun kills the others once one exits with an error.
    runtime.all_reduce_sum(torch.zeros(1, device=device))
    dist.destroy_process_group()
if diverged:
    if not master_process:
        sys.exit(1)
    restart = "scratch" if saved_iter is None else f"resume (continues at iteration {saved_iter})"
    uncompiled = "with --compile=False, or " if compile else ""
    raise UserError(f"loss or gradient is not finite at iteration {iter_num - 1}, after {skipped} "
                     f"skipped updates: start again with --init_from={restart}, {uncompiled}with a "
                     "lower learning_rate or another dtype")
if world_size > 1:
    # note: while Python shuts down, threads of torch.distributed sometimes abort the process.
    os._exit(exit_code)
if stopping:
    sys.exit(exit_code)
