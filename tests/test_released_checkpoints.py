"""
Checkpoints of released versions, in tests/checkpoints, that every later version must resume.

Each was saved after 4 updates of a tiny run; the losses are those of the next 4. `python
tests/test_released_checkpoints.py` adds a set for the current version and prints its losses.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import make_dataset, read_losses, world

FOLDER = Path(__file__).resolve().parent / "checkpoints"
OPTIONS = ["--n_layer=1", "--n_embd=8", "--eval_interval=4"]
RUNS = {
    "adamw": ["--dropout=0.1"],
    "muon": ["--optimizer_type=muon", "--lr_schedule=wsd"],
    "float16": ["--dtype=float16"],
}
SINCE_0_9 = {
    "adamw": [3.22594, 3.25778, 3.198, 3.21239],
    "muon": [3.22409, 3.23636, 3.16342, 3.15176],
    "float16": [3.218, 3.23971, 3.1799, 3.19135],
}
LOSSES = {f"{version}-{run}": losses for version in ("0.12.0", "0.11.0", "0.10.0", "0.9.0")
          for run, losses in SINCE_0_9.items()}
# names with _orig_mod., and no keys but nanoGPT's
LOSSES["0.9.0-compiled"] = LOSSES["0.9.0-nanogpt"] = [3.21803, 3.23965, 3.17989, 3.1913]


def resume(name, dataset, out_dir):
    """The losses of updates 4 to 7, from the stored checkpoint."""
    out_dir.mkdir()
    shutil.copy(FOLDER / f"{name}.pt", out_dir / "ckpt.pt")
    world(1, *OPTIONS, *RUNS.get(name.partition("-")[2], []), f"--dataset={dataset}",
          f"--out_dir={out_dir}", "--init_from=resume")
    return read_losses(out_dir)


@pytest.mark.parametrize("name", LOSSES)
def test_released_checkpoint_resumes_to_the_stored_losses(dataset, tmp_path, name):
    tolerance = 2e-3 if "muon" in name or "float16" in name else 2e-4
    assert resume(name, dataset, tmp_path / name) == pytest.approx(LOSSES[name], abs=tolerance)


def save_checkpoints(version):
    """Saves a checkpoint of each run, and prints the losses that follow it."""
    make_dataset(Path())
    for key in RUNS:
        name = f"{version}-{key}"
        world(1, *OPTIONS, *RUNS[key], "--dataset=.", f"--out_dir={key}", "--max_iters=4")
        shutil.copy(f"{key}/ckpt.pt", FOLDER / f"{name}.pt")
        losses = [round(loss, 5) for loss in resume(name, ".", Path(name))]
        print(f'    "{name}": {losses},')


if __name__ == "__main__":
    from checkpoint import VERSION
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        save_checkpoints(VERSION)
