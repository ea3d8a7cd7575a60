"""Pages of a run, an evaluation, a comparison: one HTML file each, which needs no network."""

import base64
import io
import json
from html import escape
from pathlib import Path
from string import Template

from ddp.io.figures import to_pil
from ddp.io.files import atomic_write

TEMPLATE = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def html_page(title, summary, body, command, settings):
    """A page as text. All is escaped but the body, a list of pieces of HTML.

    command: what to type for it again. settings: plain types, shown as JSON."""
    return TEMPLATE.substitute(
        title=escape(title),
        summary=escape(summary),
        body="\n".join(body),
        command=escape(command),
        settings=escape(json.dumps(settings, indent=1)),
    )


def write_html(path, page):
    """Write a page, whole or not at all."""
    atomic_write(path, lambda path: path.write_text(page, encoding="utf-8"))


def html_figure(caption, image):
    """A PIL image, or a Figure, within the page."""
    file = io.BytesIO()
    to_pil(image).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()  # within the page: no second file
    caption = escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def html_figures(figures, kind="figures"):
    """Figures beside each other, as many as the window is wide; caption -> image.

    kind: "figures" to read, or "grids" of samples, which may be smaller."""
    shown = [html_figure(caption, image) for caption, image in figures.items()]
    return f'<div class="{kind}">{"".join(shown)}</div>'


def html_list(lines):
    """Lines of text as a list."""
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def html_details(title, shown):
    """HTML that is closed until it is asked for."""
    return f"<details><summary>{escape(title)}</summary>{shown}</details>"


def html_terms(terms):
    """Terms with their meanings, closed until they are asked for: term -> text."""
    parts = [f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in terms.items()]
    return html_details("what the words mean", f"<dl>{''.join(parts)}</dl>")
