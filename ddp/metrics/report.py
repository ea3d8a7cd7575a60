"""An evaluation for people: tables as text, figures, and one HTML page that needs no network.

`evaluation` is what evaluate() gives: plain types, an estimate being {value, error, interval}.
"""

import contextlib
import json
import re
import time
from functools import partial
from html import escape
from pathlib import Path

from ddp.distributed import is_lost_process
from ddp.io.figures import histogram, loss_by_level, loss_curve, metric_ratios, save_png, to_pil
from ddp.io.files import atomic_write
from ddp.io.item_figures import draw_items, neighbors, room
from ddp.io.page import html_details, html_figures, html_list, html_page, html_terms, write_html
from ddp.io.run_log import read_log
from ddp.io.tables import error_text, html_table, interval_text, make_table, table_lines, wrapped
from ddp.metrics.comparison import flatten
from ddp.metrics.evaluate import evaluate, find_better, known_metrics
from ddp.metrics.features import FEATURES
from ddp.metrics.likelihood_metrics import LOSS_TABLE
from ddp.metrics.verdict import terms_of, verdict, words_of

ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}  # which is better
SPREADS = ("mean", "sd of trainings", "error of samples")  # columns of a group of trainings
MAX_CELL = 14  # characters of a group's name in a column, so that a row has 100
SAMPLES = "samples and real items"  # a caption
MAX_NAME = 40  # characters of a subject in names of files, which hold 255 bytes


def nested_rows(results):
    """Nested results, less lists and text, as rows, name -> column (the last key) -> cell."""
    rows = {}
    for path, cell in flatten(results).items():
        *names, column = path if len(path) > 1 else (*path, "")  # a number alone has a row
        if cell is None or isinstance(cell, (dict, int, float)):
            rows.setdefault(", ".join(names), {})[column] = cell
    return rows


def subject_tables(subject, evaluation, only=None):
    """The Tables of one subject, metric by metric; only: of the metric of that name."""
    tables = []
    for name, metric in known_metrics().items():
        if name in subject and only in (None, name):
            parts = [(metric.title or name, metric.note, nested_rows(subject[name]))]
            if metric.tables:
                parts = metric.tables(subject[name], evaluation)
            cell_text = interval_text if metric.show_interval else error_text
            # a metric may have nothing to show
            tables += [make_table(*part, cell_text) for part in parts if part[-1]]
    return tables


def comparison_tables(evaluation):
    """The Tables of all subjects side by side, each further one less the first; [] for one.

    The losses by noise level, some thirty rows, have a table of their own, the last."""
    tables = []
    note = "95% intervals of the samples alone; differences are of the same real items and noise; "
    note += "better, worse: the interval leaves out 0"
    for title in ("comparison", LOSS_TABLE):
        of_loss = title == LOSS_TABLE
        entries = [e for e in evaluation["comparison"] if of_loss == e["path"].startswith("loss/")]
        rows = comparison_rows(evaluation, entries)
        tables += [make_table(title, note, rows, interval_text)] if rows else []
    return tables


def comparison_rows(evaluation, entries):
    """The rows of the entries of a comparison: name -> column -> cell."""
    names = [subject["name"] for subject in evaluation["subjects"]]
    cells = [flatten(subject) for subject in evaluation["subjects"]]  # of each: keys -> cell
    columns = [*names, *(f"{name} - {names[0]}" for name in names[1:]), "real_vs_real"]
    rows = {}
    for entry in entries:
        path = entry["path"]
        keys = tuple(path.split("/"))  # as flatten has them
        row = rows.setdefault(path_text(path), dict.fromkeys(columns))
        row[f"{entry['subject']} - {names[0]}"] = told_difference(entry["difference"], keys)
        for name, flat in zip(names, cells, strict=True):
            row[name] = flat.get(keys)
            if keys[-1] == "samples" and row["real_vs_real"] is None:  # it is the same for all
                row["real_vs_real"] = flat.get((*keys[:-1], "real_vs_real"))
    if not any(row["real_vs_real"] for row in rows.values()):
        rows = {name: {k: row[k] for k in row if k != "real_vs_real"} for name, row in rows.items()}
    return rows


def told_difference(difference, keys):
    """A difference to the first subject as text, with what it says: better, worse or neither."""
    text = interval_text(difference)
    direction = find_better(keys)
    if difference is None or direction is None or difference["error"] is None:
        return text
    low, high = difference["interval"]
    if low <= 0 <= high:
        return text
    return f"{text} {'better' if (low > 0) == (direction == 'higher') else 'worse'}"


def path_text(path):
    """The path of a figure as the name of a row, with the direction in which it is better."""
    return path.removesuffix("/samples") + ARROWS[find_better(path.split("/"))]


