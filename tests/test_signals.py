"""Signals, closed pipes and kills: what was done is saved, and the rest follows exactly."""

import os
import signal

import kill
import pytest
from conftest import (
    TINY,
    assert_same_state,
    finish,
    interrupt_at,
    newest,
    read_log,
    spawn,
    wait_for,
    world,
)

LONG = [*TINY, "--dropout=0.1", "--max_iters=60", "--eval_interval=10", "--n_embd=32"]
NOTICE = "finishing the current update, then saving (Ctrl-C again: quit now)\n"


def num_lines(out_dir):
    path = out_dir / "log.csv"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """The out_dirs of the run LONG, by number of processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for processes in (1, 2):
        world(processes, *LONG, f"--dataset={dataset}", f"--out_dir={folder / str(processes)}")
    return {1: folder / "1", 2: folder / "2"}


def assert_same_run(a, b):
    assert_same_state(newest(a), newest(b))
    assert read_log(a) == read_log(b)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_finishes_the_update_and_saves(train, run, tmp_path, monkeypatch, name):
    """Update 6 is followed by an evaluation, which is left to the resumed run."""
    number = getattr(signal, name)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 6, number)
        with pytest.raises(SystemExit) as stopped:
            train("a")
    assert stopped.value.code == 128 + number
    assert run.err == NOTICE
    assert f"stopped by {name} before iteration 6; to go on: python train.py " in run.out
    assert "step 6" not in run.out
    assert newest(tmp_path / "a")["iter_num"] == 6
    train("a", "--init_from=resume")
    train("b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("number, processes", [
    (signal.SIGTERM, 1),
    (signal.SIGTERM, 2),
    (signal.SIGINT, 2),  # which torchrun passes on twice
])
def test_a_stopped_process_goes_on_exactly(dataset, undisturbed, tmp_path, number, processes):
    options = [*LONG, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    process = spawn("train.py", *options, processes=processes if processes > 1 else None)
    wait_for(lambda: num_lines(tmp_path) > 20)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    if processes == 1:  # torchrun has its own exit status and messages
        assert process.returncode == 128 + number and err == NOTICE
    assert err.count(NOTICE) >= 1
    assert out.count(f"stopped by {number.name}") == 1
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert 10 < newest(tmp_path)["iter_num"] < 60
    world(processes, *options, "--init_from=resume")
    assert_same_run(tmp_path, undisturbed[processes])


def test_ctrl_c_in_an_evaluation_is_answered_at_once_and_a_second_one_ends_it(dataset, tmp_path):
    options = [*LONG, f"--dataset={dataset}", f"--out_dir={tmp_path / 'a'}"]
    process = spawn("train.py", *options, "--eval_iters=1000000")  # minutes
    wait_for((tmp_path / "a/log.csv").exists)
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == NOTICE
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=-signal.SIGINT)
    assert err == "stopped\n"
    assert list(tmp_path.glob("a/*.pt")) == []


def test_a_closed_pipe_is_a_saved_stop(dataset, undisturbed, tmp_path):
    """As in `python train.py ... | head -2`."""
    options = [*LONG, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    process = spawn("train.py", *options)
    for _ in range(2):
        process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=100) == 128 + signal.SIGTERM
    assert err.startswith("finishing the current update") and err.count("\n") == 1
    assert newest(tmp_path)["iter_num"] < 60
    world(1, *options, "--init_from=resume")
    assert_same_run(tmp_path, undisturbed[1])


def test_a_kill_at_any_moment_leaves_a_checkpoint(dataset, tmp_path):
    """The long version is `python tests/kill.py 100`."""
    kills, kills_while_saving, _ = kill.hunt(dataset, tmp_path, num_kills=5)
    assert kills >= 5 and kills_while_saving >= 1


def worker_ids(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the workers in /proc")
def test_torchrun_replaces_a_killed_worker(dataset, undisturbed, tmp_path):
    process = spawn("train.py", *LONG, f"--dataset={dataset}", f"--out_dir={tmp_path}",
                    "--init_from=auto", processes=2, max_restarts=3)
    wait_for(lambda: num_lines(tmp_path) > 25)
    os.kill(worker_ids(process.pid)[1], signal.SIGKILL)
    out, err = finish(process)
    assert "from iteration 10\n" in out or "from iteration 20\n" in out, out + err
    assert "connectFullMesh failed" not in err
    assert_same_run(tmp_path, undisturbed[2])
