import json
import math
import os
import subprocess
import sys

import pytest
import torch
import transformers

from conftest import ROOT, finish, spawn
from model import GPT, GPTConfig, KVCache, Linear, attend, pick

SMALL = dict(block_size=16, vocab_size=61, n_layer=3, n_head=4, n_embd=32)
# GPT-2's four sizes with a sixth of the layers and heads of 8 instead of 64: n_layer, n_head, n_embd
SIZES = {"gpt2": (2, 12, 96), "gpt2-medium": (4, 16, 128), "gpt2-large": (6, 20, 160), "gpt2-xl": (8, 25, 200)}


def small(seed=0, **changes):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**dict(SMALL, **changes)))
    for p in model.parameters():  # larger than at the start, and no zeros: so that every weight shows
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def oracle(n_layer, n_head, n_embd, vocab_size=61):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=16,
                                                                 vocab_size=vocab_size, bos_token_id=None, eos_token_id=None))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def assert_agree(ours, theirs, vocab_size=61):
    idx = torch.randint(vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    expected = theirs(idx[:, :-1], labels=None).logits
    logits, none = ours(idx[:, :-1])
    assert none is None
    torch.testing.assert_close(logits[..., :vocab_size], expected, rtol=1e-4, atol=1e-4)
    no_logits, loss = ours(idx[:, :-1], idx[:, 1:])
    assert no_logits is None
    if logits.size(-1) == vocab_size:
        expected_loss = theirs(idx, labels=idx).loss if idx.size(1) <= 16 else torch.nn.functional.cross_entropy(
            expected.flatten(0, 1), idx[:, 1:].flatten())
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_weights_from_transformers_give_its_logits_and_loss(size, tmp_path):
    theirs = oracle(*SIZES[size])
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_agree(GPT.from_pretrained(str(tmp_path)).eval(), theirs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_transformers_loads_what_we_write(size, bias, tmp_path):
    n_layer, n_head, n_embd = SIZES[size]
    ours = small(n_layer=n_layer, n_head=n_head, n_embd=n_embd, bias=bias)
    ours.save_pretrained(str(tmp_path))
    with torch.no_grad():
        assert_agree(ours, transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval())


def test_padding_of_the_vocabulary_is_cut_on_the_way_out(tmp_path):
    ours = small(vocab_size=50304, n_layer=1, n_embd=8)
    ours.save_pretrained(str(tmp_path))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert theirs.config.vocab_size == 50257 == theirs.config.eos_token_id + 1
    with torch.no_grad():
        assert_agree(ours, theirs, 50257)


def test_a_model_of_another_build_is_refused(tmp_path):
    oracle(2, 2, 16).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    for old, new in (("gelu_new", "relu"), ('"model_type": "gpt2"', '"model_type": "llama"'), ('"n_layer": 2', '"n_layer": 3'),
                     ('"vocab_size": 61', '"vocab_size": 60'), ('"n_embd": 16', '"n_embd": 17'), ("{", "")):
        assert old in config
        (tmp_path / "config.json").write_text(config.replace(old, new, 1))
        with pytest.raises(ValueError):
            GPT.from_pretrained(str(tmp_path))


def test_no_position_sees_what_comes_after_it():
    model = small()
    x = model.transformer.wte(torch.arange(16)[None]).detach().requires_grad_()
    model.transformer.wte.forward = lambda idx: x
    for t in (0, 7, 15):
        grad, = torch.autograd.grad(model(torch.arange(16)[None])[0][0, t].sum(), x)
        assert (grad[0, :t + 1] != 0).any(-1).all() and (grad[0, t + 1:] == 0).all()


def test_initialization():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=512, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if p.dim() < 2:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # sqrt(2 * 8) = 4
            assert p.std().item() == pytest.approx(expected, rel=0.05) and abs(p.mean().item()) < 0.001, name
    logits = model(torch.randint(512, (4, 64)))[0]
    assert torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.randint(512, (256,))).item() == pytest.approx(math.log(512), abs=0.1)


def test_dropout_drops_in_training_only():
    model, idx = small(dropout=0.5), torch.arange(16)[None]
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


def test_targets_of_minus_one_do_not_count():
    model, idx = small(), torch.arange(16)[None]
    targets = torch.arange(16)[None] + 1
    expected = model(idx[:, :8], targets[:, :8])[1]
    targets[:, 8:] = -1
    torch.testing.assert_close(model(idx, targets)[1], expected)


def plain_greedy(model, idx, n):
    for _ in range(n):
        idx = torch.cat([idx, model(idx)[0][:, -1:].argmax(-1)], dim=1)
    return idx


@pytest.mark.parametrize("prompt", [1, 5, 15])
def test_cached_greedy_sampling_equals_the_plain_forward(prompt):
    model = small()
    idx = torch.randint(61, (3, prompt), generator=torch.Generator().manual_seed(prompt))
    n = 17 - prompt  # the last one is drawn from a full context
    assert torch.equal(model.generate(idx, n, temperature=0), plain_greedy(model, idx, n))


@pytest.mark.parametrize("prompt", [3, 16, 40])
def test_past_the_context_the_later_half_is_read_again(prompt):
    model, n = small(), 40
    idx = torch.randint(61, (2, prompt), generator=torch.Generator().manual_seed(0))
    expected, begin = idx, max(0, prompt - 16)
    for _ in range(n):
        if expected.size(1) - begin > 16:
            begin = expected.size(1) - 8
        expected = torch.cat([expected, model(expected[:, begin:])[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(idx, n, temperature=0), expected)


def test_the_shortest_context_generates():
    model = small(block_size=1)
    assert model.generate(torch.zeros(1, 1, dtype=torch.long), 5).shape == (1, 6)


def test_pick_draws_from_what_is_left_with_the_right_frequencies():
    torch.manual_seed(0)
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(20000, -1)

    def shares(*options):
        return torch.bincount(pick(logits, *options).flatten(), minlength=4).div(20000).tolist()

    assert shares(1.0, None, None) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.015)
    assert shares(1.0, 0, 1.0) == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.015)
    assert shares(0.5, None, None) == pytest.approx([16 / 30, 9 / 30, 4 / 30, 1 / 30], abs=0.015)
    assert shares(1.0, 2, None) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.015)
    assert shares(1.0, None, 0.65) == pytest.approx([4 / 7, 3 / 7, 0, 0], abs=0.015)
    assert shares(1.0, None, 0.75) == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0], abs=0.015)
    assert shares(1e-30, None, None) == shares(0, None, None) == shares(1.0, 1, None) == shares(1.0, None, 1e-9) == [1, 0, 0, 0]


