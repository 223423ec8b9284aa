"""The model in memory; test_huggingface.py compares its logits with those of transformers."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from model import GPT, GPTConfig, causal_attention, sample_token

SMALL = dict(block_size=16, vocab_size=61, n_layer=3, n_head=4, n_embd=32)


def small_model(seed=0, **changes):
    """A model with large random weights and biases, so that each of them shows in the logits."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(SMALL, **changes)))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def random_tokens(*shape, seed=0):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


def test_initialization():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8 layers) = 4
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 0.001, name
    loss = model(torch.randint(512, (4, 64)), torch.randint(512, (4, 64)))[1]
    assert loss.item() == pytest.approx(math.log(512), abs=0.1)  # that of uniform predictions


def test_parameters_and_flops(monkeypatch):
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
        without_bias = GPT(GPTConfig(bias=False))
    assert model.get_num_params(non_embedding=False) == 124_439_808
    assert model.get_num_params() == 124_439_808 - 1024 * 768
    assert math.isnan(small_model().estimate_mfu(1, 1.0))  # the peak of a CPU is not known
    monkeypatch.setattr("model.peak_flops", lambda device: 1e12)
    # 3 sequences of 1024 tokens in half a second, 855 MFLOPs a token
    expected = 3 * 1024 * 855e6 / 0.5 / 1e12
    assert without_bias.estimate_mfu(3, 0.5) == pytest.approx(expected, rel=0.002)


def test_weight_decay_applies_to_matrices_only():
    model = small_model()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    decayed, others = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0
    # in the order of named_parameters, as in nanoGPT's checkpoints
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    assert [id(p) for p in decayed["params"]] == [id(p) for p in matrices]
    assert [id(p) for p in others["params"]] == [id(p) for p in vectors]
    assert optimizer.defaults["fused"]


def test_targets_give_the_loss_and_no_logits():
    model, idx = small_model(), random_tokens(2, 17)
    x, y = idx[:, :-1], idx[:, 1:].clone()
    logits, loss = model(x)
    assert logits.shape == (2, 16, 61) and loss is None
    no_logits, loss = model(x, y)
    assert no_logits is None
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), y.flatten()))
    y[:, 8:] = -1  # ignored
    torch.testing.assert_close(model(x, y)[1], model(x[:, :8], y[:, :8])[1])


def test_no_position_sees_later_tokens():
    model, idx = small_model(), random_tokens(1, 16)
    x = model.transformer.wte(idx).detach().requires_grad_()
    model.transformer.wte.forward = lambda idx: x
    for t in (0, 7, 15):
        grad, = torch.autograd.grad(model(idx)[0][0, t].sum(), x)
        seen = (grad[0] != 0).any(dim=-1)  # (T,)
        assert seen.tolist() == [position <= t for position in range(16)]


def test_blocks_keep_their_input_only(monkeypatch):
    """The tensors that a backward pass waits for shrink to a few for each block."""
    idx = torch.zeros(2, 16, dtype=torch.long)
    elements = {}
    for checkpointing in (False, True):
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor.numel())
            return tensor
        model = GPT(GPTConfig(16, 61, 3, 4, 32))
        model.gradient_checkpointing = checkpointing
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(idx, idx)
        elements[checkpointing] = sum(saved)
    assert elements[True] < 0.6 * elements[False]


def test_attention_of_matrix_products_agrees_with_pytorch():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 8, requires_grad=True).unbind(0)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = causal_attention(q, k, v, 0.0).view(expected.shape)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    rounded = causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.0).view(expected.shape)
    assert (rounded - expected).abs().max() < 0.03
    gradients = torch.autograd.grad(rounded.float().pow(2).sum(), (q, k, v))
    expected_gradients = torch.autograd.grad(expected.pow(2).sum(), (q, k, v))
    for grad, expected_grad in zip(gradients, expected_gradients, strict=True):
        assert (grad - expected_grad).abs().max() < 0.1


def test_attention_of_matrix_products_drops_weights():
    zeros, ones = torch.zeros(1, 1, 400, 8), torch.ones(1, 1, 400, 8)
    y = causal_attention(zeros, zeros, ones, 0.5)
    assert y.mean() == pytest.approx(1, abs=0.05) and y.std() > 0.01


def test_crop_block_size_keeps_the_logits():
    model, idx = small_model(), random_tokens(1, 6)
    expected = model(idx)[0]
    model.crop_block_size(6)
    assert torch.equal(model(idx)[0], expected)
    for block_size in (0, 7):
        with pytest.raises(ValueError, match=f"block_size={block_size}"):
            model.crop_block_size(block_size)
    with pytest.raises(ValueError, match="7 tokens.*block_size=6"):
        model(random_tokens(1, 7))


@pytest.mark.parametrize("block_size, prompt_length", [(16, 1), (16, 16), (16, 40), (1, 1)])
def test_greedy_sampling_equals_the_plain_forward_pass(block_size, prompt_length):
    """A full context is continued from its later half."""
    model, idx = small_model(block_size=block_size), random_tokens(3, prompt_length)
    expected = idx
    start = max(0, prompt_length - block_size)  # of the context
    for _ in range(40):
        if expected.size(1) - start > block_size:
            start = expected.size(1) - max(1, block_size // 2)
        token = model(expected[:, start:])[0][:, -1:].argmax(-1)
        expected = torch.cat([expected, token], dim=1)
    assert torch.equal(model.generate(idx, 40, temperature=0), expected)


@pytest.mark.parametrize("options, expected", [
    (dict(top_k=0, top_p=1.0), [0.4, 0.3, 0.2, 0.1]),
    (dict(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    (dict(top_k=2, top_p=0.95), [4 / 7, 3 / 7, 0, 0]),
    (dict(top_p=0.65), [4 / 7, 3 / 7, 0, 0]),
    (dict(top_p=0.75), [4 / 9, 3 / 9, 2 / 9, 0]),
    (dict(temperature=0), [1, 0, 0, 0]),
    (dict(temperature=1e-30), [1, 0, 0, 0]),
    (dict(top_p=1e-9), [1, 0, 0, 0]),
])
def test_sampled_frequencies(options, expected):
    torch.manual_seed(0)
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20000, -1)
    options = dict(dict(temperature=1.0, top_k=None, top_p=None), **options)
    tokens = sample_token(logits, **options)
    assert tokens.shape == (20000, 1)
    frequencies = torch.bincount(tokens.flatten(), minlength=4) / 20000
    assert frequencies.tolist() == pytest.approx(expected, abs=0.015)
    assert [f > 0 for f in frequencies] == [p > 0 for p in expected]


def test_tokens_from_the_limit_on_are_never_drawn():
    torch.manual_seed(0)
    idx = torch.zeros(4, 1, dtype=torch.long)
    out = small_model().generate(idx, 200, temperature=50.0, vocab_limit=7)
    assert out.unique().tolist() == list(range(7))


def test_importing_the_model_changes_nothing_outside():
    code = """if True:
        import os, signal, sys, torch
        look = lambda: (dict(os.environ), sys.excepthook, sys.stdout, signal.getsignal(2),
                        torch.get_float32_matmul_precision(), torch.get_rng_state().tolist())
        before = look()
        import model
        assert look() == before"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
