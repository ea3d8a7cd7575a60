"""Tables: made of estimates, and shown in a terminal, as HTML, Markdown, LaTeX and CSV."""

import csv
import io
import re
import shutil
import textwrap
from collections import namedtuple
from functools import partial
from html import escape
from pathlib import Path

from ddp.io.files import atomic_write

HEADS = {"real_vs_real": "real vs real", "relative_to_real": "relative to real"}
INDENT = 3  # spaces before a line of a table in a terminal
MAX_NUMBER = 30  # characters of a number with its interval; what is longer is words
LEAST_WIDTH, MOST_WIDTH = 60, 120  # columns of a terminal that a table is fitted to
LATEX_MARKS = {mark: f"\\{mark}" for mark in "&%$#_{}"}
LATEX_MARKS |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
LATEX_MARKS |= {"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "²": r"$^2$"}
LATEX_MARKS |= {"<": r"$<$", ">": r"$>$", "|": r"$|$"}
MARKDOWN_MARKS = {mark: f"\\{mark}" for mark in "\\|<>`[]*_"}

Table = namedtuple("Table", "title note head rows")  # text; rows: lists as long as head


# How a note says what is Best; a terminal has no bold type.
BOLD, STAR = "bold: ", "*: "


class Best(str):
    """The text of a cell that is the best of its row."""


def error_text(cell):
    """An estimate as value ± standard error, or a number, or nothing; text as it is."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, dict):
        error = cell["error"]
        if error is None:
            return f"{cell['value']:.4f}"
        digits = max(4, digits_of(error))
        return f"{cell['value']:.{digits}f} ± {error:.{digits}f}"
    if cell is None:
        return ""
    return f"{cell:.4g}" if isinstance(cell, float) else f"{cell:,}"


def interval_text(cell):
    """An estimate with its 95% interval, in the digits that its error allows."""
    if not isinstance(cell, dict) or cell["error"] is None:
        return error_text(cell)  # which has no interval
    digits = digits_of(cell["error"])
    low, high = cell["interval"]
    return f"{cell['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def digits_of(error):
    """The decimals of a number with such an error: two digits of it, three where it is 0."""
    exponent = int(f"{error:e}".split("e")[1]) if error > 1e-9 else -2
    return min(max(0, 1 - exponent), 5)


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


# ---- in a terminal ----


def table_lines(tables, width=None):
    """Tables as lines for a terminal of so many columns (default: as wide as it is).

    What is wider stands in parts, one below the other, each with the names of the rows."""
    width = width or terminal_width()
    lines = []
    for table in tables:
        title = f"{table.title} ({table.note})" if table.note else table.title
        lines += ["", *wrapped(title.replace(BOLD, STAR), width)]
        rows = [table.head, *table.rows] if any(table.head) else table.rows  # of text
        rows = [[f"*{cell}" if isinstance(cell, Best) else cell for cell in row] for row in rows]
        for i, part in enumerate(fitting_parts(rows, width)):
            lines += [""] * (i > 0) + part
    return lines


def terminal_width():
    """The columns of the terminal, within reason; of a file MOST_WIDTH."""
    columns = shutil.get_terminal_size((MOST_WIDTH, 24)).columns
    return min(max(columns, LEAST_WIDTH), MOST_WIDTH)


def wrapped(text, width=None):
    """Text as lines of a terminal's width; all but the first are indented. Words stay whole."""
    how = {"subsequent_indent": " " * INDENT, "break_on_hyphens": False, "break_long_words": False}
    return textwrap.wrap(text, width or terminal_width(), **how)


def fitting_parts(rows, width):
    """Rows of text as lines, in as many parts as fit into a width: a list of lists."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]  # in characters
    parts = [[]]  # the columns of each part, after that of names
    used = INDENT + widths[0]
    for column in range(1, len(widths)):
        used += 2 + widths[column]
        if used > width and parts[-1]:
            parts.append([])
            used = INDENT + widths[0] + 2 + widths[column]
        parts[-1].append(column)
    return [[row_line(row, columns, widths) for row in rows] for columns in parts]


def row_line(row, columns, widths):
    """Some columns of a row as a line: the name to the left, numbers to the right."""
    cells = [row[0].ljust(widths[0]), *(row[k].rjust(widths[k]) for k in columns)]
    return (" " * INDENT + "  ".join(cells)).rstrip()


# ---- for a page and a paper ----


def html_table(table):
    """A Table as HTML, with everything escaped; what is best is bold."""
    lines = []
    for row in [table.head, *table.rows] if any(table.head) else table.rows:
        tag = "th" if row is table.head else "td"
        cells = [html_cell(cell, tag) for cell in row]
        cells[0] = cells[0].replace("/", "/<wbr>", cells[0].count("/") - 1)  # where it may wrap
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<h3>{escape(table.title)}</h3><small>{escape(table.note)}</small>"
        f'<div class="wide"><table>{"".join(lines)}</table></div>'
    )


def html_cell(cell, tag):
    """A cell of a table; words may wrap, a number with its error or interval may not."""
    text = f"<b>{escape(cell)}</b>" if isinstance(cell, Best) else escape(cell)
    kind = ' class="words"' if len(cell) > MAX_NUMBER else ""
    return f"<{tag}{kind}>{text}</{tag}>"


def markdown_text(text):
    """Text that stands in a table of Markdown as it is."""
    return "".join(MARKDOWN_MARKS.get(mark, mark) for mark in text)


def markdown(tables):
    """Tables as Markdown."""

    def text(cell):
        return f"**{markdown_text(cell)}**" if isinstance(cell, Best) else markdown_text(cell)

    lines = []
    for table in tables:
        lines += [f"### {text(table.title)}", ""]
        lines += [text(table.note), ""] if table.note else []
        rows = [[text(cell) for cell in row] for row in (table.head, *table.rows)]
        rows.insert(1, ["---"] + ["---:"] * (len(table.head) - 1))
        lines += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join(lines)


def latex(tables):
    """Tables as LaTeX, for the package booktabs."""

    def text(cell):
        shown = "".join(LATEX_MARKS.get(mark, mark) for mark in cell)
        shown = re.sub(r"(?<![\w.)-])-(?=\d)", "$-$", shown)  # a minus, not a hyphen
        return rf"\textbf{{{shown}}}" if isinstance(cell, Best) else shown

    lines = [r"% \usepackage{booktabs}"]
    for table in tables:
        note = f": {table.note}" if table.note else ""
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{text(table.title + note)}}}"]
        lines.append(rf"\label{{tab:{re.sub(r'[^a-z0-9]+', '-', table.title.lower())}}}")
        lines.append(rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}")
        lines += [r"\toprule", " & ".join(map(text, table.head)) + r" \\", r"\midrule"]
        lines += [" & ".join(map(text, row)) + r" \\" for row in table.rows]
        lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def csv_text(tables):
    """Tables as CSV, a line for each cell: value and spread apart, for programs to read."""
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["table", "row", "column", "value", "spread"])
    for table in tables:
        for row in table.rows:
            for column, cell in zip(table.head[1:], row[1:], strict=True):
                value, _, spread = cell.partition(" ± ")
                writer.writerow([table.title, row[0], column, value, spread])
    return file.getvalue()


FORMATS = {".md": markdown, ".tex": latex, ".csv": csv_text}


def write_tables(folder, name, tables):
    """Write tables into a folder in each of FORMATS -> their paths."""
    paths = []
    for suffix, write in FORMATS.items():
        data = write(tables).encode()
        path = folder / f"{name}{suffix}"
        paths.append(atomic_write(path, partial(Path.write_bytes, data=data)))
    return paths