def group_tables(evaluation):
    """The Tables of groups of trainings, and of each further one less the first."""
    tables = []
    for group in evaluation["groups"]:
        count = len(group["subjects"])
        rows = {}
        for path, figure in group["figures"].items():
            cells = (figure["mean"], figure["sd"], figure["sample_error"])
            rows[path_text(path)] = dict(zip(SPREADS, cells, strict=True))
        note = f"{count} trainings" if count > 1 else "one training, which says nothing of others"
        tables.append(make_table(group["name"], note, rows, error_text))
    for group in evaluation["groups"][1:]:
        title = f"{group['name']} - {evaluation['groups'][0]['name']}"
        tables.append(difference_table(title, group["less_first"]))
    return tables


def difference_table(title, less_first):
    """The Table of a group of trainings less the first group."""
    note = "one training each: the interval holds the samples alone"
    if less_first["interval_of"] == "trainings":
        paired = ", paired by seed" if less_first["paired"] else ""
        note = f"95% intervals over trainings{paired}; by chance 1 row in 20 leaves out 0"
    rows = {}
    for path, figure in less_first["figures"].items():
        cannot = "cannot be told" if find_better(path.split("/")) else ""  # no way is better
        better = shortened(figure["better"] or cannot)
        rows[path_text(path)] = {"difference": figure["difference"], "better": better}
    return make_table(title, note, rows, interval_text)


def shortened(name):
    """A group's name for a cell: of a long one its end, by which paths differ."""
    return name if len(name) <= MAX_CELL else f"...{name[3 - MAX_CELL :]}"


def side_by_side(evaluation):
    """The Tables of all subjects side by side, or of their groups; [] of one subject."""
    return comparison_tables(evaluation) or group_tables(evaluation)


def measure_and_report(candidates, reference, metrics, options, folder, command, by_default, tell):
    """evaluate() -> (what was measured, the error that stopped it or None); see write_report.

    Every figure is told, a function of a line, and written into the folder as it comes, so that a
    failure or a signal loses none that is finished; when none is, the error passes. command: what
    to type for it again. by_default: nobody asked for these metrics."""
    started = time.monotonic()
    finished = {}  # the evaluation so far

    def keep(evaluation):
        finished.update(evaluation)
        finished["recipe"]["command"] = command
        finished["seconds"] = time.monotonic() - started
        with contextlib.suppress(OSError):  # a full disk; it is written again at the end
            write_json(folder, finished)

    def report(evaluation, candidate, name):
        (subject,) = [s for s in evaluation["subjects"] if s["name"] == candidate.name]
        title = f"{candidate.name}: " if len(candidates) > 1 else ""
        for table in subject_tables(subject, evaluation, name):
            tell("\n".join(table_lines([table._replace(title=title + table.title)])))
        keep(evaluation)

    stopped = None
    try:
        what = (candidates, reference, metrics, options)
        keep(evaluate(*what, by_default, tell=tell, report=report))
    except BaseException as error:  # a signal, too
        if not finished:
            raise
        stopped = error
        reason = str(error) or type(error).__name__
        if is_lost_process(error):
            reason = "another process failed"
        finished["warnings"].append(f"stopped before all was measured ({reason})")
    try:
        write_report(folder, finished, candidates, reference)
    finally:  # what cannot be written can be read here
        tables = side_by_side(finished)
        tables = [table for table in tables if table.title != LOSS_TABLE] or tables
        lines = [*table_lines(tables), *last_lines(finished)]
        if lines:
            tell("\n".join(lines))
    return finished, stopped


def last_lines(evaluation):
    """The warnings of an evaluation, and what its figures say, as lines for a terminal."""
    lines = []
    for warning in evaluation["warnings"]:
        lines += wrapped(f"warning: {warning}")
    subjects = evaluation["subjects"] if not evaluation["groups"] else []
    for subject in subjects:
        sentences = verdict(subject, evaluation)
        title = f"{subject['name']}: in short" if len(subjects) > 1 else "in short"
        lines += ["", title] if sentences else []
        for sentence in sentences:
            lines += wrapped(f"- {sentence}")
    return lines


