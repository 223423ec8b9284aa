"""bench.py: its table and its JSON line. The figures themselves are not tested."""

import json

import pytest
import torch

TINY = """
    --n_layer=1 --n_head=1 --n_embd=16 --vocab_size=65 --block_size=16 --batch_size=2 --steps=2
    --tokens=4 --tokenize_mb=0 --device=cpu --dtype=float32
""".split()


def read_json(out):
    return json.loads(out.splitlines()[-1])


def test_last_line_is_json_with_settings_and_figures(run):
    run("bench.py", *TINY, "--num_samples=3", "--tokenize_mb=1")
    results = read_json(run.out)
    assert results["n_embd"] == 16 and results["device"] == "cpu" and results["compile"] is False
    assert results["torch"] == torch.__version__
    assert results["gpu"] is None and results["mfu"] is None
    for key in ("matmul_tflops", "train_tflops", "train_ours_ms", "sample_ours_ms",
                "tokenize_ours_ms"):
        assert results[key] > 0
    for part, amount in (("train", 2 * 16), ("sample", 3 * 4), ("tokenize", 1.115394)):
        rate = amount / results[f"{part}_ours_ms"] * 1000
        assert results[f"{part}_ours_rate"] == pytest.approx(rate, rel=0.05)
        assert f"{part} " in run.out
    assert "train_baseline_ms" not in results


def test_compare_gives_the_ratio_to_each_baseline(run):
    run("bench.py", *TINY, "--compare=True")
    results = read_json(run.out)
    for key in ("train_baseline", "sample_baseline", "sample_transformers"):
        ours = results[key.split("_")[0] + "_ours_ms"]
        assert results[f"{key}_ratio"] == pytest.approx(results[f"{key}_ms"] / ours, rel=0.1)
    assert run.out.count("x as fast") == 3


def test_transformers_is_left_out_of_texts_beyond_its_context(run):
    run("bench.py", *TINY, "--compare=True", "--tokens=12")
    results = read_json(run.out)
    assert results["sample_baseline_ms"] > 0
    assert "sample_transformers_ms" not in results


def test_muon_is_measured_and_parts_can_be_left_out(run):
    run("bench.py", *TINY, "--tokens=0", "--optimizer_type=muon")
    results = read_json(run.out)
    assert results["optimizer_type"] == "muon" and results["train_ours_ms"] > 0
    assert "sample_ours_ms" not in results and "tokenize_ours_ms" not in results


@pytest.mark.parametrize("argument", ["--steps=0", "--tokens=-1", "--optimizer_type=sgd"])
def test_impossible_settings_are_refused(run, argument):
    with pytest.raises(ValueError, match=argument[2:].split("=")[0]):
        run("bench.py", *TINY, argument)
