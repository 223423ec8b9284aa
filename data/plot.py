"""
Draws what runs logged: losses and learning rates against iterations.

    python data/plot.py out                          out/log.csv to out/loss.png, at any time
    python data/plot.py out-a out-b --to=both.png    several runs in one picture

A run draws its own when it ends or stops.
"""

import csv
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import configure

to = ''  # the picture's file; '': loss.png in the first run's folder


def read_log(folder):
    """log.csv of `folder` as {column: (iterations, values)}, without the rows that are empty there."""
    path = os.path.join(folder, "log.csv")
    columns = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    if key != "iter" and value:
                        iterations, values = columns.setdefault(key, ([], []))
                        iterations.append(int(row["iter"]))
                        values.append(float(value))
    except Exception as error:  # missing, or not such a file
        raise ValueError(f"cannot read {path!r}: {error}; name the out_dir of a run") from None
    return columns


def draw_losses(folders, path):
    """Writes the picture of the runs in `folders` to `path` (.png, .svg, .pdf)."""
    from matplotlib.figure import Figure  # here: slow to import; without pyplot, which looks for a screen
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for number, folder in enumerate(folders):
        log, color = read_log(folder), f"C{number}"
        name = ", " + os.path.basename(os.path.normpath(folder)).replace("$", r"\$") if len(folders) > 1 else ""
        for key, label, style in (("loss", "batch", dict(alpha=0.3, linewidth=0.8)), ("train_loss", "train", dict(linestyle="--")),
                                  ("val_loss", "val", dict(marker=".", linewidth=1.5))):
            if key in log and (len(folders) == 1 or key == "val_loss"):
                above.plot(*log[key], color=color, label=label + name, **style)
        if "lr" in log:
            below.plot(*log["lr"], color=color)
    above.set_ylabel("loss (nats a token)")
    above.grid(alpha=0.3)
    if above.lines:
        above.legend()
    below.set_ylabel("learning rate")
    below.set_xlabel("iteration")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    sys.argv[1:] = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    configure(globals())
    if not folders:
        raise ValueError("which run? name its out_dir: python data/plot.py out")
    if to and not to.endswith((".png", ".svg", ".pdf")):
        raise ValueError(f"to={to!r} must end in .png, .svg or .pdf")
    to = to or os.path.join(folders[0], "loss.png")
    draw_losses(folders, to)
    print(f"wrote {to}")