def test_ids_beyond_the_limit_are_never_drawn_and_a_stopped_row_stays_so():
    model = small()
    idx = torch.zeros(4, 1, dtype=torch.long)
    torch.manual_seed(0)
    out = model.generate(idx, 200, temperature=50.0, vocab_limit=7, stop_token=5)
    assert out.max() < 7 and out.size(1) < 201
    for row in out[:, 1:].tolist():
        assert 5 in row and set(row[row.index(5):]) == {5}


def test_the_cache_returns_all_that_was_appended():
    cache, parts = KVCache(5), [torch.randn(2, 1, n, 4) for n in (3, 1, 1)]
    for part in parts:
        k, v = cache.append(part, -part)
    assert torch.equal(k, torch.cat(parts, 2)) and torch.equal(v, -k)


def test_matrices_decay_and_vectors_do_not():
    model = small()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    decayed, rest = optimizer.param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in decayed["params"]] == [name for name, p in model.named_parameters() if p.dim() > 1]
    assert [names[id(p)] for p in rest["params"]] == [name for name, p in model.named_parameters() if p.dim() == 1]
    assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0 and optimizer.defaults["fused"]


def test_parameters_and_flops_of_gpt2():
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=50257))
        assert model.get_num_params(non_embedding=False) == 124_439_808
        assert GPT(GPTConfig(bias=False)).flops_per_token() == pytest.approx(855e6, rel=0.002)
    assert small().estimate_mfu(1, 1.0) is None  # a CPU's peak is not known


def test_crop_block_size_keeps_the_function():
    model, idx = small(), torch.arange(6)[None]
    before = model(idx)[0]
    model.crop_block_size(6)
    assert torch.equal(model(idx)[0], before) and model.config.block_size == 6
    for size in (0, 7):
        with pytest.raises(ValueError, match="block_size"):
            model.crop_block_size(size)


@pytest.mark.parametrize("changes", [dict(n_head=5), dict(n_layer=0), dict(vocab_size=-1), dict(dropout=1.0), dict(n_embd=3.5)])
def test_impossible_shapes_are_refused(changes):
    with pytest.raises(ValueError):
        GPTConfig(**dict(SMALL, **changes))


def test_too_long_an_input_is_refused():
    with pytest.raises(ValueError, match="17 tokens"):
        small()(torch.zeros(1, 17, dtype=torch.long))


def test_attention_in_bfloat16_is_that_of_float32():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 9, 8, requires_grad=True).unbind(0)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    ours = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.0)
    assert (ours - exact).abs().max() < 0.03
    gradients = [torch.autograd.grad(y.float().pow(2).sum(), (q, k, v)) for y in (exact, ours)]
    assert all((a - b).abs().max() < 0.1 for a, b in zip(*gradients))
    float32 = attend(q, k, v, 0.0)
    assert (float32 - exact).abs().max() < 1e-5
    dropped = attend(torch.zeros(1, 1, 400, 8), torch.zeros(1, 1, 400, 8), torch.ones(1, 1, 400, 8), 0.5)
    assert dropped.mean() == pytest.approx(1, abs=0.05) and dropped.std() > 0.01


@pytest.mark.parametrize("bias", [True, False])
def test_the_product_with_one_row_is_the_layers(bias):
    torch.manual_seed(0)
    layer = Linear(16, 24, bias=bias).bfloat16()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(1, 1, 16).bfloat16()
    assert torch.allclose(layer(x).float(), torch.nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None), atol=0.1)
    assert layer(x).shape == (1, 1, 24) and layer(x.view(16)).shape == (24,)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("switch, memory", [("1", "torch.ones(14 * 2 ** 20)"), ("1", "b'x' * 2 ** 25"), ("0", "b'x' * 2 ** 25")])
def test_memory_is_kept_and_used_again(switch, memory):
    code = ("import resource, torch, model; model.setup_device('cpu', 'float32', False); faults = []\n"
            f"for _ in range(5): {memory}; faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n"
            "print(faults[4] - faults[1])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ, THP_MEM_ALLOC_ENABLE=switch), capture_output=True, text=True)
    assert (int(done.stdout) < 50) == (switch == "1"), done.stdout + done.stderr  # of thousands, or, of huge pages, 84


def test_bench_compares_and_ends_with_json():
    out, _ = finish(spawn("bench.py", *"--n_layer=1 --n_head=1 --n_embd=16 --vocab_size=65 --block_size=16 --batch_size=2 --steps=2 --tokens=4".split(),
                          "--tokenize_mb=1", "--compare=True", "--device=cpu"))
    results = json.loads(out.splitlines()[-1])
    for key in "train_ours_ms train_plain_ms train_ours_gib train_plain_gib train_share_of_product sample_ours_ms sample_transformers_ms".split():
        assert results[key] > 0
    assert results["tokenize_one thread_ms"] > 0 and "ours is" in out
