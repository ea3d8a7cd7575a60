"""log.csv of a run, as it is read: a row for each step, without what a crash cut short."""

import contextlib
import csv
import math

COLUMNS = ("step", "epoch", "loss", "grad_norm", "lr", "val_loss")


def read_log(folder):
    """Return the rows of log.csv, dicts of strings with the keys COLUMNS.

    Without what a crash cut short, or another program made of it: no numbers."""
    path = folder / "log.csv"
    if not path.is_file():
        return []
    rows = []
    with open(path, newline="", errors="replace") as f, contextlib.suppress(csv.Error):
        for cells in csv.DictReader(f):  # a crash writes anything, such as 1 MB of zeros
            rows.append(as_row(cells))
    return [row for row in rows if row]


def as_row(cells):
    """Return a row of log.csv, a dict, with the names of today; None unless it is whole."""
    if "test_loss" in cells:  # before version 0.3
        cells["val_loss"] = cells.pop("test_loss")
    row = {name: cells.get(name) for name in COLUMNS}  # None where it was cut short
    if len(cells) != len(COLUMNS) or None in row.values():
        return None
    try:
        int(row["step"])
        numbers = [float(text) for text in row.values() if text]  # a val_loss may be missing
    except ValueError:
        return None
    return row if all(map(math.isfinite, numbers)) else None
