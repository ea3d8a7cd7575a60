"""An evaluation as people read it: tables, as text and in one page of HTML that needs no network.

`results` is what evaluate.py writes as JSON: plain dicts, an estimate being {value, error,
interval}. A table is (title, note, head, rows), of text.
"""

import base64
import html
import io
import json

from ddp.quality import HIGHER_IS_BETTER

STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1rem; margin: 2rem 0 .2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #8884 }
td, th { white-space: nowrap } td:first-child, th:first-child { text-align: left; padding-left: 0 }
.pictures { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-end }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto; background: #fff }
@media (max-width: 40rem) { table { font-size: .8rem } td, th { padding: .2rem .5rem } }
.note { color: #b45309 } small, figcaption { color: #888 } small { overflow-wrap: anywhere }
pre { overflow-x: auto; padding: .8rem; border: 1px solid #8884 }
"""


def plus_minus(cell):
    """An estimate with its standard error, or a number, as text."""
    if not isinstance(cell, dict):
        return "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else f"{cell:,}"
    return f"{cell['value']:.4f}" + ("" if cell["error"] is None else f" ± {cell['error']:.4f}")


def interval(cell):
    """An estimate with its 95% interval, in the digits that its error allows."""
    if not isinstance(cell, dict) or cell["error"] is None:
        return plus_minus(cell)
    exponent = int(f"{cell['error']:e}".split("e")[1]) if cell["error"] > 1e-9 else -2
    numbers = (f"{x:.{min(max(0, 1 - exponent), 5)}f}" for x in (cell["value"], *cell["interval"]))
    return "{} [{}, {}]".format(*numbers)


def table(title, note, rows, show=interval):
    """A table of `rows`, name -> column -> cell; a column stands where it first appears."""
    head = list(dict.fromkeys(column for row in rows.values() for column in row))
    cells = [[name, *(show(row.get(c)) for c in head)] for name, row in rows.items()]
    return [(title, note, ["", *head], cells)] if rows else []


def tables_of(subject, results):
    """The tables of one subject; what was not measured has none."""
    recipe, exact = results["recipe"], subject.get("exact", {})
    quality, found = subject.get("quality", {}), subject.get("memorisation")
    note = "in three units, ± standard error"
    levels = subject.get("loss", {}).items()
    units = {level: {k: v for k, v in row.items() if k != "log_snr"} for level, row in levels}
    tables = table("test loss by noise level", note, units, plus_minus)
    nats = {f"bound, {view}": terms for view, terms in subject.get("bound", {}).items()}
    ways = {"uniform": ", uniform dequantisation", "noise": ", dequantised by the bound's noise"}
    nats |= {f"exact{ways.get(way, '')}": terms for way, terms in exact.items()}
    if nats and results["entropy"]:
        nats["entropy of the data"] = {"total": results["entropy"]}
    note = f"{recipe['unit']}, ± standard error; {recipe['test_items']:,} test items"
    note += f", {recipe['exact_items']:,} for the exact value" if exact else ""
    note += f", {recipe['exact_draws']} draws each" if "uniform" in exact else ""
    tables += table("negative log-likelihood", note, nats, plus_minus)
    rows = {
        f"{name}, {figure}": cells
        for name, row in subject.get("calibration", {}).items()
        for figure, cells in row.items()
    }
    tables += table("calibration", "± standard error", rows, plus_minus)
    if found:
        rows = {
            "median distance to the nearest training item": found["median"]["samples"],
            "the same of held-out items": found["median"]["held_out"],
            "their ratio; 0 of copies, 1 of new items": found.get("ratio"),
            "share nearer than 95% of held-out items; 0.05 of new items": found["close"],
            "exact copies": found["copies"],
        }
        rows = {name: {"": cell} for name, cell in rows.items()}
        tables += table("memorisation", "root mean square over pixels or coordinates", rows)
    for space, figures in quality.items():
        counts = figures.get("counts")
        if counts:
            pairs = zip(results["dataset"]["classes"], *counts.values(), strict=True)
            rows = {name: dict(zip(counts, pair, strict=True)) for name, *pair in pairs}
            tables += table(f"classes, by {space}", "", rows)
    for space, figures in quality.items():
        note = (
            f"{recipe['num_samples']:,} samples against as many {recipe['reference']} items; "
            f"floor: {recipe['floor_items']:,} items of the other split; 95% intervals; "
            "↓ lower is better"
        )
        if space == "judge":
            judge = recipe["judge"]
            note += f"; the judge of {judge['learned']} has {judge['accuracy']:.1%} right"
        rows = {
            f"{name} {'↑' if name in HIGHER_IS_BETTER else '↓'}": cells
            for name, cells in figures.items()
            if name != "counts"
        }
        tables += table(f"quality: {space}", note, rows)
    return tables


def comparison(results):
    """The table of all subjects side by side, each further one less the first; [] of one alone."""
    rows, names = {}, [s["name"] for s in results["subjects"]]
    for row in results["comparison"]:
        cells = rows.setdefault(row["figure"].removesuffix("/samples"), {})
        for subject in results["subjects"]:
            cells[subject["name"]], around = subject, {}
            for part in row["figure"].split("/"):
                around = cells[subject["name"]] or {}
                cells[subject["name"]] = around.get(part)
            cells.setdefault("floor", around.get("floor"))  # is the same for all
        cells[f"{row['subject']} less {names[0]}"] = row["difference"]
    columns = [*names, "floor", *(f"{name} less {names[0]}" for name in names[1:])]
    rows = {name: {c: cells.get(c) for c in columns} for name, cells in rows.items()}
    note = "95% intervals; differences are of the same real items and noise"
    return table("comparison", note, rows)


def text(results):
    """The tables as lines for a terminal: of one subject all, of several their comparison."""
    lines = []
    for title, note, head, rows in comparison(results) or tables_of(
        results["subjects"][0], results
    ):
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines += ["", title + (f" ({note})" if note else "")]
        for row in [head, *rows] if any(head) else rows:
            cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join([" ", row[0].ljust(widths[0]), *cells]).rstrip())
    return lines + [f"note: {n}" for n in results["notes"]]


def markup(table):
    title, note, head, rows = table

    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    lines = [line(head, "th")] * any(head) + [line(row, "td") for row in rows]
    return (
        f"<h3>{html.escape(title)}</h3><small>{html.escape(note)}</small>"
        f'<div class="wide"><table>{"".join(lines)}</table></div>'
    )


def picture(caption, image):
    """A PIL image within the page."""
    file, caption = io.BytesIO(), html.escape(caption)
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def page(results, pictures):
    """The evaluation as one HTML page. pictures: for each subject a dict, caption -> PIL image."""
    dataset, recipe = results["dataset"], results["recipe"]
    title = f"{', '.join(s['name'] for s in results['subjects'])} on {dataset['name']}"
    title, size = html.escape(title), "x".join(map(str, dataset["event"]))
    parts = [f"<p class=note>{html.escape(n)}</p>" for n in results["notes"]]
    parts += map(markup, comparison(results))
    for subject, shown in zip(results["subjects"], pictures, strict=True):
        about = [f"{k}: {v}" for k, v in subject["about"].items() if isinstance(v, (str, int))]
        parts += [f"<h2>{html.escape(subject['name'])}</h2>"]
        parts += [f"<small>{html.escape('; '.join(about))}</small>"]
        figures = "".join(picture(caption, image) for caption, image in shown.items())
        parts += [f'<div class="pictures">{figures}</div>']
        parts += map(markup, reversed(tables_of(subject, results)))
    settings = json.dumps({"dataset": dataset, "recipe": recipe}, indent=1)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><h1>{title}</h1><p>{dataset['train']:,} training and "
        f"{dataset['test']:,} test items of {size}; seed {recipe['seed']}.</p>{''.join(parts)}"
        f"<h2>recipe</h2><pre>{html.escape(recipe['command'])}</pre>"
        f"<details><summary>all settings</summary><pre>{html.escape(settings)}</pre></details>"
    )
