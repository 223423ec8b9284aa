"""Several processes: they do what one does, resume exactly, and end together."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    TINY,
    assert_logs_agree,
    assert_same_run,
    finish,
    fork_world,
    interrupt_at,
    newest,
    spawn,
    world,
)

DROPOUT = ["--dropout=0.2"]
MUON = ["--optimizer_type=muon", "--lr_schedule=wsd", *DROPOUT]


@pytest.mark.parametrize("processes, options, rel", [
    (3, DROPOUT, 1e-5),
    (2, MUON, 1e-3),  # it computes in bfloat16
    (2, [*MUON, "--dtype=float16"], 1e-2),
])
def test_several_processes_do_what_one_does_and_continue_its_run(
        train, dataset, tmp_path, processes, options, rel):
    one, several = tmp_path / "one", tmp_path / "several"
    options = [*options, f"--dataset={dataset}", f"--gradient_accumulation_steps={2 * processes}"]
    train("one", *options)
    world(processes, *options, f"--out_dir={several}")
    assert_logs_agree(one, several, rel)
    # each continues the run of the other
    train("several", *options, "--max_iters=10", "--init_from=resume")
    world(processes, *options, f"--out_dir={one}", "--max_iters=10", "--init_from=resume")
    assert_logs_agree(one, several, rel)


@pytest.mark.parametrize("processes", [2, 3, 5])
def test_several_processes_resume_bitwise(dataset, tmp_path, monkeypatch, processes):
    """From 3 processes on, the order of sums and the rounding of means matter."""
    options = [f"--dataset={dataset}", f"--gradient_accumulation_steps={2 * processes}", *MUON]
    world(processes, *options, f"--out_dir={tmp_path / 'a'}")
    options += [f"--out_dir={tmp_path / 'b'}"]
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2 * 4 - 1, rank="1")  # the others get no signal
        assert fork_world(processes, *options) == [128 + signal.SIGTERM] * processes
    assert newest(tmp_path / "b")["iter_num"] == 4
    world(processes, *options, "--init_from=resume")
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("processes, options", [
    (1, []),
    (1, ["--dtype=float16", "--optimizer_type=muon"]),
    (2, ["--dtype=bfloat16"]),
])
def test_gradient_checkpointing_changes_nothing(dataset, tmp_path, processes, options):
    """With dropout, whose masks must be drawn again alike."""
    options = [*options, *DROPOUT, f"--dataset={dataset}"]
    world(processes, *options, f"--out_dir={tmp_path / 'a'}")
    world(processes, *options, f"--out_dir={tmp_path / 'b'}", "--gradient_checkpointing=True")
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert newest(tmp_path / "b")["config"]["gradient_checkpointing"]
    assert "gradient_checkpointing" not in newest(tmp_path / "b")["model_args"]  # as nanoGPT reads


def test_a_mistake_under_torchrun_is_named_without_a_traceback():
    process = spawn("train.py", "--gradient_accumulation_steps=3", processes=2)
    _, err = finish(process, code=1)
    assert "error: gradient_accumulation_steps=3 is not divisible by 2 processes" in err
    assert f'{ROOT / "train.py"}", line' not in err


@pytest.mark.parametrize("option, named", [
    ("--out_dir=out", "iter_num"),  # as on two machines whose out_dir is not shared
    ("--seed=", "settings"),
    ("--wandb_run_name=", None),  # a config may put the time into it
])
def test_processes_that_differ_are_an_error(train, dataset, tmp_path, capfd, option, named):
    def differ():
        os.chdir(tmp_path / os.environ["RANK"])
        sys.argv.append(option if option == "--out_dir=out" else option + os.environ["RANK"])
    train("0/out", "--max_iters=3")
    (tmp_path / "1").mkdir()
    codes = fork_world(2, f"--dataset={dataset}", f"--out_dir={tmp_path / 'new'}",
                       "--init_from=auto", before=differ)
    assert codes == ([1, 1] if named else [0, 0])
    errors = capfd.readouterr().err.count(f"error: the processes differ in their {named}: ")
    assert errors == (1 if named else 0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2")
def test_two_hosts_do_what_two_processes_on_one_do(dataset, tmp_path):
    options = [*TINY, *DROPOUT, f"--dataset={dataset}"]
    world(2, *options, f"--out_dir={tmp_path / 'one'}")
    torchrun = Path(sys.executable).with_name("torchrun")
    command = ["bash", ROOT / "tests/two_hosts.sh", ROOT / "train.py", *options,
               f"--out_dir={tmp_path / 'two'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240,
                            env=dict(os.environ, TORCHRUN=str(torchrun)))
    if result.returncode == 77:
        pytest.skip("network namespaces are not allowed here")
    assert result.returncode == 0, result.stdout + result.stderr
    assert_same_run(tmp_path / "one", tmp_path / "two")
