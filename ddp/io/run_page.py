"""report.html of a run: where it stands, its curves, samples as it went, its settings.

One page that needs no network and no other file; in the style of an evaluation's.
"""

import base64
import shlex
import sys
import time
from dataclasses import asdict
from pathlib import Path, PurePath

import torch

from ddp.io.checkpoint import provenance
from ddp.io.figures import loss_by_level, rate_curve
from ddp.io.page import html_figures, html_page, write_html
from ddp.io.run_lock import read_record
from ddp.metrics.likelihood import loss_by_noise_level
from ddp.metrics.uncertainty import Estimate
from ddp.validation import fitting_batch

NAME = "report.html"
PLACES = ("dataset", "data_dir", "out_dir", "labels", "cache")  # of this machine
MAX_GRIDS = 12  # grids of samples that are shown, the first and the newest among them
MAX_GRID_BYTES = 1_500_000  # of them together: the page is to be sent by mail
LEVEL_ITEMS = 200  # items on which the loss by noise level is measured
SLIDER = """<p><label>step <output id="step">{step}</output>
<input type="range" id="grid" min="0" max="{last}" value="{last}" aria-label="grid of samples"
 oninput="show(this.value)" style="width: 100%"></label></p>
<div id="grids">{grids}</div>
<script>
function show(shown) {{
  document.querySelectorAll("#grids figure").forEach((figure, i) => {{
    figure.hidden = i != shown
    if (i == shown) document.getElementById("step").value = figure.dataset.step
  }})
}}
</script>"""


def write_page(folder, trainer, rows, curve, levels):
    """Write report.html into a run's folder.

    rows: of log.csv, see run_log.read_log. curve: a picture of their loss, or None. levels: see
    loss_levels."""
    config = trainer.config
    chosen = {name: value for name, value in asdict(config).items() if name not in PLACES}
    name = PurePath(config.dataset).name  # no path: the page may be sent around
    settings = {"data": name, "chosen": chosen, "provenance": provenance(trainer.dataset)}
    figures = {
        "loss: of training, and of items that no gradient sees": curve,
        "loss of the EMA model by noise level": loss_by_level(levels),
        "learning rate, and norm of the gradient": rate_curve(rows) if rows else None,
    }
    shown = {caption: figure for caption, figure in figures.items() if figure}
    page = html_page(
        f"{Path(folder).name}: {trainer.num_params:,} weights on {name}",
        summary(trainer, rows),
        ["<h2>samples</h2>", slider(folder), "<h2>training</h2>", html_figures(shown)],
        shlex.join(["python", *begun_with(folder)]),
        settings,
    )
    write_html(Path(folder) / NAME, page)


def begun_with(folder):
    """Return the words of the command with which the run in a folder began."""
    words = read_record(folder).get("first_command", sys.argv)
    return [str(word) for word in words] if isinstance(words, list) else sys.argv


def summary(trainer, rows):
    """Return where a run stands, a line."""
    steps = trainer.num_steps
    items = trainer.step * trainer.config.batch_size * trainer.config.grad_accumulation
    parts = [f"Step {trainer.step:,} of {steps:,}, epoch {items / len(trainer.dataset.train):.1f}"]
    if rows:
        parts.append(f"loss {float(rows[-1]['loss']):.4f}")
        tested = [row["val_loss"] for row in rows if row["val_loss"]]
        parts += [f"of held-out items {float(tested[-1]):.4f}"] if tested else []
    if trainer.seconds and trainer.step:
        left = trainer.seconds * (steps - trainer.step) / trainer.step
        parts.append(f"{trainer.seconds / 60:.1f} minutes of training")
        parts[-1] += f", {left / 60:.1f} left" if left else ", all of it"
        parts.append(f"{items / trainer.seconds:,.0f} items a second")
    memory = peak_memory(trainer.device)
    parts += [f"{memory / 1e6:,.0f} MB of memory at most"] if memory else []
    now = time.strftime("%Y-%m-%d %H:%M")
    return f"{'; '.join(parts)}. Written {now} on {trainer.device}, {trainer.precision}."


def peak_memory(device):
    """Return the most bytes that this process held on the device, or None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def loss_levels(trainer):
    """Return the loss of the EMA model at ten noise levels, as figures.loss_by_level takes it."""
    dataset = trainer.dataset
    count = min(fitting_batch(dataset.event, LEVEL_ITEMS), dataset.num_selection)
    x0, label = dataset.selection_items(torch.arange(count))
    label = label.to(trainer.device) if trainer.model.num_classes else None
    model = trainer.recalibrated_ema()
    rows = loss_by_noise_level(
        model, x0.to(trainer.device), torch.arange(count), trainer.config.seed, label=label
    )
    named = {}
    for row in rows:
        estimates = {unit: Estimate.mean(row[unit]) for unit in ("x0", "eps", "v")}
        named[f"{row['log_snr']:.2f}"] = {"log_snr": row["log_snr"], **estimates}
    return named


def slider(folder):
    """Return the grids of samples of a run as HTML, of which a slider shows one."""
    paths = sorted((Path(folder) / "samples").glob("step_*.png"))
    paths = evenly(paths, MAX_GRIDS)
    while len(paths) > 1 and sum(path.stat().st_size for path in paths) > MAX_GRID_BYTES:
        paths = evenly(paths, len(paths) - 1)
    grids = []
    for path in paths:
        step = int(path.stem.removeprefix("step_"))
        data = base64.b64encode(path.read_bytes()).decode()
        hidden = "" if path == paths[-1] else " hidden"
        grids.append(
            f'<figure data-step="{step:,}"{hidden}><img alt="samples at step {step:,}" '
            f'src="data:image/png;base64,{data}"></figure>'
        )
    if not grids:
        return "<p>None yet.</p>"
    return SLIDER.format(step=f"{step:,}", last=len(grids) - 1, grids="".join(grids))


def evenly(things, count):
    """Return at most `count` things of a list, evenly spread, the first and the last among them."""
    if len(things) <= count:
        return things
    if count == 1:
        return things[-1:]
    return [things[i * (len(things) - 1) // (count - 1)] for i in range(count)]
