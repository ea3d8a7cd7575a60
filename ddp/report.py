"""An evaluation as people read it: tables, as text and as one page of HTML that needs no network.

`results` is what evaluate.py writes as JSON: plain dicts, an estimate being {value, error,
interval}.
"""

import base64
import html
import io
import json

from ddp.quality import HIGHER_IS_BETTER

BETTER = dict.fromkeys((*HIGHER_IS_BETTER, "named", "agreement"), "higher")
UNITS = ("x0", "eps", "v")
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8888 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .3rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid var(--line) }
th { font-weight: 600; white-space: nowrap } td { white-space: nowrap }
td:first-child, th:first-child { text-align: left; padding-left: 0 }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto; background: #fff }
.note { color: #b45309 } small, figcaption { color: #777 }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line) }
"""


def number(x):
    """Four digits that matter, without an exponent where one can do without."""
    if x is None:
        return "-"
    return f"{x:,}" if isinstance(x, int) else f"{x:.4g}" if abs(x) < 1e4 else f"{x:,.0f}"


def digits(error):
    """Decimals that show an error's first two digits."""
    return max(0, 1 - int(f"{error:e}".split("e")[1])) if error > 1e-9 else 3


def interval(e):
    """An estimate with its 95% interval."""
    if e is None:
        return "-"
    if e["error"] is None:
        return number(e["value"])
    n = min(digits(e["error"]), 5)
    low, high = e["interval"]
    return f"{e['value']:.{n}f} [{low:.{n}f}, {high:.{n}f}]"


def plus_minus(e):
    """An estimate with its standard error."""
    if e is None:
        return ""
    return f"{e['value']:.4f}" + ("" if e["error"] is None else f" ± {e['error']:.4f}")


def likelihood(subject, results):
    recipe = results["recipe"]
    terms = ("prior", "diffusion", "reconstruction", "total")
    rows, bound, exact, entropy = (
        [],
        subject.get("bound", {}),
        subject.get("exact"),
        results["entropy"],
    )
    for view in bound:
        cells = [plus_minus(bound[view][term]) for term in terms]
        noise = f"{bound[view]['monte_carlo']:.4f}"
        rows.append([f"bound, {view}", *cells, noise, plus_minus(bound[view].get("gap"))])
    if exact:
        blank, uniform = ["", "", ""], "importance_weighted" in exact
        name = "exact, uniform dequantisation" if uniform else "exact"
        rows.append([name, *blank, plus_minus(exact["total"]), "",
                     plus_minus(exact.get("gap"))])  # fmt: skip
        if uniform:
            name = f"exact, importance-weighted over {recipe['exact_draws']}"
            rows.append([name, *blank, plus_minus(exact["importance_weighted"]), "", ""])
    if not rows:
        return []
    if entropy:
        rows.append(["entropy of the data", "", "", "", plus_minus(entropy), "", ""])
    head = ["", *terms, "Monte Carlo", "gap"]
    if not entropy:  # no gap is known
        head, rows = head[:-1], [row[:-1] for row in rows]
    items = [f"{recipe['test_items']:,} test items"] if bound else []
    items += [f"{recipe['exact_items']:,} for the exact value"] if exact else []
    note = f"{recipe['unit']}, ± standard error; {', '.join(items)}"
    return [("negative log-likelihood", note, head, rows)]


def quality(subject, recipe):
    tables = []
    for space, found in subject.get("quality", {}).items():
        rows = [
            [
                f"{name} {'↑' if name in BETTER else '↓'}",
                *(interval(found[name].get(k)) for k in ("samples", "floor", "ratio")),
            ]
            for name in found
            if name != "counts"
        ]
        note = (
            f"{recipe['num_samples']:,} samples against as many {recipe['reference']} items; "
            f"floor: {recipe['floor_items']:,} items of the other split in their place; "
            "95% intervals; ↓ lower is better"
        )
        tables.append((f"quality: {space}", note, ["", "samples", "floor", "ratio"], rows))
    return tables


def classes(subject, names):
    tables = []
    for space, found in subject.get("quality", {}).items():
        if "counts" in found:
            labels = names or [f"turned {i}" for i in range(len(found["counts"]["real"]))]
            rows = [
                [name, *map(number, pair)]
                for name, *pair in zip(labels, *found["counts"].values(), strict=True)
            ]
            tables.append((f"classes, by {space}", "", ["", "samples", "real"], rows))
    return tables


def memorisation(subject):
    found = subject.get("memorisation")
    if not found:
        return []
    rows = [
        ["median distance to the nearest training item", number(found["median"]["samples"])],
        ["the same of held-out items", number(found["median"]["held_out"])],
        ["their ratio; copies are 0, new items 1", interval(found["ratio"])],
        ["share closer than 95% of held-out items; new items 0.05", interval(found["close"])],
        ["exact copies", number(found["copies"])],
    ]
    return [("memorisation", "root mean square over pixels or coordinates", ["", ""], rows)]


def calibration(subject):
    found = subject.get("calibration", {})
    rows = [
        [f"{name}, {figure}", *(plus_minus(e[k]) for k in ("samples", "real", "difference"))]
        for name, row in found.items()
        for figure, e in row.items()
    ]
    head = ["", "samples", "real", "difference"]
    return [("calibration", "± standard error", head, rows)] if rows else []


def loss(subject):
    rows = [
        [f"{row['t']:.2f}", f"{row['log_snr']:.2f}", *(plus_minus(row[u]) for u in UNITS)]
        for row in subject.get("loss", [])
    ]
    note = "mean squared error in three units, ± standard error"
    return [("test loss by noise level", note, ["t", "log-SNR", *UNITS], rows)] if rows else []


def tables_of(subject, results):
    """(title, note, head, rows) of each table of a subject; cells are text."""
    recipe = results["recipe"]
    return [
        *loss(subject),
        *likelihood(subject, results),
        *calibration(subject),
        *memorisation(subject),
        *classes(subject, results["dataset"]["classes"]),
        *quality(subject, recipe),
    ]


def comparison(results):
    """The table of all subjects side by side, each further one less the first."""
    first, *others = results["subjects"]
    if not others:
        return []
    rows = {}
    for row in results["comparison"]:
        rows.setdefault(row["figure"], {})[row["subject"]] = row["difference"]
    head = ["", *(s["name"] for s in results["subjects"])]
    head += [f"{s['name']} less {first['name']}" for s in others]

    def at(subject, path):
        for part in path.split("/"):
            subject = subject.get(part) if isinstance(subject, dict) else None
        return subject

    table = []
    for path, differences in rows.items():
        cells = [plus_minus(at(s, path)) for s in results["subjects"]]
        table.append([path, *cells, *(interval(differences.get(s["name"])) for s in others)])
    return [("comparison", "± standard error; differences with paired 95% intervals", head, table)]


def text(results):
    """The tables as lines for a terminal: of one subject all, of several their comparison."""
    tables = comparison(results) or tables_of(results["subjects"][0], results)
    lines = []
    for title, note, head, rows in tables:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines += ["", title + (f" ({note})" if note else "")]
        for row in [head, *rows] if any(head) else rows:
            first, *rest = (
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            lines.append(("  " + "  ".join([first, *rest])).rstrip())
    return lines + [f"note, {n}" for n in results["notes"]]


def markup(table):
    title, note, head, rows = table

    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    top = line(head, "th") if any(head) else ""
    body = "".join(line(row, "td") for row in rows)
    small = f"<small>{html.escape(note)}</small>" if note else ""
    return f'<h3>{html.escape(title)}</h3>{small}<div class="wide"><table>{top}{body}</table></div>'


def picture(caption, image):
    """A PIL image within the page."""
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def page(results, pictures):
    """The evaluation as one HTML page. pictures: for each subject a dict, caption -> PIL image."""
    dataset, parts = results["dataset"], []
    names = [s["name"] for s in results["subjects"]]
    title = html.escape(f"{', '.join(names)} on {dataset['name']}")
    parts += [f"<p class=note>{html.escape(n)}</p>" for n in results["notes"]]
    parts += map(markup, comparison(results))
    for subject, shown in zip(results["subjects"], pictures, strict=True):
        parts.append(f"<h2>{html.escape(subject['name'])}</h2>")
        about = [f"{k}: {v}" for k, v in subject["about"].items() if isinstance(v, (str, int))]
        parts.append(f"<small>{html.escape('; '.join(about))}</small>")
        parts += [picture(caption, image) for caption, image in shown.items()]
        parts += map(markup, reversed(tables_of(subject, results)))
    recipe = json.dumps({k: results[k] for k in ("dataset", "recipe")}, indent=1)
    size = "x".join(map(str, dataset["event"]))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><h1>{title}</h1>"
        f"<p>{dataset['train']:,} training and {dataset['test']:,} test items of {size}; "
        f"seed {results['recipe']['seed']}.</p>{''.join(parts)}"
        f"<h2>recipe</h2><pre>{html.escape(results['recipe']['command'])}</pre>"
        f"<details><summary>all settings</summary><pre>{html.escape(recipe)}</pre></details></html>"
    )
