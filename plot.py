"""
Draws the losses and learning rates of one or several runs.

    python plot.py out           draws out/log.csv as out/loss.png
    python plot.py out-a out-b   compares the runs in losses.png, in the working directory
"""

import csv
import os
import re

import numpy as np

from configurator import UserError, configure

to = ''  # a .png, .svg or .pdf; '': loss.png in the run's folder, losses.png for several runs


def read_log(folder):
    """Reads log.csv in `folder`. Returns {column: (iterations, values)}, finite numbers only."""
    path = os.path.join(folder, "log.csv")
    columns = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                iteration = int(row.pop("iter"))
                for column, cell in row.items():
                    if re.fullmatch(r"-?\d+(\.\d+)?(e[-+]?\d+)?", str(cell)):  # not nan, None
                        iterations, values = columns.setdefault(column, ([], []))
                        iterations.append(iteration)
                        values.append(float(cell))
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path!r}: {error}; name the out_dir of a run") from None
    return columns


def draw_losses(folders, path):
    """Draws the runs in `folders` into the file `path`. Several runs show only their val_loss."""
    from matplotlib.figure import Figure  # slow to import; pyplot would look for a display
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    late_losses = []  # after the first twentieth of a run: they set the end of the loss axis
    for number, folder in enumerate(folders):
        log = read_log(folder)
        lr_axes.plot(*log.get("lr", ()), color=f"C{number}")
        labels = {"loss": "batch", "train_loss": "train", "val_loss": "val"}
        if len(folders) > 1:  # a label shows no leading _, and takes two $ for a formula
            labels = {"val_loss": " " + folder.replace("$", r"\$")}
        for k, (column, label) in enumerate(labels.items()):
            if column not in log:
                continue
            x, y = np.array(log[column])  # (n,) each
            late_losses.extend(1.02 * y[x > x[-1] / 20])
            color, marker = f"C{number + k}", "."
            if column == "loss":  # faint lines, and their running mean
                loss_axes.plot(x, y, color=color, alpha=0.3, linewidth=0.8)
                n, marker = min(1 + len(x) // 20, 1000), ""
                x, y = (np.convolve(values, np.full(n, 1 / n), "valid") for values in (x, y))
            elif x[0] == 0:  # nan ends the line: an untrained model's loss is far above the others
                x, y = np.insert(x, 1, 0), np.insert(y, 1, np.nan)
            loss_axes.plot(x, y, color=color, marker=marker, label=label)
    loss_axes.set(ylabel="loss (nats per token)", ylim=(None, max(late_losses, default=None)))
    loss_axes.grid(alpha=0.3)
    if late_losses:
        loss_axes.legend()
    lr_axes.set(xlabel="iteration", ylabel="learning rate")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    folders = []
    configure(globals(), paths=folders)
    if not folders:
        raise UserError("no run given; name its out_dir: python plot.py out")
    if not to:
        to = "losses.png" if len(folders) > 1 else os.path.join(folders[0], "loss.png")
    if not to.endswith((".png", ".svg", ".pdf")):
        raise UserError(f"to={to!r} must end in .png, .svg or .pdf")
    draw_losses(folders, to)
    print(f"saved {to}")
