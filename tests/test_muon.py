"""The optimizer alone, against torch.optim.Muon."""

import pytest
import torch

from muon import Muon


def make_params(n_layer, n_embd):
    """The matrices of GPT-2's blocks."""
    generator = torch.Generator().manual_seed(0)
    params = []
    for _ in range(n_layer):
        for rows, columns in ((3, 1), (1, 1), (4, 1), (1, 4)):
            weight = torch.randn(rows * n_embd, columns * n_embd, generator=generator)
            params.append(torch.nn.Parameter(0.02 * weight))
    return params


@pytest.mark.parametrize("n_layer, n_embd", [(1, 48), (2, 160), (2, 384)])
def test_equals_torch_bit_for_bit(n_layer, n_embd):
    """Weights and momentum, at a varying learning rate."""
    our_params, their_params = make_params(n_layer, n_embd), make_params(n_layer, n_embd)
    ours = Muon(our_params, lr=0.01, weight_decay=0.1)
    theirs = torch.optim.Muon(their_params, 0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    torch.manual_seed(0)
    for step in range(3):
        for a, b in zip(our_params, their_params, strict=True):
            a.grad = 1e-3 * torch.randn(a.shape)
            b.grad = a.grad.clone()
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
            optimizer.step()
    for a, b in zip(our_params, their_params, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(ours.state[a]["momentum_buffer"], theirs.state[b]["momentum_buffer"])
