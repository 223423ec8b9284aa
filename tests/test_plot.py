"""
log.csv to a picture. Drawing runs in its own process, as conftest.py hides matplotlib in this one.
"""

import pytest
from conftest import finish, spawn

from plot import read_log

LOG = """iter,train_loss,val_loss,loss,lr
0,4.2,4.1,,0.1
0,,,4.2,0.1
1,,,4.0,0.2
2,3.5,3.6,,0.2
"""


@pytest.fixture
def out_dir(tmp_path):
    """The folder of a run."""
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "log.csv").write_text(LOG)
    return folder


def test_read_log_leaves_empty_cells_out(out_dir):
    log = read_log(out_dir)
    assert log.keys() == {"train_loss", "val_loss", "loss", "lr"}
    assert log["val_loss"] == ([0, 2], [4.1, 3.6])
    assert log["loss"] == ([0, 1], [4.2, 4.0])
    assert log["lr"] == ([0, 0, 1, 2], [0.1, 0.1, 0.2, 0.2])


@pytest.mark.parametrize("text, expected", [
    ("", {}),
    ("iter,val_loss,loss\n", {}),
    ("iter,val_loss,loss\n1,2.5", {"val_loss": ([1], [2.5])}),
])
def test_log_that_is_being_written_can_be_read(out_dir, text, expected):
    (out_dir / "log.csv").write_text(text)
    assert read_log(out_dir) == expected


def test_picture_of_one_run_is_in_its_folder(out_dir):
    out, err = finish(spawn("plot.py", out_dir))
    assert (out, err) == (f"saved {out_dir / 'loss.png'}\n", "")
    assert (out_dir / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_several_runs_shows_their_validation_losses(out_dir, tmp_path):
    picture = tmp_path / "both.svg"
    (tmp_path / "b").mkdir()
    (tmp_path / "b/log.csv").write_text(LOG)
    finish(spawn("plot.py", "a", "b", f"--to={picture}", cwd=tmp_path))
    svg = picture.read_text()  # matplotlib adds each label as a comment
    assert svg.count("<!-- a -->") == svg.count("<!-- b -->") == 1
    finish(spawn("plot.py", out_dir, f"--to={picture}"))
    svg = picture.read_text()
    for label in ("batch", "train", "val"):
        assert svg.count(f"<!-- {label} -->") == 1


@pytest.mark.parametrize("arguments, named", [
    ([], "no run given"),
    (["nowhere"], "nowhere/log.csv"),
    (["{out_dir}", "--to=a.bmp"], "a.bmp"),
    (["{out_dir}", "--to=nowhere/a.png"], "nowhere/a.png"),
])
def test_mistakes_are_one_line(out_dir, tmp_path, arguments, named):
    arguments = [argument.format(out_dir=out_dir) for argument in arguments]
    out, err = finish(spawn("plot.py", *arguments, cwd=tmp_path), code=1)
    assert err.startswith("error: ") and named in err and err.count("\n") == 1


def test_log_that_is_not_a_log_is_named(out_dir):
    for text in ("iter,loss\n0,none\n", "loss\n4.2\n"):
        (out_dir / "log.csv").write_text(text)
        with pytest.raises(ValueError, match="cannot read .*log.csv"):
            read_log(out_dir)
