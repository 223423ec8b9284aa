"""
log.csv to a picture. Drawing runs in its own process, as conftest.py hides matplotlib in this one.
"""

import json
import math
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, finish, spawn

from plot import read_log

LOG = """iter,train_loss,val_loss,loss,lr
0,4.2,4.1,,0.1
0,,,4.2,0.1
1,,,4.0,0.2
2,3.5,3.6,,0.2
"""

PRINT_CURVES = """
import json, sys
from matplotlib.figure import Figure
import plot

def savefig(figure, path, dpi):  # prints what it would draw
    axes = figure.axes[0]
    curves = {line.get_label(): [x.tolist() for x in line.get_data()] for line in axes.lines}
    print(json.dumps([axes.get_ylim(), curves]))

Figure.savefig = savefig
plot.draw_losses(sys.argv[1:], None)
"""


@pytest.fixture
def out_dir(tmp_path):
    """The folder of a run."""
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


def test_step_0_is_not_joined_and_the_axis_begins_below_it(out_dir):
    log = "iter,val_loss,loss\n0,5,\n50,2.5,\n100,2,\n"
    for i in range(80):
        log += f"{i},,{4 if i < 3 else 2 + i % 2}\n"
    (out_dir / "log.csv").write_text(log)
    command = [sys.executable, "-c", PRINT_CURVES, out_dir]
    (low, high), curves = json.loads(subprocess.check_output(command, cwd=ROOT))
    assert low < 2 and 3 < high < 3.1
    x, y = curves["val"]
    assert x == [0, 0, 50, 100] and y[0] == 5 and math.isnan(y[1]) and y[2:] == [2.5, 2]
    x, y = curves["batch"]  # means of 5 values
    assert x == pytest.approx(range(2, 78))
    assert (y[0], y[-1]) == pytest.approx((3.4, 2.6))


def test_picture_of_one_run_is_in_its_folder(out_dir):
    out, err = finish(spawn("plot.py", out_dir))
    assert (out, err) == (f"saved {out_dir / 'loss.png'}\n", "")
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_are_compared_in_a_picture_of_their_own(out_dir, tmp_path):
    shutil.copytree(out_dir, tmp_path / "b")
    out, err = finish(spawn("plot.py", "a", "b", cwd=tmp_path))
    assert (out, err) == ("saved losses.png\n", "")
    assert not (out_dir / "loss.png").exists()
    finish(spawn("plot.py", "a", "b", "--to=both.svg", cwd=tmp_path))
    svg = (tmp_path / "both.svg").read_text()  # matplotlib adds each label as a comment
    assert svg.count("<!-- a -->") == 1 and svg.count("<!-- b -->") == 1


@pytest.mark.parametrize("arguments, named", [
    ([], "no run given"),
    (["nowhere"], "nowhere/log.csv"),
    (["a/log.csv"], "a/log.csv/log.csv"),
    (["a", "--to=nowhere/a.png"], "nowhere/a.png"),
])
def test_mistakes_are_one_line(out_dir, tmp_path, arguments, named):
    out, err = finish(spawn("plot.py", *arguments, cwd=tmp_path), code=1)
    assert err.startswith("error: ") and named in err and err.count("\n") == 1
