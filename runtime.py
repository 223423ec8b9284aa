"""The machine: processes and what they share, device, precision."""

import contextlib
import datetime
import os
import re
import signal
import sys

import numpy as np
import torch
import torch.distributed as dist

from configurator import UserError

TIMEOUT = datetime.timedelta(minutes=10)  # for a process that waits for the others

# Dense bfloat16 FLOP/s (float16 for V100 and T4). Data sheets often give the figure for 2:4 sparse
# matrices, which is twice as high. The first key that the name of a GPU contains is used.
PEAK_FLOPS = {
    "GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12,
    "H100 NVL": 835e12, "H100": 989e12, "H20": 148e12, "A100": 312e12, "A40": 150e12,
    "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "V100": 125e12, "T4": 65e12,
    "MI300X": 1307e12, "RTX PRO 6000": 504e12, "RTX 6000 Ada": 364e12, "RTX A6000": 155e12,
    "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 4080": 97e12, "RTX 3090": 71e12,
}

# ---- processes ----


def process_ranks():
    """(rank, local_rank, world_size) as torchrun sets them, or (0, 0, 1) in a single process."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 0, 0, 1
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    with contextlib.suppress(KeyError, ValueError):
        rank, local_rank, world_size, port = (int(os.environ[name]) for name in names[:4])
        has_address = 0 <= port <= 65535 and os.environ["MASTER_ADDR"] != ""
        if 0 <= rank < world_size and has_address:
            return rank, local_rank, world_size
    found = ", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in names)
    raise UserError(f"these variables do not describe a process group: {found}; launch with "
                     "torchrun, or unset RANK and WORLD_SIZE to run a single process")


def init_processes(rank, world_size, backend):
    """Connects the processes. `backend` is 'nccl' for GPUs, 'gloo' for CPUs."""
    if world_size == 1:
        return
    # The waits below are in C++, where Python cannot answer Ctrl-C: let it end the process.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    # note: torchrun's store survives a restart of the workers, and with it the addresses of the
    # dead ones. So every attempt gets its own names in the store.
    attempt = 0
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    store = dist.PrefixStore(f"attempt{attempt}", store)
    dist.init_process_group(backend, rank=rank, world_size=world_size, store=store,
                            timeout=TIMEOUT)
    signal.signal(signal.SIGINT, handler)


def all_reduce_sum(values):
    """Sums a tensor over all processes, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


# ---- device and precision ----


def setup_device(device, dtype, compile, local_rank=0, deterministic=False):
    """
    Resolves the settings that may be 'auto', and sets torch's global switches. Returns the device
    ('cuda:1', 'mps', 'cpu'), the name of the dtype, and whether to compile.
    """
    device = choose_device(device, local_rank)
    device_type = device.split(":")[0]
    if dtype == "auto":
        dtype = "float16" if device_type == "cuda" else "float32"
        if has_native_bfloat16(device_type):
            dtype = "bfloat16"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UserError(f"dtype={dtype!r} is none of 'auto', 'float32', 'bfloat16', 'float16'")
    if compile not in ("auto", True, False):
        raise UserError(f"compile={compile!r} is none of 'auto', True, False")
    if compile == "auto":
        compile = device_type == "cuda"

    for number_type in (np.float32, np.float64):
        np.finfo(number_type)  # looked up later, it makes numpy before 2.3 warn about denormals
    torch.set_flush_denormal(True)  # CPUs are tens of times slower with numbers below 1e-38
    # TF32 for those matrix products that stay in float32
    torch.set_float32_matmul_precision("high" if device_type == "cuda" else "highest")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # sums in NVLink switches vary
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        from torch._inductor import config as inductor_config
        if hasattr(inductor_config, "deterministic"):  # torch 2.10 and later
            inductor_config.deterministic = True  # autotuning would choose kernels by the clock
    return device, dtype, compile and compiler_works(device)


def choose_device(device, local_rank):
    has_mps = torch.backends.mps.is_available() and "RANK" not in os.environ  # one process only
    if device == "auto" and torch.cuda.is_available():
        device = "cuda"
    elif device == "auto":
        device = "mps" if has_mps else "cpu"
    if not re.fullmatch(r"cuda(:\d+)?|mps|cpu", str(device)):
        raise UserError(f"device={device!r} is none of 'auto', 'cpu', 'cuda', 'cuda:1', 'mps'")
    if device == "mps" and not has_mps:
        raise UserError("device='mps' needs an Apple GPU and a single process: use --device=cpu")
    if not device.startswith("cuda"):
        return device
    if not torch.cuda.is_available():
        raise UserError(f"device={device!r}, but torch finds no CUDA GPU: use --device=cpu, or "
                         "install a CUDA build of torch")
    num_gpus = torch.cuda.device_count()
    index = int(device.partition(":")[2] or 0)
    if "LOCAL_RANK" in os.environ and num_gpus > 1:  # a scheduler may show each process one GPU
        index = local_rank
    if index >= num_gpus:
        raise UserError(f"there is no cuda:{index} among the {num_gpus} GPUs of this machine: "
                         "start fewer processes, or choose another --device")
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def has_native_bfloat16(device_type):
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.13 and later
        capabilities = torch.cpu.get_capabilities()
        return capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return False


def compiler_works(device):
    """Compiles a small function, forward and backward; says so and returns False if that fails."""
    try:
        x = torch.ones(8, device=device, requires_grad=True)
        torch.compile(lambda x: x.sin().sum())(x).backward()
    except Exception as error:  # a missing compiler can raise anything
        cause = " ".join(str(error).split())
        print(f"torch.compile fails here, continuing without it: {cause}", file=sys.stderr)
        return False
    return True


def make_autocast(device, dtype):
    """The context of the forward pass: torch.autocast, or nothing for float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.split(":")[0], dtype=getattr(torch, dtype))


def synchronize(device):
    """Waits until the device has done all its work, so that a clock can be read."""
    if device != "cpu":
        torch.accelerator.synchronize()


def peak_flops(device):
    """Peak bfloat16 FLOP/s of a GPU (a torch.device), or None where it is not known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for key, flops in PEAK_FLOPS.items():
            if re.search(rf"\b{key}\b", name):
                return flops
    return None
