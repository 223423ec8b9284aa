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
    """Returns the numbers in a run's log.csv: {column: [(iteration, value), ...]}."""
    columns = {}
    with open(os.path.join(folder, "log.csv"), encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for column, cell in row.items():
                if re.fullmatch(r"-?\d+(\.\d+)?(e[-+]?\d+)?", str(cell)):  # not nan, None
                    columns.setdefault(column, []).append((int(row["iter"]), float(cell)))
    return columns


def draw_losses(folders, path):
    """Draws the runs in `folders` into the file `path`. Several runs show only their val_loss."""
    from matplotlib.figure import Figure  # slow to import; pyplot would look for a display
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    labels = {"loss": "batch", "train_loss": "train", "val_loss": "val"}
    late_losses = []  # after the first twentieth of a run: they set the end of the loss axis
    for number, folder in enumerate(folders):
        log = read_log(folder)
        lr_axes.plot(*np.array(log.get("lr", [])).T, color=f"C{number}")
        if len(folders) > 1:
            labels = {"val_loss": folder}
        for k, column in enumerate(labels, start=number):
            if column not in log:
                continue
            x, y = np.array(log[column]).T  # (n,) each
            late_losses.extend(1.02 * y[x > x[-1] / 20])
            style = ".-"
            if column == "loss":  # a faint line, and its running mean
                loss_axes.plot(x, y, color=f"C{k}", alpha=0.3, linewidth=0.8)
                n = min(1 + len(x) // 20, 1000)
                x, y = (np.convolve(values, np.full(n, 1 / n), "valid") for values in (x, y))
                style = "-"
            elif x[0] == 0:  # nan ends the line: an untrained model's loss is far above the others
                x, y = np.insert(x, 1, 0), np.insert(y, 1, np.nan)
            loss_axes.plot(x, y, style, color=f"C{k}", label=labels[column])
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
    draw_losses(folders, to)
    print(f"saved {to}")
