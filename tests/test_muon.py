"""The optimizer alone, against torch.optim.Muon."""

import pytest
import torch

from muon import Muon

# (n_layer, n_embd) -> matrices of GPT-2's blocks
TINY = (1, 48)
SIZES = [TINY, (2, 160), (2, 384)]


def make_params(n_layer, n_embd):
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(n_layer):
        for rows, columns in ((3, 1), (1, 1), (4, 1), (1, 4)):
            weight = torch.randn(rows * n_embd, columns * n_embd, generator=generator)
            params.append(torch.nn.Parameter(0.02 * weight))
    return params


def set_grads(seed, *models):
    """The same random gradients for the parameters of each model."""
    generator = torch.Generator().manual_seed(seed)
    for params in zip(*models, strict=True):
        grad = 1e-3 * torch.randn(params[0].shape, generator=generator)
        for param in params:
            param.grad = grad.clone()


def make_torch_muon(params, lr=0.01, weight_decay=0.1):
    return torch.optim.Muon(params, lr, weight_decay, adjust_lr_fn="match_rms_adamw")


def assert_same_training(ours, our_params, theirs, their_params, steps, seed=0):
    """Both optimizers take `steps` steps at a varying learning rate and agree bit for bit."""
    for step in range(steps):
        set_grads(seed + step, our_params, their_params)
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            optimizer.step()
    for a, b in zip(our_params, their_params, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(ours.state[a]["momentum_buffer"], theirs.state[b]["momentum_buffer"])


@pytest.mark.parametrize("n_layer, n_embd", SIZES)
def test_equals_torch_bit_for_bit(n_layer, n_embd):
    ours, theirs = make_params(n_layer, n_embd), make_params(n_layer, n_embd)
    our_muon = Muon(ours, lr=0.01, weight_decay=0.1)
    assert_same_training(our_muon, ours, make_torch_muon(theirs), theirs, steps=2)


@pytest.mark.parametrize("from_torch", [True, False])
def test_state_moves_between_torch_and_ours(tmp_path, from_torch):
    """A checkpoint of one optimizer continues in the other as in itself."""
    makers = [make_torch_muon, Muon] if from_torch else [Muon, make_torch_muon]
    params, other_params = make_params(*TINY), make_params(*TINY)
    optimizer, other = makers[0](params), makers[1](other_params)
    for seed in range(2):
        set_grads(seed, params)
        optimizer.step()

    torch.save((params, optimizer.state_dict()), tmp_path / "state.pt")
    saved_params, state = torch.load(tmp_path / "state.pt", weights_only=True)
    with torch.no_grad():
        for param, saved in zip(other_params, saved_params, strict=True):
            param.copy_(saved)
    other.load_state_dict(state)
    assert_same_training(optimizer, params, other, other_params, steps=2, seed=2)
