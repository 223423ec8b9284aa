"""log.csv to a picture."""

import shutil

import pytest

from plot import read_log

LOG = """iter,train_loss,val_loss,loss,lr
0,4.2,4.1,,0.1
0,,,4.2,0.1
1,,,4.0,0.2
2,3.5,3.6,,0.2
"""


@pytest.fixture
def out_dir(tmp_path, monkeypatch):
    """The folder of a run; the tests run in the one above."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "log.csv").write_text(LOG)
    return folder


def test_read_log_leaves_empty_cells_out(out_dir):
    assert read_log(out_dir) == {
        "iter": [(0, 0), (0, 0), (1, 1), (2, 2)],
        "train_loss": [(0, 4.2), (2, 3.5)],
        "val_loss": [(0, 4.1), (2, 3.6)],
        "loss": [(0, 4.2), (1, 4.0)],
        "lr": [(0, 0.1), (0, 0.1), (1, 0.2), (2, 0.2)],
    }


@pytest.mark.parametrize("text, expected", [
    ("", []),
    ("iter,loss\n", []),
    ("iter,loss,lr\n1,2.5", [(1, 2.5)]),
    ("iter,loss,note\n1,2.5,cooler\n2,1.5,1.2.3\n", [(1, 2.5), (2, 1.5)]),
    ("iter,loss\n1,2.5,3,4\n2,nan\n3\n4,-1e-05\n", [(1, 2.5), (4, -1e-5)]),
])
def test_log_that_is_being_written_or_has_other_columns_can_be_read(out_dir, text, expected):
    (out_dir / "log.csv").write_text(text)
    log = read_log(out_dir)
    assert log.get("loss", []) == expected and log.keys() <= {"iter", "loss"}


def test_picture_of_one_run_is_in_its_folder(run, out_dir):
    run("plot.py", out_dir)
    assert (run.out, run.err) == (f"saved {out_dir / 'loss.png'}\n", "")
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_are_compared_in_a_picture_of_their_own(run, out_dir, tmp_path):
    shutil.copytree(out_dir, tmp_path / "b")
    run("plot.py", "a", "b")
    assert (run.out, run.err) == ("saved losses.png\n", "")
    assert not (out_dir / "loss.png").exists()
    run("plot.py", "a", "b", "--to=both.svg")
    svg = (tmp_path / "both.svg").read_text()  # matplotlib adds each label as a comment
    assert svg.count("<!-- a -->") == 1 and svg.count("<!-- b -->") == 1


@pytest.mark.parametrize("arguments, named", [
    ([], "no run given"),
    (["nowhere"], "nowhere/log.csv"),
    (["a/log.csv"], "a/log.csv/log.csv"),
    (["a", "--to=nowhere/a.png"], "nowhere/a.png"),
])
def test_mistakes_are_one_line(run, out_dir, arguments, named):
    with pytest.raises((ValueError, OSError)):
        run("plot.py", *arguments)
    assert run.err.startswith("error: ") and named in run.err and run.err.count("\n") == 1
