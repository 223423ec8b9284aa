"""The machine: processes, signals, device and precision."""

import contextlib
import datetime
import os
import re
import signal
import sys
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from configurator import UserError, check_choice

TIMEOUT = datetime.timedelta(minutes=10)  # for a process that waits for the others

# Dense bfloat16 TFLOP/s (float16 for V100 and T4). Data sheets often give the figure for 2:4 sparse
# matrices, which is twice as high. The first key that the name of a GPU contains is used.
PEAK_TFLOPS = {
    "GB300": 2500, "B300": 2250, "GB200": 2500, "B200": 2250, "GH200": 989, "H200": 989,
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "H20": 148, "A100": 312,
    "A800": 312, "A40": 150, "A10": 125, "L40S": 362, "L40": 181, "L4": 121, "V100": 125, "T4": 65,
    "MI300X": 1307, "MI325X": 1307, "MI350X": 2300, "MI355X": 2500, "PRO 6000": 504,
    "6000 Ada": 364, "A6000": 155, "5090": 210, "5080": 113, "5070 Ti": 88, "5070": 62, "4090": 165,
    "4080 SUPER": 104, "4080": 97, "4070 Ti SUPER": 88, "4070 Ti": 80, "4070 SUPER": 71, "4070": 58,
    "4060 Ti": 44, "4060": 30, "3090": 71,
}

# ---- processes ----

store = None  # of torch.distributed, for messages between processes outside collectives


def process_ranks():
    """(rank, local_rank, world_size) as torchrun sets them; all but rank 0 are silenced."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0)) if world_size > 1 else 0
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
    return rank, local_rank, world_size


def init_processes(rank, world_size, backend, device_type):
    """Connects the processes and returns the backend: 'auto' is 'nccl' on GPUs, else 'gloo'."""
    global store
    if backend == "auto":
        backend = "nccl" if device_type == "cuda" else "gloo"
    if world_size > 1:
        # The waits below are in C++, where Python cannot answer Ctrl-C. Until catch_signals, it
        # ends the process.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # note: torchrun's store survives a restart, and with it the addresses of dead workers. So
        # every attempt gets its own names in it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        store = dist.PrefixStore(f"attempt{attempt}", store)
        dist.init_process_group(backend, rank=rank, world_size=world_size, store=store,
                                timeout=TIMEOUT)
    return backend


def all_reduce_sum(values):
    """Sums a tensor over all processes, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def broadcast(value):
    """The value that rank 0 has."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def sync_buffers(model):
    """Gives the model's buffers, which may be running statistics, the values of rank 0."""
    if dist.is_initialized():
        for buffer in model.buffers():
            buffer.copy_(broadcast(buffer.cpu()))


def check_same(**values):
    """Raises UserError on a process whose values are not those of rank 0."""
    for key, value in broadcast(values).items():
        if values[key] != value:
            raise UserError(f"the processes differ in their {key}: give all of them the same "
                            "settings and data, and an out_dir on shared storage")


def wrap_ddp(model, dropout):
    """Wraps the model to average gradients over the processes; in one process, returns it."""
    if not dist.is_initialized():
        return model
    if dropout > 0:  # a graph split at DDP's buckets would draw other dropout masks
        torch._dynamo.config.optimize_ddp = False
    # find_unused_parameters keeps DDP from changing its buckets, and with them the order of sums,
    # after the first update. It also allows for parameters without a gradient.
    return DDP(model, gradient_as_bucket_view=True, find_unused_parameters=True)


def close(exit_code, device):
    """Ends a run on all processes."""
    if dist.is_initialized():
        # Wait until rank 0 has written: torchrun kills the others once one exits with an error.
        dist.all_reduce(torch.zeros(1, device=device))
        dist.destroy_process_group()
        sys.stdout.flush()
        # note: while Python shuts down, threads of torch.distributed sometimes abort the process
        os._exit(exit_code)
    if exit_code > 0:
        sys.exit(exit_code)


# ---- signals, wandb ----

stop_signal = 0  # the number of the signal that asked this process to stop


def catch_signals():
    """From here on, signals set `stop_signal`; a second Ctrl-C ends the process immediately."""
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        number = getattr(signal, name, None)  # Windows lacks some
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, on_signal)


