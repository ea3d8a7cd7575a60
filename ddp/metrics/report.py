"""An evaluation for people: tables as text, figures, and one HTML page that needs no network.

`evaluation` is what evaluate() gives: plain types, an estimate being {value, error, interval}.
"""

import base64
import contextlib
import io
import json
import re
import time
from collections import namedtuple
from functools import partial
from html import escape
from pathlib import Path
from string import Template

from ddp.distributed import is_lost_process
from ddp.io.figures import histogram, loss_by_level, metric_ratios, save_png, to_pil
from ddp.io.files import atomic_write
from ddp.io.item_figures import draw_items, neighbors, room
from ddp.metrics.comparison import flatten
from ddp.metrics.evaluate import evaluate, find_better, known_metrics
from ddp.metrics.features import FEATURES

HEADS = {"real_vs_real": "real vs real", "relative_to_real": "relative to real"}
ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}  # which is better
SPREADS = ("mean", "sd of trainings", "error of samples")  # columns of a group of trainings
MAX_CELL = 14  # characters of a group's name in a column, so that a row has 100
PAGE = Template(Path(__file__).with_name("report.html").read_text())  # its style is there
MAX_NAME = 40  # characters of a subject in names of files, which hold 255 bytes
Table = namedtuple("Table", "title note head rows")  # text; rows: lists as long as head


