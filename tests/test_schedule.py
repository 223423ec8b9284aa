"""Updates: their learning rate, their number, and which optimizer makes them."""

import math
import weakref

import pytest
import torch
from conftest import newest, on_forward, read_log

WSD = ["--lr_schedule=wsd", "--lr_decay_iters=20"]
A_QUARTER_DOWN = 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2  # of half a cosine from 1.0 to 0.2


@pytest.mark.parametrize("options, expected", [
    (["--lr_decay_iters=12"],
     {0: 0.2, 3: 0.8, 4: 1.0, 6: A_QUARTER_DOWN, 8: 0.6, 12: 0.2, 1000: 0.2}),
    (["--lr_decay_iters=2"], {3: 0.8, 4: 0.2, 5: 0.2}),  # ends before the warm-up
    (["--lr_decay_iters=4"], {3: 0.8, 4: 0.2, 5: 0.2}),
    (["--decay_lr=False"], {0: 1.0, 4: 1.0, 1000: 1.0}),
    ([*WSD, "--decay_frac=0.5"], {0: 0.2, 4: 1.0, 10: 1.0, 15: 0.6, 19: 0.28, 20: 0.2, 1000: 0.2}),
    ([*WSD, "--decay_frac=0.0"], {0: 0.2, 4: 1.0, 19: 1.0, 20: 0.2}),
    ([*WSD, "--decay_frac=1.0"], {3: 0.8, 4: 1.0, 12: 0.6, 20: 0.2}),  # all after the warm-up
])
def test_learning_rates_by_hand(train, options, expected):
    get_lr = train("a", "--max_iters=0", "--learning_rate=1.0", "--min_lr=0.2",
                   "--warmup_iters=4", *options)["get_lr"]
    assert {iteration: get_lr(iteration) for iteration in expected} == pytest.approx(expected)


def test_a_run_that_goes_on_at_a_learning_rate_of_0_says_so(train, run):
    train("a", "--min_lr=0.0", "--max_iters=9")
    assert "note: max_iters=9, but the learning rate is 0 from lr_decay_iters=8 on\n" in run.out


def test_the_optimizers_use_the_rate_of_their_update(train, tmp_path):
    """The last update of 3 with warmup_iters=2 is the first at the full rate."""
    result = train("a", "--max_iters=3", "--optimizer_type=muon", "--muon_lr_scale=3.0")
    rates = [float(row["lr"]) for row in read_log(tmp_path / "a") if row["loss"]]
    assert rates == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    for name, scale in (("optimizer", 1), ("muon", 3)):
        for group in result["state"][name].param_groups:
            assert group["lr"] == pytest.approx(0.01 * scale)


@pytest.mark.parametrize("max_iters", [1, 5])
def test_a_run_makes_exactly_max_iters_updates(train, tmp_path, max_iters):
    state = train("a", f"--max_iters={max_iters}")["state"]
    assert state["iter_num"] == max_iters
    steps = {int(values["step"]) for values in state["optimizer"].state.values()}
    assert steps == {max_iters}
    assert newest(tmp_path / "a")["iter_num"] == max_iters


def test_muon_updates_the_matrices_of_the_blocks_and_adamw_the_rest(train):
    options = ["--optimizer_type=muon", "--muon_lr_scale=3.0", "--weight_decay=0.0",
               "--warmup_iters=0"]
    before = train("a", *options, "--max_iters=0")["model"].state_dict()
    state = train("b", *options, "--max_iters=1")["state"]
    for name, p in state["model"].named_parameters():
        is_block_matrix = ".h." in name and p.dim() == 2
        assert (p in state["muon"].state) == is_block_matrix, name
        assert (p in state["optimizer"].state) != is_block_matrix, name
        update = (p.detach() - before[name]) / 0.01  # learning_rate
        if is_block_matrix:  # all singular values near muon_lr_scale * 0.2 * sqrt(larger side)
            values = torch.linalg.svdvals(update) / (3.0 * 0.2 * math.sqrt(max(p.shape)))
            assert values.max() < 1.3 and values.median() > 0.6, name
        elif "wte" in name:
            assert update.abs().max() < 1.01


def test_an_update_leaves_no_gradients_behind(train, monkeypatch):
    """They are as large as the model."""
    gradients = []
    get_total_norm = torch.nn.utils.get_total_norm

    def remember(tensors):
        gradients[:] = map(weakref.ref, tensors)
        return get_total_norm(tensors)

    def check(loss, training, number):
        assert not any(reference() is not None for reference in gradients)
        return loss
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", remember)
    on_forward(monkeypatch, check)
    train("a", "--max_iters=2")
    assert gradients
