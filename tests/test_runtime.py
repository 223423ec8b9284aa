"""The machine as seen through environment variables and a made-up torch.cuda."""

import math

import pytest
import torch

import runtime
from runtime import choose_device, compiler_works, process_ranks, setup_device


@pytest.fixture
def environment(monkeypatch):
    """environment(**variables): torchrun's variables are these and no others."""
    def environment(**variables):
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
    return environment


@pytest.fixture
def gpus(monkeypatch):
    """gpus(n): torch believes in n GPUs of NVIDIA's, or in one of Apple's."""
    def gpus(num_gpus):
        is_apple = num_gpus == "Apple's"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: not is_apple and num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: is_apple)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch, "zeros", lambda size, device: torch.ones(size))
    return gpus


def test_ranks_come_from_the_environment(environment):
    environment()
    assert process_ranks() == (0, 0, 1)
    environment(RANK=5, LOCAL_RANK=1, WORLD_SIZE=8)
    assert process_ranks() == (5, 1, 8)
    environment(RANK=3)  # of a scheduler, for a script that it runs once
    assert process_ranks() == (0, 0, 1)


@pytest.mark.parametrize("num_gpus, device, local_rank, expected", [
    (0, "auto", None, "cpu"),
    (2, "cpu", None, "cpu"),
    (2, "auto", None, "cuda:0"),
    (2, "cuda:1", None, "cuda:1"),
    (2, "auto", 1, "cuda:1"),
    (2, "cuda", 1, "cuda:1"),
    (1, "cuda", 3, "cuda:0"),  # a job scheduler shows each process its own GPU
    ("Apple's", "auto", None, "mps"),
    ("Apple's", "auto", 0, "cpu"),  # it serves a single process
])
def test_device_is_chosen(environment, gpus, num_gpus, device, local_rank, expected):
    gpus(num_gpus)
    environment()
    if local_rank is not None:
        environment(RANK=local_rank, LOCAL_RANK=local_rank)
    assert choose_device(device, local_rank or 0) == expected


@pytest.mark.parametrize("device", ["cuda", "cuda:2", "cuda:x", "mps", "tpu", 0])
def test_device_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match=f"cannot use device='?{device}.*start fewer processes"):
        choose_device(device, 0)


def test_a_gpu_that_torch_has_no_kernels_for_is_refused(monkeypatch, environment, gpus):
    def fails(size, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\n"
                           "CUDA kernel errors might be asynchronously reported")
    gpus(1)
    environment()
    monkeypatch.setattr(torch, "zeros", fails)
    with pytest.raises(ValueError, match="another build of torch .*no kernel image"):
        choose_device("auto", 0)


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_used_where_it_is_native(monkeypatch, environment, gpus, native):
    gpus(1)
    environment()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr(runtime, "choose_device", lambda device, local_rank: "cuda:0")
    monkeypatch.setattr(runtime, "compiler_works", lambda device: True)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda mode: None)
    dtype = "bfloat16" if native else "float16"
    assert setup_device("auto", "auto", "auto") == ("cuda:0", dtype, True)


@pytest.mark.parametrize("capabilities, native", [
    ({}, False), (dict(avx512_bf16=True), True), (dict(amx_bf16=True), True),
])
def test_bfloat16_on_a_cpu(monkeypatch, capabilities, native):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert runtime.has_native_bfloat16("cpu") == native


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("no C++ compiler\n\nFor the internal stack trace, set a variable\n")


@pytest.mark.parametrize("compiled, works", [(torch.sum, True), (FailsBackward.apply, False)])
def test_compiler_that_fails_is_named_in_one_line(monkeypatch, capsys, compiled, works):
    monkeypatch.setattr(torch, "compile", lambda function: compiled)
    assert compiler_works("cpu") == works
    err = capsys.readouterr().err
    assert err.count("\n") == (not works)
    named = "torch.compile fails here, continuing without it: RuntimeError('no C++ compiler"
    assert (named in err) != works


@pytest.mark.parametrize("name, teraflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H20", 148),
    ("NVIDIA GB200", 2500), ("NVIDIA A10", 125), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA GeForce RTX 4080 SUPER", 104), ("Tesla T4", 65), ("NVIDIA T400", math.nan),
])
def test_peak_flops_by_name(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert runtime.peak_flops(torch.device("cuda")) == pytest.approx(teraflops * 1e12, nan_ok=True)
    assert math.isnan(runtime.peak_flops(torch.device("cpu")))
