"""
Where a bitwise claim rests on CUDA's kernels and generators. One GPU is enough: two processes share
it, and talk by gloo. The runs are just long enough for attention in several blocks.
"""

import pytest
from conftest import (
    HAS_GPU,
    ON_GPU,
    TINY,
    assert_logs_agree,
    assert_same_run,
    finish,
    newest,
    spawn,
)

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not HAS_GPU, reason="no CUDA GPU")]

DROPOUT = ["--dropout=0.2"]
MUON = ["--optimizer_type=muon", "--lr_schedule=wsd"]
EXACT = [*TINY, "--device=cuda", "--deterministic=True", *DROPOUT, "--n_head=1", "--n_embd=64",
         "--block_size=128"]
# a micro-batch of two tokens: the gradients are so large that float16's scale must come down
OVERFLOW = ["--block_size=2", "--batch_size=1", "--gradient_accumulation_steps=1",
            "--max_iters=7"]  # a run that ends with a skipped update saves nothing at its end


def run_twice(dataset, tmp_path, *options):
    """Trains once without a break and once with one; both end alike. Returns its checkpoint."""
    options = [*EXACT, f"--dataset={dataset}", *options]
    a, b = f"--out_dir={tmp_path / 'a'}", f"--out_dir={tmp_path / 'b'}"
    uninterrupted = spawn("train.py", *options, a, env=ON_GPU)
    finish(spawn("train.py", *options, b, "--max_iters=5", env=ON_GPU))
    at_the_break = newest(tmp_path / "b")
    finish(spawn("train.py", *options, b, "--init_from=resume", env=ON_GPU))
    finish(uninterrupted)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    return at_the_break


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("options", [
    ["--dtype=bfloat16"],
    ["--dtype=float16"],
    ["--dtype=float16", *MUON],
])
def test_deterministic_run_resumes_bitwise(dataset, tmp_path, options, compile):
    run_twice(dataset, tmp_path, f"--compile={compile}", *options)


def test_the_scale_of_float16_is_lowered_and_resumed_with_two_optimizers(dataset, tmp_path):
    saved = run_twice(dataset, tmp_path, "--dtype=float16", "--compile=False", *MUON, *OVERFLOW)
    assert saved["optimizer"]["state"][0]["step"] < 5  # some updates were skipped
    assert saved["scaler"]["scale"] < 65536
    assert len(newest(tmp_path / "a")["muon"]["state"]) == 8  # updates have reached both


@pytest.mark.parametrize("compile", [False, True])
def test_dropout_is_the_same_in_one_process_and_in_two(dataset, tmp_path, compile):
    options = [*EXACT, f"--dataset={dataset}", "--dtype=float32", f"--compile={compile}"]
    one, two = f"--out_dir={tmp_path / 'one'}", f"--out_dir={tmp_path / 'two'}"
    finish(spawn("train.py", *options, one, env=ON_GPU))
    finish(spawn("train.py", *options, two, "--backend=gloo", processes=2, env=ON_GPU))
    assert_logs_agree(tmp_path / "one", tmp_path / "two", rel=1e-3)
