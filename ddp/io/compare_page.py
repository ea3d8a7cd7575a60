"""Runs side by side: what differs in their settings, their figures and curves; tables for a paper.

A figure of several trainings is their mean ± standard deviation; of one training its standard
error, which holds the samples alone.
"""

import contextlib
import math
from functools import partial
from statistics import fmean, stdev

import numpy as np
from PIL import Image

from ddp.data.files import counted
from ddp.io.figures import overlaid_losses, save_png, to_pil
from ddp.io.files import atomic_dir, atomic_write
from ddp.io.page import html_details, html_figures, html_list, html_page, html_terms, write_html
from ddp.io.runs import (
    differing_settings,
    left_out,
    loss_differences,
    recipe_differences,
    unmeasured,
)
from ddp.io.tables import BOLD, Best, Table, digits_of, html_table, write_tables
from ddp.metrics.comparison import pairing
from ddp.metrics.evaluate import find_better
from ddp.metrics.likelihood_metrics import LOSS_TABLE
from ddp.metrics.report import path_text
from ddp.metrics.uncertainty import NORMAL_95, difference_of_trainings, t_quantile
from ddp.metrics.verdict import terms_of

NOT_MEASURED = "no figures of samples; evaluate.py measures them"
BEST = f"{BOLD}the best, and what cannot be told from it at 95%; by chance 1 row in 20 has some"
ONE_TRAINING = "One training each: this shows the networks, not which way of training is better."


def write_comparison(groups, out, command):
    """Write comparison.html, tables and charts of Groups into a folder.

    command: what to type for it again. Returns (path, tables, sentences, warnings)."""
    runs = [run for group in groups for run in group.runs]
    warnings = recipe_differences(runs)
    warnings += [] if any(run.evaluations for run in runs) else [NOT_MEASURED]
    tables = comparison_tables(groups, comparable=not warnings)
    sentences = [] if warnings else verdict(groups, tables)
    warnings += [*unmeasured(groups), *left_out(groups), *loss_differences(groups)]
    charts = loss_charts(groups)
    with atomic_dir(out) as written:
        for name, chart in charts.items():
            path = written.folder / f"loss_over_{name}.png"
            atomic_write(path, partial(save_png, chart))
        write_tables(written.folder, "tables", tables)
        text = page(groups, tables, charts, [*sentences, *warnings], command)
        write_html(written.folder / "comparison.html", text)
    return written.path, tables, sentences, warnings


def comparison_tables(groups, comparable):
    """The Tables of Groups: what they are, what differs, their figures, the losses by level.

    comparable: all were measured by one recipe; else nothing is best, and real items have no
    column."""
    names = [group.name for group in groups]
    networks = {group.runs[0].network for group in groups}
    rows = [row for row in run_rows(groups) if len(networks) > 1 or row[0] != "network"]
    tables = [Table("runs", networks.pop() if len(networks) == 1 else "", ["", *names], rows)]
    settings = differing_settings(groups)
    rows = [[name, *map(setting_text, values)] for name, values in settings.items()]
    if rows:
        tables.append(Table("settings that differ", "", ["", *names], rows))
    counts = {len(group.runs) for group in groups}
    note = "± is the standard error of the samples; other seeds were not trained"
    if max(counts) > 1:
        note = "mean ± standard deviation between trainings; of one training the standard error"
    bold = comparable and len(groups) > 1
    note += f"; {BEST}" if bold else ""
    figures, levels = figure_rows(groups, bold)
    about = [note]  # what is said of the figures
    head = ["", *names]
    if comparable:
        about = [recipe_text(groups), note, "real items: in the place of samples, ± standard error"]
        head.append("real items")
    else:
        figures = [row[:-1] for row in figures]
    tables += [Table("figures", "; ".join(filter(None, about)), head, figures)] if figures else []
    tables += [Table(LOSS_TABLE, note, ["", *names], levels)] if levels else []
    return tables


