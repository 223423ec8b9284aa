"""Several processes: they do what one does, and end together."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import (
    ROOT,
    TINY,
    assert_same_state,
    finish,
    newest,
    read_log,
    spawn,
    world,
)

DROPOUT = ["--dropout=0.2"]
MUON = ["--optimizer_type=muon", "--lr_schedule=wsd", *DROPOUT]


def assert_logs_agree(a, b, rel):
    """All columns of two logs, up to rounding."""
    assert len(a) == len(b) > 0
    for row, other_row in zip(a, b, strict=True):
        for column, cell in row.items():
            if cell == "" or other_row[column] == "":
                assert cell == other_row[column]
            else:
                assert float(cell) == pytest.approx(float(other_row[column]), rel=rel), column


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_do_what_one_does_and_continue_its_run(
        train, dataset, tmp_path, processes):
    one, several = tmp_path / "one", tmp_path / "several"
    options = [f"--dataset={dataset}", *DROPOUT]
    train("one", *DROPOUT)
    world(processes, *options, f"--out_dir={several}")
    assert_logs_agree(read_log(one), read_log(several), rel=1e-5)
    # each continues the run of the other
    train("several", *DROPOUT, "--max_iters=10", "--init_from=resume")
    world(processes, *options, f"--out_dir={one}", "--max_iters=10", "--init_from=resume")
    assert_logs_agree(read_log(one), read_log(several), rel=1e-5)


@pytest.mark.parametrize("dtype, rel", [
    ("float32", 1e-3),  # Muon computes in bfloat16
    ("float16", 1e-2),
])
def test_two_processes_with_muon_do_what_one_does(train, dataset, tmp_path, dtype, rel):
    options = [f"--dtype={dtype}", *MUON]
    train("one", *options)
    world(2, f"--dataset={dataset}", f"--out_dir={tmp_path / 'two'}", *options)
    assert_logs_agree(read_log(tmp_path / "one"), read_log(tmp_path / "two"), rel)


def test_four_processes_resume_bitwise_if_deterministic(dataset, tmp_path):
    """Four add gradients in an order that DDP changes after its first step, unless told not to."""
    options = [f"--dataset={dataset}", "--dropout=0.1", "--deterministic=True", "--max_iters=6",
               "--eval_interval=6"]
    world(4, *options, f"--out_dir={tmp_path / 'a'}")
    world(4, *options, f"--out_dir={tmp_path / 'b'}", "--max_iters=3")
    world(4, *options, f"--out_dir={tmp_path / 'b'}", "--init_from=resume")
    assert_same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))


def test_under_torchrun_only_the_master_process_prints(dataset, tmp_path):
    process = spawn("train.py", *TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / 'a'}",
                    processes=2)
    out, _ = finish(process)
    lines = out.splitlines()
    for start in ("0.01M parameters", "step 0:", "iter 7:", "step 8:", "best val loss"):
        assert len([line for line in lines if line.startswith(start)]) == 1, start


def test_an_error_under_torchrun_shows_its_line_and_no_traceback_of_ours(dataset, tmp_path):
    process = spawn("train.py", *TINY, f"--dataset={dataset}", "--gradient_accumulation_steps=3",
                    processes=2, cwd=tmp_path)
    _, err = finish(process, code=1)
    assert "error: gradient_accumulation_steps=3 is not divisible by 2 processes" in err
    assert f'{ROOT / "train.py"}", line' not in err


@pytest.mark.parametrize("env", [
    dict(RANK="0"),
    dict(WORLD_SIZE="2"),
    dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2"),  # without the address of the master process
    dict(RANK="2", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1"),
    dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="two", MASTER_ADDR="localhost", MASTER_PORT="1"),
])
def test_an_incomplete_process_group_is_an_error(train, tmp_path, monkeypatch, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="launch with torchrun, or unset RANK and WORLD_SIZE"):
        train("a")
    assert not (tmp_path / "a").exists()


@pytest.mark.slow
def test_processes_that_find_different_checkpoints_are_an_error(train, dataset, tmp_path):
    """As on two machines whose out_dir is not shared: each process has its own folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                "--no-python", "sh", "-c", 'cd $RANK && exec "$0" "$@"']
    train("0/out", "--max_iters=3")
    (tmp_path / "1").mkdir()
    script = [sys.executable, str(ROOT / "train.py")]
    options = [*TINY, f"--dataset={dataset}", "--out_dir=out", "--init_from=auto"]
    result = subprocess.run([*torchrun, *script, *options], cwd=tmp_path, capture_output=True,
                            text=True, timeout=120)
    assert result.returncode == 1
    assert "error: the processes differ in their checkpoints, settings or data" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("setting, status", [("seed", 1), ("wandb_run_name", 0)])
def test_processes_with_different_settings_are_an_error(dataset, tmp_path, setting, status):
    """But for paths, and names of runs: a config may put the time into these."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                "--no-python", "sh", "-c", f'exec "$0" "$@" --{setting}=$RANK']
    script = [sys.executable, str(ROOT / "train.py")]
    options = [*TINY, f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}"]
    result = subprocess.run([*torchrun, *script, *options], capture_output=True, text=True,
                            timeout=120)
    assert result.returncode == status
    assert ("error: the processes differ" in result.stderr) == bool(status)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2")
def test_two_hosts_do_what_two_processes_on_one_do(dataset, tmp_path):
    options = [*DROPOUT, f"--dataset={dataset}"]
    world(2, *options, f"--out_dir={tmp_path / 'one'}")
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    command = ["bash", str(ROOT / "tests/two_hosts.sh"), str(ROOT / "train.py"), *TINY, *options]
    result = subprocess.run([*command, f"--out_dir={tmp_path / 'two'}"], capture_output=True,
                            text=True, env=dict(os.environ, TORCHRUN=str(torchrun)), timeout=240)
    if result.returncode == 77:
        pytest.skip("network namespaces are not allowed here")
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same_state(newest(tmp_path / "one"), newest(tmp_path / "two"))
    assert read_log(tmp_path / "one") == read_log(tmp_path / "two")
