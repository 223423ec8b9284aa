"""
Draws the losses and learning rates of one or several runs.

    python plot.py out                         draws out/log.csv as out/loss.png
    python plot.py out-a out-b --to=both.png   several runs in one picture

train.py draws this picture when it ends. Use the script to look earlier, or to compare runs.
"""

import csv
import os

from configurator import UserError, configure

to = ''  # picture to write: .png, .svg or .pdf; '': loss.png in the folder of the first run

CURVES = {  # column of log.csv -> label, line style
    "loss": ("batch", dict(alpha=0.3, linewidth=0.8)),
    "train_loss": ("train", dict(linestyle="--")),
    "val_loss": ("val", dict(marker=".", linewidth=1.5)),
}


def read_log(folder):
    """Reads log.csv in `folder`. Returns {column: (iterations, values)} without the empty cells."""
    path = os.path.join(folder, "log.csv")
    columns = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                iteration = int(row.pop("iter"))
                for column, cell in row.items():
                    if cell:
                        iterations, values = columns.setdefault(column, ([], []))
                        iterations.append(iteration)
                        values.append(float(cell))
    except Exception as error:  # missing, or not a log
        raise UserError(f"cannot read {path!r}: {error}; name the out_dir of a run") from None
    return columns


def draw_losses(folders, path):
    """Draws the runs in `folders` into the file `path`. Several runs show only their val_loss."""
    # imported here because it is slow; without pyplot, which would look for a display
    from matplotlib.figure import Figure
    several = len(folders) > 1
    columns = ["val_loss"] if several else list(CURVES)
    figure = Figure(figsize=(8, 6), layout="constrained")
    loss_axes, lr_axes = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    for number, folder in enumerate(folders):
        log = read_log(folder)
        color = f"C{number}"
        for column in columns:
            label, style = CURVES[column]
            if several:
                label = folder
            if column in log:
                loss_axes.plot(*log[column], color=color, label=label, **style)
        if "lr" in log:
            lr_axes.plot(*log["lr"], color=color)
    loss_axes.set_ylabel("loss (nats per token)")
    loss_axes.grid(alpha=0.3)
    if loss_axes.lines:
        loss_axes.legend()
    lr_axes.set_ylabel("learning rate")
    lr_axes.set_xlabel("iteration")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    folders = []
    configure(globals(), paths=folders)
    if not folders:
        raise UserError("no run given; name its out_dir: python plot.py out")
    if not to:
        to = os.path.join(folders[0], "loss.png")
    if not to.endswith((".png", ".svg", ".pdf")):
        raise UserError(f"to={to!r} must end in .png, .svg or .pdf")
    draw_losses(folders, to)
    print(f"saved {to}")
