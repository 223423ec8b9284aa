"""bench.py: its table and its JSON line. The figures themselves are not tested."""

import json

import pytest
import torch

TINY = """
    --n_layer=1 --n_head=1 --n_embd=16 --vocab_size=65 --block_size=16 --batch_size=2 --steps=2
    --tokens=20 --device=cpu --dtype=float32
""".split()  # more tokens than fit into a context


def read_json(out):
    return json.loads(out.splitlines()[-1])


def test_last_line_is_json_with_settings_and_figures(run):
    run("bench.py", *TINY, "--compare=True")
    results = read_json(run.out)
    assert results["n_embd"] == 16 and results["device"] == "cpu" and results["compile"] is False
    assert results["torch"] == torch.__version__ and results["gpu"] is None
    for part, num_tokens in (("train", 2 * 16), ("sample", 20)):
        rate = num_tokens / results[f"{part}_ours_ms"] * 1000
        assert results[f"{part}_ours_rate"] == pytest.approx(rate)
        ratio = results[f"{part}_baseline_ms"] / results[f"{part}_ours_ms"]
        assert results[f"{part}_baseline_ratio"] == pytest.approx(ratio)
        assert f"{part} ours: " in run.out
        assert f"{part} baseline: " in run.out and f"{ratio:.2f} x ours" in run.out


def test_muon_is_measured_and_sampling_can_be_left_out(run):
    run("bench.py", *TINY, "--tokens=0", "--optimizer_type=muon")
    results = read_json(run.out)
    assert results["optimizer_type"] == "muon" and results["train_ours_ms"] > 0
    assert "sample_ours_ms" not in results and "train_baseline_ms" not in results