def error_text(cell):
    """An estimate as value ± standard error, or a number, or nothing; text as it is."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, dict):
        error = "" if cell["error"] is None else f" ± {cell['error']:.4f}"
        return f"{cell['value']:.4f}{error}"
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else f"{cell:,}"


def interval_text(cell):
    """An estimate with its 95% interval, in the digits that its error allows."""
    if not isinstance(cell, dict) or cell["error"] is None:
        return error_text(cell)  # which has no interval
    exponent = int(f"{cell['error']:e}".split("e")[1]) if cell["error"] > 1e-9 else -2
    digits = min(max(0, 1 - exponent), 5)  # two of the error; three where it is 0
    low, high = cell["interval"]
    return f"{cell['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def nested_rows(results):
    """Nested results, less lists and text, as rows, name -> column (the last key) -> cell."""
    rows = {}
    for path, cell in flatten(results).items():
        *names, column = path if len(path) > 1 else (*path, "")  # a number alone has a row
        if cell is None or isinstance(cell, (dict, int, float)):
            rows.setdefault(", ".join(names), {})[column] = cell
    return rows


def make_table(title, note, rows, cell_text):
    """The Table of rows, name -> column -> cell; a column stands where it first appears."""
    columns = []  # in the order in which they first appear
    for cells in rows.values():
        columns += [column for column in cells if column not in columns]
    lines = []
    for name, cells in rows.items():
        lines.append([name] + [cell_text(cells.get(column)) for column in columns])
    head = [""] + [HEADS.get(column, column) for column in columns]
    return Table(title, note, head, lines)


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


def comparison_table(evaluation):
    """The Table of all subjects side by side, each further one less the first; None for one."""
    if not evaluation["comparison"]:
        return None
    names = [subject["name"] for subject in evaluation["subjects"]]
    cells = [flatten(subject) for subject in evaluation["subjects"]]  # of each: keys -> cell
    columns = [*names, "real_vs_real", *(f"{name} - {names[0]}" for name in names[1:])]
    rows = {}
    for entry in evaluation["comparison"]:
        path = entry["path"]
        keys = tuple(path.split("/"))  # as flatten has them
        row = rows.setdefault(path.removesuffix("/samples"), dict.fromkeys(columns))
        row[f"{entry['subject']} - {names[0]}"] = entry["difference"]
        for name, flat in zip(names, cells, strict=True):
            row[name] = flat.get(keys)
            if keys[-1] == "samples" and row["real_vs_real"] is None:  # it is the same for all
                row["real_vs_real"] = flat.get((*keys[:-1], "real_vs_real"))
    note = "95% intervals of the samples alone; differences are of the same real items and noise"
    return make_table("comparison", note, rows, interval_text)


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
        better = (figure["better"] or cannot)[:MAX_CELL]
        rows[path_text(path)] = {"difference": figure["difference"], "better": better}
    return make_table(title, note, rows, interval_text)


def side_by_side(evaluation):
    """The Tables of all subjects side by side, or of their groups; [] of one subject."""
    table = comparison_table(evaluation)
    return [table] if table else group_tables(evaluation)


def table_lines(tables):
    """Tables as lines for a terminal."""
    lines = []
    for table in tables:
        lines += ["", f"{table.title} ({table.note})" if table.note else table.title]
        rows = [table.head, *table.rows] if any(table.head) else table.rows  # of text
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]  # in characters
        for row in rows:
            line = "   " + row[0].ljust(widths[0])  # names to the left, numbers to the right
            for cell, width in zip(row[1:], widths[1:], strict=True):
                line += "  " + cell.rjust(width)
            lines.append(line.rstrip())
    return lines


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
        lines = table_lines(side_by_side(finished))
        tell("\n".join([*lines, *(f"warning: {warning}" for warning in finished["warnings"])]))
    return finished, stopped


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
        figures["samples and real items"] = draw_items(*sets, ("samples", "real items"))
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
        figures["test loss by noise level"] = to_pil(loss_by_level(results["loss"]))
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
    page = html_page(evaluation, figures)
    atomic_write(folder / "evaluation.html", lambda path: path.write_text(page, encoding="utf-8"))
    for i, (subject, images) in enumerate(zip(evaluation["subjects"], figures, strict=True), 1):
        prefix = f"{i}-{subject['name']}-" if len(figures) > 1 else ""
        for caption, image in images.items():
            name = re.sub(r"[^\w.-]+", "_", prefix[:MAX_NAME] + caption.split(",")[0])
            atomic_write(folder / f"{name}.png", partial(save_png, image))


def html_table(table):
    """A Table as HTML, with everything escaped."""
    lines = []
    for row in [table.head, *table.rows] if any(table.head) else table.rows:
        tag = "th" if row is table.head else "td"
        cells = [f"<{tag}>{escape(cell)}</{tag}>" for cell in row]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<h3>{escape(table.title)}</h3><small>{escape(table.note)}</small>"
        f'<div class="wide"><table>{"".join(lines)}</table></div>'
    )


def html_figure(caption, image):
    """A PIL image within the page."""
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()  # within the page: no second file
    caption = escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def html_page(evaluation, figures):
    """The evaluation as one HTML page."""
    dataset = evaluation["dataset"]
    recipe = evaluation["recipe"]
    parts = [f"<p class=warning>{escape(warning)}</p>" for warning in evaluation["warnings"]]
    parts += [html_table(table) for table in side_by_side(evaluation)]
    for subject, images in zip(evaluation["subjects"], figures, strict=True):
        origin = subject["about"].items()  # of it what fits in a line: no lists, no dicts
        about = [f"{key}: {value}" for key, value in origin if isinstance(value, (str, int))]
        parts.append(f"<h2>{escape(subject['name'])}</h2>")
        parts.append(f"<small>{escape('; '.join(about))}</small>")
        shown = [html_figure(caption, image) for caption, image in images.items()]
        parts.append(f'<div class="figures">{"".join(shown)}</div>')
        for table in subject_tables(subject, evaluation):
            parts.append(html_table(table))
    named = evaluation["groups"] or evaluation["subjects"]
    names = ", ".join(each["name"] for each in named)
    shape = "x".join(str(side) for side in dataset["event"])
    settings = json.dumps({"dataset": dataset, "recipe": recipe}, indent=1)
    return PAGE.substitute(
        title=escape(f"{names} on {dataset['name']}"),
        summary=f"{dataset['train']:,} training and {dataset['test']:,} test items of {shape}; "
        f"seed {recipe['seed']}.",
        body="\n".join(parts),
        command=escape(recipe["command"]),
        settings=escape(settings),
    )