def recipe_text(groups):
    """How many samples the figures of Groups are of, and how they were drawn; "": of none."""
    evaluations = [run.evaluation for group in groups for run in group.runs]
    of_samples = [
        each.recipe
        for each in evaluations
        if any(path.endswith("/samples") for path in each.figures)
    ]
    recipe = of_samples[0] if of_samples else {}
    shown = [recipe.get(name) for name in ("num_samples", "sampler", "steps")]
    return "" if None in shown else "{:,} samples by {} in {} steps".format(*shown)


def setting_text(value):
    return "" if value is None else str(value)


def run_rows(groups):
    """What the runs of each Group are: trainings, network, steps, minutes, loss at the end."""
    rows = []
    for group in groups:
        seconds = [run.seconds for run in group.runs if run.seconds]
        losses = [run.val_losses[-1][1] for run in group.runs if run.val_losses]
        minutes = f"{fmean(seconds) / 60:.1f}" if seconds else ""
        loss = spread_text(losses, [None] * len(losses))
        first = group.runs[0]
        steps = [run.step for run in group.runs]
        steps = " to ".join(f"{step:,}" for step in sorted({min(steps), max(steps)}))
        rows.append([f"{len(group.runs)}", first.network, steps, minutes, loss])
    names = ("trainings", "network", "steps", "minutes of training", "loss of held-out items")
    return [[name, *cells] for name, *cells in zip(names, *rows, strict=True)]


def spread_text(values, errors):
    """The mean of values with their standard deviation; of one value, with its error."""
    if not values:
        return ""
    spread = stdev(values) if len(values) > 1 else errors[0]
    if spread is None:
        return f"{fmean(values):.4f}"
    digits = digits_of(spread)
    return f"{fmean(values):.{digits}f} ± {spread:.{digits}f}"


def figure_rows(groups, bold):
    """Rows of the figures that groups have, and rows of their losses by noise level."""
    runs = [run for group in groups for run in group.runs]
    paths = {path: None for run in runs for path in run.evaluation.figures}  # each once, in order
    real = {}
    for run in runs:
        real |= {path: estimate for path, estimate in run.evaluation.real.items() if estimate}
    seeds = [group.seeds for group in groups]
    figures, levels = [], []
    for path in paths:
        estimates = [group.figure(path) for group in groups]
        if not any(estimates):  # every group has a run that lacks it
            continue
        cells = [figure_text(each) for each in estimates]
        for i in best_of(estimates, find_better(path.split("/")), seeds) if bold else ():
            cells[i] = Best(cells[i])
        row = [path_text(path), *cells]
        if path.startswith("loss/"):  # by noise level, thirty rows
            levels.append(row)
        else:
            figures.append([*row, figure_text([real[path]] if path in real else None)])
    return figures, levels


def figure_text(estimates):
    """The estimates of a group, one of each training, as text."""
    if estimates is None:
        return ""
    return spread_text([each["value"] for each in estimates], list(map(error_of, estimates)))


def error_of(estimate):
    """The standard error of an estimate; of a share of 0 or 1, whose own is 0, by its interval."""
    if estimate["error"] == 0 and estimate["interval"]:
        low, high = estimate["interval"]
        return (high - low) / (2 * NORMAL_95)
    return estimate["error"]


def verdict(groups, tables):
    """What the figures in the tables of Groups say, in sentences."""
    rows = {table.title: table.rows for table in tables}
    figures, levels = rows.get("figures", []), rows.get(LOSS_TABLE, [])
    measured = [sum(map(bool, row[1 : 1 + len(groups)])) for row in figures + levels]  # groups
    if max(measured, default=0) < 2:
        return []
    better = "is better" if len(groups) == 2 else "is best, or cannot be told from the best,"
    lines = []
    for column, group in enumerate(groups, 1):
        names = [row[0].rstrip(" ↓↑") for row in figures if isinstance(row[column], Best)]
        count = sum(isinstance(row[column], Best) for row in levels)
        names += [f"{counted(count, 'row')} of the {LOSS_TABLE}"] if count else []
        lines += [f"{group.name} {better} in {', '.join(names)}."] if names else []
    lines = lines or ["No figure tells them apart at 95%."]
    return lines + [ONE_TRAINING] * all(len(group.runs) == 1 for group in groups)


