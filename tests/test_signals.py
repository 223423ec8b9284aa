"""Signals, closed pipes, errors and kills: what was done is saved, and the rest follows exactly."""

import functools
import os
import re
import signal

import kill
import pytest
from conftest import (
    TINY,
    assert_same_run,
    finish,
    fork_world,
    interrupt_at,
    newest,
    on_forward,
    read_log,
    spawn,
    wait_for,
    world,
)

import runtime

LONG = [*TINY, "--dropout=0.1", "--max_iters=60", "--eval_interval=10", "--n_embd=32",
        "--gradient_accumulation_steps=6"]
SHORT = [*kill.LINES, "--max_iters=6"]  # with evaluations before updates 2 and 4 and at the end
NOTICE = "finishing the current update, then saving (Ctrl-C again: quit now)\n"
TERMINATED = 128 + signal.SIGTERM


def num_lines(out_dir):
    path = out_dir / "log.csv"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """The out_dirs of the run LONG, by number of processes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for processes in (1, 2, 3):
        world(processes, *LONG, f"--dataset={dataset}", f"--out_dir={folder / str(processes)}")
    return {processes: folder / str(processes) for processes in (1, 2, 3)}


def test_a_signal_finishes_the_update_and_saves(train, run, tmp_path, monkeypatch):
    """Update 6 is followed by an evaluation, which is left to the resumed run."""
    train("undisturbed")
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        number = getattr(signal, name)
        with monkeypatch.context() as patch:
            interrupt_at(patch, 4 * 6 - 1, number)
            with pytest.raises(SystemExit) as stopped:
                train(name)
        assert stopped.value.code == 128 + number
        assert run.err == NOTICE
        assert f"stopped by {name}; to go on from iteration 6: python train.py " in run.out
        assert "step 6" not in run.out
        assert newest(tmp_path / name)["iter_num"] == 6
        train(name, "--init_from=resume")
        assert_same_run(tmp_path / name, tmp_path / "undisturbed")


@pytest.mark.parametrize("processes, signalled", [(1, "0"), (2, "1"), (3, "12")])
def test_a_signal_in_an_evaluation_is_answered_within_a_batch(
        dataset, tmp_path, monkeypatch, processes, signalled):
    """Also by processes that get none. The evaluation is repeated on resume."""
    options = [f"--dataset={dataset}", "--eval_iters=6", "--gradient_accumulation_steps=6"]
    world(processes, *options, f"--out_dir={tmp_path / 'undisturbed'}")
    first_batch = 12 // processes  # of the evaluation before update 3

    def stop_in_evaluation(loss, training, number):
        if not training and number == first_batch:
            if os.environ.get("RANK", "0") in signalled:
                signal.raise_signal(signal.SIGTERM)
            wait_for(runtime.stop_requested, seconds=30)
        assert training or number <= first_batch, "one more batch"
        return loss
    with monkeypatch.context() as patch:
        on_forward(patch, stop_in_evaluation)
        codes = fork_world(processes, *options, f"--out_dir={tmp_path / 'a'}")
        assert codes == [TERMINATED] * processes
    assert newest(tmp_path / "a")["iter_num"] == 3
    assert not any(row["iter"] == "3" for row in read_log(tmp_path / "a"))
    world(processes, *options, f"--out_dir={tmp_path / 'a'}", "--init_from=resume")
    assert_same_run(tmp_path / "a", tmp_path / "undisturbed")


@pytest.mark.parametrize("number, processes", [
    (signal.SIGTERM, 1),
    (signal.SIGINT, 2),  # which torchrun passes on twice
])
def test_a_stopped_process_goes_on_exactly(dataset, undisturbed, tmp_path, number, processes):
    """And prints its lines once, to a pipe in UTF-8 whatever the locale is."""
    out_dir = tmp_path / "日本 1"
    options = [*LONG, f"--dataset={dataset}", f"--out_dir={out_dir}"]
    process = spawn("train.py", *options, processes=processes if processes > 1 else None,
                    env=os.environ | {"PYTHONIOENCODING": "ascii"})
    wait_for(lambda: num_lines(out_dir) > 20)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    if processes == 1:  # torchrun has its own exit status and messages
        assert process.returncode == 128 + number and err == NOTICE
    assert err.count(NOTICE) >= 1
    for line in ("M parameters, ", "step 0:", "iter 7:", f"stopped by {number.name}; to go on "):
        assert out.count(line) == 1
    assert out.endswith(f"python train.py --out_dir='{out_dir}' --init_from=resume\n")
    assert 10 < newest(out_dir)["iter_num"] < 60
    world(processes, *options, "--init_from=resume")
    assert_same_run(out_dir, undisturbed[processes])


def test_a_second_ctrl_c_ends_a_run_at_once(dataset, tmp_path):
    process = spawn("train.py", *LONG, f"--dataset={dataset}", f"--out_dir={tmp_path}",
                    "--block_size=64", "--batch_size=1024")  # updates of seconds
    while "step 0" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == NOTICE
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=-signal.SIGINT)
    assert "Traceback" not in err  # Python 3.14 may note a leaked semaphore
    assert list(tmp_path.glob("*.pt")) == []


def test_a_closed_pipe_is_a_saved_stop(dataset, undisturbed, tmp_path):
    """As in `python train.py ... | head -5`."""
    options = [*LONG, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    process = spawn("train.py", *options)
    for _ in range(5):
        process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=100) == 1
    assert re.fullmatch(r"stopped\nsaved last.pt before iteration \d+\n", err)
    assert newest(tmp_path)["iter_num"] < 60
    world(1, *options, "--init_from=resume")
    assert_same_run(tmp_path, undisturbed[1])


@pytest.fixture(scope="module")
def find_line(dataset, tmp_path_factory):
    """
    find_line(place, iter_num, processes, rank) -> the out_dir of the run SHORT, and the first line
    that the process runs in this function and iteration: its index and Position.
    """
    folder = tmp_path_factory.mktemp("short")
    list_positions = functools.cache(kill.list_positions)

    def find_line(place, iter_num, processes, rank):
        out_dir = folder / f"{processes}{rank}"
        positions = list_positions(out_dir, *SHORT, f"--dataset={dataset}", processes=processes,
                                   rank=rank)
        index = [(p.function, p.iter_num) for p in positions].index((place, iter_num))
        return out_dir, index, positions[index]
    return find_line


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("place, iter_num", [
    ("get_lr", 3), ("forward", 3), ("load_sequences", 3), ("log_metrics", 3),
    ("estimate_loss", 4), ("save", 6),
])
def test_an_error_anywhere_in_the_loop_loses_no_finished_update(
        find_line, dataset, tmp_path, capfd, processes, place, iter_num):
    """The other process loses its connection, and saves as well."""
    rank = str(processes - 1)
    undisturbed, index, position = find_line(place, iter_num, processes, rank)
    kill.check_line(index, position, None, undisturbed, tmp_path, *SHORT, f"--dataset={dataset}",
                    processes=processes, rank=rank)
    num_saves = capfd.readouterr().err.count("saved last.pt before iteration ")
    assert num_saves == (1 if place == "save" else processes)  # it had saved ckpt.pt


@pytest.mark.parametrize("place, iter_num", [("load_sequences", 3), ("save", 4)])
def test_a_process_that_loses_its_peer_saves(find_line, dataset, tmp_path, place, iter_num):
    """Rank 0, which saves otherwise, is killed, and may not have written what it was to write."""
    undisturbed, index, _ = find_line(place, iter_num, 2, "0")
    options = [*SHORT, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    before = kill.disturb(index, signal.SIGKILL)
    assert fork_world(2, *options, before=before) == [-signal.SIGKILL, 1]
    assert newest(tmp_path)["iter_num"] == iter_num
    world(2, *options, "--init_from=resume")
    assert_same_run(tmp_path, undisturbed)


def test_an_error_in_the_update_itself_falls_back_to_the_latest_checkpoint(dataset, tmp_path):
    options = [*kill.LINES, f"--dataset={dataset}"]
    positions = kill.list_positions(tmp_path / "a", *options)
    in_update = [i for i, p in enumerate(positions) if p.updating and p.saved_iter is None]
    for index in (in_update[0], in_update[-1]):
        left = kill.check_line(index, positions[index], None, tmp_path / "a",
                               tmp_path / str(index), *options)
        assert left is None


def test_an_error_or_a_signal_at_any_line_is_survived(dataset, tmp_path):
    """All lines: `python tests/kill.py lines`."""
    assert kill.check_lines(dataset, tmp_path, every=97) >= 10


def test_a_kill_at_any_moment_leaves_a_checkpoint(dataset, tmp_path):
    """The long version is `python tests/kill.py 100`."""
    assert kill.hunt(dataset, tmp_path, num_kills=5)[0] >= 5


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the workers in /proc")
def test_torchrun_replaces_a_killed_worker_of_three(dataset, undisturbed, tmp_path):
    process = spawn("train.py", *LONG, f"--dataset={dataset}", f"--out_dir={tmp_path}",
                    "--init_from=auto", processes=3, max_restarts=3)
    wait_for(lambda: num_lines(tmp_path) > 25)
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        workers = file.read().split()
    os.kill(int(workers[1]), signal.SIGKILL)
    out, err = finish(process)
    assert out.count("from iteration 0\n") == 1 and out.count(", from iteration ") == 2, out + err
    assert "connectFullMesh failed" not in err
    assert_same_run(tmp_path, undisturbed[3])
