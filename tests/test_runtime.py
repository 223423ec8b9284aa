"""The machine as seen through environment variables and a made-up torch.cuda."""

import math

import pytest
import torch

from runtime import (
    check_device,
    choose_device,
    compiler_works,
    has_native_bfloat16,
    peak_flops,
    process_ranks,
    setup_device,
)

PEERS = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n) makes torch believe in n GPUs."""
    def gpus(num_gpus):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    return gpus


def set_env(monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)


# ---- processes ----


@pytest.mark.parametrize("env, expected", [
    ({}, (0, 0, 1)),
    (dict(LOCAL_RANK="3"), (0, 0, 1)),
    (dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **PEERS), (0, 0, 1)),
    (dict(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8", **PEERS), (5, 1, 8)),
])
def test_ranks_come_from_the_environment(monkeypatch, env, expected):
    set_env(monkeypatch, env)
    assert process_ranks() == expected


@pytest.mark.parametrize("env", [
    dict(RANK="3"),
    dict(WORLD_SIZE="4"),
    dict(RANK="3", WORLD_SIZE="4", **PEERS),
    dict(RANK="4", LOCAL_RANK="0", WORLD_SIZE="4", **PEERS),
    dict(RANK="-1", LOCAL_RANK="0", WORLD_SIZE="4", **PEERS),
    dict(RANK="one", LOCAL_RANK="0", WORLD_SIZE="4", **PEERS),
    dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="0", **PEERS),
    dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_PORT="29500"),
    dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="", MASTER_PORT="29500"),
    dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="x"),
])
def test_incomplete_environment_is_refused(monkeypatch, env):
    set_env(monkeypatch, env)
    with pytest.raises(ValueError, match=f"RANK={env.get('RANK', '.not set')}.*with torchrun"):
        process_ranks()


# ---- device ----


@pytest.mark.parametrize("num_gpus, device, local_rank, expected", [
    (0, "auto", None, "cpu"),
    (2, "cpu", None, "cpu"),
    (2, "auto", None, "cuda:0"),
    (2, "cuda", None, "cuda:0"),
    (2, "cuda:1", None, "cuda:1"),
    (2, "auto", 1, "cuda:1"),
    (2, "cuda", 1, "cuda:1"),
    (1, "cuda", 3, "cuda:0"),  # a job scheduler shows each process its own GPU
])
def test_device_is_chosen(monkeypatch, gpus, num_gpus, device, local_rank, expected):
    gpus(num_gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    if local_rank is not None:
        monkeypatch.setenv("RANK", str(local_rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    assert choose_device(device, local_rank or 0) == expected


def test_apple_gpu_serves_a_single_process(monkeypatch, gpus):
    gpus(0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto", 0) == "mps"
    monkeypatch.setenv("RANK", "0")
    assert choose_device("auto", 0) == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cuda:2", "cuda:x", "mps", "tpu", 0])
def test_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=f"cannot use device={device!r} .*start fewer processes"):
        check_device(device)


def test_gpu_without_kernels_is_refused(monkeypatch):
    def zeros(*args, **kwargs):
        raise RuntimeError("CUDA error: no kernel image is available for execution\nOther lines")
    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(ValueError, match=r"another build of torch \(CUDA error: no .*execution\)"):
        check_device("cuda:0")


# ---- precision and compiler ----


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_used_where_it_is_native(monkeypatch, gpus, native):
    def is_bf16_supported(including_emulation=True):
        return native or including_emulation
    gpus(1)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr("runtime.check_device", lambda device: None)
    monkeypatch.setattr("runtime.compiler_works", lambda device: True)
    precision = torch.get_float32_matmul_precision()
    try:
        device, dtype, compile = setup_device("auto", "auto", "auto")
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_flush_denormal(False)
    assert (device, compile) == ("cuda:0", True)
    assert dtype == ("bfloat16" if native else "float16")


@pytest.mark.parametrize("capabilities, native", [
    ({}, False), (dict(avx512_bf16=False, amx_bf16=False), False),
    (dict(avx512_bf16=True), True), (dict(amx_bf16=True), True),
])
def test_bfloat16_on_a_cpu(monkeypatch, capabilities, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_native_bfloat16("cpu") == native


@pytest.mark.parametrize("dtype, compile, named", [
    ("fp32", False, "dtype='fp32'"), (16, False, "dtype=16"), ("auto", "maybe", "compile='maybe'"),
])
def test_unknown_precision_or_compile_is_refused(dtype, compile, named):
    with pytest.raises(ValueError, match=f"{named} is none of 'auto'"):
        setup_device("cpu", dtype, compile)


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no C++ compiler\n\nFor the internal stack trace, set a variable\n")


def fail(function):
    raise RuntimeError("no C++ compiler\n\nFor the internal stack trace, set a variable\n")


@pytest.mark.parametrize("compile, works", [
    (lambda function: function, True), (lambda function: FailsBackward.apply, False), (fail, False),
])
def test_compiler_that_fails_is_named_in_one_line(monkeypatch, capsys, compile, works):
    monkeypatch.setattr(torch, "compile", compile)
    assert compiler_works("cpu") == works
    err = capsys.readouterr().err
    assert ("torch.compile fails here, continuing without it: no C++ compiler" in err) != works
    assert err.count("\n") == (not works)


# ---- peak FLOP/s ----


@pytest.mark.parametrize("name, expected", [
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H20", 148e12),
    ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA B200", 2250e12),
    ("NVIDIA GB200", 2500e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA A10", 125e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40", 181e12),
    ("NVIDIA L40S", 362e12),
    ("Tesla T4", 65e12),
    ("NVIDIA GeForce RTX 4090", 165e12),
    ("NVIDIA GeForce RTX 4080 SUPER", 104e12),
    ("NVIDIA RTX 6000 Ada Generation", 364e12),
    ("AMD Instinct MI300X", 1307e12),
    ("NVIDIA GeForce GTX 1080", math.nan),
    ("NVIDIA T400", math.nan),
])
def test_peak_flops_by_name(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == pytest.approx(expected, nan_ok=True)
    assert math.isnan(peak_flops(torch.device("cpu")))