def on_signal(number, frame=None):
    global stop_signal
    stop_signal = number
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # it passes every Ctrl-C on twice
    if number == signal.SIGINT and not under_torchrun:
        signal.signal(number, signal.SIG_DFL)
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            os.write(2, b"finishing the current update, then saving (Ctrl-C again: quit now)\n")


def stop_requested():
    """Whether a signal has reached this process or, as far as known, another one."""
    if store is None:
        return stop_signal > 0
    if stop_signal > 0:
        store.set("stop", "1")
    return store.check(["stop"])


def start_wandb(project, name, config, state):
    """Continues the wandb run state["wandb_id"], or starts one and stores its id there."""
    import wandb
    try:
        run = wandb.init(project=project, name=name, config=config, id=state["wandb_id"],
                         resume="allow")
    except wandb.Error as error:
        raise UserError(f"wandb: {error} (WANDB_MODE=offline needs no account)") from None
    run.define_metric("*", step_metric="iter")
    state["wandb_id"] = run.id
    return run


# ---- device and precision ----


def setup_device(device, dtype, compile, local_rank=0, deterministic=False):
    """Sets torch's global switches; returns device, dtype and compile with 'auto' resolved."""
    check_choice("dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    check_choice("compile", compile, ("auto", True, False))
    device = choose_device(device, local_rank)
    device_type = device.split(":")[0]
    if dtype == "auto":
        emulated = "float16" if device_type == "cuda" else "float32"
        dtype = "bfloat16" if has_native_bfloat16(device_type) else emulated
    if compile == "auto":
        compile = device_type == "cuda"

    np.finfo(np.float32), np.finfo(np.float64)  # later, numpy before 2.3 would warn of denormals
    torch.set_flush_denormal(True)  # CPUs are tens of times slower with numbers below 1e-38
    # TF32 for those matrix products that stay in float32
    torch.set_float32_matmul_precision("high" if device_type == "cuda" else "highest")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # sums in NVLink switches vary
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        from torch._inductor import config as inductor_config
        inductor_config.deterministic = True  # autotuning would choose kernels by the clock
    return device, dtype, compile and compiler_works(device)


def choose_device(device, local_rank):
    """The device of this process, such as 'cuda:1'; UserError for one that torch cannot use."""
    if device == "auto":
        device = "cpu"
        if torch.cuda.is_available():
            device = "cuda"
        elif torch.backends.mps.is_available() and "RANK" not in os.environ:  # one process only
            device = "mps"
    if device == "cuda" or (str(device).startswith("cuda") and "LOCAL_RANK" in os.environ):
        # a scheduler may show each process one GPU
        device = f"cuda:{local_rank if torch.cuda.device_count() > 1 else 0}"
    try:
        torch.zeros(1, device=device).add_(1)
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
    except Exception as error:  # of many kinds
        raise UserError(f"torch cannot use device={device!r} here; choose another --device, start "
                        f"fewer processes, or install another build of torch ({error})") from None
    return device


def has_native_bfloat16(device_type):
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu" or not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.13
        return False
    features = torch.cpu.get_capabilities()
    return features.get("avx512_bf16", False) or features.get("amx_bf16", False)


def compiler_works(device):
    """Compiles a small function, forward and backward; says so and returns False if that fails."""
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: x.sin().sum())(x).backward()
    except Exception as error:  # a missing compiler can raise anything
        print(f"torch.compile fails here, continuing without it: {error!r}", file=sys.stderr)
        return False
    return True


def make_autocast(device, dtype, cache_enabled=True):
    """torch.autocast for the forward pass; it does nothing for float32."""
    return torch.autocast(device.split(":")[0], getattr(torch, dtype), dtype != "float32",
                          cache_enabled)


def synchronize(device):
    """Waits until the device has done all its work, so that a clock can be read."""
    if device != "cpu":
        torch.accelerator.synchronize()


def peak_flops(device):
    """Peak bfloat16 FLOP/s of a GPU (a torch.device), nan where it is not known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, teraflops in PEAK_TFLOPS.items():
            if re.search(rf"\b{key}\b", name):
                return teraflops * 1e12
    return float("nan")
