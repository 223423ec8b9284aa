"""
Checkpoints of released versions, in tests/checkpoints, that every later version must resume.

Each was saved after 4 updates of a tiny run; the losses are those of the next 4. `python
tests/test_released_checkpoints.py` adds a set for the current version and prints its losses.
"""

import os
import runpy
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, make_dataset, read_losses

FOLDER = Path(__file__).parent / "checkpoints"
OPTIONS = ["--n_layer=1", "--n_embd=8", "--max_iters=8", "--log_interval=1"]
RUNS = {
    "adamw": ["--dropout=0.1"],
    "muon": ["--optimizer_type=muon", "--lr_schedule=wsd"],
    "float16": ["--dtype=float16"],
    "compiled": [],  # names with _orig_mod.
    "nanogpt": [],  # no keys but nanoGPT's
}
LOSSES = {
    "0.9.0-adamw": [3.22594, 3.25778, 3.198, 3.21239],
    "0.9.0-muon": [3.22409, 3.23636, 3.16342, 3.15176],
    "0.9.0-float16": [3.218, 3.23971, 3.1799, 3.19135],
    "0.9.0-compiled": [3.21803, 3.23965, 3.17989, 3.1913],
    "0.9.0-nanogpt": [3.21803, 3.23965, 3.17989, 3.1913],
}


def resume(name, out_dir, train):
    options = RUNS[name.partition("-")[2]]
    out_dir.mkdir()
    shutil.copy(FOLDER / f"{name}.pt", out_dir / "ckpt.pt")
    train(*OPTIONS, *options, "--init_from=resume", f"--out_dir={out_dir}")
    return read_losses(out_dir)


@pytest.mark.parametrize("name", LOSSES)
def test_released_checkpoint_resumes_to_the_stored_losses(train, tmp_path, name):
    losses = resume(name, tmp_path / name, lambda *options: train(name, *options))
    tolerance = 2e-3 if "muon" in name or "float16" in name else 2e-4
    assert losses == pytest.approx(LOSSES[name], abs=tolerance)


def save_checkpoints(version):
    """Saves a checkpoint of each run, and prints the losses that follow it."""
    def train(*options):
        sys.argv = ["train.py", *TINY, f"--dataset={folder}", *options]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    folder = Path(tempfile.mkdtemp())
    make_dataset(folder)
    FOLDER.mkdir(exist_ok=True)
    for key, options in RUNS.items():
        train(*OPTIONS, *options, "--max_iters=4", f"--out_dir={folder / key}")
        path = max(folder.glob(f"{key}/*.pt"), key=lambda path: torch.load(path)["iter_num"])
        saved = torch.load(path)
        if key == "nanogpt":
            keep = ("model", "optimizer", "model_args", "iter_num", "best_val_loss", "config")
            saved = {name: saved[name] for name in keep}
            saved["best_val_loss"] = torch.tensor(saved["best_val_loss"])
        if key == "compiled":
            saved["model"] = {"_orig_mod." + name: p for name, p in saved["model"].items()}
        torch.save(saved, FOLDER / f"{version}-{key}.pt")
    results = {}
    for key in RUNS:
        name = f"{version}-{key}"
        results[name] = resume(name, folder / name, train)
    for name, losses in results.items():
        print(f'    "{name}": {[round(loss, 5) for loss in losses]},')


if __name__ == "__main__":
    from checkpoint import VERSION
    os.chdir(ROOT)
    save_checkpoints(VERSION)