def best_of(estimates, direction, seeds):
    """The indices of the groups that are best, or cannot be told from it, at 95%; [] if all are.

    estimates: of each group a list, or None; direction: "lower", "higher", None: neither; seeds:
    those of each group, in one order: the same ones are paired."""
    known = [i for i, each in enumerate(estimates) if each]
    if direction is None or not known:
        return []
    sign = 1 if direction == "lower" else -1
    means = {i: sign * fmean(each["value"] for each in estimates[i]) for i in known}
    best = min(known, key=means.get)
    worse = []
    for i in known:
        order = pairing(seeds[best], seeds[i])
        if i != best and told_apart(estimates[best], estimates[i], order):
            worse.append(i)
    return [i for i in known if i not in worse] if worse else []


def told_apart(first, second, order):
    """Whether two groups of estimates differ: by Student's t of the differences, if they have an
    order of pairs, or Welch's test; one training against some, by their spread; two single ones, by
    the errors of their samples, if these are known."""
    values = [[each["value"] for each in estimates] for estimates in (first, second)]
    few, many = sorted(values, key=len)
    difference = abs(fmean(few) - fmean(many))
    if len(few) > 1:
        low, high = difference_of_trainings(*values, order is not None)["interval"]
        return not low <= 0 <= high
    if len(many) > 1:  # one more training of the same kind lies so near
        reach = t_quantile(0.975, len(many) - 1) * stdev(many) * math.sqrt(1 + 1 / len(many))
        return difference > reach
    errors = [error_of(estimates[0]) for estimates in (first, second)]
    return None not in errors and difference > NORMAL_95 * math.hypot(*errors)


def loss_charts(groups):
    """Charts of the loss of held-out items, over steps and over minutes: name -> PIL image."""
    by_step = {}  # name of a group -> a list of (x, loss), (N,) each
    by_minute = {}
    for group in groups:
        for run in group.runs:
            if not run.val_losses:
                continue
            step, loss = np.array(run.val_losses).T  # (N,) each
            by_step.setdefault(group.name, []).append((step, loss))
            if run.seconds and run.step:
                minutes = step * run.seconds / run.step / 60
                by_minute.setdefault(group.name, []).append((minutes, loss))
    charts = {"steps": (by_step, "step"), "minutes": (by_minute, "minutes of training")}
    return {name: to_pil(overlaid_losses(*what)) for name, what in charts.items() if what[0]}


def newest_samples(groups):
    """The newest grid of samples of the first run of each group: caption -> PIL image."""
    images = {}
    for group in groups:
        folder = group.runs[0].path.parent / "samples"
        for path in sorted(folder.glob("step_????????.png"))[-1:]:
            caption = f"{group.name}: samples at step {path.stem.removeprefix('step_').lstrip('0')}"
            with contextlib.suppress(OSError), Image.open(path) as image:
                images[caption] = image.convert("RGB")
    return images


def page(groups, tables, charts, lines, command):
    """The comparison as one HTML page; lines: what it begins with."""
    titled = {table.title: html_table(table) for table in tables}
    levels = titled.pop(LOSS_TABLE, None)
    order = ("figures", "settings that differ", "runs")
    body = [html_list(lines)] if lines else []
    body.append(html_figures(newest_samples(groups), "grids"))
    body += [titled[title] for title in order if title in titled]
    shown = {f"loss of held-out items over {name}": chart for name, chart in charts.items()}
    body.append(html_figures(shown))
    if levels:
        body.append(html_details(LOSS_TABLE, levels))
    figures = [path for run in groups[0].runs for path in run.evaluation.figures]
    words = {word for path in figures for word in path.split("/")}
    if words:
        body.append(html_terms(terms_of(words)))
    count = sum(len(group.runs) for group in groups)
    return html_page(
        ", ".join(group.name for group in groups),
        f"{counted(count, 'training')}; those that differ in their seed alone stand together.",
        body,
        command,
        {group.name: group.runs[0].settings for group in groups},
    )
