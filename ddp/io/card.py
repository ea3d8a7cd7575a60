"""A model card: one page of Markdown that says what a model is, and a picture of its samples."""

import json
import os
import textwrap
from pathlib import Path

from ddp.data.files import printable
from ddp.io.checkpoint import strip_training_state
from ddp.io.describe import describe
from ddp.io.run_lock import read_record
from ddp.io.runs import read_evaluations
from ddp.io.tables import error_text, markdown_text
from ddp.options import SamplerOptions

DISTANCES = ("fd", "kid", "wasserstein2", "precision", "recall")  # shown of each feature space
BOUNDS = (("vlb", "discrete", "total"), ("vlb", "continuous", "total"))
LIKELIHOODS = (*BOUNDS, ("ode_nll", "uniform", "total"), ("ode_nll", "density", "total"))
SHOWN_OF_RECIPE = ("num_samples", "reference", "sampler", "steps", "unit")
MAX_FIGURES = 12
GRAPH = """A graph (.onnx, .pt2) computes `x_t` (B{event}) float32, `log_snr` (B,) float32{label} ->
`x0_hat` (B{event}) float32; `log_snr` is the noise level, log(alpha² / sigma²)."""

CARD = Path(__file__).with_name("card.md").read_text(encoding="utf-8")  # str.format's


def model_card(
    checkpoint,  # path of the model's file
    model,
    config,
    state,  # the checkpoint's dict
    checks,  # a line for each file that was written, which begins with its name
):
    """Return the text of a model card."""
    options = SamplerOptions().resolve(model)
    facts = describe(state, config)
    data = state["provenance"].get("dataset") or "the training data"
    names = [line.partition(":")[0] for line in checks]
    readable = "model.safetensors" if "model.safetensors" in names else checkpoint.name
    command = training_command(checkpoint.parent)
    is_pixels = "images in [-1, 1]" if model.is_pixels else "standardized; see model.units"
    return CARD.format(
        title=markdown_text(f"{data}: a diffusion model"),
        event=" x ".join(map(str, model.event)),
        kind={1: "points", 2: "sequences", 3: "images"}[len(model.event)],
        sampler=options["sampler"],
        steps=options["steps"],
        facts="\n".join(f"| {name} | {markdown_text(text)} |" for name, text in facts.items()),
        command=f"\nThe command: `{command}`\n" if command else "",
        settings=settings_text(state),
        figures="\n".join(figure_lines(checkpoint)),
        files="\n".join(file_lines(checks, model)),
        file=readable,
        label=", label=torch.arange(16) % model.num_classes" if model.num_classes else "",
        units=f"(16, {', '.join(map(str, model.event))}), {is_pixels}",
        data=markdown_text(data),
    )


def settings_text(state):
    """Return the settings that are not left open, without paths of this machine, in lines."""
    config = strip_training_state(state)["config"]
    given = {name: value for name, value in config.items() if value not in (None, "")}
    words = [f"{name}={json.dumps(value)}".replace(" ", "") for name, value in given.items()]
    return "\n".join(textwrap.wrap(" ".join(words), 100, break_on_hyphens=False))


def file_lines(checks, model):
    """Return a list in Markdown of what was written, and of what a graph takes and gives."""
    lines = [f"- `{line.replace(':', '`:', 1)}" for line in checks]
    if any(line.startswith(("model.onnx:", "model.pt2:")) for line in checks):
        event = "".join(f", {n}" for n in model.event)
        most = model.num_classes - 1
        null = f"; {model.num_classes}: no label" if model.has_null_label else ""
        label = f", `label` (B,) int64, 0 to {most}{null}" if model.num_classes else ""
        lines += ["", GRAPH.format(event=event, label=label)]
    return lines


def training_command(folder):
    """Return the command with which a run began here, by run.json, without paths; None: unknown."""
    record = read_record(folder)
    words = record.get("first_command", record.get("command"))
    if not isinstance(words, list) or not words:
        return None
    shown = []
    for word in map(str, words):
        flag, sign, value = word.rpartition("=")
        name = Path(value).name if os.path.isabs(value) else value
        shown.append(f"{flag}{sign}{name}")
    return printable(" ".join(["python", *shown]).replace("`", "'"), 1000)


def figure_lines(checkpoint):
    """Return a table of what evaluate.py measured of this very file, if its results lie beside."""
    for evaluation in read_evaluations(checkpoint):  # the newest with any of them
        rows = figure_rows(evaluation)
        if rows:
            break
    else:
        return ["It was not measured, or the results do not lie beside it."]
    head = ["| figure | samples | real items in their place |", "|---|---|---|"]
    count, reference, sampler, steps, unit = map(evaluation.recipe.get, SHOWN_OF_RECIPE)
    note = f"± is a standard error. {count} samples, {reference} items; sampled by {sampler} in "
    note += f"{steps} steps, measured by `evaluate.py`."
    if any(tuple(path.split("/")) in LIKELIHOODS for path in evaluation.figures):
        note += f" Likelihoods in {unit}."
    return [*head, *rows[:MAX_FIGURES], "", note]


def figure_rows(evaluation):
    """Return rows of a table, of what is shown of an Evaluation."""
    rows = []
    for path, estimate in evaluation.figures.items():
        keys = tuple(path.split("/"))
        if keys in LIKELIHOODS:
            rows.append(f"| {', '.join(keys)} | {error_text(estimate)} | |")
        elif keys == ("memorization", "near_duplicates"):
            rows.append(f"| near a training item (new items: 0.05) | {error_text(estimate)} | |")
        elif len(keys) == 3 and keys[1] in DISTANCES and keys[2] == "samples":
            real = error_text(evaluation.real[path])
            rows.append(f"| {keys[1]} of {keys[0]} | {error_text(estimate)} | {real} |")
    return rows