def candidate_figures(candidate, reference):
    """The figures of a measured candidate: caption -> PIL image."""
    results = candidate.results
    dataset = reference.dataset
    figures = {}
    if candidate.samples is not None:
        sets = []
        for items in (candidate.samples, reference.items):
            items = items[: room(dataset.event)]
            sets.append(items if dataset.units is None else dataset.units.restore(items))
        figures[SAMPLES] = draw_items(*sets, ("samples", "real items"))
    if "memorization" in results:
        pairs = results["memorization"]["closest"]  # dicts: sample, train, distance
        samples = candidate.samples[[pair["sample"] for pair in pairs]]
        nearest = dataset.train[[pair["train"] for pair in pairs]]
        caption = "closest samples, each with its nearest training item"
        caption += ", standardized" if dataset.units is not None else ""
        figures[caption] = neighbors(samples, nearest)
    ratios = {}  # feature space -> name -> Estimate, or None where the baseline is 0
    for space in FEATURES:
        if space in results:
            rows = results[space]
            ratios[space] = {name: row.get("relative_to_real") for name, row in rows.items()}
            if "counts" in rows:
                bars = histogram(rows["counts"], dataset.classes)
                figures[f"classes by the {space}"] = to_pil(bars)
    if ratios:
        figures["samples relative to real items"] = to_pil(metric_ratios(ratios))
    if "loss" in results:
        figures[LOSS_TABLE] = to_pil(loss_by_level(results["loss"]))
    if "checkpoint" in candidate.about:
        rows = read_log(Path(candidate.about["checkpoint"]).parent)
        figures |= {"loss as it was trained": to_pil(loss_curve(rows))} if rows else {}
    return figures


def write_json(folder, evaluation):
    """Write evaluation.json, whole or not at all."""
    text = json.dumps(evaluation, indent=1, allow_nan=False)
    atomic_write(folder / "evaluation.json", lambda path: path.write_text(text))


def write_report(folder, evaluation, candidates, reference):
    """Write evaluation.json, evaluation.html and the figures of the candidates as PNG.

    What cannot be drawn, or written next to evaluation.json, becomes a warning: the numbers come
    first. Raises OSError when these cannot be written."""
    figures = []  # of each candidate: caption -> PIL image
    for candidate in candidates:
        try:
            figures.append(candidate_figures(candidate, reference))
        except Exception as error:
            figures.append({})
            evaluation["warnings"].append(f"{candidate.name}: the figures failed: {error}")
    write_json(folder, evaluation)
    try:
        write_figures(folder, evaluation, figures)
    except OSError as error:
        evaluation["warnings"].append(f"the page or a figure cannot be written: {error}")


def write_figures(folder, evaluation, figures):
    """Write evaluation.html, and a PNG of each figure; figures: of each subject, caption -> PIL."""
    write_html(folder / "evaluation.html", evaluation_page(evaluation, figures))
    for i, (subject, images) in enumerate(zip(evaluation["subjects"], figures, strict=True), 1):
        prefix = f"{i}-{subject['name'][:MAX_NAME]}-" if len(figures) > 1 else ""
        for caption, image in images.items():
            name = re.sub(r"[^\w.-]+", "_", prefix + caption.split(",")[0])
            atomic_write(folder / f"{name}.png", partial(save_png, image))


def evaluation_page(evaluation, figures):
    """The evaluation as one HTML page; figures: of each subject, caption -> PIL image."""
    dataset = evaluation["dataset"]
    recipe = evaluation["recipe"]
    warnings = evaluation["warnings"]
    body = []
    if warnings:
        body = ['<p><a class="warning" href="#warnings">What to know of these figures</a></p>']
    if len(figures) > 1 and not evaluation["groups"]:
        body.append(html_figures(samples_side_by_side(evaluation["subjects"], figures)))
    for table in side_by_side(evaluation):
        shown = html_table(table)
        body.append(html_details(table.title, shown) if table.title == LOSS_TABLE else shown)
    for subject, images in zip(evaluation["subjects"], figures, strict=True):
        body.append(f"<h2>{escape(subject['name'])}</h2>")
        body += [html_list(verdict(subject, evaluation)), html_figures(images)]
        body += [html_table(table) for table in subject_tables(subject, evaluation)]
        body.append(f"<p><small>{escape(origin(subject))}</small></p>")
    if warnings:
        body += ['<h2 id="warnings" class="warning">what to know</h2>', html_list(warnings)]
    body.append(html_terms(terms_of(words_of(evaluation))))
    named = evaluation["groups"] or evaluation["subjects"]
    shape = "x".join(str(side) for side in dataset["event"])
    items = f"{dataset['train']:,} training and {dataset['test']:,} test items of {shape}"
    return html_page(
        f"{', '.join(each['name'] for each in named)} on {dataset['name']}",
        f"{items}; seed of the evaluation {recipe['seed']}.",
        body,
        recipe["command"],
        {"dataset": dataset, "recipe": recipe},
    )


def samples_side_by_side(subjects, figures):
    """The samples of each subject, beside each other: its name -> PIL image."""
    names = [subject["name"] for subject in subjects]
    shown = [images.get(SAMPLES) for images in figures]
    return {name: image for name, image in zip(names, shown, strict=True) if image}


def origin(subject):
    """Where a subject comes from, a line: what fits in one, no lists and no dicts."""
    about = subject["about"].items()
    return "; ".join(f"{key}: {value}" for key, value in about if isinstance(value, (str, int)))
