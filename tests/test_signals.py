"""Signals, closed pipes, errors and kills: what was done is saved, and the rest follows exactly."""

import os
import signal

import kill
import pytest
from conftest import (
    TINY,
    assert_same_run,
    assert_same_state,
    finish,
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


# ---- signals ----


def test_a_signal_finishes_the_update_and_saves(train, run, tmp_path, monkeypatch):
    """Update 6 is followed by an evaluation, which is left to the resumed run."""
    train("undisturbed")
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        number = getattr(signal, name)
        with monkeypatch.context() as patch:
            interrupt_at(patch, 6, number)
            with pytest.raises(SystemExit) as stopped:
                train(name)
        assert stopped.value.code == 128 + number
        assert run.err == NOTICE
        assert f"stopped by {name} before iteration 6; to go on: python train.py " in run.out
        assert "step 6" not in run.out
        assert newest(tmp_path / name)["iter_num"] == 6
        train(name, "--init_from=resume")
        assert_same_run(tmp_path / name, tmp_path / "undisturbed")


@pytest.mark.parametrize("processes, signalled", [(1, "0"), (2, "0"), (2, "1"), (3, "12")])
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
            wait_for(runtime.stop_requested)
        assert training or number <= first_batch, "one more batch"
        return loss
    with monkeypatch.context() as patch:
        on_forward(patch, stop_in_evaluation)
        world(processes, *options, f"--out_dir={tmp_path / 'a'}", codes=[TERMINATED] * processes)
    assert newest(tmp_path / "a")["iter_num"] == 3
    assert not any(row["iter"] == "3" for row in read_log(tmp_path / "a"))
    world(processes, *options, f"--out_dir={tmp_path / 'a'}", "--init_from=resume")
    assert_same_run(tmp_path / "a", tmp_path / "undisturbed")


@pytest.mark.parametrize("number, processes", [
    (signal.SIGTERM, 1),
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


def test_a_second_ctrl_c_ends_a_run_at_once(dataset, tmp_path):
    process = spawn("train.py", *LONG, f"--dataset={dataset}", f"--out_dir={tmp_path}",
                    "--block_size=64", "--batch_size=1024")  # updates of seconds
    while "step 0" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    assert process.stderr.readline() == NOTICE
    process.send_signal(signal.SIGINT)
    _, err = finish(process, code=-signal.SIGINT)
    assert err == "stopped\n"
    assert list(tmp_path.glob("*.pt")) == []


def test_a_closed_pipe_is_a_saved_stop(dataset, undisturbed, tmp_path):
    """As in `python train.py ... | head -2`."""
    options = [*LONG, f"--dataset={dataset}", f"--out_dir={tmp_path}"]
    process = spawn("train.py", *options)
    for _ in range(2):
        process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=100) == TERMINATED
    assert err.startswith("finishing the current update") and err.count("\n") == 1
    assert newest(tmp_path)["iter_num"] < 60
    world(1, *options, "--init_from=resume")
    assert_same_run(tmp_path, undisturbed[1])


# ---- errors ----

PLACES = ["estimate_loss", "load_sequences", "forward", "get_lr", "log_metrics", "save"]


@pytest.mark.parametrize("processes, place, what", [
    *[(processes, place, None) for place in PLACES for processes in (1, 2)],
    (2, "load_sequences", signal.SIGKILL),
])
def test_whatever_ends_the_loop_saves_the_finished_updates(
        dataset, tmp_path, monkeypatch, capfd, processes, place, what):
    """One process has an error, or is killed. The other one loses its connection, and saves too."""
    is_of_evaluation = place in ("estimate_loss", "save")
    iter_num = 4 if is_of_evaluation else 3  # evaluations, which save, come before 2 and 4
    rank = str(processes - 1)
    if place in ("log_metrics", "save"):
        rank = "0"  # the only one that does anything there
    options = [*kill.LINES, f"--dataset={dataset}", "--max_iters=6"]
    undisturbed, out_dir = tmp_path / "undisturbed", tmp_path / "a"
    positions = kill.list_positions(undisturbed, *options, processes=processes, rank=rank)
    first = [(p.function, p.iter_num) for p in positions].index

    def fail(loss, training, number):
        if training and number == iter_num * 2 // processes and os.environ.get("RANK", "0") == rank:
            raise RuntimeError("an error on purpose")
        return loss
    before = None
    if place != "forward":
        before = kill.disturb(first((place, iter_num)), what, rank)
    with monkeypatch.context() as patch:
        if place == "forward":
            on_forward(patch, fail)
        codes = [1] * (processes - 1) + [1 if what is None else -what]
        world(processes, *options, f"--out_dir={out_dir}", before=before, codes=codes)
    other_is_ahead = processes == 2 and place == "log_metrics"  # in the next evaluation
    assert newest(out_dir)["iter_num"] in (iter_num, iter_num + other_is_ahead)
    num_saves = processes
    if place == "save" or what is not None:
        num_saves = 1
    assert capfd.readouterr().err.count("saved last.pt before iteration ") == num_saves
    world(processes, *options, f"--out_dir={out_dir}", "--init_from=resume")
    assert_same_state(newest(out_dir), newest(undisturbed))
    if not other_is_ahead:  # else log.csv may lack a row
        assert read_log(out_dir) == read_log(undisturbed)


def test_an_error_in_the_update_itself_falls_back_to_the_latest_checkpoint(dataset, tmp_path):
    options = [*kill.LINES, f"--dataset={dataset}"]
    undisturbed = tmp_path / "undisturbed"
    positions = kill.list_positions(undisturbed, *options)
    in_update = [i for i, p in enumerate(positions) if p.updating and p.iter_num == 2]
    for index in (in_update[0], in_update[-1]):
        left = kill.check_line(index, positions[index], None, undisturbed, tmp_path / str(index),
                               *options)
        assert left == positions[index].saved_iter


def test_an_error_or_a_signal_at_any_line_is_survived(dataset, tmp_path):
    """All lines: `python tests/kill.py lines`."""
    assert kill.check_lines(dataset, tmp_path, every=70) == 2 * 7


def test_a_kill_at_any_moment_leaves_a_checkpoint(dataset, tmp_path):
    """The long version is `python tests/kill.py 100`."""
    kills, kills_while_saving, _ = kill.hunt(dataset, tmp_path, num_kills=5)
    assert kills >= 5 and kills_while_saving >= 1


def worker_ids(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the workers in /proc")
def test_torchrun_replaces_a_killed_worker_of_three(dataset, undisturbed, tmp_path):
    process = spawn("train.py", *LONG, f"--dataset={dataset}", f"--out_dir={tmp_path}",
                    "--init_from=auto", processes=3, max_restarts=3)
    wait_for(lambda: num_lines(tmp_path) > 25)
    os.kill(worker_ids(process.pid)[1], signal.SIGKILL)
    out, err = finish(process)
    assert out.count("from iteration 0\n") == 1 and out.count(", from iteration ") == 2, out + err
    assert "connectFullMesh failed" not in err
    assert_same_run(tmp_path, undisturbed[3])
