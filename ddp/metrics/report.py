"""An evaluation for people: tables as text, figures, and one HTML page that needs no network.

`evaluation` is what evaluate.py writes as JSON: plain types, an estimate being {value, error,
interval}. Metrics without tables of their own get one from their nested dict.
"""

import base64
import html
import io
import json
import re
import string
from dataclasses import dataclass

from ddp.io.figures import (
    grid_or_scatter,
    histogram,
    loss_by_level,
    metric_ratios,
    neighbors,
    to_pil,
)
from ddp.metrics.evaluate import known_metrics
from ddp.metrics.features import FEATURES

HEADS = {"real_vs_real": "real vs real", "relative_to_real": "relative to real"}
MAX_IMAGES = 64  # in a figure
MAX_POINTS = 5000
PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.6rem }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1rem; margin: 2rem 0 .2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .8rem; text-align: right; white-space: nowrap }
td, th { border-bottom: 1px solid #8884 }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
figure { margin: 1rem 0 }
img { max-width: 100%; height: auto; background: #fff }
small, figcaption { color: #888 }
small { overflow-wrap: anywhere }
pre { overflow-x: auto; padding: .8rem; border: 1px solid #8884 }
.wide { overflow-x: auto }
.figures { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-end }
.warning { color: #b45309 }
@media (max-width: 40rem) { table { font-size: .8rem } td, th { padding: .2rem .5rem } }
</style>
<h1>$title</h1>
<p>$summary</p>
$body
<h2>recipe</h2>
<pre>$command</pre>
<details><summary>all settings</summary><pre>$settings</pre></details>
""")


@dataclass
class Table:
    """A table of text."""

    title: str
    note: str
    head: list  # of columns
    rows: list  # of lists, as long as head


def error_text(cell):
    """An estimate as value ± standard error, or a number, or nothing."""
    if cell is None:
        return ""
    if isinstance(cell, dict):
        error = "" if cell["error"] is None else f" ± {cell['error']:.4f}"
        return f"{cell['value']:.4f}{error}"
    return f"{cell:.4g}" if isinstance(cell, float) else f"{cell:,}"


def interval_text(cell):
    """An estimate with its 95% interval, in the digits that its error allows."""
    if not isinstance(cell, dict) or cell["error"] is None:
        return error_text(cell)
    exponent = -2  # without an error: three digits
    if cell["error"] > 1e-9:
        exponent = int(f"{cell['error']:e}".split("e")[1])
    digits = min(max(0, 1 - exponent), 5)  # two of the error
    low, high = cell["interval"]
    return f"{cell['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def is_cell(part):
    """Whether a part of results stands in one cell of a table: an estimate or a number."""
    is_estimate = isinstance(part, dict) and part.keys() == {"value", "error", "interval"}
    return is_estimate or part is None or isinstance(part, (int, float))


def nested_rows(results, prefix=""):
    """Nested results as rows, name -> column -> cell: the last key is the column.

    Lists and text have no place in a table and are left out."""
    if is_cell(results):
        return {prefix: {"": results}}
    if not isinstance(results, dict):
        return {}
    rows = {}
    cells = {}  # of this level
    for name, part in results.items():
        if prefix and is_cell(part):
            cells[name] = part
        else:
            rows |= nested_rows(part, f"{prefix}, {name}" if prefix else str(name))
    return {prefix: cells} | rows if cells else rows


def make_table(
    title,
    note,
    rows,  # name -> column -> cell
    cell_text,  # cell -> str
):
    """The Table of such rows; a column stands where it first appears."""
    columns = []
    for cells in rows.values():
        columns += [column for column in cells if column not in columns]
    lines = []
    for name, cells in rows.items():
        lines.append([name] + [cell_text(cells.get(column)) for column in columns])
    head = [""] + [HEADS.get(column, column) for column in columns]
    return Table(title, note, head, lines)


def subject_tables(subject, evaluation):
    """The Tables of one subject, metric by metric."""
    tables = []
    for name, metric in known_metrics().items():
        if name not in subject:
            continue
        if metric.tables:
            parts = metric.tables(subject[name], evaluation)
        else:
            parts = [(metric.title or name, metric.note, nested_rows(subject[name]))]
        cell_text = interval_text if metric.show_interval else error_text
        for title, note, rows in parts:
            if rows:  # a metric may have nothing to show
                tables.append(make_table(title, note, rows, cell_text))
    return tables


def comparison_table(evaluation):
    """The Table of all subjects side by side, each further one less the first; None for one."""
    subjects = evaluation["subjects"]
    if not evaluation["comparison"]:
        return None
    first = subjects[0]["name"]
    columns = [subject["name"] for subject in subjects] + ["real_vs_real"]
    columns += [f"{subject['name']} - {first}" for subject in subjects[1:]]
    rows = {}
    for entry in evaluation["comparison"]:
        path = entry["path"]
        name = path.removesuffix("/samples")  # "pixels/fd", which is of samples anyway
        row = rows.setdefault(name, dict.fromkeys(columns))
        row[f"{entry['subject']} - {first}"] = entry["difference"]
        for subject in subjects:
            row[subject["name"]] = look_up(subject, path)
            if path.endswith("/samples") and row["real_vs_real"] is None:
                baseline = path.removesuffix("samples") + "real_vs_real"
                row["real_vs_real"] = look_up(subject, baseline)  # the same for all
    note = "95% intervals; differences are of the same real items and noise"
    return make_table("comparison", note, rows, interval_text)


def look_up(tree, path):
    """The part of nested dicts at "vlb/discrete/total", or None."""
    for key in path.split("/"):
        tree = (tree or {}).get(key)
    return tree


def report_lines(evaluation):
    """Lines for a terminal: all tables of one subject, of several their comparison; warnings."""
    table = comparison_table(evaluation)
    tables = [table] if table else subject_tables(evaluation["subjects"][0], evaluation)
    lines = []
    for table in tables:
        lines += ["", f"{table.title} ({table.note})" if table.note else table.title]
        rows = [table.head, *table.rows] if any(table.head) else table.rows  # of text
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            line = "   " + row[0].ljust(widths[0])  # names to the left, numbers to the right
            for cell, width in zip(row[1:], widths[1:], strict=True):
                line += "  " + cell.rjust(width)
            lines.append(line.rstrip())
    return lines + [f"warning: {warning}" for warning in evaluation["warnings"]]


def candidate_figures(candidate, reference):
    """The figures of a measured candidate: caption -> PIL image."""
    results = candidate.results
    dataset = reference.dataset
    figures = {}
    if candidate.samples is not None:
        count = MAX_IMAGES if dataset.is_image else MAX_POINTS
        titles = ("samples", "real items")
        figures["samples and real items"] = grid_or_scatter(
            candidate.samples[:count], reference.items[:count], titles
        )
    if "memorization" in results:
        pairs = results["memorization"]["closest"]
        samples = candidate.samples[[pair["sample"] for pair in pairs]]
        nearest = dataset.train[[pair["train"] for pair in pairs]]
        caption = "closest samples, each with its nearest training item"
        figures[caption] = neighbors(samples, nearest)
    ratios = {}  # feature space -> name -> Estimate, or None where the baseline is 0
    for space in FEATURES:
        if space in results:
            rows = results[space]
            ratios[space] = {name: row.get("relative_to_real") for name, row in rows.items()}
            if "counts" in rows:
                chart = histogram(rows["counts"], dataset.classes)
                figures[f"classes by the {space}"] = to_pil(chart)
    if ratios:
        figures["samples relative to real items"] = to_pil(metric_ratios(ratios))
    if "loss" in results:
        figures["test loss by noise level"] = to_pil(loss_by_level(results["loss"]))
    return figures


def write_report(
    folder,
    evaluation,
    figures,  # for each subject a dict, caption -> PIL image
):
    """Write evaluation.json, evaluation.html and a PNG of each figure into a folder."""
    text = json.dumps(evaluation, indent=1, allow_nan=False)
    (folder / "evaluation.json").write_text(text)
    page = html_page(evaluation, figures)
    (folder / "evaluation.html").write_text(page, encoding="utf-8")
    subjects = evaluation["subjects"]
    for i, (subject, images) in enumerate(zip(subjects, figures, strict=True), start=1):
        prefix = f"{i}-{subject['name']}-" if len(subjects) > 1 else ""
        for caption, image in images.items():
            name = re.sub(r"[^\w.-]+", "_", prefix + caption.split(",")[0])
            image.save(folder / f"{name}.png")


def html_table(table):
    """A Table as HTML, with everything escaped."""
    lines = []
    if any(table.head):
        lines.append(html_row(table.head, "th"))
    for row in table.rows:
        lines.append(html_row(row, "td"))
    return (
        f"<h3>{html.escape(table.title)}</h3><small>{html.escape(table.note)}</small>"
        f'<div class="wide"><table>{"".join(lines)}</table></div>'
    )


def html_row(cells, tag):
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def html_figure(caption, image):
    """A PIL image within the page."""
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def html_page(
    evaluation,
    figures,  # for each subject a dict, caption -> PIL image
):
    """The evaluation as one HTML page."""
    dataset = evaluation["dataset"]
    recipe = evaluation["recipe"]
    parts = []
    for warning in evaluation["warnings"]:
        parts.append(f"<p class=warning>{html.escape(warning)}</p>")
    table = comparison_table(evaluation)
    if table:
        parts.append(html_table(table))
    for subject, images in zip(evaluation["subjects"], figures, strict=True):
        about = []  # what fits in a line: no lists, no dicts
        for key, value in subject["about"].items():
            if isinstance(value, (str, int)):
                about.append(f"{key}: {value}")
        parts.append(f"<h2>{html.escape(subject['name'])}</h2>")
        parts.append(f"<small>{html.escape('; '.join(about))}</small>")
        shown = [html_figure(caption, image) for caption, image in images.items()]
        parts.append(f'<div class="figures">{"".join(shown)}</div>')
        for table in reversed(subject_tables(subject, evaluation)):  # samples before likelihoods
            parts.append(html_table(table))
    names = ", ".join(subject["name"] for subject in evaluation["subjects"])
    shape = "x".join(str(side) for side in dataset["event"])
    settings = json.dumps({"dataset": dataset, "recipe": recipe}, indent=1)
    return PAGE.substitute(
        title=html.escape(f"{names} on {dataset['name']}"),
        summary=f"{dataset['train']:,} training and {dataset['test']:,} test items of {shape}; "
        f"seed {recipe['seed']}.",
        body="\n".join(parts),
        command=html.escape(recipe["command"]),
        settings=html.escape(settings),
    )
